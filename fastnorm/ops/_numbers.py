"""Numbers that a caller hands in."""

from __future__ import annotations

import math
from typing import Any


def number(name: str, value: Any) -> float:
    """A real number as a float; TypeError for what is none, strings and bools among it."""
    if isinstance(value, (bool, str, bytes, complex)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def share(name: str, value: Any) -> float:
    """A float from 0 to 1: a weight of the old or the new."""
    found = value if type(value) is float else number(name, value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{name}: expected from 0 to 1, got {found}")
    return found


def count(name: str, value: Any) -> int:
    """A whole number of at least 0."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    found = int(value.__index__())
    if found < 0:
        raise ValueError(f"{name}: expected a whole number of at least 0, got {found}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False; TypeError for anything else, which would be true or false by accident."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def at_least_zero(name: str, value: Any) -> float:
    """A finite float of at least 0."""
    found = value if type(value) is float else number(name, value)
    if not 0.0 <= found < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {found}")
    return found
