"""moments, normalize and the halves of the backward: equal to the fused ops, also over several workers."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from cases import ARRANGEMENTS, case, check_all, check_moments, rearranged, standard, truth

import fastnorm
from fastnorm.bench.cases import DTYPES

arrangements = pytest.mark.parametrize("arrangement", ARRANGEMENTS)


@arrangements
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, 2), (1, 2), (0, 2, 3), (3, 1), (0, 1, 2, 3), ()], ids=str)
def test_moments_over_any_axes(axis, arrangement, backend):
    x = ARRANGEMENTS[arrangement](case("batchnorm", (3, 4, 5, 2)).inputs().x)
    axes = tuple(range(4)) if axis is None else tuple(np.atleast_1d(axis).astype(int) % 4)
    for keepdims in (False, True):
        found = fastnorm.moments(x, axis, keepdims=keepdims, backend=backend)
        assert found.mean.shape == found.var.shape == np.zeros(x.shape).sum(axis=axis, keepdims=keepdims).shape
        check_moments(found, x, axes)


APART = [1, 2, (1, 2), (0, 2), (1, 3), (0, 3), (1,), (0, 2, 3)]


@arrangements
@pytest.mark.parametrize("axis", APART, ids=str)
@pytest.mark.parametrize("far", [0.0, 1e6])
def test_moments_where_what_is_kept_lies_apart(axis, far, arrangement, backend, rng):
    """Statistics of samples, some of them merged; in other arrangements, of axes in any order."""
    x = far + np.arange(3.0)[:, None, None, None] + rng.standard_normal((3, 20, 18, 24))
    x = ARRANGEMENTS[arrangement](x.astype(np.float32))
    check_moments(fastnorm.moments(x, axis, backend=backend), x, tuple(np.atleast_1d(axis)))


@pytest.mark.parametrize("axis", APART, ids=str)
def test_constants_and_nan_where_what_is_kept_lies_apart(axis, backend, rng):
    shape, axes = (3, 20, 18, 24), np.atleast_1d(axis)
    constants = (rng.standard_normal([1 if each in axes else n for each, n in enumerate(shape)]) * 1e3).astype(
        np.float32
    )
    x = np.broadcast_to(constants, shape).copy()
    found = fastnorm.moments(x, axis, keepdims=True, backend=backend)
    np.testing.assert_array_equal(found.mean, constants)
    np.testing.assert_array_equal(found.var, np.zeros_like(constants))
    x[1, 3, 5, 7] = np.nan
    found = fastnorm.moments(x, axis, keepdims=True, backend=backend)
    assert np.isnan(found.mean).sum() == np.isnan(found.var).sum() == 1
    assert np.isnan(found.mean[tuple(0 if each in axes else at for each, at in enumerate((1, 3, 5, 7)))])


@pytest.mark.parametrize(
    ("shape", "axis"), [((33, 70, 131), 1), ((7, 33, 45, 47), (0, 2)), ((7, 33, 45, 47), (1, 3))], ids=str
)
def test_moments_apart_have_equal_bits_for_any_number_of_threads(shape, axis, backend, rng):
    x, found = rng.standard_normal(shape).astype(np.float32), set()
    for threads in (1, 2, 3, 7):
        fastnorm.set_num_threads(threads)
        found.add(b"".join(values.tobytes() for values in fastnorm.moments(x, axis, backend=backend)[1:]))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_are_those_of_the_forward(dtype, backend):
    _, inputs, _ = standard("batchnorm", (37, 11), dtype=dtype)
    found = fastnorm.moments(inputs.x, 0, backend=backend)
    param = {"momentum": 0.0}
    fastnorm.batchnorm_forward(inputs.x, None, None, param, backend=backend)
    for name, key in (("mean", "running_mean"), ("var", "running_var")):
        assert getattr(found, name).dtype == np.float64
        np.testing.assert_allclose(param[key], getattr(found, name), rtol=1e-6)


def test_moments_of_nothing_are_neutral(backend, rng):
    x = rng.standard_normal((6, 3))
    nothing, something = (fastnorm.moments(part, 0, backend=backend) for part in (x[:0], x))
    assert nothing.count == 0
    for merged in (nothing.merge(something), something.merge(nothing)):
        assert merged.count == 6
        np.testing.assert_array_equal(merged.var, something.var)


def test_merging_in_any_order(backend, rng):
    x = (1e4 + rng.standard_normal((100, 3)) + np.arange(100)[:, None]).astype(np.float64)
    parts = [fastnorm.moments(part, 0, backend=backend) for part in np.split(x, [1, 1, 40, 99])]
    for order in (parts, parts[::-1]):
        merged = reduce(fastnorm.Moments.merge, order)
        check_moments(merged, x, (0,))


@arrangements
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_is_the_second_half_of_the_forward(dtype, arrangement, backend):
    this = case("batchnorm", (6, 5, 4), dtype=dtype)
    inputs = rearranged(this.inputs(), arrangement)
    x, gamma, beta, _ = inputs
    found = fastnorm.moments(x, (0, 2), keepdims=True, backend=backend)
    y = fastnorm.normalize(x, found.mean, found.var, gamma[:, None], beta[:, None], backend=backend)
    check_all(truth(this, *inputs), {"y": y})
    in_place = ARRANGEMENTS["C"](x).copy()
    if in_place.dtype == y.dtype:
        fastnorm.normalize(
            in_place, found.mean, found.var, gamma[:, None], beta[:, None], out=in_place, backend=backend
        )
        check_all(truth(this, *inputs), {"y": in_place})


def test_normalize_by_rows(backend):
    """Statistics of rows with a scale of each row, which no op of its own exists for."""
    x = case("layernorm", (6, 9)).inputs().x
    found = fastnorm.moments(x, 1, keepdims=True, backend=backend)
    scale = np.arange(1.0, 7.0)[:, None]
    y = fastnorm.normalize(x, found.mean, found.var, scale, None, 1e-5, backend=backend)
    np.testing.assert_allclose(y, scale * fastnorm.layernorm_forward(x, None, None)[0], rtol=1e-5, atol=1e-6)


@arrangements
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shape", [(23, 7), (12, 5, 4), (2, 6, 3, 3)], ids=str)
def test_workers_with_merged_moments_and_summed_sums(shape, workers, arrangement, backend):
    """Synchronized batch normalization, all workers in one process: every one computes its part of dx."""
    this = case("batchnorm", shape)
    inputs = rearranged(this.inputs(), arrangement, arrangement)
    x, gamma, beta, dout = inputs
    others = tuple(axis for axis in range(x.ndim) if axis != 1)
    shards = list(zip(np.array_split(x, workers), np.array_split(dout, workers), strict=True))

    total = reduce(
        fastnorm.Moments.merge, (fastnorm.moments(part, others, keepdims=True, backend=backend) for part, _ in shards)
    )
    among = total.mean.shape
    y = [
        fastnorm.normalize(part, total.mean, total.var, gamma.reshape(among), beta.reshape(among), backend=backend)
        for part, _ in shards
    ]
    sums = [
        fastnorm.batchnorm_backward_reduce(grad, part, total.mean.ravel(), total.var.ravel(), backend=backend)
        for part, grad in shards
    ]
    dbeta, dgamma = (sum(parts) for parts in zip(*sums, strict=True))
    dx = [
        fastnorm.batchnorm_backward_apply(
            grad, part, total.mean, total.var, gamma, dbeta, dgamma, total.count, backend=backend
        )
        for part, grad in shards
    ]
    assert total.count == x.size // x.shape[1]
    assert (dbeta.dtype, dbeta.shape) == (np.float64, (x.shape[1],))
    expected = truth(this, *inputs)
    check_all(expected, {"y": np.concatenate(y), "dx": np.concatenate(dx), "dgamma": dgamma, "dbeta": dbeta})


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [
        (9, 5, 5, 5), (8, 3, 7, 4), (40, 12, 14, 14), (8, 40, 3, 3), (5, 300, 14, 14), (3, 77, 33, 41),
        (3, 7, 100, 101), (1, 7, 300, 200),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_have_the_bits_of_the_fused_ops(dtype, shape, threads, affine):
    """Also of runs, which the C++ kernels walk otherwise where they only write."""
    fastnorm.set_num_threads(threads)
    x, gamma, beta, dout = case("batchnorm", shape, dtype=dtype).inputs()
    gamma, beta = (gamma, beta) if affine else (None, None)
    found = fastnorm.moments(x, (0, 2, 3), keepdims=True, backend="cpp")
    y, cache = fastnorm.batchnorm_forward(x, gamma, beta, {}, backend="cpp")
    column = [None if each is None else each[:, None, None] for each in (gamma, beta)]
    np.testing.assert_array_equal(fastnorm.normalize(x, found.mean, found.var, *column, backend="cpp"), y)
    dx, _, _ = fastnorm.batchnorm_backward(dout, cache, backend="cpp")
    statistics = (found.mean.ravel(), found.var.ravel())
    sums = fastnorm.batchnorm_backward_reduce(dout, x, *statistics, backend="cpp")
    again = fastnorm.batchnorm_backward_apply(dout, x, *statistics, gamma, *sums, found.count, backend="cpp")
    np.testing.assert_array_equal(again, dx)


@pytest.mark.parametrize("arrangement", ["C", "gaps", "F"])
def test_backward_apply_with_out(arrangement, backend):
    _, inputs, expected = standard("batchnorm", (23, 7))
    x, gamma, _, dout = inputs
    found = fastnorm.moments(x, 0, backend=backend)
    sums = fastnorm.batchnorm_backward_reduce(dout, x, found.mean, found.var, backend=backend)
    out = ARRANGEMENTS[arrangement](np.zeros_like(x))
    result = fastnorm.batchnorm_backward_apply(
        dout, x, found.mean, found.var, gamma, *sums, found.count, out=out, backend=backend
    )
    assert result is out
    check_all(expected, {"dx": out})


def test_pieces_of_nothing(backend):
    x = np.zeros((0, 4), np.float32)
    assert fastnorm.normalize(x, np.zeros(4), np.ones(4), backend=backend).shape == (0, 4)
    sums = fastnorm.batchnorm_backward_reduce(x, x, np.zeros(4), np.ones(4), backend=backend)
    np.testing.assert_array_equal(sums, np.zeros((2, 4)))
    dx = fastnorm.batchnorm_backward_apply(x, x, np.zeros(4), np.ones(4), None, *sums, 8, backend=backend)
    assert dx.shape == (0, 4)
