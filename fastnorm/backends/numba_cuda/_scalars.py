"""The scalar formulas compiled for the device. Scalars are float64, what is computed per element is not."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm.backends import numba_formulas as formulas
from fastnorm.backends.numba_cuda._launch import device

NUMBER: dict[str, Any] = {"float32": np.float32, "float64": np.float64}
"""By the name of an accumulation type, what makes a number of that type."""
LARGEST = {"float32": formulas.LARGEST_FLOAT32, "float64": formulas.LARGEST_FLOAT64}

rstd = device(formulas.rstd)
bounded = device(formulas.bounded)
centred_squares = device(formulas.centred_squares)
normalized = device(formulas.normalized)
input_gradient = device(formulas.input_gradient)
gradient_line = device(formulas.gradient_line)
sum_times_xhat = device(formulas.sum_times_xhat)
