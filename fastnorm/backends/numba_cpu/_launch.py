"""How kernels are compiled and started: `compiled`, `Kernel`, threads, processes.

Numba offers three threading layers, each with a way to end the process: under omp a forked child that
enters it is killed, workqueue aborts when two Python threads enter it at once. So a forked child runs
serially, and workqueue is entered under a lock, serially where it is taken.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba as _typed_numba

from fastnorm.backends.numba_cpu import _tasks

numba: Any = _typed_numba  # the stubs of Numba know only part of what it exports

PARALLEL_FROM = 1 << 15
"""Elements from which a kernel runs in parallel: a parallel region costs about 2 us with omp."""

RANGES = 8
"""Ranges a thread that tasks are handed out in: enough to balance, and slabs within one share lines of the output.
With a range a slab, 14x14 forward took 2.7 ms instead of 2.2."""

compiled = numba.njit(inline="always", error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A function that kernels call. Numba inlines it before it infers types: a function of its own would be optimized by
itself and again wherever it is linked in, and arrays passed to it cost more than a short row."""

# ---- threads and processes ------------------------------------------------------------------------

_threads = 1
_forked = False
_workqueue = threading.Lock()


def set_num_threads(count: int) -> None:
    """Use at most this many threads from now on."""
    global _threads
    _threads = min(count, numba.config.NUMBA_NUM_THREADS)


def threads() -> int:
    """The number of threads that a large call uses in this process."""
    return 1 if _forked else _threads


def _after_fork() -> None:
    global _forked, _workqueue
    _forked = True
    _workqueue = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# ---- kernels --------------------------------------------------------------------------------------


def _sources_stamp() -> tuple[tuple[float, int], ...]:
    """Modification time and size of every source that kernels are compiled from."""
    here = Path(__file__).parent
    files = (*sorted(here.glob("*.py")), here.parent / "numba_formulas.py")
    return tuple((stat.st_mtime, stat.st_size) for stat in (file.stat() for file in files))


_parallel_loop: Any = None
_parallel_loop_lock = threading.Lock()


def _launcher() -> int:
    """Address of the loop over tasks; compiled on first use, cached on disk."""
    global _parallel_loop
    with _parallel_loop_lock:
        if _parallel_loop is None:
            decorator = numba.cfunc("void(int64,int64,int64,int64)", cache=True, parallel=True)
            _parallel_loop = decorator(_tasks.run_parallel)
        address: int = _parallel_loop.address
    return address


class Kernel:
    """A function of (launcher, begin, end, *arguments), called with (elements it works through, tasks, *arguments).

    It works on tasks begin..end, or, given a launcher, hands out 0..end to itself in `begin` ranges.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._run = numba.njit(nogil=True, error_model="numpy", cache=True, no_cfunc_wrapper=True)(function)
        # The cache notices changes of the file that holds a function, not of those it calls.
        self._run._cache._cache_file._source_stamp = _sources_stamp()

    def __call__(self, elements: int, tasks: int, *arguments: Any) -> None:
        if elements < PARALLEL_FROM or threads() == 1 or tasks == 1:
            self._run(0, 0, tasks, *arguments)
            return
        before = numba.get_num_threads()  # per Python thread; also starts the threading layer
        if numba.threading_layer() != "workqueue":
            self._run_parallel(before, tasks, arguments)
        elif _workqueue.acquire(blocking=False):
            try:
                self._run_parallel(before, tasks, arguments)
            finally:
                _workqueue.release()
        else:
            self._run(0, 0, tasks, *arguments)

    def _run_parallel(self, before: int, tasks: int, arguments: tuple[Any, ...]) -> None:
        """Run on `_threads` threads, and leave the caller's own Numba setting as it was."""
        launcher, ranges = _launcher(), min(tasks, RANGES * _threads)
        if before == _threads:
            self._run(launcher, ranges, tasks, *arguments)
            return
        numba.set_num_threads(_threads)
        try:
            self._run(launcher, ranges, tasks, *arguments)
        finally:
            numba.set_num_threads(before)
