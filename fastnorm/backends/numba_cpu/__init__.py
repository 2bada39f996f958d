"""The backend 'numba': the kernel contract on the CPU, compiled by Numba on first use.

This module is the table. Its functions make flat, writable, Numba-typed views of their arguments, choose between
`_columns`, where adjacent elements belong to different channels, and `_runs`, where a channel is long runs, and
start the steps of the call: all in one, slab by slab, where a slab fits the cache, else one after the other. Both
give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm.backends import Array, flat
from fastnorm.backends.numba_cpu import _columns, _dropout, _plan, _rows, _runs
from fastnorm.backends.numba_cpu._launch import set_num_threads, threads
from fastnorm.backends.numba_cpu._runs import COEFFICIENTS, FINISH, SUMS, WRITE

ALL = SUMS | FINISH | COEFFICIENTS | WRITE

__all__ = [
    "channel_apply",
    "channel_backward",
    "channel_backward_apply",
    "channel_backward_reduce",
    "channel_forward",
    "channel_moments",
    "dropout",
    "group_backward",
    "group_forward",
    "row_backward",
    "row_forward",
    "set_num_threads",
]

SHORT_RUN = 64
"""Runs shorter than this are worked on as columns: they would hardly fill a loop over vectors."""
LONG_ROWS = 1 << 23
"""Bytes of dy and x between the sums of long rows and their output: a share of L3."""


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


def _accumulation(x: Array) -> Any:
    return np.float64 if x.dtype == np.float64 else np.float32


_CONSTANTS = {(dtype, value): np.full(64, value, dtype) for dtype in (np.float32, np.float64) for value in (0.0, 1.0)}


def _parameter(values: Array | None, x: Array, absent: float) -> tuple[Array, int]:
    """gamma or beta and a mask of its index: an absent one is a vector read again and again, so there is one loop."""
    return (_CONSTANTS[_accumulation(x), absent], 0) if values is None else (_plain(values), -1)


def _by_columns(outer: int, inner: int) -> bool:
    return inner < SHORT_RUN and outer >= 8


def _columns_forward(
    steps: int, x: Array, sizes: _plan.Sizes, mean: Array, var: Array, eps: float,
    gamma: Array | None, beta: Array | None, y: Array,
) -> None:  # fmt: skip
    channels, period, grid = sizes[1], sizes[1] * sizes[2], _columns.grid(*sizes)
    parts = np.empty((2, grid[4] * channels))
    lines, columns = (np.empty(3 * n, _accumulation(x)) for n in (channels, period * grid[2] + 64))
    parameters = (*_parameter(gamma, x, 1.0), *_parameter(beta, x, 0.0))
    arguments = (*parts, mean, var, eps, parameters, lines, columns, _plan.past_cache(x.nbytes))
    for launch in _plan.of_columns(steps, sizes, grid, x.itemsize, 1, threads()):
        cut = (launch.group, -(-channels // launch.group), *grid[2:])
        _columns.forward(x.size, launch.tasks, x, y, *sizes, cut, launch.steps, *arguments, launch.ahead)


def _columns_backward(
    steps: int, dy: Array, x: Array, sizes: _plan.Sizes, mean: Array, var: Array, eps: float,
    gamma: Array | None, gain: Array | None, sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
) -> None:  # fmt: skip
    channels, period, grid = sizes[1], sizes[1] * sizes[2], _columns.grid(*sizes)
    parts = np.empty((2, grid[4] * channels))
    lines, columns = (np.empty(5 * n, _accumulation(x)) for n in (channels, period * grid[2] + 64))
    factors = (*_parameter(gamma, x, 1.0), *_parameter(gain, x, 1.0))
    arguments = (
        *parts, mean, var, eps, factors, sum_dy, sum_dy_xhat, count, lines, columns,
        _plan.past_cache(x.nbytes),
    )  # fmt: skip
    for launch in _plan.of_columns(steps, sizes, grid, x.itemsize, 2, threads()):
        cut = (launch.group, -(-channels // launch.group), *grid[2:])
        _columns.backward(x.size, launch.tasks, dy, x, dx, *sizes, cut, launch.steps, *arguments, launch.ahead)


def _runs_forward(
    steps: int, x: Array, sizes: _plan.Sizes, mean: Array | None, var: Array, eps: float, y: Array,
    by_run: tuple[Array | None, Array | None] = (None, None),
    by_column: tuple[Array | None, Array | None] = (None, None),
) -> None:  # fmt: skip
    channels, tiles = sizes[1], _runs.tiling(sizes[0], sizes[2])
    centred = mean is not None
    mean = np.zeros(channels) if mean is None else mean
    parts = (mean, var) if tiles[4] == 1 else np.empty((2, channels * tiles[4]))
    lines = np.empty(3 * channels, _accumulation(x))
    of_runs, of_columns = (
        (*_parameter(gamma, x, 1.0), *_parameter(beta, x, 0.0)) for gamma, beta in (by_run, by_column)
    )
    arguments = (*parts, mean, var, centred, eps, of_runs, lines, of_columns, _plan.past_cache(x.nbytes))
    for launch in _plan.of_runs(steps, sizes, tiles, x.itemsize, 1, threads()):
        _runs.forward(
            x.size, launch.tasks, x, y, *sizes, tiles, launch.group, launch.steps, *arguments, launch.ahead
        )  # fmt: skip


def _runs_backward(
    steps: int, dy: Array, x: Array, sizes: _plan.Sizes, mean: Array, var: Array, eps: float,
    gamma: Array | None, gain: Array | None, sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
) -> None:  # fmt: skip
    channels, tiles = sizes[1], _runs.tiling(sizes[0], sizes[2])
    parts = np.empty((2, channels * tiles[4]))
    lines = np.empty(5 * channels, _accumulation(x))
    factors = (*_parameter(gamma, x, 1.0), *_parameter(gain, x, 1.0))
    arguments = (
        *parts, mean, var, eps, factors, sum_dy, sum_dy_xhat, count, lines,
        _plan.past_cache(x.nbytes),
    )  # fmt: skip
    for launch in _plan.of_runs(steps, sizes, tiles, x.itemsize, 2, threads()):
        _runs.backward(
            x.size, launch.tasks, dy, x, dx, *sizes, tiles, launch.group, launch.steps, *arguments, launch.ahead
        )  # fmt: skip


def channel_moments(x: Array, outer: int, channels: int, inner: int, mean: Array, var: Array) -> None:
    x, sizes = _storage(x), (outer, channels, inner)
    if _by_columns(outer, inner):
        _columns_forward(SUMS | FINISH, x, sizes, mean, var, 0.0, None, None, x)
    else:
        _runs_forward(SUMS | FINISH, x, sizes, mean, var, 0.0, x)


def channel_apply(
    x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None, beta: Array | None, y: Array,
) -> None:  # fmt: skip
    x, y, sizes = _storage(x), _storage(y), (outer, channels, inner)
    mean, var = _plain(mean), _plain(var)
    if _by_columns(outer, inner):
        _columns_forward(COEFFICIENTS | WRITE, x, sizes, mean, var, eps, gamma, beta, y)
    else:
        _runs_forward(COEFFICIENTS | WRITE, x, sizes, mean, var, eps, y, (gamma, beta))


def channel_forward(
    x: Array, outer: int, channels: int, inner: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    x, y, sizes = _storage(x), _storage(y), (outer, channels, inner)
    if _by_columns(outer, inner):
        _columns_forward(ALL, x, sizes, mean, var, eps, gamma, beta, y)
    else:
        _runs_forward(ALL, x, sizes, mean, var, eps, y, (gamma, beta))


def channel_backward_reduce(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    way = _columns_backward if _by_columns(outer, inner) else _runs_backward
    way(
        SUMS | FINISH, _storage(dy), _storage(x), (outer, channels, inner), _plain(mean), _plain(var), eps, None, None,
        sum_dy, sum_dy_xhat, 1.0, _storage(dy),
    )  # fmt: skip


def channel_backward_apply(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
) -> None:  # fmt: skip
    way = _columns_backward if _by_columns(outer, inner) else _runs_backward
    way(
        COEFFICIENTS | WRITE, _storage(dy), _storage(x), (outer, channels, inner), _plain(mean), _plain(var), eps,
        gamma, None, _plain(sum_dy), _plain(sum_dy_xhat), float(count), _storage(dx),
    )  # fmt: skip


def channel_backward(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    way = _columns_backward if _by_columns(outer, inner) else _runs_backward
    way(
        ALL, _storage(dy), _storage(x), (outer, channels, inner), _plain(mean), _plain(var), eps, gamma, None,
        sum_dy, sum_dy_xhat, float(outer * inner), _storage(dx),
    )  # fmt: skip


def _merged(mean: Array, var: Array, statistics: int) -> tuple[Array, Array]:
    """Mean and var of adjacent channels together, in equal numbers: `statistics` of them."""
    mean, var = mean.reshape(statistics, -1), var.reshape(statistics, -1)
    merged = mean[:, 0] + (mean - mean[:, :1]).mean(axis=1)  # exact for equal ones
    between = mean - merged[:, None]
    return merged, (var + between * between).mean(axis=1)


def _samples(samples: int, outer: int, *arrays: Array) -> tuple[int, list[list[Array]]]:
    """Into how many blocks the samples fall that a call of the channel family takes at once, and the arrays of each.

    All of them where channels come first, since those of two samples are channels like any others.
    """
    blocks = 1 if outer == 1 else samples
    return blocks, [list(parts) for parts in zip(*(array.reshape(blocks, -1) for array in arrays), strict=True)]


def group_forward(
    x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    span = channels // groups
    blocks, parts = _samples(samples, outer, _storage(x), _storage(y), mean, var)
    together = samples // blocks
    gamma, beta = (None if values is None else np.tile(values, together) for values in (gamma, beta))
    for x_part, y_part, mean_part, var_part in parts:
        x_part, y_part = (a.view(x.dtype) for a in (x_part, y_part))
        if outer == 1:  # the channels of a group lie in one run
            channel_moments(x_part, 1, samples * groups, span * inner, mean_part, var_part)
        else:
            centre, spread = np.empty((2, channels))
            channel_moments(x_part, outer, channels, inner, centre, spread)
            with np.errstate(invalid="ignore", over="ignore"):
                mean_part[:], var_part[:] = _merged(centre, spread, groups)
        shared = np.repeat(mean_part, span), np.repeat(var_part, span)
        channel_apply(x_part, outer, together * channels, inner, *shared, eps, gamma, beta, y_part)


def group_backward(
    dy: Array, x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    span = channels // groups
    count = float(outer * span * inner)
    blocks, parts = _samples(samples, outer, _storage(dy), _storage(x), _storage(dx), mean, var)
    together = samples // blocks
    sizes = (outer, together * channels, inner)
    way = _columns_backward if _by_columns(outer, inner) else _runs_backward
    sum_dy[:], sum_dy_xhat[:] = 0.0, 0.0
    gain = None if gamma is None else np.tile(gamma, together)
    for dy_part, x_part, dx_part, mean_part, var_part in parts:
        by_channel = np.empty((2, together * channels))
        sum_part, sum_xhat_part = by_channel
        shared = np.repeat(mean_part, span), np.repeat(var_part, span)
        way(SUMS | FINISH, dy_part, x_part, sizes, *shared, eps, None, None, sum_part, sum_xhat_part, 1.0, dy_part)
        with np.errstate(invalid="ignore", over="ignore"):
            by_sample = by_channel.reshape(2, together, channels).sum(axis=1)
            sum_dy += by_sample[0]
            sum_dy_xhat += by_sample[1]
            if gain is not None:
                by_channel *= gain
            sums, sums_xhat = np.repeat(by_channel.reshape(2, -1, span).sum(axis=2), span, axis=1)
        way(COEFFICIENTS | WRITE, dy_part, x_part, sizes, *shared, eps, None, gain, sums, sums_xhat, count, dx_part)


def row_forward(
    x: Array, rows: int, cols: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array | None, var: Array,
) -> None:  # fmt: skip
    x, y = _storage(x), _storage(y)
    _runs_forward(ALL, x, (1, rows, cols), mean, var, eps, y, by_column=(gamma, beta))


def row_backward(
    dy: Array, x: Array, rows: int, cols: int,
    mean: Array | None, var: Array, eps: float, gamma: Array | None,
    dx: Array, dgamma: Array | None, dbeta: Array | None,
) -> None:  # fmt: skip
    dy, x, dx, var, centred = _storage(dy), _storage(x), _storage(dx), _plain(var), mean is not None
    mean = np.zeros(rows) if mean is None else _plain(mean)
    pieces = -(-cols // _rows.PIECE)
    parts = -(-rows // _rows.PART_ROWS)
    sums = np.empty((2, rows * pieces))
    downwards = np.zeros((2, parts * cols), _accumulation(x))
    totals = np.empty((2, cols)) if dgamma is None or dbeta is None else (dgamma, dbeta)
    stream = _plan.past_cache(x.nbytes)
    row_bytes = 2 * cols * x.itemsize

    def launch(steps: int, tasks: int, first: int, last: int, slab: int, ahead: int) -> None:
        _rows.backward(
            x.size, tasks, dy, x, dx, first, last, cols, steps, slab, *sums, mean, var, centred, eps,
            *_parameter(gamma, x, 1.0), *downwards, *totals, stream, ahead,
        )  # fmt: skip

    if parts >= 2 * threads() or _plan.in_one_task(x.size):
        slab = max(1, min(_rows.PART_ROWS, _plan.caches()[0] // 4 // row_bytes))
        launch(SUMS | WRITE, parts, 0, rows, slab, slab * cols)
    else:
        block = max(1, min(_rows.PART_ROWS, LONG_ROWS // row_bytes))
        for part in range(0, rows, _rows.PART_ROWS):
            for first in range(part, min(part + _rows.PART_ROWS, rows), block):
                last = min(first + block, part + _rows.PART_ROWS, rows)
                launch(SUMS, pieces, first, last, last - first, 0)
                launch(WRITE, -(-(last - first) * cols // _runs.PIECE), first, last, last - first, _plan.READ_AHEAD)
    if dgamma is not None:
        launch(FINISH, -(-cols // _rows.STRIP), 0, rows, 1, 0)


def dropout(x: Array, n: int, first: int, seed: int, threshold: int, scale: float, y: Array) -> None:
    x, y = _storage(x), _storage(y)
    seed = seed if seed < 1 << 63 else seed - (1 << 64)  # Numba would compile again for what exceeds an int64
    past_cache = _plan.past_cache(x.nbytes)
    _dropout.dropout(
        n, -(-n // _dropout.PIECE), x, y, first, seed, threshold, float(scale), past_cache, _plan.READ_AHEAD
    )  # fmt: skip
