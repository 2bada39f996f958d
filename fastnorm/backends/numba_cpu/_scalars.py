"""Elements of storage arrays as numbers to compute with, and the formulas compiled for the CPU.

Storage is told apart by the element type of the array: float32 and float64 as they are, float16 as
uint16, bfloat16 as int16. Halves and float32 are computed with in float32, float64 in float64.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from fastnorm.backends import numba_formulas as formulas
from fastnorm.backends.numba_cpu._launch import HELPER, compiled

FLOAT16 = types.uint16
BFLOAT16 = types.int16

rstd = compiled(formulas.rstd)
_bounded = compiled(formulas.bounded)
centred_squares = compiled(formulas.centred_squares)
merged_mean = compiled(formulas.merged_mean)
merged_squares = compiled(formulas.merged_squares)
normalized = compiled(formulas.normalized)
input_gradient = compiled(formulas.input_gradient)
_gradient_line = compiled(formulas.gradient_line)
sum_times_xhat = compiled(formulas.sum_times_xhat)
_widened_bfloat16 = compiled(formulas.widened_bfloat16)
_narrowed_bfloat16 = compiled(formulas.narrowed_bfloat16)


def _accumulation(array: types.Array) -> Any:
    """The type in which elements of this storage are computed with."""
    return types.float64 if array.dtype == types.float64 else types.float32


@intrinsic
def _element(typing: Any, array: Any, index: Any) -> Any:
    """array[index] without the wrap-around of negative indices, which would keep loops from vectorising."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), generate


@intrinsic
def _set_element(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, likewise."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0]).data
        builder.store(arguments[2], builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), generate


@intrinsic
def _widened_float16(typing: Any, bits: Any) -> Any:
    """float16 -> float32 in one instruction; Numba has no float16 arithmetic on the CPU."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrowed_float16(typing: Any, value: Any) -> Any:
    """float32 -> float16, nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def rounded(typing: Any, array: Any, value: Any) -> Any:
    """A float64 value in the type in which the array's elements are computed with."""
    result = _accumulation(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[1], types.float64, result)

    return result(array, types.float64), generate


def coefficient(array: Any, value: float) -> Any:
    """`rounded`, but finite in float32 where float64 is: a constant's 0 times it must stay 0."""


@overload(coefficient, strict=False, jit_options=HELPER)
def _coefficient(array: Any, value: Any) -> Any:
    if array.dtype == types.float64:
        return lambda array, value: value
    return lambda array, value: np.float32(_bounded(value))


def load(array: Any, index: int) -> Any:
    """The element as a number to compute with."""


@overload(load, strict=False, jit_options=HELPER)
def _load(array: Any, index: Any) -> Any:
    if array.dtype == FLOAT16:
        return lambda array, index: _widened_float16(_element(array, index))
    if array.dtype == BFLOAT16:
        return lambda array, index: np.uint32(_widened_bfloat16(np.uint16(_element(array, index)))).view(np.float32)
    return lambda array, index: _element(array, index)


def store(array: Any, index: int, value: Any) -> None:
    """Round a number to the storage and write it."""


@overload(store, strict=False, jit_options=HELPER)
def _store(array: Any, index: Any, value: Any) -> Any:
    if array.dtype == FLOAT16:
        return lambda array, index, value: _set_element(array, index, _narrowed_float16(value))
    if array.dtype == BFLOAT16:
        return lambda array, index, value: _set_element(
            array, index, np.int16(_narrowed_bfloat16(np.float32(value).view(np.uint32)))
        )
    return lambda array, index, value: _set_element(array, index, value)


def workspace(array: Any, length: int) -> Any:
    """An uninitialized array of numbers to compute with."""


@overload(workspace, strict=False, jit_options=HELPER)
def _workspace(array: Any, length: Any) -> Any:
    dtype = np.float64 if array.dtype == types.float64 else np.float32
    return lambda array, length: np.empty(length, dtype)


@compiled
def merged(
    count_a: int, mean_a: float, squares_a: float, count_b: int, mean_b: float, squares_b: float
) -> tuple[float, float]:
    """(mean, centred squares) of a and b together; a may be empty."""
    share_b = count_b / (count_a + count_b)
    return (
        merged_mean(mean_a, mean_b, share_b),
        merged_squares(mean_a, squares_a, mean_b, squares_b, count_a, share_b),
    )


@compiled
def affine_line(x: Any, mean: float, var: float, eps: float, gamma: float, beta: float) -> Any:
    """(centre, scale, shift) for `normalized`."""
    centre = rounded(x, mean)
    scale = coefficient(x, rstd(var, eps) * gamma)
    return centre, scale, rounded(x, beta - (mean - centre) * scale)


@compiled
def gradient_line(
    x: Any, mean: float, var: float, eps: float, gamma: float, mean_dy: float, mean_dy_xhat: float
) -> Any:
    """(centre, scale, lift, slope) for `input_gradient`."""
    centre = rounded(x, mean)
    factor = rstd(var, eps)
    lift, slope = _gradient_line(factor, mean - centre, mean_dy, mean_dy_xhat)
    return centre, coefficient(x, factor * gamma), rounded(x, lift), coefficient(x, slope)


# ---- sums along a run -----------------------------------------------------------------------------

LANES = 64
"""Running sums side by side, four vectors of float32. Element i of a run is added to sum i % LANES.

The order of additions is thus written down, and the compiler has no say in it. Additions that LLVM might
reorder gave other bits from Numba's disk cache than freshly compiled (a function is optimized again wherever
it is linked in), and under fastmath total + (x - pivot) may turn into (total - pivot) + x. The price is that
the forward of rows of 64 elements takes 1.2 to 1.8 times as long; from 1,000 elements on it makes no difference.
"""


@intrinsic
def stack_lanes(typing: Any, array: Any) -> Any:
    """Running sums, uninitialized, on the stack: valid until the function returns."""
    dtype = _accumulation(array)
    result = types.Array(dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.get_value_type(dtype)
        data = cgutils.alloca_once(builder, element, size=ir.Constant(ir.IntType(64), LANES))
        size = context.get_abi_sizeof(element)
        made = context.make_array(result)(context, builder)
        context.populate_array(
            made,
            data=data,
            shape=[ir.Constant(ir.IntType(64), LANES)],
            strides=[ir.Constant(ir.IntType(64), size)],
            itemsize=ir.Constant(ir.IntType(64), size),
            meminfo=None,
        )
        return made._getvalue()

    return result(array), generate


@compiled
def clear(sums: Any) -> None:
    for lane in range(LANES):
        sums[lane] = 0.0


@compiled
def across(sums: Any) -> float:
    """The total of running sums, in float64; halved, which takes six additions one after the other and not 63."""
    for lane in range(32):
        sums[lane] += sums[lane + 32]
    for lane in range(16):
        sums[lane] += sums[lane + 16]
    for lane in range(8):
        sums[lane] += sums[lane + 8]
    for lane in range(4):
        sums[lane] += sums[lane + 4]
    return np.float64((sums[0] + sums[2]) + (sums[1] + sums[3]))
