"""The kernels of a device for NumPy arrays: copied there, computed, copied back. Only for callers who ask for it.

Every call moves its inputs and its results over the bus and waits for them, which takes longer than the CPU backends
take for the whole. It is there to check the kernels against, and for a program that has to run once either way.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from fastnorm import _device
from fastnorm.backends import KernelTable, flat

OUTPUTS = frozenset({"y", "dx", "dgamma", "dbeta"})
"""Arguments that are written by every kernel that has them."""
STATISTICS = {
    "channel_moments": ("mean", "var"),
    "channel_forward": ("mean", "var"),
    "group_moments": ("mean", "var"),
    "group_forward": ("mean", "var"),
    "row_forward": ("mean", "var"),
    "channel_backward_reduce": ("sum_dy", "sum_dy_xhat"),
    "channel_backward": ("sum_dy", "sum_dy_xhat"),
    "group_backward": ("sum_dy", "sum_dy_xhat"),
}
"""Arguments that other kernels read."""


def hosted(backend: Any) -> KernelTable:
    """The table for NumPy arrays over one for device arrays."""
    names = (name for name in vars(KernelTable) if not name.startswith("_"))
    return cast(KernelTable, SimpleNamespace(**{name: _hosted(backend, name) for name in names}))


def _hosted(backend: Any, name: str) -> Any:
    kernel = getattr(backend, name)
    names = list(inspect.signature(getattr(KernelTable, name)).parameters)[1:]
    written = OUTPUTS.union(STATISTICS.get(name, ()))

    def call(*arguments: Any) -> None:
        device = backend.current_device()
        there: list[Any] = []
        back: list[Any] = []
        for argument, given in zip(names, arguments, strict=True):
            value: Any = given
            if isinstance(value, np.ndarray):
                # bfloat16, which Numba does not know, travels as whole numbers of its size
                raw = flat(value) if value.dtype.kind == "f" else flat(value).view(np.uint16)
                array = backend.device_array(raw.shape, raw.strides, raw.dtype, device, 0)
                if argument in written:
                    back.append((array, raw))
                else:
                    array.copy_to_device(raw)
                value = _device.described(argument, array)
                if raw.dtype.kind != "f":
                    value.dtype = _device.BFLOAT16
            there.append(value)
        kernel(*there)
        for array, raw in back:
            array.copy_to_host(raw)

    return call
