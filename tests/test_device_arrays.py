"""The public functions on arrays of a device: results, kinds, places, streams, errors. device_kinds.py says on what."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ARRANGEMENTS, OPS, WRITABLE, case, check_all, check_moments, gradients, rearranged, standard, truth
from device_kinds import KINDS, MODE, StandInBackend, bfloat16, devices
from processes import run

import fastnorm
from fastnorm import BackendUnavailableError, _device, _dispatch
from fastnorm.backends import KernelTable
from fastnorm.bench.cases import dtype_of

stand_in_only = pytest.mark.skipif(MODE != "stand-in", reason="looks at the stand-in for the cuda backend")
FUSED = [name for name, op in OPS.items() if hasattr(fastnorm, f"{name}_forward")]
LAYOUTS = [name for name in ARRANGEMENTS if name not in ("foreign byte order", "unaligned")]
SHAPES = [(5, 7), (3, 4, 2, 5)]
if MODE != "simulator":  # which takes half a minute where each row has statistics of its own
    SHAPES.append((33, 70))


@pytest.fixture
def backend():
    with devices() as found:
        yield found


@pytest.fixture(params=KINDS)
def kind(request, backend):
    return KINDS[request.param]


def put(kind, inputs):
    return inputs._make(kind.put(values) for values in inputs)


def get(kind, results):
    return {name: kind.get(value) for name, value in results.items() if value is not None}


def fused(this, inputs, **options):
    x, gamma, beta, dout = inputs
    y, cache = this.op.forward(*this.arguments(x, gamma, beta), {}, axis=this.axis, **options)
    return {"y": y, **gradients(this.op.backward(dout, cache, **options))}


# ---- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", FUSED)
def test_forward_and_backward(op, shape, dtype, kind):
    if dtype == "bfloat16" and not kind.bfloat16():
        pytest.skip(f"{kind.name} has no bfloat16")
    this, inputs, expected = standard(op, shape, 1, dtype)
    found = fused(this, put(kind, inputs))
    assert all(type(value) is type(kind.put(inputs.x)) for value in found.values())
    results = get(kind, found)
    for name, value in results.items():
        assert value.dtype == (inputs.gamma if name in ("dgamma", "dbeta") else inputs.x).dtype
    check_all(expected, results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", FUSED)
def test_layouts(op, layout, kind):
    this = case(op, (3, 4, 2, 5))
    inputs = rearranged(this.inputs(), layout)
    arrays = put(kind, inputs)
    found = fused(this, arrays)
    check_all(truth(this, *inputs), get(kind, found))
    host, _ = this.op.forward(*this.arguments(inputs.x, None, None), {}, axis=1, backend="numpy")
    if all(n != 1 for n in host.shape):
        assert kind.strides(found["y"]) == kind.strides(found["dx"]) == host.strides


@pytest.mark.parametrize("op", FUSED)
def test_layouts_of_dout_and_out(op, kind):
    this = case(op, (3, 4, 2, 5))
    inputs = rearranged(this.inputs(), "C", "channels-last")
    expected = truth(this, *inputs)
    x, gamma, beta, dout = put(kind, inputs)
    for layout in ("C", "channels-last", "F", "gaps"):
        out, dx = (kind.put(ARRANGEMENTS[layout](np.zeros_like(inputs.x))) for _ in range(2))
        y, cache = this.op.forward(*this.arguments(x, gamma, beta), {}, axis=1, out=out)
        found, *_ = this.op.backward(dout, cache, out=dx)
        assert y is out
        assert found is dx
        check_all(expected, get(kind, {"y": y, "dx": found}))


@pytest.mark.parametrize("op", FUSED)
def test_parameters_may_be_missing_of_any_shape_and_dtype(op, kind):
    this = case(op, (3, 4, 2, 5))
    x, gamma, beta, dout = this.inputs()
    wide = gamma.reshape((1, *this.parameter_shape, *(1,) * (4 - 1 - gamma.ndim))).astype(np.float64)
    whole = np.ones(gamma.shape, np.int32)
    choices = ((whole, wide), (None, beta), (gamma, None), (None, None), (wide, beta))
    for given in choices:
        expected = truth(this, x, *given, dout)
        arrays = [None if value is None else kind.put(value) for value in (x, *given, dout)]
        found = fused(this, arrays)
        for name, parameter in zip(("dgamma", "dbeta"), given, strict=True):
            if parameter is None or name not in found:
                assert found.get(name) is None
            else:
                gradient = kind.get(found[name])
                assert gradient.shape == parameter.shape
                assert gradient.dtype == (np.float64 if parameter.dtype == np.int32 else parameter.dtype)
        check_all(expected, get(kind, found))


def test_integers_are_promoted(kind):
    x = np.arange(12).reshape(3, 4)
    out, _ = fastnorm.layernorm_forward(kind.put(x), None, None)
    expected, _ = fastnorm.layernorm_forward(x, None, None, backend="numpy")
    np.testing.assert_allclose(kind.get(out), expected, rtol=1e-12)


def test_running_statistics(kind):
    this = case("batchnorm", (8, 6))
    x, gamma, beta, dout = this.inputs()
    host, device = {"momentum": 0.7}, {"momentum": 0.7}
    for scale in (1, 2):
        fastnorm.batchnorm_forward(scale * x, gamma, beta, host, backend="numpy")
        fastnorm.batchnorm_forward(kind.put(scale * x), kind.put(gamma), kind.put(beta), device)
    for name in ("running_mean", "running_var"):
        assert type(device[name]) is type(kind.put(x))
        found = kind.get(device[name])
        assert found.dtype == host[name].dtype
        np.testing.assert_allclose(found, host[name], rtol=1e-5)
    host["mode"] = device["mode"] = "test"
    constants = tuple(host[name] for name in ("running_mean", "running_var"))
    expected = truth(this, x, gamma, beta, dout, constants=constants)
    device.update(running_mean=kind.put(constants[0]), running_var=kind.put(constants[1].reshape(1, 6)))
    array = kind.put(x.copy())
    y, cache = fastnorm.batchnorm_forward(array, kind.put(gamma), kind.put(beta), device)
    dx, dgamma, dbeta = fastnorm.batchnorm_backward(kind.put(dout), cache)
    check_all(expected, get(kind, {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}))
    y, cache = fastnorm.batchnorm_forward(array, kind.put(gamma), kind.put(beta), device, out=array)
    assert y is array
    check_all(expected, {"y": kind.get(y)})
    with pytest.raises(ValueError, match="over x"):
        fastnorm.batchnorm_backward(kind.put(dout), cache)


@pytest.mark.parametrize(
    "options", [{"convention": "pytorch"}, {"momentum": None}, {"convention": "pytorch", "momentum": None}], ids=str
)
@pytest.mark.parametrize("op", ["batchnorm", "instancenorm"])
def test_running_statistics_by_other_rules(op, options, kind):
    x, forward = np.random.default_rng(5).standard_normal((4, 3, 5)) + 2, getattr(fastnorm, f"{op}_forward")
    given = {} if op == "batchnorm" else {"running_mean": np.full(3, 0.5), "running_var": np.full(3, 2.0, np.float32)}
    host, device = {**options, **given}, {**options, **{name: kind.put(value) for name, value in given.items()}}
    for scale in (1, 2, 3):
        forward(scale * x, None, None, host, backend="numpy")
        forward(kind.put(scale * x), None, None, device)
    assert device.pop("num_batches_tracked") == host.pop("num_batches_tracked") == 3
    for name in ("running_mean", "running_var"):
        assert type(device[name]) is type(kind.put(x))
        found = kind.get(device[name])
        assert found.dtype == host[name].dtype
        np.testing.assert_allclose(found, host[name], rtol=1e-12 if found.dtype == np.float64 else 1e-6)


def test_a_single_value_has_no_unbiased_variance(kind):
    param = {"convention": "pytorch"}
    forward(kind.put(X[:1]), param=param)
    assert param == {"convention": "pytorch"}


def test_an_average_of_numpy_arrays_is_refused(kind):
    out = kind.put(np.full_like(X, 7))
    with pytest.raises(ValueError, match=r"bn_param\['average'\]: .*on a device"):
        forward(kind.put(X), param={"average": fastnorm.ExponentialMovingAverage(0.9)}, out=out)
    assert (kind.get(out) == 7).all()
    forward(kind.put(X), param={"average": None})


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the simulator
@pytest.mark.parametrize("options", [{}, {"convention": "pytorch"}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("op", ["batchnorm", "instancenorm"])
def test_skip_nonfinite(op, bad, options, kind):
    x, forward = np.random.default_rng(5).standard_normal((4, 3, 5)) + 2, getattr(fastnorm, f"{op}_forward")
    given = {"running_mean": np.full(3, 0.5), "running_var": np.full(3, 2.0, np.float32)}
    param = {"skip_nonfinite": True, **options, **{name: kind.put(value) for name, value in given.items()}}
    forward(kind.put(x), None, None, param)
    before = dict(param)
    poisoned = x.copy()
    poisoned[1, 2, 3] = bad
    y, _ = forward(kind.put(poisoned), None, None, param)
    assert np.isnan(kind.get(y)[1, 2]).any()
    assert all(param[key] is before[key] for key in param)
    forward(kind.put(x + 1), None, None, param)
    assert (kind.get(param["running_mean"]) > kind.get(before["running_mean"])).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_skip_nonfinite_sees_what_overflows_where_it_is_kept(dtype, kind):
    if dtype == "bfloat16" and not kind.bfloat16():
        pytest.skip(f"{kind.name} has no bfloat16")
    param = {name: kind.put(np.ones(3, dtype_of(dtype))) for name in ("running_mean", "running_var")}
    before = dict(param)
    x = np.random.default_rng(5).standard_normal((8, 3)) * np.sqrt(2) * (2.0**9 if dtype == "float16" else 2.0**65)
    param = {"skip_nonfinite": True} | param
    fastnorm.batchnorm_forward(kind.put(x), None, None, param)
    assert all(param[name] is before[name] for name in before)


def test_running_statistics_keep_their_shape_and_dtype(kind):
    x = kind.put(np.random.default_rng(0).standard_normal((8, 3, 2)))
    param = {"running_mean": kind.put(np.zeros((1, 3, 1), np.float32)), "running_var": kind.put(np.ones(3, np.float16))}
    before = dict(param)
    fastnorm.batchnorm_forward(x, None, None, param)
    for name, value in before.items():
        assert param[name] is not value
        assert kind.get(param[name]).shape == kind.get(value).shape
        assert kind.get(param[name]).dtype == kind.get(value).dtype
        assert (kind.get(value) == (name == "running_var")).all()


@pytest.mark.parametrize("axis", [None, 0, (0, 2), (1,), ()])
def test_pieces_moments(axis, kind):
    x = np.random.default_rng(1).standard_normal((4, 3, 5)).astype(np.float32) + 3
    for keepdims in (False, True):
        found = fastnorm.moments(kind.put(x), axis, keepdims=keepdims)
        mean, var = kind.get(found.mean), kind.get(found.var)
        assert mean.shape == x.mean(axis=axis, keepdims=keepdims).shape
        if keepdims:
            axes = tuple(range(3)) if axis is None else (axis,) if isinstance(axis, int) else axis
            check_moments(fastnorm.Moments(found.count, mean, var), x, axes)


def test_pieces_normalize_and_backward(kind):
    this = case("batchnorm", (6, 3, 2, 2))
    inputs = this.inputs()
    expected = truth(this, *inputs)
    x, gamma, _, dout = put(kind, inputs)
    found = fastnorm.moments(x, (0, 2, 3), keepdims=True)
    out = kind.put(np.zeros_like(inputs.x))
    column = kind.put(inputs.gamma.reshape(3, 1, 1))
    assert fastnorm.normalize(x, found.mean, found.var, column, None, out=out) is out
    check_all(truth(this, inputs.x, inputs.gamma, None, inputs.dout), {"y": kind.get(out)})
    sums = fastnorm.batchnorm_backward_reduce(dout, x, found.mean, found.var)
    dx = fastnorm.batchnorm_backward_apply(dout, x, found.mean, found.var, gamma, *sums, found.count)
    check_all(expected, get(kind, {"dx": dx, "dbeta": sums[0], "dgamma": sums[1]}))


@pytest.mark.parametrize("op", FUSED)
def test_empty_arrays(op, kind):
    this = case(op, (0, 4))
    x = kind.put(np.zeros(this.shape, np.float32))
    gamma = kind.put(np.ones(4, np.float32))
    y, cache = this.op.forward(*this.arguments(x, gamma, None), axis=1)
    dx, dgamma, *_ = this.op.backward(x, cache)
    assert kind.get(y).shape == kind.get(dx).shape == (0, 4)
    assert (kind.get(dgamma) == 0).all()


# ---- dropout --------------------------------------------------------------------------------------


def dropped(x, dout, param, **options):
    """Result and gradient in host memory: the bits to have."""
    out, cache = fastnorm.dropout_forward(x, param, backend="numpy", **options)
    return out, fastnorm.dropout_backward(dout, cache, backend="numpy")


def bits(values):
    """Of all but what a NaN carries, which a GPU makes its own."""
    return np.where(np.isnan(values), values.dtype.type(0.5), values).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("param", [{}, {"scale": "none"}, {"mode": "test", "scale": "none"}], ids=str)
def test_dropout_has_the_bits_of_host_memory(param, dtype, kind):
    if dtype == "bfloat16" and not kind.bfloat16():
        pytest.skip(f"{kind.name} has no bfloat16")
    rng, param = np.random.default_rng(3), {"p": 0.3, "seed": 1 << 63, **param}
    x, dout = (rng.standard_normal((6, 7, 5)).astype(dtype_of(dtype)) for _ in range(2))
    x[0, 0] = np.nan, np.inf, -np.inf, -0.0, 0.0
    expected = dropped(x, dout, param)
    out, cache = fastnorm.dropout_forward(kind.put(x), param)
    found = out, fastnorm.dropout_backward(kind.put(dout), cache)
    for have, want in zip(found, expected, strict=True):
        assert type(have) is type(kind.put(x))
        assert kind.get(have).dtype == want.dtype
        assert bits(kind.get(have)) == bits(want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_of_any_layout(layout, kind):
    values, param = np.random.default_rng(4).standard_normal((3, 4, 2, 5)).astype(np.float32), {"p": 0.5, "seed": 5}
    arranged = ARRANGEMENTS[layout](values)
    plain, _ = dropped(np.ascontiguousarray(arranged), values, param)
    x = kind.put(arranged)
    out, cache = fastnorm.dropout_forward(x, param)
    np.testing.assert_array_equal(kind.get(out), plain)
    np.testing.assert_array_equal(kind.get(fastnorm.dropout_backward(x, cache)), plain)
    given = kind.put(np.ones_like(values))
    assert fastnorm.dropout_forward(x, param, out=given)[0] is given
    np.testing.assert_array_equal(kind.get(given), plain)
    if layout in WRITABLE:
        place = kind.put(ARRANGEMENTS[layout](np.ones_like(values)))
        assert fastnorm.dropout_backward(kind.put(arranged), cache, out=place) is place
        np.testing.assert_array_equal(kind.get(place), plain)
        own = kind.put(ARRANGEMENTS[layout](arranged.copy()))
        assert fastnorm.dropout_forward(own, param, out=own)[0] is own
        np.testing.assert_array_equal(kind.get(own), plain)


def test_dropout_of_other_dtypes_and_places(kind):
    x, param = np.arange(1, 25).reshape(4, 6), {"p": 0.5, "seed": 6}
    expected, _ = dropped(x.astype(float), x.astype(float), param)
    out, cache = fastnorm.dropout_forward(kind.put(x), param)
    assert kind.get(out).dtype == np.float64
    np.testing.assert_array_equal(kind.get(out), expected)
    for dtype in (np.float16, np.float32, np.int32):  # of dout; dx has x's
        dx = kind.get(fastnorm.dropout_backward(kind.put(x.astype(dtype)), cache))
        assert dx.dtype == np.float64
        np.testing.assert_array_equal(dx, expected)
    np.testing.assert_array_equal(fastnorm.dropout_backward(x, cache), expected)  # the mask is nowhere
    _, on_host = fastnorm.dropout_forward(x.astype(np.float32), param)
    dx = kind.get(fastnorm.dropout_backward(kind.put(x), on_host))
    assert dx.dtype == np.float32
    np.testing.assert_array_equal(dx, expected)
    empty = kind.put(np.zeros((0, 3), np.float32))
    out, cache = fastnorm.dropout_forward(empty, param)
    assert kind.get(out).shape == kind.get(fastnorm.dropout_backward(empty, cache)).shape == (0, 3)


def test_dropout_of_bfloat16_on_both_sides(kind):
    if not kind.bfloat16():
        pytest.skip(f"{kind.name} has no bfloat16")
    x, param = X.astype(bfloat16()), {"p": 0.5, "seed": 6}
    expected, _ = dropped(x, x, param)
    _, there = fastnorm.dropout_forward(kind.put(x), param)
    _, here = fastnorm.dropout_forward(x, param)
    for dout in (x, X):
        on_host = fastnorm.dropout_backward(dout, there)
        on_device = kind.get(fastnorm.dropout_backward(kind.put(dout), here))
        assert on_host.dtype == on_device.dtype == bfloat16()
        assert on_host.tobytes() == on_device.tobytes() == expected.tobytes()


def test_dropout_says_what_is_wrong(kind):
    x, param = kind.put(X), {"p": 0.5}
    with pytest.raises(ValueError, match=r"out: .*cuda:0.*host"):
        fastnorm.dropout_forward(x, param, out=X.copy())
    with pytest.raises(ValueError, match=r"out: .*host memory.*cuda:0"):
        fastnorm.dropout_forward(X, param, out=kind.put(X.copy()))
    with pytest.raises(ValueError, match="out: expected dtype float32"):
        fastnorm.dropout_forward(x, param, out=kind.put(X.astype(np.float64)))
    with pytest.raises(ValueError, match=r"backend: 'numpy'.*cuda:0"):
        fastnorm.dropout_forward(x, param, backend="numpy")
    _, cache = fastnorm.dropout_forward(x, param)
    with pytest.raises(ValueError, match="dout: expected the shape of x"):
        fastnorm.dropout_backward(kind.put(X.T.copy()), cache)
    with pytest.raises(ValueError, match=r"backend: 'numpy'.*cuda:0"):
        fastnorm.dropout_backward(x, cache, backend="numpy")


# ---- NumPy arrays, because the caller says so ------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("op", FUSED)
def test_numpy_arrays_by_name(op, dtype, backend):
    this, inputs, expected = standard(op, (3, 4, 2, 5), 1, dtype)
    found = fused(this, inputs, backend="cuda")
    assert all(type(value) is np.ndarray for value in found.values())
    check_all(expected, found)
    with fastnorm.use_backend("cuda"):
        again = fused(this, inputs)
    assert all(again[name].tobytes() == found[name].tobytes() for name in found)


def test_numpy_arrays_by_name_in_pieces_and_in_place(backend):
    _, inputs, expected = standard("batchnorm", (6, 3, 2, 2))
    x, gamma, beta, dout = inputs
    found = fastnorm.moments(x, (0, 2, 3), keepdims=True, backend="cuda")
    check_moments(found, x, (0, 2, 3))
    sums = fastnorm.batchnorm_backward_reduce(dout, x, found.mean, found.var, backend="cuda")
    dx = fastnorm.batchnorm_backward_apply(dout, x, found.mean, found.var, gamma, *sums, found.count, backend="cuda")
    out = x.copy()
    shaped = (values.reshape(3, 1, 1) for values in (gamma, beta))
    assert fastnorm.normalize(out, found.mean, found.var, *shaped, out=out, backend="cuda") is out
    check_all(expected, {"y": out, "dx": dx, "dbeta": sums[0], "dgamma": sums[1]})


# ---- where a call runs ----------------------------------------------------------------------------

X = np.arange(24, dtype=np.float32).reshape(4, 6)
ONES = np.ones(6, np.float32)


@stand_in_only
def test_a_call_runs_on_the_device_and_the_current_stream(kind, backend):
    import sys

    device = {"torch": 1, "cupy": 1, "numba": 1}[kind.name]
    x, gamma = kind.put(X, device), kind.put(ONES, device)
    module = sys.modules.get(kind.name)

    def use(stream):
        if kind.name == "numba":
            x.stream = gamma.stream = stream
        else:
            module.streams[device] = stream

    use(11)
    y, cache = fastnorm.batchnorm_forward(x, gamma, None, {})
    assert y._index == 1
    assert set(backend.calls) == {("channel_forward", 1, 11)}
    backend.calls.clear()
    use(12)
    dx, dgamma, _ = fastnorm.batchnorm_backward(x, cache)
    assert dx._index == dgamma._index == 1
    assert ("channel_backward", 1, 12) in backend.calls
    if kind.name != "numba":
        assert {stream for _, _, stream in backend.calls} == {12}
        assert not backend.followed


@stand_in_only
def test_arrays_of_other_streams_are_waited_for(backend):
    kind = KINDS["numba"]
    x, gamma, beta, out = (kind.put(values) for values in (X, ONES, ONES, X.copy()))
    x.stream, gamma.stream, beta.stream = 3, 4, 3
    y, _ = fastnorm.layernorm_forward(x, gamma, beta)
    assert backend.followed == [(3, 4)]
    assert y.stream == 3
    with pytest.raises(ValueError, match=r"out: .*stream"):
        fastnorm.layernorm_forward(x, gamma, beta, out=out)


@stand_in_only
def test_libraries_may_be_mixed_on_one_device(backend):
    import sys

    sys.modules["torch"].streams[0], sys.modules["cupy"].streams[0] = 5, 6
    y, _ = fastnorm.layernorm_forward(KINDS["torch"].put(X), KINDS["cupy"].put(ONES), KINDS["torch"].put(ONES))
    assert type(y).__module__ == "torch"
    assert backend.followed == [(5, 6)]


@stand_in_only
def test_dense_arrays_are_used_where_they_are(kind, backend):
    """Neither x nor its parameters are copied: one kernel each way, besides the parameters' gradients."""
    x, gamma, dout = kind.put(X), kind.put(ONES), kind.put(X)
    _, cache = fastnorm.layernorm_forward(x, gamma, gamma)
    fastnorm.layernorm_backward(dout, cache)
    assert [name for name, _, _ in backend.calls] == ["row_forward", "row_backward", "copy", "copy"]
    assert cache.x is x
    assert cache.gamma is gamma


def test_where_x_lives_decides(kind):
    with fastnorm.use_backend(None):
        y, _ = fastnorm.layernorm_forward(X, None, None)
        assert type(y) is np.ndarray
        y, _ = fastnorm.layernorm_forward(kind.put(X), None, None)
        assert type(y) is type(kind.put(X))
    y, _ = fastnorm.layernorm_forward(kind.put(X), None, None, backend="cuda")
    with fastnorm.use_backend("cuda"):
        fastnorm.layernorm_forward(kind.put(X), None, None)


def test_without_a_name_host_memory_never_goes_to_the_device(backend, monkeypatch):
    monkeypatch.setattr(_dispatch, "_MODULES", {"cuda": "fastnorm.backends.numba_cuda.table", **_dispatch._MODULES})
    monkeypatch.setattr(_dispatch, "_active", None)
    assert _dispatch.kernels(None) is not backend


# ---- errors ---------------------------------------------------------------------------------------


def forward(x, gamma=None, beta=None, param=None, **options):
    return fastnorm.batchnorm_forward(x, gamma, beta, param, **options)


@pytest.mark.parametrize("op", ["batchnorm", "layernorm"])
@pytest.mark.parametrize("argument", ["gamma", "beta", "out"])
def test_host_and_device_do_not_mix(argument, op, kind):
    function = getattr(fastnorm, f"{op}_forward")
    values = X.copy() if argument == "out" else ONES
    with pytest.raises(ValueError, match=rf"{argument}: expected an array on cuda:0.*host"):
        function(kind.put(X), **{"gamma": None, "beta": None, argument: values})
    with pytest.raises(ValueError, match=rf"{argument}: expected an array in host memory.*cuda:0"):
        function(X, **{"gamma": None, "beta": None, argument: kind.put(values)})
    assert argument != "out" or (values == X).all()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_are_where_x_is(name, kind):
    good, bad = {"running_mean": kind.put(ONES), "running_var": kind.put(ONES)}, {name: ONES}
    for mode in ("train", "test"):
        param = {**good, **bad, "mode": mode}
        before = dict(param)
        out = kind.put(np.full_like(X, 7))
        with pytest.raises(ValueError, match=f"{name}: .*on cuda:0"):
            forward(kind.put(X), param=param, out=out)
        assert param == before
        assert (kind.get(out) == 7).all()
    with pytest.raises(ValueError, match=f"{name}: .*host memory"):
        forward(X, param={name: kind.put(ONES)})


def test_a_backward_on_the_other_side(kind):
    _, cache = forward(kind.put(X))
    with pytest.raises(ValueError, match=r"dout: .*cuda:0"):
        fastnorm.batchnorm_backward(X, cache)
    _, cache = forward(X)
    with pytest.raises(ValueError, match=r"dout: .*host memory"):
        fastnorm.batchnorm_backward(kind.put(X), cache)
    with pytest.raises(ValueError, match=r"mean: .*cuda:0"):
        fastnorm.batchnorm_backward_reduce(kind.put(X), kind.put(X), ONES, ONES)
    with pytest.raises(ValueError, match=r"mean: .*cuda:0"):
        fastnorm.normalize(kind.put(X), ONES, ONES)


@stand_in_only
@pytest.mark.parametrize("argument", ["gamma", "beta", "out"])
def test_two_devices(argument, kind):
    options = {"gamma": kind.put(ONES), "beta": kind.put(ONES), "out": kind.put(X.copy())}
    options[argument] = kind.put(X.copy() if argument == "out" else ONES, 1)
    with pytest.raises(ValueError, match=rf"{argument}: expected an array on cuda:0.*cuda:1"):
        forward(kind.put(X), **options)
    assert (kind.get(options["out"]) == X).all()


@pytest.mark.parametrize("name", ["cpp", "numba", "numpy"])
def test_a_backend_of_host_memory_by_name(name, kind, monkeypatch):
    if not dict(zip(*zip(*[row[:2] for row in fastnorm.backends()], strict=True), strict=True))[name]:
        pytest.skip(f"{name} is not available")
    with pytest.raises(ValueError, match=rf"backend: '{name}' .*cuda:0"):
        forward(kind.put(X), backend=name)
    with fastnorm.use_backend(name), pytest.raises(ValueError, match=rf"backend: '{name}'"):
        forward(kind.put(X))
    monkeypatch.setenv("FASTNORM_BACKEND", name)
    with fastnorm.use_backend(None), pytest.raises(ValueError, match=rf"backend: '{name}'"):
        fastnorm.moments(kind.put(X))


@stand_in_only
def test_a_backend_that_cannot_be_loaded(kind, monkeypatch):
    monkeypatch.setattr(_dispatch, "_loaded", {})
    monkeypatch.setattr(_dispatch, "_refused", {"cuda": "there is no driver"})
    with pytest.raises(BackendUnavailableError, match=r"x: .*there is no driver"):
        forward(kind.put(X))


@stand_in_only
def test_a_device_that_is_too_old(kind, backend):
    backend.refusal[0] = "cuda:0 is too old"
    out = kind.put(X.copy())
    with pytest.raises(ValueError, match="too old"):
        forward(kind.put(X), out=out)
    assert backend.calls == []


def test_out_must_not_overlap(kind):
    x = kind.put(X.copy())
    with pytest.raises(ValueError, match="out: overlaps x"):
        forward(x, out=x)
    rows = kind.put(np.zeros((5, 6), np.float32))
    with pytest.raises(ValueError, match="out: overlaps x"):
        forward(rows[1:], out=rows[:-1])
    if kind.name != "numba" or MODE == "stand-in":
        forward(rows[:2], out=rows[2:4])


def test_what_works_in_host_memory_alone_is_refused_on_a_device(kind):
    x = kind.put(X)
    for call, name in (
        (lambda: forward([x, x]), "x: expected one array, got a list of"),
        (lambda: fastnorm.moments((x, x), 0), "x: expected one array, got a tuple of"),
        (lambda: fastnorm.moments(x, 0, weights=ONES[:4, None]), "x: expected a NumPy array"),
        (lambda: fastnorm.moments(X, 1, weights=kind.put(ONES)), "weights: expected a NumPy array"),
        (lambda: fastnorm.stream_moments([x, x]), r"batches\[0\]: expected a NumPy array"),
        (lambda: fastnorm.stream_moments(x), "batches: expected an array|batches.*NumPy array"),
    ):
        with pytest.raises(TypeError, match=name):
            call()


def test_shapes_and_dtypes_are_checked_as_in_host_memory(kind):
    for options, name in (
        ({"gamma": kind.put(np.ones(5, np.float32))}, "gamma"),
        ({"out": kind.put(np.ones((4, 5), np.float32))}, "out"),
        ({"out": kind.put(np.ones((4, 6), np.float64))}, "out"),
        ({"param": {"running_mean": kind.put(np.ones(5))}}, "running_mean"),
    ):
        with pytest.raises(ValueError, match=name):
            forward(kind.put(X), **options)
    with pytest.raises(TypeError, match=r"x: .*complex64"):
        forward(kind.put(X.astype(np.complex64)))


@pytest.mark.skipif(MODE == "gpu", reason="looks at a stand-in for PyTorch")
def test_tensors_that_cannot_be_used(backend):
    import sys

    torch = sys.modules["torch"]
    tracked, sparse, negative, elsewhere = (KINDS["torch"].put(X) for _ in range(4))
    tracked.requires_grad = True
    with pytest.raises(ValueError, match=r"x: .*torch\.no_grad"):
        forward(tracked)
    torch.grad_enabled = False
    forward(tracked)
    sparse.layout = "sparse_coo"
    with pytest.raises(TypeError, match=r"x: .*sparse_coo"):
        forward(sparse)
    negative.is_neg = lambda: True
    with pytest.raises(TypeError, match=r"x: .*negative"):
        forward(negative)
    type(elsewhere).device = property(lambda self: type("Place", (), {"type": "cpu", "__str__": lambda self: "cpu"})())
    with pytest.raises(TypeError, match="x: expected a NumPy array or one on a CUDA device, got a tensor on cpu"):
        forward(elsewhere)


def test_the_readable_versions_want_numpy_arrays(kind):
    _, cache = forward(kind.put(X))
    for call in (
        lambda: fastnorm.batchnorm_backward_alt(kind.put(X), cache),
        lambda: fastnorm.batchnorm_forward_staged(kind.put(X), None, None, {}),
        lambda: fastnorm.layernorm_forward_staged(kind.put(X), None, None, {}),
    ):
        with pytest.raises(TypeError, match="x: expected a NumPy array"):
            call()


# ---- descriptors ----------------------------------------------------------------------------------


def test_a_descriptor_has_what_the_ops_ask_an_ndarray_for(kind):
    values = np.random.default_rng(2).standard_normal((3, 4, 5)).astype(np.float32)
    for layout in ("C", "F", "channels-last", "padded"):
        arranged = ARRANGEMENTS[layout](values)
        found = _device.described("x", kind.put(arranged))
        for name in ("shape", "strides", "dtype", "ndim", "size", "itemsize", "nbytes"):
            assert getattr(found, name) == getattr(arranged, name), name
        for flag in ("c_contiguous", "aligned"):
            assert getattr(found.flags, flag) == getattr(arranged.flags, flag)
        like = np.empty_like(arranged)
        assert found.empty_like().strides == like.strides
        assert found.transpose((2, 0, 1)).strides == arranged.transpose((2, 0, 1)).strides
        shadow = found.shadow()
        assert (shadow.shape, shadow.strides, shadow.dtype) == (found.shape, found.strides, found.dtype)
        assert shadow.__array_interface__["data"][0] == found.pointer
        assert (kind.get(found.reshape(-1).handed()) == arranged.reshape(-1)).all() or layout != "C"
        assert (kind.get(found.astype(np.float64).reshape(4, -1).handed()) == arranged.reshape(4, -1)).all()


def test_bfloat16_is_a_dtype_of_its_own():
    assert np.dtype(np.float16) != _device.BFLOAT16
    assert np.dtype(np.float32) != _device.BFLOAT16
    assert str(_device.BFLOAT16) == _device.BFLOAT16.name == bfloat16().name
    assert _device.BFLOAT16.newbyteorder("=") is _device.BFLOAT16


@stand_in_only
def test_bfloat16_needs_no_ml_dtypes(backend, monkeypatch):
    """The descriptor of a tensor, of its outputs and its parameters, none of which NumPy has a dtype for."""
    import sys

    x = _device.described("x", KINDS["torch"].put(X.astype(bfloat16())))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    from fastnorm import _layout

    dtype = _layout.storage_dtype("x", x)
    plan = _layout.buffers((x,), dtype, dtype, None, _layout.channel_view, (1,))
    assert plan.work.dtype is _device.BFLOAT16
    assert plan.view.sizes == (4, 6, 1)
    assert _layout.common_storage(dtype, np.dtype(np.float16)) == np.float32


def test_other_libraries_are_told_what_is_expected():
    class Stranger:
        __cuda_array_interface__ = {"data": (1, False), "shape": (2, 2), "typestr": "<f4", "version": 3}  # noqa: RUF012

    with pytest.raises(TypeError, match="x: expected a NumPy array"):
        forward(Stranger())


def test_show_config_has_the_device(backend, capsys):
    assert fastnorm.show_config("dicts")["cuda"]["available"]
    fastnorm.show_config()
    assert "cuda:0" in capsys.readouterr().out or MODE == "simulator"


def test_a_stand_in_keeps_the_contract(backend):
    assert isinstance(backend, KernelTable) or not isinstance(backend, StandInBackend)


def test_importing_fastnorm_loads_no_library():
    code = "import fastnorm, sys; print(*sys.modules)"
    assert not {"torch", "cupy", "numba", "fastnorm.backends.numba_cuda.table"} & set(run(code).split())
