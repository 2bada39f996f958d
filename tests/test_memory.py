"""What a call allocates; arrays beyond 2^31 elements."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from cases import OPS, case, rearranged
from conftest import REASONS
from processes import run

import fastnorm
from fastnorm.bench.tolerances import tolerance

ops = pytest.mark.parametrize("op", OPS)
SHAPES = {"channel": (2048, 1024), "group": (32, 64, 32, 32), "row": (2048, 1024)}
ROOM = 0.3
"""Of x's size, for what is per channel, row and chunk: a thirtieth here; NumPy's blocks are some megabytes."""


def _arrays(call, unit):
    """(result, arrays it holds, arrays at the peak) of a call, as multiples of `unit` bytes."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        result = call()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, (held - before) / unit, (peak - before) / unit


@pytest.mark.parametrize("layout", ["C", "F"])
@ops
def test_fused_allocates_the_result_and_nothing_else_of_its_size(op, layout, backend):
    if OPS[op].family != "channel" and layout == "F":
        pytest.skip("rows and samples that are not runs of memory are packed, which takes a copy")
    samples, *rest = SHAPES[OPS[op].family]
    this = case(op, (4 * samples, *rest))
    x, gamma, beta, dout = rearranged(this.inputs(), layout, layout)
    arguments = this.arguments(x, gamma, beta)

    def forward(out=None):
        return this.op.forward(*arguments, {}, axis=1, out=out, backend=backend)

    forward()  # what is loaded or compiled once does not count
    this.op.backward(dout, forward()[1], backend=backend)
    (y, cache), held, peak = _arrays(forward, x.nbytes)
    assert 1 <= held <= peak < 1 + ROOM
    _, held, peak = _arrays(lambda: forward(y), x.nbytes)
    assert peak < ROOM
    _, held, peak = _arrays(lambda: this.op.backward(dout, cache, backend=backend), x.nbytes)
    assert 1 <= held <= peak < 1 + ROOM
    _, held, peak = _arrays(lambda: this.op.backward(dout, cache, out=y, backend=backend), x.nbytes)
    assert peak < ROOM


@ops
def test_the_cache_refers_to_x_and_keeps_no_copy(op, backend):
    this = case(op, SHAPES[OPS[op].family])
    x, gamma, beta, _ = this.inputs()
    out = np.empty_like(x)
    arguments = this.arguments(x, gamma, beta)
    cache, held, _ = _arrays(lambda: this.op.forward(*arguments, axis=1, out=out, backend=backend)[1], x.nbytes)
    assert held < 0.05
    arrays = [value for value in cache if isinstance(value, np.ndarray)]
    assert any(value is x for value in arrays)
    assert all(value is x or value.size <= 2048 for value in arrays)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@ops
def test_the_arrays_of_the_staged_graph(op, dtype):
    """As its docstring says: five of x's size in the forward, four kept; six in the backward, three at a time.

    Without centring one less, but for halves, where x itself becomes float32.
    """
    this = case(op, SHAPES[OPS[op].family], dtype=dtype)
    x, gamma, beta, dout = this.inputs()
    forward, backward = this.op.forward_staged, this.op.backward_staged
    width = 2 if dtype == "float16" else 1  # float16 computes in float32
    (y, cache), held, peak = _arrays(lambda: forward(*this.arguments(x, gamma, beta), axis=1), x.nbytes)
    fewer = 0 if this.op.centred else 1
    assert held == pytest.approx(4 * width + 1 - fewer * (width == 1), abs=0.1)
    assert peak == pytest.approx(5 - fewer if width == 1 else (6 - fewer) * width + 1, abs=0.1)
    kept = {id(value) for value in cache if isinstance(value, np.ndarray) and value.size == x.size}
    assert len(kept) == 4
    del y
    _, held, peak = _arrays(lambda: backward(dout, cache), x.nbytes)
    assert held == pytest.approx(1, abs=0.1)
    assert peak == pytest.approx(3 if width == 1 else 4 * width + 1 - fewer, abs=0.1)


PEAK = """
import re, sys
import numpy as np, fastnorm
op, backend, axes = sys.argv[1:]
fastnorm.set_num_threads(2)
forward, backward = getattr(fastnorm, op + "_forward"), getattr(fastnorm, op + "_backward")

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def measured(call):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    result = call()
    return result, (status("VmHWM") - before) / x.nbytes

def arrays(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    return (x.transpose(eval(axes)) for x in (x, x + 1, np.ones_like(x), np.ones_like(x)))

def once(x, dout, y, dx):
    (_, cache), first = measured(lambda: forward(x, None, None, axis=1, out=y, backend=backend))
    _, second = measured(lambda: backward(dout, cache, out=dx, backend=backend))
    return first, second

small = (300, 64) if len(eval(axes)) == 2 else (2, 8, 30, 30)
large = (16384, 1024) if len(eval(axes)) == 2 else (16, 32, 32, 1024)
x, *rest = arrays(small)
once(x, *rest)
x, *rest = arrays(large)
print(*once(x, *rest))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", REASONS)
@pytest.mark.parametrize(
    ("op", "axes"),
    [
        ("batchnorm", "(0, 1)"), ("batchnorm", "(1, 0)"), ("batchnorm", "(0, 3, 1, 2)"), ("layernorm", "(0, 1)"),
        ("instancenorm", "(0, 1, 2, 3)"), ("instancenorm", "(0, 3, 1, 2)"),
    ],
)  # fmt: skip
def test_kernels_allocate_nothing_of_the_arrays_size(op, axes, name):
    """The memory of the process with out given, which counts what tracemalloc cannot see."""
    if REASONS[name]:
        pytest.skip(f"{name}: {REASONS[name]}")
    forward, backward = map(float, run(PEAK, op, name, axes).split())
    assert max(forward, backward) < ROOM


def _chunked_moments(column):
    """Mean and variance in float64 without a float64 copy of the whole."""
    chunks = np.array_split(column.reshape(-1), max(1, column.size >> 24))
    sums = np.array([(chunk.astype(np.float64).sum(), (chunk.astype(np.float64) ** 2).sum()) for chunk in chunks])
    mean, square = sums.sum(axis=0) / column.size
    return mean, square - mean * mean  # the data have mean 0, so that little cancels


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**21 + 3, 1024), (1027, 2**21), (129, 129, 129_100), (2**31 + 5, 1)], ids=str)
@pytest.mark.parametrize("op", ["batchnorm", "layernorm"])
def test_more_than_two_to_the_31_elements(op, shape, backend):
    """4 GB in and 4 GB out of float16, where an index of 32 bits would wrap. Checked at sampled places."""
    if op == "layernorm" and shape[1] == 1:
        shape = (5, 430_000_001)
    x = np.empty(shape, np.float16)
    assert x.size > 2**31
    tile = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float16)
    for start in range(0, x.size, tile.size):
        x.reshape(-1)[start : start + tile.size] = tile[: x.size - start]
    forward, backward = getattr(fastnorm, f"{op}_forward"), getattr(fastnorm, f"{op}_backward")
    kept = (1,) if op == "batchnorm" else (0,)
    sampled = np.random.default_rng(1).integers(0, x.size, 1000)
    at = np.unravel_index([*sampled, 0, 2**31 - 1, 2**31, 2**31 + 1, x.size - 1], shape)

    y, cache = forward(x, None, None, axis=1, backend=backend)
    last = tuple(-1 if axis in kept else slice(None) for axis in range(x.ndim))
    mean, var = _chunked_moments(x[last])
    assert cache.mean[-1] == pytest.approx(mean, abs=1e-6)
    assert cache.var[-1] == pytest.approx(var, rel=1e-5)
    mean, var = cache.mean[at[kept[0]]], cache.var[at[kept[0]]]
    rstd = 1 / np.sqrt(var + 1e-5)
    xhat = (x[at].astype(np.float64) - mean) * rstd
    terms = x.size // cache.mean.size
    allowed = tolerance(xhat, abs(xhat) + 1, np.float16, np.float32, terms)
    assert (abs(y[at].astype(np.float64) - xhat) <= allowed).all()
    if op == "batchnorm":  # a pass that only writes
        before = y[at].copy()
        y[...] = 0
        ends = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        fastnorm.normalize(x, cache.mean.reshape(ends), cache.var.reshape(ends), out=y, backend=backend)
        np.testing.assert_array_equal(y[at], before)

    dx, _, _ = backward(x, cache, out=y, backend=backend)
    here = x[at].astype(np.float64)
    expected = rstd * (here - mean - xhat * var * rstd)
    # The mean of |x| is at most 1, as that of x^2 is, and that of |x| (|xhat| + 1) at most 2.
    allowed = tolerance(expected, rstd * (abs(here) + 1 + 2 * (abs(xhat) + 1)), np.float16, np.float32, terms)
    assert (abs(dx[at].astype(np.float64) - expected) <= allowed).all()
