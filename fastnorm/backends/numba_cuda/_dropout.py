"""Dropout: y[i] = x[i]*scale where word first + i of Philox-4x32-10 is below the threshold, else 0.

A thread draws the four words of a block of the generator at once, for elements whose number // 4 is the same.
"""

# mypy: ignore-errors
# Numba infers the types of kernels; x and y are addresses.

from __future__ import annotations

import functools

import numpy as np
from numba import cuda

from fastnorm.backends.numba_cuda._launch import Kernel
from fastnorm.backends.numba_cuda._memory import ITEMSIZE, access, accumulation
from fastnorm.backends.numba_cuda._plan import BLOCK
from fastnorm.backends.numba_cuda._scalars import NUMBER

M0, M1, W0, W1 = (np.uint64(n) for n in (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@functools.cache
def dropout(storage: str, width: int) -> Kernel:
    """width: 4 where x and y may be moved four elements at a time and `first` is a multiple of 4, else 1."""
    load, store = access(storage, width)
    number, size = NUMBER[accumulation(storage)], ITEMSIZE[storage]

    def dropout_kernel(x, y, n, first, seed, threshold, scale):
        values = cuda.local.array(width, number)
        words = cuda.local.array(4, np.uint64)
        group = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x + first // 4
        begin = group * 4 - first
        if begin >= n:
            return
        index = np.uint64(group)
        c0, c1, c2, c3 = index & LOW, index >> HALF, np.uint64(0), np.uint64(0)
        k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
        for _ in range(10):
            even, odd = c0 * M0, c2 * M1
            c0, c1, c2, c3 = (odd >> HALF) ^ c1 ^ k0, odd & LOW, (even >> HALF) ^ c3 ^ k1, even & LOW
            k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
        words[0], words[1], words[2], words[3] = c0, c1, c2, c3
        factor, below = number(scale), np.uint64(threshold)
        for j in range(0, 4, width):
            at = begin + j
            if at >= 0 and at + width <= n:
                load(x + at * size, values, 0)
                for k in range(width):
                    values[k] = values[k] * factor if words[j + k] < below else number(0.0)
                store(y + at * size, values, 0)
            elif width > 1:
                for k in range(width):  # unrolled, so that the words stay in registers
                    if at + k < n:
                        one_load(x + (at + k) * size, values, 0)
                        values[0] = values[0] * factor if words[j + k] < below else number(0.0)
                        one_store(y + (at + k) * size, values, 0)

    one_load, one_store = access(storage, 1)
    return Kernel(f"dropout-{storage}-{width}", dropout_kernel, "qqqqqqd", BLOCK)
