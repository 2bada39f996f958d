"""The memory floor: what an op that moves the unavoidable bytes, and computes nothing, would take.

    forward     a copy: one read, one write of the array
    backward    an addition of two arrays into a third: two reads, one write

Measured on the arrays of the case, in the same run, with the library's thread count. The extension does it
with non-temporal stores (a plain store first reads the line that it overwrites); without the extension
NumPy's copy and addition serve, and the report says so. Three floors:

    floor       the above, for arrays that come from memory
    plan_floor  with the further reads of a plan that goes over its input twice, where no slab fits a cache
    in_cache    the same copy and addition done in several ways, for arrays that stay in a cache, where plain
                stores are faster, of one thread or of all. The fastest is the floor.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np

import fastnorm
from fastnorm.backends import Array, flat
from fastnorm.bench.cases import DROPOUT, Case, Direction, Inputs


class Traffic(NamedTuple):
    """Arrays of x's size moved from and to memory."""

    reads: int
    writes: int


ONE_PASS: dict[Direction, Traffic] = {"forward": Traffic(1, 1), "backward": Traffic(2, 1)}


def traffic(case: Case, x: Array, direction: Direction) -> Traffic:
    """What the C++ backend's plan of this call moves; one pass where there is no extension."""
    if _core() is None:
        return ONE_PASS[direction]
    groups = case.groups if case.op.takes_groups else None
    axis = None if case.op is DROPOUT else case.axis
    plan = fastnorm.plan(case.op.name, x, axis=axis, direction=direction, groups=groups)
    return Traffic(plan.reads, plan.writes)


def _core() -> Any:
    try:
        return importlib.import_module("fastnorm._core")
    except ImportError:
        return None


def description() -> str:
    """What the floor was measured with."""
    return "NumPy copy and add (no extension)" if _core() is None else "non-temporal copy and add"


def floor(inputs: Inputs, out: Array, direction: Direction) -> Callable[[], Any]:
    """A call that takes the floor's time. Overwrites `out`, an array of x's size."""
    core = _core()
    x, dout, target = _words(inputs.x), _words(inputs.dout), _words(out)
    if direction == "forward":
        return (lambda: np.copyto(target, x)) if core is None else (lambda: core.stream_copy(x, target))
    return (lambda: np.add(x, dout, out=target)) if core is None else (lambda: core.stream_add(x, dout, target))


def reading(x: Array) -> Callable[[], Any]:
    """A call that reads x and writes nothing: the floor of statistics."""
    core, words = _core(), _words(x)
    return (lambda: np.max(words)) if core is None else (lambda: core.stream_read(words))


def plan_floor(inputs: Inputs, out: Array, direction: Direction, moved: Traffic) -> Callable[[], Any]:
    """The floor with the reads that a plan does beyond one pass, ahead of it."""
    core = _core()
    read: Callable[[Array], Any] = np.max if core is None else core.stream_read
    sources = [_words(inputs.x)] if direction == "forward" else [_words(inputs.dout), _words(inputs.x)]
    again = list(islice(cycle(sources), moved.reads - ONE_PASS[direction].reads))
    once = floor(inputs, out, direction)

    def call() -> None:
        for array in again:
            read(array)
        once()

    return call


def in_cache(inputs: Inputs, out: Array, direction: Direction) -> dict[str, Callable[[], Any]]:
    """How -> a call that does what `floor` does: NumPy's on one thread, non-temporal and plain on all of them."""
    x, dout, target = _words(inputs.x), _words(inputs.dout), _words(out)
    ways: dict[str, Callable[[], Any]] = {
        "plain": partial(np.copyto, target, x) if direction == "forward" else partial(np.add, x, dout, out=target)
    }
    if _core() is not None:
        ways["non-temporal"] = floor(inputs, out, direction)
    compiled = _threaded()
    if compiled is not None:
        copy, add = compiled
        ways["plain, threads"] = partial(copy, x, target) if direction == "forward" else partial(add, x, dout, target)
    return ways


@functools.cache
def _threaded() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """A copy and an addition that all threads share; None where Numba does not load."""
    try:
        numba: Any = importlib.import_module("numba")
    except ImportError:
        return None

    @numba.njit(parallel=True)  # type: ignore[untyped-decorator]
    def copy(x: Any, target: Any) -> None:
        for i in numba.prange(target.size):
            target[i] = x[i]

    @numba.njit(parallel=True)  # type: ignore[untyped-decorator]
    def add(x: Any, dout: Any, target: Any) -> None:
        for i in numba.prange(target.size):
            target[i] = x[i] + dout[i]

    numba.set_num_threads(min(fastnorm.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    return copy, add


def _words(array: Array) -> Array:
    """The memory of a dense array as unsigned integers, which any addition takes at the same speed."""
    memory = flat(array).view(np.uint8)
    return memory.view(np.uint32) if memory.size % 4 == 0 else memory
