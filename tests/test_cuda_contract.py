"""The cuda backend's kernels in Numba's simulator on host memory: the results of the plain formulas, also on hostile
data, and nothing written beside an array. `test_cuda_simulated.py` starts this in a process with the simulator.

Plans are of small blocks (`simulator.small_blocks`), so that the shapes below take every way through the kernels.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import simulator
from kernel_truth import check, computed_in, kernel_inputs, plain_formulas

from fastnorm.bench.cases import DTYPES, dtype_of
from fastnorm.reference import kernels as reference

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("runs in the simulator, which test_cuda_simulated.py starts", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install '.[cuda]'")

from fastnorm.backends.numba_cuda import _launch, kernels

# Kernels make NaN of Inf without a word, NumPy's numbers in the simulator don't.
pytestmark = pytest.mark.filterwarnings("ignore:.*(invalid value|overflow):RuntimeWarning")
EPS = 1e-5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    simulator.small_blocks(monkeypatch)


class Memory:
    """Host memory as kernels get it. `shift` elements of its block come before it: no 16-byte boundary then."""

    device = 0
    stream = 0

    def __init__(self, values, shift=0):
        raw = np.full(values.nbytes + 64 + shift * values.itemsize, 0xA5, np.uint8)
        start = -raw.ctypes.data % 64 + shift * values.itemsize
        self.block, self.start, self.nbytes = raw, start, values.nbytes
        self.values = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        self.values[...] = values
        self.pointer, self.dtype, self.itemsize = self.values.ctypes.data, values.dtype, values.itemsize
        self.shape, self.size = values.shape, values.size

    def empty(self, shape, dtype):
        return Memory(np.full(shape, np.nan, dtype))

    def intact(self):
        """Whether nothing was written around it."""
        return (self.block[: self.start] == 0xA5).all() and (self.block[self.start + self.nbytes :] == 0xA5).all()


def _run(function, arguments, outputs, shift=0):
    """Calls a kernel; the arrays of `outputs` (name: shape and dtype, or an array that is written in place) after."""
    memory = {id(a): Memory(a, shift) for a in (*arguments, *outputs.values()) if isinstance(a, np.ndarray)}
    getattr(kernels, function)(*(memory[id(a)] if isinstance(a, np.ndarray) else a for a in arguments))
    assert all(found.intact() for found in memory.values()), f"{function} wrote outside of its arrays"
    return {name: memory[id(a)].values.ravel() for name, a in outputs.items()}


def _unset(count, dtype=np.float64):
    return np.full(count, 7.0, dtype)


def _of_channels(shape, x, dy, gamma, beta, shift=0):
    channels = shape[1]
    y, dx = np.zeros_like(x), np.zeros_like(x)
    mean, var, sum_dy, sum_dy_xhat = (_unset(channels) for _ in range(4))
    statistics, sums = {"mean": mean, "var": var}, {"sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}
    found = _run("channel_forward", (x, *shape, gamma, beta, EPS, y, mean, var), {"y": y, **statistics}, shift)
    mean, var = found["mean"].copy(), found["var"].copy()
    arguments = (dy, x, *shape, mean, var, EPS, gamma, dx, sum_dy, sum_dy_xhat)
    return found | _run("channel_backward", arguments, {"dx": dx, **sums}, shift)


def _of_channels_in_pieces(shape, x, dy, gamma, beta):
    outer, channels, inner = shape
    mean, var, sum_dy, sum_dy_xhat = (_unset(channels) for _ in range(4))
    found = _run("channel_moments", (x, *shape, mean, var), {"mean": mean, "var": var})
    mean, var = found["mean"].copy(), found["var"].copy()
    y, dx = np.zeros_like(x), np.zeros_like(x)
    found |= _run("channel_apply", (x, *shape, mean, var, EPS, gamma, beta, y), {"y": y})
    sums = {"sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}
    found |= _run("channel_backward_reduce", (dy, x, *shape, mean, var, EPS, sum_dy, sum_dy_xhat), sums)
    sums = found["sum_dy"].copy(), found["sum_dy_xhat"].copy()
    arguments = (dy, x, *shape, mean, var, EPS, gamma, *sums, float(outer * inner), dx)
    return found | _run("channel_backward_apply", arguments, {"dx": dx})


def _of_groups(shape, x, dy, gamma, beta, shift=0):
    samples, _, channels, _, groups = shape
    y, dx = np.zeros_like(x), np.zeros_like(x)
    mean, var, sum_dy, sum_dy_xhat = (_unset(n) for n in (samples * groups, samples * groups, channels, channels))
    outputs = {"y": y, "mean": mean, "var": var}
    found = _run("group_forward", (x, *shape, gamma, beta, EPS, y, mean, var), outputs, shift)
    mean, var = found["mean"].copy(), found["var"].copy()
    alone = {"mean": _unset(mean.size), "var": _unset(mean.size)}
    alone = _run("group_moments", (x, *shape, *alone.values()), alone, shift)
    assert all(np.array_equal(alone[name], found[name], equal_nan=True) for name in alone)
    arguments = (dy, x, *shape, mean, var, EPS, gamma, dx, sum_dy, sum_dy_xhat)
    return found | _run("group_backward", arguments, {"dx": dx, "sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}, shift)


def _of_rows(shape, x, dy, gamma, beta, shift=0, centred=True):
    y, dx = np.zeros_like(x), np.zeros_like(x)
    mean, var, dgamma, dbeta = (_unset(n) for n in (shape[0], shape[0], shape[1], shape[1]))
    outputs = {"y": y, "var": var} | ({"mean": mean} if centred else {})
    found = _run("row_forward", (x, *shape, gamma, beta, EPS, y, mean if centred else None, var), outputs, shift)
    mean, var = found["mean"].copy() if centred else None, found["var"].copy()
    arguments = (dy, x, *shape, mean, var, EPS, gamma, dx, dgamma, dbeta)
    return found | _run("row_backward", arguments, {"dx": dx, "sum_dy_xhat": dgamma, "sum_dy": dbeta}, shift)


def _inputs(family, shape, dtype):
    sizes = shape[:4]  # without the number of groups
    return kernel_inputs(math.prod(sizes), shape[2] if family == "groups" else shape[1], dtype)


def _apart(family, shape):
    """The shape with an axis for all that is told apart, that of gamma, the axes of statistics and of gradients."""
    if family == "channels":
        return shape, (1, shape[1], 1), (0, 2), (0, 2)
    if family == "rows":
        return shape, (1, shape[1]), 1, 0
    samples, outer, channels, inner, groups = shape
    return (samples, outer, groups, channels // groups, inner), (1, 1, groups, -1, 1), (1, 3, 4), (0, 1, 4)


FAMILIES = {"channels": _of_channels, "groups": _of_groups, "rows": _of_rows}


def _checked(family, shape, dtype, given=None, centred=True, **options):
    x, dy, gamma, beta = given or _inputs(family, shape, dtype)
    options |= {} if centred else {"centred": False}
    found = FAMILIES[family](shape, x, dy, gamma, beta, **options)
    apart, of_parameters, axes, parameter_axes = _apart(family, shape)
    channels = shape[2] if family == "groups" else shape[1]
    gamma, beta = (np.full(channels, absent) if a is None else a for a, absent in ((gamma, 1.0), (beta, 0.0)))
    expected = plain_formulas(
        x.reshape(apart), dy.reshape(apart), gamma.reshape(of_parameters), beta.reshape(of_parameters), axes,
        parameter_axes, EPS, computed_in(dtype), centred,
    )  # fmt: skip
    check(found, expected, dtype_of(dtype), computed_in(dtype), x.size)
    return found


SHAPES = [
    ("channels", (3, 2, 100)), ("channels", (20, 8, 1)), ("rows", (3, 64)), ("rows", (2, 136)), ("rows", (2, 640)),
    ("groups", (2, 1, 4, 10, 2)), ("groups", (2, 10, 6, 1, 3)),
]  # fmt: skip
"""Runs, columns, a row in a warp, in one block and in several, groups of runs and of columns."""
MORE = [
    *SHAPES,
    ("channels", (2, 3, 67)),  # single elements
    ("channels", (8, 2, 72)),  # runs, fewer in the last chunk
    ("channels", (1, 2, 700)),  # pieces of a run
    ("channels", (70, 1, 1)),  # one channel, one run
    ("channels", (33, 5, 1)),  # columns of single elements, and threads that have none
    ("channels", (9, 4, 7)),  # columns that are parts of a run
    ("channels", (130, 3, 1)),  # several chunks of columns
    ("channels", (20, 200, 1)),  # several blocks side by side
    ("rows", (9, 5)), ("rows", (2, 127)),  # single elements, one vector of a thread and several
    ("rows", (130, 8)), ("rows", (9, 136)),  # several rows for each team of a block
    ("rows", (3, 512)),  # the backward reads its row twice
    ("groups", (2, 1, 4, 64, 2)), ("groups", (3, 1, 2, 3, 2)), ("groups", (2, 9, 4, 1, 2)),
]  # fmt: skip
named = {"argnames": ("family", "shape"), "ids": lambda value: str(value).replace(" ", "")}
shapes = pytest.mark.parametrize(argvalues=SHAPES, **named)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(argvalues=MORE, **named)
def test_results(family, shape, dtype):
    _checked(family, shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [shape for family, shape in MORE if family == "rows"], ids=str)
def test_rows_that_are_not_centred(shape, dtype):
    _checked("rows", shape, dtype, centred=False)


@pytest.mark.parametrize("shape", [(3, 20, 64), (40, 200, 1)], ids=str)
def test_pieces_have_the_bits_of_the_fused_calls(shape):
    inputs = _inputs("channels", shape, "float32")
    fused, split = _of_channels(shape, *inputs), _of_channels_in_pieces(shape, *inputs)
    for name, values in fused.items():
        np.testing.assert_array_equal(split[name], values)


@pytest.mark.parametrize(("shape", "slab"), [((3, 20, 64), 8), ((40, 200, 1), 128)], ids=str)  # 128: a block's columns
def test_bits_do_not_depend_on_how_many_channels_fit_the_cache(shape, slab, monkeypatch):
    of_channel = 4 * shape[0] * shape[2]
    inputs = _inputs("channels", shape, "float32")
    whole = _of_channels(shape, *inputs)
    for arrays in (1, 2):  # so many of a slab's fit half of the cache
        size = 2 * arrays * slab * of_channel
        monkeypatch.setattr(_launch, "level2", lambda device, size=size: size)
        in_slabs = _of_channels(shape, *inputs)
        for name, values in whole.items():
            np.testing.assert_array_equal(in_slabs[name], values)


@pytest.mark.parametrize(
    ("n", "first", "dtype", "shift"), [(131, 0, "float32", 0), (131, 6, "bfloat16", 0), (70, 4, "float64", 1)]
)
def test_dropout_has_the_bits_of_the_reference(n, first, dtype, shift):
    x, _, _, _ = kernel_inputs(n, 1, dtype)
    y, expected = np.zeros_like(x), np.zeros_like(x)
    seed = 0xFEDCBA9876543210
    tied = int(reference.words(first, n, seed)[n // 2])  # its lower half decides for this element
    for threshold in (0xE0000000, tied, tied + 1):
        arguments = (x, n, first, seed, threshold, 2.0)
        reference.dropout(*arguments, expected)
        assert _run("dropout", (*arguments, y), {"y": y}, shift)["y"].tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "shift"), [("float32", 1), ("bfloat16", 2)])
@shapes
def test_off_the_boundaries_of_vectors(family, shape, dtype, shift):
    _checked(family, shape, dtype, shift=shift)


@shapes
def test_far_from_zero(family, shape):
    """The error does not grow with mean over spread."""
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    _checked(family, shape, "float32", ((x + np.float32(1e6)).astype(np.float32), dy, gamma, beta))


@shapes
def test_a_first_element_far_off_does_not_spoil_the_others(family, shape):
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    x[0] = 1e6
    _checked(family, shape, "float32", (x, dy, gamma, beta))


@shapes
def test_without_parameters(family, shape):
    x, dy, _, _ = _inputs(family, shape, "float32")
    _checked(family, shape, "float32", (x, dy, None, None))


@shapes
def test_a_constant_gives_exactly_beta(family, shape):
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    x[:] = -1e6 / 3
    found = FAMILIES[family](shape, x, dy, gamma, beta)
    assert (found["var"] == 0).all()
    assert (found["mean"] == np.float64(x[0])).all()
    apart, of_parameters, _, _ = _apart(family, shape)
    np.testing.assert_array_equal(found["y"], np.broadcast_to(beta.reshape(of_parameters), apart).ravel())


@shapes
def test_inf_and_nan_stay_in_their_channel_row_or_group(family, shape):
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    clean = FAMILIES[family](shape, x, dy, gamma, beta)
    x[-1] = np.inf
    found = FAMILIES[family](shape, x, dy, gamma, beta)
    apart = _apart(family, shape)[0]
    mine = (-1,) if family == "rows" else (slice(None), -1) if family == "channels" else (-1, slice(None), -1)
    for key in ("y", "dx"):
        with_poison, without = found[key].reshape(apart).copy(), clean[key].reshape(apart).copy()
        assert np.isnan(with_poison[mine]).any()
        with_poison[mine] = without[mine] = 0
        if key == "y" or family != "rows":
            np.testing.assert_array_equal(with_poison, without)


@shapes
def test_in_place(family, shape):
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    apart = FAMILIES[family](shape, x, dy, gamma, beta)
    one = family.removesuffix("s")
    mean, var = apart["mean"].copy(), apart["var"].copy()
    sums = (_unset(gamma.size), _unset(gamma.size))
    for written in (dy, x):
        arguments = (dy, x, *shape, mean, var, EPS, gamma, written, *sums)
        np.testing.assert_array_equal(_run(f"{one}_backward", arguments, {"dx": written})["dx"], apart["dx"])
    arguments = (x, *shape, gamma, beta, EPS, x, mean, var)
    np.testing.assert_array_equal(_run(f"{one}_forward", arguments, {"y": x})["y"], apart["y"])
