"""The row family where a row fits the registers of a team: (rows, cols), gamma and beta by column.

A team is a warp, several of a block, or a whole block. Thread `lane` of a team has vectors lane, lane + lanes, ...
of the row, `vectors` of them at most; x is read once. Longer rows go through `_runs`.
"""

# mypy: ignore-errors
# Numba infers the types of kernels; x, dy, y, dx, gamma, beta, mean, var are addresses, 0 where there is none.

from __future__ import annotations

import functools

import numpy as np
from numba import cuda

from fastnorm.backends.numba_cuda import _plan
from fastnorm.backends.numba_cuda._launch import Kernel
from fastnorm.backends.numba_cuda._memory import ITEMSIZE, access, accumulation
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


@functools.cache
def forward(storage: str, width: int, vectors: int, whole: bool, centred: bool) -> Kernel:
    """Each row's statistics, exact two-pass in registers, then y."""
    load, store = access(storage, width)
    first, _ = access(storage, 1)
    computed = accumulation(storage)
    parameter, _ = access(computed, width)
    _, keep = access("float64", 1)
    number, largest, size, wide = NUMBER[computed], LARGEST[computed], ITEMSIZE[storage], ITEMSIZE[computed]
    add, elements = sums(whole), vectors * width

    def row_forward(x, y, gamma, beta, mean, var, rows, cols, eps):
        scratch = cuda.shared.array(SCRATCH, np.float64)
        values = cuda.local.array(elements, number)
        factors = cuda.local.array(width, number)
        offsets = cuda.local.array(width, number)
        single = cuda.local.array(1, number)
        result = cuda.local.array(1, np.float64)
        if whole:
            lane, lanes, row = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x), np.int64(cuda.blockIdx.x)
        else:
            lane, lanes = np.int64(cuda.threadIdx.x % WARP), np.int64(WARP)
            row = np.int64(cuda.blockIdx.x) * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
        pieces = cols // width if row < rows else 0
        start = x + row * cols * size
        for v in range(vectors):
            if lane + v * lanes < pieces:
                load(start + (lane + v * lanes) * (width * size), values, v * width)
        centre = number(0.0)
        if centred:  # the mean, relative to the first value: that of a constant is exact
            single[0] = 0.0
            if row < rows:
                first(start, single, 0)
            pivot, total = single[0], number(0.0)
            for v in range(vectors):
                if lane + v * lanes < pieces:
                    for k in range(v * width, (v + 1) * width):
                        total += values[k] - pivot
            whole_sum, _unused = add(np.float64(total), 0.0, scratch)
            centre = number(np.float64(pivot) + whole_sum / cols)
        total, squares = number(0.0), number(0.0)
        for v in range(vectors):
            if lane + v * lanes < pieces:
                for k in range(v * width, (v + 1) * width):
                    distance = values[k] - centre
                    total += distance
                    squares += distance * distance
        offset, spread = add(np.float64(total), np.float64(squares), scratch)
        if centred:
            offset /= cols
        else:
            offset = 0.0
        average = np.float64(centre) + offset
        variance = centred_squares(spread, cols, offset) / cols
        if row < rows and lane == 0:
            if centred:
                result[0] = average
                keep(mean + row * 8, result, 0)
            result[0] = variance
            keep(var + row * 8, result, 0)
        factor = rstd(variance, eps)
        near = number(average)
        scale = number(bounded(factor, largest))
        shift = number((np.float64(near) - average) * factor)
        target = y + row * cols * size
        for k in range(width):
            factors[k], offsets[k] = number(1.0), number(0.0)
        for v in range(vectors):
            at = lane + v * lanes
            if at < pieces:
                if gamma != 0:
                    parameter(gamma + at * (width * wide), factors, 0)
                if beta != 0:
                    parameter(beta + at * (width * wide), offsets, 0)
                for k in range(width):
                    values[v * width + k] = (
                        normalized(values[v * width + k], near, scale, shift) * factors[k] + offsets[k]
                    )
                store(target + at * (width * size), values, v * width)

    name = f"row_forward-{storage}-{width}-{vectors}-{whole}-{centred}"
    return Kernel(name, row_forward, "qqqqqqqqd", _plan.MOST_THREADS if whole else _plan.FORWARD_BLOCK)


@functools.cache
def backward(storage: str, width: int, vectors: int, whole: bool, centred: bool, held: bool) -> Kernel:
    """dx of `part` rows a block, and their share of dgamma and dbeta.

    held: dy and x stay in registers between the sums and dx; else they are read again, from L1 and L2.
    parts: addresses of the shares, dgamma's and dbeta's, (blocks, cols) in the accumulation type.
    """
    load, store = access(storage, width)
    computed = accumulation(storage)
    parameter, put = access(computed, width)
    read, _ = access("float64", 1)
    number, largest, size, wide = NUMBER[computed], LARGEST[computed], ITEMSIZE[storage], ITEMSIZE[computed]
    add, elements = sums(whole), vectors * width
    kept = elements if held else width
    step = width if held else 0
    shared = 1 if whole else 2 * WARP * elements

    def row_backward(dy, x, dx, gamma, mean, var, part_dgamma, part_dbeta, rows, cols, part, eps):
        scratch = cuda.shared.array(SCRATCH, np.float64)
        both = cuda.shared.array(shared, number)
        xs = cuda.local.array(kept, number)
        gs = cuda.local.array(kept, number)
        sum_product = cuda.local.array(elements, number)
        sum_grad = cuda.local.array(elements, number)
        factors = cuda.local.array(width, number)
        single = cuda.local.array(1, np.float64)
        thread = np.int64(cuda.threadIdx.x)
        if whole:
            lane, lanes, team, teams = thread, np.int64(cuda.blockDim.x), np.int64(0), np.int64(1)
        else:
            lane, lanes, team, teams = thread % WARP, np.int64(WARP), thread // WARP, np.int64(cuda.blockDim.x // WARP)
        for k in range(elements):
            sum_product[k], sum_grad[k] = number(0.0), number(0.0)
        for k in range(width):
            factors[k] = number(1.0)
        block = np.int64(cuda.blockIdx.x)
        for turn in range(block * part, (block + 1) * part, teams):  # as often in every team: `add` wants all threads
            row = turn + team
            there = row < rows and row < (block + 1) * part
            pieces = cols // width if there else 0
            start = row * cols * size
            average, variance = 0.0, 0.0
            if there:
                if centred:
                    read(mean + row * 8, single, 0)
                    average = single[0]
                read(var + row * 8, single, 0)
                variance = single[0]
            factor = rstd(variance, eps)
            near = number(average)
            rest = average - np.float64(near)
            scale, shift = number(bounded(factor, largest)), number(rest * factor)
            sum_g, sum_g_centred = number(0.0), number(0.0)
            for v in range(vectors):
                at = lane + v * lanes
                if at < pieces:
                    load(start + x + at * (width * size), xs, v * step)
                    load(start + dy + at * (width * size), gs, v * step)
                    if gamma != 0:
                        parameter(gamma + at * (width * wide), factors, 0)
                    for k in range(width):
                        grad, distance = gs[v * step + k], xs[v * step + k] - near
                        g = grad * factors[k]
                        sum_g += g
                        sum_g_centred += g * distance
                        sum_product[v * width + k] += grad * (distance * scale - shift)
                        sum_grad[v * width + k] += grad
                        gs[v * step + k] = g
            total_g, total_g_centred = add(np.float64(sum_g), np.float64(sum_g_centred), scratch)
            mean_g_xhat = sum_times_xhat(factor, rest, total_g, total_g_centred) / cols
            mean_g = total_g / cols if centred else 0.0
            lift, slope = gradient_line(factor, rest, mean_g, mean_g_xhat)
            lift, slope = number(lift), number(bounded(slope, largest))
            for v in range(vectors):
                at = lane + v * lanes
                if at < pieces:
                    if not held:
                        load(start + x + at * (width * size), xs, 0)
                        load(start + dy + at * (width * size), gs, 0)
                        if gamma != 0:
                            parameter(gamma + at * (width * wide), factors, 0)
                        for k in range(width):
                            gs[k] *= factors[k]
                    for k in range(v * step, v * step + width):
                        gs[k] = input_gradient(gs[k], xs[k], near, scale, lift, slope)
                    store(start + dx + at * (width * size), gs, v * step)
        if part_dgamma == 0:
            return
        if not whole:  # the teams' sums, one after the other
            for turn in range(teams):
                if team == turn:
                    for v in range(vectors):
                        for k in range(v * width, (v + 1) * width):
                            at = 2 * ((lane + v * lanes) * width + k - v * width)
                            if turn > 0:
                                sum_product[k] += both[at]
                                sum_grad[k] += both[at + 1]
                            both[at], both[at + 1] = sum_product[k], sum_grad[k]
                cuda.syncthreads()
        if team == teams - 1:
            for v in range(vectors):
                at = lane + v * lanes
                if at < cols // width:
                    put(part_dgamma + (block * cols + at * width) * wide, sum_product, v * width)
                    put(part_dbeta + (block * cols + at * width) * wide, sum_grad, v * width)

    name = f"row_backward-{storage}-{width}-{vectors}-{whole}-{centred}-{held}"
    return Kernel(name, row_backward, "qqqqqqqqqqqd", _plan.MOST_THREADS if whole else _plan.BACKWARD_BLOCK)


COLUMNS, SLICES = WARP, 32
"""Of a block of `finish`: a warp reads one slice of the parts, 32 columns side by side."""


@functools.cache
def finish(computed: str) -> Kernel:
    """dgamma and dbeta: the parts of each column added up in float64, slice by slice."""
    read, _ = access(computed, 1)
    _, put = access("float64", 1)
    number, wide = NUMBER[computed], ITEMSIZE[computed]

    shared = 2 * COLUMNS * SLICES

    def row_finish(part_dgamma, part_dbeta, dgamma, dbeta, parts, cols):
        slices = np.int64(cuda.blockDim.x) // COLUMNS
        partial = cuda.shared.array(shared, np.float64)
        value = cuda.local.array(1, number)
        result = cuda.local.array(1, np.float64)
        thread = np.int64(cuda.threadIdx.x)
        column = np.int64(cuda.blockIdx.x) * COLUMNS + thread % COLUMNS
        product, grad = 0.0, 0.0
        if column < cols:
            for part in range(thread // COLUMNS, parts, slices):
                read(part_dgamma + (part * cols + column) * wide, value, 0)
                product += np.float64(value[0])
                read(part_dbeta + (part * cols + column) * wide, value, 0)
                grad += np.float64(value[0])
        partial[2 * thread], partial[2 * thread + 1] = product, grad
        cuda.syncthreads()
        if thread < COLUMNS and column < cols:
            for other in range(thread + COLUMNS, slices * COLUMNS, COLUMNS):
                product += partial[2 * other]
                grad += partial[2 * other + 1]
            result[0] = product
            put(dgamma + column * 8, result, 0)
            result[0] = grad
            put(dbeta + column * 8, result, 0)

    return Kernel(f"row_finish-{computed}", row_finish, "qqqqqq", COLUMNS * SLICES)
