"""Moving averages, and the rules by which batches enter BatchNorm's running statistics."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest

import fastnorm
from fastnorm import ExponentialMovingAverage
from fastnorm.bench.cases import DTYPES, dtype_of

CHANNELS = 5
KEYS = ("running_mean", "running_var")
SHAPES = [(16, CHANNELS), (6, CHANNELS, 4), (2, CHANNELS, 3, 3)]


def _batches(rng, shape, count=4, dtype="float64"):
    return [(3 + k + 2 * rng.standard_normal(shape)).astype(dtype_of(dtype)) for k in range(count)]


def _moments(x):
    """Mean, biased and unbiased variance of each channel in float64."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    wide = x.astype(np.float64)
    return wide.mean(axis=axes), wide.var(axis=axes), wide.var(axis=axes, ddof=1)


def _train(x, param, **options):
    return fastnorm.batchnorm_forward(x, None, None, param, **options)[0]


# ---- ExponentialMovingAverage -----------------------------------------------------------------------


def test_the_tutorial():
    """Two variables that grow by 1 a step, decay 0.9: the numbers that TensorFlow prints."""
    ema, w, x = ExponentialMovingAverage(0.9), np.float32(1.0), np.float32(3.0)
    ema.initialize({"w": w, "x": x})
    for expected in ((1.1, 3.1), (1.29, 3.29), (1.561, 3.561)):
        w, x = w + np.float32(1), x + np.float32(1)
        ema.apply({"w": w, "x": x})
        found = ema.average("w"), ema.average("x")
        assert [value.dtype for value in found] == [np.float32] * 2
        np.testing.assert_allclose(found, expected, rtol=2e-7)
    assert ema.average("y") is None


def test_the_formula_from_zeros(rng):
    ema, shadow = ExponentialMovingAverage(0.5), np.zeros((3, 2))
    for value in rng.standard_normal((5, 3, 2)):
        ema.apply({"value": value})
        shadow = 0.5 * shadow + 0.5 * value
        np.testing.assert_allclose(ema.average("value"), shadow, rtol=1e-14)


def test_the_dynamic_decay(rng):
    step, shadow = 0, np.zeros(3)
    called, assigned = ExponentialMovingAverage(0.3, lambda: step), ExponentialMovingAverage(0.3, 0)
    for step in range(6):
        value = rng.standard_normal(3)
        decay = min(0.3, (1 + step) / (10 + step))
        shadow = decay * shadow + (1 - decay) * value
        assigned.num_updates = step
        for ema in (called, assigned):
            ema.apply({"value": value})
            np.testing.assert_allclose(ema.average("value"), shadow, rtol=1e-14)
    assert (1 + step) / (10 + step) > 0.3  # both sides of the minimum were seen


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_zero_debias_is_that_of_tensorflow(decay, rng):
    """biased -= (biased - value) * (1 - decay); average = biased / (1 - decay**step)."""
    ema, biased = ExponentialMovingAverage(decay, zero_debias=True), np.zeros(3)
    for step, value in enumerate(rng.standard_normal((6, 3)), 1):
        ema.apply({"value": value})
        biased -= (biased - value) * (1 - decay)
        np.testing.assert_allclose(ema.average("value"), biased / (1 - decay**step), rtol=1e-11)


def test_zero_debias_keeps_a_constant_while_the_decay_grows():
    ema = ExponentialMovingAverage(0.9, 0, zero_debias=True)
    for step in range(20):
        ema.num_updates = step
        ema.apply({"value": 7.0})
        np.testing.assert_allclose(ema.average("value"), 7.0, rtol=1e-14)


def test_only_averages_from_zeros_are_debiased():
    ema = ExponentialMovingAverage(0.5, zero_debias=True)
    ema.initialize({"started": 2.0})
    ema.apply({"started": 4.0, "from zero": 4.0})
    assert ema.average("started") == 3.0
    assert ema.average("from zero") == 4.0


def test_a_decay_of_one_keeps_the_start():
    ema = ExponentialMovingAverage(1.0, zero_debias=True)
    ema.apply({"value": [1.0, np.nan]})
    assert ema.average("value")[0] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_are_wide_enough(dtype):
    """A thousandth of one is lost in a half next to 1, and must not be in the average."""
    ema = ExponentialMovingAverage(0.999)
    ema.initialize({"value": np.zeros(3, dtype_of(dtype))})
    for _ in range(1000):
        ema.apply({"value": np.ones(3, dtype_of(dtype))})
    assert ema.average("value").dtype == (np.float64 if dtype in ("float64", "int64") else np.float32)
    np.testing.assert_allclose(ema.average("value"), 1 - 0.999**1000, rtol=1e-4)


def test_averages_handed_out_are_copies():
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"value": np.ones(2)})
    kept = ema.average("value")
    ema.apply({"value": np.ones(2)})
    np.testing.assert_array_equal(kept, [0.5, 0.5])
    ema.average("value")[:] = 9
    np.testing.assert_array_equal(ema.average("value"), [0.75, 0.75])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: ExponentialMovingAverage(1.5), ValueError, "decay"),
        (lambda: ExponentialMovingAverage(np.nan), ValueError, "decay"),
        (lambda: ExponentialMovingAverage("0.9"), TypeError, "decay"),
        (lambda: ExponentialMovingAverage(0.9, -1), ValueError, "num_updates"),
        (lambda: ExponentialMovingAverage(0.9, "3"), TypeError, "num_updates"),
        (lambda: ExponentialMovingAverage(0.9, lambda: np.nan), ValueError, "num_updates"),
        (lambda: ExponentialMovingAverage(0.9, None, 1), TypeError, "zero_debias"),
        (lambda: ExponentialMovingAverage(0.9).apply([1.0]), TypeError, "values"),
        (lambda: ExponentialMovingAverage(0.9).apply({"w": 1j}), TypeError, "'w'"),
        (lambda: ExponentialMovingAverage(0.9).initialize({"w": None}), TypeError, "'w'"),
    ],
)
def test_bad_arguments_of_the_average(call, error, named):
    with pytest.raises(error, match=named):
        call()


def test_an_error_leaves_all_averages():
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"a": np.ones(2), "b": np.ones(3)})
    with pytest.raises(ValueError, match=r"'b'.*\(3,\).*\(2,\)"):
        ema.apply({"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(ValueError, match="'b' has an average already"):
        ema.initialize({"c": 1.0, "b": np.ones(3)})
    np.testing.assert_array_equal(ema.average("a"), [0.5, 0.5])
    assert ema.average("c") is None


# ---- running statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", ["default", 0.0, 0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorchs_convention(dtype, shape, momentum, backend, rng):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's layers")
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)]
    options = {} if momentum == "default" else {"momentum": momentum}
    layer = kind(CHANNELS, affine=False, dtype=getattr(torch, dtype), **options)
    param = {"convention": "pytorch", **options}
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    for step, x in enumerate(_batches(rng, shape, dtype=dtype), 1):
        y = _train(x, param, backend=backend)
        np.testing.assert_allclose(y, layer(torch.from_numpy(x)).numpy(), rtol=tolerance, atol=10 * tolerance)
        for key in KEYS:
            assert param[key].dtype == dtype
            np.testing.assert_allclose(param[key], getattr(layer, key).numpy(), rtol=tolerance)
        assert param["num_batches_tracked"] == step == int(layer.num_batches_tracked)
    layer.eval()
    tested = _train(x, {**param, "mode": "test"}, backend=backend)
    np.testing.assert_allclose(tested, layer(torch.from_numpy(x)).numpy(), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_pytorchs_convention_for_instances(momentum, backend, rng):
    """The variance of each sample's channel is unbiased, then averaged over the samples."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch's layers")
    options = {"momentum": momentum}
    layer = torch.nn.InstanceNorm1d(CHANNELS, track_running_stats=True, dtype=torch.float64, **options)
    param = {"convention": "pytorch", "running_mean": np.zeros(CHANNELS), "running_var": np.ones(CHANNELS), **options}
    staged = dict(param)
    for x in _batches(rng, SHAPES[1]):
        layer(torch.from_numpy(x))
        fastnorm.instancenorm_forward(x, None, None, param, backend=backend)
        fastnorm.instancenorm_forward_staged(x, None, None, staged)
        for key in KEYS:
            np.testing.assert_allclose(param[key], getattr(layer, key).numpy(), rtol=1e-12)
            np.testing.assert_allclose(staged[key], param[key], rtol=1e-12)


def test_the_cumulative_average_of_instances(backend, rng):
    """The mean of all batches, where PyTorch's layer takes None for a momentum of 0 and stays where it was."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch's layers")
    layer = torch.nn.InstanceNorm1d(CHANNELS, track_running_stats=True, momentum=None, dtype=torch.float64)
    param = {"momentum": None, "running_mean": np.zeros(CHANNELS), "running_var": np.ones(CHANNELS)}
    batches = _batches(rng, SHAPES[1])
    for x in batches:
        layer(torch.from_numpy(x))
        fastnorm.instancenorm_forward(x, None, None, param, backend=backend)
    np.testing.assert_allclose(param["running_mean"], np.mean([x.mean(axis=(0, 2)) for x in batches], 0), rtol=1e-12)
    expected = np.mean([x.var(axis=2).mean(axis=0) for x in batches], 0)
    np.testing.assert_allclose(param["running_var"], expected, rtol=1e-12)
    assert param["num_batches_tracked"] == len(batches)
    np.testing.assert_array_equal(layer.running_mean.numpy(), np.zeros(CHANNELS))  # the day this fails, docs change


def test_a_pytorch_layer_goes_on_here(rng):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's layers")
    layer = torch.nn.BatchNorm1d(CHANNELS, momentum=None, affine=False, dtype=torch.float64)
    first, second, third = _batches(rng, SHAPES[0], 3)
    layer(torch.from_numpy(first))
    param = {"convention": "pytorch", "momentum": None} | {k: v.clone().numpy() for k, v in layer.state_dict().items()}
    for x in (second, third):
        layer(torch.from_numpy(x))
        _train(x, param)
    for key in KEYS:
        np.testing.assert_allclose(param[key], getattr(layer, key).numpy(), rtol=1e-12)
    assert param["num_batches_tracked"] == 3


@pytest.mark.parametrize("convention", ["cs231n", "pytorch"])
def test_the_cumulative_average_is_the_mean_of_the_batches(convention, backend, rng):
    param, seen = {"convention": convention, "momentum": None}, []
    for x in _batches(rng, SHAPES[2]):
        _train(x, param, backend=backend)
        mean, biased, unbiased = _moments(x)
        seen.append((mean, unbiased if convention == "pytorch" else biased))
        for key, expected in zip(KEYS, np.mean(seen, axis=0), strict=True):
            np.testing.assert_allclose(param[key], expected, rtol=1e-12)
        assert param["num_batches_tracked"] == len(seen)


def test_cs231ns_cumulative_average_needs_no_other_key(rng):
    param = {"momentum": None}
    x = _batches(rng, SHAPES[0])[0]
    _train(x, param)
    np.testing.assert_allclose(param["running_mean"], x.mean(axis=0), rtol=1e-12)
    assert set(param) == {"momentum", "num_batches_tracked", *KEYS}


def test_named_cs231n_is_the_default_bit_by_bit(rng):
    plain, named = {}, {"convention": "cs231n"}
    for x in _batches(rng, SHAPES[0], dtype="float32"):
        _train(x, plain)
        _train(x, named)
    for key in KEYS:
        np.testing.assert_array_equal(plain[key], named[key])
    assert "num_batches_tracked" not in named


def test_batches_are_counted_where_the_key_is_there(rng):
    param = {"num_batches_tracked": np.array(41)}
    _train(_batches(rng, SHAPES[0])[0], param)
    assert param["num_batches_tracked"] == 42


@pytest.mark.parametrize("convention", ["cs231n", "pytorch"])
@pytest.mark.parametrize("zero_debias", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_average_keeps_the_running_statistics(dynamic, zero_debias, convention, backend, rng):
    step, shadows, left = 0, np.zeros((2, CHANNELS)), 1.0
    average = ExponentialMovingAverage(0.25, (lambda: step) if dynamic else None, zero_debias)
    param = {"average": average, "convention": convention}
    for step, x in enumerate(_batches(rng, SHAPES[1])):
        y = _train(x, param, backend=backend)
        np.testing.assert_array_equal(y, _train(x, None, backend=backend))
        decay = min(0.25, (1 + step) / (10 + step)) if dynamic else 0.25
        mean, biased, unbiased = _moments(x)
        shadows = decay * shadows + (1 - decay) * np.stack([mean, unbiased if convention == "pytorch" else biased])
        left *= decay
        for key, expected in zip(KEYS, shadows / (1 - left) if zero_debias else shadows, strict=True):
            np.testing.assert_allclose(param[key], expected, rtol=1e-12)
            np.testing.assert_array_equal(param[key], average.average(key))
    _train(x, {**param, "mode": "test"}, backend=backend)
    assert param.get("num_batches_tracked") == (4 if convention == "pytorch" else None)


def test_cs231ns_momentum_is_an_average_with_that_decay(rng):
    plain, averaged = {"momentum": 0.9}, {"average": ExponentialMovingAverage(0.9)}
    for x in _batches(rng, SHAPES[0], dtype="float32"):
        _train(x, plain)
        _train(x, averaged)
    for key in KEYS:
        assert plain[key].dtype == averaged[key].dtype == np.float32
        np.testing.assert_allclose(plain[key], averaged[key], rtol=1e-6)


@pytest.mark.parametrize("shape", [(CHANNELS,), (1, CHANNELS, 1)], ids=str)
def test_an_average_starts_from_stored_statistics(shape, rng):
    param = {"average": ExponentialMovingAverage(0.5)} | {key: np.full(shape, 2.0) for key in KEYS}
    x = _batches(rng, SHAPES[1])[0]
    _train(x, param)
    assert param["running_mean"].shape == shape
    np.testing.assert_allclose(param["running_mean"].ravel(), 1 + _moments(x)[0] / 2, rtol=1e-12)


def test_an_average_belongs_to_one_layer(rng):
    first, second = _batches(rng, SHAPES[0], 2)
    param = {"average": ExponentialMovingAverage(0.5)}
    _train(first, param)
    other = {"average": param["average"]}
    for stored in (None, np.ones(CHANNELS), np.ones(CHANNELS + 2)):
        x = second if stored is None else np.resize(second, (4, stored.size))
        other |= {} if stored is None else dict.fromkeys(KEYS, stored)
        before = copy.copy(other)
        with pytest.raises(ValueError, match=r"bn_param\['average'\]: keeps another running_mean"):
            _train(x, other)
        assert other == before if stored is None else other.keys() == before.keys()
    _train(second, copy.deepcopy(param))  # a copy of the whole dictionary goes on by itself


# ---- batches that stay out --------------------------------------------------------------------------

RULES = {
    "cs231n": {},
    "pytorch": {"convention": "pytorch"},
    "cumulative": {"momentum": None},
    "cumulative, pytorch": {"convention": "pytorch", "momentum": None},
    "average": {"average": 0.5},
}


def _param(rule, **options):
    param = {**RULES[rule], **options}
    if "average" in param:
        param["average"] = ExponentialMovingAverage(param["average"])
    return param


def _snapshot(param):
    average = param.get("average")
    values = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in param.items() if k != "average"}
    return values | ({} if average is None else {f"average of {key}": average.average(key) for key in KEYS})


def _assert_same(param, before):
    after = _snapshot(param)
    assert after.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_skip_nonfinite_keeps_the_whole_batch_out(dtype, bad, rule, backend, rng):
    param = _param(rule, skip_nonfinite=True)
    good = _batches(rng, SHAPES[2], dtype=dtype)
    _train(good[0], param, backend=backend)
    before = _snapshot(param)
    poisoned = good[1].copy()
    poisoned[1, 2, 0, 0] = bad
    y = _train(poisoned, param, backend=backend)
    assert np.isnan(y[:, 2]).any()
    assert np.isfinite(np.delete(y, 2, axis=1)).all()
    _assert_same(param, before)
    _train(good[2], param, backend=backend)
    reference = _param(rule)
    for x in (good[0], good[2]):
        _train(x, reference, backend=backend)
    for key in KEYS:
        np.testing.assert_array_equal(param[key], reference[key])
    assert param.get("num_batches_tracked") == reference.get("num_batches_tracked")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("forward", [fastnorm.instancenorm_forward, fastnorm.instancenorm_forward_staged])
def test_skip_nonfinite_of_instances(forward, bad, rule, backend, rng):
    """One bad value in one sample keeps the batch out; the other samples' outputs are as ever."""
    options = {} if forward is fastnorm.instancenorm_forward_staged else {"backend": backend}
    param = _param(rule, skip_nonfinite=True, running_mean=np.zeros(CHANNELS), running_var=np.ones(CHANNELS))
    good = _batches(rng, SHAPES[2], dtype="float32")
    forward(good[0], None, None, param, **options)
    before = _snapshot(param)
    poisoned = good[1].copy()
    poisoned[1, 2, 0, 0] = bad
    y, _ = forward(poisoned, None, None, param, **options)
    np.testing.assert_array_equal(np.argwhere(np.isnan(y).any(axis=(2, 3))), [[1, 2]])
    _assert_same(param, before)
    forward(good[2], None, None, param, **options)
    assert (param["running_mean"] != before["running_mean"]).all()


def test_without_skip_nonfinite_one_channel_is_poisoned(backend, rng):
    param, x = {}, _batches(rng, SHAPES[0])[0]
    x[3, 2] = np.nan
    _train(x, param, backend=backend)
    for key in KEYS:
        np.testing.assert_array_equal(np.isnan(param[key]), np.arange(CHANNELS) == 2)


def test_skip_nonfinite_on_the_first_batch(backend, rng):
    for rule, follow in itertools.product(RULES, [False, True]):
        param = _param(rule, skip_nonfinite=True)
        x = _batches(rng, SHAPES[0])[0]
        _train(np.full_like(x, np.nan), param, backend=backend)
        assert "running_mean" not in param
        if follow:
            _train(x, param, backend=backend)
            assert np.isfinite(param["running_var"]).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_skip_nonfinite_sees_what_overflows_where_it_is_kept(dtype, backend, rng):
    """A variance that float64 holds and the running variance does not."""
    param = {"skip_nonfinite": True} | {key: np.ones(CHANNELS, dtype) for key in KEYS}
    before = _snapshot(param)
    _train(_batches(rng, SHAPES[0])[0] * np.sqrt(np.finfo(dtype).max), param, backend=backend)
    _assert_same(param, before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("skip", [False, True])
def test_an_empty_batch_stays_out(skip, rule, backend, rng):
    param = _param(rule, skip_nonfinite=skip)
    _train(_batches(rng, SHAPES[0])[0], param, backend=backend)
    before = _snapshot(param)
    _train(np.zeros((0, CHANNELS)), param, backend=backend)
    _assert_same(param, before)


@pytest.mark.parametrize("rule", RULES)
def test_one_value_a_channel(rule, backend, rng):
    """y = beta; the unbiased variance of one value is none, so under PyTorch's convention the batch stays out."""
    param = _param(rule)
    _train(_batches(rng, SHAPES[0])[0], param, backend=backend)
    before = _snapshot(param)
    y = _train(np.full((1, CHANNELS), 7.0), param, backend=backend)
    np.testing.assert_array_equal(y, np.zeros((1, CHANNELS)))
    assert all(np.isfinite(param[key]).all() for key in KEYS)
    if param.get("convention") == "pytorch":
        _assert_same(param, before)
    else:
        assert (param["running_mean"] != before["running_mean"]).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_staged_forward_follows_the_same_rules(rule, rng):
    fused, staged = _param(rule, skip_nonfinite=True), _param(rule, skip_nonfinite=True)
    batches = _batches(rng, SHAPES[2])
    batches[2][0, 0] = np.nan
    for x in batches:
        _train(x, fused)
        fastnorm.batchnorm_forward_staged(x, None, None, staged)
    for key in KEYS:
        np.testing.assert_allclose(staged[key], fused[key], rtol=1e-12)
    assert staged.get("num_batches_tracked") == fused.get("num_batches_tracked")


@pytest.mark.parametrize(
    ("param", "error", "named"),
    [
        ({"convention": "torch"}, ValueError, "convention"),
        ({"convention": None}, ValueError, "convention"),
        ({"convention": ["pytorch"]}, ValueError, "convention"),
        ({"convention": "pytorch", "momentum": 1.5}, ValueError, "momentum"),
        ({"convention": "pytorch", "momentum": "0.1"}, TypeError, "momentum"),
        ({"num_batches_tracked": -1}, ValueError, "num_batches_tracked"),
        ({"num_batches_tracked": 1.0}, TypeError, "num_batches_tracked"),
        ({"num_batches_tracked": True}, TypeError, "num_batches_tracked"),
        ({"average": 0.9}, TypeError, "average"),
        ({"average": ExponentialMovingAverage(0.9), "momentum": 0.9}, ValueError, "momentum"),
        ({"average": ExponentialMovingAverage(0.9), "momentum": None}, ValueError, "momentum"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite"),
        ({"skip_nonfinite": None}, TypeError, "skip_nonfinite"),
        ({"skip_non_finite": True}, ValueError, "skip_nonfinite"),
        ({"track_running_stats": True}, ValueError, "track_running_stats"),
    ],
)
@pytest.mark.parametrize("forward", [fastnorm.batchnorm_forward, fastnorm.batchnorm_forward_staged])
def test_bad_options(forward, param, error, named):
    before = dict(param)
    with pytest.raises(error, match=named):
        forward(np.ones((4, CHANNELS)), None, None, param)
    assert param == before
