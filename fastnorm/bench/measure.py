"""Timing in turns, and the peak memory of a call."""

from __future__ import annotations

import gc
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastnorm import _collector


class Timing(NamedTuple):
    best: float
    median: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(min(seconds), statistics.median(seconds), len(seconds))


BRIEF = 0.5
"""Seconds that every call is worth."""


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, budget: float, least: int, most: int, brief: float = BRIEF,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:  # fmt: skip
    """Time the calls in turns, so that a disturbance of the machine hits all of them alike.

    Every call gets `least` rounds, and a fast one as many as fill `brief` seconds. After that it takes part while
    all of the calls at its pace would fit what is left of `budget` (seconds, all calls together): slow ones
    drop out first, fast ones go on, up to `most` rounds. A result is dropped before the next call, outside of
    what is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    left = budget
    with _collector.paused():
        for turn in range(most):
            playing = [
                name
                for name, own in seconds.items()
                if turn < least or min(own) * len(calls) < left or sum(own) + min(own) < brief
            ]
            for name in playing:
                tick(name)
                start = time.perf_counter()
                result = calls[name]()
                seconds[name].append(time.perf_counter() - start)
                del result
                left -= seconds[name][-1]
    return {name: Timing.of(times) for name, times in seconds.items()}


BURSTS, BURST = 6, 0.02
"""How often each call gets a burst, and the seconds of one."""
_TICKS = 50e-6
"""Seconds of calls between two looks at the clock, which costs some 0.1 us."""


def bursts(
    calls: Mapping[str, Callable[[], Any]], *, tick: Callable[[str], None] = lambda name: None
) -> dict[str, Timing]:
    """Time each call while its data stay in a cache: repeated for BURST seconds, then the next one's burst.

    In turns call by call, as `interleaved` has it, the others' arrays would push a call's own out of the cache.
    A burst begins with a call that isn't timed, and has three that are at least. `rounds` counts timed calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds = dict.fromkeys(calls, 0)
    clock = time.perf_counter
    with _collector.paused():
        for _ in range(BURSTS):
            for name, call in calls.items():
                tick(name)
                call()
                start = clock()
                call()
                together = max(1, int(_TICKS / max(clock() - start, 1e-7)))
                end = clock() + BURST
                done = 0
                while done < 3 or clock() < end:
                    start = clock()
                    for _ in range(together):
                        call()
                    seconds[name].append((clock() - start) / together)
                    done += 1
                rounds[name] += done * together
    return {name: Timing.of(times)._replace(rounds=rounds[name]) for name, times in seconds.items()}


class Memory(NamedTuple):
    """The peak of one call beyond what was there before it, in bytes; its results count."""

    traced: int
    """What Python and NumPy allocated, exactly (tracemalloc)."""
    resident: int | None
    """The process's resident memory, which has the allocations of extensions in it too; None where the
    system does not tell. A coarse figure: whole pages, and none that a call gets from memory already held."""

    @property
    def peak(self) -> int:
        return max(self.traced, self.resident or 0)


def with_memory(call: Callable[[], Any]) -> tuple[Any, Memory, float]:
    """(what the call returned, its memory, its time while that was watched)"""
    gc.collect()
    before = _reset_peak_resident()
    tracemalloc.start()
    try:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        _, traced = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    peak = _status("VmHWM")
    return result, Memory(traced, None if before is None or peak is None else max(0, peak - before)), seconds


def _reset_peak_resident() -> int | None:
    """Set the process's peak resident memory to the present one and return it (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    return _kilobytes("/proc/self/status", key)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not tell."""
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    if available is None and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available


def _kilobytes(path: str, key: str) -> int | None:
    try:
        with open(path) as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
