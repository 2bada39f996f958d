"""Kernels of GroupNorm, InstanceNorm and RMSNorm, as the contract has them: tables of kernels on flat memory."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from kernel_truth import check, computed_in, kernel_inputs, plain_formulas

from fastnorm.bench.cases import DTYPES, dtype_of

MODULES = {
    "cpp": "fastnorm.backends.cpp",
    "numba": "fastnorm.backends.numba_cpu",
    "numpy": "fastnorm.reference.kernels",
}
dtypes = pytest.mark.parametrize("dtype", DTYPES)

# (samples, outer, channels, inner, groups): channels first where outer is 1, else channels last (or side by side).
GROUPS = [
    (3, 1, 6, 10, 2), (3, 10, 6, 1, 2), (2, 1, 8, 49, 8), (2, 49, 8, 1, 4), (5, 1, 12, 1, 3), (1, 1, 5, 1, 5),
    (70, 1, 4, 5, 2), (131, 20, 24, 1, 3), (3, 1, 33, 47, 11), (3, 47, 33, 1, 11), (2, 1, 6, 9001, 2),
    (2, 9001, 6, 1, 2), (1, 1, 4, 50_001, 1), (4, 196, 520, 1, 8), (4, 1, 520, 196, 8), (2, 300, 40, 3, 5),
    (2, 7, 33, 3, 11), (3, 1025, 7, 1, 7), (1000, 1, 32, 3, 8), (259, 1, 300, 1, 20), (3, 5, 35, 1, 7),
    (2, 1, 42, 9, 7), (13, 4, 21, 1, 3), (6, 3, 90, 1, 9), (133, 4, 8, 1, 4), (41, 6, 10, 3, 5),
    (257, 25, 3, 1, 1), (70, 9, 12, 1, 6), (90, 4, 24, 1, 8), (77, 3, 40, 1, 40), (150, 2, 6, 3, 2), (61, 2, 19, 2, 19),
    (33, 60, 5, 1, 5), (48, 17, 17, 1, 1), (2, 5441, 3, 1, 3),
]  # fmt: skip
ROWS = [(1, 1), (5, 7), (300, 129), (4, 4099), (37, 1024), (2, 100_003)]

groups = pytest.mark.parametrize("shape", GROUPS, ids=str)
rows = pytest.mark.parametrize("shape", ROWS, ids=str)


@pytest.fixture
def table(backend):
    kernels = importlib.import_module(MODULES[backend])
    yield kernels
    kernels.set_num_threads(2)


def _of_groups(table, shape, x, dy, gamma, beta, eps=1e-5):
    samples, _, channels, _, count = shape
    y, dx = np.empty_like(x), np.empty_like(x)
    mean, var = np.full((2, samples * count), 7.0)
    sum_dy, sum_dy_xhat = np.full((2, channels), 7.0)
    table.group_forward(x, *shape, gamma, beta, eps, y, mean, var)
    table.group_backward(dy, x, *shape, mean, var, eps, gamma, dx, sum_dy, sum_dy_xhat)
    return {"y": y, "mean": mean, "var": var, "dx": dx, "sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}


def _of_rows(table, shape, x, dy, gamma, beta, eps=1e-5):
    count, cols = shape
    y, dx, var = np.empty_like(x), np.empty_like(x), np.full(count, 7.0)
    dgamma, dbeta = np.full((2, cols), 7.0)
    table.row_forward(x, count, cols, gamma, beta, eps, y, None, var)
    table.row_backward(dy, x, count, cols, None, var, eps, gamma, dx, dgamma, dbeta)
    return {"y": y, "var": var, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def _truth_of_groups(shape, x, dy, gamma, beta, eps=1e-5, accumulation=np.float32):
    samples, outer, channels, inner, count = shape
    apart = (samples, outer, count, channels // count, inner)
    gamma, beta = (a.reshape(1, 1, count, -1, 1) for a in (gamma, beta))
    return plain_formulas(x.reshape(apart), dy.reshape(apart), gamma, beta, (1, 3, 4), (0, 1, 4), eps, accumulation)


@dtypes
@groups
def test_groups_against_float64(shape, dtype, table):
    samples, outer, channels, inner, _ = shape
    inputs = kernel_inputs(samples * outer * channels * inner, channels, dtype)
    accumulation = computed_in(dtype)
    results = _of_groups(table, shape, *inputs)
    truth = _truth_of_groups(shape, *inputs, accumulation=accumulation)
    check(results, truth, dtype_of(dtype), accumulation, inputs[0].size)


@dtypes
@pytest.mark.parametrize("length", [1, 5, 16, 17, 40, 300, 1024, 1025])
def test_groups_depend_on_nothing_else(length, dtype, table):
    """Also where a kernel sums several short runs together, and some of them start far from their mean."""
    channels = 11
    x, _, gamma, beta = kernel_inputs(channels * length, channels, dtype)
    x = x.reshape(channels, length)
    x[[2, 7, 8], :16] += dtype_of(dtype).type(1e3)
    x[4, 0] = np.nan

    def forward(x, gamma, beta):
        y, mean, var = np.empty_like(x), np.empty(len(x)), np.empty(len(x))
        table.group_forward(x, 1, 1, len(x), length, len(x), gamma, beta, 1e-5, y, mean, var)
        return y, mean, var

    together = forward(x, gamma, beta)
    for c in range(channels):
        alone = forward(x[c : c + 1].copy(), gamma[c : c + 1].copy(), beta[c : c + 1].copy())
        for found, expected in zip(together, alone, strict=True):
            assert found[c].tobytes() == expected[0].tobytes(), c
    good = np.arange(channels) != 4
    truth = x[good].astype(np.float64)
    off = np.abs(together[1][good] - truth.mean(1))
    assert (off <= 1e-6 * (np.abs(truth.mean(1)) + truth.std(1))).all()
    np.testing.assert_allclose(together[2][good], truth.var(1), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [shape for shape in GROUPS if shape[0] > 1], ids=str)
def test_a_sample_depends_on_no_other(shape, dtype, table):
    """To the bit, however many a kernel takes together."""
    samples, outer, channels, inner, count = shape
    x, dy, gamma, beta = kernel_inputs(samples * outer * channels * inner, channels, dtype)
    together = _of_groups(table, shape, x, dy, gamma, beta)
    for n in {0, 1, samples // 2, samples - 1}:
        own = (a.reshape(samples, -1)[n].copy() for a in (x, dy))
        alone = _of_groups(table, (1, outer, channels, inner, count), *own, gamma, beta)
        for name in ("y", "mean", "var", "dx"):
            assert together[name].reshape(samples, -1)[n].tobytes() == alone[name].tobytes(), (name, n)


@pytest.mark.parametrize("ratio", [1e3, 1e6])
@pytest.mark.parametrize("shape", [(3, 1, 33, 47, 11), (3, 47, 33, 1, 11), (2, 1, 6, 9001, 2), (2, 9001, 6, 1, 2)])
def test_groups_far_from_zero(shape, ratio, table):
    """The error does not grow with mean over spread, also where the means of a group's channels differ."""
    samples, outer, channels, inner, _ = shape
    x, dy, gamma, beta = kernel_inputs(samples * outer * channels * inner, channels, "float32")
    by_channel = x.reshape(samples, outer, channels, inner) + np.arange(channels).reshape(-1, 1) * 0.5 + ratio
    x = by_channel.astype(np.float32).ravel()
    truth = _truth_of_groups(shape, x, dy, gamma, beta)
    check(_of_groups(table, shape, x, dy, gamma, beta), truth, np.float32, np.float32, x.size)


@dtypes
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 6e-5])
@groups
def test_a_constant_group_gives_exactly_beta(shape, value, eps, dtype, table):
    samples, outer, channels, inner, count = shape
    x, dy, gamma, beta = kernel_inputs(samples * outer * channels * inner, channels, dtype)
    x[:] = value
    results = _of_groups(table, shape, x, dy, gamma, beta, eps)
    assert (results["var"] == 0).all()
    assert (results["mean"] == np.float64(x[0])).all()
    expected = np.broadcast_to(beta.reshape(-1, 1), (samples, outer, channels, inner)).astype(x.dtype)
    assert (results["y"] == expected.ravel()).all()
    if outer * inner * (channels // count) == 1:
        assert (results["dx"] == 0).all()


SPANS = [(3, outer, 7 * span, inner, 7) for span in range(1, 18) for outer, inner in ((1, 5), (4, 1))]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "shape", [(3, 1, 6, 10, 2), (3, 10, 6, 1, 2), (2, 1, 6, 9001, 3), (2, 9001, 6, 1, 3), *SPANS], ids=str
)
def test_nan_stays_in_its_group_of_its_sample(shape, poison, table):
    """It changes no bit of the others, in whatever lanes of a vector a group and its neighbours lie."""
    samples, outer, channels, inner, count = shape
    x, dy, gamma, beta = kernel_inputs(samples * outer * channels * inner, channels, "float32")
    clean = _of_groups(table, shape, x, dy, gamma, beta)
    for group in {0, 1, count // 2, count - 1}:
        poisoned = x.copy()
        poisoned.reshape(samples, outer, count, -1, inner)[1, outer // 2, group, 0, inner // 2] = poison
        results = _of_groups(table, shape, poisoned, dy, gamma, beta)
        for name, apart, own in (
            *((name, (samples, outer, count, -1), np.s_[1, :, group]) for name in ("y", "dx")),
            *((name, (samples, count), np.s_[1, group]) for name in ("mean", "var")),
            *((name, (count, -1), np.s_[group]) for name in ("sum_dy", "sum_dy_xhat")),
        ):
            found, expected = results[name].reshape(apart), clean[name].reshape(apart).copy()
            if name in ("y", "dx"):
                assert np.isnan(found[own]).any()
            found[own] = expected[own] = 0
            assert found.tobytes() == expected.tobytes(), (name, group)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [*GROUPS, (3, 3001, 260, 1, 4), (33, 1, 64, 784, 8), (2, 1, 3, 200_003, 3), (2, 100_003, 4, 1, 2)], ids=str
)
def test_groups_have_equal_bits_for_any_number_of_threads(shape, dtype, table):
    samples, outer, channels, inner, _ = shape
    inputs = kernel_inputs(samples * outer * channels * inner, channels, dtype)
    found = []
    for threads in (1, 2, 3):
        table.set_num_threads(threads)
        found.append({name: a.tobytes() for name, a in _of_groups(table, shape, *inputs).items()})
    assert found[1] == found[0]
    assert found[2] == found[0]


@groups
def test_groups_in_place(shape, table):
    samples, outer, channels, inner, _ = shape
    x, dy, gamma, beta = kernel_inputs(samples * outer * channels * inner, channels, "float32")
    apart = _of_groups(table, shape, x, dy, gamma, beta)
    mean, var, sums = apart["mean"], apart["var"], np.empty((2, channels))
    for out in ("dy", "x"):
        given = {"dy": dy.copy(), "x": x.copy()}
        table.group_backward(given["dy"], given["x"], *shape, mean, var, 1e-5, gamma, given[out], *sums)
        np.testing.assert_array_equal(given[out], apart["dx"])
    table.group_forward(x, *shape, gamma, beta, 1e-5, x, mean, var)
    np.testing.assert_array_equal(x, apart["y"])


@pytest.mark.parametrize("shape", [(3, 1, 6, 10, 2), (3, 47, 33, 1, 11)], ids=str)
def test_groups_without_parameters_or_write_access(shape, table):
    samples, outer, channels, inner, _ = shape
    x, dy, gamma, beta = kernel_inputs(samples * outer * channels * inner, channels, "float32")
    gamma[:], beta[:] = 1.0, 0.0
    expected = _of_groups(table, shape, x, dy, gamma, beta)
    for array in (x, dy):
        array.flags.writeable = False
    results = _of_groups(table, shape, x, dy, None, None)
    for name, result in results.items():
        np.testing.assert_array_equal(result, expected[name])


@dtypes
@rows
def test_rows_that_are_not_centred_against_float64(shape, dtype, table):
    inputs = kernel_inputs(shape[0] * shape[1], shape[1], dtype)
    accumulation = computed_in(dtype)
    x, dy, gamma, beta = inputs
    results = _of_rows(table, shape, *inputs)
    results["sum_dy"], results["sum_dy_xhat"] = results.pop("dbeta"), results.pop("dgamma")
    truth = plain_formulas(x.reshape(shape), dy.reshape(shape), gamma, beta, 1, 0, 1e-5, accumulation, centred=False)
    check(results, truth, dtype_of(dtype), accumulation, max(shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@rows
def test_rows_that_are_not_centred_depend_on_nothing_else(shape, dtype, table):
    """Not on the number of threads; a row's y and dx not on the other rows."""
    x, dy, gamma, beta = kernel_inputs(shape[0] * shape[1], shape[1], dtype)
    found = []
    for threads in (1, 2, 3):
        table.set_num_threads(threads)
        found.append({name: a.tobytes() for name, a in _of_rows(table, shape, x, dy, gamma, beta).items()})
    assert found[1] == found[0]
    assert found[2] == found[0]
    cols = shape[1]
    alone = _of_rows(table, (1, cols), x[-cols:], dy[-cols:], gamma, beta)
    whole = _of_rows(table, shape, x, dy, gamma, beta)
    for name in ("y", "dx"):
        np.testing.assert_array_equal(whole[name][-cols:], alone[name])


def test_rows_of_zeros_give_exactly_beta(table):
    x, dy, gamma, beta = kernel_inputs(3 * 130, 130, "float32")
    x[:] = 0
    for eps in (1e-5, 0.0):
        results = _of_rows(table, (3, 130), x, dy, gamma, beta, eps)
        np.testing.assert_array_equal(results["y"].reshape(3, 130), np.broadcast_to(beta, (3, 130)))


def test_infinite_gradients_of_rows_that_are_not_centred(table):
    """There is no mean(g) to turn the infinity of one element into NaN elsewhere in other rows or columns."""
    x, dy, gamma, beta = kernel_inputs(4 * 33, 33, "float32")
    clean = _of_rows(table, (4, 33), x, dy, gamma, beta)
    dy[40] = np.inf
    results = _of_rows(table, (4, 33), x, dy, gamma, beta)
    others = [0, 2, 3]
    np.testing.assert_array_equal(results["dx"].reshape(4, 33)[others], clean["dx"].reshape(4, 33)[others])
    assert np.isinf(results["dbeta"][7])
    np.testing.assert_array_equal(np.delete(results["dbeta"], 7), np.delete(clean["dbeta"], 7))
