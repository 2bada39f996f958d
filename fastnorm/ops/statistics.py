"""Moments over any axes, and normalizing with moments from elsewhere: the halves of a forward.

    mean = sum(x) / count        var = sum((x - mean)^2) / count        (biased)

Two moments of disjoint data merge without the data (Chan, Golub and LeVeque, 1979), delta = mean_b - mean_a:

    count = count_a + count_b
    mean  = mean_a + delta * count_b / count
    var   = (count_a*var_a + count_b*var_b + delta^2 * count_a*count_b / count) / count

With weights w the same holds with w counted in place of 1:

    count = sum(w)        mean = sum(w * x) / count        var = sum(w * (x - mean)^2) / count
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastnorm import _arrays, _layout
from fastnorm._dispatch import kernels, kernels_for
from fastnorm._layout import Array, Axes
from fastnorm._memory import empty_like
from fastnorm.backends import KernelTable
from fastnorm.ops import _arguments


class Moments(NamedTuple):
    """Count, mean and biased variance; mean and var are float64 whatever the dtype of the data."""

    count: Any  # hides tuple.count, which nobody needs here
    """The number of values behind each mean; with weights their sums, a float64 array like mean."""
    mean: Array
    var: Array

    @np.errstate(invalid="ignore", over="ignore")
    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of data together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other: expected moments of shape {self.mean.shape}, got {other.mean.shape}")
        count = self.count + other.count
        if isinstance(count, np.ndarray):
            share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        elif self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        else:
            share = other.count / count
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        var = (1 - share) * self.var + share * other.var + delta * delta * (share * (1 - share))
        return Moments(count, mean, var)

    def update(
        self, x: Any, axis: int | tuple[int, ...] | None = None, *, weights: Any = None, keepdims: bool = False,
        backend: str | None = None,
    ) -> Moments:  # fmt: skip
        """The moments of these data and x together; arguments as in `moments`, which made the first ones."""
        return self.merge(moments(x, axis, weights=weights, keepdims=keepdims, backend=backend))


def _reduced_axes(axis: Any, ndim: int) -> Axes:
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    axes = tuple(_layout.checked_axis(one, ndim) for one in given)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis: expected each axis once, got {axis!r}")
    return axes


class _Reduction(NamedTuple):
    """What reducing some axes of a shape gives."""

    reduced: Axes
    kept: Axes
    lengths: tuple[int, ...]
    """Of the kept axes."""
    among: tuple[int, ...]
    """The shape with the reduced axes of length one."""
    values: int
    """How many go into each result."""


def _reduction(axis: Any, shape: tuple[int, ...]) -> _Reduction:
    if axis is None or type(axis) is int or (type(axis) is tuple and set(map(type, axis)) == {int}):
        return _known_reduction(axis, shape)
    return _known_reduction(_reduced_axes(axis, len(shape)), shape)  # a bool would be found as the number it equals


@lru_cache(maxsize=1024)
def _known_reduction(axis: int | Axes | None, shape: tuple[int, ...]) -> _Reduction:
    reduced = tuple(sorted(_reduced_axes(axis, len(shape))))
    kept = tuple(axis for axis in range(len(shape)) if axis not in reduced)
    among = tuple(1 if axis in reduced else n for axis, n in enumerate(shape))
    lengths = tuple(shape[axis] for axis in kept)
    return _Reduction(reduced, kept, lengths, among, math.prod(shape[axis] for axis in reduced))


def moments(
    x: Any, axis: int | tuple[int, ...] | None = None, *, weights: Any = None, keepdims: bool = False,
    backend: str | None = None,
) -> Moments:  # fmt: skip
    """Count, mean and biased variance of x over `axis`, in one pass over the memory.

    Parameters
    ----------
    x : array, as in `batchnorm_forward`
    axis : the axes to reduce, as in numpy.mean; None reduces all.
    weights : an array of finite numbers of at least 0 that broadcasts to x, or None. A value of weight 0 is left out,
        also where it is NaN. Arrays and backends in host memory alone.
    keepdims : keep the reduced axes with length one, so that the result broadcasts against x.
    backend : as in `batchnorm_forward`.

    Returns
    -------
    Moments(count, mean, var): mean and var are float64 arrays, count is the number of values behind each; with
    weights a float64 array of their sums. Where it is 0, mean and var are 0 and merging ignores them.
    """
    if weights is not None:
        x, weights = _layout.host_array("x", x), _layout.host_array("weights", weights)
        return _weighted(x, axis, weights, keepdims, kernels(backend))
    table = kernels(backend)
    if (plain := _layout.plain_reduction(x, axis, keepdims)) is not None:
        merged, samples, outer, channels, inner, shape = plain
        if samples == 1:
            mean, var = _arrays.pair(channels, x)
            table.channel_moments(x, outer, channels, inner, mean, var)
        elif not _layout.worth_parts(merged * samples, x.size):
            mean, var = _packed(x, _reduction(axis, x.shape), table)
        else:
            mean, var = _of_parts(x, (merged * samples, outer, channels, inner), table)
            if merged > 1:
                mean, var = _merged(mean, var, (merged, samples * channels), (0,), table)
        if len(shape) != 1:
            mean, var = mean.reshape(shape), var.reshape(shape)
        return Moments(merged * outer * inner, mean, var)
    x = _layout.as_array("x", x)
    table = kernels_for(x, table, backend)
    reduction = _reduction(axis, x.shape)
    mean, var = _statistics(x, _layout.storage_dtype("x", x), reduction, table)
    shape = reduction.among if keepdims else reduction.lengths
    return Moments(reduction.values, _arrays.handed(mean.reshape(shape)), _arrays.handed(var.reshape(shape)))


def _statistics(x: Array, dtype: np.dtype[Any], reduction: _Reduction, table: KernelTable) -> tuple[Array, Array]:
    """mean and var, flat in index order, of an array computed as one of this dtype."""
    kept, lengths = reduction.kept, reduction.lengths
    if not x.size:
        mean, var = (_arrays.zeros(math.prod(lengths), x) for _ in range(2))
        return mean, var
    order: Axes | None
    if (parts := _parts_view(x, dtype, kept)) is not None:
        order = parts.stats
        mean, var = _of_parts(x, parts.sizes, table)
        if parts.merged:
            mean, var = _merged(mean, var, parts.lengths, parts.merged, table)
    else:
        view, (source,) = _layout.readable((x,), dtype, _layout.channel_view, kept)
        order = view.stats
        outer, channels, inner = view.sizes
        mean, var = _arrays.pair(channels, x)
        table.channel_moments(source, outer, channels, inner, mean, var)
    return _layout.to_index(mean, order, lengths), _layout.to_index(var, order, lengths)


def _packed(x: Array, reduction: _Reduction, table: KernelTable) -> tuple[Array, Array]:
    """mean and var, flat in index order, of a plain array, by way of a copy with what is kept last."""
    order = reduction.reduced + reduction.kept
    packed = _arrays.empty([x.shape[axis] for axis in order], x.dtype, x)
    _arrays.copy(packed, x.transpose(order))
    statistics = x.size // reduction.values
    mean, var = _arrays.pair(statistics, x)
    table.channel_moments(packed, reduction.values, statistics, 1, mean, var)
    return mean, var


def _parts_view(x: Array, dtype: np.dtype[Any], kept: Axes) -> _layout.PartsView | None:
    """The view of an array in host memory that would otherwise be packed, if there is one."""
    if type(x) is not np.ndarray or not x.size or x.dtype != dtype or not x.flags.aligned:
        return None
    memory = x.shape, x.strides, x.itemsize, kept
    return None if _layout.channel_view(*memory) is not None else _layout.parts_view(*memory)


def _of_parts(x: Array, sizes: tuple[int, int, int, int], table: KernelTable) -> tuple[Array, Array]:
    """mean and var of each channel of each sample, flat in the order of memory."""
    samples, outer, channels, inner = sizes
    mean, var = _arrays.pair(samples * channels, x)
    table.group_moments(x, samples, outer, channels, inner, channels, mean, var)
    return mean, var


@np.errstate(over="ignore")
def _merged(
    mean: Array, var: Array, lengths: tuple[int, ...], reduced: Axes, table: KernelTable
) -> tuple[Array, Array]:
    """Those of parts of equally many values along these axes together: the mean is that of the means, the variance
    theirs and the mean of the variances.
    """
    reduction = _known_reduction(reduced, lengths)
    means, between = _statistics(mean.reshape(lengths), mean.dtype, reduction, table)
    within, _ = _statistics(var.reshape(lengths), var.dtype, reduction, table)
    between += within
    return means, between


SAFE = (2.0**-20, 2.0**60)
"""Sums of weights between these leave what is multiplied by weights in float32 its digits."""


def _weighted(x: Array, axis: Any, weights: Array, keepdims: bool, table: KernelTable) -> Moments:
    """Moments with weights that are looked at only where a count shows that something is wrong with them."""
    dtype = _layout.storage_dtype("x", x)
    _layout.storage_dtype("weights", weights)
    _, kept, lengths, among, _ = _reduction(axis, x.shape)
    _broadcast_axes("weights", weights.shape, x.shape)
    found = _weighted_in(dtype, x, kept, lengths, weights, table) if x.size else None
    if found is None or not _is_safe(found.count, dtype, weights.dtype):
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError("weights: expected finite numbers of at least 0, got negative ones, NaN or Inf")
        if found is None:
            found = Moments(*(np.zeros(math.prod(lengths)) for _ in range(3)))
        else:
            found = _weighted_in(_layout.FLOAT64, x, kept, lengths, weights, table)
    shape = among if keepdims else lengths
    return Moments(*(values.reshape(shape) for values in found))


@np.errstate(over="ignore")  # of float64 weights in float32
def _weighted_in(
    dtype: np.dtype[Any], x: Array, kept: Axes, lengths: tuple[int, ...], weights: Array, table: KernelTable
) -> Moments:
    """Count, mean and var, each flat in index order, of an x that is not empty, stored in this dtype."""
    view, (source,) = _layout.readable((x,), dtype, _layout.channel_view, kept)
    laid, each = _layout.weights(weights, x.shape, view, kept, _layout.accumulation_dtype(dtype))
    outer, channels, inner = view.sizes
    count, mean, var = (np.empty(channels) for _ in range(3))
    table.channel_weighted_moments(source, outer, channels, inner, laid, each, count, mean, var)
    return Moments(*(_layout.to_index(values, view.stats, lengths) for values in (count, mean, var)))


def _is_safe(count: Array, dtype: np.dtype[Any], weights: np.dtype[Any]) -> bool:
    """Whether these sums of weights, computed for values of this dtype, need no second look."""
    if dtype == _layout.FLOAT64:
        return bool(np.isfinite(count).all())
    safe = (count >= SAFE[0]) & (count <= SAFE[1])
    if weights != _layout.FLOAT64:  # of which a small one may have become 0
        safe |= count == 0
    return bool(safe.all())


STREAMED = 1 << 22
"""Elements of an array that are streamed at a time: 16 MB of float32."""


def stream_moments(
    batches: Any, axis: int | tuple[int, ...] | None = 0, *, keepdims: bool = False,
    progress: Callable[[int, int | None], object] | None = None, backend: str | None = None,
) -> Moments:  # fmt: skip
    """Moments of data that need not fit in memory, in one pass.

    Parameters
    ----------
    batches : an iterable of arrays that agree in all but the reduced axes; or one array, np.memmap say, which is
        read along its first reduced axis, some 16 MB at a time.
    axis, keepdims, backend : as in `moments`. The default reduces axis 0.
    progress : called after each batch with the number of values seen so far and that of all, None for an iterable
        that does not know.

    Returns
    -------
    Moments of all batches, merged in the order in which they come: the same batches give the same bits.

    Raises ValueError where there is no batch, or one does not fit the first.
    """
    total: int | None = None
    if isinstance(batches, np.ndarray):
        reduced = _reduced_axes(axis, batches.ndim)
        total = batches.size
        batches = _slabs(batches, reduced[0]) if reduced else iter([batches])
    elif not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an array or an iterable of arrays, got {type(batches).__name__}")
    whole: Moments | None = None
    done = 0
    for number, batch in enumerate(batches):
        array = _layout.host_array(f"batches[{number}]", batch)
        found = moments(array, axis, keepdims=keepdims, backend=backend)
        if whole is not None and found.mean.shape != whole.mean.shape:
            raise ValueError(
                f"batches[{number}]: expected statistics of shape {whole.mean.shape}, as of those before, "
                f"got {found.mean.shape} from shape {array.shape}"
            )
        whole = found if whole is None else whole.merge(found)
        done += array.size
        if progress is not None:
            progress(done, total)
    if whole is None:
        raise ValueError("batches: expected at least one array, got none")
    return whole


def _slabs(array: Array, axis: int) -> Iterator[Array]:
    """Views along an axis of at most STREAMED elements, at least one of them, that make up the array."""
    length = array.shape[axis]
    step = max(1, STREAMED * length // max(1, array.size))
    for start in range(0, max(1, length), step):
        yield array[(slice(None),) * axis + (slice(start, start + step),)]


@lru_cache(maxsize=1024)
def _broadcast_axes(name: str, given: tuple[int, ...], shape: tuple[int, ...]) -> Axes:
    """The axes along which an array of the given shape differs; ValueError where it does not broadcast to `shape`."""
    padded = (1,) * (len(shape) - len(given)) + given
    if len(padded) != len(shape) or any(n not in (1, length) for n, length in zip(padded, shape, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {given}")
    return tuple(axis for axis, n in enumerate(padded) if n != 1)


def _vector(plain: Array | None) -> Any:
    return plain if plain is None or plain.ndim == 1 else plain.ravel()


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
    gamma, beta : arrays of as many elements, one for each of mean's, in any shape that broadcasts so, or None. A
        vector goes along mean's axes: of (4,) with mean of (4, 1) each element belongs to a row.
    eps : added to var, at least 0.
    out : array to write to, of x's shape and result dtype; may be x itself.
    backend : as in `batchnorm_forward`.
    """
    table = kernels(backend)
    sizes = _layout.plain_normalization(x, mean, var, gamma, beta)
    if sizes is not None and (out is None or _layout.plain_out(out, x, mean, var, gamma, beta)):
        eps = _arguments.checked_eps(eps)
        out = empty_like(x) if out is None else out
        centre, spread, scale, shift = _vector(mean), _vector(var), _vector(gamma), _vector(beta)
        outer, channels, inner = sizes
        table.channel_apply(x, outer, channels, inner, centre, spread, eps, scale, shift, out)
        return out
    x = _layout.as_array("x", x)
    table = kernels_for(x, table, backend)
    dtype = _layout.storage_dtype("x", x)
    mean = _layout.beside("mean", mean, x)
    axes = _broadcast_axes("mean", mean.shape, x.shape)
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
    if view.params is not None:
        lengths = tuple(x.shape[axis] for axis in axes)
        centre, spread, scale, shift = (
            _layout.to_memory(values, view.params, lengths) for values in (centre, spread, scale, shift)
        )
    (source,) = plan.inputs
    outer, channels, inner = view.sizes
    table.channel_apply(source, outer, channels, inner, centre, spread, eps, scale, shift, plan.work)
    return _layout.deliver(plan.work, plan.out)
