"""The two group calls, groupnorm's and with a group for each channel instancenorm's: from arguments to one kernel call.

How many groups there are, backward knows from the statistics in the cache.
"""

from __future__ import annotations

from typing import Any

from fastnorm import _arrays, _layout
from fastnorm._dispatch import kernels, kernels_for
from fastnorm._layout import Array, Axes
from fastnorm._memory import empty_like
from fastnorm.ops import _arguments
from fastnorm.ops._arguments import Cache


def forward(
    op: str, x: Any, gamma: Any, beta: Any, groups: Any, eps: float, axis: int, out: Array | None,
    backend: str | None, running: dict[str, Any] | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """Groups of channels of each sample, normalized: the body of `<op>_forward`.

    groups : None for as many as there are channels
    running : further arrays that `out` must not overlap
    """
    table = kernels(backend)
    sizes = _layout.plain_channels(x, gamma, beta, axis) if type(axis) is int else None
    if (
        sizes is not None and (position := axis % x.ndim) > 0
        and (groups is None or (type(groups) is int and groups > 0 and sizes[1] % groups == 0))
        and (out is None or _layout.plain_out(out, x, gamma, beta, running))
    ):  # fmt: skip
        outer, channels, inner = sizes
        samples = x.shape[0]
        groups = channels if groups is None else groups
        out = empty_like(x) if out is None else out
        mean, var = _arrays.pair(samples * groups, x)
        table.group_forward(x, samples, outer // samples, channels, inner, groups, gamma, beta, eps, out, mean, var)
        return out, Cache(op, x, gamma, beta, mean, var, eps, (position,), False)

    x, axes, channels = _arguments.groups_x(x, axis)
    table = kernels_for(x, table, backend)
    groups = channels if groups is None else _arguments.checked_groups(groups, channels)
    dtype = _layout.storage_dtype("x", x)
    accumulation = _layout.accumulation_dtype(dtype)
    gamma, scale = _layout.parameter("gamma", gamma, x, axes, accumulation)
    beta, shift = _layout.parameter("beta", beta, x, axes, accumulation)
    if out is not None:
        out = _layout.checked_out(out, x, dtype, {"x": x, "gamma": gamma, "beta": beta, **(running or {})})
    if x.size == 0:
        result = _arrays.empty_like(x, dtype) if out is None else out
        zeros = _arrays.zeros(x.shape[0] * groups, x)
        return _arguments.delivered(result, result, Cache(op, x, gamma, beta, zeros, zeros, eps, axes, False))

    view, (source,), work, out = _layout.buffers((x,), dtype, dtype, out, _layout.group_view, axes)
    samples, outer, _, inner = view.sizes
    mean, var = _arrays.pair(samples * groups, x)
    table.group_forward(source, samples, outer, channels, inner, groups, scale, shift, eps, work, mean, var)
    return _arguments.delivered(work, out, Cache(op, x, gamma, beta, mean, var, eps, axes, False))


def split(shape: tuple[int, ...], axis: int, groups: int) -> tuple[tuple[int, ...], Axes, Axes]:
    """(shape, axes of the statistics, axes of the parameters) with the channel axis split in (groups, channels of one).

    For those who write the formulas out over axes.
    """
    width = shape[axis] // max(1, groups)
    stats = tuple(each for each in range(1, len(shape) + 1) if each != axis)
    return (*shape[:axis], groups, width, *shape[axis + 1 :]), stats, (axis, axis + 1)


def backward(
    op: str, dout: Any, cache: Cache, out: Array | None, backend: str | None
) -> tuple[Array, Array | None, Array | None]:
    """(dx, dgamma, dbeta): the body of `<op>_backward`."""
    table = kernels(backend)
    cache = _arguments.checked_cache(cache, op)
    x = _arguments.cached_x(cache)
    gamma, beta, mean, var, axes = cache.gamma, cache.beta, cache.mean, cache.var, cache.axes
    samples = x.shape[0]
    sizes = _layout.plain_channels_backward(dout, x, gamma, beta, axes[0])
    if sizes is not None and (out is None or _layout.plain_out(out, x, dout, gamma)):
        outer, channels, inner = sizes
        outer //= samples
        grad, source, scale = dout, x, gamma
        out = work = empty_like(x) if out is None else out
    else:
        x = _layout.as_array("x", x)
        table = kernels_for(x, table, backend)
        mean, var = _layout.beside("mean", mean, x), _layout.beside("var", var, x)
        dout = _arguments.checked_dout(dout, x)
        x_dtype = _layout.storage_dtype("x", x)
        dtype = _layout.common_storage(x_dtype, _layout.storage_dtype("dout", dout))
        gamma, scale = _layout.parameter("gamma", gamma, x, axes, _layout.accumulation_dtype(dtype))
        if out is not None:
            out = _layout.checked_out(out, x, x_dtype, {"dout": dout, "x": x, "gamma": gamma})
        if x.size == 0:
            zeros = _arrays.zeros(x.shape[axes[0]], x)
            dx = _arrays.handed(_arrays.empty_like(x, x_dtype) if out is None else out)
            return dx, *_layout.gradients(zeros, zeros, gamma, beta)
        view, (grad, source), work, out = _layout.buffers((dout, x), dtype, x_dtype, out, _layout.group_view, axes)
        _, outer, channels, inner = view.sizes

    sum_dout, sum_dout_xhat = _arrays.pair(channels, source)
    table.group_backward(
        grad, source, samples, outer, channels, inner, var.size // samples, mean, var, cache.eps, scale,
        work, sum_dout, sum_dout_xhat,
    )  # fmt: skip
    dx = _layout.deliver(work, out)
    return dx, *_layout.gradients(sum_dout_xhat, sum_dout, gamma, beta)
