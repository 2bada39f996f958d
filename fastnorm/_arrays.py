"""The operations of the ops that touch memory. All else that they do with arrays is arithmetic on shapes and strides.

Each works on NumPy arrays and on `_device.DeviceArray`, the descriptor of an array on a device. The ops are typed as
for NumPy's; a descriptor has the attributes that they use. `like` and `prototype` say where new memory is to be:
where that array is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastnorm import _device, _memory
from fastnorm._device import on_device

Array = Any
"""An ndarray or a DeviceArray."""
Result = np.ndarray[Any, Any]
"""The same, as the ops are typed."""
DType = np.dtype[Any]

FLOAT64 = np.dtype(np.float64)


def empty(shape: Sequence[int], dtype: DType, like: Array) -> Array:
    """An array in C order, for values of x's size: its memory may be that of a dropped output."""
    return like.empty(shape, dtype) if on_device(like) else _memory.empty(shape, dtype)


def empty_like(prototype: Array, dtype: DType | None = None) -> Array:
    """An array of the shape and, where that is dense, of the layout of the prototype."""
    return prototype.empty_like(dtype) if on_device(prototype) else _memory.empty_like(prototype, dtype)


def pair(count: int, like: Array) -> Any:
    """Two uninitialised float64 arrays: mean and var, or two sums."""
    if type(like) is np.ndarray:  # asked first: the small calls of the CPU backends wait for this
        return _memory.pair(count)
    return like.empty((2, count), FLOAT64).split()


def zeros(count: int, like: Array) -> Array:
    """Zeros of float64."""
    return full(count, 0.0, FLOAT64, like) if on_device(like) else np.zeros(count)


def full(count: int, value: float, dtype: DType, like: Array) -> Array:
    """One value, so many times."""
    if not on_device(like):
        return np.full(count, value, dtype)
    array = like.empty((count,), dtype)
    _device.backend().fill(array, value)
    return array


def scaled(array: Array, factor: float) -> Array:
    """array * factor, of a float64 array in C order."""
    if not on_device(array):
        return array * factor
    product = array.empty(array.shape, FLOAT64)
    _device.backend().mix(product, None, array, 0.0, factor)
    return product


def copy(target: Array, source: Array) -> None:
    """target[...] = source, converted to target's dtype as C converts."""
    if on_device(target):
        _device.backend().copy(target, source)
    elif not _memory.copy_transposed(target, source):
        np.copyto(target, source, casting="unsafe")


def flat(array: Array, dtype: DType) -> Result:
    """The elements in index order as 1-D, contiguous, aligned and of `dtype`: the array itself where it is that."""
    found: Result = array
    if array.dtype is dtype and array.flags.c_contiguous and array.flags.aligned:
        return found if array.ndim == 1 else found.reshape(-1)
    if on_device(array):
        same = array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned
        found = (array if same else array.astype(dtype)).reshape(-1)
        return found
    return np.require(found, dtype, ("C", "A")).reshape(-1)


def mixed(running: Array | None, batch: Array, momentum: float, dtype: DType) -> Array:
    """momentum * running + (1 - momentum) * batch, computed in float64, in running's shape and of `dtype`.

    Where there is no running yet it counts as zeros of batch's shape.
    """
    if on_device(batch):
        average = batch.empty(batch.shape if running is None else running.shape, dtype)
        _device.backend().mix(average, running, batch, momentum, 1.0 - momentum)
        return average
    if running is None:
        return ((1.0 - momentum) * batch).astype(dtype)
    average = running.astype(np.float64)
    average *= momentum
    average += (1.0 - momentum) * batch.reshape(average.shape)
    return average.astype(dtype)


def handed(array: Array) -> Result:
    """The array as its user knows it: of the library that the call's arrays are of."""
    found: Result = array.handed() if on_device(array) else array
    return found


def on_host(array: Array) -> Result:
    """The array where NumPy can look at its values; from a device a copy, for which this waits."""
    found: Result = array.to_host() if on_device(array) else array
    return found


def address(array: Array) -> int:
    """Where the first element is."""
    found: int = array.pointer if on_device(array) else array.__array_interface__["data"][0]
    return found


def may_share_memory(first: Array, second: Array) -> bool:
    """Whether their extents overlap."""
    return np.may_share_memory(_addresses(first), _addresses(second))


def share_memory(first: Array, second: Array) -> bool:
    """Whether some byte belongs to both; also where that is too hard to find out."""
    try:
        return np.shares_memory(_addresses(first), _addresses(second), max_work=10_000)  # type: ignore[arg-type]  # the stub knows only the two special values
    except np.exceptions.TooHardError:  # assume the worst
        return True


def _addresses(array: Array) -> Array:
    return array.shadow() if on_device(array) else array
