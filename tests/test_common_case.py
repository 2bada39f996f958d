"""The short way that plain arrays take gives what the long way gives, bit for bit, and lets nothing else pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import ISAS

import fastnorm
from fastnorm import _dispatch, _layout
from fastnorm.bench.cases import DTYPES, dtype_of
from fastnorm.ops import _arguments

pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ extension is not built")


class Named(np.ndarray):
    pass


def arrays(shape, dtype, axis, memory=None):
    """x, dout, gamma, beta, the first two with their axes in this order in memory."""
    rng = np.random.default_rng(0)
    order = range(len(shape)) if memory is None else memory
    x, dout = (
        rng.standard_normal([shape[axis] for axis in order]).astype(dtype_of(dtype)).transpose(np.argsort(order))
        for _ in "xd"
    )
    parameters = np.float64 if dtype == "float64" else np.float32
    return x, dout, rng.standard_normal(shape[axis]).astype(parameters), np.ones(shape[axis], parameters)


SHORT_WAYS = ("plain", "plain_channels", "plain_backward", "plain_channels_backward")


@pytest.fixture
def taken(monkeypatch):
    """Whether each look at a call's arrays found the common case."""
    answers = []

    def noting(real):
        def look(*arguments):
            answer = real(*arguments)
            answers.append(bool(answer))
            return answer

        return look

    for name in SHORT_WAYS:
        monkeypatch.setattr(_layout, name, noting(getattr(_layout, name)))
    return answers


NHWC = (0, 2, 3, 1)


@pytest.mark.parametrize("given", ["both", "gamma", "beta", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "shape", "axis", "memory"),
    [
        *((op, shape, 1, None) for op in ("batchnorm", "batchnorm/test") for shape in ((4, 8), (33, 70), (3, 5, 7, 9))),
        ("batchnorm", (3, 5, 7, 9), 1, NHWC),
        ("batchnorm/test", (3, 5, 7, 9), 1, NHWC),
        ("batchnorm", (3, 7, 9, 5), -1, None),
        ("batchnorm", (3, 5, 4, 7, 9), 1, (0, 2, 3, 4, 1)),
        *(("layernorm", shape, -1, None) for shape in ((4, 8), (33, 70), (3, 5, 7, 9))),
        ("rmsnorm", (33, 70), -1, None),
        *(("groupnorm", shape, 1, None) for shape in ((4, 8), (3, 6, 7, 9))),
        ("groupnorm", (3, 6, 7, 9), 1, NHWC),
        ("groupnorm", (3, 7, 9, 6), -1, None),
        ("instancenorm", (3, 5, 7, 9), 1, None),
    ],
    ids=str,
)
def test_both_ways_give_equal_bits(op, shape, axis, memory, dtype, given, taken, backend, monkeypatch):
    op, _, mode = op.partition("/")
    x, dout, gamma, beta = arrays(shape, dtype, axis, memory)
    gamma, beta = gamma if given in ("both", "gamma") else None, beta if given in ("both", "beta") else None
    param = {}
    if mode:
        param = {"mode": mode, "running_mean": np.full(shape[axis], 0.5), "running_var": np.full(shape[axis], 2.0)}
    forward, backward = getattr(fastnorm, f"{op}_forward"), getattr(fastnorm, f"{op}_backward")
    arguments = {"groupnorm": (x, gamma, beta, 2), "rmsnorm": (x, gamma)}.get(op, (x, gamma, beta))

    def run(out=None):
        y, cache = forward(*arguments, dict(param), axis=axis, out=out, backend=backend)
        y = y.copy(order="K")
        return y, *backward(dout, cache, out=out, backend=backend)

    short = run()
    out = np.empty_like(x)
    assert run(out)[1] is out
    assert out.tobytes() == short[1].tobytes()
    assert taken == 4 * [True]
    for name in SHORT_WAYS:
        monkeypatch.setattr(_layout, name, lambda *arguments: None)
    for found, expected in zip(short, run(), strict=True):
        if expected is None:
            assert found is None
        else:
            assert (found.dtype, found.shape, found.strides) == (expected.dtype, expected.shape, expected.strides)
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, dout, gamma, beta: (x, dout.astype(np.float64), gamma, beta),
        lambda x, dout, gamma, beta: (x, dout[:-1], gamma, beta),
        lambda x, dout, gamma, beta: (x, dout.reshape(-1), gamma, beta),
        lambda x, dout, gamma, beta: (x, np.asfortranarray(dout), gamma, beta),
        lambda x, dout, gamma, beta: (x, dout[::-1], gamma, beta),
        lambda x, dout, gamma, beta: (x, dout.astype(">f4"), gamma, beta),
        lambda x, dout, gamma, beta: (x, dout.view(Named), gamma, beta),
        lambda x, dout, gamma, beta: (x, dout.tolist(), gamma, beta),
        lambda x, dout, gamma, beta: (x, None, gamma, beta),
        lambda x, dout, gamma, beta: (x[::-1], dout, gamma, beta),
        lambda x, dout, gamma, beta: (x.astype(np.int32), dout.astype(np.int32), gamma, beta),
        lambda x, dout, gamma, beta: (x[:0], dout[:0], gamma, beta),
        lambda x, dout, gamma, beta: (x, dout, gamma.astype(np.float64), beta),
        lambda x, dout, gamma, beta: (x, dout, gamma, beta[:-1]),
        lambda x, dout, gamma, beta: (x, dout, gamma.reshape(1, -1), beta),
    ],
)
def test_anything_else_goes_the_long_way(change):
    plain = arrays((4, 8), "float32", 1)
    x, dout, gamma, beta = plain
    assert _layout.plain_backward(dout, x, gamma, beta, 1)
    assert _layout.plain_channels_backward(dout, x, gamma, beta, 1) == (4, 8, 1)
    x, dout, gamma, beta = change(*plain)
    assert not _layout.plain_backward(dout, x, gamma, beta, 1)
    assert _layout.plain_channels_backward(dout, x, gamma, beta, 1) is None


def test_channels_may_lie_last_in_memory():
    x, dout, gamma, beta = arrays((3, 5, 7, 9), "float32", 1, NHWC)
    assert _layout.plain_channels(x, gamma, beta, 1) == (189, 5, 1)
    assert not _layout.plain(x, gamma, beta, 1)
    assert _layout.plain_channels_backward(dout, x, gamma, beta, 1) == (189, 5, 1)
    for other in (np.ascontiguousarray(dout), dout[:, :, ::-1], dout.astype(np.float64)):
        assert _layout.plain_channels_backward(other, x, gamma, beta, 1) is None
    assert _layout.plain_out(dout, x, gamma, None)
    assert not _layout.plain_out(np.ascontiguousarray(dout), x, gamma, None)
    assert not _layout.plain_out(x, x, gamma, None)
    for order in ((0, 3, 2, 1), (2, 0, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)):
        assert _layout.plain_channels(arrays((3, 5, 7, 9), "float32", 1, order)[0], gamma, beta, 1) is None
    assert _layout.plain_channels(x[:, :, ::2], gamma, beta, 1) is None
    assert _layout.plain_channels(x[:, :4], gamma[:4], beta[:4], 1) is None


ORDERS = {2: [(0, 1), (1, 0)], 4: [(0, 1, 2, 3), NHWC, (3, 2, 1, 0), (1, 0, 3, 2)]}


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize(
    "axis", [None, 0, 1, -1, (0,), (0, 1), (0, 2, 3), (1, 2), (3, -4), (1, 3), (0, 2), ()], ids=str
)
@pytest.mark.parametrize("shape", [(4, 8), (33, 70), (3, 5, 7, 9), (3, 1, 1, 9), (1, 1, 1, 1)], ids=str)
def test_both_ways_of_moments_give_equal_bits(shape, axis, keepdims, in_parts, monkeypatch):
    """And take the same: what the views find, where statistics need not be sorted afterwards, nor merged but once."""
    monkeypatch.setattr(_layout, "worth_parts", lambda samples, elements: in_parts)
    monkeypatch.setattr(_layout, "parts_view", _layout.parts_view.__wrapped__)
    ndim = len(shape)
    axes = tuple(range(ndim)) if axis is None else tuple(np.atleast_1d(axis).astype(int))
    if any(not -ndim <= each < ndim for each in axes):
        assert _layout.plain_reduction(np.ones(shape), axis, keepdims) is None
        return
    kept = tuple(each for each in range(ndim) if each not in {each % ndim for each in axes})
    for memory in ORDERS[ndim]:
        x = arrays(shape, "float32", 1, memory)[0]
        view, found = _layout.channel_view(x.shape, x.strides, 4, kept), _layout.plain_reduction(x, axis, keepdims)
        with monkeypatch.context() as patch:
            patch.setattr(_layout, "worth_parts", lambda samples, elements: True)
            parts = _layout.parts_view(x.shape, x.strides, 4, kept)
        sizes = None
        if view is not None and view.stats is None:
            sizes = 1, 1, *view.sizes
        elif view is None and parts.stats is None and parts.merged == tuple(range(len(parts.merged))):
            merged = math.prod(parts.lengths[: len(parts.merged)])
            sizes = merged, parts.sizes[0] // merged, *parts.sizes[1:]
        assert found == (sizes and (*sizes, x.sum(axis=axis, keepdims=keepdims).shape))
        short = fastnorm.moments(x, axis, keepdims=keepdims)
        with monkeypatch.context() as patch:
            patch.setattr(_layout, "plain_reduction", lambda *arguments: None)
            long = fastnorm.moments(x, axis, keepdims=keepdims)
        assert short.count == long.count
        for one, other in zip(short[1:], long[1:], strict=True):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize(
    ("x", "axis"),
    [
        (np.ones((4, 8))[::2], 0), (np.ones((4, 8))[::-1], 0), (np.ones((4, 8)).view(Named), 0), ([[1.0]], 0),
        (np.ones((4, 8), np.int64), 0), (np.ones((4, 8), ">f4"), 0), (np.ones((0, 8)), 0), (np.ones((4, 8)), True),
        (np.ones((4, 8)), 0.0), (np.ones((4, 8)), "0"), (np.ones((4, 8)), [0]), (np.ones((4, 8)), (0, 0)),
        (np.ones((4, 8)), (0, -2)), (np.ones((4, 8)), 2), (np.ones((4, 8)), -3), (np.ones((4, 8)), 2**70),
        (np.ones((4, 8, 2)), (0, 1, 2, 3)), (np.ones((2, 3) * 3), (0, 2, 4)), (np.ones((2, 3, 4)).T, 1),
        (np.ones((4, 8)), np.int64(0)), (np.ones((4, 8)), (0, None)), (np.broadcast_to(np.ones(8), (4, 8)), 0),
    ],
)  # fmt: skip
def test_other_moments_go_the_long_way(x, axis):
    assert _layout.plain_reduction(np.ones((4, 8)), 0, False) == (1, 1, 4, 8, 1, (8,))
    assert _layout.plain_reduction(x, axis, False) is None


@pytest.mark.parametrize(
    ("samples", "elements", "expected"),
    [(32, 128, False), (4, 64, True), (512, 8192, False), (1024, 1024 * 3136, True), (400000, 4000000, False)],
)
def test_parts_of_few_values_are_packed(samples, elements, expected, monkeypatch):
    assert _layout.worth_parts(samples, elements) is expected
    x = np.random.default_rng(0).standard_normal((samples, elements // samples // 2, 2))
    taken = []
    table = _dispatch.kernels("cpp")
    for name in ("group_moments", "channel_moments"):
        kernel = getattr(table, name)
        monkeypatch.setattr(table, name, lambda *given, name=name, kernel=kernel: (taken.append(name), kernel(*given)))
    for look in (_layout.plain_reduction, lambda *arguments: None):
        monkeypatch.setattr(_layout, "plain_reduction", look)
        fastnorm.moments(x, 1, backend="cpp")
    assert taken == 2 * ["group_moments" if expected else "channel_moments"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "of_mean", "memory", "sizes"),
    [
        ((4, 8), (8,), None, (4, 8, 1)), ((4, 8), (1, 8), None, (4, 8, 1)), ((4, 8), (4, 1), None, (1, 4, 8)),
        ((3, 5, 7, 9), (5, 1, 1), None, (3, 5, 63)), ((3, 5, 7, 9), (1, 5, 1, 1), NHWC, (189, 5, 1)),
        ((3, 5, 7, 9), (9,), None, (105, 9, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_both_ways_of_normalize_give_equal_bits(shape, of_mean, memory, sizes, dtype, monkeypatch, backend):
    axis = next(axis for axis in range(-len(of_mean), 0) if of_mean[axis] != 1)
    x, _, gamma, beta = arrays(shape, dtype, axis, memory)
    mean, var = np.linspace(-1, 1, gamma.size).reshape(of_mean), np.linspace(0.1, 1, gamma.size).reshape(of_mean)
    for parameters in ((gamma, beta), (gamma.reshape(of_mean), None), (None, beta.reshape(of_mean))):
        assert _layout.plain_normalization(x, mean, var, *parameters) == sizes
        short = fastnorm.normalize(x, mean, var, *parameters, backend=backend)
        out = np.empty_like(x)
        assert fastnorm.normalize(x, mean, var, *parameters, out=out, backend=backend) is out
        with monkeypatch.context() as patch:
            patch.setattr(_layout, "plain_normalization", lambda *arguments: None)
            long = fastnorm.normalize(x, mean, var, *parameters, backend=backend)
        assert (short.dtype, short.shape, short.strides) == (long.dtype, long.shape, long.strides)
        assert short.tobytes() == long.tobytes() == out.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"x": np.ones((4, 8))[:, ::-1]}, {"x": np.ones((0, 8))}, {"x": np.ones((4, 8), int)}, {"x": np.ones(8)},
        {"mean": np.ones(8, np.float32)}, {"mean": np.ones(7)}, {"mean": np.ones((4, 8))}, {"mean": np.ones(1)},
        {"mean": np.ones((1, 1, 8))}, {"mean": np.ones(16)[::2]}, {"mean": None}, {"var": np.ones((1, 8))},
        {"var": 1.0}, {"gamma": np.ones(8, np.float32)}, {"gamma": np.ones(1)}, {"beta": np.ones((8, 1))},
    ],
    ids=str,
)  # fmt: skip
def test_other_normalizations_go_the_long_way(change):
    arguments = {"x": np.ones((4, 8)), "mean": np.ones(8), "var": np.ones(8), "gamma": None, "beta": None}
    assert _layout.plain_normalization(*arguments.values()) == (4, 8, 1)
    assert _layout.plain_normalization(*(arguments | change).values()) is None


@pytest.mark.parametrize("op", ["batchnorm", "layernorm"])
def test_an_out_takes_the_short_way_too(op, monkeypatch, backend):
    x, _, gamma, beta = arrays((33, 70), "float32", 1)
    forward = getattr(fastnorm, f"{op}_forward")
    out = np.empty_like(x)
    with monkeypatch.context() as patch:
        patch.setattr(_layout, "checked_out", None)  # the long way would call it
        assert forward(x, gamma, beta, {}, out=out, backend=backend)[0] is out
    assert out.tobytes() == forward(x, gamma, beta, {}, backend=backend)[0].tobytes()


def test_an_out_that_is_not_plain_and_apart_goes_the_long_way():
    memory = np.zeros(100, np.float32)
    x, out, gamma = memory[:32].reshape(4, 8), memory[32:64].reshape(4, 8), memory[64:72]
    running = memory[72:80]
    assert _layout.plain_out(out, x, gamma, None, {"running_mean": running, "mode": "train"})
    read_only = out.view()
    read_only.flags.writeable = False
    for other in (
        out[::-1], out.T.reshape(4, 8).T, out.reshape(8, 4), out.astype(np.float64), out.view(Named), read_only,
        memory[31:63].reshape(4, 8), memory[33:65].reshape(4, 8), x, None, [[0.0] * 8] * 4,
    ):  # fmt: skip
        assert not _layout.plain_out(other, x, gamma, None)
    assert not _layout.plain_out(out, x, gamma, {"running_mean": memory[60:68]})
    assert not _layout.plain_out(out, x, memory[::2])


def test_an_axis_that_is_not_there_goes_the_long_way():
    x, dout, gamma, beta = arrays((4, 8), "float32", 1)
    for axis in (2, -3, 0):
        assert not _layout.plain_backward(dout, x, gamma, beta, axis)
        assert _layout.plain_channels_backward(dout, x, gamma, beta, axis) is None


HOSTILE = (np.nan, np.inf, -0.0)


def vectors(dtype="float32", length=1000):
    """Running mean and variance, a batch's, and the parameters, of all magnitudes."""
    rng = np.random.default_rng(0)
    found = [rng.standard_normal(length) * 10.0 ** rng.integers(-30, 30, length) for _ in range(6)]
    for number, values in enumerate(found):
        values[3 * number : 3 * number + 3] = HOSTILE
    return [values.astype(dtype) for values in found[:2]], found[2:4], [values.astype(dtype) for values in found[4:]]


def bits(arrays):
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


@pytest.mark.parametrize("correction", [1.0, 4 / 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_ways_of_the_running_averages_give_equal_bits(dtype, correction, monkeypatch):
    running, batch, _ = vectors(dtype)
    arguments = running, *batch, 0.9, correction, np.dtype(np.float16)
    assert _arguments._running_averages(*running, *batch, 0.9, correction) is not None
    short = _arguments._averages(*arguments)
    monkeypatch.setattr(_arguments, "_running_averages", lambda *arguments: None)
    assert bits(short) == bits(_arguments._averages(*arguments))
    assert not any(np.shares_memory(new, old) for new, old in zip(short, running, strict=True))


NO_VECTORS = [
    np.zeros(8, np.float16), np.zeros(8, np.int64), np.zeros((1, 8)), np.zeros(16)[::2], np.zeros(7), [0.0] * 8,
    np.zeros(8, ">f8"), np.zeros(8).view(Named),
]  # fmt: skip


@pytest.mark.parametrize("other", [*NO_VECTORS, None])
def test_other_running_statistics_go_the_long_way(other):
    good = np.ones(8)
    assert _arguments._running_averages(good, good, good, good, 0.9, 1.0) is not None
    for place in range(4):
        found = [good] * 4
        found[place] = other
        assert _arguments._running_averages(*found, 0.9, 1.0) is None
    assert _arguments._plain_constants(good, good, 8) is not None
    assert _arguments._plain_constants(good, other, 8) is None
    assert _arguments._plain_constants(other, good, 8) is None


def test_statistics_of_a_batch_are_float64_for_the_short_way():
    single = np.ones(8, np.float32)
    assert _arguments._running_averages(single, single, np.ones(8), single, 0.9, 1.0) is None
    assert _arguments._running_averages(single, single, single, np.ones(8), 0.9, 1.0) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_ways_of_constants_give_equal_bits(dtype, monkeypatch):
    running, _, _ = vectors(dtype)
    options = _arguments.DEFAULTS._replace(frozen=True, running_mean=running[0], running_var=running[1])
    short = _arguments.constants(options)
    monkeypatch.setattr(_arguments, "_plain_constants", lambda *arguments: None)
    assert bits(short) == bits(_arguments.constants(options))
    assert not any(np.shares_memory(copy, of) for copy, of in zip(short, running, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_ways_of_gradients_give_equal_bits(dtype, monkeypatch):
    _, sums, parameters = vectors(dtype)
    sums[0][20] = 1e300
    short = _layout.gradients(*sums, *parameters)
    assert _layout.gradients(*sums, None, parameters[1])[0] is None
    assert _layout.gradients(*sums, parameters[0], None)[1] is None
    monkeypatch.setattr(_layout, "plain_gradients", lambda *arguments: None)
    assert bits(short) == bits(_layout.gradients(*sums, *parameters))


@pytest.mark.parametrize("other", NO_VECTORS)
def test_other_gradients_go_the_long_way(other):
    sums, good = np.ones(8), np.ones(8, np.float32)
    assert _layout.plain_gradients(sums, sums, good, None) is not None
    assert _layout.plain_gradients(sums, sums, other, None) is None
    assert _layout.plain_gradients(sums, sums, good, other) is None
    assert _layout.plain_gradients(other, sums, good, good) is None
    assert _layout.plain_gradients(None, sums, good, good) is None
    assert _layout.plain_gradients(good, sums, good, good) is None


RUNNING = np.linspace(1, 2, 8)


@pytest.mark.parametrize(
    "param",
    [
        {}, {"mode": "train"}, {"mode": "test"}, {"eps": 0.0}, {"eps": 1e300, "momentum": 1.0}, {"momentum": 0.0},
        {"running_mean": None}, {"running_var": RUNNING, "running_mean": RUNNING.astype(np.float32)},
        {"momentum": 0.5, "running_var": RUNNING, "mode": "test", "running_mean": RUNNING, "eps": 1e-3},
    ],
    ids=str,
)  # fmt: skip
def test_both_ways_of_options_give_the_same(param, monkeypatch):
    x = np.ones((4, 8), np.float32)
    assert _arguments._plain_options(param, 8, _arguments.DEFAULTS) is not None
    short = _arguments.running_options("bn_param", param, x, 8)
    assert type(short) is _arguments.BatchnormOptions
    monkeypatch.setattr(_arguments, "_plain_options", lambda *arguments: None)
    long = _arguments.running_options("bn_param", param, x, 8)
    for one, other in zip(short, long, strict=True):
        assert one is other or (one == other and type(one) is type(other) is float)


@pytest.mark.parametrize(
    "param",
    [
        {"mode": "eval"}, {"mode": None}, {"mode": "".join("test")}, {"eps": -1e-5}, {"eps": np.nan}, {"eps": np.inf},
        {"eps": 0}, {"eps": np.float32(0)}, {"momentum": 1.5}, {"momentum": None}, {"momentum": True}, {"Mode": "test"},
        {"convention": "cs231n"}, {"skip_nonfinite": False}, {1: 2}, None, [], (), type("Options", (dict,), {})(),
        *({"running_mean": other} for other in NO_VECTORS), *({"running_var": other} for other in NO_VECTORS),
    ],
    ids=str,
)  # fmt: skip
def test_other_options_go_the_long_way(param):
    assert _arguments._plain_options(param, 8, _arguments.DEFAULTS) is None


def test_words_that_are_not_those_of_source_code_are_read_too():
    mode, word = "".join(["mo", "de"]), "".join(["te", "st"])
    out, _ = fastnorm.batchnorm_forward(
        np.ones((4, 8)), None, None, {mode: word, "running_mean": RUNNING, "running_var": RUNNING}
    )
    np.testing.assert_allclose(out[0], (1 - RUNNING) / np.sqrt(RUNNING + 1e-5))
