"""The scalar formulas compiled for the CPU, and the coefficients that kernels need once a channel or row.

They are float64 throughout, one number or a vector of channels; `rounded` gives the one nearest to it that elements are
computed with.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

from typing import Any

from numba import types

from fastnorm.backends import numba_formulas as formulas
from fastnorm.backends.numba_cpu._compiler import compiled, intrinsic
from fastnorm.backends.numba_cpu._vectors import bounded, not_negative, root, rounded, where_nonzero

merged_mean = compiled(formulas.merged_mean)
merged_squares = compiled(formulas.merged_squares)
normalized = compiled(formulas.normalized)
input_gradient = compiled(formulas.input_gradient)
_gradient_line = compiled(formulas.gradient_line)
sum_times_xhat = compiled(formulas.sum_times_xhat)


@compiled
def rstd(var: Any, eps: float) -> Any:
    """`formulas.rstd`, whose condition is a selection here, so that there may be a vector of them."""
    total = var + eps
    return where_nonzero(total, 1.0 / root(total))


@compiled
def centred_squares(squares: Any, count: float, offset: Any) -> Any:
    """`formulas.centred_squares`, likewise."""
    return not_negative(squares - count * offset * offset)


@compiled
def affine_line(x: Any, mean: Any, rstd: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any]:
    """(centre, scale, shift) for `normalized`."""
    centre = rounded(x, mean)
    scale = rounded(x, bounded(x, rstd * gamma))
    return centre, scale, rounded(x, beta - (mean - centre) * scale)


@compiled
def gradient_line(
    x: Any, mean: Any, rstd: Any, scale: Any, mean_dy: Any, mean_dy_xhat: Any
) -> tuple[Any, Any, Any, Any]:
    """(centre, scale, lift, slope) for `input_gradient`."""
    centre = rounded(x, mean)
    lift, slope = _gradient_line(rstd, mean - centre, mean_dy, mean_dy_xhat)
    return centre, rounded(x, bounded(x, scale)), rounded(x, lift), rounded(x, bounded(x, slope))


@intrinsic
def least(typing: Any, a: Any, b: Any) -> Any:
    """min(a, b); Numba's own is a function of its own for each pair of types, 25 ms to compile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_signed("<", *arguments), *arguments)

    return types.int64(types.int64, types.int64), generate
