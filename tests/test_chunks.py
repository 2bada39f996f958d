"""A batch in pieces: exactly the batch normalization of the whole, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ARRANGEMENTS, case, check_all, standard, truth

import fastnorm
from fastnorm.bench.cases import DTYPES

SHAPES = [(23, 7), (12, 5, 4), (9, 6, 3, 3)]
CUTS = {"one": [], "even": [4, 8], "ragged": [1, 2, 7], "with empty": [0, 3, 3, 8], "rows": list(range(1, 9))}
KEYS = ("running_mean", "running_var")
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
cuts = pytest.mark.parametrize("cut", CUTS)


def _cut(array, cut, axis=0):
    return np.split(array, CUTS[cut], axis=axis)


def _both(chunks, douts, gamma, beta, param=None, axis=1, **options):
    y, cache = fastnorm.batchnorm_forward(chunks, gamma, beta, param, axis=axis, **options)
    dx, dgamma, dbeta = fastnorm.batchnorm_backward(douts, cache, **options)
    assert type(y) is type(dx) is list
    for each, grad, chunk in zip(y, dx, chunks, strict=True):
        assert each.shape == grad.shape == chunk.shape
        assert each.dtype == grad.dtype
    return {"y": np.concatenate(y), "dx": np.concatenate(dx), "dgamma": dgamma, "dbeta": dbeta}


@shapes
@cuts
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_the_whole(dtype, cut, shape, backend):
    _, (x, gamma, beta, dout), expected = standard("batchnorm", shape, dtype=dtype)
    param, of_whole = {}, {}
    check_all(expected, _both(_cut(x, cut), _cut(dout, cut), gamma, beta, param, backend=backend))
    fastnorm.batchnorm_forward(x, gamma, beta, of_whole, backend=backend)
    for key in KEYS:
        assert param[key].dtype == of_whole[key].dtype
        np.testing.assert_allclose(param[key], of_whole[key], rtol=1e-6)


@shapes
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_chunks_of_any_layout(arrangement, shape, backend):
    """Every second chunk lies in memory in another way."""
    this = case("batchnorm", shape)
    x, gamma, beta, dout = this.inputs()
    chunks, douts = _cut(x, "ragged"), _cut(dout, "ragged")
    chunks[1::2] = [ARRANGEMENTS[arrangement](chunk) for chunk in chunks[1::2]]
    douts[::2] = [ARRANGEMENTS[arrangement](chunk) for chunk in douts[::2]]
    if len({chunk.dtype for chunk in chunks}) > 1:
        pytest.skip("the arrangement changes the dtype, in which chunks must agree")
    expected = truth(this, np.concatenate(chunks), gamma, beta, np.concatenate(douts))
    check_all(expected, _both(chunks, douts, gamma, beta, backend=backend))


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_other_channel_axes(axis, backend, rng):
    x, dout = rng.standard_normal((2, 6, 9, 5))
    batch_axis = 1 if axis == 0 else 0
    gamma, beta = rng.standard_normal((2, x.shape[axis]))
    y, cache = fastnorm.batchnorm_forward(_cut(x, "even", batch_axis)[:2], gamma, beta, axis=axis, backend=backend)
    dx = fastnorm.batchnorm_backward(_cut(dout, "even", batch_axis)[:2], cache, backend=backend)
    part = np.concatenate(_cut(x, "even", batch_axis)[:2], batch_axis)
    whole, whole_cache = fastnorm.batchnorm_forward(part, gamma, beta, axis=axis, backend=backend)
    np.testing.assert_allclose(np.concatenate(y, batch_axis), whole, rtol=1e-12, atol=1e-13)
    expected = fastnorm.batchnorm_backward(
        np.concatenate(_cut(dout, "even", batch_axis)[:2], batch_axis), whole_cache, backend=backend
    )
    np.testing.assert_allclose(np.concatenate(dx[0], batch_axis), expected[0], rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(dx[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@cuts
def test_a_mean_far_from_zero(cut, backend, rng):
    """float32 of 1e6 +- 1, and chunks whose own means differ: how it was cut does not show."""
    this = case("batchnorm", (23, 7))
    _, gamma, beta, dout = this.inputs()
    x = (1e6 + np.arange(23)[:, None] / 4 + rng.standard_normal((23, 7))).astype(np.float32)
    check_all(truth(this, x, gamma, beta, dout), _both(_cut(x, cut), _cut(dout, cut), gamma, beta, backend=backend))


@cuts
def test_test_mode(cut, backend, rng):
    this = case("batchnorm", (23, 7))
    x, gamma, beta, dout = this.inputs()
    constants = rng.standard_normal(7), rng.random(7) + 0.5
    param = {"mode": "test"} | dict(zip(KEYS, constants, strict=True))
    found = _both(_cut(x, cut), _cut(dout, cut), gamma, beta, param, backend=backend)
    check_all(truth(this, x, gamma, beta, dout, constants=constants), found)
    assert param["running_mean"] is constants[0]


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_without_parameters(present, backend):
    this = case("batchnorm", (23, 7))
    x, gamma, beta, dout = this.inputs()
    gamma, beta = (value if here else None for value, here in zip((gamma, beta), present, strict=True))
    found = _both(_cut(x, "ragged"), _cut(dout, "ragged"), gamma, beta, backend=backend)
    assert (found["dgamma"] is None, found["dbeta"] is None) == (gamma is None, beta is None)
    check_all(truth(this, x, gamma, beta, dout), {name: value for name, value in found.items() if value is not None})


def test_nan_stays_in_its_channel(backend):
    _, (x, gamma, beta, dout), expected = standard("batchnorm", (23, 7))
    x = x.copy()
    x[4, 2], x[9, 5] = np.nan, np.inf
    found = _both(_cut(x, "ragged"), _cut(dout, "ragged"), gamma, beta, backend=backend)
    rest = [0, 1, 3, 4, 6]
    assert np.isnan(found["y"][:, 2]).all()
    for name in ("y", "dx", "dgamma", "dbeta"):
        clean = getattr(expected, name).value.reshape(found[name].shape)
        np.testing.assert_allclose(found[name][..., rest], clean[..., rest].astype(np.float64), rtol=1e-3, atol=1e-4)


def test_constants_and_one_value(backend):
    beta = np.array([3.0, 4.0], np.float32)
    for chunks in ([np.full((2, 2), 7.25, np.float32)] * 3, [np.ones((1, 2), np.float32), np.ones((0, 2), np.float32)]):
        y, cache = fastnorm.batchnorm_forward(chunks, None, beta, backend=backend)
        np.testing.assert_array_equal(np.concatenate(y), np.broadcast_to(beta, np.concatenate(y).shape))
        dx, _, _ = fastnorm.batchnorm_backward(chunks, cache, backend=backend)
        np.testing.assert_array_equal(np.concatenate(dx), np.zeros_like(np.concatenate(dx)))


def test_nothing_at_all(backend):
    param, gamma = {}, np.ones(2)
    y, cache = fastnorm.batchnorm_forward([np.zeros((0, 2))] * 2, gamma, None, param, backend=backend)
    dx, dgamma, dbeta = fastnorm.batchnorm_backward(y, cache, backend=backend)
    assert [each.shape for each in (*y, *dx)] == [(0, 2)] * 4
    np.testing.assert_array_equal(dgamma, [0, 0])
    assert dbeta is None
    assert param == {}


@pytest.mark.parametrize("momentum", [0.7, None])
def test_one_update_by_pytorchs_rule(momentum, backend, rng):
    x = rng.standard_normal((23, 7))
    param, of_whole = ({"convention": "pytorch", "momentum": momentum} for _ in range(2))
    for _ in range(2):
        fastnorm.batchnorm_forward(_cut(x, "with empty"), None, None, param, backend=backend)
        fastnorm.batchnorm_forward(x, None, None, of_whole, backend=backend)
    for key in KEYS:
        np.testing.assert_allclose(param[key], of_whole[key], rtol=1e-12)
    assert param["num_batches_tracked"] == 2


@pytest.mark.parametrize("arrangement", ["C", "gaps", "F"])
def test_out(arrangement, backend):
    _, (x, gamma, beta, dout), expected = standard("batchnorm", (12, 5, 4))
    chunks, douts = _cut(x, "ragged"), tuple(_cut(dout, "ragged"))
    outs, grads = ([ARRANGEMENTS[arrangement](np.zeros_like(chunk)) for chunk in chunks] for _ in range(2))
    y, cache = fastnorm.batchnorm_forward(tuple(chunks), gamma, beta, out=outs, backend=backend)
    dx, _, _ = fastnorm.batchnorm_backward(douts, cache, out=tuple(grads), backend=backend)
    assert all(a is b for a, b in zip((*y, *dx), (*outs, *grads), strict=True))
    check_all(expected, {"y": np.concatenate(outs), "dx": np.concatenate(grads)})


def test_out_over_x_in_test_mode(backend, rng):
    chunks = _cut(rng.standard_normal((9, 3)), "ragged")
    param = {"mode": "test", "running_mean": np.ones(3), "running_var": np.ones(3)}
    expected, _ = fastnorm.batchnorm_forward(chunks, None, None, param, backend=backend)
    y, cache = fastnorm.batchnorm_forward(chunks, None, None, param, out=chunks, backend=backend)
    for each, chunk, wanted in zip(y, chunks, expected, strict=True):
        assert each is chunk
        np.testing.assert_array_equal(each, wanted)
    with pytest.raises(ValueError, match="wrote its output over x"):
        fastnorm.batchnorm_backward(y, cache, backend=backend)


def test_what_a_list_means(rng):
    """Arrays of two dimensions or more are chunks; what NumPy makes of other lists stays one array."""
    rows = rng.standard_normal((4, 3))
    as_array, cache = fastnorm.batchnorm_forward(rows, None, None)
    for given in (rows.tolist(), list(rows), [list(row) for row in rows], tuple(rows)):
        y, cache = fastnorm.batchnorm_forward(given, None, None)
        np.testing.assert_array_equal(y, as_array)
    np.testing.assert_array_equal(fastnorm.batchnorm_backward(list(rows), cache)[0].shape, (4, 3))
    assert isinstance(fastnorm.batchnorm_forward([rows, rows], None, None)[0], list)


def test_chunks_of_images_under_cs231ns_name(backend, rng):
    x, dout = rng.standard_normal((2, 9, 6, 3, 3))
    gamma, beta = rng.standard_normal((2, 6))
    expected, theirs = fastnorm.spatial_batchnorm_forward(x, gamma, beta, backend=backend)
    y, cache = fastnorm.spatial_batchnorm_forward(_cut(x, "ragged"), gamma, beta, backend=backend)
    np.testing.assert_allclose(np.concatenate(y), expected, rtol=1e-12, atol=1e-13)
    dx, *sums = fastnorm.spatial_batchnorm_backward(_cut(dout, "ragged"), cache, backend=backend)
    expected_dx, *expected_sums = fastnorm.spatial_batchnorm_backward(dout, theirs, backend=backend)
    np.testing.assert_allclose(np.concatenate(dx), expected_dx, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-11, atol=1e-12)
    # Single images are no chunks, and are not taken for batches of C rows.
    with pytest.raises(ValueError, match=r"^x\[0\]: expected 4 dimensions .* got shape \(6, 3, 3\)"):
        fastnorm.spatial_batchnorm_forward(list(x), None, None, backend=backend)


@pytest.mark.parametrize("rule", [{}, {"convention": "pytorch"}, {"momentum": None}, {"average": 0.9}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_chunk_keeps_the_whole_batch_out(bad, rule, backend, rng):
    average = {"average": fastnorm.ExponentialMovingAverage(rule["average"])} if "average" in rule else {}
    param = {"skip_nonfinite": True} | rule | average
    x = rng.standard_normal((9, 3)).astype(np.float32)
    fastnorm.batchnorm_forward(_cut(x, "ragged"), None, None, param, backend=backend)
    before = dict(param)
    poisoned = x.copy()
    poisoned[8, 1] = bad  # in the last chunk
    y, _ = fastnorm.batchnorm_forward(_cut(poisoned, "ragged"), None, None, param, backend=backend)
    assert np.isnan(np.concatenate(y)[:, 1]).any()
    assert param.keys() == before.keys()
    assert all(param[key] is before[key] for key in param)
    fastnorm.batchnorm_forward(_cut(x + 1, "ragged"), None, None, param, backend=backend)
    assert (param["running_mean"] > before["running_mean"]).all()


A, B = np.ones((4, 3)), np.zeros((2, 3))
_shared = np.zeros((8, 3))


@pytest.mark.parametrize(
    ("x", "options", "error", "named"),
    [
        ([A, np.ones((2, 4))], {}, ValueError, r"x\[1\].*\(4, 3\).*\(2, 4\)"),
        ([A, np.ones((2, 3, 1))], {}, ValueError, r"x\[1\]"),
        ([A, np.ones(3)], {}, ValueError, r"x\[1\]"),
        ([A, B.astype(np.float32)], {}, ValueError, r"x\[1\].*dtype.*float64.*float32"),
        ([A, None], {}, TypeError, r"x\[1\]"),
        ([A, np.ma.masked_array(B)], {}, TypeError, r"x\[1\]"),
        ([A.astype(complex)], {}, TypeError, "x"),
        ([A, B], {"axis": 2}, ValueError, "axis"),
        ([A, B], {"gamma": np.ones(4)}, ValueError, "gamma"),
        ([A, B], {"bn_param": {"eps": -1}}, ValueError, "eps"),
        ([A, B], {"bn_param": {"mode": "test"}}, ValueError, "running_mean"),
        ([A, B], {"out": np.zeros((6, 3))}, TypeError, "out.*list"),
        ([A, B], {"out": [np.zeros((4, 3))]}, ValueError, "out.*2 arrays.*1"),
        ([A, B], {"out": [np.zeros((4, 3)), np.zeros((3, 3))]}, ValueError, r"out\[1\].*shape"),
        ([A, B], {"out": [np.zeros((4, 3)), None]}, TypeError, r"out\[1\]"),
        ([A, B], {"out": [np.zeros((4, 3)), np.zeros((2, 3), np.float32)]}, ValueError, r"out\[1\].*dtype"),
        ([A, _shared[:4]], {"out": [_shared[2:6], np.zeros((4, 3))]}, ValueError, r"out\[0\].*overlaps x\[1\]"),
        ([A, A], {"out": [_shared[:4], _shared[3:7]]}, ValueError, r"out\[1\].*overlaps out\[0\]"),
    ],
)
def test_bad_chunks(x, options, error, named):
    options = {"gamma": None, "beta": None, **options}
    written = [array for array in options.get("out", ()) if isinstance(array, np.ndarray)]
    before = [array.copy() for array in written]
    with pytest.raises(error, match=named):
        fastnorm.batchnorm_forward(x, **options)
    for array, same in zip(written, before, strict=True):
        np.testing.assert_array_equal(array, same)


@pytest.mark.parametrize(
    ("dout", "options", "error", "named"),
    [
        (np.ones((6, 3)), {}, TypeError, "dout.*list"),
        ([A], {}, ValueError, "dout.*2 arrays.*1"),
        ([A, A], {}, ValueError, r"dout\[1\].*\(2, 3\).*\(4, 3\)"),
        ([A, B.astype(complex)], {}, TypeError, r"dout\[1\]"),
        ([A, None], {}, TypeError, r"dout\[1\]"),
        ([A, B], {"out": [A, np.zeros((2, 3))]}, ValueError, r"out\[0\].*overlaps"),
        ([A, B], {"out": np.zeros((6, 3))}, TypeError, "out.*list"),
    ],
)
def test_bad_gradients(dout, options, error, named):
    _, cache = fastnorm.batchnorm_forward([A, B], None, None)
    with pytest.raises(error, match=named):
        fastnorm.batchnorm_backward(dout, cache, **options)


def test_the_staged_graph_takes_no_chunks():
    with pytest.raises(TypeError, match=r"^x: expected one array, got a list of chunks"):
        fastnorm.batchnorm_forward_staged([A, A], None, None)


def test_a_cache_of_chunks_is_no_other_cache():
    _, cache = fastnorm.batchnorm_forward([A, B], None, None)
    for backward in (fastnorm.layernorm_backward, fastnorm.batchnorm_backward_alt, fastnorm.batchnorm_backward_staged):
        with pytest.raises((TypeError, ValueError), match="cache"):
            backward(A, cache)
