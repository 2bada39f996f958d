"""Numba's simulator, quicker and stricter: the threads of a block run one after the other.

As it comes, a block is so many Python threads that run at once, and a loop that polls them for barriers: nearly all of
the time goes into threads in each other's way. Here a thread runs until the next barrier, then hands over to the next
one, in an order that is drawn anew, from one seed, at every barrier: where one is missing, results are wrong, and the
same ones each time. Shared memory is NaN (-1) where a block begins.

`install()` puts this in the place of the simulator's own; NUMBA_ENABLE_CUDASIM=1 has to be set.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest


class _Thread(threading.Thread):
    """One of the threads that blocks run in; the simulator's `cuda` reads blockIdx and threadIdx from it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.turn = threading.Lock()
        self.turn.acquire()
        self.block: Any = None
        self.blockIdx: Any = None
        self.threadIdx: Any = None
        self.start()

    def run(self) -> None:
        while True:
            self.turn.acquire()
            block = self.block
            try:
                if not block.errors:
                    block.function()
            except BaseException as error:
                block.errors.append(error)
            block.hand_over()

    def syncthreads(self) -> None:
        self.block.waiting.append(self)
        self.block.hand_over()
        self.turn.acquire()
        if self.block.errors:
            raise RuntimeError("another thread of the block failed")


_threads: list[_Thread] = []
_random = random.Random(1)


def _shuffled(threads: list[_Thread]) -> Iterator[_Thread]:
    return iter(_random.sample(threads, len(threads)))


class _Block:
    """A block that runs: whose turn it is, and who waits at the barrier."""

    def __init__(self, function: Callable[[], None], threads: list[_Thread]) -> None:
        self.function = function
        self.errors: list[BaseException] = []
        self.waiting: list[_Thread] = []
        self.next = _shuffled(threads)
        self.ended = threading.Lock()
        self.ended.acquire()

    def hand_over(self) -> None:
        """To the next thread; after the last one, past the barrier."""
        thread = next(self.next, None)
        if thread is None and self.waiting:
            self.next, self.waiting = _shuffled(self.waiting), []
            thread = next(self.next)
        (self.ended if thread is None else thread.turn).release()


class _BlockManager:
    """The interface of the simulator's own."""

    def __init__(self, function: Callable[..., None], grid_dim: Any, block_dim: Any, debug: bool) -> None:
        self._function, self._size = function, block_dim

    def run(self, grid_point: Any, *arguments: Any) -> None:
        from numba.cuda.simulator.kernelapi import Dim3

        count = int(np.prod(self._size))
        _threads.extend(_Thread() for _ in range(count - len(_threads)))
        threads = _threads[:count]
        block = _Block(functools.partial(self._function, *arguments), threads)
        here = Dim3(*grid_point)
        for thread, position in zip(threads, np.ndindex(*self._size), strict=True):
            thread.block, thread.blockIdx, thread.threadIdx = block, here, Dim3(*position)
        block.hand_over()
        block.ended.acquire()
        if block.errors:
            raise block.errors[0]


class _Shared:
    """Shared memory by the line that asks for it; a block begins with arrays of its own."""

    def __init__(self, dynamic_bytes: int) -> None:
        self._arrays: dict[tuple[Any, int], Any] = {}
        self._block: Any = None

    def array(self, shape: Any, dtype: Any, alignment: Any = None) -> Any:
        thread: Any = threading.current_thread()
        if thread.block is not self._block:
            self._block, self._arrays = thread.block, {}
        caller = sys._getframe(1)
        line = caller.f_code, caller.f_lineno
        if line not in self._arrays:
            unset = np.nan if np.issubdtype(dtype, np.floating) else -1
            self._arrays[line] = np.full(shape, unset, dtype)
        return self._arrays[line]


def install() -> None:
    from numba.cuda.simulator import kernel, kernelapi

    kernel.BlockManager = _BlockManager
    kernelapi.FakeCUDAShared = _Shared


def small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Plans of few threads, registers and elements: some hundred elements take every way through the kernels."""
    from fastnorm.backends.numba_cuda import _plan, _rows, _runs, kernels

    for module, name, value in (
        (_plan, "BLOCK", 32), (_plan, "FORWARD_BLOCK", 64), (_plan, "BACKWARD_BLOCK", 64), (_plan, "MOST_THREADS", 64),
        (_plan, "FORWARD_ELEMENTS", 8), (_plan, "BACKWARD_ELEMENTS", 4), (_plan, "CHUNK", 256), (_plan, "BLOCKS", 4),
        (_rows, "SLICES", 2), (_runs, "FINISHED", 2), (kernels, "FINISH_THREADS", 64),
    ):  # fmt: skip
        patch.setattr(module, name, value)
    # Its shared memory is of SLICES: one made for these plans serves them alone.
    patch.setattr(_rows, "finish", functools.cache(_rows.finish.__wrapped__))
