"""The scalar formulas of the Numba backends, undecorated: each target compiles them for itself.

Plain Python in the symbols of `KernelTable`. Statistics and coefficients are float64; what a formula computes per
element stays in the type of its arguments, numbers or whole vectors of them.

A float64 mean enters a float32 loop in two parts, centre = float32(mean) and rest = mean - centre: the
loop subtracts the centre, which is exact for values near it, and the rest is folded into a coefficient.
So values of 1e6 +- 1 are normalized to float32's accuracy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LARGEST_FLOAT32 = 3.4028234663852886e38
LARGEST_FLOAT64 = 1.7976931348623157e308


def rstd(var: float, eps: float) -> float:
    """1/sqrt(var + eps), and 0 where var + eps is 0."""
    total = var + eps
    return 0.0 if total == 0.0 else 1.0 / math.sqrt(total)


def bounded(coefficient: float, largest: float) -> float:
    """The coefficient, kept finite where a narrower type overflows: 0 times it must stay 0."""
    if largest < coefficient < math.inf:
        return largest
    if -math.inf < coefficient < -largest:
        return -largest
    return coefficient


def centred_squares(squares: float, count: int, offset: float) -> float:
    """Sum of squares about the mean, from those about a centre that the mean exceeds by `offset`."""
    corrected = squares - count * offset * offset
    return 0.0 if corrected < 0.0 else corrected  # NaN stays


def merged_mean(mean_a: float, mean_b: float, share_b: float) -> float:
    """Chan's rule: the mean of a and b together, b having `share_b` of the count of both."""
    return mean_b if share_b == 1.0 else mean_a + (mean_b - mean_a) * share_b


def merged_squares(
    mean_a: float, squares_a: float, mean_b: float, squares_b: float, count_a: int, share_b: float
) -> float:
    """Chan's rule: the centred squares of a and b together."""
    if count_a == 0:  # not 0 times delta^2, which may overflow
        return squares_b
    delta = mean_b - mean_a
    return squares_a + squares_b + delta * delta * (count_a * share_b)


def normalized(x: float, centre: float, scale: float, shift: float) -> float:
    """y = (x - mean)*scale + beta, with shift = beta - rest*scale."""
    return (x - centre) * scale + shift


def input_gradient(dy: float, x: float, centre: float, scale: float, lift: float, slope: float) -> float:
    """dx = scale*(dy - sum_dy/n - xhat*sum_dy_xhat/n), the constants as `gradient_line` gives them.

    With one value per channel dy equals lift and x the centre: exactly 0.
    """
    return scale * ((dy - lift) - (x - centre) * slope)


def gradient_line(rstd: float, rest: float, mean_dy: float, mean_dy_xhat: float) -> tuple[float, float]:
    """(lift, slope) such that mean_dy + xhat*mean_dy_xhat = lift + (x - centre)*slope."""
    slope = rstd * mean_dy_xhat
    return mean_dy - rest * slope, slope


def sum_times_xhat(rstd: float, rest: float, sum_dy: float, sum_dy_centred: float) -> float:
    """sum(dy*xhat) from sum(dy) and sum(dy*(x - centre))."""
    return rstd * (sum_dy_centred - rest * sum_dy)


# ---- dropout ----------------------------------------------------------------------------------------

PHILOX_ROUNDS = 7
M0, M1, W0, W1 = (np.uint64(n) for n in (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
LOW, HALF, LOW16, HALF16 = (np.uint64(n) for n in (0xFFFFFFFF, 32, 0xFFFF, 16))


def philox(counter: Any, stream: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """The four words of 32 bits that Philox-4x32-7 makes of a counter, an unsigned number, and the bits of a seed."""
    c0, c1, c2, c3 = counter & LOW, counter >> HALF, np.uint64(stream), np.uint64(0)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    for _ in range(PHILOX_ROUNDS):
        even, odd = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (odd >> HALF) ^ c1 ^ k0, odd & LOW, (even >> HALF) ^ c3 ^ k1, even & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


def numbers_below(words: tuple[Any, Any, Any, Any], limit: Any) -> Any:
    """Which of the eight halves of four words, the lower one of each first, are below the limit, as bits."""
    c0, c1, c2, c3 = words
    return (
        (c0 & LOW16 < limit) | (c0 >> HALF16 < limit) << 1 | (c1 & LOW16 < limit) << 2 | (c1 >> HALF16 < limit) << 3
        | (c2 & LOW16 < limit) << 4 | (c2 >> HALF16 < limit) << 5 | (c3 & LOW16 < limit) << 6
        | (c3 >> HALF16 < limit) << 7
    )  # fmt: skip
