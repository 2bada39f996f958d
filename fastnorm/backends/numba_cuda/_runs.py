"""The channel family where a channel is long runs, and rows too long for `_rows`: (outer, channels, inner).

A block takes a chunk of one channel: `span` runs, or a piece of one. Its threads go side by side along the chunk, a
vector each, BATCH of them in flight. A thread's sums of at most 64 elements are float32 (float64 for float64), all
else is float64. `by_column` is for rows: gamma and beta have an element for each position of a run.
"""

# mypy: ignore-errors
# Numba infers the types of kernels; arrays are addresses, 0 where there is none.

from __future__ import annotations

import functools

import numpy as np
from numba import cuda

from fastnorm.backends.numba_cuda._launch import Kernel, device
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
    sum_times_xhat,
)
from fastnorm.backends.numba_cuda._team import SCRATCH, WARP, sums

BATCH = 4
"""Vectors that a thread asks for before it waits: 16 KB a block."""

_of_block, _of_warp = sums(True), sums(False)


@device
def _extent(channel, chunk, outer, channels, inner, span, length, pieces, width):
    """A chunk of a channel: where its runs begin within `inner`, their number, the vectors of each, and its first
    element's number."""
    top, left = chunk // pieces * span, chunk % pieces * length
    first = (top * channels + channel) * inner + left
    return left, min(span, outer - top), min(length, inner - left) // width, first


@device
def _next(run, at, step, vectors):
    """The vector that is `step` further than vector `at` of a run, there being `vectors` in each."""
    run, at = run + step // vectors, at + step % vectors
    return (run, at) if at < vectors else (run + 1, at - vectors)


@functools.cache
def moments(storage: str, width: int, centred: bool) -> Kernel:
    """Mean and centred squares of each chunk, around a pivot: the mean of the chunk's first vectors. Where that turns
    out far off, they are summed again around their mean. Not centred: the sum of squares."""
    load, _ = access(storage, width)
    first, _ = access(storage, 1)
    _, put = access("float64", 1)
    computed = accumulation(storage)
    number, size = NUMBER[computed], ITEMSIZE[storage]
    held = BATCH * width

    def runs_moments(x, means, squares, outer, channels, inner, span, length, pieces, chunks, first_channel):
        scratch = cuda.shared.array(SCRATCH, np.float64)
        values = cuda.local.array(held, number)
        single = cuda.local.array(1, number)
        result = cuda.local.array(1, np.float64)
        thread, step = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        block = np.int64(cuda.blockIdx.x)
        channel, chunk = first_channel + block // chunks, block % chunks
        _left, runs, vectors, start = _extent(channel, chunk, outer, channels, inner, span, length, pieces, width)
        start = x + start * size
        stride, count = channels * inner * size, runs * vectors * width
        pivot = number(0.0)
        if centred:
            first(start, single, 0)
            base, total, seen = single[0], number(0.0), 0.0
            if thread < runs * vectors:
                load(start + thread // vectors * stride + thread % vectors * (width * size), values, 0)
                seen = np.float64(width)
                for k in range(width):
                    total += values[k] - base
            all_total, all_seen = _of_block(np.float64(total), seen, scratch)
            pivot = number(np.float64(base) + all_total / all_seen)
        average, spread = 0.0, 0.0
        for _again in range(2):
            total, squared = number(0.0), number(0.0)
            run, at = thread // vectors, thread % vectors
            while run < runs:
                ahead_run, ahead = run, at
                for b in range(BATCH):
                    if ahead_run < runs:
                        load(start + ahead_run * stride + ahead * (width * size), values, b * width)
                    ahead_run, ahead = _next(ahead_run, ahead, step, vectors)
                for b in range(BATCH):
                    if run < runs:
                        for k in range(b * width, (b + 1) * width):
                            distance = values[k] - pivot
                            total += distance
                            squared += distance * distance
                    run, at = _next(run, at, step, vectors)
            offset, around = _of_block(np.float64(total), np.float64(squared), scratch)
            if not centred:
                spread = around
                break
            offset /= count
            average, spread = np.float64(pivot) + offset, centred_squares(around, count, offset)
            if not spread < 0.5 * around:  # the same for all threads; NaN and constants need no second time
                break
            pivot = number(average)
        if thread == 0:
            result[0] = average
            put(means + (channel * chunks + chunk) * 8, result, 0)
            result[0] = spread
            put(squares + (channel * chunks + chunk) * 8, result, 0)

    return Kernel(f"runs_moments-{storage}-{width}-{centred}", runs_moments, "qqqqqqqqqqq", BLOCK)


@functools.cache
def apply(storage: str, width: int, centred: bool, by_column: bool) -> Kernel:
    """y, chunk by chunk. A channel's statistics are number channel // share, its parameters channel % parameters."""
    load, store = access(storage, width)
    computed = accumulation(storage)
    parameter, _ = access(computed, width if by_column else 1)
    statistic, _ = access("float64", 1)
    number, largest, size, wide = NUMBER[computed], LARGEST[computed], ITEMSIZE[storage], ITEMSIZE[computed]
    held, affine = BATCH * width, width if by_column else 1

    def runs_apply(
        x, y, mean, var, gamma, beta, outer, channels, inner, span, length, pieces, chunks, first_channel, share,
        parameters, eps,
    ):  # fmt: skip
        values = cuda.local.array(held, number)
        factors = cuda.local.array(affine, number)
        offsets = cuda.local.array(affine, number)
        wide_value = cuda.local.array(1, np.float64)
        thread, step = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        block = np.int64(cuda.blockIdx.x)
        channel, chunk = first_channel + block // chunks, block % chunks
        left, runs, vectors, start = _extent(channel, chunk, outer, channels, inner, span, length, pieces, width)
        start *= size
        stride = channels * inner * size
        average = 0.0
        if centred:
            statistic(mean + channel // share * 8, wide_value, 0)
            average = wide_value[0]
        statistic(var + channel // share * 8, wide_value, 0)
        factor = rstd(wide_value[0], eps)
        for k in range(affine):
            factors[k], offsets[k] = number(1.0), number(0.0)
        if not by_column:
            if gamma != 0:
                parameter(gamma + channel % parameters * wide, factors, 0)
            if beta != 0:
                parameter(beta + channel % parameters * wide, offsets, 0)
            factor *= np.float64(factors[0])
        near = number(average)
        rest = average - np.float64(near)
        scale = number(bounded(factor, largest))
        shift = number(-rest * factor) if by_column else number(np.float64(offsets[0]) - rest * factor)
        run, at = thread // vectors, thread % vectors
        while run < runs:
            ahead_run, ahead = run, at
            for b in range(BATCH):
                if ahead_run < runs:
                    load(x + start + ahead_run * stride + ahead * (width * size), values, b * width)
                ahead_run, ahead = _next(ahead_run, ahead, step, vectors)
            for b in range(BATCH):
                if run < runs:
                    if by_column:
                        if gamma != 0:
                            parameter(gamma + (left + at * width) * wide, factors, 0)
                        if beta != 0:
                            parameter(beta + (left + at * width) * wide, offsets, 0)
                    for k in range(width):
                        value = normalized(values[b * width + k], near, scale, shift)
                        if by_column:
                            value = value * factors[k] + offsets[k]
                        values[b * width + k] = value
                    store(y + start + run * stride + at * (width * size), values, b * width)
                run, at = _next(run, at, step, vectors)

    return Kernel(f"runs_apply-{storage}-{width}-{centred}-{by_column}", runs_apply, "qqqqqqqqqqqqqqqqd", BLOCK)


@functools.cache
def reduce(storage: str, width: int, centred: bool, by_column: bool) -> Kernel:
    """sum(g) and sum(g*(x - centre)) of each chunk, centre the mean rounded; g = dy*gamma for rows, else dy."""
    load, _ = access(storage, width)
    computed = accumulation(storage)
    parameter, _ = access(computed, width)
    statistic, put = access("float64", 1)
    number, size, wide = NUMBER[computed], ITEMSIZE[storage], ITEMSIZE[computed]

    def runs_reduce(
        dy, x, mean, gamma, sums_g, sums_g_centred, outer, channels, inner, span, length, pieces, chunks,
        first_channel, share,
    ):  # fmt: skip
        scratch = cuda.shared.array(SCRATCH, np.float64)
        xs = cuda.local.array(width, number)
        gs = cuda.local.array(width, number)
        factors = cuda.local.array(width, number)
        wide_value = cuda.local.array(1, np.float64)
        thread, step = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        block = np.int64(cuda.blockIdx.x)
        channel, chunk = first_channel + block // chunks, block % chunks
        left, runs, vectors, start = _extent(channel, chunk, outer, channels, inner, span, length, pieces, width)
        start *= size
        stride = channels * inner * size
        near = number(0.0)
        if centred:
            statistic(mean + channel // share * 8, wide_value, 0)
            near = number(wide_value[0])
        for k in range(width):
            factors[k] = number(1.0)
        total, product = number(0.0), number(0.0)
        run, at = thread // vectors, thread % vectors
        while run < runs:
            place = start + run * stride + at * (width * size)
            load(x + place, xs, 0)
            load(dy + place, gs, 0)
            if by_column and gamma != 0:
                parameter(gamma + (left + at * width) * wide, factors, 0)
            for k in range(width):
                g = gs[k] * factors[k] if by_column else gs[k]
                total += g
                product += g * (xs[k] - near)
            run, at = _next(run, at, step, vectors)
        all_total, all_product = _of_block(np.float64(total), np.float64(product), scratch)
        if thread == 0:
            wide_value[0] = all_total
            put(sums_g + (channel * chunks + chunk) * 8, wide_value, 0)
            wide_value[0] = all_product
            put(sums_g_centred + (channel * chunks + chunk) * 8, wide_value, 0)

    name = f"runs_reduce-{storage}-{width}-{centred}-{by_column}"
    return Kernel(name, runs_reduce, "qqqqqqqqqqqqqqq", BLOCK)


@functools.cache
def gradient(storage: str, width: int, centred: bool, by_column: bool) -> Kernel:
    """dx from the sums of a channel, or of the group or row that it is in; those of a group are of dy*gamma.

    folded: 1 where the sums are of dy alone and gamma is part of the scale, 0 where they are of dy*gamma.
    """
    load, store = access(storage, width)
    computed = accumulation(storage)
    parameter, _ = access(computed, width if by_column else 1)
    statistic, _ = access("float64", 1)
    number, largest, size, wide = NUMBER[computed], LARGEST[computed], ITEMSIZE[storage], ITEMSIZE[computed]
    affine = width if by_column else 1

    def runs_gradient(
        dy, x, dx, mean, var, gamma, sum_dy, sum_dy_xhat, outer, channels, inner, span, length, pieces, chunks,
        first_channel, share, parameters, folded, eps, count,
    ):  # fmt: skip
        xs = cuda.local.array(width, number)
        gs = cuda.local.array(width, number)
        factors = cuda.local.array(affine, number)
        wide_value = cuda.local.array(1, np.float64)
        thread, step = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        block = np.int64(cuda.blockIdx.x)
        channel, chunk = first_channel + block // chunks, block % chunks
        left, runs, vectors, start = _extent(channel, chunk, outer, channels, inner, span, length, pieces, width)
        start *= size
        stride = channels * inner * size
        of = channel // share * 8
        average = 0.0
        if centred:
            statistic(mean + of, wide_value, 0)
            average = wide_value[0]
        statistic(var + of, wide_value, 0)
        factor = rstd(wide_value[0], eps)
        mean_g = 0.0
        if centred:
            statistic(sum_dy + of, wide_value, 0)
            mean_g = wide_value[0] / count
        statistic(sum_dy_xhat + of, wide_value, 0)
        near = number(average)
        lift, slope = gradient_line(factor, average - np.float64(near), mean_g, wide_value[0] / count)
        lift, slope = number(lift), number(bounded(slope, largest))
        for k in range(affine):
            factors[k] = number(1.0)
        if not by_column and gamma != 0:
            parameter(gamma + channel % parameters * wide, factors, 0)
            if folded != 0:
                factor *= np.float64(factors[0])
                factors[0] = number(1.0)
        scale = number(bounded(factor, largest))
        run, at = thread // vectors, thread % vectors
        while run < runs:
            place = start + run * stride + at * (width * size)
            load(x + place, xs, 0)
            load(dy + place, gs, 0)
            if by_column and gamma != 0:
                parameter(gamma + (left + at * width) * wide, factors, 0)
            for k in range(width):
                g = gs[k] * (factors[k] if by_column else factors[0])
                gs[k] = input_gradient(g, xs[k], near, scale, lift, slope)
            store(dx + place, gs, 0)
            run, at = _next(run, at, step, vectors)

    name = f"runs_gradient-{storage}-{width}-{centred}-{by_column}"
    return Kernel(name, runs_gradient, "qqqqqqqqqqqqqqqqqqqdd", BLOCK)


FINISHED = 4
"""Channels of a block of the two kernels below, a warp each."""


@functools.cache
def finish_moments(centred: bool) -> Kernel:
    """mean and var of each channel from the moments of its chunks: the mean of means relative to the first, then each
    chunk's squares moved there. Chan's rule for many sets at once, in float64; equal means stay exact.

    share: adjacent channels that count as one, a group; each has `chunks` chunks of `rows` by `length` elements, but
    for the last ones.
    """
    read, put = access("float64", 1)

    def runs_finish_moments(
        means, squares, mean, var, outer, inner, rows, length, pieces, chunks, first_channel, last_channel, share
    ):  # fmt: skip
        scratch = cuda.shared.array(SCRATCH, np.float64)
        value = cuda.local.array(1, np.float64)
        lane = np.int64(cuda.threadIdx.x % WARP)
        channel = first_channel + np.int64(cuda.blockIdx.x) * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
        here = channel < last_channel
        parts = chunks * share
        last = parts if here else 0
        count = np.float64(outer * inner * share)
        pivot = 0.0
        if here:
            read(means + channel * parts * 8, value, 0)
            pivot = value[0]
        total, unused = 0.0, 0.0
        for part in range(lane, last, WARP):
            chunk = part % chunks
            read(means + (channel * parts + part) * 8, value, 0)
            n = min(rows, outer - chunk // pieces * rows) * min(length, inner - chunk % pieces * length)
            total += n * (value[0] - pivot)
        total, unused = _of_warp(total, unused, scratch)
        average = pivot + total / count
        spread = 0.0
        for part in range(lane, last, WARP):
            chunk = part % chunks
            read(means + (channel * parts + part) * 8, value, 0)
            n = min(rows, outer - chunk // pieces * rows) * min(length, inner - chunk % pieces * length)
            distance = value[0] - average
            if centred:
                spread += n * distance * distance
            read(squares + (channel * parts + part) * 8, value, 0)
            spread += value[0]
        spread, unused = _of_warp(spread, unused, scratch)
        if here and lane == 0:
            if centred:
                value[0] = average
                put(mean + channel * 8, value, 0)
            value[0] = spread / count
            put(var + channel * 8, value, 0)

    return Kernel(f"runs_finish_moments-{centred}", runs_finish_moments, "qqqqqqqqqqqqq", FINISHED * WARP)


@functools.cache
def finish_sums(computed: str, centred: bool, plain: bool) -> Kernel:
    """sum(g) and sum(g*xhat) of each channel from those of its chunks; `plain`: they are of g*xhat already."""
    read, put = access("float64", 1)
    number = NUMBER[computed]

    def runs_finish_sums(
        sums_g, sums_g_centred, mean, var, sum_g, sum_g_xhat, chunks, first_channel, last_channel, share, eps
    ):  # fmt: skip
        scratch = cuda.shared.array(SCRATCH, np.float64)
        value = cuda.local.array(1, np.float64)
        lane = np.int64(cuda.threadIdx.x % WARP)
        channel = first_channel + np.int64(cuda.blockIdx.x) * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
        here = channel < last_channel
        total, product = 0.0, 0.0
        for chunk in range(lane, chunks if here else 0, WARP):
            read(sums_g + (channel * chunks + chunk) * 8, value, 0)
            total += value[0]
            read(sums_g_centred + (channel * chunks + chunk) * 8, value, 0)
            product += value[0]
        total, product = _of_warp(total, product, scratch)
        if here and lane == 0:
            if not plain:
                average = 0.0
                if centred:
                    read(mean + channel // share * 8, value, 0)
                    average = value[0]
                read(var + channel // share * 8, value, 0)
                product = sum_times_xhat(rstd(value[0], eps), average - np.float64(number(average)), total, product)
            value[0] = total
            put(sum_g + channel * 8, value, 0)
            value[0] = product
            put(sum_g_xhat + channel * 8, value, 0)

    name = f"runs_finish_sums-{computed}-{centred}-{plain}"
    return Kernel(name, runs_finish_sums, "qqqqqqqqqqd", FINISHED * WARP)


@functools.cache
def fold(computed: str) -> Kernel:
    """Sums over the channels of a group, each times its gamma, or over samples: result[i] is the sum of
    values[i*base + j*stride] for j < count, whose channel is the index modulo `channels`."""
    read, put = access("float64", 1)
    parameter, _ = access(computed, 1)
    number, wide = NUMBER[computed], ITEMSIZE[computed]

    def runs_fold(values, gamma, result, n, base, stride, count, channels):
        value = cuda.local.array(1, np.float64)
        single = cuda.local.array(1, number)
        i = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if i >= n:
            return
        total, factor = 0.0, 1.0
        for j in range(count):
            at = i * base + j * stride
            read(values + at * 8, value, 0)
            if gamma != 0:
                parameter(gamma + at % channels * wide, single, 0)
                factor = np.float64(single[0])
            total += factor * value[0]
        value[0] = total
        put(result + i * 8, value, 0)

    return Kernel(f"runs_fold-{computed}", runs_fold, "qqqqqqqq", FINISHED * WARP)
