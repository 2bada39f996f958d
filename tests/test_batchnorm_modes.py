"""Running statistics, train and test mode, gradients through constants, the output over the input."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ARRANGEMENTS, case, check_all, rearranged, truth

import fastnorm
from fastnorm.bench.cases import DTYPES, dtype_of

CHANNELS = 5
KEYS = ("running_mean", "running_var")


def _batch(rng, dtype="float32"):
    return (3 + 2 * rng.standard_normal((40, CHANNELS))).astype(dtype_of(dtype))


def _test_mode(rng, dtype=np.float64):
    mean, var = rng.standard_normal(CHANNELS), rng.random(CHANNELS) + 0.5
    return {"mode": "test", "running_mean": mean.astype(dtype), "running_var": var.astype(dtype)}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_running_statistics_follow_the_momentum(momentum, backend, rng):
    param = {"momentum": momentum}
    mean, var = np.zeros(CHANNELS), np.zeros(CHANNELS)
    for _ in range(4):
        x = _batch(rng, "float64")
        fastnorm.batchnorm_forward(x, None, None, param, backend=backend)
        mean = momentum * mean + (1 - momentum) * x.mean(axis=0)
        var = momentum * var + (1 - momentum) * x.var(axis=0)
        np.testing.assert_allclose(param["running_mean"], mean, rtol=1e-13)
        np.testing.assert_allclose(param["running_var"], var, rtol=1e-13)
    assert set(param) == {"momentum", *KEYS}


def test_running_statistics_are_new_arrays(backend, rng):
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    param = {"running_mean": mean, "running_var": var}
    fastnorm.batchnorm_forward(_batch(rng), None, None, param, backend=backend)
    assert param["running_mean"] is not mean
    np.testing.assert_array_equal(mean, np.zeros(CHANNELS))
    np.testing.assert_array_equal(var, np.ones(CHANNELS))


@pytest.mark.parametrize("shape", [(CHANNELS,), (1, CHANNELS), (1, CHANNELS, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_running_statistics_keep_their_shape_and_dtype(shape, dtype, backend, rng):
    given = np.full(shape, 0.5, dtype_of(dtype))
    param = {"running_mean": given, "running_var": given}
    fastnorm.batchnorm_forward(_batch(rng)[..., None, None], None, None, param, backend=backend)
    for key in KEYS:
        assert (param[key].shape, param[key].dtype) == (shape, given.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_running_statistics_are_wide_enough(dtype, backend, rng):
    expected = "float64" if dtype == "float64" else "float32"
    param = {}
    fastnorm.batchnorm_forward(_batch(rng, dtype), None, None, param, backend=backend)
    assert [param[key].dtype for key in KEYS] == [np.dtype(expected)] * 2


def test_one_of_the_two_may_be_missing(backend, rng):
    x = _batch(rng)
    alone, both = {"running_mean": np.ones(CHANNELS)}, {"running_mean": np.ones(CHANNELS), "running_var": None}
    for param in (alone, both):
        fastnorm.batchnorm_forward(x, None, None, param, backend=backend)
    np.testing.assert_array_equal(alone["running_var"], both["running_var"])


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_integer_running_statistics_become_floating(dtype, backend, rng):
    param = {key: np.ones(CHANNELS, dtype) for key in KEYS}
    fastnorm.batchnorm_forward(_batch(rng), None, None, param, backend=backend)
    assert param["running_mean"].dtype.kind == "f"


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_test_mode_uses_the_running_statistics(dtype, arrangement, backend, rng):
    this = case("batchnorm", (7, CHANNELS, 3), dtype=dtype)
    inputs = rearranged(this.inputs(), arrangement, arrangement)
    param = _test_mode(rng)
    before = dict(param)
    y, cache = fastnorm.batchnorm_forward(*inputs[:3], param, backend=backend)
    dx, dgamma, dbeta = fastnorm.batchnorm_backward(inputs.dout, cache, backend=backend)
    assert all(param[key] is before[key] for key in before)
    expected = truth(this, *inputs, constants=tuple(param[key] for key in KEYS))
    check_all(expected, {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta})


def test_training_and_then_testing_on_the_same_data(backend, rng):
    """With momentum 0 test mode repeats the batch that was trained on."""
    x = _batch(rng, "float64")
    param = {"momentum": 0.0}
    trained, _ = fastnorm.batchnorm_forward(x, None, None, param, backend=backend)
    tested, _ = fastnorm.batchnorm_forward(x, None, None, {**param, "mode": "test"}, backend=backend)
    np.testing.assert_allclose(tested, trained, rtol=1e-12)


def test_test_mode_of_one_sample(backend, rng):
    """A sample's output does not depend on the others."""
    x = _batch(rng)
    param = _test_mode(rng)
    together, _ = fastnorm.batchnorm_forward(x, None, None, param, backend=backend)
    alone, _ = fastnorm.batchnorm_forward(x[3:4], None, None, param, backend=backend)
    np.testing.assert_array_equal(together[3:4], alone)


@pytest.mark.parametrize("arrangement", ["C", "F", "gaps", "reversed", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_x_in_test_mode(dtype, arrangement, backend, rng):
    this = case("batchnorm", (6, CHANNELS, 4), dtype=dtype)
    inputs = rearranged(this.inputs(), arrangement)
    param = _test_mode(rng)
    expected, _ = fastnorm.batchnorm_forward(*inputs[:3], param, backend=backend)
    y, _ = fastnorm.batchnorm_forward(*inputs[:3], param, out=inputs.x, backend=backend)
    assert y is inputs.x
    np.testing.assert_array_equal(y, expected)


def test_out_beside_x_in_test_mode_keeps_the_cache(backend, rng):
    this = case("batchnorm", (6, CHANNELS))
    x, gamma, beta, dout = this.inputs()
    _, cache = fastnorm.batchnorm_forward(x, gamma, beta, _test_mode(rng), out=np.empty_like(x), backend=backend)
    assert fastnorm.batchnorm_backward(dout, cache, backend=backend)[0].shape == x.shape


def test_the_cache_keeps_the_statistics_of_its_call(backend, rng):
    """Neither new running statistics nor writing to the old ones changes what backward sees."""
    this = case("batchnorm", (6, CHANNELS))
    x, gamma, beta, dout = this.inputs()
    param = _test_mode(rng)
    _, cache = fastnorm.batchnorm_forward(x, gamma, beta, param, backend=backend)
    expected = fastnorm.batchnorm_backward(dout, cache, backend=backend)[0]
    param["running_var"][:] = 77.0
    np.testing.assert_array_equal(fastnorm.batchnorm_backward(dout, cache, backend=backend)[0], expected)


def test_no_bn_param_is_train_mode(backend, rng):
    x = _batch(rng)
    without, _ = fastnorm.batchnorm_forward(x, None, None, backend=backend)
    given, _ = fastnorm.batchnorm_forward(x, None, None, {"mode": "train"}, backend=backend)
    np.testing.assert_array_equal(without, given)
