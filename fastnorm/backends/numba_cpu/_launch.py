"""How kernels are started: `Kernel`, threads, processes.

Numba offers three threading layers, each with a way to end the process: under omp a forked child that
enters it is killed, workqueue aborts when two Python threads enter it at once. So a forked child runs
serially, and workqueue is entered under a lock, serially where it is taken.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numba as _typed_numba

from fastnorm.backends import Array
from fastnorm.backends.numba_cpu._compiler import kernel
from fastnorm.backends.numba_cpu._tasks import parallel_for

numba: Any = _typed_numba  # the stubs of Numba know only part of what it exports

PARALLEL_FROM = 1 << 15
"""Elements from which a kernel runs in parallel: a parallel region costs about 2 us with omp."""

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


class Kernel:
    """A function of (launcher, threads, step, begin, end, plan, *arguments), called with (elements it works through,
    plan, *arguments). The plan has a row for each step, the first column being the number of its tasks.

    It works on tasks begin..end of a step, or, given threads, hands out those of all steps to itself. LLVM unrolls
    its loops further than the vectors of four lines do, unless told not to.
    """

    def __init__(self, function: Callable[..., None], unroll: bool = True) -> None:
        self._run = kernel(function, unroll)

    def __call__(self, elements: int, plan: Array, *arguments: Any) -> None:
        if elements < PARALLEL_FROM or threads() == 1 or (len(plan) == 1 and plan.item(0) == 1):
            self._run(0, 1, 0, 0, 0, plan, *arguments)
            return
        before = numba.get_num_threads()  # per Python thread; also starts the threading layer
        if numba.threading_layer() != "workqueue":
            self._run_parallel(before, plan, arguments)
        elif _workqueue.acquire(blocking=False):
            try:
                self._run_parallel(before, plan, arguments)
            finally:
                _workqueue.release()
        else:
            self._run(0, 1, 0, 0, 0, plan, *arguments)

    def _run_parallel(self, before: int, plan: Array, arguments: tuple[Any, ...]) -> None:
        """Run on `_threads` threads, and leave the caller's own Numba setting as it was."""
        try:
            self._run(parallel_for(), _threads, 0, 0, 0, plan, *arguments)
        finally:
            if before != _threads:  # the layer has taken it for the thread's own setting
                numba.set_num_threads(before)
