"""The cuda backend: the kernels as a table, and what the ops need of device memory.

Kernels get descriptors of device arrays (`fastnorm._device.DeviceArray`) where other backends get NumPy arrays, and run
on the device and the stream of their first one.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

if find_spec("numba_cuda") is None:  # the target that is built into Numba is another, older one
    raise ImportError("needs the package numba-cuda, which is not installed: pip install 'fastnorm[cuda]'")

from numba import cuda

from fastnorm.backends.numba_cuda._copies import copy, current_device, device_array, fill, follow, mix
from fastnorm.backends.numba_cuda._launch import SIMULATED, check_device, driver_problem

if _problem := driver_problem():
    raise ImportError(_problem)

from fastnorm.backends.numba_cuda.kernels import (
    channel_apply,
    channel_backward,
    channel_backward_apply,
    channel_backward_reduce,
    channel_forward,
    channel_moments,
    channel_weighted_moments,
    dropout,
    group_backward,
    group_forward,
    group_moments,
    row_backward,
    row_forward,
    set_num_threads,
)

__all__ = [
    "channel_apply",
    "channel_backward",
    "channel_backward_apply",
    "channel_backward_reduce",
    "channel_forward",
    "channel_moments",
    "channel_weighted_moments",
    "check_device",
    "copy",
    "current_device",
    "describe",
    "device_array",
    "dropout",
    "fill",
    "follow",
    "group_backward",
    "group_forward",
    "group_moments",
    "mix",
    "row_backward",
    "row_forward",
    "set_num_threads",
]


def describe() -> dict[str, Any]:
    """Versions and devices, for `show_config()`."""
    found: dict[str, Any] = {"numba-cuda": metadata.version("numba-cuda")}
    if SIMULATED:
        return {**found, "devices": "Numba's simulator"}
    api: Any = cuda  # without types
    found["driver"] = "CUDA " + ".".join(map(str, api.cudadrv.driver.driver.get_version()))
    for device in api.gpus.lst:
        with api.gpus[device.id]:
            memory = api.current_context().get_memory_info().total
        name = device.name.decode() if isinstance(device.name, bytes) else device.name
        capability = ".".join(map(str, device.compute_capability))
        found[f"cuda:{device.id}"] = f"{name}, compute capability {capability}, {memory / 2**30:.1f} GiB"
    return found
