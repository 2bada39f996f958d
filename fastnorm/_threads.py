"""How many threads the CPU backends use: one number for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable


def _default() -> int:
    for variable in ("FASTNORM_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0].strip()
        if text:
            try:
                return checked(int(text), variable)
            except ValueError:
                if variable == "FASTNORM_NUM_THREADS":
                    raise ValueError(f"{variable}: expected a whole number from 1, got {text!r}") from None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked(count: int, name: str = "count") -> int:
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(f"{name}: expected a whole number of threads, got {count!r}")
    if not 1 <= count <= 1024:
        raise ValueError(f"{name}: expected from 1 to 1024 threads, got {count}")
    return int(count)


_count = _default()
_listeners: list[Callable[[int], None]] = []


def get_num_threads() -> int:
    """The number of threads that kernels may use."""
    return _count


def set_num_threads(count: int) -> None:
    """Let kernels use up to `count` threads, for the whole process.

    Results are bitwise the same for any count. The start value is FASTNORM_NUM_THREADS, else
    OMP_NUM_THREADS, else the number of CPUs that the process may run on.

    Raises TypeError if count is no whole number, ValueError if it is outside 1..1024.
    """
    global _count
    _count = checked(count)
    for listener in _listeners:
        listener(_count)


def subscribe(listener: Callable[[int], None]) -> None:
    """Tell a backend that has just been loaded the count, now and at every change."""
    listener(_count)
    _listeners.append(listener)
