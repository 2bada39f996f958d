"""Channels as runs of adjacent elements, (outer, channels, inner) with inner long; and rows, which are that, too.

A row of (rows, cols) is a channel of (1, rows, cols), so that its statistics do not depend on the other rows.
What a row adds are gamma and beta by column: `by_run` and `by_column` are (gamma, mask of its index, beta, mask),
where an absent one is a vector of ones or zeros with mask 0, read again and again.

Where `span` channels share a statistic (GroupNorm) and lie in one run, the moments are those of a channel `span` times
as long. Parameters belong to channels and repeat after `period` of them, those of a sample.

The spec of the tiling, for one channel:

    for part in parts:                  PART_BLOCKS blocks; parts run in parallel where channels are few
        for block in part:              about BLOCK elements: several whole runs, or a piece of one run
            mean and centred squares    one pass around a pivot near the mean, and another around the mean, the block
                                        being in L1, where the squares would cancel
        merge the blocks in order
    merge the parts in order

The order depends on outer and inner alone.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x, dy, y, dx are 1-D storage arrays, sizes are integers.

from __future__ import annotations

import functools
import math

from fastnorm.backends.numba_cpu._compiler import compiled
from fastnorm.backends.numba_cpu._launch import Kernel
from fastnorm.backends.numba_cpu._output import line_start, writer_of_runs
from fastnorm.backends.numba_cpu._scalars import (
    affine_line,
    centred_squares,
    gradient_line,
    input_gradient,
    least,
    merged_mean,
    merged_squares,
    normalized,
    rstd,
    sum_times_xhat,
)
from fastnorm.backends.numba_cpu._tasks import AHEAD, GROUP, STEPS, hand_out
from fastnorm.backends.numba_cpu._vectors import (
    WIDE,
    element,
    fence,
    lanes,
    load,
    load4,
    load_part,
    load_wide,
    prefetch,
    put,
    rounded,
    spread,
    spread4,
    spread_wide,
    store_wide,
    total,
)

BLOCK = 4096
"""Elements of a block: 16 KB of float32, half of L1, and at most 64 additions to each of the running sums."""
PART_BLOCKS = 16
PIECE = 1 << 16
"""Elements that one task writes where the statistics are known."""

SUMS, FINISH, COEFFICIENTS, WRITE = 1, 2, 4, 8
"""The steps of a call, as bits. A task of all is a slab of channels; alone, a step's task is a part of a channel,
some channels, a piece of memory. (A single kernel for a call and its parts is compiled once.)"""


Tiles = tuple[int, int, int, int, int]


@functools.lru_cache
def tiling(outer: int, inner: int) -> Tiles:
    """(runs a block, elements of a run a block, blocks a run, blocks a channel, parts a channel)"""
    if inner < BLOCK:
        runs, length, pieces = BLOCK // inner, inner, 1
    else:
        pieces = -(-inner // BLOCK)
        runs, length = 1, -(-inner // pieces)
    blocks = -(-outer // runs) * pieces
    return runs, length, pieces, blocks, -(-blocks // PART_BLOCKS)


@compiled
def block_of(block, outer, channels, inner, tiles):
    """(first element, runs, elements of a run) of a block of the first channel."""
    runs, length, pieces, _, _ = tiles
    run, i = block // pieces * runs, block % pieces * length
    return run * channels * inner + i, least(runs, outer - run), least(length, inner - i)


@compiled
def _share(task, steps, channels, group, tiles):
    """(first channel, last channel, first block, last block) of the sums that a task computes."""
    _, _, _, blocks, parts = tiles
    part, upto = 0, blocks
    if steps == SUMS:
        task, part = task // parts, task % parts * PART_BLOCKS
        upto = least(part + PART_BLOCKS, blocks)
    return task * group, least((task + 1) * group, channels), part, upto


@compiled
def _stretch(out, task, steps, run, outer, channels, inner, group, begin, end):
    """The memory that a task writes: that of its channels in one run, or a piece of all.

    Where slabs follow one another in memory, a line that two of them share is written with the second.
    """
    if steps == WRITE:  # the last first, since it was read last
        size = outer * channels * inner
        piece = -(-size // PIECE) - 1 - task
        return piece * PIECE, least((piece + 1) * PIECE, size)
    first, last = task * group, least((task + 1) * group, channels)
    first, last = (run * channels + first) * inner, (run * channels + last) * inner
    lowest = (run * channels + begin * group) * inner
    first = line_start(out, first, lowest)
    last = line_start(out, last, lowest) if task + 1 < end else last
    return first, last


# ---- forward ---------------------------------------------------------------------------------------


@compiled
def _mean_and_squares(x, start, stride, runs, length):
    """Mean and centred squares of `runs` runs of `length` elements in one pass around a pivot; squares are -1 where
    they cancel, the pivot being too far from the mean."""
    first, count = element(x, start), runs * length
    near = spread4(x, first)
    sample = total(load4(x, start, length, near) - near) / least(length, 4 * lanes(x))
    pivot = rounded(x, first + sample)
    middle, zero = spread4(x, pivot), spread4(x, 0.0)
    sums, squares = zero, zero
    for run in range(runs):
        first, last = start + run * stride, start + run * stride + length
        for i in range(first, last, 4 * lanes(x)):
            deviation = load4(x, i, last - i, middle) - middle
            sums += deviation
            squares += deviation * deviation
    apart, square = total(sums) / count, total(squares)
    off_pivot = apart * apart * count
    kept = off_pivot <= 0.5 * square and square < math.inf
    return pivot + apart, square - off_pivot if kept else -1.0


@compiled
def _squares(x, start, stride, runs, length, mean):
    """Sum of squares about their mean of the same."""
    centre = spread4(x, mean)
    sums = spread4(x, 0.0)
    for run in range(runs):
        first, last = start + run * stride, start + run * stride + length
        for i in range(first, last, 4 * lanes(x)):
            deviation = load4(x, i, last - i, centre) - centre
            sums += deviation * deviation
    return centred_squares(total(sums), runs * length, mean - rounded(x, mean))


@compiled
def _moments(x, outer, channels, inner, tiles, part_mean, part_squares, share, centred):
    """Moments of some blocks of some channels, merged into those of their parts; around 0 unless `centred`."""
    begin, end, first_block, last_block = share
    stride, parts = channels * inner, tiles[4]
    seen = 0
    for block in range(first_block, last_block):
        if block % PART_BLOCKS == 0:
            seen = 0
        at, runs, length = block_of(block, outer, channels, inner, tiles)
        count = runs * length
        part_share = count / (seen + count)
        for channel in range(begin, end):
            start, mean, squares = at + channel * inner, 0.0, -1.0
            if centred:
                mean, squares = _mean_and_squares(x, start, stride, runs, length)
            if squares == -1.0:
                squares = _squares(x, start, stride, runs, length, mean)
            part = channel * parts + block // PART_BLOCKS
            if seen > 0:
                squares = merged_squares(part_mean[part], part_squares[part], mean, squares, seen, part_share)
                mean = merged_mean(part_mean[part], mean, part_share)
            part_mean[part], part_squares[part] = mean, squares
        seen += count


@compiled
def _elements_upto(part, outer, inner, tiles):
    """Elements of a channel in the parts before this one and in it."""
    runs, length, pieces, blocks, _ = tiles
    block = least((part + 1) * PART_BLOCKS, blocks)
    return least(block // pieces * runs, outer) * inner + block % pieces * length


@compiled
def _merge_parts(outer, inner, tiles, part_mean, part_squares, mean, var, first, last):
    """mean and var of channels first..last."""
    parts = tiles[4]
    for channel in range(first, last):
        at, seen = channel * parts, _elements_upto(0, outer, inner, tiles)
        merged, squares = part_mean[at], part_squares[at]
        for part in range(1, parts):
            upto = _elements_upto(part, outer, inner, tiles)
            share = (upto - seen) / upto
            squares = merged_squares(merged, squares, part_mean[at + part], part_squares[at + part], seen, share)
            merged = merged_mean(merged, part_mean[at + part], share)
            seen = upto
        mean[channel], var[channel] = merged, squares / seen


@compiled
def together(c, last, span):
    """How many channels from c on are worked on at once: some of one statistic, where `span` of them share it."""
    return least(least(WIDE, last - c), span - c % span if span > 1 else WIDE)


@compiled
def of_channels(values, c, span, count):
    """The values of their statistics for channels from c on."""
    return load_wide(values, c, count) if span == 1 else spread_wide(element(values, c // span))


@compiled
def normalizing_lines(x, mean, var, eps, parameters, span, period, lines, length, first, last):
    """The coefficients of channels first..last: `lines` holds `length` centres, then the scales, then the shifts."""
    gamma, gamma_mask, beta, beta_mask = parameters
    c = first
    while c < last:
        at = c % period
        count = least(together(c, last, span), period - at)
        middle, factor = of_channels(mean, c, span, count), rstd(of_channels(var, c, span, count), eps)
        gain, lift = load_wide(gamma, at & gamma_mask, count), load_wide(beta, at & beta_mask, count)
        line = affine_line(x, middle, factor, gain, lift)
        store_wide(lines, c, line[0], count)
        store_wide(lines, length + c, line[1], count)
        store_wide(lines, 2 * length + c, line[2], count)
        c += count


@compiled
def _normalizing_line(numbers, c):
    lines, length = numbers
    scale, shift = element(lines, length + c), element(lines, 2 * length + c)
    return spread(lines, element(lines, c)), spread(lines, scale), spread(lines, shift)


@compiled
def _normalized_whole(arrays, i, j, line, ahead):
    x, gamma, gamma_mask, beta, beta_mask = arrays
    prefetch(x, i + ahead)
    xhat = normalized(load(x, i), line[0], line[1], line[2])
    return xhat * load(gamma, j & gamma_mask) + load(beta, j & beta_mask)


@compiled
def _normalized_part(arrays, i, j, first, last, line):
    x, gamma, gamma_mask, beta, beta_mask = arrays
    xhat = normalized(load_part(x, i, first, last, line[0]), line[0], line[1], line[2])
    scaled = xhat * load_part(gamma, j & gamma_mask, first, last, xhat)
    return scaled + load_part(beta, j & beta_mask, first, last, xhat)


_write_normalized = writer_of_runs(_normalizing_line, _normalized_whole, _normalized_part)


@Kernel
def forward(
    launcher, threads, step, begin, end, plan, x, y, outer, channels, inner, tiles, part_mean, part_squares, mean, var,
    centred, eps, by_run, span, period, lines, by_column, past_cache,
):  # fmt: skip
    """A channel here is what has a statistic: `span` channels with parameters of their own."""
    if threads:
        hand_out(launcher, threads, plan)
        return
    steps, group, ahead = plan[step, STEPS], plan[step, GROUP], plan[step, AHEAD]
    arrays, length = (x, by_column[0], by_column[1], by_column[2], by_column[3]), channels * span
    for task in range(begin, end):
        first, last = task * group, least((task + 1) * group, channels)
        if steps & SUMS:
            share = _share(task, steps, channels, group, tiles)
            _moments(x, outer, channels, inner, tiles, part_mean, part_squares, share, centred)
        if steps & FINISH:
            _merge_parts(outer, inner, tiles, part_mean, part_squares, mean, var, first, last)
        if steps & COEFFICIENTS:
            normalizing_lines(x, mean, var, eps, by_run, span, period, lines, length, first * span, last * span)
        if steps & WRITE:
            for run in range(1 if steps == WRITE else outer):
                at, upto = _stretch(y, task, steps, run, outer, channels, inner, group, begin, end)
                _write_normalized(arrays, y, at, upto, length, inner // span, (lines, length), past_cache, ahead)
    fence()


# ---- backward --------------------------------------------------------------------------------------


@compiled
def _block_sums(dy, x, start, stride, runs, length, mean):
    """(sum(dy), sum(dy*(x - centre))) of a block."""
    centre = spread4(x, mean)
    zero = spread4(x, 0.0)
    sum_dy, sum_dy_centred = zero, zero
    for run in range(runs):
        first, last = start + run * stride, start + run * stride + length
        for i in range(first, last, 4 * lanes(x)):
            grad = load4(dy, i, last - i, zero)
            sum_dy += grad
            sum_dy_centred += grad * (load4(x, i, last - i, centre) - centre)
    return total(sum_dy), total(sum_dy_centred)


@compiled
def _sums(dy, x, outer, channels, inner, tiles, mean, span, part_dy, part_dy_centred, share):
    """Sums of some blocks of some channels, added to those of their parts."""
    for block in range(share[2], share[3]):
        at, runs, length = block_of(block, outer, channels, inner, tiles)
        for channel in range(share[0], share[1]):
            start = at + channel * inner
            middle = element(mean, channel // span)
            total_dy, centred = _block_sums(dy, x, start, channels * inner, runs, length, middle)
            part = channel * tiles[4] + block // PART_BLOCKS
            if block % PART_BLOCKS > 0:
                total_dy, centred = part_dy[part] + total_dy, part_dy_centred[part] + centred
            part_dy[part], part_dy_centred[part] = total_dy, centred


@compiled
def _add_parts(x, parts, part_dy, part_dy_centred, mean, var, eps, span, sum_dy, sum_dy_xhat, first, last):
    for statistic in range(first // span, last // span):
        middle, factor = element(mean, statistic), rstd(element(var, statistic), eps)
        for c in range(statistic * span, (statistic + 1) * span):
            total_dy, centred = 0.0, 0.0
            for part in range(c * parts, (c + 1) * parts):
                total_dy += element(part_dy, part)
                centred += element(part_dy_centred, part)
            put(sum_dy, c, total_dy)
            put(sum_dy_xhat, c, sum_times_xhat(factor, middle - rounded(x, middle), total_dy, centred))


@compiled
def gradient_lines(x, mean, var, eps, factors, span, period, sum_dy, sum_dy_xhat, count, lines, length, first, last):
    """The same: centres, scales, lifts, slopes, gains.

    A gamma is a factor of dx, or, where channels share their statistics, the gain of dy alone.
    """
    gamma, gamma_mask, gain, gain_mask = factors
    mean_dy, mean_dy_xhat = spread_wide(0.0), spread_wide(0.0)
    c = first
    while c < last:
        at = c % period
        some = least(together(c, last, span), period - at)
        middle, factor = of_channels(mean, c, span, some), rstd(of_channels(var, c, span, some), eps)
        weight = load_wide(gain, at & gain_mask, some)
        if span == 1:
            mean_dy = load_wide(sum_dy, c, some) * weight / count
            mean_dy_xhat = load_wide(sum_dy_xhat, c, some) * weight / count
        elif c % span == 0:
            total_dy, total_dy_xhat = 0.0, 0.0
            for i in range(span):
                weight_of_one = element(gain, (at + i) & gain_mask)
                total_dy += element(sum_dy, c + i) * weight_of_one
                total_dy_xhat += element(sum_dy_xhat, c + i) * weight_of_one
            mean_dy, mean_dy_xhat = spread_wide(total_dy / count), spread_wide(total_dy_xhat / count)
        scale = factor * load_wide(gamma, at & gamma_mask, some)
        line = gradient_line(x, middle, factor, scale, mean_dy, mean_dy_xhat)
        store_wide(lines, c, line[0], some)
        store_wide(lines, length + c, line[1], some)
        store_wide(lines, 2 * length + c, line[2], some)
        store_wide(lines, 3 * length + c, line[3], some)
        store_wide(lines, 4 * length + c, weight, some)
        c += some


@compiled
def _gradient_line(numbers, c):
    lines, length = numbers
    scale, lift = spread(lines, element(lines, length + c)), spread(lines, element(lines, 2 * length + c))
    slope, gain = spread(lines, element(lines, 3 * length + c)), spread(lines, element(lines, 4 * length + c))
    return spread(lines, element(lines, c)), scale, lift, slope, gain


@compiled
def _gradient_whole(arrays, i, j, line, ahead):
    dy, x = arrays
    prefetch(dy, i + ahead)
    prefetch(x, i + ahead)
    return input_gradient(load(dy, i) * line[4], load(x, i), line[0], line[1], line[2], line[3])


@compiled
def _gradient_part(arrays, i, j, first, last, line):
    dy, x = arrays
    grad, value = load_part(dy, i, first, last, line[2]), load_part(x, i, first, last, line[0])
    return input_gradient(grad * line[4], value, line[0], line[1], line[2], line[3])


_write_gradient = writer_of_runs(_gradient_line, _gradient_whole, _gradient_part)


@Kernel
def backward(
    launcher, threads, step, begin, end, plan, dy, x, dx, outer, channels, inner, tiles, part_dy, part_dy_centred, mean,
    var, eps, factors, span, period, sum_dy, sum_dy_xhat, count, lines, past_cache,
):  # fmt: skip
    if threads:
        hand_out(launcher, threads, plan)
        return
    steps, group, ahead = plan[step, STEPS], plan[step, GROUP], plan[step, AHEAD]
    for task in range(begin, end):
        first, last = task * group, least((task + 1) * group, channels)
        if steps & SUMS:
            share = _share(task, steps, channels, group, tiles)
            _sums(dy, x, outer, channels, inner, tiles, mean, span, part_dy, part_dy_centred, share)
        if steps & FINISH:
            _add_parts(x, tiles[4], part_dy, part_dy_centred, mean, var, eps, span, sum_dy, sum_dy_xhat, first, last)
        if steps & COEFFICIENTS:
            gradient_lines(
                x, mean, var, eps, factors, span, period, sum_dy, sum_dy_xhat, count, lines, channels, first, last
            )  # fmt: skip
        if steps & WRITE:
            for run in range(1 if steps == WRITE else outer):
                at, upto = _stretch(dx, task, steps, run, outer, channels, inner, group, begin, end)
                _write_gradient((dy, x), dx, at, upto, channels, inner, (lines, channels), past_cache, ahead)
    fence()
