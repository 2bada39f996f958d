"""What kernels of the contract have to give: inputs, plain formulas in float64, and the errors that are allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm.bench.cases import dtype_of
from fastnorm.bench.tolerances import roundoff, tolerance

Array = np.ndarray[Any, Any]


def computed_in(dtype: str) -> np.dtype[Any]:
    """The dtype that kernels compute in, of parameters too."""
    return np.dtype(np.float64 if dtype == "float64" else np.float32)


def kernel_inputs(size: int, channels: int, dtype: str, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """x, dy, gamma, beta; one element of gamma is 0."""
    rng = np.random.default_rng(seed)
    stored = dtype_of(dtype)
    x, dy = (3 + rng.standard_normal(size)).astype(stored), rng.standard_normal(size).astype(stored)
    gamma, beta = (rng.standard_normal(channels).astype(computed_in(dtype)) for _ in range(2))
    gamma[0] = 0.0
    return x, dy, gamma, beta


def plain_formulas(
    x: Any, dy: Any, gamma: Any, beta: Any, axes: Any, parameter_axes: Any, eps: float, computed: Any,
    centred: bool = True,
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """Results and their magnitudes, of arrays with an axis for all that is told apart; float64, plain formulas."""
    x, dy, gamma, beta = (np.asarray(a, np.float64) for a in (x, dy, gamma, beta))
    average = lambda a: a.mean(axis=axes, keepdims=True)  # noqa: E731
    mean = average(x) if centred else np.zeros_like(average(x))
    mean += average(x - mean) if centred else 0.0
    var = average((x - mean) ** 2)
    rstd = 1 / np.sqrt(var + eps)
    xhat, g = (x - mean) * rstd, dy * gamma
    spread, narrow = np.sqrt(var), roundoff(np.float64) / roundoff(computed)
    slack = np.abs(xhat) + centred * (1 + np.abs(mean) * rstd * narrow)
    offset = np.abs(mean) * narrow
    mean_g = average(g) if centred else 0.0
    down = lambda a: a.sum(axis=parameter_axes)  # noqa: E731
    results = {
        "y": xhat * gamma + beta, "mean": mean, "var": var, "dx": rstd * (g - mean_g - xhat * average(g * xhat)),
        "sum_dy": down(dy), "sum_dy_xhat": down(dy * xhat),
    }  # fmt: skip
    magnitudes = {
        "y": np.abs(gamma) * slack + np.abs(beta), "mean": spread + offset,
        "var": var + spread * offset + roundoff(computed) * np.sqrt(x.size) * offset**2,
        "dx": rstd * (np.abs(g) + average(np.abs(g)) + slack * average(np.abs(g) * slack)),
        "sum_dy": down(np.abs(dy)), "sum_dy_xhat": down(np.abs(dy) * slack),
    }  # fmt: skip
    return results, magnitudes


def check(results: dict[str, Array], expected: Any, stored: Any, computed: Any, terms: int) -> None:
    """Every result is within what fastnorm.bench.tolerances allows of `expected`, which `plain_formulas` gave."""
    for name, result in results.items():
        wanted, magnitude = expected[0][name].ravel(), expected[1][name].ravel()
        dtype = stored if name in ("y", "dx") else np.float64
        allowed = tolerance(wanted, magnitude, dtype, computed, terms)
        error = np.abs(result.astype(np.float64) - wanted)
        worst = np.argmax(error / allowed)
        assert error[worst] <= allowed[worst], (name, worst, result[worst], wanted[worst], allowed[worst])
