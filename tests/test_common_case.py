"""The short way that plain arrays take gives what the long way gives, bit for bit, and lets nothing else pass."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ISAS

import fastnorm
from fastnorm import _layout
from fastnorm.ops import _arguments

pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ extension is not built")


class Named(np.ndarray):
    pass


def arrays(shape, dtype, axis):
    rng = np.random.default_rng(0)
    x, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    parameters = np.float64 if dtype == "float64" else np.float32
    return x, dout, rng.standard_normal(shape[axis]).astype(parameters), np.ones(shape[axis], parameters)


@pytest.fixture
def taken(monkeypatch):
    """Which answers `plain_backward` gave."""
    answers = []
    real = _layout.plain_backward

    def noting(*arguments):
        answers.append(real(*arguments))
        return answers[-1]

    monkeypatch.setattr(_layout, "plain_backward", noting)
    return answers


@pytest.mark.parametrize("given", ["both", "gamma", "beta", "none"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(4, 8), (33, 70), (3, 5, 7, 9)], ids=str)
@pytest.mark.parametrize("op", ["batchnorm", "batchnorm/test", "layernorm"])
def test_both_ways_of_a_backward_give_equal_bits(op, shape, dtype, given, taken, backend, monkeypatch):
    op, _, mode = op.partition("/")
    x, dout, gamma, beta = arrays(shape, dtype, 1 if op == "batchnorm" else -1)
    gamma, beta = gamma if given in ("both", "gamma") else None, beta if given in ("both", "beta") else None
    param = {}
    if mode:
        param = {"mode": mode, "running_mean": np.full(shape[1], 0.5), "running_var": np.full(shape[1], 2.0)}
    forward, backward = getattr(fastnorm, f"{op}_forward"), getattr(fastnorm, f"{op}_backward")
    _, cache = forward(x, gamma, beta, param, backend=backend)
    short = backward(dout, cache, backend=backend)
    out = np.empty_like(x)
    assert backward(dout, cache, out=out, backend=backend)[0] is out
    assert out.tobytes() == short[0].tobytes()
    assert taken == [True, True]
    monkeypatch.setattr(_layout, "plain_backward", lambda *arguments: False)
    long = backward(dout, cache, backend=backend)
    for found, expected in zip(short, long, strict=True):
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
    x, dout, gamma, beta = change(*plain)
    assert not _layout.plain_backward(dout, x, gamma, beta, 1)


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_ways_of_the_running_average_give_equal_bits(dtype, monkeypatch):
    rng = np.random.default_rng(0)
    running = (rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000)).astype(dtype)
    batch = rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000)
    running[:3], batch[3:6] = (np.nan, np.inf, -0.0), (np.nan, np.inf, -0.0)
    short = _arguments._updated(running, batch, 0.9, np.dtype(np.float32))
    monkeypatch.setattr(_arguments, "_running_average", lambda *arguments: None)
    long = _arguments._updated(running, batch, 0.9, np.dtype(np.float32))
    assert short.dtype == long.dtype == running.dtype
    assert short.tobytes() == long.tobytes()
    assert not np.shares_memory(short, running)


@pytest.mark.parametrize(
    "running",
    [
        np.zeros(8, np.float16), np.zeros(8, np.int64), np.zeros((1, 8)), np.zeros(16)[::2], np.zeros(7), [0.0] * 8,
        np.zeros(8, ">f8"), np.zeros(8).view(Named),
    ],
)  # fmt: skip
def test_other_running_statistics_go_the_long_way(running):
    assert _arguments._running_average(running, np.ones(8), 0.9) is None
