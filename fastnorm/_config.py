"""What is installed and chosen: `show_config()`."""

from __future__ import annotations

import importlib
import os
import platform
from typing import Any, Literal, overload

from fastnorm import _device, _dispatch, _memory, _threads

ENVIRONMENT = (
    "FASTNORM_BACKEND",
    "FASTNORM_NUM_THREADS",
    "FASTNORM_ISA",
    "FASTNORM_OUTPUT_POOL",
    "OMP_NUM_THREADS",
    "NUMBA_THREADING_LAYER",
)


def _version(distribution: str) -> str | None:
    """The installed version, without importing the package."""
    from importlib import metadata  # slow, and wanted here only

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    try:
        core: Any = importlib.import_module("fastnorm._core")
    except ModuleNotFoundError:
        return {"available": False, "reason": "not built; a C++ compiler is needed when the package is installed"}
    except ImportError as error:
        return {"available": False, "reason": str(error)}
    return {
        "available": True,
        "instruction set": core.isa(),
        "instruction sets": list(core.isas()),
        **core.build_info(),
    }


def _devices() -> dict[str, Any]:
    """Driver and devices of the cuda backend."""
    for row in _dispatch.backends():
        if row.name == _dispatch.ON_DEVICE and not row.available:
            return {"available": False, "reason": row.reason}
    found: dict[str, Any] = _device.backend().describe()
    return {"available": True, **found}


def _default_backend() -> str:
    try:
        return _dispatch.name_of(_dispatch.kernels(None))
    except ValueError as error:
        return f"none: {error}"


def _gather() -> dict[str, Any]:
    import fastnorm

    return {
        "versions": {
            "fastnorm": fastnorm.__version__,
            "python": platform.python_version(),
            "numpy": _version("numpy"),
            "numba": _version("numba"),
            "numba-cuda": _version("numba-cuda"),
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "extension": _extension(),
        "cuda": _devices(),
        "threads": _threads.get_num_threads(),
        "output pool": _memory.output_pool()._asdict(),
        "backends": {row.name: row.reason or "available" for row in _dispatch.backends()},
        "default backend": _default_backend(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _lines(section: dict[str, Any], indent: str = "") -> list[str]:
    width = max(map(len, section), default=0) + 1
    lines = []
    for key, value in section.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *(_lines(value, indent + "  ") or [f"{indent}  none"])]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{key + ':':<{width}} {text}")
    return lines


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Print versions, the extension and its instruction set, threads, and every backend with the reason where
    it cannot serve. With mode='dicts' return them as nested dictionaries instead, as `numpy.show_config` does.

    Loads the backends. Raises ValueError for another mode.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode: expected 'stdout' or 'dicts', got {mode!r}")
    config = _gather()
    if mode == "dicts":
        return config
    print("\n".join(_lines(config)))
    return None
