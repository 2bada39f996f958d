"""Which backend serves a call: the ordered list, lazy loading, refusal reasons, the choice."""

from __future__ import annotations

import importlib
import os
from types import TracebackType
from typing import Any, NamedTuple, cast

from fastnorm import _device, _threads
from fastnorm.backends import KernelTable

# Best first: without a request the first one that loads serves, in host memory. A new backend is one line here.
_MODULES = {
    "cpp": "fastnorm.backends.cpp",
    "numba": "fastnorm.backends.numba_cpu",
    "cuda": "fastnorm.backends.numba_cuda.table",
    "numpy": "fastnorm.reference.kernels",
}


ON_DEVICE = "cuda"
"""The backend of arrays on a device. One in host memory gets there only where the caller names it."""


class BackendInfo(NamedTuple):
    """A row of `backends()`."""

    name: str
    available: bool
    reason: str
    """Why it is not available; empty where it is."""


class BackendUnavailableError(ValueError):
    """A backend was asked for by name and cannot serve."""


_loaded: dict[str, KernelTable] = {}
_refused: dict[str, str] = {}
_active: KernelTable | None = None
_chosen: str | None = None
"""The name that `use_backend` was given."""


def _load(name: str) -> KernelTable | None:
    """The backend's table, imported on first use; None with the reason noted where it refuses."""
    if name in _loaded:
        return _loaded[name]
    if name in _refused:
        return None
    module_name = _MODULES[name]
    try:
        table: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        _refused[name] = (
            "not part of this version"
            if module_name.startswith(missing)
            else f"needs the module {missing!r}, which is not installed"
        )
        return None
    except ImportError as error:
        _refused[name] = str(error)
        return None
    if not isinstance(table, KernelTable):
        lacking = [kernel for kernel in vars(KernelTable) if kernel[0] != "_" and not hasattr(table, kernel)]
        _refused[name] = f"{module_name} lacks {', '.join(lacking)}"
        return None
    if name == ON_DEVICE:
        from fastnorm._hosted import hosted  # wanted here only

        table = hosted(table)
    _loaded[name] = table
    _threads.subscribe(table.set_num_threads)
    return table


def _checked_name(name: str, argument: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected the name of a backend, got {name!r}")
    if name not in _MODULES:
        raise ValueError(f"{argument}: unknown backend {name!r}, expected one of {', '.join(_MODULES)}")
    return name


def _require(name: str, argument: str) -> KernelTable:
    table = _load(_checked_name(name, argument))
    if table is None:
        raise BackendUnavailableError(f"{argument}: backend {name!r} is not available: {_refused[name]}")
    return table


def _default() -> KernelTable:
    requested = os.environ.get("FASTNORM_BACKEND")
    if requested:
        return _require(requested, "FASTNORM_BACKEND")
    for name in _MODULES:
        table = None if name == ON_DEVICE else _load(name)
        if table is not None:
            return table
    raise BackendUnavailableError("no backend is available: " + "; ".join(f"{n}: {r}" for n, r in _refused.items()))


def kernels(backend: str | None = None) -> KernelTable:
    """The table that serves a call with this `backend` argument. A named one never falls back."""
    global _active
    if backend is not None:
        loaded = _loaded.get(backend) if type(backend) is str else None
        return _require(backend, "backend") if loaded is None else loaded
    if _active is None:
        _active = _default()
    return _active


def kernels_for(x: Any, table: KernelTable, backend: str | None) -> KernelTable:
    """The table for a call on x, an array or a descriptor: `table`, from `kernels(backend)`, in host memory.

    On a device it is the cuda backend itself. ValueError where another was chosen or the device is too old for it,
    BackendUnavailableError where it cannot be loaded.
    """
    if not _device.on_device(x):
        return table
    named = backend or _chosen or os.environ.get("FASTNORM_BACKEND") or ON_DEVICE
    if named != ON_DEVICE:
        raise ValueError(f"backend: {named!r} was chosen, which works in host memory, but x is on {x.place}")
    _require(ON_DEVICE, "x")
    found = _device.backend()
    found.check_device(x.device)
    return cast(KernelTable, found)


def name_of(table: KernelTable) -> str:
    """The name under which a table is listed."""
    return next(name for name, loaded in _loaded.items() if loaded is table)


def backends() -> list[BackendInfo]:
    """Every backend in order of preference, whether it can serve here, and if not, why."""
    rows = []
    for name in _MODULES:
        available = _load(name) is not None
        rows.append(BackendInfo(name, available, "" if available else _refused[name]))
    return rows


class use_backend:  # noqa: N801 (called like a function)
    """Choose the backend of calls that name none: as a statement, or for the length of a `with`.

        fastnorm.use_backend("numba")               # from here on
        with fastnorm.use_backend("numpy"): ...     # within the block only

    `None` returns to the default order (or FASTNORM_BACKEND). The choice holds for the whole process,
    all threads included. Raises ValueError for an unknown name, BackendUnavailableError with the reason for
    one that cannot serve; the choice is then as before.
    """

    def __init__(self, name: str | None) -> None:
        global _active, _chosen
        table = None if name is None else _require(name, "name")
        self._before = _active, _chosen
        _active, _chosen = table, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active, _chosen
        _active, _chosen = self._before
