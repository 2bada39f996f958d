"""The closed form of the backward in plain NumPy: a few lines to read, CS231n's `batchnorm_backward_alt`.

It takes the cache of the fused forward and computes x_hat anew from x, mean and var, in the accumulation dtype:

    dbeta  = sum(dout)          dgamma = sum(dout * x_hat)          over the axes gamma is broadcast along
    g      = gamma * dout
    dx     = rstd * (g - mean(g) - x_hat * mean(g * x_hat))         means over the axes of the statistics

RMSNorm, which does not centre, has neither the mean in x_hat nor mean(g).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm import _layout
from fastnorm._layout import Array, Axes
from fastnorm.ops import _arguments, _groups
from fastnorm.ops._arguments import Cache


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def _closed_form(dout: Any, cache: Cache, op: str) -> tuple[Array, Array | None, Array | None]:
    cache = _arguments.checked_cache(cache, op)
    x = _layout.host_array("x", _arguments.cached_x(cache))
    dout = _arguments.checked_dout(dout, x)
    storage = _layout.storage_dtype("x", x)
    dtype = _layout.accumulation_dtype(_layout.common_storage(storage, _layout.storage_dtype("dout", dout)))
    _, scale = _layout.parameter("gamma", cache.gamma, x, cache.axes, dtype)
    own, (shape, stats, params) = x.shape, _axes(cache, x)
    others = tuple(axis for axis in range(len(shape)) if axis not in params)

    x, dout = x.reshape(shape), dout.astype(dtype, copy=False).reshape(shape)
    rstd = _rstd(cache, shape, stats)
    x_hat = _centred(x, cache.mean, rstd.shape, dtype)
    x_hat *= rstd.astype(dtype)

    dbeta = np.sum(dout, axis=others)
    dgamma = np.sum(dout * x_hat, axis=others)
    g = dout if scale is None else dout * scale.reshape([n if axis in params else 1 for axis, n in enumerate(shape)])
    if cache.frozen or x.size == 0:
        dx = g * rstd.astype(dtype)
    else:
        mean_g_x_hat = np.mean(g * x_hat, axis=stats, keepdims=True)
        if cache.mean is not None:
            g = g - np.mean(g, axis=stats, keepdims=True)
        dx = rstd.astype(dtype) * (g - x_hat * mean_g_x_hat)
    return (
        dx.astype(storage, copy=False).reshape(own),
        *_layout.gradients(dgamma.reshape(-1), dbeta.reshape(-1), cache.gamma, cache.beta),
    )


def _axes(cache: Cache, x: Array) -> tuple[tuple[int, ...], Axes, Axes]:
    """(x's shape, with groups apart, the axes of the statistics, those of the parameters)"""
    if cache.op in ("layernorm", "rmsnorm"):
        return x.shape, cache.axes, cache.axes
    if cache.op == "batchnorm" or cache.frozen:
        return x.shape, tuple(axis for axis in range(x.ndim) if axis not in cache.axes), cache.axes
    return _groups.split(x.shape, cache.axes[0], cache.var.size // x.shape[0] if x.shape[0] else 1)


def _rstd(cache: Cache, shape: tuple[int, ...], stats: Axes) -> Array:
    """1/sqrt(var + eps), 0 where that is 1/0, shaped to broadcast against x."""
    total = (cache.var + cache.eps).reshape([1 if axis in stats else n for axis, n in enumerate(shape)])
    return np.divide(1.0, np.sqrt(total), out=np.zeros_like(total), where=total != 0.0)


def _centred(x: Array, mean: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """x - mean in `dtype`, the float64 mean subtracted in two parts: a rounded mean would cost digits of x_hat."""
    if mean is None:
        return x.astype(dtype)
    mean = mean.reshape(shape)
    rounded = mean.astype(dtype)
    centred: Array = x.astype(dtype, copy=False) - rounded
    centred -= (mean - rounded).astype(dtype)
    return centred


def batchnorm_backward_alt(dout: Any, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """`batchnorm_backward` in closed form and plain NumPy; takes the cache of `batchnorm_forward`.

    Up to four arrays of x's size at a time. Results and errors as in `batchnorm_backward`.
    """
    return _closed_form(dout, cache, "batchnorm")


def layernorm_backward_alt(dout: Any, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """`layernorm_backward` in closed form and plain NumPy; takes the cache of `layernorm_forward`.

    Up to four arrays of x's size at a time. Results and errors as in `layernorm_backward`.
    """
    return _closed_form(dout, cache, "layernorm")


def rmsnorm_backward_alt(dout: Any, cache: Cache) -> tuple[Array, Array | None]:
    """`rmsnorm_backward` in closed form and plain NumPy; takes the cache of `rmsnorm_forward`.

    Up to four arrays of x's size at a time. Results and errors as in `rmsnorm_backward`.
    """
    dx, dgamma, _ = _closed_form(dout, cache, "rmsnorm")
    return dx, dgamma


def groupnorm_backward_alt(dout: Any, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """`groupnorm_backward` in closed form and plain NumPy; takes the cache of `groupnorm_forward`.

    Up to four arrays of x's size at a time. Results and errors as in `groupnorm_backward`.
    """
    return _closed_form(dout, cache, "groupnorm")


def instancenorm_backward_alt(dout: Any, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """`instancenorm_backward` in closed form and plain NumPy; takes the cache of `instancenorm_forward`.

    Up to four arrays of x's size at a time. Results and errors as in `instancenorm_backward`.
    """
    return _closed_form(dout, cache, "instancenorm")
