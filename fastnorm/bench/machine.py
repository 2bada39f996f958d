"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
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
