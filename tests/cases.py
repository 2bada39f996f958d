"""What the tests add to the case table of fastnorm.bench.cases: hostile shapes and layouts, and the truth."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastnorm import Moments, _layout
from fastnorm.bench.cases import DTYPES, OPS, Case, Inputs, Layout, dtype_of
from fastnorm.bench.tolerances import roundoff, tolerance

Array = np.ndarray[Any, Any]

EPS = 1e-5

# Around the vector widths of every dtype and instruction set (4 to 64 elements), primes, one, thousands.
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 1009, 4099)
SHAPES = (
    *((5, width) for width in WIDTHS),
    *((width, 3) for width in WIDTHS),
    (1, 1), (2, 1), (1, 2), (2053, 65), (40009, 3), (3, 40009), (300, 300),
    (1, 1, 1), (3, 5, 7), (2, 17, 33), (13, 1, 11), (1, 2, 4099), (5, 67, 1),
    (2, 3, 4, 5), (4, 16, 7, 7), (3, 64, 1, 1), (2, 5, 14, 14), (1, 3, 64, 65), (2, 33, 3, 31),
    (2, 3, 2, 3, 4),
)  # fmt: skip
"""Normalized over axis 1 (layernorm: from axis 1 on), in C order."""
FEWER_SHAPES = (
    (1, 1), (5, 7), (3, 128), (2053, 66), (2, 1009), (3, 40009),
    (1, 2, 4099), (5, 66, 1), (3, 8, 17), (2, 3, 4, 5), (4, 16, 7, 7), (3, 64, 1, 1), (1, 4, 64, 65), (2, 33, 3, 31),
    (2, 320, 3, 3), (2, 3, 2, 3, 4),
)  # fmt: skip
"""For the ops on kernels that others have been through, and for groups."""
SHAPES_OF = {op: SHAPES if op in ("batchnorm", "layernorm") else FEWER_SHAPES for op in OPS}

DTYPES_OF = {
    "batchnorm": DTYPES, "layernorm": DTYPES, "groupnorm": ("float16", "float32"),
    "instancenorm": ("bfloat16", "float32"), "rmsnorm": ("float16", "float32"),
}  # fmt: skip
"""For layouts and hostile values: all of them, and float32 and a half of the ops on kernels that others go through."""

AXES = (
    ((4, 5), 0), ((4, 5), -1), ((3, 4, 5), 0), ((3, 4, 5), 2), ((2, 3, 4, 5), -1), ((2, 3, 4, 5), 2),
    ((2, 3, 4, 5), -4), ((2, 1, 3, 1, 4), 3),
)  # fmt: skip


AXES_OF = {
    op: [(shape, axis) for shape, axis in AXES if OPS[op].family != "group" or axis % len(shape) != 0] for op in OPS
}


def case(op: str, shape: tuple[int, ...], axis: int = 1, dtype: str = "float32") -> Case:
    return Case(OPS[op], Layout(f"axis {axis} of {len(shape)}", len(shape), axis), shape, dtype)


# ---- layouts --------------------------------------------------------------------------------------


def _permuted(*order: int) -> Callable[[Array], Array]:
    """The memory order of the axes, given by their positions, negative ones from the end."""

    def arrange(values: Array) -> Array:
        axes = tuple(axis % values.ndim for axis in order)
        axes = (*(axis for axis in range(values.ndim) if axis not in axes), *axes)
        return np.ascontiguousarray(values.transpose(axes)).transpose(np.argsort(axes))

    return arrange


def _stepped(step: int) -> Callable[[Array], Array]:
    """Every axis with this step, a negative one backwards, over an array with gaps."""

    def arrange(values: Array) -> Array:
        wide = np.zeros([n * abs(step) for n in values.shape], values.dtype)
        view = wide[(slice(None, None, step),) * values.ndim]
        view[...] = values
        return view

    return arrange


def _offset(values: Array) -> Array:
    """Dense and aligned to its element, but not to a vector."""
    flat = np.empty(values.size + 3, values.dtype)[3:]
    flat[...] = values.reshape(-1)
    return flat.reshape(values.shape)


def _padded(values: Array) -> Array:
    """The left part of wider rows."""
    wide = np.zeros((*values.shape[:-1], values.shape[-1] + 3), values.dtype)
    wide[..., :-3] = values
    return wide[..., :-3]


def _unaligned(values: Array) -> Array:
    raw = np.empty(values.nbytes + 1, np.uint8)
    view = raw[1:].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view


def _broadcast(axis: int) -> Callable[[Array], Array]:
    """Zero stride along one axis: all of it the first value."""

    def arrange(values: Array) -> Array:
        return np.broadcast_to(np.take(values, [0], axis), values.shape)

    return arrange


def _foreign(values: Array) -> Array:
    return values.astype(values.dtype.newbyteorder("S")) if values.dtype.kind == "f" else values


def _read_only(values: Array) -> Array:
    values = values.copy()
    values.flags.writeable = False
    return values


ARRANGEMENTS: dict[str, Callable[[Array], Array]] = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "channels-last": _permuted(1),
    "samples innermost": _permuted(0),
    "swapped": _permuted(-1, -2),
    "gaps": _stepped(2),
    "reversed": _stepped(-1),
    "reversed gaps": _stepped(-3),
    "padded": _padded,
    "offset": _offset,
    "unaligned": _unaligned,
    "constant samples": _broadcast(0),
    "constant rows": _broadcast(-1),
    "foreign byte order": _foreign,
    "read-only": _read_only,
}
WRITABLE = tuple(
    name for name in ARRANGEMENTS if not name.startswith("constant") and name not in ("read-only", "foreign byte order")
)


def storage(array: Array) -> np.dtype[Any]:
    """The dtype of a result for this input."""
    return _layout.storage_dtype("x", array)


# ---- the truth ------------------------------------------------------------------------------------


def _wider(accumulation: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.longdouble if accumulation == np.float64 else np.float64)


class Quantity(NamedTuple):
    value: Array
    magnitude: Array
    """M of fastnorm/bench/tolerances.py."""


class Truth(NamedTuple):
    y: Quantity
    mean: Quantity
    var: Quantity
    dx: Quantity
    dgamma: Quantity
    dbeta: Quantity
    terms: int
    accumulation: np.dtype[Any]


def _mean_rounding(mean: Array, accumulation: np.dtype[Any], *, naive: bool) -> Array:
    """The rounding of a mean itself, in units of u_a: all of it where it is kept in the accumulation dtype."""
    return np.abs(mean) * (1 if naive else roundoff(np.float64) / roundoff(accumulation))


def _moments(
    x: Array, axes: tuple[int, ...], accumulation: np.dtype[Any], *, naive: bool = False
) -> tuple[Quantity, Quantity]:
    """Mean and biased variance of x, which is in the wider dtype already; reduced axes kept."""
    mean = x.mean(axis=axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=axes, keepdims=True)
    spread, rounding = np.sqrt(var), _mean_rounding(mean, accumulation, naive=naive)
    u = roundoff(accumulation) * np.sqrt(x.size // mean.size)
    return Quantity(mean, spread + rounding), Quantity(var, var + spread * rounding + rounding**2 * u)


def truth(
    case: Case, x: Array, gamma: Array | None, beta: Array | None, dout: Array,
    *, eps: float = EPS, constants: tuple[Array, Array] | None = None, naive: bool = False,
) -> Truth:  # fmt: skip
    """Every result by the textbook formulas in a wider dtype, from the inputs as they are stored.

    constants : (mean, var) of test mode, one element per channel or row.
    naive : for implementations that keep the mean in the accumulation dtype.
    """
    accumulation = _layout.accumulation_dtype(storage(x))  # the statistics', however wide dout is
    wider = _wider(accumulation)

    def wide(array: Array) -> Array:
        return np.asarray(array).astype(wider)

    shape, axes, stats = list(x.shape), case.parameter_axes, case.reduced_axes
    if case.op.family == "group" and constants is None:  # the channel axis as (groups, channels of a group)
        (axis,) = axes
        shape[axis : axis + 1] = [case.groups, x.shape[axis] // case.groups]
        axes, stats = (axis, axis + 1), tuple(each for each in range(1, len(shape)) if each != axis)
    among = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    samples = tuple(axis for axis in range(len(shape)) if axis not in axes)
    x, dout = wide(x).reshape(shape), wide(dout).reshape(shape)
    scale = np.ones(among, wider) if gamma is None else wide(gamma).reshape(among)
    shift = np.zeros(among, wider) if beta is None or not case.op.centred else wide(beta).reshape(among)

    def mean_of(values: Array) -> Array:
        return values.mean(axis=stats, keepdims=True)

    moments = _moments(x, stats, accumulation, naive=naive) if case.op.centred else _squares(x, stats)
    mean, var = (m.value for m in moments) if constants is None else (wide(c).reshape(among) for c in constants)
    total = var + wider.type(eps)
    rstd = np.divide(1, np.sqrt(total), out=np.zeros_like(total), where=total != 0)
    xhat = (x - mean) * rstd
    size, one = np.abs(xhat), 0
    if case.op.centred:
        one = 1
        size = size + one + _mean_rounding(mean, accumulation, naive=naive) * rstd
    grad, weight = dout * scale, np.abs(dout * scale)
    if constants is None:
        dx = rstd * (grad - one * mean_of(grad) - xhat * mean_of(grad * xhat))
        dx_magnitude = rstd * (weight + one * mean_of(weight) + size * mean_of(weight * size))
    else:
        dx, dx_magnitude = rstd * grad, rstd * weight

    terms = 0 if constants is not None else case.reduction
    summed = x.size // max(1, int(np.prod(case.parameter_shape)))
    return Truth(
        y=Quantity(scale * xhat + shift, np.abs(scale) * size + np.abs(shift)),
        mean=moments[0],
        var=moments[1],
        dx=Quantity(dx, dx_magnitude),
        dgamma=Quantity((dout * xhat).sum(axis=samples), (np.abs(dout) * size).sum(axis=samples)),
        dbeta=Quantity(dout.sum(axis=samples), np.abs(dout).sum(axis=samples)),
        terms=terms + summed,
        accumulation=accumulation,
    )


def _squares(x: Array, axes: tuple[int, ...]) -> tuple[Quantity, Quantity]:
    """No mean, and the mean of squares."""
    squares = (x * x).mean(axis=axes, keepdims=True)
    none = np.zeros_like(squares)
    return Quantity(none, none), Quantity(squares, squares)


def check(name: str, got: Array, expected: Quantity, accumulation: np.dtype[Any], terms: int) -> None:
    """Fail unless `got` is within its tolerance everywhere; NaN and Inf must be where the truth has them."""
    value = expected.value.reshape(got.shape)
    magnitude = expected.magnitude.reshape(got.shape)
    stored = np.dtype(got.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(got.astype(value.dtype) - value)
        allowed = tolerance(value, magnitude, stored, accumulation, terms)
        beyond = np.isinf(got) & (value.astype(stored) == got)  # what the dtype of the result cannot hold
        wrong = ~((error <= allowed) | (np.isnan(value) & np.isnan(got)) | (value == got) | beyond)
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, np.nan_to_num(error / allowed, nan=np.inf), 0)), got.shape)
        raise AssertionError(
            f"{name}: {wrong.sum()} of {got.size} elements off, worst at {tuple(map(int, worst))}: "
            f"got {got[worst]}, expected {float(value[worst])}, error {float(error[worst]):.3g}, "
            f"allowed {float(allowed[worst]):.3g}"
        )


def check_all(expected: Truth, results: dict[str, Array | None]) -> None:
    """Check each named result (y, mean, var, dx, dgamma, dbeta) against the truth."""
    for name, got in results.items():
        assert got is not None, name
        check(name, got, getattr(expected, name), expected.accumulation, expected.terms)


def check_moments(found: Moments, x: Array, axes: tuple[int, ...]) -> None:
    """Check moments of x over these axes."""
    accumulation = _layout.accumulation_dtype(storage(x))
    expected = _moments(x.astype(_wider(accumulation)), axes, accumulation)
    terms = x.size // max(1, found.mean.size)
    assert found.count == terms
    for name, quantity in zip(("mean", "var"), expected, strict=True):
        got = getattr(found, name)
        assert got.dtype == np.float64
        check(name, got, quantity, accumulation, terms)
    assert (found.var >= 0).all()


def check_weighted(found: Moments, x: Array, weights: Array, axes: tuple[int, ...]) -> None:
    """Check moments of x with weights over these axes. The error is that of moments without: the sums have as many
    terms, and a weight is one more factor of each.
    """
    accumulation = _layout.accumulation_dtype(storage(x))
    wider = _wider(accumulation)
    weights = np.broadcast_to(weights, x.shape).astype(wider)
    kept = np.where(weights == 0, 0, x.astype(wider))
    count = weights.sum(axis=axes, keepdims=True)
    share = weights / np.where(count == 0, 1, count)
    mean = (share * kept).sum(axis=axes, keepdims=True)
    mean += (share * (kept - mean)).sum(axis=axes, keepdims=True)  # what rounding took where it is far from 0
    var = (share * (kept - mean) ** 2).sum(axis=axes, keepdims=True)
    rounding, terms = _mean_rounding(mean, accumulation, naive=False), x.size // max(1, found.mean.size)
    u = roundoff(accumulation) * np.sqrt(terms)
    magnitudes = count, np.sqrt(var) + rounding, var + np.sqrt(var) * rounding + rounding**2 * u
    for name, value, magnitude in zip(found._fields, (count, mean, var), magnitudes, strict=True):
        got = getattr(found, name)
        assert got.dtype == np.float64
        check(name, got, Quantity(value, magnitude), accumulation, terms)
    assert (found.var >= 0).all()


@lru_cache(maxsize=8)
def standard(op: str, shape: tuple[int, ...], axis: int = 1, dtype: str = "float32") -> tuple[Case, Inputs, Truth]:
    """A case, its standard inputs (not to be written to) and the truth for them."""
    this = case(op, shape, axis, dtype)
    inputs = this.inputs()
    for array in inputs:
        array.flags.writeable = False
    return this, inputs, truth(this, *inputs)


def fused(case: Case, inputs: Inputs, backend: str, *, eps: float = EPS) -> dict[str, Array | None]:
    """Forward and backward on a backend, without what is None."""
    y, cache = case.op.forward(*case.arguments(*inputs[:3]), {"eps": eps}, axis=case.axis, backend=backend)
    found = {"y": y, **gradients(case.op.backward(inputs.dout, cache, backend=backend))}
    return {name: value for name, value in found.items() if value is not None}


def gradients(results: tuple[Array | None, ...]) -> dict[str, Array | None]:
    """What a backward returned, by name."""
    return dict(zip(("dx", "dgamma", "dbeta"), results, strict=False))


def rearranged(inputs: Inputs, x: str, dout: str | None = None) -> Inputs:
    """The same inputs with x (and dout) in other layouts."""
    return inputs._replace(
        x=ARRANGEMENTS[x](inputs.x), dout=inputs.dout if dout is None else ARRANGEMENTS[dout](inputs.dout)
    )


__all__ = ["ARRANGEMENTS", "EPS", "OPS", "WRITABLE", "Case", "Inputs", "dtype_of"]
