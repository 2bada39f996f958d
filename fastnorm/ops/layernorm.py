"""Layer normalization (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450).

Statistics of each sample over its normalized axes, D values together:

    mean = sum(x) / D
    var  = sum((x - mean)^2) / D
    rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) * rstd
    out  = gamma * xhat + beta                       gamma, beta: one element per normalized position

Backward, with g = gamma * dout and means over the normalized axes:

    dx     = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dgamma = sum over samples of dout * xhat
    dbeta  = sum over samples of dout

docs/maths.md derives each line.
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


def layernorm_forward(
    x: Any, gamma: Any, beta: Any, ln_param: dict[str, Any] | None = None, *,
    axis: int = -1, out: Array | None = None, backend: str | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """Normalize each sample over its last axes: out = gamma * (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    x : array of (N, D) or any shape of 1 dimension or more
        float16, bfloat16, float32 or float64, any strides; integers and bools are promoted to float64.
    gamma, beta : arrays of x.shape[axis:], or None
        Scale and shift, or any shape that broadcasts to it element for element. None means 1 and 0.
    ln_param : dict or None
        eps : added to the variance, default 1e-5. mode : accepted and ignored. Any other key is an error.
    axis : the first normalized axis: -1 normalizes the last one, 1 on (N, C, H, W) C, H and W together.
    out : array to write to, of x's shape and result dtype; no overlap with the inputs.
    backend : the name of a backend; None takes the one chosen by `use_backend` or the first available.

    Returns
    -------
    out : array of x's shape, dtype and memory layout
    cache : for `layernorm_backward`; refers to x, copies nothing of its size.

    Raises ValueError or TypeError, naming the argument, before anything is written.
    """
    table = kernels(backend)
    eps = _arguments.layernorm_eps(ln_param)
    if (
        type(axis) is int and axis == -1 and _layout.plain(x, gamma, beta, -1)
        and (out is None or _layout.plain_out(out, x, gamma, beta))
    ):  # fmt: skip
        cols = x.shape[-1]
        rows = x.size // cols
        out = empty_like(x) if out is None else out
        mean, var = _arrays.pair(rows, x)
        table.row_forward(x, rows, cols, gamma, beta, eps, out, mean, var)
        return out, Cache("layernorm", x, gamma, beta, mean, var, eps, (x.ndim - 1,), False)

    x, axes = _arguments.layernorm_x(x, axis)
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
        cache = Cache("layernorm", x, gamma, beta, zeros, zeros, eps, axes, False)
        return _arguments.delivered(result, result, cache)

    plan = _layout.buffers((x,), dtype, dtype, out, _layout.row_view, axes)
    view, lengths = plan.view, x.shape[first:]
    scale = _layout.to_memory(scale, view.params, lengths)
    shift = _layout.to_memory(shift, view.params, lengths)
    (source,) = plan.inputs
    rows, cols = view.sizes
    mean, var = _arrays.pair(rows, x)
    table.row_forward(source, rows, cols, scale, shift, eps, plan.work, mean, var)
    mean = _layout.to_index(mean, view.stats, x.shape[:first])
    var = _layout.to_index(var, view.stats, x.shape[:first])
    cache = Cache("layernorm", x, gamma, beta, mean, var, eps, axes, False)
    return _arguments.delivered(plan.work, plan.out, cache)


def layernorm_backward(
    dout: Any, cache: Cache, *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `layernorm_forward`: dx = rstd*(g - mean(g) - xhat*mean(g*xhat)), g = gamma*dout.

    Parameters
    ----------
    dout : array of x's shape, any real dtype and strides
    cache : from `layernorm_forward`, of any backend
    out : array to write dx to, of x's shape and result dtype.
    backend : as in `layernorm_forward`.

    Returns
    -------
    dx : array of x's shape, dtype and memory layout
    dgamma, dbeta : sums over the samples of dout * xhat and of dout, in the shape and dtype of gamma and
        beta; None where gamma or beta was None.

    Raises TypeError for what is not a cache, ValueError for another op's cache or a dout of another shape.
    """
    table = kernels(backend)
    cache = _arguments.checked_cache(cache, "layernorm")
    x = _arguments.cached_x(cache)
    gamma, beta, mean, var, axes = cache.gamma, cache.beta, cache.mean, cache.var, cache.axes
    wanted = gamma is not None or beta is not None
    sum_dout: Array | None
    sum_dout_xhat: Array | None
    if (
        len(axes) == 1 and _layout.plain_backward(dout, x, gamma, beta, -1)
        and (out is None or _layout.plain_out(out, x, dout, gamma))
    ):  # fmt: skip
        rows, cols = mean.size, x.shape[-1]
        dx = empty_like(x) if out is None else out
        sum_dout, sum_dout_xhat = _arrays.pair(cols, x) if wanted else (None, None)
        table.row_backward(dout, x, rows, cols, mean, var, cache.eps, gamma, dx, sum_dout_xhat, sum_dout)
        return dx, _layout.gradient(sum_dout_xhat, gamma), _layout.gradient(sum_dout, beta)

    x = _layout.as_array("x", x)
    table = kernels_for(x, table, backend)
    mean, var = _layout.beside("mean", mean, x), _layout.beside("var", var, x)
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
    return dx, _layout.gradient(sum_dout_xhat, gamma), _layout.gradient(sum_dout, beta)
