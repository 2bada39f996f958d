"""The backend 'numba': the kernel contract on the CPU, compiled by Numba on first use.

This module is the table. Its functions make flat, writable, Numba-typed views of their arguments and pick one
of the ways to cut the work: `_columns` where adjacent elements belong to different channels, `_runs` where a
channel is long runs, `_rows` for the row family. Which of the two forms of a kernel runs, one pass with the
data kept in the cache or two passes with more tasks, depends on the threads too; both give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm.backends import Array, flat
from fastnorm.backends.numba_cpu import _columns, _rows, _runs
from fastnorm.backends.numba_cpu._launch import set_num_threads, threads

__all__ = [
    "channel_apply",
    "channel_backward",
    "channel_backward_apply",
    "channel_backward_reduce",
    "channel_forward",
    "channel_moments",
    "row_backward",
    "row_forward",
    "set_num_threads",
]

SHORT_RUN = 64
"""Runs shorter than this are worked on as columns: they would hardly fill a loop over vectors."""
SLAB = 1 << 18
"""Bytes of a group of channels of short runs that one task takes: a quarter of L2."""
LARGEST_SLAB = 1 << 22
"""Bytes of one channel or row that are worth keeping for a second pass: a share of L3."""
LARGEST_BLOCK = 1 << 20
"""The same for a block of columns, whose pieces lie far apart: on 2 MB and more one pass took as long as two."""
LARGE = 1 << 24
"""Bytes of an array from which a second pass finds little of it in L3."""
LONG_ROW, FEW_ROWS = 1 << 16, 16


class _Writable:
    """The memory of a read-only array, as a writable array to Numba, which would compile all again for it."""

    def __init__(self, array: Array) -> None:
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}
        self._array = array


def _plain(array: Array) -> Array:
    """The array in the one type that kernels are compiled for; those it is passed to as input do not write."""
    return array if array.flags.writeable else np.asarray(_Writable(array))


def _storage(array: Array) -> Array:
    """1-D elements as Numba knows them: float16 as uint16, bfloat16 as int16."""
    elements = flat(array)
    if elements.itemsize == 2:
        elements = elements.view(np.uint16 if elements.dtype == np.float16 else np.int16)
    return _plain(elements)


def _parameter(values: Array | None, like: Array, absent: float, length: int) -> Array:
    """gamma or beta; an absent one is an array of ones or zeros, so that there is one loop."""
    if values is not None:
        return _plain(values)
    return np.full(length, absent, np.float64 if like.dtype == np.float64 else np.float32)


def _by_columns(outer: int, inner: int) -> bool:
    return inner < SHORT_RUN and outer >= 8


def _in_one_pass(elements: Array, tasks: int) -> bool:
    """Whether `tasks` equal shares of an array each fit the cache and occupy all threads."""
    return elements.nbytes <= LARGEST_SLAB * tasks and (tasks >= 2 * threads() or elements.nbytes < SLAB)


def _blocks_in_one_pass(elements: Array, channels: int, inner: int) -> bool:
    """The same for blocks of columns. An array that L3 holds takes as long in two passes, which compile sooner."""
    blocks = _columns.blocks(channels, inner)
    return elements.nbytes >= LARGE and elements.nbytes <= LARGEST_BLOCK * blocks and blocks >= 2 * threads()


def _group(elements: Array, channels: int) -> int:
    """Channels of one task of the runs' one-pass kernels."""
    return max(1, min(SLAB * channels // elements.nbytes, channels // (4 * threads())))


def channel_moments(x: Array, outer: int, channels: int, inner: int, mean: Array, var: Array) -> None:
    x = _storage(x)
    way: Any = _columns if _by_columns(outer, inner) else _runs
    way.moments(x.size, x, outer, channels, inner, mean, var)


def channel_apply(
    x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None, beta: Array | None, y: Array,
) -> None:  # fmt: skip
    x = _storage(x)
    gamma, beta = _parameter(gamma, x, 1.0, channels), _parameter(beta, x, 0.0, channels)
    way: Any = _columns if _by_columns(outer, inner) else _runs
    way.apply(x.size, x, outer, channels, inner, _plain(mean), _plain(var), eps, gamma, beta, _storage(y))


def channel_forward(
    x: Array, outer: int, channels: int, inner: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    x, y = _storage(x), _storage(y)
    sizes = outer, channels, inner
    gamma, beta = _parameter(gamma, x, 1.0, channels), _parameter(beta, x, 0.0, channels)
    if _by_columns(outer, inner):
        if _blocks_in_one_pass(x, channels, inner):
            _columns.forward(x.size, x, *sizes, gamma, beta, eps, y, mean, var)
        else:
            _columns.moments(x.size, x, *sizes, mean, var)
            _columns.apply(x.size, x, *sizes, mean, var, eps, gamma, beta, y)
    elif _in_one_pass(x, channels):
        _runs.forward(x.size, x, *sizes, _group(x, channels), gamma, beta, eps, y, mean, var)
    else:
        _runs.moments(x.size, x, *sizes, mean, var)
        _runs.apply(x.size, x, *sizes, mean, var, eps, gamma, beta, y)


def channel_backward_reduce(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    way: Any = _columns if _by_columns(outer, inner) else _runs
    way.backward_reduce(
        x.size, _storage(dy), _storage(x), outer, channels, inner, _plain(mean), _plain(var), eps, sum_dy, sum_dy_xhat
    )


def channel_backward_apply(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
) -> None:  # fmt: skip
    x = _storage(x)
    gamma = _parameter(gamma, x, 1.0, channels)
    way: Any = _columns if _by_columns(outer, inner) else _runs
    way.backward_apply(
        x.size, _storage(dy), x, outer, channels, inner, _plain(mean), _plain(var), eps, gamma,
        _plain(sum_dy), _plain(sum_dy_xhat), float(count), _storage(dx),
    )  # fmt: skip


def channel_backward(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    dy, x, dx, mean, var = _storage(dy), _storage(x), _storage(dx), _plain(mean), _plain(var)
    sizes = outer, channels, inner
    gamma = _parameter(gamma, x, 1.0, channels)
    by_columns = _by_columns(outer, inner)
    way: Any = _columns if by_columns else _runs
    if not (_blocks_in_one_pass(x, channels, inner) if by_columns else _in_one_pass(x, channels)):
        count = float(outer * inner)
        way.backward_reduce(x.size, dy, x, *sizes, mean, var, eps, sum_dy, sum_dy_xhat)
        way.backward_apply(x.size, dy, x, *sizes, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count, dx)
    elif by_columns:
        _columns.backward(x.size, dy, x, *sizes, mean, var, eps, gamma, dx, sum_dy, sum_dy_xhat)
    else:
        group = _group(x, channels)
        _runs.backward(x.size, dy, x, *sizes, group, mean, var, eps, gamma, dx, sum_dy, sum_dy_xhat)


def row_forward(
    x: Array, rows: int, cols: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    x, y = _storage(x), _storage(y)
    gamma, beta = _parameter(gamma, x, 1.0, cols), _parameter(beta, x, 0.0, cols)
    if _in_one_pass(x, rows):
        _rows.forward(x.size, x, 1, rows, cols, gamma, beta, eps, y, mean, var)
    else:
        _runs.moments(x.size, x, 1, rows, cols, mean, var)
        _rows.apply(x.size, x, rows, cols, mean, var, eps, gamma, beta, y)


def row_backward(
    dy: Array, x: Array, rows: int, cols: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, dgamma: Array | None, dbeta: Array | None,
) -> None:  # fmt: skip
    x = _storage(x)
    gamma = _parameter(gamma, x, 1.0, cols)
    nothing = np.empty(0)
    kernel = _rows.backward_long if rows <= FEW_ROWS and cols >= LONG_ROW else _rows.backward
    kernel(
        x.size, _storage(dy), x, rows, cols, _plain(mean), _plain(var), eps, gamma, _storage(dx),
        nothing if dgamma is None else dgamma, nothing if dbeta is None else dbeta,
    )  # fmt: skip
