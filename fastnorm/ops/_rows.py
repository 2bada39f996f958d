"""The two calls of the row family, layernorm's and without centring rmsnorm's: from arguments to one kernel call.

A mean of None, in the cache and at the kernels, stands for rows that are not centred.
"""

from __future__ import annotations

import math
from typing import Any

from fastnorm import _arrays, _layout
from fastnorm._dispatch import kernels, kernels_for
from fastnorm._layout import Array
from fastnorm._memory import empty_like
from fastnorm.ops import _arguments
from fastnorm.ops._arguments import Cache


def forward(
    op: str, x: Any, gamma: Any, beta: Any, eps: float, axis: int, out: Array | None, backend: str | None, centred: bool
) -> tuple[Array, Cache]:
    """Rows of x from `axis` on, normalized: the body of `<op>_forward`."""
    table = kernels(backend)
    if (
        type(axis) is int and axis == -1 and _layout.plain(x, gamma, beta, -1)
        and (out is None or _layout.plain_out(out, x, gamma, beta))
    ):  # fmt: skip
        cols = x.shape[-1]
        rows = x.size // cols
        out = empty_like(x) if out is None else out
        mean, var = _statistics(rows, x, centred)
        table.row_forward(x, rows, cols, gamma, beta, eps, out, mean, var)
        return out, Cache(op, x, gamma, beta, mean, var, eps, (x.ndim - 1,), False)

    x, axes = _arguments.rows_x(x, axis)
    table = kernels_for(x, table, backend)
    first = axes[0]
    dtype = _layout.storage_dtype("x", x)
    accumulation = _layout.accumulation_dtype(dtype)
    gamma, scale = _layout.parameter("gamma", gamma, x, axes, accumulation)
    beta, shift = _layout.parameter("beta", beta, x, axes, accumulation)
    if out is not None:
        out = _layout.checked_out(out, x, dtype, {"x": x, "gamma": gamma, "beta": beta})

    if x.size == 0:
        result = _arrays.empty_like(x, dtype) if out is None else out
        zeros = _arrays.zeros(math.prod(x.shape[:first]), x)
        cache = Cache(op, x, gamma, beta, zeros if centred else None, zeros, eps, axes, False)
        return _arguments.delivered(result, result, cache)

    plan = _layout.buffers((x,), dtype, dtype, out, _layout.row_view, axes)
    view, lengths = plan.view, x.shape[first:]
    scale = _layout.to_memory(scale, view.params, lengths)
    shift = _layout.to_memory(shift, view.params, lengths)
    (source,) = plan.inputs
    rows, cols = view.sizes
    mean, var = _statistics(rows, x, centred)
    table.row_forward(source, rows, cols, scale, shift, eps, plan.work, mean, var)
    mean = _layout.to_index(mean, view.stats, x.shape[:first])
    var = _layout.to_index(var, view.stats, x.shape[:first])
    return _arguments.delivered(plan.work, plan.out, Cache(op, x, gamma, beta, mean, var, eps, axes, False))


def _statistics(rows: int, x: Array, centred: bool) -> tuple[Array | None, Array]:
    """Memory for mean and var."""
    mean, var = _arrays.pair(rows, x)
    return mean if centred else None, var


def backward(
    op: str, dout: Any, cache: Cache, out: Array | None, backend: str | None
) -> tuple[Array, Array | None, Array | None]:
    """(dx, dgamma, dbeta): the body of `<op>_backward`."""
    table = kernels(backend)
    cache = _arguments.checked_cache(cache, op)
    x = _arguments.cached_x(cache)
    gamma, beta, mean, var, axes = cache.gamma, cache.beta, cache.mean, cache.var, cache.axes
    wanted = gamma is not None or beta is not None
    sum_dout: Array | None
    sum_dout_xhat: Array | None
    if (
        len(axes) == 1 and _layout.plain_backward(dout, x, gamma, beta, -1)
        and (out is None or _layout.plain_out(out, x, dout, gamma))
    ):  # fmt: skip
        rows, cols = var.size, x.shape[-1]
        dx = empty_like(x) if out is None else out
        sum_dout, sum_dout_xhat = _arrays.pair(cols, x) if wanted else (None, None)
        table.row_backward(dout, x, rows, cols, mean, var, cache.eps, gamma, dx, sum_dout_xhat, sum_dout)
        return dx, *_layout.gradients(sum_dout_xhat, sum_dout, gamma, beta)

    x = _layout.as_array("x", x)
    table = kernels_for(x, table, backend)
    mean = None if mean is None else _layout.beside("mean", mean, x)
    var = _layout.beside("var", var, x)
    dout = _arguments.checked_dout(dout, x)
    x_dtype = _layout.storage_dtype("x", x)
    dtype = _layout.common_storage(x_dtype, _layout.storage_dtype("dout", dout))
    gamma, scale = _layout.parameter("gamma", gamma, x, axes, _layout.accumulation_dtype(dtype))
    if out is not None:
        out = _layout.checked_out(out, x, x_dtype, {"dout": dout, "x": x, "gamma": gamma})

    first = axes[0]
    if x.size == 0:
        cols = math.prod(x.shape[first:])
        sum_dout = sum_dout_xhat = _arrays.zeros(cols, x)
        dx = _arrays.handed(_arrays.empty_like(x, x_dtype) if out is None else out)
    else:
        plan = _layout.buffers((dout, x), dtype, x_dtype, out, _layout.row_view, axes)
        view, lengths = plan.view, x.shape[first:]
        mean = _layout.to_memory(mean, view.stats, x.shape[:first])
        var = _layout.to_memory(var, view.stats, x.shape[:first])
        scale = _layout.to_memory(scale, view.params, lengths)
        grad, source = plan.inputs
        rows, cols = view.sizes
        sum_dout, sum_dout_xhat = _arrays.pair(cols, x) if wanted else (None, None)
        table.row_backward(grad, source, rows, cols, mean, var, cache.eps, scale, plan.work, sum_dout_xhat, sum_dout)
        sum_dout = _layout.to_index(sum_dout, view.params, lengths)
        sum_dout_xhat = _layout.to_index(sum_dout_xhat, view.params, lengths)
        dx = _layout.deliver(plan.work, plan.out)
    return dx, *_layout.gradients(sum_dout_xhat, sum_dout, gamma, beta)
