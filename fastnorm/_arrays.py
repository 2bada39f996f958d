"""The operations of the ops that touch memory. All else that they do with arrays is arithmetic on shapes and strides.

`like` and `prototype` say where the memory is to be: where that array is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastnorm import _memory

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]

FLOAT64 = np.dtype(np.float64)


def empty(shape: Sequence[int], dtype: DType, like: Array) -> Array:
    """An array in C order, for values of x's size: its memory may be that of a dropped output."""
    return _memory.empty(shape, dtype)


def empty_like(prototype: Array, dtype: DType | None = None) -> Array:
    """An array of the shape and, where that is dense, of the layout of the prototype."""
    return _memory.empty_like(prototype, dtype)


def pair(count: int, like: Array) -> tuple[Array, Array]:
    """Two uninitialised float64 arrays: mean and var, or two sums."""
    return np.empty(count), np.empty(count)


def zeros(count: int, like: Array) -> Array:
    """Zeros of float64."""
    return np.zeros(count)


def copy(target: Array, source: Array) -> None:
    """target[...] = source, converted to target's dtype as C converts."""
    np.copyto(target, source, casting="unsafe")


def flat(array: Array, dtype: DType) -> Array:
    """The elements in index order as 1-D, contiguous, aligned and of `dtype`: the array itself where it is that."""
    if array.dtype is dtype and array.ndim == 1 and array.flags.c_contiguous and array.flags.aligned:
        return array
    return np.require(array, dtype, ("C", "A")).reshape(-1)


def mixed(running: Array, batch: Array, momentum: float, dtype: DType) -> Array:
    """momentum * running + (1 - momentum) * batch, computed in float64, in running's shape and of `dtype`."""
    average = running.astype(np.float64)
    average *= momentum
    average += (1.0 - momentum) * batch.reshape(average.shape)
    return average.astype(dtype)


def address(array: Array) -> int:
    """Where the first element is."""
    found: int = array.__array_interface__["data"][0]
    return found


def may_share_memory(first: Array, second: Array) -> bool:
    """Whether their extents overlap."""
    return np.may_share_memory(first, second)


def share_memory(first: Array, second: Array) -> bool:
    """Whether some byte belongs to both; also where that is too hard to find out."""
    try:
        return np.shares_memory(first, second, max_work=10_000)  # type: ignore[arg-type]  # the stub knows only the two special values
    except np.exceptions.TooHardError:  # assume the worst
        return True
