"""Hostile values: large means, constants, NaN and Inf, the smallest and largest numbers, nothing at all."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from cases import DTYPES_OF, OPS, Inputs, case, check_all, check_moments, fused, standard, storage, truth

import fastnorm
from fastnorm.bench.cases import DTYPES, dtype_of
from fastnorm.bench.tolerances import roundoff

ops = pytest.mark.parametrize("op", OPS)
centred = pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.centred])
ops_and_dtypes = pytest.mark.parametrize(("op", "dtype"), [(op, each) for op in OPS for each in DTYPES_OF[op]])
centred_and_dtypes = pytest.mark.parametrize(
    ("op", "dtype"), [(name, each) for name, op in OPS.items() if op.centred for each in DTYPES_OF[name]]
)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@lru_cache(maxsize=4)
def _far_from_zero(op, shape, dtype, ratio):
    this, inputs, _ = standard(op, shape, dtype=dtype)
    x = (ratio + np.random.default_rng(1).standard_normal(shape)).astype(dtype)
    inputs = inputs._replace(x=x)
    return this, inputs, truth(this, *inputs)


@pytest.mark.parametrize("ratio", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1024, 5), (5, 1024), (4099, 33), (33, 4099), (2, 3, 300, 7)], ids=str)
@ops
def test_the_error_does_not_grow_with_mean_over_spread(op, shape, dtype, ratio, backend):
    """The tolerances know the spread only, apart from the rounding of a float64 mean."""
    this, inputs, expected = _far_from_zero(op, shape, dtype, ratio)
    check_all(expected, fused(this, inputs, backend))
    check_moments(fastnorm.moments(inputs.x, this.reduced_axes, backend=backend), inputs.x, this.reduced_axes)


@pytest.mark.parametrize("drift", [0.0, 1e3, 1e6])
@ops
def test_means_that_differ_between_blocks(op, drift, backend, rng):
    """Blocks merged by Chan's rule must not lose the distance between their means."""
    shape, axis = {"channel": ((200_000, 3), 0), "row": ((3, 200_000), 1), "group": ((2, 4, 75_000), 2)}[OPS[op].family]
    this = case(op, shape)
    along = np.linspace(0, drift, shape[axis]).reshape([-1 if each == axis else 1 for each in range(len(shape))])
    inputs = this.inputs()._replace(x=(along + rng.standard_normal(shape)).astype(np.float32))
    check_all(truth(this, *inputs), fused(this, inputs, backend))


@pytest.mark.parametrize("far", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(4099, 33), (33, 4099), (9000, 3), (16, 6, 7, 7), (2, 3, 300, 7)], ids=str)
@ops
def test_first_elements_far_from_the_rest(op, shape, far, backend, rng):
    """A kernel that looks at a block's first elements for a pivot must not trust them."""
    this = case(op, shape)
    x = rng.standard_normal(shape)
    if OPS[op].family == "row":
        x[..., :16] += far
    elif len(shape) == 2:
        x[:8] += far
    else:
        x[0, ..., :1, :16] += far
    inputs = this.inputs()._replace(x=x.astype(np.float32))
    check_all(truth(this, *inputs), fused(this, inputs, backend))
    check_moments(fastnorm.moments(inputs.x, this.reduced_axes, backend=backend), inputs.x, this.reduced_axes)


CONSTANTS = (0.0, -0.0, 1.0, 0.1, -3.7, 1e4 + 1 / 3, 6e-5)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize(
    "shape", [(1, 4), (2, 3), (7, 4), (17, 33), (1000, 3), (4099, 5), (150_000, 2), (2, 5, 8, 8)], ids=str
)
@centred_and_dtypes
def test_constants_give_exactly_beta(op, dtype, shape, eps, backend):
    this = case(op, shape if op == "batchnorm" else shape[::-1], dtype=dtype)
    _, gamma, beta, dout = this.inputs()
    stored = dtype_of(dtype)
    among = [n if axis in this.kept_axes else 1 for axis, n in enumerate(this.shape)]
    if this.op.takes_groups:
        among[1] = this.groups
    constants = np.array([*CONSTANTS, 0.9 * float(np.finfo(np.float16).max)]).astype(stored)
    constants = np.resize(constants, among)
    if this.op.takes_groups:
        constants = constants.repeat(this.shape[1] // this.groups, axis=1)
    x = np.ascontiguousarray(np.broadcast_to(constants, this.shape))
    results = fused(this, Inputs(x, gamma, beta, dout), backend, eps=eps)
    parameters = [n if len(this.parameter_shape) == 1 and axis == 1 else 1 for axis, n in enumerate(this.shape)]
    if op == "layernorm":
        parameters = [1, *this.parameter_shape]
    np.testing.assert_array_equal(results["y"], np.broadcast_to(beta.reshape(parameters).astype(stored), this.shape))
    np.testing.assert_array_equal(results["dgamma"], np.zeros_like(gamma))
    assert np.isfinite(results["dx"].astype(np.float64)).all()
    if eps == 0.0:  # rstd counts as 0 then
        np.testing.assert_array_equal(results["dx"], np.zeros(this.shape))
    found = fastnorm.moments(x, this.reduced_axes, backend=backend)
    np.testing.assert_array_equal(found.mean.reshape(-1), constants.astype(np.float64).reshape(-1))
    np.testing.assert_array_equal(found.var, np.zeros_like(found.var))


@centred_and_dtypes
def test_one_value_per_statistic_gives_beta_and_no_gradient(op, dtype, backend):
    this, inputs, expected = standard(op, (1, 6) if op == "batchnorm" else (6, 1), dtype=dtype)
    results = fused(this, inputs, backend)
    np.testing.assert_array_equal(results["y"], np.broadcast_to(inputs.beta.astype(inputs.x.dtype), this.shape))
    np.testing.assert_array_equal(expected.dx.value, 0)
    check_all(expected, results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (4, 7), (33, 17), (3, 1000), (5, 4099), (2, 150_000)], ids=str)
def test_constants_without_centring_give_their_sign(shape, dtype, backend):
    """Times gamma; 0 gives 0."""
    this = case("rmsnorm", shape, dtype=dtype)
    _, *others = this.inputs()
    inputs = Inputs(np.broadcast_to(np.resize(CONSTANTS, (shape[0], 1)), shape).astype(dtype_of(dtype)), *others)
    for eps in (1e-5, 0.0):
        check_all(truth(this, *inputs, eps=eps), fused(this, inputs, backend, eps=eps))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(5, 7), (100, 64), (64, 300), (2, 6, 5, 5)], ids=str)
@ops_and_dtypes
def test_nan_and_inf_in_x_stay_where_they_are(op, dtype, shape, bad, backend):
    this = case(op, shape, dtype=dtype)
    inputs = this.inputs()
    x = inputs.x.copy()
    x[1, 2] = bad
    clean, dirty = fused(this, inputs, backend), fused(this, inputs._replace(x=x), backend)
    # The channel, group or sample that holds the bad value is all NaN, the others are bit for bit as before. Without
    # centring an infinite sample has the factor 0, and its finite values give 0.
    group, zero = _group_of_channel_2(this), not this.op.centred and np.isinf(bad)
    here = {"channel": (slice(None), 2), "group": (1, group), "row": (1,)}[this.op.family]
    for name in ("y", "dx"):
        got = dirty[name].astype(np.float64)
        lost = ~np.isfinite(x[here]) if zero and name == "y" else np.ones_like(got[here], bool)
        np.testing.assert_array_equal(got[here], np.where(lost, np.nan, 0.0), name)
        got[here] = 0
        expected = clean[name].astype(np.float64)
        expected[here] = 0
        np.testing.assert_array_equal(got, expected)
    if this.op.centred:
        np.testing.assert_array_equal(dirty["dbeta"], clean["dbeta"])
    bad_sums = {"channel": 2, "group": group, "row": 2 if zero else ...}[this.op.family]
    np.testing.assert_array_equal(np.isnan(dirty["dgamma"]), _true_at(bad_sums, dirty["dgamma"].shape))


def _true_at(here, shape):
    found = np.zeros(shape, bool)
    found[here] = True
    return found


def _group_of_channel_2(case):
    width = case.shape[1] // case.groups
    return slice(2 // width * width, (2 // width + 1) * width)


@ops_and_dtypes
def test_nan_in_dout_stays_where_it_is(op, dtype, backend):
    this = case(op, (6, 40), dtype=dtype)
    inputs = this.inputs()
    dout = inputs.dout.copy()
    dout[1, 2] = np.nan
    results = fused(this, inputs._replace(dout=dout), backend)
    bad = np.isnan(results["dx"].astype(np.float64))
    here = {"channel": (slice(None), 2), "group": (1, _group_of_channel_2(this)), "row": 1}[this.op.family]
    np.testing.assert_array_equal(bad, _true_at(here, bad.shape))
    for name in results.keys() & {"dgamma", "dbeta"}:
        assert np.flatnonzero(np.isnan(results[name])).tolist() == [2]


@ops
def test_nan_in_gamma_stays_where_it_is(op, backend):
    this = case(op, (6, 40))
    inputs = this.inputs()
    gamma = inputs.gamma.copy()
    gamma[2] = np.nan
    clean, results = fused(this, inputs, backend), fused(this, inputs._replace(gamma=gamma), backend)
    bad = np.isnan(results["y"])
    assert bad[:, 2].all()
    assert bad.sum() == 6
    np.testing.assert_array_equal(results["y"][~bad], clean["y"][~bad])


@dtypes
@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 4, 2), (3, 4, 0), (3, 0, 2, 2)], ids=str)
def test_zero_sizes_of_batchnorm(shape, mode, dtype, backend):
    channels = shape[1]
    x = np.zeros(shape, dtype_of(dtype))
    gamma = np.ones(channels, np.float32)
    param = {"mode": mode, "running_mean": np.full(channels, 3.0), "running_var": np.full(channels, 2.0)}
    before = dict(param)
    y, cache = fastnorm.batchnorm_forward(x, gamma, gamma, param, backend=backend)
    dx, dgamma, dbeta = fastnorm.batchnorm_backward(x, cache, backend=backend)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (shape, x.dtype, shape, x.dtype)
    np.testing.assert_array_equal(dgamma, np.zeros(channels))
    np.testing.assert_array_equal(dbeta, np.zeros(channels))
    assert param.keys() == before.keys()
    assert all(param[key] is before[key] for key in param)


@dtypes
@pytest.mark.parametrize(("shape", "axis"), [((0, 4), 1), ((4, 0), 1), ((0,), 0), ((2, 0, 3), 1), ((0, 2, 3), 1)])
def test_zero_sizes_of_layernorm(shape, axis, dtype, backend):
    x = np.zeros(shape, dtype_of(dtype))
    gamma = np.ones(shape[axis:], np.float32)
    y, cache = fastnorm.layernorm_forward(x, gamma, gamma, axis=axis, backend=backend)
    dx, dgamma, dbeta = fastnorm.layernorm_backward(x, cache, backend=backend)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (shape, x.dtype, shape, x.dtype)
    np.testing.assert_array_equal(dgamma, np.zeros(shape[axis:]))
    np.testing.assert_array_equal(dbeta, np.zeros(shape[axis:]))


@pytest.mark.parametrize("exponent", [-60, -50, -30, 30, 50, 57])
@ops
def test_small_and_large_numbers(op, exponent, backend):
    """As long as the squares of x and their sums fit float32, 2^-126 to 2^128: with eps 0 the scale must not show."""
    this = case(op, (65, 33))
    inputs = this.inputs()
    inputs = inputs._replace(x=inputs.x * np.float32(2.0**exponent))
    check_all(truth(this, *inputs, eps=0.0), fused(this, inputs, backend, eps=0.0))


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-30, 1e25, 1e30, 1e36])
@ops
def test_extreme_numbers_give_no_nan(op, value, backend, rng):
    """Beyond that range a square overflows or vanishes: beta then, or the right value, never NaN."""
    this = case(op, (64, 32))
    inputs = this.inputs()
    x = (rng.choice([-1.0, 1.0, 0.5], (64, 32)) * value).astype(np.float32)
    with np.errstate(over="ignore"):  # of a gradient that no float32 can hold
        results = fused(this, inputs._replace(x=x), backend, eps=0.0)
    for name, got in results.items():
        assert not np.isnan(got).any(), name
    found = fastnorm.moments(x, this.reduced_axes, backend=backend)
    assert (found.var >= 0).all()


@centred_and_dtypes
def test_var_is_never_negative(op, dtype, backend, rng):
    stored = dtype_of(dtype)
    for base in (0.0, 1.0, 1000.0, 60000.0):
        for wiggle in (0, 1, 2):
            x = np.full((37, 65), base).astype(stored)
            neighbour = (x.astype(np.float64) * (1 + 2 * wiggle * roundoff(stored))).astype(stored)
            x = np.where(rng.random(x.shape) < 0.1, neighbour, x)
            this = case(op, x.shape, dtype=dtype)
            assert (fastnorm.moments(x, this.reduced_axes, backend=backend).var >= 0).all()


@ops
def test_half_precision_statistics_are_not_half_precision(op, backend):
    """4096 ones and more: a float16 sum stops at 2048, a bfloat16 one at 256."""
    for dtype in ("float16", "bfloat16"):
        this = case(op, (20000, 2) if op == "batchnorm" else (2, 20000), dtype=dtype)
        x = this.inputs().x
        x = (x.astype(np.float32) * 0.25 + 1).astype(x.dtype)
        inputs = this.inputs()._replace(x=x)
        check_all(truth(this, *inputs), fused(this, inputs, backend))
        assert storage(x) == x.dtype


def test_one_bad_batch_does_not_change_what_was_stored_before(backend, rng):
    """running statistics are new arrays: the caller who kept the old ones can go back."""
    x = rng.standard_normal((8, 3)).astype(np.float32)
    param: dict = {}
    fastnorm.batchnorm_forward(x, None, None, param, backend=backend)
    kept = dict(param)
    x[0, 1] = np.nan
    fastnorm.batchnorm_forward(x, None, None, param, backend=backend)
    assert np.isnan(param["running_mean"]).tolist() == [False, True, False]
    assert np.isfinite(kept["running_mean"]).all()
