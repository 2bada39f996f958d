"""What the ops do with device memory besides kernels of the contract: copy, mix, fill, order streams, allocate.

A copy converts and takes any strides, so packing, parameters of another dtype and gradients all are one kernel:

    target[i] = as target's dtype(source[i])        for every index i
"""

# mypy: ignore-errors
# Numba infers the types of what it compiles.

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, types

from fastnorm.backends.numba_cuda._launch import SIMULATED, Kernel
from fastnorm.backends.numba_cuda._memory import ITEMSIZE, access, accumulation

THREADS, BLOCKS = (32, 2) if SIMULATED else (256, 1 << 16)
"""Of a block, and at most of a grid: a thread goes on through the rest in steps of the grid."""
AXES = 4
"""That the kernel walks; further ones, which only arrays of five axes and more in odd orders have, are launches."""


WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
"""The integers that int64 holds."""


def _name(array: Any) -> str:
    """The dtype of an array's elements; a bool is a byte."""
    return "uint8" if array.dtype.name == "bool" else array.dtype.name


def _held(name: str) -> Any:
    """The type that an element is loaded as."""
    return getattr(types, accumulation(name)) if name in ITEMSIZE else types.int64


def _size(name: str) -> int:
    return ITEMSIZE[name] if name in ITEMSIZE else np.dtype(name).itemsize


def _loading(name: str) -> Any:
    """load(address, values, at) of one element of any dtype."""
    if name in ITEMSIZE:
        return access(name, 1)[0]
    return _host_whole(name) if SIMULATED else _device_whole(name)


def _host_whole(name: str) -> Any:
    def load(address: int, values: Any, at: int) -> None:
        values[at] = np.frombuffer((ctypes.c_char * _size(name)).from_address(int(address)), name)[0]

    return load


def _device_whole(name: str) -> Any:
    from numba.cuda.extending import intrinsic
    from numba.cuda.np import arrayobj

    own, wide = ir.IntType(8 * _size(name)), ir.IntType(64)

    @intrinsic
    def load(typing: Any, address: Any, values: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(builder.inttoptr(arguments[0], ir.PointerType(own, addrspace=1)))
            if own != wide:
                value = builder.zext(value, wide) if name.startswith("u") else builder.sext(value, wide)
            data = arrayobj.make_array(signature.args[1])(context, builder, arguments[1]).data
            builder.store(value, builder.gep(data, [arguments[2]]))
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64), generate

    return load


def _launch(kernel: Kernel, x: Any, count: int, *arguments: Any) -> None:
    kernel.launch(x, min(BLOCKS, -(-count // THREADS)), THREADS, *arguments)


@functools.cache
def _copying(source_name: str, target_name: str) -> Kernel:
    load = _loading(source_name)
    _, store = access(target_name, 1)
    held, kept = _held(source_name), _held(target_name)

    def copy(source, target, count, n1, n2, n3, s0, s1, s2, s3, t0, t1, t2, t3):
        value, result = cuda.local.array(1, held), cuda.local.array(1, kept)
        position = cuda.grid(1)
        while position < count:
            rest = position // n3
            i3 = position - rest * n3
            over = rest // n2
            i2 = rest - over * n2
            i0 = over // n1
            i1 = over - i0 * n1
            load(source + i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3, value, 0)
            result[0] = value[0]
            store(target + i0 * t0 + i1 * t1 + i2 * t2 + i3 * t3, result, 0)
            position += cuda.gridsize(1)

    return Kernel(f"copy-{source_name}-{target_name}", copy, "q" * 14, THREADS)


@functools.cache
def _mixing(running_name: str, target_name: str) -> Kernel:
    load = _loading(running_name)
    load_batch, _ = access("float64", 1)
    _, store = access(target_name, 1)
    held, kept = _held(running_name), _held(target_name)
    running_size, target_size = _size(running_name), _size(target_name)

    def mix(target, running, batch, count, started, share, entering):
        old, result = cuda.local.array(1, held), cuda.local.array(1, kept)
        new = cuda.local.array(1, types.float64)
        position = cuda.grid(1)
        while position < count:
            load_batch(batch + position * 8, new, 0)
            mixed = entering * new[0]
            if started != 0:  # else there is nothing, which is not 0 times what is there
                load(running + position * running_size, old, 0)
                mixed += share * old[0]
            result[0] = mixed
            store(target + position * target_size, result, 0)
            position += cuda.gridsize(1)

    return Kernel(f"mix-{running_name}-{target_name}", mix, "qqqqqdd", THREADS)


@functools.cache
def _filling(name: str) -> Kernel:
    _, store = access(name, 1)
    kept, size = _held(name), _size(name)

    def fill(target, count, value):
        single = cuda.local.array(1, kept)
        single[0] = value
        position = cuda.grid(1)
        while position < count:
            store(target + position * size, single, 0)
            position += cuda.gridsize(1)

    return Kernel(f"fill-{name}", fill, "qqd", THREADS)


def merged_axes(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int, int]]:
    """(length, step, step) of the fewest axes that walk two arrays of this shape, by the first one's falling steps."""
    axes: list[tuple[int, int, int]] = []
    for axis in sorted((axis for axis, n in enumerate(shape) if n != 1), key=lambda axis: -abs(first[axis])):
        n, a, b = shape[axis], first[axis], second[axis]
        if axes and axes[-1][1:] == (a * n, b * n):
            axes[-1] = axes[-1][0] * n, a, b
        else:
            axes.append((n, a, b))
    return axes


def copy(target: Any, source: Any) -> None:
    """target[...] = source, both descriptors of one shape, of any strides; any dtype into a floating one.

    TypeError where the source has unsigned integers of 64 bits.
    """
    if math.prod(target.shape) == 0:
        return
    name = _name(source)
    if name not in (*ITEMSIZE, *WHOLE):
        raise TypeError(f"expected floating numbers, integers that int64 holds or bools on a device, got dtype {name}")
    kernel = _copying(name, _name(target))
    axes = merged_axes(target.shape, target.strides, source.strides)
    inner = [(1, 0, 0)] * (AXES - len(axes)) + axes[-AXES:]
    lengths, to, at = zip(*inner, strict=True)
    count = math.prod(lengths)
    for index in itertools.product(*(range(n) for n, _, _ in axes[:-AXES])):
        outer = list(zip(index, axes, strict=False))
        begin = target.pointer + sum(i * a for i, (_, a, _) in outer)
        start = source.pointer + sum(i * b for i, (_, _, b) in outer)
        _launch(kernel, target, count, start, begin, count, *lengths[1:], *at, *to)


def mix(target: Any, running: Any | None, batch: Any, share: float, entering: float) -> None:
    """target = share*running + entering*batch in float64, then target's dtype; no running counts as zeros.

    target and batch are in C order, batch is float64.
    """
    count = math.prod(target.shape)
    if count == 0:
        return
    if running is not None and not running.c_contiguous:
        running = running.astype(running.dtype)
    old = batch if running is None else running
    kernel = _mixing(_name(old), _name(target))
    started = int(running is not None)
    _launch(
        kernel, target, count, target.pointer, old.pointer, batch.pointer, count, started, float(share), float(entering)
    )


def fill(target: Any, value: float) -> None:
    """One value all over an array of floating numbers in C order."""
    count = math.prod(target.shape)
    if count:
        _launch(_filling(_name(target)), target, count, target.pointer, count, float(value))


def follow(stream: int, after: int, device: int) -> None:
    """Let further work on `stream` wait for all that is on the stream `after` now."""
    if SIMULATED:
        return
    with cuda.gpus[device]:
        event = cuda.event(timing=False)
        event.record(cuda.external_stream(after))
        event.wait(cuda.external_stream(stream))


def device_array(shape: Sequence[int], strides: Sequence[int], dtype: Any, device: int, stream: Any) -> Any:
    """A Numba array, uninitialised. MemoryError where the device has too little memory left."""
    with cuda.gpus[device]:
        try:
            return cuda.device_array(tuple(shape), dtype, strides=tuple(strides), stream=stream)
        except cuda.cudadrv.driver.CudaAPIError as error:
            if "OUT_OF_MEMORY" not in str(error):
                raise
            size = math.prod(shape) * dtype.itemsize
            raise MemoryError(f"cuda:{device} has no {size} bytes left for an array of shape {tuple(shape)}") from error


def current_device() -> int:
    """The device that the calling thread works on."""
    return 0 if SIMULATED else cuda.get_current_device().id
