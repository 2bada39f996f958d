"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def description() -> dict[str, Any]:
    """Processor, cores, caches, memory, system; what the system does not tell is left out."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "transparent huge pages": _huge_pages(),
    }
    return {key: value for key, value in found.items() if value}


class OtherPrograms:
    """How busy other programs keep the CPUs that this process may use, from its making on (Linux; else 0)."""

    def __init__(self) -> None:
        self._start = self._now()

    def cpus(self) -> float:
        """The number of CPUs that they used on average."""
        wall, busy, own = (now - before for now, before in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / wall if busy and wall else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), _busy_seconds(), time.process_time()


def _busy_seconds() -> float:
    """Seconds that our CPUs were not idle since the start of the system, all programs together."""
    if not hasattr(os, "sched_getaffinity"):
        return 0.0
    names = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    ticks = 0
    for line in _text("/proc/stat").splitlines():
        name, *counts = line.split()
        if name in names:
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, counts[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Sizes as the first core sees them, such as {'L1d': '48K', 'L2': '1024K', 'L3': '32768K'}."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(index / name).strip() for name in ("level", "type", "size"))
        if size and kind != "Instruction":
            sizes[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return sizes


def cache_bytes(caches: Mapping[str, str]) -> dict[str, int]:
    """{'L3': '32768K'} -> {'L3': 33554432}; without those that the system tells in another way."""
    return {name: int(size[:-1]) << 10 for name, size in caches.items() if size[-1:] == "K" and size[:-1].isdecimal()}


def _memory() -> str:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return f"{int(line.split()[1]) / 2**20:.0f} GiB"
    return ""


def _huge_pages() -> str:
    chosen = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    return chosen[chosen.find("[") + 1 : chosen.find("]")] if "[" in chosen else ""


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
