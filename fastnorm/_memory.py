"""Where outputs get their memory: from blocks of outputs that were dropped, and how many of those may wait.

The system hands out new memory page by page and clears it, which takes longer than a normalization. So the
block of a large output that nobody refers to any more is kept for the next one of about its size. csrc/pool.cpp
keeps the blocks; here is what a user sees of it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_Array = np.ndarray[Any, Any]

VARIABLE = "FASTNORM_OUTPUT_POOL"
CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux tells what a container may use; cgroups of version 2 and 1."""
_SHARE = 8
"""The pool may hold an eighth of the memory: 3 GB of 24, so that a forward and a backward of 1 GB profit both."""

# Like numpy.empty and numpy.empty_like(subok=False), from the pool where that is worth it. `pair` makes two vectors of
# float64. `copy_transposed` is target[...] = source, if it answers True, where elements lie in another order.
empty: Callable[[Sequence[int], np.dtype[Any]], _Array]
empty_like: Callable[..., _Array]
pair: Callable[[int], tuple[_Array, _Array]]
copy_transposed: Callable[[_Array, _Array], bool]
try:
    from fastnorm._core import clear_output_pool as _clear
    from fastnorm._core import copy_transposed, empty, empty_like, pair
    from fastnorm._core import output_pool as _state
    from fastnorm._core import set_output_pool as _set_limit
except ImportError:  # NumPy allocates, and the limit stays 0

    def empty(shape: Sequence[int], dtype: np.dtype[Any], /) -> _Array:
        return np.empty(shape, dtype)

    def empty_like(prototype: _Array, dtype: np.dtype[Any] | None = None, /) -> _Array:
        return np.empty_like(prototype, dtype=dtype, subok=False)

    def pair(length: int, /) -> tuple[_Array, _Array]:
        return np.empty(length), np.empty(length)

    def copy_transposed(target: _Array, source: _Array, /) -> bool:
        return False

    def _state() -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 0

    def _set_limit(limit: int, /) -> None:
        pass

    def _clear() -> None:
        pass


class OutputPool(NamedTuple):
    """What `output_pool()` returns. Sizes are in bytes."""

    limit: int
    """What idle blocks may take together; 0 where there is no pool."""
    held: int
    """What they take now."""
    blocks: int
    """How many there are."""
    hits: int
    """Outputs that got an idle block, since the start of the process."""
    misses: int
    """Outputs large enough for a block that got new memory."""


def output_pool() -> OutputPool:
    """The bound on memory kept for further outputs, and what is kept.

    The limit is 0 where the C++ extension is missing: NumPy then allocates every output anew.
    """
    return OutputPool(*_state())


def set_output_pool(limit_bytes: int) -> None:
    """Let up to `limit_bytes` of dropped outputs wait to become further ones; 0 gives all back and stops it.

    The start value is FASTNORM_OUTPUT_POOL, in bytes or as in 256M or 2G, else an eighth of the memory that the
    machine or the container has. Without the C++ extension there is no pool and nothing happens.

    Raises TypeError if limit_bytes is no whole number, ValueError if it is negative or beyond sys.maxsize.
    """
    if isinstance(limit_bytes, bool) or not hasattr(limit_bytes, "__index__"):
        raise TypeError(f"limit_bytes: expected a whole number of bytes, got {limit_bytes!r}")
    _set_limit(_checked("limit_bytes", limit_bytes))


def _checked(name: str, limit: int) -> int:
    if not 0 <= limit <= sys.maxsize:
        raise ValueError(f"{name}: expected from 0 to {sys.maxsize} bytes, got {limit}")
    return limit


def clear_output_pool() -> None:
    """Give the memory that waits for further outputs back to the system. The limit stays."""
    _clear()


def _memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the container's if that is less."""
    try:
        bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        bounds = [8 << 30]  # a guess, where the system does not say
    for path in CONTAINER:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # 'max' is no bound
            bounds.append(int(text))
    return min(bounds)


def _start_value() -> int:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return _memory() // _SHARE
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text, re.ASCII | re.IGNORECASE)
    if found is None:
        raise ValueError(f"{VARIABLE}: expected bytes, or a number and K, M, G or T, as in 256M, got {text!r}")
    return _checked(VARIABLE, int(found[1]) << 10 * " KMGT".index(found[2].upper() or " "))


_set_limit(_start_value())
