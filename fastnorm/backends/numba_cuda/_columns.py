"""The channel family where adjacent elements belong to different channels: rows of `total` = channels*inner columns.

A block takes `across` vectors of columns side by side and `rows` rows, `down` of them at a time: a thread has the
same columns in all of its rows, at most 64, whose sums are float32 (float64 for float64). Partial results stand
channel by channel, (chunk, position in the run) within one, for `_runs.finish_moments` and `finish_sums`.
"""

# mypy: ignore-errors
# Numba infers the types of kernels; arrays are addresses, 0 where there is none.

from __future__ import annotations

import functools

import numpy as np
from numba import cuda

from fastnorm.backends.numba_cuda._launch import Kernel
from fastnorm.backends.numba_cuda._memory import ITEMSIZE, access, accumulation
from fastnorm.backends.numba_cuda._plan import BLOCK
from fastnorm.backends.numba_cuda._scalars import (
    LARGEST,
    NUMBER,
    bounded,
    centred_squares,
    gradient_line,
    input_gradient,
    normalized,
    rstd,
)

BATCH = 4
"""Rows that a thread asks for before it waits."""


@functools.cache
def moments(storage: str, width: int) -> Kernel:
    """Mean and centred squares of each column of each chunk, around the mean of its first `down` rows; around their
    mean again where that was far off in any column of the block."""
    load, _ = access(storage, width)
    _, put = access("float64", 1)
    computed = accumulation(storage)
    number, size = NUMBER[computed], ITEMSIZE[storage]
    batch = BATCH if width <= 4 else BATCH // 2  # eight columns are 16 bytes of halves, and 32 registers twice
    held, shared = batch * width, BLOCK * width

    def columns_moments(x, means, squares, outer, total, inner, across, down, rows, tiles, chunks, first_column, last):
        both = cuda.shared.array(shared, np.float64)
        again = cuda.shared.array(1, np.int32)
        values = cuda.local.array(held, number)
        pivots = cuda.local.array(width, number)
        sums = cuda.local.array(width, number)
        squared = cuda.local.array(width, number)
        averages = cuda.local.array(width, np.float64)
        result = cuda.local.array(1, np.float64)
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        tile, chunk = block % tiles, block // tiles
        side, level = thread % across, thread // across
        column = first_column + (tile * across + side) * width
        top = chunk * rows
        bottom = min(top + rows, outer)
        here = level < down and column < last
        start, stride = x + column * size, total * size
        if here:  # the first row is the base, so that the pivot of equal values is that value
            load(start + top * stride, values, 0)
            for k in range(width):
                pivots[k], sums[k] = values[k], number(0.0)
            if top + level < bottom:
                load(start + (top + level) * stride, values, 0)
                for k in range(width):
                    sums[k] = values[k] - pivots[k]
        for k in range(width):
            both[thread * width + k] = np.float64(sums[k]) if here else 0.0
        cuda.syncthreads()
        if here:
            for k in range(width):
                found = 0.0
                for other in range(min(down, bottom - top)):
                    found += both[(other * across + side) * width + k]
                pivots[k] = number(np.float64(pivots[k]) + found / min(down, bottom - top))
        cuda.syncthreads()
        for turn in range(2):
            if thread == 0:
                again[0] = 0
            for k in range(width):
                sums[k], squared[k] = number(0.0), number(0.0)
            if here:
                for row in range(top + level, bottom, batch * down):
                    for b in range(batch):
                        if row + b * down < bottom:
                            load(start + (row + b * down) * stride, values, b * width)
                    for b in range(batch):
                        if row + b * down < bottom:
                            for k in range(width):
                                distance = values[b * width + k] - pivots[k]
                                sums[k] += distance
                                squared[k] += distance * distance
            for k in range(width):
                both[thread * width + k] = np.float64(sums[k])
            cuda.syncthreads()
            if here and level == 0:
                for k in range(width):
                    offset = 0.0
                    for other in range(down):
                        offset += both[(other * across + side) * width + k]
                    averages[k] = offset / (bottom - top)
            cuda.syncthreads()
            for k in range(width):
                both[thread * width + k] = np.float64(squared[k])
            cuda.syncthreads()
            if here and level == 0:
                for k in range(width):
                    around, offset = 0.0, averages[k]
                    for other in range(down):
                        around += both[(other * across + side) * width + k]
                    spread = centred_squares(around, bottom - top, offset)
                    average = np.float64(pivots[k]) + offset
                    if spread < 0.5 * around:
                        again[0] = 1
                    at = ((column + k) // inner * chunks + chunk) * inner + (column + k) % inner
                    result[0] = average
                    put(means + at * 8, result, 0)
                    result[0] = spread
                    put(squares + at * 8, result, 0)
                    averages[k] = average
            cuda.syncthreads()
            if again[0] == 0 or turn == 1:
                break
            if here and level == 0:
                for k in range(width):
                    both[side * width + k] = averages[k]
            cuda.syncthreads()
            if here:
                for k in range(width):
                    pivots[k] = number(both[side * width + k])
            cuda.syncthreads()

    return Kernel(f"columns_moments-{storage}-{width}", columns_moments, "qqqqqqqqqqqqq", BLOCK)


@functools.cache
def apply(storage: str, width: int) -> Kernel:
    """y; a column's statistics are those of channel // share of its sample, its parameters those of the channel."""
    load, store = access(storage, width)
    computed = accumulation(storage)
    parameter, _ = access(computed, 1)
    statistic, _ = access("float64", 1)
    number, largest, size, wide = NUMBER[computed], LARGEST[computed], ITEMSIZE[storage], ITEMSIZE[computed]
    held = BATCH * width

    def columns_apply(
        x, y, mean, var, gamma, beta, outer, total, inner, across, down, rows, tiles, first_column, last, share, eps
    ):  # fmt: skip
        values = cuda.local.array(held, number)
        nears = cuda.local.array(width, number)
        scales = cuda.local.array(width, number)
        shifts = cuda.local.array(width, number)
        single = cuda.local.array(1, number)
        statistics = cuda.local.array(1, np.float64)
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        tile, chunk = block % tiles, block // tiles
        side, level = thread % across, thread // across
        column = first_column + (tile * across + side) * width
        bottom = min((chunk + 1) * rows, outer)
        if level >= down or column >= last:
            return
        for k in range(width):
            channel = (column + k) // inner
            statistic(mean + channel // share * 8, statistics, 0)
            average = statistics[0]
            statistic(var + channel // share * 8, statistics, 0)
            factor = rstd(statistics[0], eps)
            if gamma != 0:
                parameter(gamma + channel * wide, single, 0)
                factor *= np.float64(single[0])
            single[0] = number(0.0)
            if beta != 0:
                parameter(beta + channel * wide, single, 0)
            near = number(average)
            nears[k], scales[k] = near, number(bounded(factor, largest))
            shifts[k] = number(np.float64(single[0]) - (average - np.float64(near)) * factor)
        place, stride = column * size, total * size
        for row in range(chunk * rows + level, bottom, BATCH * down):
            for b in range(BATCH):
                if row + b * down < bottom:
                    load(x + place + (row + b * down) * stride, values, b * width)
            for b in range(BATCH):
                if row + b * down < bottom:
                    for k in range(width):
                        at = b * width + k
                        values[at] = normalized(values[at], nears[k], scales[k], shifts[k])
                    store(y + place + (row + b * down) * stride, values, b * width)

    return Kernel(f"columns_apply-{storage}-{width}", columns_apply, "qqqqqqqqqqqqqqqqd", BLOCK)


@functools.cache
def reduce(storage: str, width: int, centred: bool, by_row: bool) -> Kernel:
    """sum(dy) and sum(dy*(x - centre)) of each column of each chunk; with statistics by row, sum(dy*xhat)."""
    load, _ = access(storage, width)
    statistic, put = access("float64", 1)
    computed = accumulation(storage)
    number, largest, size = NUMBER[computed], LARGEST[computed], ITEMSIZE[storage]
    shared = BLOCK * width

    def columns_reduce(
        dy, x, mean, var, sums_dy, sums_dy_centred, outer, total, inner, across, down, rows, tiles, chunks,
        first_column, last, share, eps,
    ):  # fmt: skip
        both = cuda.shared.array(shared, np.float64)
        xs = cuda.local.array(width, number)
        gs = cuda.local.array(width, number)
        nears = cuda.local.array(width, number)
        sums = cuda.local.array(width, number)
        products = cuda.local.array(width, number)
        wide_value = cuda.local.array(1, np.float64)
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        tile, chunk = block % tiles, block // tiles
        side, level = thread % across, thread // across
        column = first_column + (tile * across + side) * width
        bottom = min((chunk + 1) * rows, outer)
        here = level < down and column < last
        scale, shift = number(1.0), number(0.0)
        for k in range(width):
            sums[k], products[k], nears[k] = number(0.0), number(0.0), number(0.0)
            if here and not by_row:
                statistic(mean + (column + k) // inner // share * 8, wide_value, 0)
                nears[k] = number(wide_value[0])
        if here:
            for row in range(chunk * rows + level, bottom, down):
                place = (row * total + column) * size
                load(x + place, xs, 0)
                load(dy + place, gs, 0)
                if by_row:
                    average = 0.0
                    if centred:
                        statistic(mean + row * 8, wide_value, 0)
                        average = wide_value[0]
                    near = number(average)
                    statistic(var + row * 8, wide_value, 0)
                    factor = rstd(wide_value[0], eps)
                    scale = number(bounded(factor, largest))
                    shift = number((average - np.float64(near)) * factor)
                    for k in range(width):
                        nears[k] = near
                for k in range(width):
                    sums[k] += gs[k]
                    products[k] += gs[k] * ((xs[k] - nears[k]) * scale - shift)
        for k in range(width):
            both[thread * width + k] = np.float64(sums[k])
        cuda.syncthreads()
        if here and level == 0:
            for k in range(width):
                wide_value[0] = 0.0
                for other in range(down):
                    wide_value[0] += both[(other * across + side) * width + k]
                at = ((column + k) // inner * chunks + chunk) * inner + (column + k) % inner
                put(sums_dy + at * 8, wide_value, 0)
        cuda.syncthreads()
        for k in range(width):
            both[thread * width + k] = np.float64(products[k])
        cuda.syncthreads()
        if here and level == 0:
            for k in range(width):
                wide_value[0] = 0.0
                for other in range(down):
                    wide_value[0] += both[(other * across + side) * width + k]
                at = ((column + k) // inner * chunks + chunk) * inner + (column + k) % inner
                put(sums_dy_centred + at * 8, wide_value, 0)

    name = f"columns_reduce-{storage}-{width}-{centred}-{by_row}"
    return Kernel(name, columns_reduce, "qqqqqqqqqqqqqqqqqd", BLOCK)


@functools.cache
def gradient(storage: str, width: int) -> Kernel:
    """dx; folded: 1 where the sums are of dy alone and gamma is part of the scale, 0 where they are of dy*gamma."""
    load, store = access(storage, width)
    computed = accumulation(storage)
    parameter, _ = access(computed, 1)
    statistic, _ = access("float64", 1)
    number, largest, size, wide = NUMBER[computed], LARGEST[computed], ITEMSIZE[storage], ITEMSIZE[computed]

    def columns_gradient(
        dy, x, dx, mean, var, gamma, sum_dy, sum_dy_xhat, outer, total, inner, across, down, rows, tiles,
        first_column, last, share, folded, eps, count,
    ):  # fmt: skip
        xs = cuda.local.array(width, number)
        gs = cuda.local.array(width, number)
        nears = cuda.local.array(width, number)
        scales = cuda.local.array(width, number)
        lifts = cuda.local.array(width, number)
        slopes = cuda.local.array(width, number)
        factors = cuda.local.array(width, number)
        single = cuda.local.array(1, number)
        wide_value = cuda.local.array(1, np.float64)
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        tile, chunk = block % tiles, block // tiles
        side, level = thread % across, thread // across
        column = first_column + (tile * across + side) * width
        bottom = min((chunk + 1) * rows, outer)
        if level >= down or column >= last:
            return
        for k in range(width):
            channel = (column + k) // inner
            of = channel // share * 8
            statistic(mean + of, wide_value, 0)
            average = wide_value[0]
            statistic(var + of, wide_value, 0)
            factor = rstd(wide_value[0], eps)
            statistic(sum_dy + of, wide_value, 0)
            mean_g = wide_value[0] / count
            statistic(sum_dy_xhat + of, wide_value, 0)
            near = number(average)
            lift, slope = gradient_line(factor, average - np.float64(near), mean_g, wide_value[0] / count)
            single[0] = number(1.0)
            if gamma != 0:
                parameter(gamma + channel * wide, single, 0)
                if folded != 0:
                    factor *= np.float64(single[0])
                    single[0] = number(1.0)
            nears[k], scales[k], factors[k] = near, number(bounded(factor, largest)), single[0]
            lifts[k], slopes[k] = number(lift), number(bounded(slope, largest))
        for row in range(chunk * rows + level, bottom, down):
            place = (row * total + column) * size
            load(x + place, xs, 0)
            load(dy + place, gs, 0)
            for k in range(width):
                gs[k] = input_gradient(gs[k] * factors[k], xs[k], nears[k], scales[k], lifts[k], slopes[k])
            store(dx + place, gs, 0)

    return Kernel(f"columns_gradient-{storage}-{width}", columns_gradient, "qqqqqqqqqqqqqqqqqqqdd", BLOCK)
