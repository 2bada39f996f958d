"""Dropout: y[i] = x[i]*scale where the random word of element first + i is below the threshold, else 0.

A thread draws the eight numbers of a counter of the generator at once, for elements whose index // 8 is the same: the
upper halves of their words. It draws the lower ones where an upper half is that of the threshold.
"""

# mypy: ignore-errors
# Numba infers the types of kernels; x and y are addresses.

from __future__ import annotations

import functools

import numpy as np
from numba import cuda

from fastnorm.backends import numba_formulas as formulas
from fastnorm.backends.numba_cuda._launch import Kernel, device
from fastnorm.backends.numba_cuda._memory import ITEMSIZE, access, accumulation
from fastnorm.backends.numba_cuda._plan import BLOCK
from fastnorm.backends.numba_cuda._scalars import NUMBER

NUMBERS = 8
"""Of a counter."""

philox = device(formulas.philox)
numbers_below = device(formulas.numbers_below)


@functools.cache
def dropout(storage: str, width: int) -> Kernel:
    """width: 4 where x and y may be moved four elements at a time and `first` is a multiple of 8, else 1."""
    load, store = access(storage, width)
    number, size = NUMBER[accumulation(storage)], ITEMSIZE[storage]

    def dropout_kernel(x, y, n, first, seed, threshold, scale):
        values = cuda.local.array(width, number)
        group = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x + first // NUMBERS
        begin = group * NUMBERS - first
        if begin >= n:
            return
        upper, lower = np.uint64(threshold >> 16), np.uint64(threshold & 0xFFFF)
        words = philox(np.uint64(group), 0, seed)
        kept = numbers_below(words, upper)
        ties = numbers_below(words, upper + np.uint64(1)) & ~kept
        if ties != 0:
            kept |= ties & numbers_below(philox(np.uint64(group), 1, seed), lower)
        factor = number(scale)
        for j in range(0, NUMBERS, width):
            at = begin + j
            if at >= 0 and at + width <= n:
                load(x + at * size, values, 0)
                for k in range(width):
                    values[k] = values[k] * factor if kept >> (j + k) & 1 else number(0.0)
                store(y + at * size, values, 0)
            elif width > 1:
                for k in range(width):
                    if at + k < n:
                        one_load(x + (at + k) * size, values, 0)
                        values[0] = values[0] * factor if kept >> (j + k) & 1 else number(0.0)
                        one_store(y + (at + k) * size, values, 0)

    one_load, one_store = access(storage, 1)
    return Kernel(f"dropout-{storage}-{width}", dropout_kernel, "qqqqqqd", BLOCK)
