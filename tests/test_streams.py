"""Moments with weights, moments of streams, and memory-mapped arrays."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cases import ARRANGEMENTS, OPS, case, check_moments, check_weighted

import fastnorm
from fastnorm import Moments
from fastnorm.bench.cases import DTYPES, dtype_of

ROOT = Path(__file__).parent.parent
AXES = [None, 0, 1, -1, (0, 1), (0, 2), (1, 2), (0, 1, 2), ()]


@pytest.fixture
def host(backend):
    """The backends that weigh: those in host memory."""
    if backend == "cuda":
        pytest.skip("moments with weights are computed in host memory")
    return backend


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("shape", [(), (6,), (5, 1), (1, 6), (4, 5, 6), (4, 1, 1)], ids=str)
def test_weights_that_broadcast(shape, axis, host, rng):
    x, weights = rng.standard_normal((4, 5, 6)), rng.random(shape) + 0.1
    axes = tuple(range(3)) if axis is None else axis
    for keepdims in (False, True):
        found = fastnorm.moments(x, axis, weights=weights, keepdims=keepdims, backend=host)
        assert {got.shape for got in found} == {x.sum(axis=axes, keepdims=keepdims).shape}
        check_weighted(found, x, weights, axes)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_one_are_no_weights(dtype, arrangement, host, rng):
    x = ARRANGEMENTS[arrangement]((3 + 2 * rng.standard_normal((4, 5, 6))).astype(dtype_of(dtype)))
    for ones in (np.ones(6, np.int64), np.ones((4, 5, 6), np.float16)):
        found, plain = (fastnorm.moments(x, (0, 2), weights=weights, backend=host) for weights in (ones, None))
        np.testing.assert_array_equal(found.count, plain.count)
        np.testing.assert_allclose(found.mean, plain.mean, rtol=1e-6)
        np.testing.assert_allclose(found.var, plain.var, rtol=1e-5, atol=1e-12)


# Columns (few, and in several blocks), runs short and long, rows, everything; several chunks and groups of each.
WEIGHTED = [
    ((700, 300), 0), ((5001, 3), 0), ((65, 2100), 0), ((8200, 17), 0), ((700, 300), 1), ((3, 9001), 1),
    ((70, 301), None), ((20, 33, 7, 7), (0, 2, 3)), ((3, 5, 90, 101), (0, 2, 3)), ((3, 4, 5, 6), (1, 3)), ((6, 1), 0),
    ((1, 6), 0),
]  # fmt: skip


def _kinds_of_weights(shape, axes, rng):
    """One an element, one a position; a mask with what it leaves out at the front, and of whole channels."""
    positions = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    mask = np.arange(math.prod(shape)).reshape(shape) % 7 > 2
    mask[: shape[0] // 3] = False
    return rng.random(shape) + 0.1, rng.random(positions) + 0.1, mask, np.resize([False, True], positions)


@pytest.mark.parametrize("far", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), WEIGHTED, ids=str)
def test_weighted_moments_are_as_accurate_as_plain_ones(shape, axis, dtype, far, host, rng):
    axes = tuple(range(len(shape))) if axis is None else tuple(np.atleast_1d(axis).astype(int))
    x = (far + rng.standard_normal(shape)).astype(dtype_of(dtype))
    x[(0,) * len(shape)] += 100  # a first value far from the rest
    for weights in _kinds_of_weights(shape, axes, rng):
        left_out = np.where(np.broadcast_to(weights, shape) == 0, np.nan, x).astype(x.dtype)
        check_weighted(fastnorm.moments(left_out, axis, weights=weights, backend=host), x, weights, axes)


@pytest.mark.parametrize("shape", [(6000, 4, 2), (6000, 4, 3), (64, 33, 4, 3), (1500, 4, 9), (300, 4, 70)], ids=str)
def test_equal_weights_of_short_runs(shape, host, rng):
    """Equal terms round all to one side: a sum must not have as many of them as there are runs."""
    x = (3 + rng.standard_normal(shape)).astype(np.float32)
    axes = tuple(axis for axis in range(len(shape)) if axis != len(shape) - 2)
    for weight in rng.random(20) + 0.1:
        check_weighted(fastnorm.moments(x, axes, weights=np.float32(weight), backend=host), x, np.float32(weight), axes)


@pytest.mark.parametrize(("shape", "axis"), WEIGHTED, ids=str)
def test_weighted_moments_have_the_same_bits_for_any_number_of_threads(shape, axis, host, rng):
    axes = tuple(range(len(shape))) if axis is None else tuple(np.atleast_1d(axis).astype(int))
    large = tuple(n * 11 if axis == 0 and n > 1 else n for axis, n in enumerate(shape))
    x = rng.standard_normal(large).astype(np.float32)
    for weights in _kinds_of_weights(large, axes, rng):
        bits = set()
        for threads in (1, 2, 3, 7):
            fastnorm.set_num_threads(threads)
            bits.add(b"".join(v.tobytes() for v in fastnorm.moments(x, axis, weights=weights, backend=host)))
        assert len(bits) == 1


@pytest.mark.parametrize(("shape", "axis"), WEIGHTED, ids=str)
@pytest.mark.parametrize("value", [0.1, -3e4])
def test_weighted_constants_are_exact(value, shape, axis, host, rng):
    axes = tuple(range(len(shape))) if axis is None else tuple(np.atleast_1d(axis).astype(int))
    x = np.full(shape, value, np.float32)
    for weights in _kinds_of_weights(shape, axes, rng):
        found = fastnorm.moments(x, axis, weights=weights, backend=host)
        np.testing.assert_array_equal(found.mean, np.where(found.count > 0, float(x.flat[0]), 0.0))
        np.testing.assert_array_equal(found.var, np.zeros(found.mean.shape))


@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_any_size(dtype, scale, host, rng):
    """Those that float32 cannot hold, or could not multiply, are computed in float64."""
    x, weights = rng.standard_normal((200, 3)).astype(dtype), scale * (rng.random((200, 1)) + 0.1)
    found = fastnorm.moments(x, 0, weights=weights, backend=host)
    expected = fastnorm.moments(x, 0, weights=weights / scale, backend=host)
    np.testing.assert_allclose(found.count, expected.count * scale, rtol=1e-6)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(found.var, expected.var, rtol=1e-5)


def test_weight_zero_leaves_out(host, rng):
    x, mask = rng.standard_normal((50, 3)), rng.random((50, 3)) < 0.7
    mask[:, 2] = False
    found = fastnorm.moments(np.where(mask, x, np.nan), 0, weights=mask, backend=host)
    for channel in range(2):
        kept = x[mask[:, channel], channel]
        assert found.count[channel] == kept.size
        np.testing.assert_allclose((found.mean[channel], found.var[channel]), (kept.mean(), kept.var()), rtol=1e-12)
    assert (found.count[2], found.mean[2], found.var[2]) == (0, 0, 0)


def test_weighted_nan_stays_in_its_channel(host, rng):
    x = rng.standard_normal((50, 3))
    x[7, 1] = np.nan
    found = fastnorm.moments(x, 0, weights=np.ones(3), backend=host)
    np.testing.assert_array_equal(np.isnan(found.mean), [False, True, False])
    np.testing.assert_array_equal(np.isnan(found.var), [False, True, False])


def test_weighted_moments_merge(host, rng):
    x, weights = 1e4 + rng.standard_normal((60, 4)), rng.random((60, 4))
    weights[:20, 1], weights[20:, 2], weights[:, 3] = 0, 0, 0
    whole = fastnorm.moments(x, 0, weights=weights, backend=host)
    first = fastnorm.moments(x[:20], 0, weights=weights[:20], backend=host)
    merged = first.update(x[20:], 0, weights=weights[20:], backend=host)
    for got, expected in zip(merged, whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("weights", "error", "named"),
    [
        (np.ones(4), ValueError, r"weights.*\(\d, 3\).*\(4,\)"),
        (np.ones((1, 5, 3)), ValueError, "weights"),
        (-np.ones(3), ValueError, "weights.*at least 0"),
        (np.array([1, np.nan, 1]), ValueError, "weights.*finite"),
        (np.array([1, np.inf, 1]), ValueError, "weights.*finite"),
        (np.ones(3, complex), TypeError, "weights"),
        ("ones", TypeError, "weights"),
    ],
)
def test_bad_weights(weights, error, named, host):
    for shape, axis in ((5, 3), 0), ((5, 3), 1), ((0, 3), 0):
        with pytest.raises(error, match=named):
            fastnorm.moments(np.ones(shape, np.float32), axis, weights=weights, backend=host)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "axis"), WEIGHTED, ids=str)
def test_one_bad_weight_anywhere_is_found(shape, axis, bad, host):
    axes = tuple(range(len(shape))) if axis is None else tuple(np.atleast_1d(axis).astype(int))
    x = np.ones(shape, np.float32)
    for of_weights in (shape, [n if axis in axes else 1 for axis, n in enumerate(shape)]):
        for place in (0, -1):
            weights = np.ones(of_weights, np.float32)
            weights.flat[place] = bad
            with pytest.raises(ValueError, match="weights: expected finite numbers of at least 0"):
                fastnorm.moments(x, axis, weights=weights, backend=host)


def test_empty_with_weights(host):
    found = fastnorm.moments(np.zeros((0, 3)), 0, weights=np.ones(3), backend=host)
    for values in found:
        np.testing.assert_array_equal(values, np.zeros(3))


# ---- streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[40], [1, 39], [7, 0, 20, 13], [1] * 40], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_stream_of_batches(dtype, sizes, backend, rng):
    x = (3 + np.arange(40)[:, None, None] + rng.standard_normal((40, 5, 3))).astype(dtype)
    batches = np.split(x, np.cumsum(sizes)[:-1])
    seen = []
    found = fastnorm.stream_moments(
        iter(batches), (0, 2), progress=lambda done, total: seen.append((done, total)), backend=backend
    )
    check_moments(found, x, (0, 2))
    assert seen == [(int(done) * 15, None) for done in np.cumsum(sizes)]
    again = fastnorm.stream_moments(batches, (0, 2), backend=backend)
    np.testing.assert_array_equal(again.var, found.var)
    updated = Moments(0, np.zeros(5), np.zeros(5))
    for batch in batches:
        updated = updated.update(batch, (0, 2), backend=backend)
    np.testing.assert_array_equal(updated.mean, found.mean)


@pytest.mark.parametrize("axis", [0, 1, (0, 2), None, ()], ids=str)
def test_one_array_is_read_in_slabs(axis, rng, monkeypatch):
    monkeypatch.setattr("fastnorm.ops.statistics.STREAMED", 100)
    x, seen = 1e6 + rng.standard_normal((30, 7, 4)), []
    found = fastnorm.stream_moments(x, axis, progress=lambda done, total: seen.append((done, total)))
    check_moments(found, x, tuple(range(3)) if axis is None else tuple(np.atleast_1d(axis).astype(int)))
    assert seen[-1] == (x.size, x.size)
    assert len(seen) > 5 or axis == ()


def test_bad_streams():
    for batches, error, named in (
        ([], ValueError, "batches.*none"),
        (3, TypeError, "batches"),
        ([np.ones((2, 3)), np.ones((2, 4))], ValueError, r"batches\[1\].*\(3,\).*\(4,\)"),
        ([np.ones((2, 3)), None], TypeError, r"batches\[1\]"),
    ):
        with pytest.raises(error, match=named):
            fastnorm.stream_moments(batches)


def _mapped(path, shape, values=None):
    array = np.memmap(path, np.float32, "w+", shape=shape)
    if values is not None:
        array[:] = values
    return array


def test_memory_mapped_in_and_out(tmp_path, backend, rng):
    """The running statistics of a file, applied into another: the same as in memory, and no copy of their size."""
    shape = (4000, 256)
    x = _mapped(tmp_path / "x", shape, 3 + 2 * rng.standard_normal(shape))
    out, dx = _mapped(tmp_path / "out", shape), _mapped(tmp_path / "dx", shape)
    found = fastnorm.stream_moments(x, backend=backend)
    param = {"mode": "test", "running_mean": found.mean, "running_var": found.var}
    expected, _ = fastnorm.batchnorm_forward(np.array(x), None, None, param, backend=backend)
    _, cache = fastnorm.batchnorm_forward(x[:8], None, None, param, out=out[:8], backend=backend)
    fastnorm.batchnorm_backward(out[:8], cache, out=dx[:8], backend=backend)  # now all is compiled that must be
    tracemalloc.start()
    fastnorm.stream_moments(x, backend=backend)
    _, cache = fastnorm.batchnorm_forward(x, None, None, param, out=out, backend=backend)
    fastnorm.batchnorm_backward(out, cache, out=dx, backend=backend)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (2 if backend == "numpy" else 0.5) * x.nbytes  # the reference works on blocks of several megabytes
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.float32).reshape(shape), expected)
    assert abs(float(out.std()) - 1) < 1e-3


@pytest.mark.parametrize("op", OPS)
def test_a_memory_mapped_out_comes_back_itself(op, tmp_path, backend):
    """With its type, so that it can be flushed; also where the kernel had to work in other memory."""
    this = case(op, (6, 8, 5))
    inputs = this.inputs()
    expected, theirs = this.op.forward(*this.arguments(*inputs[:3]), axis=1, backend=backend)
    expected_dx, *_ = this.op.backward(inputs.dout, theirs, backend=backend)
    for step in (1, 2):
        y, dx = (_mapped(tmp_path / f"{name}{step}", (6, 8, 5 * step))[..., ::step] for name in ("y", "dx"))
        found, cache = this.op.forward(*this.arguments(*inputs[:3]), axis=1, out=y, backend=backend)
        found_dx, *_ = this.op.backward(inputs.dout, cache, out=dx, backend=backend)
        assert found is y
        assert found_dx is dx
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(dx, expected_dx)


def test_a_memory_mapped_out_of_the_others(tmp_path, backend, rng):
    shape = (6, 5)
    x = rng.standard_normal(shape).astype(np.float32)
    outs = [_mapped(tmp_path / f"{number}", shape) for number in range(4)]
    assert fastnorm.normalize(x, np.zeros(5), np.ones(5), out=outs[0], backend=backend) is outs[0]
    dropped, cache = fastnorm.dropout_forward(x, {"p": 0.5, "seed": 1}, out=outs[1], backend=backend)
    assert dropped is outs[1]
    assert fastnorm.dropout_backward(x, cache, out=outs[2], backend=backend) is outs[2]
    np.testing.assert_array_equal(outs[2], outs[1])
    chunks = np.split(outs[3], [2])
    found, _ = fastnorm.batchnorm_forward(np.split(x, [2]), None, None, out=chunks, backend=backend)
    assert all(one is other for one, other in zip(found, chunks, strict=True))
    assert all(isinstance(one, np.memmap) for one in found)
    with pytest.raises(ValueError, match=r"^out: expected shape"):
        fastnorm.normalize(x, np.zeros(5), np.ones(5), out=outs[0][:3], backend=backend)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the example limits its memory as Linux does")
def test_the_example_stays_within_its_memory():
    command = [sys.executable, str(ROOT / "examples/larger_than_memory.py"), "--megabytes", "96", "--memory", "48"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "mean 0.000, spread 1.000" in result.stdout
    assert "does not fit" in result.stdout
