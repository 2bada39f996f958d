"""Is a result right? The float64 reference of a case, the error of a result against it, the tolerance.

The reference is the backend 'numpy' on float64 copies of the inputs, a slab at a time, so that it needs no
more than a few megabytes beside its result.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import fastnorm
from fastnorm._layout import accumulation_dtype
from fastnorm.backends import Array, flat
from fastnorm.bench.cases import Case, Direction, Inputs, dtype_of
from fastnorm.bench.tolerances import scaled_tolerance

_SLAB = 1 << 20
"""Elements of the reference computed at a time."""
_BLOCK = 1 << 16
"""Elements compared at a time: a few float64 blocks that stay in the cache."""


def reference(case: Case, inputs: Inputs, direction: Direction) -> tuple[Array, ...]:
    """(out,) or the gradients in float64, the first in x's layout."""
    x, gamma, beta, dout = inputs
    result = case.empty(np.dtype(np.float64))
    sums = [np.zeros(case.parameter_shape) for _ in range(2 if case.op.centred else 1)]
    axis = case.kept_axes[0] if case.kept_axes else 0
    length = case.shape[axis]
    step = max(1, _SLAB * length // case.size) if case.kept_axes else length
    for start in range(0, length, step):
        part = slice(start, start + step)
        slab = (slice(None),) * axis + (part,)
        own = part if case.op.family == "channel" else slice(None)  # the parameters of the slab
        parameters = gamma[own].astype(np.float64), beta[own].astype(np.float64)
        arguments = case.arguments(_widened(x[slab], axis), *parameters)
        out, cache = case.op.forward(*arguments, {}, axis=case.axis, backend="numpy")
        if direction == "forward":
            result[slab] = out
            continue
        result[slab], *gradients = case.op.backward(_widened(dout[slab], axis), cache, backend="numpy")
        for total, gradient in zip(sums, gradients, strict=True):
            assert gradient is not None
            total[own] += gradient
    return (result,) if direction == "forward" else (result, *sums)


def _widened(slab: Array, axis: int) -> Array:
    """A float64 copy with this axis outermost in memory, whose statistics NumPy sums up to three times as fast."""
    return np.moveaxis(np.moveaxis(slab, axis, 0).astype(np.float64, order="C"), 0, axis)


def error(case: Case, got: tuple[Array | None, ...], want: tuple[Array, ...]) -> float:
    """The largest deviation over all results; NaN or infinite where one is missing or misshapen.

    |got - want| / (1 + |want|) for out and dx, whose values are around 1; / (sqrt(n) + |want|) for dgamma and
    dbeta, sums of n of them.
    """
    if len(got) != len(want):
        return math.inf
    summed = math.sqrt(case.size / math.prod(case.parameter_shape))
    worst = 0.0
    for scale, result, truth in zip((1.0, summed, summed), got, want, strict=False):
        if result is None or result.shape != truth.shape:
            return math.inf
        worst = float(np.maximum(worst, _deviation(result, truth, scale)))  # keeps a NaN
    return worst


def _deviation(got: Array, want: Array, scale: float) -> float:
    if [s * want.itemsize for s in got.strides] == [s * got.itemsize for s in want.strides] and _dense(want):
        got, want = flat(got), flat(want)
    step = max(1, _BLOCK * got.shape[0] // got.size)

    @np.errstate(all="ignore")  # a wrong result may hold anything
    def block(start: int) -> Any:
        part = slice(start, start + step)
        difference = got[part].astype(np.float64)
        difference -= want[part]
        np.abs(difference, out=difference)
        magnitude = np.abs(want[part])
        magnitude += scale
        difference /= magnitude
        return difference.max()

    with ThreadPoolExecutor(fastnorm.get_num_threads()) as pool:
        return float(np.max(list(pool.map(block, range(0, got.shape[0], step)))))


def _dense(array: Array) -> bool:
    return array.ndim > 0 and np.shares_memory(array, flat(array))


def tolerance(case: Case, *, exact: bool) -> float:
    """The largest `error` of a right result; `exact` False for implementations that sum one after the other."""
    longest = max(case.reduction, case.size // math.prod(case.parameter_shape))
    stored = dtype_of(case.dtype)
    return scaled_tolerance(stored, accumulation_dtype(stored), longest, exact=exact)
