"""Loads and stores by address, up to 16 bytes in one instruction, with conversion to and from the computed type.

    load(address, values, at)       values[at : at + width] = the elements there
    store(address, values, at)      the same back, rounded to the storage type

values is a local array of float32, of float64 for float64. An address has to be a multiple of the bytes that are
moved, of 16 at most. Numba makes no 128-bit access of plain code, nor of unrolled code: these are intrinsics.
In the simulator, where an address is the host's, they are ctypes.
"""

# mypy: ignore-errors
# Numba infers the types of what it compiles.

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from fastnorm.backends.numba_cuda._launch import SIMULATED

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_LLVM = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_I64 = ir.IntType(64)


def accumulation(storage: str) -> str:
    """The type that elements of a storage type are computed in."""
    return "float64" if storage == "float64" else "float32"


@functools.cache
def access(storage: str, width: int) -> tuple[Any, Any]:
    """(load, store) of `width` elements, a power of two."""
    return (_host_access if SIMULATED else _device_access)(storage, width)


# ---- on the device --------------------------------------------------------------------------------


def _device_access(storage: str, width: int) -> tuple[Any, Any]:
    from numba.cuda.extending import intrinsic
    from numba.cuda.np import arrayobj

    half = storage in ("float16", "bfloat16")
    size = ITEMSIZE[storage]
    align = min(16, size * width)
    lane = ir.IntType(16) if half else _LLVM[storage]
    lanes = ir.VectorType(lane, width)
    # Halves travel as 32-bit words: of a vector of 16-bit lanes the compiler makes 16-bit loads.
    moved = ir.VectorType(ir.IntType(32), width // 2) if half and width > 1 else lanes

    def at_address(builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, ir.PointerType(moved, addrspace=1))

    def element(context: Any, builder: Any, kind: Any, values: Any, at: Any, k: int) -> Any:
        data = arrayobj.make_array(kind)(context, builder, values).data
        return builder.gep(data, [builder.add(at, _I64(k))])

    def widened(builder: Any, bits: Any) -> Any:
        if storage == "float16":
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        if storage == "bfloat16":
            word = builder.shl(builder.zext(bits, ir.IntType(32)), ir.IntType(32)(16))
            return builder.bitcast(word, ir.FloatType())
        return bits

    def unpacked(builder: Any, word: Any) -> Any:
        return (builder.trunc(word, lane), builder.trunc(builder.lshr(word, ir.IntType(32)(16)), lane))

    def narrowed(builder: Any, value: Any) -> Any:
        if storage == "float16":
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        if storage == "bfloat16":
            return assembly(builder, ir.IntType(16), "cvt.rn.bf16.f32 $0, $1;", "=h,f", value)
        return value

    def pair(builder: Any, low: Any, high: Any) -> Any:
        kind = "f16x2" if storage == "float16" else "bf16x2"
        return assembly(builder, ir.IntType(32), f"cvt.rn.{kind}.f32 $0, $1, $2;", "=r,f,f", high, low)

    def assembly(builder: Any, result: Any, text: str, constraints: str, *values: Any) -> Any:
        kind = ir.FunctionType(result, [value.type for value in values])
        return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=False), values)

    @intrinsic
    def load(typing: Any, address: Any, values: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = builder.load(at_address(builder, arguments[0]), align=align)
            found = [builder.extract_element(vector, ir.IntType(32)(k)) for k in range(moved.count)]
            found = [half for word in found for half in unpacked(builder, word)] if moved != lanes else found
            for k, value in enumerate(found):
                builder.store(widened(builder, value), element(context, builder, values, arguments[1], arguments[2], k))
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64), generate

    @intrinsic
    def store(typing: Any, address: Any, values: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            found = [
                builder.load(element(context, builder, values, arguments[1], arguments[2], k)) for k in range(width)
            ]
            if moved == lanes:
                found = [narrowed(builder, value) for value in found]
            else:
                found = [pair(builder, *two) for two in zip(found[::2], found[1::2], strict=True)]
            vector = ir.Constant(moved, ir.Undefined)
            for k, value in enumerate(found):
                vector = builder.insert_element(vector, value, ir.IntType(32)(k))
            builder.store(vector, at_address(builder, arguments[0]), align=align)
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64), generate

    return load, store


# ---- in the simulator -----------------------------------------------------------------------------


def _at(address: int, dtype: Any, count: int) -> Any:
    return np.frombuffer((ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(int(address)), dtype)


def _host_access(storage: str, width: int) -> tuple[Any, Any]:
    size = ITEMSIZE[storage] * width
    raw = np.uint16 if storage == "bfloat16" else storage

    def checked(address: int) -> int:
        assert address % min(16, size) == 0, f"an access of {size} bytes at {address}"
        return address

    def load(address: int, values: Any, at: int) -> None:
        found = _at(checked(address), raw, width)
        if storage == "bfloat16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        values[at : at + width] = found

    def store(address: int, values: Any, at: int) -> None:
        found = np.array(values[at : at + width])
        if storage == "bfloat16":
            bits = found.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            found = np.where(np.isnan(found), 0x7FFF, rounded)
        with np.errstate(over="ignore"):
            _at(checked(address), raw, width)[:] = found.astype(raw)

    return load, store
