"""The backend 'numba': the kernel contract on the CPU, compiled by Numba on first use.

This module is the table. Its functions make flat, writable, Numba-typed views of their arguments, choose between
`_columns`, where adjacent elements belong to different channels, and `_runs`, where a channel is long runs, and
start the steps of the call: all in one, slab by slab, where a slab fits the cache, else one after the other. Both
give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastnorm.backends import Array, flat
from fastnorm.backends.numba_cpu import _columns, _dropout, _plan, _rows, _runs, _weighted
from fastnorm.backends.numba_cpu._launch import set_num_threads, threads
from fastnorm.backends.numba_cpu._output import READ_AHEAD
from fastnorm.backends.numba_cpu._runs import COEFFICIENTS, FINISH, SUMS, WRITE

ALL = SUMS | FINISH | COEFFICIENTS | WRITE

__all__ = [
    "channel_apply",
    "channel_backward",
    "channel_backward_apply",
    "channel_backward_reduce",
    "channel_forward",
    "channel_moments",
    "channel_weighted_moments",
    "dropout",
    "group_backward",
    "group_forward",
    "group_moments",
    "row_backward",
    "row_forward",
    "set_num_threads",
]

SHORT_RUN = 64
"""Runs shorter than this are worked on as columns: they would hardly fill a loop over vectors."""
CHANNELS_AT_ONCE = 1 << 16
"""Channels, of all samples, that a call of a group kernel works on: 1 to 2 MB of coefficients and sums."""


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
    return np.float64 if x.itemsize == 8 else np.float32


_CONSTANTS = {(dtype, value): np.full(64, value, dtype) for dtype in (np.float32, np.float64) for value in (0.0, 1.0)}


def _parameter(values: Array | None, x: Array, absent: float) -> tuple[Array, int]:
    """gamma or beta and a mask of its index: an absent one is a vector read again and again, so there is one loop."""
    return (_CONSTANTS[_accumulation(x), absent], 0) if values is None else (_plain(values), -1)


def _period(channels: int, one: Array | None, other: Array | None) -> int:
    """After how many channels the parameters repeat; if there are none, it does not matter."""
    if one is None:
        one = other
    return channels if one is None else one.size


def _by_columns(outer: int, inner: int) -> bool:
    return inner < SHORT_RUN and outer >= 8


def _columns_forward(
    steps: int, x: Array, sizes: _plan.Sizes, mean: Array, var: Array, eps: float,
    gamma: Array | None, beta: Array | None, y: Array, span: int = 1,
) -> None:  # fmt: skip
    """Samples of these sizes, of which `span` channels share a statistic."""
    outer, channels, inner = sizes
    samples, grid = x.size // (outer * channels * inner), _columns.grid(*sizes)
    parts = (mean, var) if grid[4] == span == 1 else np.empty((2, samples * grid[4] * channels))
    room = channels * inner * grid[2] + _columns.ROOM
    lines, columns = (np.empty(3 * samples * n, _accumulation(x)) for n in (channels, room))
    parameters = (*_parameter(gamma, x, 1.0), *_parameter(beta, x, 0.0))
    plan = _plan.of_columns(steps, samples, sizes, span, x.itemsize, 1, threads())
    _columns.forward(
        x.size, plan, x, y, *sizes, span, grid, *parts, mean, var, eps, parameters, lines, columns,
        _plan.past_cache(x.nbytes),
    )  # fmt: skip


def _columns_backward(
    steps: int, dy: Array, x: Array, sizes: _plan.Sizes, mean: Array, var: Array, eps: float,
    gamma: Array | None, gain: Array | None, sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
    span: int = 1,
) -> None:  # fmt: skip
    outer, channels, inner = sizes
    samples, grid = x.size // (outer * channels * inner), _columns.grid(*sizes)
    parts = (sum_dy, sum_dy_xhat) if grid[4] == 1 else np.empty((2, samples * grid[4] * channels))
    room = channels * inner * grid[2] + _columns.ROOM
    lines, columns = (np.empty(5 * samples * n, _accumulation(x)) for n in (channels, room))
    factors = (*_parameter(gamma, x, 1.0), *_parameter(gain, x, 1.0))
    plan = _plan.of_columns(steps, samples, sizes, span, x.itemsize, 2, threads())
    _columns.backward(
        x.size, plan, dy, x, dx, *sizes, span, grid, *parts, mean, var, eps, factors, sum_dy, sum_dy_xhat, count,
        lines, columns, _plan.past_cache(x.nbytes, arrays=2),
    )  # fmt: skip


def _runs_forward(
    steps: int, x: Array, sizes: _plan.Sizes, mean: Array | None, var: Array, eps: float, y: Array,
    by_run: tuple[Array | None, Array | None] = (None, None),
    by_column: tuple[Array | None, Array | None] = (None, None),
    span: int = 1,
) -> None:  # fmt: skip
    """Channels of these sizes, each `span` channels as to gamma and beta, which repeat for each sample."""
    channels, tiles = sizes[1], _runs.tiling(sizes[0], sizes[2])
    centred = mean is not None
    mean = np.zeros(channels) if mean is None else mean
    parts = (mean, var) if tiles[4] == 1 else np.empty((2, channels * tiles[4]))
    lines = np.empty(3 * channels * span, _accumulation(x))
    of_runs = (*_parameter(by_run[0], x, 1.0), *_parameter(by_run[1], x, 0.0))
    of_columns = (*_parameter(by_column[0], x, 1.0), *_parameter(by_column[1], x, 0.0))
    period = _period(channels * span, *by_run)
    plan = _plan.of_runs(steps, sizes, 1, x.itemsize, 1, threads())
    _runs.forward(
        x.size, plan, x, y, *sizes, tiles, *parts, mean, var, centred, eps, of_runs, span, period, lines, of_columns,
        _plan.past_cache(x.nbytes),
    )  # fmt: skip


def _runs_backward(
    steps: int, dy: Array, x: Array, sizes: _plan.Sizes, mean: Array, var: Array, eps: float,
    gamma: Array | None, gain: Array | None, sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
    span: int = 1,
) -> None:  # fmt: skip
    channels, tiles = sizes[1], _runs.tiling(sizes[0], sizes[2])
    parts = (sum_dy, sum_dy_xhat) if tiles[4] == 1 else np.empty((2, channels * tiles[4]))
    lines = np.empty(5 * channels, _accumulation(x))
    factors = (*_parameter(gamma, x, 1.0), *_parameter(gain, x, 1.0))
    plan = _plan.of_runs(steps, sizes, span, x.itemsize, 2, threads())
    _runs.backward(
        x.size, plan, dy, x, dx, *sizes, tiles, *parts, mean, var, eps, factors, span, _period(channels, gamma, gain),
        sum_dy, sum_dy_xhat, count, lines, _plan.past_cache(x.nbytes, arrays=2),
    )  # fmt: skip


def channel_moments(x: Array, outer: int, channels: int, inner: int, mean: Array, var: Array) -> None:
    x, sizes = _storage(x), (outer, channels, inner)
    if _by_columns(outer, inner):
        _columns_forward(SUMS | FINISH, x, sizes, mean, var, 0.0, None, None, x)
    else:
        _runs_forward(SUMS | FINISH, x, sizes, mean, var, 0.0, x)


def channel_weighted_moments(
    x: Array, outer: int, channels: int, inner: int, weights: Array, each: bool,
    count: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    x, sizes = _storage(x), (outer, channels, inner)
    cut = group, _, parts, _ = _weighted.cut(*sizes)
    groups, by_part = -(-channels // group), np.zeros((3, parts * channels))
    plan = _plan.of_steps((parts * groups, SUMS), (groups, FINISH))
    _weighted.moments(x.size, plan, x, _plain(weights), each, *sizes, cut, *by_part, count, mean, var)


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


def _groups_by_columns(outer: int, inner: int, span: int) -> bool:
    """Also where a group is one short run of single elements: treated as runs, (64, 256) in 32 groups took
    twice as long."""
    return _by_columns(outer, inner) or (inner == 1 and span <= SHORT_RUN)


def _some_samples(samples: int, sizes: _plan.Sizes, *arrays: Array) -> Iterator[list[Array]]:
    """The arrays' parts for so many samples at a time that what is kept of their channels, or runs, stays in cache."""
    outer, channels, inner = sizes
    some = max(1, CHANNELS_AT_ONCE // (channels if _by_columns(outer, inner) else outer * channels))
    if some >= samples:
        yield list(arrays)
        return
    for first in range(0, samples, some):
        yield [array.reshape(samples, -1)[first : first + some].reshape(-1) for array in arrays]


def group_moments(
    x: Array, samples: int, outer: int, channels: int, inner: int, groups: int, mean: Array, var: Array
) -> None:
    sizes = outer, channels, inner
    for arrays in _some_samples(samples, sizes, _storage(x), mean, var):
        _samples_moments(sizes, groups, *arrays)


def _samples_moments(sizes: _plan.Sizes, groups: int, x: Array, mean: Array, var: Array) -> None:
    outer, channels, inner = sizes
    span = channels // groups
    if _groups_by_columns(outer, inner, span):
        _columns_forward(SUMS | FINISH, x, sizes, mean, var, 0.0, None, None, x, span)
        return
    # The channels of a group lie in one run, or in one for each of a few rows.
    runs = (1, outer * mean.size, span * inner)
    if outer == 1:
        _runs_forward(SUMS | FINISH, x, runs, mean, var, 0.0, x)
        return
    means, variances = of_runs = np.empty((2, runs[1]))
    _runs_forward(SUMS | FINISH, x, runs, means, variances, 0.0, x)
    mean[:], var[:] = (values.ravel() for values in _merged(*of_runs.reshape(2, -1, outer, groups)))


def group_forward(
    x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    sizes = outer, channels, inner
    for arrays in _some_samples(samples, sizes, _storage(x), _storage(y), mean, var):
        _samples_forward(sizes, groups, gamma, beta, eps, *arrays)


def _samples_forward(
    sizes: _plan.Sizes, groups: int, gamma: Array | None, beta: Array | None, eps: float,
    x: Array, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    outer, channels, inner = sizes
    span = channels // groups
    if _groups_by_columns(outer, inner, span):
        _columns_forward(ALL, x, sizes, mean, var, eps, gamma, beta, y, span)
        return
    runs = (1, outer * mean.size, span * inner)
    if outer == 1:
        _runs_forward(ALL, x, runs, mean, var, eps, y, (gamma, beta), span=span)
        return
    _samples_moments(sizes, groups, x, mean, var)
    means, variances = of_runs = np.empty((2, runs[1]))
    of_runs.reshape(2, -1, outer, groups)[:] = np.reshape((mean, var), (2, -1, 1, groups))
    _runs_forward(COEFFICIENTS | WRITE, x, runs, means, variances, eps, y, (gamma, beta), span=span)


def _merged(mean: Array, var: Array) -> tuple[Array, Array]:
    """Mean and var of (samples, rows, groups) over the rows, which have equal numbers of elements."""
    with np.errstate(invalid="ignore", over="ignore"):
        merged = mean[:, 0] + (mean - mean[:, :1]).mean(axis=1)  # exact for equal ones
        between = mean - merged[:, None]
        return merged, (var + between * between).mean(axis=1)


def group_backward(
    dy: Array, x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    sizes = outer, channels, inner
    arrays = (_storage(dy), _storage(x), _plain(mean), _plain(var), _storage(dx))
    with np.errstate(invalid="ignore", over="ignore"):
        totals = [
            np.add.reduce(_samples_backward(sizes, groups, gamma, eps, *some), axis=1)
            for some in _some_samples(samples, sizes, *arrays)
        ]
        sum_dy[:], sum_dy_xhat[:] = totals[0] if len(totals) == 1 else np.add.reduce(totals)


def _samples_backward(
    sizes: _plan.Sizes, groups: int, gamma: Array | None, eps: float,
    dy: Array, x: Array, mean: Array, var: Array, dx: Array,
) -> Array:  # fmt: skip
    """Writes dx; returns (sum_dy, sum_dy_xhat) of each channel of each sample."""
    outer, channels, inner = sizes
    span, samples = channels // groups, mean.size // groups
    count = float(outer * span * inner)
    runs = (1, samples * outer * channels, inner)
    by_columns = _groups_by_columns(outer, inner, span)
    sum_dy, sum_dy_xhat = sums = np.empty((2, samples * channels if by_columns else runs[1]))
    if by_columns or outer == 1:
        way, cut = (_columns_backward, sizes) if by_columns else (_runs_backward, runs)
        way(ALL, dy, x, cut, mean, var, eps, None, gamma, sum_dy, sum_dy_xhat, count, dx, span)
        return sums.reshape(2, samples, channels)
    mean, var = (np.repeat(a.reshape(-1, 1, groups), outer, axis=1).ravel() for a in (mean, var))
    _runs_backward(SUMS | FINISH, dy, x, runs, mean, var, eps, None, None, sum_dy, sum_dy_xhat, 1.0, dy, span)
    by_row = sums.reshape(2, samples, outer, channels)
    with np.errstate(invalid="ignore", over="ignore"):
        by_row[:] = by_row.sum(axis=2, keepdims=True)
    _runs_backward(COEFFICIENTS | WRITE, dy, x, runs, mean, var, eps, None, gamma, sum_dy, sum_dy_xhat, count, dx, span)
    return by_row[:, :, 0]


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
    part_rows = _rows.part_rows(rows, cols)
    sums = np.empty((2, rows * -(-cols // _rows.PIECE)))
    downwards = np.zeros((2, -(-rows // part_rows) * cols), _accumulation(x))
    totals = np.empty((2, cols)) if dgamma is None or dbeta is None else (dgamma, dbeta)
    plan = _plan.of_rows(rows, cols, x.itemsize, dgamma is not None, threads())
    _rows.backward(
        x.size, plan, dy, x, dx, cols, part_rows, *sums, mean, var, centred, eps, *_parameter(gamma, x, 1.0),
        *downwards, *totals, _plan.past_cache(x.nbytes, arrays=2),
    )  # fmt: skip


def dropout(x: Array, n: int, first: int, seed: int, threshold: int, scale: float, y: Array) -> None:
    x, y = _storage(x), _storage(y)
    seed = seed if seed < 1 << 63 else seed - (1 << 64)  # Numba would compile again for what exceeds an int64
    past_cache, plan = _plan.past_cache(x.nbytes), _plan.of_steps((-(-n // _dropout.PIECE), WRITE))
    _dropout.dropout(n, plan, x, y, first, seed, threshold, float(scale), past_cache, READ_AHEAD)
