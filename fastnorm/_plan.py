"""What the C++ kernels will do with a call: how it is cut up and what it moves, as data."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fastnorm import _layout, _threads
from fastnorm._dispatch import BackendUnavailableError
from fastnorm.ops import _arguments


class _Family(NamedTuple):
    view_of: _layout.ViewOf
    sizes: tuple[str, ...]
    """What the numbers of the view are called."""
    unit: str
    """What a slab is a number of."""
    axis: int
    """The default."""


_CHANNELS = _Family(_layout.channel_view, ("outer", "channels", "inner"), "channels", 1)
_GROUPS = _Family(_layout.group_view, ("samples", "outer", "channels", "inner"), "channels of a sample", 1)
_ROWS = _Family(_layout.row_view, ("rows", "cols"), "rows", -1)
_FAMILY = {
    "batchnorm": _CHANNELS, "groupnorm": _GROUPS, "instancenorm": _GROUPS, "layernorm": _ROWS, "rmsnorm": _ROWS,
}  # fmt: skip


DROPOUT = "dropout"


@dataclass(frozen=True)
class Plan:
    """A call as the C++ kernels will run it. `print(plan)` gives it in words.

    What decides bits (`groups`, the order of sums) follows from shape and dtype alone, the rest from the caches
    and the number of threads as well.
    """

    op: str
    direction: Literal["forward", "backward"]
    dtype: str
    sizes: tuple[int, ...]
    """(outer, channels, inner) of batchnorm, the same after the samples of groupnorm and instancenorm, (rows, cols) of
    layernorm and rmsnorm, as they lie in memory; (elements,) of dropout."""
    threads: int
    """That work on it: one where waking others would cost more than they save."""
    packed: bool
    """Whether the array has to be copied into an order of memory that kernels read; dropout does so by the piece."""
    side_by_side: bool
    """Vectors run across channels, not along one."""
    groups: int
    """Parts that a channel's or row's elements are summed in; none of dropout."""
    slab: int
    """Channels, of all samples that stay together, or rows that go through all passes before the next ones; elements
    of a task of dropout."""
    slab_bytes: int
    shared: bool
    """All threads work on the same slab; else each has slabs of its own."""
    streams: bool
    """The result is stored past the cache."""
    ahead: int
    """Bytes from the line being written to the one being fetched meanwhile, of x alone in a backward with vectors
    across channels; 0 where none is."""
    reads: int
    """Arrays of x's size read from memory. The least is 1 forward, 2 backward (of dropout 1); twice that where no slab
    fits a cache."""
    writes: int
    bytes: int
    """Bytes that the arrays' reads and writes come to."""
    floor: int
    """The bytes that no implementation can avoid: each input once, the output once."""

    def __str__(self) -> str:
        family = _FAMILY.get(self.op)
        sizes, unit = (family.sizes, family.unit) if family else (("elements",), "elements")
        slab = f"{self.slab} {unit}"
        if family is _GROUPS and self.slab > (channels := self.sizes[2]):
            slab = f"{self.slab // channels} samples"
        sized = ", ".join(f"{name} {size}" for name, size in zip(sizes, self.sizes, strict=True))
        reads = "1 read" if self.reads == 1 else f"{self.reads} reads"
        workers = (
            "one thread" if self.threads == 1
            else f"shared by {self.threads} threads" if self.shared
            else f"one for each of {self.threads} threads"
        )  # fmt: skip
        lines = [
            f"{self.op} {self.direction}, {self.dtype}: {sized}" + (", packed first" if self.packed else ""),
            f"slab    {slab}, {_size(self.slab_bytes)}, {workers}",
            f"sums    in {self.groups} groups, vectors " + ("across channels" if self.side_by_side else "along a run")
            if self.groups
            else "sums    none",
            f"stores  {'past the cache' if self.streams else 'through the cache'}, fetching "
            + (f"{_size(self.ahead)} ahead" if self.ahead else "nothing ahead"),
            f"moves   {reads} and one write of x's size: {_size(self.bytes)}, "
            f"{self.bytes / self.floor:.3g} times the least",
        ]
        return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GB"


def plan(
    op: str, x: Any, *, dtype: Any = None, axis: int | None = None, groups: int | None = None,
    direction: Literal["forward", "backward"] = "forward", threads: int | None = None,
) -> Plan:  # fmt: skip
    """How the C++ backend would run `<op>_<direction>` (training) on an array like x.

    Parameters
    ----------
    op : 'batchnorm', 'layernorm', 'groupnorm', 'instancenorm', 'rmsnorm' or 'dropout'
    x : an array, whose shape, strides and dtype count and whose values are not looked at, or a shape
        A shape means a C-contiguous array of `dtype`, default float32.
    axis : the op's own; default -1 for layernorm and rmsnorm, 1 for the others. Dropout has none.
    groups : of groupnorm, and of it alone
    direction : 'forward' or 'backward'
    threads : default `get_num_threads()`

    Returns a `Plan`. Raises ValueError or TypeError that names the argument, BackendUnavailableError without the
    extension.
    """
    if op not in _FAMILY and op != DROPOUT:
        raise ValueError(f"op: expected one of {', '.join((*_FAMILY, DROPOUT))}, got {op!r}")
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction: expected 'forward' or 'backward', got {direction!r}")
    threads = _threads.get_num_threads() if threads is None else _threads.checked(threads, "threads")
    shape, strides, storage, direct = _described(x, dtype)
    try:
        core: Any = importlib.import_module("fastnorm._core")
    except ImportError as error:
        raise BackendUnavailableError(f"plan: the extension is not available: {error}") from error

    if op == DROPOUT:
        return _of_dropout(core, shape, strides, storage, direct, direction, threads, axis, groups)
    family = _FAMILY[op]
    position = _layout.checked_axis(family.axis if axis is None else axis, len(shape))
    axes = tuple(range(position, len(shape))) if family is _ROWS else (position,)
    count = _counted_groups(op, groups, shape, position)
    size = _checked_size(shape)
    view = family.view_of(shape, strides, storage.itemsize, axes) if direct else None
    packed = view is None
    if view is None:
        _, view = _layout.packed_view(shape, strides, storage.itemsize, family.view_of, axes)
    arrays = 1 if direction == "forward" else 2
    load = storage.itemsize, arrays, threads
    if family is _GROUPS:
        how = core.plan_groups(*view.sizes, count, *load)
    else:
        how = (core.plan_channels if family is _CHANNELS else core.plan_rows)(*view.sizes, *load)
    reads = arrays * how["passes"]
    return Plan(
        op=op, direction=direction, dtype=storage.name, sizes=tuple(view.sizes),
        threads=1 if how["serial"] else threads, packed=packed, side_by_side=how["side_by_side"],
        groups=how["groups"], slab=how["slab"], slab_bytes=how["slab_bytes"],
        shared=how["team"], streams=how["stream"], ahead=how["ahead"], reads=reads, writes=1,
        bytes=(reads + 1) * size * storage.itemsize, floor=(arrays + 1) * size * storage.itemsize,
    )  # fmt: skip


def _of_dropout(
    core: Any, shape: tuple[int, ...], strides: tuple[int, ...], storage: np.dtype[Any], direct: bool,
    direction: Literal["forward", "backward"], threads: int, axis: Any, groups: Any,
) -> Plan:  # fmt: skip
    """Both directions read one array and write one."""
    for name, value in (("axis", axis), ("groups", groups)):
        if value is not None:
            raise TypeError(f"{name}: not of dropout, got {value!r}")
    size = _checked_size(shape)
    how = core.plan_dropout(size, storage.itemsize)
    moved = 2 * size * storage.itemsize
    order = _c_strides(shape, storage.itemsize)
    in_order = all(n == 1 or stride == step for n, stride, step in zip(shape, strides, order, strict=True))
    return Plan(
        op=DROPOUT, direction=direction, dtype=storage.name, sizes=(size,), threads=1 if how["serial"] else threads,
        packed=not (direct and in_order), side_by_side=how["side_by_side"], groups=how["groups"], slab=how["slab"],
        slab_bytes=how["slab_bytes"], shared=how["team"], streams=how["stream"], ahead=how["ahead"], reads=1, writes=1,
        bytes=moved, floor=moved,
    )  # fmt: skip


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))


def _checked_size(shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if size == 0:
        raise ValueError(f"x: there is nothing to plan for an empty array, got shape {shape}")
    return size


def _counted_groups(op: str, groups: Any, shape: tuple[int, ...], position: int) -> int:
    """How many groups the channels fall into; of an op without groups not looked at."""
    if op != "groupnorm" and groups is not None:
        raise TypeError(f"groups: goes with groupnorm, not with {op}")
    if _FAMILY[op] is _GROUPS and position == 0:
        raise ValueError("axis: expected a channel axis after axis 0, the samples, got 0")
    return _arguments.checked_groups(groups, shape[position]) if op == "groupnorm" else shape[position]


def _described(x: Any, dtype: Any) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype[Any], bool]:
    """Shape, strides, storage dtype, and whether a kernel can read elements as they are."""
    if isinstance(x, np.ndarray):
        if dtype is not None:
            raise TypeError("dtype: goes with a shape; an array has its own")
        storage = _layout.storage_dtype("x", x)
        return x.shape, x.strides, storage, x.dtype == storage and bool(x.flags.aligned)
    try:
        shape = tuple(int(n) for n in x)
    except TypeError:
        raise TypeError(f"x: expected an array or a shape, got {_arguments.described(x)}") from None
    if any(n < 0 for n in shape):
        raise ValueError(f"x: a shape has no negative lengths, got {shape}")
    storage = _layout.storage_dtype("dtype", np.empty(0, np.float32 if dtype is None else dtype))
    return shape, _c_strides(shape, storage.itemsize), storage, True
