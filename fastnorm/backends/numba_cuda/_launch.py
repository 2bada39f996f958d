"""Kernels: compiled by numba-cuda to PTX, kept on disk, launched through the driver with plain numbers.

The driver's launch with a tuple of numbers costs a few microseconds; Numba's own looks at every argument's type
again and costs 4 more for each array.
"""

# mypy: ignore-errors
# numba-cuda and the driver's bindings come without types.

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba_cuda
from numba import cuda, types

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
"""Whether kernels run in Numba's simulator, on the host's memory."""
LEAST_CAPABILITY = (8, 0)
"""The first with bfloat16 conversions and 40 MB of L2."""

_TYPES = {"q": (types.int64, ctypes.c_int64), "d": (types.float64, ctypes.c_double)}
_lock = threading.RLock()


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call. Always inlined: compiling one by itself would ask for a device."""
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


class Kernel:
    """A function of scalars over a grid, compiled once for each capability and loaded once for each device."""

    def __init__(self, name: str, function: Callable[..., None], arguments: str, threads: int) -> None:
        """arguments: a letter each, q for an integer or address, d for a float. threads: most of a block."""
        self.name = name
        """Unique: function and variant."""
        self.threads = threads
        self._function = function
        self._types = types.void(*(_TYPES[letter][0] for letter in arguments))
        self._ctypes = tuple(_TYPES[letter][1] for letter in arguments)
        self._loaded: dict[int, Any] = {}
        self._simulated = cuda.jit(function) if SIMULATED else None

    def launch(self, array: Any, grid: int, block: int, *arguments: Any) -> None:
        """On the array's device and stream."""
        if SIMULATED:
            self._simulated[grid, block](*arguments)
            return
        handle, context = self._loaded.get(array.device) or self._load(array.device)
        driver = _driver()
        _checked(driver.cuCtxPushCurrent(context))
        try:
            _checked(
                driver.cuLaunchKernel(
                    handle, grid, 1, 1, block, 1, 1, 0, array.stream, (arguments, self._ctypes), 0
                )
            )  # fmt: skip
        finally:
            driver.cuCtxPopCurrent()

    def ptx(self, capability: tuple[int, int]) -> str:
        """The kernel's PTX; needs no GPU."""
        with _lock:
            text, _ = cuda.compile(
                self._function, self._types, cc=capability, device=False, abi="numba", output="ptx",
                launch_bounds=self.threads,
            )  # fmt: skip
        return text.decode() if isinstance(text, bytes) else text

    def _load(self, ordinal: int) -> Any:
        with _lock:
            if ordinal not in self._loaded:
                driver, (context, capability, _) = _driver(), _device(ordinal)
                text = _kept(f"{self.name}-{self._types}-{self.threads}", capability, lambda: self.ptx(capability))
                entry = re.search(r"\.entry\s+(\w+)", text)[1]
                _checked(driver.cuCtxPushCurrent(context))
                try:
                    module = _checked(driver.cuModuleLoadData(text.encode() + b"\0"))
                    handle = _checked(driver.cuModuleGetFunction(module, entry.encode()))
                finally:
                    driver.cuCtxPopCurrent()
                self._loaded[ordinal] = handle, context
        return self._loaded[ordinal]


# ---- the driver -----------------------------------------------------------------------------------


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    _checked(driver.cuInit(0))
    return driver


def _checked(answer: Any) -> Any:
    """What a call to the driver answered, without its status."""
    status, *values = answer
    if status.value != 0:
        kind = MemoryError if status.name == "CUDA_ERROR_OUT_OF_MEMORY" else RuntimeError
        raise kind(f"the CUDA driver answered {status.name}")
    return values[0] if values else None


@functools.cache
def _device(ordinal: int) -> tuple[Any, tuple[int, int], int]:
    """The primary context, which PyTorch, CuPy and Numba use too, the capability and the bytes of L2."""
    driver = _driver()
    handle = _checked(driver.cuDeviceGet(ordinal))
    of = driver.CUdevice_attribute
    major, minor, level2 = (
        _checked(driver.cuDeviceGetAttribute(attribute, handle))
        for attribute in (
            of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            of.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE,
        )
    )
    return _checked(driver.cuDevicePrimaryCtxRetain(handle)), (major, minor), level2


def level2(ordinal: int) -> int:
    """Bytes of the device's L2."""
    return 1 << 20 if SIMULATED else _device(ordinal)[2]


def driver_problem() -> str:
    """Why no device can serve, in a sentence; empty where one can."""
    if SIMULATED:
        return ""
    try:
        count = _checked(_driver().cuDeviceGetCount())
    except Exception as error:  # the bindings raise what they like where no driver is
        return f"no CUDA driver could be used: {error}"
    return "" if count else "the CUDA driver finds no device"


@functools.cache
def check_device(ordinal: int) -> None:
    """ValueError where the device is too old for the kernels."""
    if SIMULATED:
        return
    capability = _device(ordinal)[1]
    if capability < LEAST_CAPABILITY:
        had, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        raise ValueError(f"x: cuda:{ordinal} has compute capability {had}, expected at least {least}")


# ---- compiled code on disk ------------------------------------------------------------------------


@functools.cache
def _stamp() -> str:
    """Of all that decides what the compiler makes of a kernel."""
    total = hashlib.sha256(f"{numba.__version__} {numba_cuda.__version__}".encode())
    here = Path(__file__).parent
    for source in (*sorted(here.glob("*.py")), here.parent / "numba_formulas.py"):
        total.update(source.read_bytes())
    return total.hexdigest()


def _directory() -> Path:
    """NUMBA_CACHE_DIR where it is set, as for the backend 'numba', else the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(numba.config.CACHE_DIR or home / "fastnorm") / "cuda"


def _kept(name: str, capability: tuple[int, int], make: Callable[[], str]) -> str:
    """The text made under this name before, else made now and kept. A disk that refuses costs only time."""
    key = hashlib.sha256(f"{_stamp()} {name} {capability}".encode()).hexdigest()
    try:
        path = _directory() / f"{key}.ptx"
        return path.read_text()
    except (OSError, RuntimeError):
        text = make()
    with contextlib.suppress(OSError, RuntimeError):
        path = _directory() / f"{key}.ptx"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)  # at once, also beside another process
    return text
