"""The one table of tolerances, derived from how the kernels compute; no test or benchmark has a number of its own.

Notation: u = unit roundoff, half the distance from 1 to the next number (2^-24 for float32, 2^-11 for float16,
2^-8 for bfloat16, 2^-53 for float64). u_s is that of the dtype a result is stored in, u_a that of the dtype
it is computed in; n the number of terms in the sums it depends on; M its magnitude, the same formula with
every term replaced by its absolute value. Then a result r is allowed the error

    u_s |r|  +  s / 2                      rounding to storage, s its smallest subnormal
    + u_a (ROUNDINGS + sqrt(n)) M          arithmetic

Arithmetic: each of the operations between the input and the result adds at most u_a M. The longest path,
x -> dx, has the two parts of the mean subtracted, a multiplication by rstd, by the mean of dout * xhat, two
subtractions, a multiplication by gamma and by rstd, and the roundings of gamma and rstd themselves: ten.
A sum of n terms adds one rounding of a partial sum per term. Partial sums are at most the sum of the
magnitudes A, and the k-th of them about k/n of it; independent roundings add up in squares, so the error is
about u_a A sqrt(sum (k/n)^2) = u_a A sqrt(n/3), below u_a A sqrt(n). Kernels that sum in lanes and blocks
and merge in float64 stay far below; none may be above.

A mean enters M with the *spread* of its values, not with their size: kernels take the mean relative to a
value of the block and keep it in float64, so for float32 the error of x - mean is a few u_a * spread however
large the mean, up to the mean's own rounding, u_64 |mean|. In units of xhat the spread is at most 1 and that
rounding is r = |mean| rstd u_64 / u_a:

    quantity   M
    y          |gamma| (|xhat| + 1 + r) + |beta|
    mean       spread + |mean| u_64 / u_a
    var        var + spread m + u_a sqrt(n) m^2, m = |mean| u_64 / u_a: merging squares the distance of
               block means, each rounded so
    dbeta      sum |dout|
    dgamma     sum |dout| (|xhat| + 1 + r)
    dx         |gamma| rstd (|dout| + mean |dout| + (|xhat| + 1 + r) mean(|dout| (|xhat| + 1 + r)))
               (layernorm, groupnorm: gamma inside the means)

Without centring (rmsnorm) no mean is subtracted and none enters var: 1 + r and mean |dout| drop out, and M of var is
var itself, a sum of squares.

The naive graph keeps its mean in the accumulation dtype: there u_a stands in the place of u_64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ROUNDINGS = 10


def _finfo(dtype: np.dtype[Any]) -> Any:
    if dtype.name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return np.finfo(dtype)


def roundoff(dtype: Any) -> float:
    """u, half the distance from 1 to the next number of this dtype."""
    return float(_finfo(np.dtype(dtype)).eps) / 2


def tolerance(result: Array, magnitude: Array, stored: Any, accumulation: Any, terms: int) -> Array:
    """The error allowed to `result`, elementwise.

    stored, accumulation : dtypes that the result is stored and computed in
    terms : n, the number of terms in the sums on the way to it; 0 where there is none (test mode)
    """
    stored, accumulation = np.dtype(stored), np.dtype(accumulation)
    smallest = sum(float(_finfo(dtype).smallest_subnormal) for dtype in (stored, accumulation))
    rounding = roundoff(stored) * np.abs(result) + smallest
    return rounding + roundoff(accumulation) * (ROUNDINGS + math.sqrt(terms)) * magnitude


def scaled_tolerance(stored: Any, accumulation: Any, terms: int, *, exact: bool) -> float:
    """The largest `check.error` of a right result: the table in one number, for inputs of a benchmark.

    Their spread is about 1, their means are about 10, and the error is scaled to values around 1. Two units of
    storage, and 6 ROUNDINGS of arithmetic, since x - mean alone may cost |x| / spread of them; implementations
    that sum n values one after the other (`exact` False: staged, alt, the peers) have sqrt(n) times as many.
    """
    growth = 1.0 if exact else math.sqrt(terms)
    return 2 * roundoff(stored) + 6 * ROUNDINGS * roundoff(accumulation) * growth
