"""Exponential moving averages of named values, as `tf.train.ExponentialMovingAverage` keeps them.

    shadow <- decay * shadow + (1 - decay) * value

With num_updates, the number of steps so far, the decay grows to its final value, so that early steps count more:

    decay_n = min(decay, (1 + n) / (10 + n))

A shadow that starts from zeros is biased towards zero: after t steps the values have had the weight
1 - decay_1 * ... * decay_t in it. zero_debias divides by that weight, so that a constant has itself as its average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastnorm import _arrays, _layout
from fastnorm._layout import Array
from fastnorm.ops import _numbers


class _Shadow(NamedTuple):
    """An average as it is kept."""

    value: Array
    left: float
    """The weight of the zeros that it started from; 0 where it started from a value."""


class ExponentialMovingAverage:
    """Moving averages of named values: shadow = decay * shadow + (1 - decay) * value.

    Parameters
    ----------
    decay : the weight of the old, from 0 to 1, close to 1 for a long memory.
    num_updates : None, or the number of steps so far, or a function that returns it. With it the decay of a step is
        min(decay, (1 + num_updates) / (10 + num_updates)). A number stays until another is assigned
        (`ema.num_updates = step`); the caller counts, as in TensorFlow.
    zero_debias : divide the averages that started from zeros by the weight that the values have had in them.

    `bn_param['average']` takes one of these: it then keeps that layer's running statistics.
    """

    def __init__(
        self, decay: float, num_updates: float | Callable[[], float] | None = None, zero_debias: bool = False
    ) -> None:
        self.decay = _numbers.share("decay", decay)
        self.num_updates = num_updates
        self.zero_debias = _numbers.flag("zero_debias", zero_debias)
        self._shadows: dict[str, _Shadow] = {}
        self._step_decay()  # a num_updates that is no number is an error here already

    def __repr__(self) -> str:
        names = ", ".join(self._shadows) or "nothing yet"
        return f"{type(self).__name__}(decay={self.decay}, zero_debias={self.zero_debias}; {names})"

    def initialize(self, values: Mapping[str, Any]) -> None:
        """Start averages from these values instead of zeros, as TensorFlow does for a Variable.

        Raises ValueError for a name that has an average already.
        """
        arrays = _checked(values)
        for name in arrays:
            if name in self._shadows:
                raise ValueError(f"values: {name!r} has an average already")
        for name, array in arrays.items():
            self._shadows[name] = _Shadow(array.astype(_kept_dtype(name, array)), 0.0)

    def apply(self, values: Mapping[str, Any]) -> None:
        """One step: mix each value into the average of its name, which starts from zeros where there is none.

        Averages are kept in float32, for float64 and integers in float64. Raises ValueError for a value of another
        shape than its average and TypeError for what is no array of real numbers, before any average has changed.
        """
        arrays = _checked(values)
        decay = self._step_decay()
        mixed = {}
        for name, array in arrays.items():
            shadow = self._shadows.get(name)
            if shadow is None:
                shadow = _Shadow(np.zeros(array.shape, _kept_dtype(name, array)), 1.0)
            if array.shape != shadow.value.shape:
                raise ValueError(f"values: {name!r} has an average of shape {shadow.value.shape}, got {array.shape}")
            value = _arrays.mixed(shadow.value, array.astype(np.float64), decay, shadow.value.dtype)
            mixed[name] = _Shadow(value, decay * shadow.left)
        self._shadows |= mixed

    def average(self, name: str) -> Array | None:
        """The average of this name, a copy; None where no value of it has been applied."""
        shadow = self._shadows.get(name)
        if shadow is None:
            return None
        if not self.zero_debias or shadow.left == 1.0:  # nothing has entered yet with a decay of 1
            return shadow.value.copy()
        return (shadow.value / (1.0 - shadow.left)).astype(shadow.value.dtype)

    def _step_decay(self) -> float:
        if self.num_updates is None:
            return self.decay
        updates = self.num_updates() if callable(self.num_updates) else self.num_updates
        n = _numbers.at_least_zero("num_updates", updates)
        return min(self.decay, (1.0 + n) / (10.0 + n))


def _checked(values: Mapping[str, Any]) -> dict[str, Array]:
    if not isinstance(values, Mapping):
        raise TypeError(f"values: expected a dict of arrays by name, got {type(values).__name__}")
    arrays = {name: _layout.as_array(f"values[{name!r}]", value) for name, value in values.items()}
    for name, array in arrays.items():
        _kept_dtype(name, array)
    return arrays


def _kept_dtype(name: str, array: Array) -> np.dtype[Any]:
    return _layout.accumulation_dtype(_layout.storage_dtype(f"values[{name!r}]", array))
