"""The channel family where a channel is runs of adjacent elements: (outer, channels, inner), inner long.

The spec of the tiling, for one channel:

    for part in parts:                  PART_BLOCKS blocks; parts run in parallel where channels are few
        for block in part:              about BLOCK elements: several whole runs, or a piece of one run
            sum, then centred squares   exact two-pass, the block being in L1
        merge the blocks in order
    merge the parts in order

The order depends on outer and inner alone. A row of (rows, cols) is a channel of (1, rows, cols), so its
statistics do not depend on the other rows.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x, dy, y, dx are 1-D storage arrays, sizes are integers.

from __future__ import annotations

import numpy as np

from fastnorm.backends.numba_cpu._launch import Kernel, compiled
from fastnorm.backends.numba_cpu._scalars import (
    LANES,
    across,
    affine_line,
    centred_squares,
    clear,
    gradient_line,
    input_gradient,
    load,
    merged,
    normalized,
    rounded,
    rstd,
    stack_lanes,
    store,
    sum_times_xhat,
)
from fastnorm.backends.numba_cpu._tasks import for_each

BLOCK = 4096
"""Elements of a block: 16 KB of float32, half of L1, and at most 64 additions to each of the running sums."""
PART_BLOCKS = 16
PIECE = 1 << 16
"""Elements of a run that one task normalizes."""


@compiled
def tiling(outer, inner):
    """(runs a block, elements of a run a block, blocks a run, blocks a channel, parts a channel)"""
    if inner < BLOCK:
        runs, length, pieces = BLOCK // inner, inner, 1
    else:
        pieces = -(-inner // BLOCK)
        runs, length = 1, -(-inner // pieces)
    blocks = -(-outer // runs) * pieces
    return runs, length, pieces, blocks, -(-blocks // PART_BLOCKS)


@compiled
def elements_before(block, outer, inner, tiles):
    """Elements of a channel in the blocks before this one."""
    runs, length, pieces, _, _ = tiles
    return min(block // pieces * runs, outer) * inner + block % pieces * length


@compiled
def part_elements(part, outer, inner, tiles):
    """Elements of a channel in this part."""
    last = min((part + 1) * PART_BLOCKS, tiles[3])
    return elements_before(last, outer, inner, tiles) - elements_before(part * PART_BLOCKS, outer, inner, tiles)


@compiled
def _block_moments(x, start, stride, runs, length):
    """(mean, centred squares) of `runs` runs of `length` elements; the first element is the pivot."""
    sums = stack_lanes(x)
    pivot = load(x, start)
    count, rest = runs * length, length % LANES
    clear(sums)
    for run in range(runs):
        base = start + run * stride
        for i in range(base, base + length - rest, LANES):
            for lane in range(LANES):
                sums[lane] += load(x, i + lane) - pivot
        for lane in range(rest):
            sums[lane] += load(x, base + length - rest + lane) - pivot
    mean = pivot + across(sums) / count
    centre = rounded(x, mean)
    clear(sums)
    for run in range(runs):
        base = start + run * stride
        for i in range(base, base + length - rest, LANES):
            for lane in range(LANES):
                deviation = load(x, i + lane) - centre
                sums[lane] += deviation * deviation
        for lane in range(rest):
            deviation = load(x, base + length - rest + lane) - centre
            sums[lane] += deviation * deviation
    return mean, centred_squares(across(sums), count, mean - centre)


@compiled
def part_moments(x, outer, channels, inner, channel, part, tiles):
    """(mean, centred squares) of a part of a channel."""
    runs, length, pieces, blocks, _ = tiles
    stride = channels * inner
    if blocks == 1:  # short rows: the divisions below take as long as 64 elements
        return _block_moments(x, channel * inner, stride, outer, inner)
    seen, mean, squares = 0, 0.0, 0.0
    for block in range(part * PART_BLOCKS, min((part + 1) * PART_BLOCKS, blocks)):
        run, i = block // pieces * runs, block % pieces * length
        block_runs, block_length = min(runs, outer - run), min(length, inner - i)
        block_mean, block_squares = _block_moments(
            x, run * stride + channel * inner + i, stride, block_runs, block_length
        )
        count = block_runs * block_length
        mean, squares = merged(seen, mean, squares, count, block_mean, block_squares)
        seen += count
    return mean, squares


@compiled
def channel_moments(x, outer, channels, inner, channel, tiles):
    """(mean, var) of a whole channel."""
    if tiles[3] == 1:
        mean, squares = _block_moments(x, channel * inner, channels * inner, outer, inner)
        return mean, squares / (outer * inner)
    seen, mean, squares = 0, 0.0, 0.0
    for part in range(tiles[4]):
        part_mean, part_squares = part_moments(x, outer, channels, inner, channel, part, tiles)
        count = part_elements(part, outer, inner, tiles)
        mean, squares = merged(seen, mean, squares, count, part_mean, part_squares)
        seen += count
    return mean, squares / seen


@compiled
def _store_moments(x, outer, channels, inner, tiles, part_mean, part_squares, begin, end):
    for task in range(begin, end):
        channel, part = task // tiles[4], task % tiles[4]
        part_mean[task], part_squares[task] = part_moments(x, outer, channels, inner, channel, part, tiles)


@Kernel
def moments(launcher, x, outer, channels, inner, mean, var):
    tiles = tiling(outer, inner)
    parts = tiles[4]
    part_mean, part_squares = np.empty(channels * parts), np.empty(channels * parts)
    arguments = (x, outer, channels, inner, tiles, part_mean, part_squares)
    for_each(launcher, _store_moments, arguments, channels * parts)
    for channel in range(channels):
        seen, mean[channel], var[channel] = 0, 0.0, 0.0
        for part in range(parts):
            task, count = channel * parts + part, part_elements(part, outer, inner, tiles)
            mean[channel], var[channel] = merged(
                seen, mean[channel], var[channel], count, part_mean[task], part_squares[task]
            )
            seen += count
        var[channel] /= seen


@compiled
def _normalize_run(x, y, start, length, centre, scale, shift):
    for i in range(start, start + length):
        store(y, i, normalized(load(x, i), centre, scale, shift))


@compiled
def _normalize_pieces(x, y, channels, inner, pieces, mean, var, eps, gamma, beta, begin, end):
    """Piece `task % pieces` of run `task // pieces`, in the order of memory."""
    for task in range(begin, end):
        run, piece = task // pieces, task % pieces
        channel = run % channels
        centre, scale, shift = affine_line(x, mean[channel], var[channel], eps, gamma[channel], beta[channel])
        length = min(PIECE, inner - piece * PIECE)
        _normalize_run(x, y, run * inner + piece * PIECE, length, centre, scale, shift)


@Kernel
def apply(launcher, x, outer, channels, inner, mean, var, eps, gamma, beta, y):
    pieces = -(-inner // PIECE)
    arguments = (x, y, channels, inner, pieces, mean, var, eps, gamma, beta)
    for_each(launcher, _normalize_pieces, arguments, outer * channels * pieces)


@compiled
def _forward_groups(x, y, outer, channels, inner, group, tiles, mean, var, eps, gamma, beta, begin, end):
    """Statistics of a group of channels, then, while they are in the cache, their output."""
    for task in range(begin, end):
        first, last = task * group, min((task + 1) * group, channels)
        for channel in range(first, last):
            mean[channel], var[channel] = channel_moments(x, outer, channels, inner, channel, tiles)
        for run in range(outer):
            for channel in range(first, last):
                centre, scale, shift = affine_line(x, mean[channel], var[channel], eps, gamma[channel], beta[channel])
                _normalize_run(x, y, (run * channels + channel) * inner, inner, centre, scale, shift)


@Kernel
def forward(launcher, x, outer, channels, inner, group, gamma, beta, eps, y, mean, var):
    tiles = tiling(outer, inner)
    arguments = (x, y, outer, channels, inner, group, tiles, mean, var, eps, gamma, beta)
    for_each(launcher, _forward_groups, arguments, -(-channels // group))


# ---- backward -------------------------------------------------------------------------------------


@compiled
def _block_sums(dy, x, start, stride, runs, length, centre):
    """(sum(dy), sum(dy*(x - centre))) of a block."""
    sum_dy, sum_dy_centred = stack_lanes(x), stack_lanes(x)
    rest = length % LANES
    clear(sum_dy)
    clear(sum_dy_centred)
    for run in range(runs):
        base = start + run * stride
        for i in range(base, base + length - rest, LANES):
            for lane in range(LANES):
                grad = load(dy, i + lane)
                sum_dy[lane] += grad
                sum_dy_centred[lane] += grad * (load(x, i + lane) - centre)
        for lane in range(rest):
            i = base + length - rest + lane
            grad = load(dy, i)
            sum_dy[lane] += grad
            sum_dy_centred[lane] += grad * (load(x, i) - centre)
    return across(sum_dy), across(sum_dy_centred)


@compiled
def _part_sums(dy, x, outer, channels, inner, channel, part, tiles, centre):
    runs, length, pieces, blocks, _ = tiles
    stride = channels * inner
    sum_dy, sum_dy_centred = 0.0, 0.0
    for block in range(part * PART_BLOCKS, min((part + 1) * PART_BLOCKS, blocks)):
        run, i = block // pieces * runs, block % pieces * length
        start = run * stride + channel * inner + i
        block_sums = _block_sums(dy, x, start, stride, min(runs, outer - run), min(length, inner - i), centre)
        sum_dy += block_sums[0]
        sum_dy_centred += block_sums[1]
    return sum_dy, sum_dy_centred


@compiled
def _store_sums(dy, x, outer, channels, inner, tiles, mean, part_dy, part_dy_centred, begin, end):
    for task in range(begin, end):
        channel, part = task // tiles[4], task % tiles[4]
        centre = rounded(x, mean[channel])
        part_dy[task], part_dy_centred[task] = _part_sums(dy, x, outer, channels, inner, channel, part, tiles, centre)


@Kernel
def backward_reduce(launcher, dy, x, outer, channels, inner, mean, var, eps, sum_dy, sum_dy_xhat):
    tiles = tiling(outer, inner)
    parts = tiles[4]
    part_dy, part_dy_centred = np.empty(channels * parts), np.empty(channels * parts)
    arguments = (dy, x, outer, channels, inner, tiles, mean, part_dy, part_dy_centred)
    for_each(launcher, _store_sums, arguments, channels * parts)
    for channel in range(channels):
        total, centred = 0.0, 0.0
        for task in range(channel * parts, (channel + 1) * parts):
            total += part_dy[task]
            centred += part_dy_centred[task]
        rest = mean[channel] - rounded(x, mean[channel])
        sum_dy[channel] = total
        sum_dy_xhat[channel] = sum_times_xhat(rstd(var[channel], eps), rest, total, centred)


@compiled
def _gradient_run(dy, x, dx, start, length, centre, scale, lift, slope):
    for i in range(start, start + length):
        store(dx, i, input_gradient(load(dy, i), load(x, i), centre, scale, lift, slope))


@compiled
def _gradient_pieces(dy, x, dx, channels, inner, pieces, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count, begin, end):
    for task in range(begin, end):
        run, piece = task // pieces, task % pieces
        c = run % channels
        centre, scale, lift, slope = gradient_line(
            x, mean[c], var[c], eps, gamma[c], sum_dy[c] / count, sum_dy_xhat[c] / count
        )
        length = min(PIECE, inner - piece * PIECE)
        _gradient_run(dy, x, dx, run * inner + piece * PIECE, length, centre, scale, lift, slope)


@Kernel
def backward_apply(launcher, dy, x, outer, channels, inner, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count, dx):
    pieces = -(-inner // PIECE)
    arguments = (dy, x, dx, channels, inner, pieces, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count)
    for_each(launcher, _gradient_pieces, arguments, outer * channels * pieces)


@compiled
def _backward_groups(
    dy, x, dx, outer, channels, inner, group, tiles, mean, var, eps, gamma, sum_dy, sum_dy_xhat, begin, end
):
    count = float(outer * inner)
    for task in range(begin, end):
        first, last = task * group, min((task + 1) * group, channels)
        for c in range(first, last):
            centre = rounded(x, mean[c])
            total, centred = 0.0, 0.0
            for part in range(tiles[4]):
                sums = _part_sums(dy, x, outer, channels, inner, c, part, tiles, centre)
                total += sums[0]
                centred += sums[1]
            sum_dy[c] = total
            sum_dy_xhat[c] = sum_times_xhat(rstd(var[c], eps), mean[c] - centre, total, centred)
        for run in range(outer):
            for c in range(first, last):
                centre, scale, lift, slope = gradient_line(
                    x, mean[c], var[c], eps, gamma[c], sum_dy[c] / count, sum_dy_xhat[c] / count
                )
                _gradient_run(dy, x, dx, (run * channels + c) * inner, inner, centre, scale, lift, slope)


@Kernel
def backward(launcher, dy, x, outer, channels, inner, group, mean, var, eps, gamma, dx, sum_dy, sum_dy_xhat):
    tiles = tiling(outer, inner)
    arguments = (dy, x, dx, outer, channels, inner, group, tiles, mean, var, eps, gamma, sum_dy, sum_dy_xhat)
    for_each(launcher, _backward_groups, arguments, -(-channels // group))
