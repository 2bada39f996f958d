"""Axes and strides to the canonical views that kernels see; dtype, contiguity and overlap rules.

The only module that looks at strides. An array is *dense* when its elements fill one block of memory in
some order of its axes: C order, Fortran order, NHWC memory under an NCHW shape, any permutation. A dense
array needs no copy: for statistics over a set of axes only which memory runs belong together counts.
Everything else (gaps, negative or zero strides, foreign byte order, integers) is packed once, into the
output where it can serve as the buffer, since every kernel may run in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastnorm import _arrays, _device
from fastnorm._arrays import empty_like

Array = np.ndarray[Any, Any]
Axes = tuple[int, ...]

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)


# ---- dtypes ---------------------------------------------------------------------------------------


def _classify(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    if dtype.kind == "f" and dtype.itemsize in (2, 4, 8):
        return dtype.newbyteorder("=")
    if dtype.name == "bfloat16":  # ml_dtypes registers it with NumPy; there is no need to import it
        return dtype
    if dtype.kind in "biu":
        return FLOAT64
    return None


_storage: dict[np.dtype[Any], np.dtype[Any] | None] = {}


def storage_dtype(name: str, array: Array) -> np.dtype[Any]:
    """The dtype in which an array's values are stored and its result returned; TypeError if there is none.

    float16, bfloat16, float32 and float64 stay (in native byte order); integers and bools are promoted to
    float64 as NumPy's mean does.
    """
    dtype = array.dtype
    try:
        found = _storage[dtype]
    except KeyError:
        found = _storage[dtype] = _classify(dtype)
    if found is None:
        raise TypeError(f"{name}: expected float16, bfloat16, float32, float64, integers or bools, got dtype {dtype}")
    return found


def accumulation_dtype(storage: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of parameters and of arithmetic: float64 for float64, float32 for everything narrower."""
    return FLOAT64 if storage is FLOAT64 or storage == FLOAT64 else FLOAT32


def common_storage(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    """The storage in which two arrays meet without loss: theirs if equal, else float32 or float64."""
    if first == second:
        return first
    return FLOAT64 if FLOAT64 in (first, second) else FLOAT32


def dtype_beside(dtype: np.dtype[Any], array: Array) -> np.dtype[Any]:
    """A dtype as arrays have it where this one is: NumPy's bfloat16 and that of a device are two objects."""
    if dtype.name != "bfloat16" or dtype == array.dtype:
        return dtype
    found: np.dtype[Any] = _device.BFLOAT16 if _device.on_device(array) else np.dtype("bfloat16")
    return found


def host_array(name: str, value: Any) -> Array:
    """`value` as a plain ndarray, without a copy where it is one; TypeError for what is not an array.

    Lists and numbers are taken as NumPy takes them, but for lists of arrays on a device, of which NumPy would make
    copies on the host. Masked arrays are refused, since their mask would be
    lost, and so are other libraries' arrays, since their kind would.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: masked arrays are not supported, got {type(value).__name__}")
    if isinstance(value, (list, tuple)) and value and _device.of_a_library(value[0]):
        raise TypeError(f"{name}: expected one array, got a {type(value).__name__} of {kind(value[0])}")
    if not isinstance(value, (np.ndarray, np.generic, list, tuple, int, float)):
        raise TypeError(f"{name}: expected a NumPy array, got {kind(value)}")
    try:
        return np.asarray(value)
    except ValueError as problem:  # lists of different lengths
        raise ValueError(f"{name}: expected what makes up one array, got a {type(value).__name__}: {problem}") from None


def kind(value: Any) -> str:
    """The type of a value, for messages."""
    return repr(value) if _device.on_device(value) else f"{type(value).__module__}.{type(value).__name__}"


def as_array(name: str, value: Any) -> Array:
    """As `host_array`, and an array on a CUDA device as the descriptor that stands for it."""
    if type(value) is np.ndarray:
        return value
    found: Any = _device.described(name, value)
    return host_array(name, value) if found is None else found


def beside(name: str, value: Any, x: Array) -> Array:
    """`as_array` of a further array of a call: it must be where x is. ValueError where it is not."""
    array = as_array(name, value)
    if type(array) is np.ndarray and type(x) is np.ndarray:
        return array
    here, there = _place(x), _place(array)
    if here != there:
        raise ValueError(f"{name}: expected an array {here}, where x is, got one {there}; nothing is moved unasked")
    if _device.on_device(array) and _device.on_device(x):
        _device.follow(array, x)
    return array


def _place(array: Array) -> str:
    return f"on {array.place}" if _device.on_device(array) else "in host memory"


# ---- canonical views ------------------------------------------------------------------------------


class View(NamedTuple):
    """How a dense array looks to a kernel family."""

    sizes: Any
    """(outer, channels, inner), (samples, outer, channels, inner) or (rows, cols)."""
    memory: Axes
    """The axes longer than one, outermost in memory first; equal for two arrays = same layout."""
    stats: Axes | None
    """Order in memory of the axes that statistics are indexed by, where not their index order."""
    params: Axes | None
    """The same for the axes that gamma and beta are indexed by."""


ViewOf = Callable[[tuple[int, ...], tuple[int, ...], int, Axes], "View | None"]


def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Axes | None:
    """The axes longer than one by falling stride, or None where the array is not dense."""
    order = sorted((axis for axis, n in enumerate(shape) if n != 1), key=lambda axis: -strides[axis])
    expected = itemsize
    for axis in reversed(order):
        if strides[axis] != expected:
            return None
        expected *= shape[axis]
    return tuple(order)


def _permutation(wanted: Axes, axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """Positions in `axes` in the order of `wanted` (axes of length one last); None for the identity."""
    order = (*wanted, *(axis for axis in axes if shape[axis] == 1))
    positions = tuple(axes.index(axis) for axis in order)
    moved = [p for p in positions if shape[axes[p]] != 1]
    return None if moved == sorted(moved) else positions


def _product(shape: tuple[int, ...], axes: Axes) -> int:
    return math.prod(shape[axis] for axis in axes)


@lru_cache(maxsize=1024)
def channel_view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, kept: Axes) -> View | None:
    """(outer, channels, inner), one statistic for each element of the `kept` axes; None: needs packing.

    The kept axes must lie side by side in memory. NCHW: (N, C, HW); NHWC memory: (NHW, C, 1);
    a Fortran-ordered (N, D): (1, D, N).
    """
    order = _memory_order(shape, strides, itemsize)
    if order is None:
        return None
    positions = [position for position, axis in enumerate(order) if axis in kept]
    if not positions:  # one statistic for everything
        return View((1, 1, math.prod(shape)), order, None, None)
    first, last = positions[0], positions[-1] + 1
    if len(positions) != last - first:
        return None
    permutation = _permutation(order[first:last], kept, shape)
    sizes = (_product(shape, order[:first]), _product(shape, order[first:last]), _product(shape, order[last:]))
    return View(sizes, order, permutation, permutation)


@lru_cache(maxsize=1024)
def row_view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, normalized: Axes) -> View | None:
    """(rows, cols), a row for each element of the other axes; None where rows are not runs of memory."""
    order = _memory_order(shape, strides, itemsize)
    if order is None:
        return None
    others = tuple(axis for axis in range(len(shape)) if axis not in normalized)
    split = len(order)
    while split and order[split - 1] in normalized:
        split -= 1
    if any(axis in normalized for axis in order[:split]):
        return None
    return View(
        (_product(shape, order[:split]), _product(shape, order[split:])),
        order,
        _permutation(order[:split], others, shape),
        _permutation(order[split:], normalized, shape),
    )


@lru_cache(maxsize=1024)
def group_view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, channel: Axes) -> View | None:
    """(samples, outer, channels, inner), samples along axis 0; None where those are not runs of memory.

    NCHW: (N, 1, C, HW); NHWC memory: (N, HW, C, 1).
    """
    order = _memory_order(shape, strides, itemsize)
    if order is None or 0 in order[1:]:
        return None
    inside = order[1:] if shape[0] != 1 else order
    (axis,) = channel
    position = inside.index(axis) if axis in inside else 0  # of a single channel: anywhere
    outer, inner = (_product(shape, part) for part in (inside[:position], inside[position:]))
    return View((shape[0], outer, shape[axis], inner // shape[axis]), order, None, None)


def to_memory(indexed: Array | None, order: Axes | None, lengths: tuple[int, ...]) -> Any:
    """Per-channel or per-row values in index order -> 1-D in the order of memory; None stays None."""
    if order is None or indexed is None:
        return indexed
    return indexed.reshape(lengths).transpose(order).ravel()


def to_index(flat: Array | None, order: Axes | None, lengths: tuple[int, ...]) -> Any:
    """The inverse of `to_memory`."""
    if order is None or flat is None:
        return flat
    indexed = _arrays.empty(lengths, flat.dtype, flat)
    _arrays.copy(indexed.transpose(order), flat.reshape([lengths[axis] for axis in order]))
    return indexed.reshape(-1)


PART, PACKING = 80, 1024
"""What the moments of a part cost, 70 to 100 ns, and what packing costs at all, 1 us, in elements that are packed."""


def worth_parts(samples: int, elements: int) -> bool:
    """Whether `moments` takes an array as this many parts, where what is kept lies apart in memory, instead of packing.

    With 512 parts of 8 channels 8192 elements took 40 us and packed 7, with 8 parts of 64 channels 3.5 and 5.
    """
    return samples * PART <= elements + PACKING


class PartsView(NamedTuple):
    """How a dense array looks whose kept axes are apart in memory: as samples, statistics in each of them."""

    sizes: Any
    """(samples, outer, channels, inner)"""
    lengths: tuple[int, ...]
    """Of the axes of the samples and of the channels, in the order of memory."""
    merged: Axes
    """Positions among these of axes that are reduced: samples whose statistics are to be merged."""
    stats: Axes | None
    """As in `View`."""


@lru_cache(maxsize=1024)
def parts_view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, kept: Axes) -> PartsView | None:
    """What `moments` computes without packing; None where that would be many parts of a few values each."""
    order = _memory_order(shape, strides, itemsize)
    if order is None:
        return None
    at, starts = len(order), []
    for is_kept in (False, True, False):  # inner, channels, outer; before these are the samples
        while at and (order[at - 1] in kept) == is_kept:
            at -= 1
        starts.append(at)
    inner, channels, outer = order[starts[0] :], order[starts[1] : starts[0]], order[starts[2] : starts[1]]
    sizes = tuple(_product(shape, part) for part in (order[:at], outer, channels, inner))
    if not worth_parts(sizes[0], math.prod(shape)):
        return None
    axes = (*order[:at], *channels)
    return PartsView(
        sizes,
        tuple(shape[axis] for axis in axes),
        tuple(position for position, axis in enumerate(axes) if axis not in kept),
        _permutation(tuple(axis for axis in axes if axis in kept), kept, shape),
    )


def weights(given: Array, shape: tuple[int, ...], view: View, kept: Axes, dtype: np.dtype[Any]) -> tuple[Array, bool]:
    """Weights of an array of this shape and channel view as 1-D in the order of its memory, and whether there is one
    an element; else they do not differ along the kept axes, and there is one for each position along the others.
    """
    padded = given.reshape((1,) * (len(shape) - given.ndim) + given.shape)
    each = any(padded.shape[axis] != 1 for axis in kept)
    lengths = tuple(1 if axis in kept and not each else n for axis, n in enumerate(shape))
    spread = padded if padded.shape == lengths else np.broadcast_to(padded, lengths)  # which takes 2 us
    order = (*view.memory, *(axis for axis in range(len(shape)) if axis not in view.memory))
    return _arrays.flat(spread.transpose(order), dtype), each


# ---- buffers --------------------------------------------------------------------------------------


class Buffers(NamedTuple):
    """What one kernel call works on."""

    view: View
    inputs: Any
    """The inputs as the kernel reads them: the caller's own where their layout allows."""
    work: Array
    """Where the kernel writes: `out`, or a dense stand-in for an `out` that a kernel cannot address."""
    out: Array
    """What the caller gets, once `deliver` has copied `work` where the two differ."""


def _view(array: Array, dtype: np.dtype[Any], view_of: ViewOf, axes: Axes) -> View | None:
    """The array's view if a kernel of this dtype can address its memory as it is."""
    if (array.dtype is not dtype and array.dtype != dtype) or not array.flags.aligned:
        return None
    return view_of(array.shape, array.strides, array.itemsize, axes)


def buffers(
    inputs: tuple[Array, ...], dtype: np.dtype[Any], out_dtype: np.dtype[Any], out: Array | None,
    view_of: ViewOf, axes: Axes,
) -> Buffers:  # fmt: skip
    """Choose the memory of a call: no copy for dense arrays of one layout, else the fewest that serve.

    The layout of the result is that of inputs[-1] (x). An input that a kernel cannot read in the layout
    of `work` is packed: the first such into `work` itself, a further one into memory of its own.
    """
    x = inputs[-1]
    if out is None:
        views = [_view(array, dtype, view_of, axes) for array in inputs]
        own = views[-1]
        if own is not None and dtype == out_dtype and all(v is own or (v and v.memory == own.memory) for v in views):
            out = empty_like(x)  # the common case: everything dense and alike, the result in x's own order
            return Buffers(own, inputs, out, out)
        out = empty_like(x, out_dtype)
    work = out
    view = _view(work, dtype, view_of, axes)
    if view is None:
        work, view = _dense_like(x, dtype, view_of, axes)
    ready: list[Array] = []
    work_taken = False
    for array in inputs:
        found = _view(array, dtype, view_of, axes)
        if found is None or found.memory != view.memory:
            target = empty_like(work) if work_taken else work
            work_taken = True
            _arrays.copy(target, array)
            array = target
        ready.append(array)
    return Buffers(view, tuple(ready), work, out)


def readable(inputs: tuple[Array, ...], dtype: np.dtype[Any], view_of: ViewOf, axes: Axes) -> tuple[View, Any]:
    """The inputs of a kernel that writes no array of their size, packed where their layouts do not fit."""
    x = inputs[-1]
    view = _view(x, dtype, view_of, axes)
    if view is None:
        packed, view = _dense_like(x, dtype, view_of, axes)
        _arrays.copy(packed, x)
        x = packed
    ready: list[Array] = []
    for array in inputs[:-1]:
        found = _view(array, dtype, view_of, axes)
        if found is None or found.memory != view.memory:
            packed = empty_like(x)
            _arrays.copy(packed, array)
            array = packed
        ready.append(array)
    return view, (*ready, x)


def packed_view(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, view_of: ViewOf, axes: Axes
) -> tuple[list[int], View]:
    """The order of axes in which an array that no kernel can address is packed, outermost first, and the view then.

    The array's own order of axes, or, where that does not serve (rows of a Fortran-ordered array, say), one with
    the given axes last.
    """
    ndim = len(shape)
    order = sorted(range(ndim), key=lambda axis: -abs(strides[axis]))
    for candidate in (order, [*(axis for axis in range(ndim) if axis not in axes), *axes]):
        lengths = [shape[axis] for axis in candidate]
        steps = [math.prod(lengths[position + 1 :]) * itemsize for position in range(ndim)]
        view = view_of(shape, tuple(steps[candidate.index(axis)] for axis in range(ndim)), itemsize, axes)
        if view is not None:
            return candidate, view
    raise AssertionError("the given axes last are always adjacent")


def _dense_like(x: Array, dtype: np.dtype[Any], view_of: ViewOf, axes: Axes) -> tuple[Array, View]:
    """An empty array for x's values that a kernel can address."""
    order, view = packed_view(x.shape, x.strides, dtype.itemsize, view_of, axes)
    back = [order.index(axis) for axis in range(x.ndim)]
    return _arrays.empty([x.shape[axis] for axis in order], dtype, x).transpose(back), view


def deliver(work: Array, out: Array) -> Array:
    """The result where the caller expects it, of the caller's library."""
    if work is not out:
        _arrays.copy(out, work)
    return out if type(out) is np.ndarray else _arrays.handed(out)


# ---- index order ----------------------------------------------------------------------------------

PIECE = 1 << 16
"""Elements of a piece at most: its buffer stays in a core's cache."""


def in_index_order(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether a kernel of this dtype finds the array's elements in C order in its memory, as they are."""
    return array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(number of the first element in C order, index) of pieces of at most PIECE elements that make up an array.

    The index gives a view, also of an array without axes.
    """
    split, inner = len(shape), 1  # the axes from `split` on fit a piece together, that before them is cut
    while split and inner * shape[split - 1] <= PIECE:
        split -= 1
        inner *= shape[split]
    if not split:
        if inner:
            yield 0, (...,)
        return
    step, length = max(1, PIECE // inner), shape[split - 1]
    for number, outer in enumerate(np.ndindex(shape[: split - 1])):
        for start in range(0, length, step):
            yield (number * length + start) * inner, (*outer, slice(start, start + step), ...)


# ---- the caller's out -----------------------------------------------------------------------------


def _overlaps_itself(array: Array) -> bool:
    """Whether two elements may share memory: some axis does not step over all that lies inside it."""
    if array.size == 0:  # NumPy may give it strides of 0
        return False
    extent = array.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent += stride * (n - 1)
    return False


def checked_out(out: Any, x: Array, dtype: np.dtype[Any], others: dict[str, Any], may_be: Array | None = None) -> Array:
    """The caller's `out`, if a result of x's shape and this dtype can be written there.

    It must overlap none of `others` (argument name -> array or None), except that it may be `may_be`
    itself: the same elements in the same places.
    """
    if not isinstance(out, np.ndarray) and _device.described("out", out) is None:
        expected = "an array on a CUDA device" if _device.on_device(x) else "a NumPy array"
        raise TypeError(f"out: expected {expected}, got {kind(out)}")
    result = beside("out", out, x)
    if _device.on_device(result) and not _device.one_stream(result, x):
        raise ValueError("out: belongs to another stream than x")
    if result.shape != x.shape:
        raise ValueError(f"out: expected shape {x.shape}, got {result.shape}")
    if result.dtype != dtype:
        raise ValueError(f"out: expected dtype {dtype}, got {result.dtype}")
    if not result.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if _overlaps_itself(result):
        raise ValueError(f"out: its elements overlap one another (shape {result.shape}, strides {result.strides})")
    for name, other in others.items():
        if other is None or not _arrays.may_share_memory(result, other):
            continue
        if may_be is not None and other is may_be and same_elements(result, may_be):
            continue
        if _arrays.share_memory(result, other):
            raise ValueError(f"out: overlaps {name}; expected memory of its own")
    return out if isinstance(out, np.ndarray) else result  # a np.memmap comes back as the one that it is


def same_elements(first: Array, second: Array) -> bool:
    return (
        _arrays.address(first) == _arrays.address(second)
        and first.strides == second.strides
        and first.shape == second.shape
        and first.dtype == second.dtype
    )


# ---- parameters -----------------------------------------------------------------------------------


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the leading ones, which broadcasting ignores."""
    start = 0
    while start < len(shape) and shape[start] == 1:
        start += 1
    return shape[start:]


@lru_cache(maxsize=1024)
def fits_axes(given: tuple[int, ...], shape: tuple[int, ...], axes: Axes) -> bool:
    """Whether a parameter of this shape has one element for each of these axes of `shape`.

    Either it has just these axes, (C,), or it broadcasts against the array, (C, 1, 1) or (1, C, 1, 1).
    """
    alone = tuple(shape[axis] for axis in axes)
    among = tuple(n if axis in axes else 1 for axis, n in enumerate(shape))
    return _stripped(given) in (_stripped(alone), _stripped(among))


def parameter(name: str, value: Any, x: Array, axes: Axes, dtype: np.dtype[Any]) -> tuple[Array | None, Array | None]:
    """(as given, as the kernels want it: 1-D, contiguous, of `dtype`, in index order), or (None, None).

    Raises ValueError where the shape does not fit these axes of x, TypeError for complex and other dtypes.
    """
    if value is None:
        return None, None
    given = beside(name, value, x)
    if not fits_axes(given.shape, x.shape, axes):
        alone = tuple(x.shape[axis] for axis in axes)
        raise ValueError(
            f"{name}: expected {math.prod(alone)} elements of shape {alone} (or one that broadcasts to it "
            f"over {x.shape}), got shape {given.shape}"
        )
    storage_dtype(name, given)
    return given, _arrays.flat(given, dtype)


def gradients(
    sum_dout_xhat: Array | None, sum_dout: Array | None, gamma: Array | None, beta: Array | None
) -> tuple[Array | None, Array | None]:
    """Those of gamma and beta, each in its own shape and floating dtype (float64 for integers); None for None."""
    if (found := plain_gradients(sum_dout_xhat, sum_dout, gamma, beta)) is not None:
        return found
    return _gradient(sum_dout_xhat, gamma), _gradient(sum_dout, beta)


def _gradient(total: Array | None, parameter: Array | None) -> Array | None:
    if total is None or parameter is None:
        return None
    parameter = as_array("parameter", parameter)
    dtype = parameter.dtype if parameter.dtype.kind not in "biu" else FLOAT64
    return _arrays.handed(total.astype(dtype).reshape(parameter.shape))


# ---- the common case ------------------------------------------------------------------------------

# Whether a call is of the common kind, in one look of 0.2 us: x exactly an ndarray, C-contiguous, aligned,
# of a native floating dtype that kernels store, not empty; gamma and beta None or of the accumulation dtype and shape
# (x.shape[axis],); for a backward also dout as x, of its dtype and shape; the caller's out likewise, writable, and
# sharing no byte with the inputs. Nothing then needs converting or packing. `plain_channels` also takes channels that
# lie last in memory, and gives the sizes of the channel view. `plain_reduction` takes any dense x and the axes of
# `moments`, where what is kept lies in the order of the axes, side by side and perhaps outermost, too, and gives the
# sizes of a group view, a group for each channel, and the shape of the statistics; `plain_normalization` takes float64
# statistics of one axis; `plain_gradients` makes those of 1-D parameters from float64 sums. Everything else, errors
# included, is worked out by the functions above, as is everything where the extension is missing.
plain: Callable[[Any, Any, Any, int], bool]
plain_backward: Callable[[Any, Any, Any, Any, int], bool]
plain_channels: Callable[[Any, Any, Any, int], tuple[int, int, int] | None]
plain_channels_backward: Callable[[Any, Any, Any, Any, int], tuple[int, int, int] | None]
plain_reduction: Callable[[Any, Any, bool], tuple[int, int, int, int, int, tuple[int, ...]] | None]
plain_normalization: Callable[[Any, Any, Any, Any, Any], tuple[int, int, int] | None]
plain_out: Callable[..., bool]
plain_gradients: Callable[[Any, Any, Any, Any], tuple[Array | None, Array | None] | None]
try:
    from fastnorm._core import gradients as plain_gradients
    from fastnorm._core import (
        plain,
        plain_backward,
        plain_channels,
        plain_channels_backward,
        plain_normalization,
        plain_out,
        plain_reduction,
    )
except ImportError:

    def plain(x: Any, gamma: Any, beta: Any, axis: int, /) -> bool:
        return False

    def plain_backward(dout: Any, x: Any, gamma: Any, beta: Any, axis: int, /) -> bool:
        return False

    def plain_channels(x: Any, gamma: Any, beta: Any, axis: int, /) -> tuple[int, int, int] | None:
        return None

    def plain_channels_backward(dout: Any, x: Any, gamma: Any, beta: Any, axis: int, /) -> tuple[int, int, int] | None:
        return None

    def plain_reduction(x: Any, axis: Any, keepdims: bool, /) -> tuple[int, int, int, int, int, tuple[int, ...]] | None:
        return None

    def plain_normalization(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, /) -> tuple[int, int, int] | None:
        return None

    def plain_out(out: Any, x: Any, /, *others: Any) -> bool:
        return False

    def plain_gradients(
        sum_dout_xhat: Any, sum_dout: Any, gamma: Any, beta: Any, /
    ) -> tuple[Array | None, Array | None] | None:
        return None


# ---- axes -----------------------------------------------------------------------------------------


def checked_axis(axis: Any, ndim: int, name: str = "axis") -> int:
    """A single axis as a number from 0 to ndim - 1."""
    if type(axis) is not int and (isinstance(axis, bool) or not hasattr(axis, "__index__")):
        raise TypeError(f"{name}: expected a whole number, got {axis!r}")
    number = int(axis.__index__())
    if not -ndim <= number < ndim:
        raise ValueError(f"{name}: expected from {-ndim} to {ndim - 1} for an array of {ndim} dimensions, got {number}")
    return number % ndim
