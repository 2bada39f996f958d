"""The cuda backend's kernels on hostile data, in Numba's simulator on host memory; nothing is written beside an array.

The simulator has to be chosen before Numba is imported (NUMBA_ENABLE_CUDASIM=1). Where it was not, one test runs this
file again with it. A simulated thread is a Python thread: blocks and arrays are small.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simulator
from kernel_truth import check, computed_in, kernel_inputs, plain_formulas
from processes import PACKAGE

from fastnorm.bench.cases import dtype_of

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)
if SIMULATED:
    from fastnorm.backends.numba_cuda import kernels

# Kernels make NaN of Inf without a word, NumPy's numbers in the simulator don't.
pytestmark = pytest.mark.filterwarnings("ignore:.*(invalid value|overflow):RuntimeWarning")
simulated = pytest.mark.skipif(not SIMULATED, reason="runs in the simulator, which test_in_the_simulator starts")
EPS = 1e-5


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
def test_in_the_simulator():
    """The rest of this file, where Numba was imported without the simulator."""
    here = Path(__file__)
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTEST_ADDOPTS": ""}
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here)],
        env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if SIMULATED:
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


def _of_groups(shape, x, dy, gamma, beta, shift=0):
    samples, _, channels, _, groups = shape
    y, dx = np.zeros_like(x), np.zeros_like(x)
    mean, var, sum_dy, sum_dy_xhat = (_unset(n) for n in (samples * groups, samples * groups, channels, channels))
    outputs = {"y": y, "mean": mean, "var": var}
    found = _run("group_forward", (x, *shape, gamma, beta, EPS, y, mean, var), outputs, shift)
    mean, var = found["mean"].copy(), found["var"].copy()
    arguments = (dy, x, *shape, mean, var, EPS, gamma, dx, sum_dy, sum_dy_xhat)
    return found | _run("group_backward", arguments, {"dx": dx, "sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}, shift)


def _of_rows(shape, x, dy, gamma, beta, shift=0):
    y, dx = np.zeros_like(x), np.zeros_like(x)
    mean, var, dgamma, dbeta = (_unset(n) for n in (shape[0], shape[0], shape[1], shape[1]))
    arguments = (x, *shape, gamma, beta, EPS, y, mean, var)
    found = _run("row_forward", arguments, {"y": y, "mean": mean, "var": var}, shift)
    mean, var = found["mean"].copy(), found["var"].copy()
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


def _checked(family, shape, dtype, given=None, **options):
    x, dy, gamma, beta = given or _inputs(family, shape, dtype)
    found = FAMILIES[family](shape, x, dy, gamma, beta, **options)
    apart, of_parameters, axes, parameter_axes = _apart(family, shape)
    channels = shape[2] if family == "groups" else shape[1]
    gamma, beta = (np.full(channels, absent) if a is None else a for a, absent in ((gamma, 1.0), (beta, 0.0)))
    expected = plain_formulas(
        x.reshape(apart), dy.reshape(apart), gamma.reshape(of_parameters), beta.reshape(of_parameters), axes,
        parameter_axes, EPS, computed_in(dtype),
    )  # fmt: skip
    check(found, expected, dtype_of(dtype), computed_in(dtype), x.size)
    return found


SHAPES = [
    ("channels", (3, 2, 100)), ("channels", (20, 8, 1)), ("rows", (3, 64)), ("rows", (2, 136)),
    ("groups", (2, 1, 4, 10, 2)), ("groups", (2, 10, 6, 1, 3)),
]  # fmt: skip
"""Runs, the last chunk of fewer, columns, a row in a warp and one in a block, groups of runs and of columns."""
shapes = pytest.mark.parametrize(("family", "shape"), SHAPES, ids=lambda value: str(value).replace(" ", ""))


@simulated
@pytest.mark.parametrize(("dtype", "shift"), [("float32", 1), ("bfloat16", 2)])
@shapes
def test_off_the_boundaries_of_vectors(family, shape, dtype, shift):
    _checked(family, shape, dtype, shift=shift)


@simulated
@shapes
def test_far_from_zero(family, shape):
    """The error does not grow with mean over spread."""
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    _checked(family, shape, "float32", ((x + np.float32(1e6)).astype(np.float32), dy, gamma, beta))


@simulated
@shapes
def test_a_first_element_far_off_does_not_spoil_the_others(family, shape):
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    x[0] = 1e6
    _checked(family, shape, "float32", (x, dy, gamma, beta))


@simulated
@shapes
def test_without_parameters(family, shape):
    x, dy, _, _ = _inputs(family, shape, "float32")
    _checked(family, shape, "float32", (x, dy, None, None))


@simulated
@shapes
def test_a_constant_gives_exactly_beta(family, shape):
    x, dy, gamma, beta = _inputs(family, shape, "float32")
    x[:] = -1e6 / 3
    found = FAMILIES[family](shape, x, dy, gamma, beta)
    assert (found["var"] == 0).all()
    assert (found["mean"] == np.float64(x[0])).all()
    apart, of_parameters, _, _ = _apart(family, shape)
    np.testing.assert_array_equal(found["y"], np.broadcast_to(beta.reshape(of_parameters), apart).ravel())


@simulated
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


@simulated
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
