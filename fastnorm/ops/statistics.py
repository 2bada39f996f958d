"""Moments over any axes, and normalizing with moments from elsewhere: the halves of a forward.

    mean = sum(x) / count        var = sum((x - mean)^2) / count        (biased)

Two moments of disjoint data merge without the data (Chan, Golub and LeVeque, 1979), delta = mean_b - mean_a:

    count = count_a + count_b
    mean  = mean_a + delta * count_b / count
    var   = (count_a*var_a + count_b*var_b + delta^2 * count_a*count_b / count) / count
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastnorm import _arrays, _layout
from fastnorm._dispatch import kernels, kernels_for
from fastnorm._layout import Array, Axes
from fastnorm.ops import _arguments


class Moments(NamedTuple):
    """Count, mean and biased variance; mean and var are float64 whatever the dtype of the data."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: Array
    var: Array

    @np.errstate(invalid="ignore", over="ignore")
    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of data together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other: expected moments of shape {self.mean.shape}, got {other.mean.shape}")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count
        mean = self.mean + delta * share
        var = (1 - share) * self.var + share * other.var + delta * delta * (share * (1 - share))
        return Moments(count, mean, var)


def _reduced_axes(axis: Any, ndim: int) -> Axes:
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    axes = tuple(_layout.checked_axis(one, ndim) for one in given)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis: expected each axis once, got {axis!r}")
    return axes


def moments(
    x: Any, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False, backend: str | None = None
) -> Moments:
    """Count, mean and biased variance of x over `axis`, in one pass over the memory.

    Parameters
    ----------
    x : array, as in `batchnorm_forward`
    axis : the axes to reduce, as in numpy.mean; None reduces all.
    keepdims : keep the reduced axes with length one, so that the result broadcasts against x.
    backend : as in `batchnorm_forward`.

    Returns
    -------
    Moments(count, mean, var): mean and var are float64 arrays, count is the number of values behind each.
    Where it is 0, mean and var are 0 and merging ignores them.
    """
    x = _layout.as_array("x", x)
    table = kernels_for(x, kernels(backend), backend)
    dtype = _layout.storage_dtype("x", x)
    reduced = _reduced_axes(axis, x.ndim)
    kept = tuple(axis for axis in range(x.ndim) if axis not in reduced)
    lengths = tuple(x.shape[axis] for axis in kept)
    mean, var = (_arrays.zeros(math.prod(lengths), x) for _ in range(2))
    if x.size:
        view, (source,) = _layout.readable((x,), dtype, _layout.channel_view, kept)
        outer, channels, inner = view.sizes
        table.channel_moments(source, outer, channels, inner, mean, var)
        mean = _layout.to_index(mean, view.stats, lengths)
        var = _layout.to_index(var, view.stats, lengths)
    shape = tuple(1 if axis in reduced else n for axis, n in enumerate(x.shape)) if keepdims else lengths
    count = math.prod(x.shape[axis] for axis in reduced)
    return Moments(count, _arrays.handed(mean.reshape(shape)), _arrays.handed(var.reshape(shape)))


def normalize(
    x: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None, eps: float = 1e-5, *,
    out: Array | None = None, backend: str | None = None,
) -> Array:  # fmt: skip
    """(x - mean) / sqrt(var + eps) * gamma + beta with given statistics.

    Parameters
    ----------
    x : array, as in `batchnorm_forward`
    mean, var : arrays of one shape that broadcasts against x: (D,) for (N, D), (1, C, 1, 1) for
        (N, C, H, W), as `moments(..., keepdims=True)` returns them.
    gamma, beta : arrays of the same number of elements, broadcasting likewise, or None.
    eps : added to var, at least 0.
    out : array to write to, of x's shape and result dtype; may be x itself.
    backend : as in `batchnorm_forward`.
    """
    x = _layout.as_array("x", x)
    table = kernels_for(x, kernels(backend), backend)
    dtype = _layout.storage_dtype("x", x)
    mean = _layout.beside("mean", mean, x)
    padded = (1,) * (x.ndim - mean.ndim) + mean.shape
    if len(padded) != x.ndim or any(n not in (1, length) for n, length in zip(padded, x.shape, strict=True)):
        raise ValueError(f"mean: expected a shape that broadcasts to {x.shape}, got {mean.shape}")
    axes = tuple(axis for axis, n in enumerate(padded) if n != 1)
    _, centre = _layout.parameter("mean", mean, x, axes, _layout.FLOAT64)
    var, spread = _layout.parameter("var", var, x, axes, _layout.FLOAT64)
    if centre is None or spread is None:
        raise TypeError("var: expected an array like mean, got None")
    accumulation = _layout.accumulation_dtype(dtype)
    gamma, scale = _layout.parameter("gamma", gamma, x, axes, accumulation)
    beta, shift = _layout.parameter("beta", beta, x, axes, accumulation)
    eps = _arguments.checked_eps(eps)
    if out is not None:
        others = {"x": x, "gamma": gamma, "beta": beta, "mean": mean, "var": var}
        out = _layout.checked_out(out, x, dtype, others, may_be=x)
    if x.size == 0:
        return _arrays.handed(_arrays.empty_like(x, dtype) if out is None else out)
    plan = _layout.buffers((x,), dtype, dtype, out, _layout.channel_view, axes)
    view = plan.view
    lengths = tuple(x.shape[axis] for axis in axes)
    centre, spread, scale, shift = (
        _layout.to_memory(values, view.params, lengths) for values in (centre, spread, scale, shift)
    )
    (source,) = plan.inputs
    outer, channels, inner = view.sizes
    table.channel_apply(source, outer, channels, inner, centre, spread, eps, scale, shift, plan.work)
    return _layout.deliver(plan.work, plan.out)
