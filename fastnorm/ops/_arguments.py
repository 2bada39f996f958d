"""Validation shared by the ops, and the cache that carries a forward's values to its backward."""

from __future__ import annotations

import difflib
import math
from typing import Any, NamedTuple

import numpy as np

from fastnorm._layout import Array, Axes, as_array, storage_dtype

BN_KEYS = frozenset({"mode", "eps", "momentum", "running_mean", "running_var"})
LN_KEYS = frozenset({"mode", "eps"})


class Cache(NamedTuple):
    """What backward needs of forward. Opaque to callers; the same on every backend.

    It refers to x and copies nothing of its size: x must not change between forward and backward.
    """

    op: str
    x: Array | None
    """None where test mode wrote the output over x."""
    gamma: Array | None
    beta: Array | None
    mean: Array
    """float64, one per channel or row in index order; var likewise, biased."""
    var: Array
    eps: float
    axes: Axes
    """batchnorm: (channel axis,); layernorm: the normalized axes."""
    frozen: bool
    """Whether mean and var are constants (batchnorm's test mode) rather than functions of x."""


def checked_cache(cache: Any, op: str) -> Cache:
    """The cache, if it is one that this op's forward returned."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: expected what {op}_forward returned, got {_described(cache)}")
    if cache.op != op:
        raise ValueError(f"cache: expected one of {op}_forward, got one of {cache.op}_forward")
    return cache


def _described(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"


def checked_param(name: str, param: Any, keys: frozenset[str]) -> dict[str, Any]:
    """The options dictionary, if it has no keys but these; an empty one for None."""
    if param is None:
        return {}
    if not isinstance(param, dict):
        raise TypeError(f"{name}: expected a dict or None, got {type(param).__name__}")
    if not param.keys() <= keys:
        unknown = sorted(map(repr, param.keys() - keys))
        near = difflib.get_close_matches(unknown[0].strip("'"), keys, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: unknown key {', '.join(unknown)}, expected some of {sorted(keys)}{hint}")
    return param


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes, complex)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def checked_eps(eps: Any) -> float:
    """eps as a finite float, at least 0."""
    number = eps if type(eps) is float else _number("eps", eps)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {number}")
    return number


def checked_momentum(momentum: Any) -> float:
    """momentum as a float from 0 to 1."""
    number = momentum if type(momentum) is float else _number("momentum", momentum)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"momentum: expected from 0 to 1, got {number}")
    return number


def checked_dout(dout: Any, shape: tuple[int, ...]) -> Array:
    """dout as an array of x's shape and a real dtype."""
    array = as_array("dout", dout)
    storage_dtype("dout", array)
    if array.shape != shape:
        raise ValueError(f"dout: expected the shape of x, {shape}, got {array.shape}")
    return array


def per_channel(name: str, value: Any, channels: int, *, expected: str = "") -> Array:
    """Statistics or sums handed in by the caller, as 1-D float64 of one element a channel."""
    array = as_array(name, value)
    storage_dtype(name, array)
    if array.size != channels or max(array.shape, default=1) != channels:
        raise ValueError(f"{name}: expected {channels} elements, one per channel{expected}, got shape {array.shape}")
    return np.require(array, np.float64, ("C", "A")).reshape(-1)


def checked_count(count: Any) -> float:
    """A number of values, above 0."""
    number = _number("count", count)
    if not 0.0 < number < math.inf:
        raise ValueError(f"count: expected a finite number above 0, got {number}")
    return number
