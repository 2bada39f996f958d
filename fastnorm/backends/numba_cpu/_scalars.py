"""The scalar formulas compiled for the CPU, and the coefficients that kernels need once a channel or row.

Scalars are float64 throughout; `rounded` gives the one nearest to them that elements are computed with.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from fastnorm.backends import numba_formulas as formulas
from fastnorm.backends.numba_cpu._compiler import compiled
from fastnorm.backends.numba_cpu._vectors import accumulation

rstd = compiled(formulas.rstd)
_bounded = compiled(formulas.bounded)
centred_squares = compiled(formulas.centred_squares)
merged_mean = compiled(formulas.merged_mean)
merged_squares = compiled(formulas.merged_squares)
normalized = compiled(formulas.normalized)
input_gradient = compiled(formulas.input_gradient)
_gradient_line = compiled(formulas.gradient_line)
sum_times_xhat = compiled(formulas.sum_times_xhat)


@intrinsic
def rounded(typing: Any, array: Any, value: Any) -> Any:
    """A float64 rounded to the type in which the array's elements are computed with."""
    number = accumulation(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        narrow = context.cast(builder, arguments[1], types.float64, number)
        return context.cast(builder, narrow, number, types.float64)

    return types.float64(array, types.float64), generate


@intrinsic
def _largest(typing: Any, array: Any) -> Any:
    """The largest finite number of that type."""
    largest = formulas.LARGEST_FLOAT64 if accumulation(array) == types.float64 else formulas.LARGEST_FLOAT32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.float64, largest)

    return types.float64(array), generate


@compiled
def affine_line(x: Any, mean: float, rstd: float, gamma: float, beta: float) -> tuple[float, float, float]:
    """(centre, scale, shift) for `normalized`."""
    centre = rounded(x, mean)
    scale = rounded(x, _bounded(rstd * gamma, _largest(x)))
    return centre, scale, rounded(x, beta - (mean - centre) * scale)


@compiled
def gradient_line(
    x: Any, mean: float, rstd: float, scale: float, mean_dy: float, mean_dy_xhat: float
) -> tuple[float, float, float, float]:
    """(centre, scale, lift, slope) for `input_gradient`."""
    centre = rounded(x, mean)
    lift, slope = _gradient_line(rstd, mean - centre, mean_dy, mean_dy_xhat)
    scale = _bounded(scale, _largest(x))
    return centre, rounded(x, scale), rounded(x, lift), rounded(x, _bounded(slope, _largest(x)))


@intrinsic
def least(typing: Any, a: Any, b: Any) -> Any:
    """min(a, b); Numba's own is a function of its own for each pair of types, 25 ms to compile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_signed("<", *arguments), *arguments)

    return types.int64(types.int64, types.int64), generate
