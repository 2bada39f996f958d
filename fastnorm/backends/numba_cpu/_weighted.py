"""Moments with weights of channels of (outer, channels, inner): runs where inner is not 1, else columns.

Weights are one an element, or one a position (outer, inner), which all channels share. What is left out, its weight
being 0, may be NaN; what is no weight leaves its channel a count that is not finite. The spec of the tiling:

    for part:                           parts run in parallel, each of a range of channels
        for chunk of the part:          a block of `_runs`, or CHUNK rows of columns; it is in the cache
            sums around a value near the mean, then around the mean, in runs only where the squares would cancel
            merge the chunk into the part
    merge the parts in order
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x is a 1-D storage array, weights one of numbers to compute with.

from __future__ import annotations

from fastnorm.backends.numba_cpu import _runs
from fastnorm.backends.numba_cpu._columns import CHUNK, PART, TOGETHER, WIDTH
from fastnorm.backends.numba_cpu._compiler import compiled
from fastnorm.backends.numba_cpu._launch import Kernel
from fastnorm.backends.numba_cpu._runs import FINISH, PART_BLOCKS, SUMS, block_of
from fastnorm.backends.numba_cpu._scalars import centred_squares, least
from fastnorm.backends.numba_cpu._tasks import STEPS, hand_out
from fastnorm.backends.numba_cpu._vectors import (
    SCRATCH,
    checked_weights,
    element,
    lanes,
    load4,
    put,
    rounded,
    scratch,
    spread4,
    store4,
    total,
    where_nonzero,
)

Cut = tuple[int, int, int, _runs.Tiles]

RUNS_TOGETHER = 32
"""Runs that lanes sum before they are added up in float64, so that short ones do not make many terms of a lane: equal
weights round all to one side. (csrc/include/fastnorm/weighted.hpp has a figure.)"""


def cut(outer: int, channels: int, inner: int) -> Cut:
    """(channels of a task, chunks of a part, parts, tiles of runs)"""
    tiles = _runs.tiling(outer, inner)
    if inner == 1:
        group = -(-channels // -(-channels // WIDTH))
        chunks = max(1, PART // (CHUNK * group))
        return group, chunks, -(-outer // (CHUNK * chunks)), tiles
    parts = tiles[4]
    return max(1, min(channels, PART // (outer * inner // parts))), PART_BLOCKS, parts, tiles


@compiled
def _merge(counts, means, squares, at, count, mean, more):
    """Merge into the moments at a place. Either may have no weight at all."""
    before, delta = element(counts, at), mean - element(means, at)
    whole = before + count
    share = count / whole if whole > 0.0 else 0.0
    between = before * share
    put(counts, at, whole)
    put(means, at, element(means, at) + delta * share)
    put(squares, at, element(squares, at) + more + (delta * delta * between if between > 0.0 else 0.0))


@compiled
def _first_kept(x, weights, start, stride, weight_start, weight_stride, runs, length):
    """The first value of runs whose weight is not 0; 0 where there is none."""
    value, sought = 0.0, True
    for run in range(runs):
        i = 0
        while sought and i < length:
            if element(weights, weight_start + run * weight_stride + i) != 0.0:
                value, sought = element(x, start + run * stride + i), False
            i += 1
    return value


@compiled
def _block(x, weights, start, stride, weight_start, weight_stride, runs, length, near):
    """(count, mean, centred squares) of runs, given a value near their mean."""
    centre, count, mean, more, zero = rounded(x, near), 0.0, 0.0, -1.0, spread4(x, 0.0)
    for sweep in range(2):
        if sweep == 0 or more == -1.0:
            middle = spread4(x, centre)
            count, first, square = 0.0, 0.0, 0.0
            for upper in range(0, runs, RUNS_TOGETHER):
                sum_w, sums, squares = zero, zero, zero
                for run in range(upper, least(upper + RUNS_TOGETHER, runs)):
                    at, weight_at = start + run * stride, weight_start + run * weight_stride
                    for i in range(0, length, 4 * lanes(x)):
                        weight = checked_weights(load4(weights, weight_at + i, length - i, zero))
                        deviation = where_nonzero(weight, load4(x, at + i, length - i, middle) - middle)
                        product = weight * deviation
                        sum_w += weight
                        sums += product
                        squares += product * deviation
                count, first, square = count + total(sum_w), first + total(sums), square + total(squares)
            apart = first / count if count != 0.0 else 0.0
            mean = centre + apart
            more = centred_squares(square, count, apart)
            if sweep == 0 and not apart * apart * count <= 0.5 * square:
                centre, more = rounded(x, mean), -1.0
    return count, mean, more


@compiled
def _part_of_runs(x, weights, each, outer, channels, inner, tiles, first, last, part, count, mean, squares):
    for block in range(part * PART_BLOCKS, least((part + 1) * PART_BLOCKS, tiles[3])):
        at, runs, length = block_of(block, outer, channels, inner, tiles)
        for c in range(first, last):
            start, into = at + c * inner, part * channels + c
            weight_start, weight_stride = start, channels * inner
            if not each:
                weight_start, weight_stride = at // (channels * inner) * inner + at % inner, inner
            near = element(mean, into)
            if element(count, into) == 0.0:
                near = _first_kept(x, weights, start, channels * inner, weight_start, weight_stride, runs, length)
            found = _block(
                x, weights, start, channels * inner, weight_start, weight_stride, runs, length, near
            )  # fmt: skip
            _merge(count, mean, squares, into, found[0], found[1], found[2])


@compiled
def _sum_down(x, weights, each, row, rows, channels, first, columns, centre, sum_w, sums, squares):
    """Sums of w, w*d and w*d^2 down each column, d = x - centre, a few rows at a time."""
    zero = spread4(x, 0.0)
    for upper in range(0, rows, TOGETHER):
        for j in range(0, columns, 4 * lanes(x)):
            middle, running_w, running, square = load4(centre, j, SCRATCH, zero), zero, zero, zero
            if upper > 0:
                running_w, running = load4(sum_w, j, SCRATCH, zero), load4(sums, j, SCRATCH, zero)
                square = load4(squares, j, SCRATCH, zero)
            for r in range(row + upper, row + least(upper + TOGETHER, rows)):
                at, count = r * channels + first + j, columns - j
                of_row = zero if each else spread4(x, element(weights, r))
                weight = checked_weights(load4(weights, at, count if each else 0, of_row))
                deviation = where_nonzero(weight, load4(x, at, count, middle) - middle)
                product = weight * deviation
                running_w += weight
                running += product
                square += product * deviation
            store4(sum_w, j, running_w, SCRATCH)
            store4(sums, j, running, SCRATCH)
            store4(squares, j, square, SCRATCH)


@compiled
def _part_of_columns(x, weights, each, outer, channels, chunks, first, last, part, count, mean, squares):
    columns, into = last - first, part * channels + first
    centre, sum_w, sums, square = scratch(x), scratch(x), scratch(x), scratch(x)
    chunk_mean = scratch(mean)
    for chunk in range(part * chunks, least((part + 1) * chunks, -(-outer // CHUNK))):
        row = chunk * CHUNK
        rows = least(CHUNK, outer - row)
        for c in range(columns):
            near = element(mean, into + c)
            if element(count, into + c) == 0.0:
                at = row * channels + first + c
                if each:
                    near = _first_kept(x, weights, at, channels, at, channels, rows, 1)
                else:
                    near = _first_kept(x, weights, at, channels, row, 1, rows, 1)
            put(chunk_mean, c, rounded(x, near))
            put(centre, c, near)
        for _ in range(2):  # around that value, then around the mean
            _sum_down(x, weights, each, row, rows, channels, first, columns, centre, sum_w, sums, square)
            for c in range(columns):
                weight = element(sum_w, c)
                exact = element(centre, c) + (element(sums, c) / weight if weight != 0.0 else 0.0)
                more = centred_squares(element(square, c), weight, exact - element(centre, c))
                put(chunk_mean, c, exact)
                put(centre, c, exact)
                put(square, c, more)
        for c in range(columns):
            _merge(
                count, mean, squares, into + c, element(sum_w, c), element(chunk_mean, c), element(square, c)
            )  # fmt: skip


@Kernel
def moments(
    launcher, threads, step, begin, end, plan, x, weights, each, outer, channels, inner, cut, part_count, part_mean,
    part_squares, count, mean, var,
):  # fmt: skip
    """part_count and the like: zeros, a value for each channel of each part."""
    if threads:
        hand_out(launcher, threads, plan)
        return
    group, chunks, parts, tiles = cut
    groups, steps = -(-channels // group), plan[step, STEPS]
    for task in range(begin, end):
        part, first = task // groups, task % groups * group
        last = least(first + group, channels)
        if steps == SUMS and inner == 1:
            _part_of_columns(
                x, weights, each, outer, channels, chunks, first, last, part, part_count, part_mean, part_squares
            )  # fmt: skip
        elif steps == SUMS:
            _part_of_runs(
                x, weights, each, outer, channels, inner, tiles, first, last, part, part_count, part_mean, part_squares
            )  # fmt: skip
        if steps == FINISH:
            for c in range(first, last):
                for i in range(channels + c, parts * channels, channels):
                    more = element(part_count, i), element(part_mean, i), element(part_squares, i)
                    _merge(part_count, part_mean, part_squares, c, more[0], more[1], more[2])
                whole = element(part_count, c)
                put(count, c, whole)
                put(mean, c, element(part_mean, c))
                put(var, c, element(part_squares, c) / whole if whole > 0.0 else 0.0)
