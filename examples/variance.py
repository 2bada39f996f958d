"""What the formula of the variance costs in float32: the tables of docs/maths.md.

    python examples/variance.py

1,024 values of spread 1 around a growing mean, float32; the truth is computed in float64 from the same rounded
values. Medians over 20 draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fastnorm

COUNT, DRAWS = 1024, 20
Array = np.ndarray[Any, Any]


def squares_form(x: Array) -> float:
    """E[x^2] - E[x]^2."""
    return float(np.mean(x * x) - np.mean(x) ** 2)


def two_pass(x: Array) -> float:
    """mean((x - mean)^2), the mean rounded to float32."""
    return float(np.mean((x - np.mean(x)) ** 2))


def exact(x: Array) -> float:
    """fastnorm's moments: two passes a block, blocks merged by Chan's rule, float64 results."""
    return float(fastnorm.moments(x).var)


def xhat_of_float32_mean(x: Array) -> Array:
    """The normalized values, mean and variance rounded to float32."""
    xhat: Array = (x - np.mean(x)) / np.sqrt(np.float32(two_pass(x)))
    return xhat


def xhat_of_fastnorm(x: Array) -> Array:
    """The normalized values by fastnorm: statistics in float64."""
    return fastnorm.layernorm_forward(x, None, None, {"eps": 0.0})[0]


def measured(mean: float) -> tuple[list[float], list[float]]:
    """Relative errors of the variance, largest errors of the normalized values."""
    rng = np.random.default_rng(0)
    variance_errors, xhat_errors = [], []
    for _ in range(DRAWS):
        x = (mean + rng.standard_normal(COUNT)).astype(np.float32)
        wide = x.astype(np.float64)
        truth = wide.var()
        xhat = (wide - wide.mean()) / wide.std()
        variance_errors.append([abs(form(x) - truth) / truth for form in (squares_form, two_pass, exact)])
        xhat_errors.append([np.abs(form(x) - xhat).max() for form in (xhat_of_float32_mean, xhat_of_fastnorm)])
    return np.median(variance_errors, axis=0).tolist(), np.median(xhat_errors, axis=0).tolist()


def row(mean: float, errors: list[float]) -> str:
    return "| " + " | ".join([f"{mean:,.0f}", *("0" if error == 0 else f"{error:.0e}" for error in errors)]) + " |"


def main() -> None:
    results = {10.0**k: measured(10.0**k) for k in range(7)}
    print("| mean / spread | E[x^2] - E[x]^2 | two-pass, float32 | fastnorm.moments |\n| --- | --- | --- | --- |")
    for mean, (errors, _) in results.items():
        print(row(mean, errors))
    print("\n| mean / spread | float32 statistics | fastnorm, float64 statistics |\n| --- | --- | --- |")
    for mean, (_, errors) in results.items():
        print(row(mean, errors))


if __name__ == "__main__":
    main()
