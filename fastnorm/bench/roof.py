"""The memory floor: what an op that moves the unavoidable bytes, and computes nothing, would take.

    forward     a copy: one read, one write of the array
    backward    an addition of two arrays into a third: two reads, one write

Measured on the arrays of the case, in the same run, with the library's thread count. The extension does it
with non-temporal stores (a plain store first reads the line that it overwrites); without the extension
NumPy's copy and addition serve, and the report says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fastnorm.backends import Array, flat
from fastnorm.bench.cases import Direction, Inputs


def _core() -> Any:
    try:
        core = importlib.import_module("fastnorm._core")
    except ImportError:
        return None
    return core if hasattr(core, "stream_copy") and hasattr(core, "stream_add") else None


def description() -> str:
    """What the floor was measured with."""
    return "NumPy copy and add (no extension)" if _core() is None else "non-temporal copy and add"


def floor(inputs: Inputs, out: Array, direction: Direction) -> Callable[[], Any]:
    """A call that takes the floor's time. Overwrites `out`, an array of x's size."""
    core = _core()
    x, dout, target = _words(inputs.x), _words(inputs.dout), _words(out)
    if direction == "forward":
        return (lambda: np.copyto(target, x)) if core is None else (lambda: core.stream_copy(x, target))
    return (lambda: np.add(x, dout, out=target)) if core is None else (lambda: core.stream_add(x, dout, target))


def _words(array: Array) -> Array:
    """The memory of a dense array as unsigned integers, which any addition takes at the same speed."""
    memory = flat(array).view(np.uint8)
    return memory.view(np.uint32) if memory.size % 4 == 0 else memory
