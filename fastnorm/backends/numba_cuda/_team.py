"""Sums over the threads of a team, a warp or a whole block, in an order that its size alone decides."""

# mypy: ignore-errors
# Numba infers the types of what it compiles.

from __future__ import annotations

from typing import Any

from numba import cuda

from fastnorm.backends.numba_cuda._launch import SIMULATED, device

WARP = 32
SCRATCH = 2048 if SIMULATED else 64
"""Float64 of shared memory that `block_sums` and `warp_sums` need: two for each warp, in the simulator each thread."""


@device
def _butterfly(value):
    """The sum over a warp, in every lane the same bits."""
    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, 16)
    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, 8)
    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, 4)
    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, 2)
    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, 1)
    return value


@device
def _warp_sums(a, b, scratch):
    return _butterfly(a), _butterfly(b)


@device
def _block_sums(a, b, scratch):
    a, b = _butterfly(a), _butterfly(b)
    warp = cuda.threadIdx.x // WARP
    if cuda.threadIdx.x % WARP == 0:
        scratch[2 * warp], scratch[2 * warp + 1] = a, b
    cuda.syncthreads()
    a, b = scratch[0], scratch[1]
    for other in range(1, cuda.blockDim.x // WARP):
        a += scratch[2 * other]
        b += scratch[2 * other + 1]
    cuda.syncthreads()  # before the next sums come
    return a, b


def _simulated_sums(whole: bool) -> Any:
    from numba.cuda.simulator.kernel import _get_kernel_context

    def sums(a: float, b: float, scratch: Any) -> tuple[float, float]:
        context = _get_kernel_context()  # the simulator lends threads their `cuda` in the kernel's own module alone
        thread, lanes = context.threadIdx.x, context.blockDim.x if whole else WARP
        scratch[2 * thread : 2 * thread + 2] = a, b
        context.syncthreads()
        first = thread // lanes * lanes
        a, b = scratch[2 * first : 2 * (first + lanes)].reshape(lanes, 2).sum(axis=0)
        context.syncthreads()
        return a, b

    return sums


def sums(whole: bool) -> Any:
    """sums(a, b, scratch): two float64 over the warp, or the whole block of a multiple of 32 threads. All threads
    of the block have to call it, each the same number of times."""
    if SIMULATED:
        return _simulated_sums(whole)
    return _block_sums if whole else _warp_sums
