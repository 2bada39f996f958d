"""The functions of `KernelTable` on descriptors of device arrays: choose kernels, allocate workspace, launch.

Everything is launched on the device and stream of x and returns at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastnorm.backends.numba_cuda import _columns, _dropout, _launch, _plan, _rows, _runs
from fastnorm.backends.numba_cuda._memory import accumulation

Array = Any
"""A descriptor: see the package's docstring."""
Sizes = tuple[int, int, int]

SUMS, WRITE = 1, 2
FLOAT64 = np.dtype(np.float64)
FINISH_THREADS = _runs.FINISHED * _plan.WARP


def _pointer(array: Array | None) -> int:
    return 0 if array is None else array.pointer


def _width(x: Array, length: int, *others: Array | None, parameters: tuple[Array | None, ...] = ()) -> int:
    """Elements of one access; parameters are read in accesses of 16 bytes beside them, or one at a time."""
    if any(_pointer(array) % 16 for array in parameters):
        return 1
    return _plan.width(x.itemsize, length, x.pointer, *(_pointer(array) for array in others))


def _pair(x: Array, count: int) -> tuple[Array, int, int]:
    """Workspace for two float64 arrays, which lives as long as the first result, and the address of each."""
    space = x.empty((2, count), FLOAT64)
    return space, space.pointer, space.pointer + 8 * count


def _slabs(x: Array, channels: int, channel_bytes: int, least: int, steps: int) -> Iterator[tuple[int, int]]:
    """The channels of each turn of launches."""
    step = channels
    if steps == SUMS | WRITE:
        step = _plan.slab(channels, channel_bytes, _launch.level2(x.device), least)
    for first in range(0, channels, step):
        yield first, min(first + step, channels)


# ---- the channel family -----------------------------------------------------------------------------


def _canonical(outer: int, channels: int, inner: int) -> Sizes:
    return (1, 1, outer * inner) if channels == 1 else (outer, channels, inner)


def _forward(
    steps: int, x: Array, sizes: Sizes, mean: Array | None, var: Array, eps: float, gamma: Array | None,
    beta: Array | None, y: Array, by_column: bool = False,
) -> None:  # fmt: skip
    """The steps of a forward, slab by slab. Rows are channels whose parameters go by column; mean None: not centred."""
    outer, channels, inner = sizes = _canonical(*sizes) if not by_column else sizes
    storage, columns = x.dtype.name, _plan.by_columns(*sizes)
    statistics = _pointer(mean), var.pointer
    parameters = _pointer(gamma), _pointer(beta)
    if columns:
        total, width = channels * inner, _width(x, channels * inner, y)
        cut = _plan.columns(outer, total, width)
        grid, count, least = (cut.across, cut.down, cut.rows), cut.chunks * inner, _plan.least(cut, inner)
        chunk = cut.rows, 1, inner
    else:
        width = _width(x, inner, y, parameters=(gamma, beta) if by_column else ())
        tiles = _plan.runs(outer, inner, width)
        count, least = tiles.chunks, 1
        chunk = tiles.span, tiles.length, tiles.pieces
    parts, means, squares = _pair(x, channels * count) if steps & SUMS else (None, 0, 0)
    for first, last in _slabs(x, channels, outer * inner * x.itemsize, least, steps):
        if columns:
            here = -(-((last - first) * inner) // (cut.across * width))
            span = first * inner, last * inner
        if steps & SUMS:
            if columns:
                _columns.moments(storage, width).launch(
                    x, here * cut.chunks, cut.threads, x.pointer, means, squares, outer, total, inner, *grid, here,
                    cut.chunks, *span,
                )  # fmt: skip
            else:
                _runs.moments(storage, width, mean is not None).launch(
                    x, (last - first) * count, _plan.BLOCK, x.pointer, means, squares, *sizes, *chunk, count, first
                )
            _runs.finish_moments(mean is not None).launch(
                x, -(-(last - first) // _runs.FINISHED), FINISH_THREADS, means, squares, *statistics, outer, inner,
                *chunk, count, first, last, 1,
            )  # fmt: skip
        if steps & WRITE and columns:
            _columns.apply(storage, width).launch(
                x, here * cut.chunks, cut.threads, x.pointer, y.pointer, *statistics, *parameters, outer, total,
                inner, *grid, here, *span, 1, eps,
            )  # fmt: skip
        elif steps & WRITE:
            _runs.apply(storage, width, mean is not None, by_column).launch(
                x, (last - first) * count, _plan.BLOCK, x.pointer, y.pointer, *statistics, *parameters, *sizes,
                *chunk, count, first, 1, channels, eps,
            )  # fmt: skip
    del parts


def _backward(
    steps: int, dy: Array, x: Array, sizes: Sizes, mean: Array | None, var: Array, eps: float, gamma: Array | None,
    sum_dy: int, sum_dy_xhat: int, count: float, dx: Array | None, by_column: bool = False,
) -> None:  # fmt: skip
    """The steps of a backward, slab by slab; sum_dy and sum_dy_xhat are addresses."""
    outer, channels, inner = sizes = _canonical(*sizes) if not by_column else sizes
    storage, columns, centred = x.dtype.name, _plan.by_columns(*sizes), mean is not None
    statistics = _pointer(mean), var.pointer
    sums = sum_dy, sum_dy_xhat
    if columns:
        total, width = channels * inner, _width(x, channels * inner, dy, dx)
        cut = _plan.columns(outer, total, width)
        grid, chunks, least = (cut.across, cut.down, cut.rows), cut.chunks * inner, _plan.least(cut, inner)
    else:
        width = _width(x, inner, dy, dx, parameters=(gamma,) if by_column else ())
        tiles = _plan.runs(outer, inner, width)
        chunks, least = tiles.chunks, 1
        chunk = tiles.span, tiles.length, tiles.pieces
    parts, *partial = _pair(x, channels * chunks) if steps & SUMS else (None, 0, 0)
    for first, last in _slabs(x, channels, 2 * outer * inner * x.itemsize, least, steps):
        if columns:
            here = -(-((last - first) * inner) // (cut.across * width))
            span = first * inner, last * inner
        if steps & SUMS:
            if columns:
                _columns.reduce(storage, width, True, False).launch(
                    x, here * cut.chunks, cut.threads, dy.pointer, x.pointer, *statistics, *partial, outer, total,
                    inner, *grid, here, cut.chunks, *span, 1, eps,
                )  # fmt: skip
            else:
                _runs.reduce(storage, width, centred, by_column).launch(
                    x, (last - first) * chunks, _plan.BLOCK, dy.pointer, x.pointer, statistics[0], _pointer(gamma),
                    *partial, *sizes, *chunk, chunks, first, 1,
                )  # fmt: skip
            _runs.finish_sums(accumulation(storage), centred, False).launch(
                x, -(-(last - first) // _runs.FINISHED), FINISH_THREADS, *partial, *statistics, *sums, chunks, first,
                last, 1, eps,
            )  # fmt: skip
        if steps & WRITE and columns:
            _columns.gradient(storage, width).launch(
                x, here * cut.chunks, cut.threads, dy.pointer, x.pointer, _pointer(dx), *statistics, _pointer(gamma),
                *sums, outer, total, inner, *grid, here, *span, 1, 1, eps, count,
            )  # fmt: skip
        elif steps & WRITE:
            _runs.gradient(storage, width, centred, by_column).launch(
                x, (last - first) * chunks, _plan.BLOCK, dy.pointer, x.pointer, _pointer(dx), *statistics,
                _pointer(gamma), *sums, *sizes, *chunk, chunks, first, 1, channels, 1, eps, count,
            )  # fmt: skip
    del parts


def channel_moments(x: Array, outer: int, channels: int, inner: int, mean: Array, var: Array) -> None:
    _forward(SUMS, x, (outer, channels, inner), mean, var, 0.0, None, None, x)


def channel_weighted_moments(
    x: Array, outer: int, channels: int, inner: int, weights: Array, each: bool,
    count: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    raise ValueError("backend: 'cuda' has no moments with weights, expected a backend in host memory")


def channel_apply(
    x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None, beta: Array | None, y: Array,
) -> None:  # fmt: skip
    _forward(WRITE, x, (outer, channels, inner), mean, var, eps, gamma, beta, y)


def channel_forward(
    x: Array, outer: int, channels: int, inner: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    _forward(SUMS | WRITE, x, (outer, channels, inner), mean, var, eps, gamma, beta, y)


def channel_backward_reduce(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    sums = sum_dy.pointer, sum_dy_xhat.pointer
    _backward(SUMS, dy, x, (outer, channels, inner), mean, var, eps, None, *sums, 1.0, None)


def channel_backward_apply(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
) -> None:  # fmt: skip
    sums = sum_dy.pointer, sum_dy_xhat.pointer
    _backward(WRITE, dy, x, (outer, channels, inner), mean, var, eps, gamma, *sums, float(count), dx)


def channel_backward(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    sums = sum_dy.pointer, sum_dy_xhat.pointer
    count = float(outer * inner)
    _backward(SUMS | WRITE, dy, x, (outer, channels, inner), mean, var, eps, gamma, *sums, count, dx)


# ---- groups -----------------------------------------------------------------------------------------


def group_moments(
    x: Array, samples: int, outer: int, channels: int, inner: int, groups: int, mean: Array, var: Array
) -> None:
    _of_groups(x, samples, (outer, channels, inner), groups, mean, var, x)


def _of_groups(x: Array, samples: int, sizes: Sizes, groups: int, mean: Array, var: Array, y: Array) -> None:
    """A group whose channels are one run is a row to the sums; with gaps, each sample's columns are summed first. y
    is where the width of accesses counts, too."""
    outer, channels, inner = sizes
    storage, share = x.dtype.name, channels // groups
    if outer == 1:
        _forward(SUMS, x, (1, samples * groups, share * inner), mean, var, 0.0, None, None, x, by_column=True)
        return
    total, width = channels * inner, _width(x, channels * inner, y)
    columns = _plan.columns(outer, total, width)
    chunks, step = columns.chunks * inner, outer * total * x.itemsize
    parts, means, squares = _pair(x, samples * channels * chunks)
    blocks, of_sample = columns.tiles * columns.chunks, 8 * channels * chunks
    for n in range(samples):
        _columns.moments(storage, width).launch(
            x, blocks, columns.threads, x.pointer + n * step, means + n * of_sample, squares + n * of_sample, outer,
            total, inner, columns.across, columns.down, columns.rows, columns.tiles, columns.chunks, 0, total,
        )  # fmt: skip
    _runs.finish_moments(True).launch(
        x, -(-samples * groups // _runs.FINISHED), FINISH_THREADS, means, squares, mean.pointer, var.pointer, outer,
        inner, columns.rows, 1, inner, chunks, 0, samples * groups, share,
    )  # fmt: skip
    del parts


def group_forward(
    x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    _of_groups(x, samples, (outer, channels, inner), groups, mean, var, y)
    storage, share = x.dtype.name, channels // groups
    statistics = mean.pointer, var.pointer
    parameters = _pointer(gamma), _pointer(beta)
    if outer == 1:
        width = _width(x, inner, y)
        cut = _plan.runs(1, inner, width)
        _runs.apply(storage, width, True, False).launch(
            x, samples * channels * cut.chunks, _plan.BLOCK, x.pointer, y.pointer, *statistics, *parameters, 1,
            samples * channels, inner, cut.span, cut.length, cut.pieces, cut.chunks, 0, share, channels, eps,
        )  # fmt: skip
        return
    total, width = channels * inner, _width(x, channels * inner, y)
    columns = _plan.columns(outer, total, width)
    grid = columns.across, columns.down, columns.rows, columns.tiles
    step = outer * total * x.itemsize
    for n in range(samples):
        of_groups = (address + 8 * n * groups for address in statistics)
        _columns.apply(storage, width).launch(
            x, columns.tiles * columns.chunks, columns.threads, x.pointer + n * step, y.pointer + n * step,
            *of_groups, *parameters, outer, total, inner, *grid, 0, total, share, eps,
        )  # fmt: skip


def group_backward(
    dy: Array, x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    """Sums of each channel of each sample; those, times gamma, of each group; dx; the sums over samples."""
    storage, share, units = x.dtype.name, channels // groups, samples * channels
    statistics, computed = (mean.pointer, var.pointer), accumulation(x.dtype.name)
    columns_way = outer > 1
    total = channels * inner
    width = _width(x, total if columns_way else inner, dy, dx)
    columns, runs = _plan.columns(outer, total, width), _plan.runs(1, inner, width)
    chunks = columns.chunks * inner if columns_way else runs.chunks
    parts, *partial = _pair(x, units * chunks)
    by_channel, *channel_sums = _pair(x, units)
    by_group, *group_sums = _pair(x, samples * groups)
    grid = columns.across, columns.down, columns.rows, columns.tiles
    cut = 1, units, inner, runs.span, runs.length, runs.pieces, runs.chunks, 0, share
    step, blocks = outer * total * x.itemsize, columns.tiles * columns.chunks

    def shifted(addresses: Any, n: int, elements: int) -> tuple[int, ...]:
        return tuple(address + 8 * n * elements for address in addresses)

    if columns_way:
        for n in range(samples):
            _columns.reduce(storage, width, True, False).launch(
                x, blocks, columns.threads, dy.pointer + n * step, x.pointer + n * step,
                *shifted(statistics, n, groups), *shifted(partial, n, channels * chunks), outer, total, inner, *grid,
                columns.chunks, 0, total, share, eps,
            )  # fmt: skip
    else:
        _runs.reduce(storage, width, True, False).launch(
            x, units * chunks, _plan.BLOCK, dy.pointer, x.pointer, mean.pointer, 0, *partial, *cut
        )
    _runs.finish_sums(computed, True, False).launch(
        x, -(-units // _runs.FINISHED), FINISH_THREADS, *partial, *statistics, *channel_sums, chunks, 0, units, share,
        eps,
    )  # fmt: skip
    for of_channels, of_groups, result in zip(channel_sums, group_sums, (sum_dy, sum_dy_xhat), strict=True):
        fold, n = _runs.fold(computed), samples * groups
        threads = FINISH_THREADS
        fold.launch(x, -(-n // threads), threads, of_channels, _pointer(gamma), of_groups, n, share, 1, share, channels)
        fold.launch(
            x, -(-channels // threads), threads, of_channels, 0, result.pointer, channels, 1, channels, samples, 1
        )  # fmt: skip
    count = float(share * outer * inner)
    if columns_way:
        for n in range(samples):
            _columns.gradient(storage, width).launch(
                x, blocks, columns.threads, dy.pointer + n * step, x.pointer + n * step, dx.pointer + n * step,
                *shifted(statistics, n, groups), _pointer(gamma), *shifted(group_sums, n, groups), outer, total,
                inner, *grid, 0, total, share, 0, eps, count,
            )  # fmt: skip
    else:
        _runs.gradient(storage, width, True, False).launch(
            x, units * chunks, _plan.BLOCK, dy.pointer, x.pointer, dx.pointer, *statistics, _pointer(gamma),
            *group_sums, *cut, channels, 0, eps, count,
        )  # fmt: skip
    del parts, by_channel, by_group


# ---- rows -------------------------------------------------------------------------------------------


def row_forward(
    x: Array, rows: int, cols: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array | None, var: Array,
) -> None:  # fmt: skip
    width = _width(x, cols, y, parameters=(gamma, beta))
    plan = _plan.row_forward(rows, cols, x.itemsize, width)
    if plan is None:
        _forward(SUMS | WRITE, x, (1, rows, cols), mean, var, eps, gamma, beta, y, by_column=True)
        return
    _rows.forward(x.dtype.name, width, plan.vectors, plan.whole, mean is not None).launch(
        x, plan.blocks, plan.threads, x.pointer, y.pointer, _pointer(gamma), _pointer(beta), _pointer(mean),
        var.pointer, rows, cols, eps,
    )  # fmt: skip


def row_backward(
    dy: Array, x: Array, rows: int, cols: int,
    mean: Array | None, var: Array, eps: float, gamma: Array | None,
    dx: Array, dgamma: Array | None, dbeta: Array | None,
) -> None:  # fmt: skip
    width = _width(x, cols, dy, dx, parameters=(gamma,))
    plan = _plan.row_backward(rows, cols, x.itemsize, width)
    if plan is None:
        _long_row_backward(dy, x, rows, cols, mean, var, eps, gamma, dx, dgamma, dbeta)
        return
    storage, parts = x.dtype.name, (0, 0)
    if dgamma is not None:
        shares = x.empty((2, plan.blocks * cols), np.dtype(accumulation(storage)))
        parts = shares.pointer, shares.pointer + plan.blocks * cols * shares.itemsize
    _rows.backward(storage, width, plan.vectors, plan.whole, mean is not None, plan.held).launch(
        x, plan.blocks, plan.threads, dy.pointer, x.pointer, dx.pointer, _pointer(gamma), _pointer(mean), var.pointer,
        *parts, rows, cols, plan.part, eps,
    )  # fmt: skip
    if dgamma is not None and dbeta is not None:
        _rows.finish(accumulation(storage)).launch(
            x, math.ceil(cols / _rows.COLUMNS), _rows.COLUMNS * _rows.SLICES, *parts, dgamma.pointer, dbeta.pointer,
            plan.blocks, cols,
        )  # fmt: skip


def _long_row_backward(
    dy: Array, x: Array, rows: int, cols: int,
    mean: Array | None, var: Array, eps: float, gamma: Array | None,
    dx: Array, dgamma: Array | None, dbeta: Array | None,
) -> None:  # fmt: skip
    """dgamma and dbeta first, down the columns: dx may be x."""
    storage = x.dtype.name
    space, sum_g, sum_g_xhat = _pair(x, rows)
    if dgamma is not None and dbeta is not None:
        width = _width(x, cols, dy)
        cut = _plan.columns(rows, cols, width)
        parts, *partial = _pair(x, cols * cut.chunks)
        _columns.reduce(storage, width, mean is not None, True).launch(
            x, cut.tiles * cut.chunks, cut.threads, dy.pointer, x.pointer, _pointer(mean), var.pointer, *partial,
            rows, cols, 1, cut.across, cut.down, cut.rows, cut.tiles, cut.chunks, 0, cols, 1, eps,
        )  # fmt: skip
        _runs.finish_sums(accumulation(storage), mean is not None, True).launch(
            x, -(-cols // _runs.FINISHED), FINISH_THREADS, *partial, 0, 0, dbeta.pointer, dgamma.pointer, cut.chunks,
            0, cols, 1, eps,
        )  # fmt: skip
        del parts
    steps, sizes = SUMS | WRITE, (1, rows, cols)
    _backward(steps, dy, x, sizes, mean, var, eps, gamma, sum_g, sum_g_xhat, float(cols), dx, by_column=True)
    del space


# ---- the rest ---------------------------------------------------------------------------------------


def dropout(x: Array, n: int, first: int, seed: int, threshold: int, scale: float, y: Array) -> None:
    width = 4 if first % _dropout.NUMBERS == 0 and not (x.pointer | y.pointer) % min(16, 4 * x.itemsize) else 1
    if x.itemsize == 8:
        width = min(width, 2)
    groups = (first + n - 1) // _dropout.NUMBERS - first // _dropout.NUMBERS + 1
    seed = seed if seed < 1 << 63 else seed - (1 << 64)  # its bits as an int64
    _dropout.dropout(x.dtype.name, width).launch(
        x, -(-groups // _plan.BLOCK), _plan.BLOCK, x.pointer, y.pointer, n, first, seed, threshold, float(scale)
    )


def set_num_threads(count: int) -> None:
    """Threads of the CPU have no part in this."""
