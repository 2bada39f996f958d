"""Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016, https://arxiv.org/abs/1607.08022).

Group normalization with a group for each channel: statistics of each channel of each sample over its S positions,

    mean = sum(x) / S
    var  = sum((x - mean)^2) / S
    rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) * rstd
    out  = gamma * xhat + beta                       gamma, beta: one element per channel

Backward, with means over the channel of the sample:

    dx     = gamma * rstd * (dout - mean(dout) - xhat * mean(dout * xhat))
    dgamma = sum over samples and positions of dout * xhat
    dbeta  = sum over samples and positions of dout

Running statistics, where they are kept, are averages of mean and var over the samples. In test mode they take the
place of mean and var, and all is as in batchnorm's. docs/maths.md derives each line.
"""

from __future__ import annotations

from typing import Any

from fastnorm import _arrays, _layout
from fastnorm._dispatch import kernels, kernels_for
from fastnorm._layout import Array
from fastnorm.backends import KernelTable
from fastnorm.ops import _arguments, _groups
from fastnorm.ops._arguments import Cache
from fastnorm.ops.batchnorm import batchnorm_backward, batchnorm_forward


def instancenorm_forward(
    x: Any, gamma: Any, beta: Any, in_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Array | None = None, backend: str | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """Normalize each channel of each sample: out = gamma * (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    x : array of (N, C, L), (N, C, H, W), (N, C, D, H, W) or any shape of 2 dimensions or more
        float16, bfloat16, float32 or float64, any strides; integers and bools are promoted to float64.
    gamma, beta : arrays of one element per channel, or None
        Scale and shift. Any shape that broadcasts: (C,), (1, C, 1, 1). None means 1 and 0.
    in_param : dict or None
        mode : 'train' (default) uses each sample's own statistics, 'test' the running ones if there are any.
        eps : added to the variance, default 1e-5.
        running_mean, running_var : one element per channel, both or none. Where they are given, a call in train
        mode stores new arrays here, with the samples' average of mean and var as the batch's statistics.
        momentum and the rest : as in `batchnorm_forward`. Any other key is an error.
    axis : the channel axis; -1 for channels-last. Not 0, which is that of the samples.
    out : array to write to, of x's shape and result dtype. May be x itself in test mode with running statistics.
    backend : the name of a backend; None takes the one chosen by `use_backend` or the first available.

    One value per channel and sample gives beta.

    Returns
    -------
    out : array of x's shape, dtype and memory layout
    cache : for `instancenorm_backward`; refers to x, copies nothing of its size.

    Raises ValueError or TypeError, naming the argument, before anything is written.
    """
    if in_param is None:  # nothing of x need be known yet
        eps = _arguments.DEFAULTS.eps
        return _groups.forward("instancenorm", x, gamma, beta, None, eps, axis, out, backend)
    array, _, channels = _arguments.groups_x(x, axis)
    options = _arguments.instancenorm_options(in_param, array, channels)
    if options.frozen:
        out, cache = batchnorm_forward(x, gamma, beta, in_param, axis=axis, out=out, backend=backend)
        return out, cache._replace(op="instancenorm")

    running = {"running_mean": options.running_mean, "running_var": options.running_var}
    out, cache = _groups.forward("instancenorm", x, gamma, beta, None, options.eps, axis, out, backend, running)
    if options.running_mean is not None and array.size:
        table = kernels_for(array, kernels(backend), backend)
        mean = _over_samples(_layout.beside("mean", cache.mean, array), array, channels, table)
        var = _over_samples(_layout.beside("var", cache.var, array), array, channels, table)
        count = array.size // (array.shape[0] * channels)
        _arguments.store_running(in_param, options, mean, var, _layout.storage_dtype("x", array), count)
    return out, cache


def _over_samples(values: Array, x: Array, channels: int, table: KernelTable) -> Any:
    """The average over the samples of x of a statistic of each channel of each sample."""
    average, spread = _arrays.pair(channels, x)
    table.channel_moments(values, x.shape[0], channels, 1, average, spread)
    return average


def instancenorm_backward(
    dout: Any, cache: Cache, *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `instancenorm_forward`: dx = gamma*rstd*(dout - mean(dout) - xhat*mean(dout*xhat)).

    Parameters
    ----------
    dout : array of x's shape, any real dtype and strides
    cache : from `instancenorm_forward`, of any backend. One of running statistics treats them as constants.
    out : array to write dx to, of x's shape and result dtype.
    backend : as in `instancenorm_forward`.

    Returns
    -------
    dx : array of x's shape, dtype and memory layout
    dgamma, dbeta : sums over samples and positions of dout * xhat and of dout, in the shape and dtype of gamma and
        beta; None where gamma or beta was None.

    Raises TypeError for what is not a cache, ValueError for another op's cache or a dout of another shape.
    """
    cache = _arguments.checked_cache(cache, "instancenorm")
    if cache.frozen:
        return batchnorm_backward(dout, cache._replace(op="batchnorm"), out=out, backend=backend)
    return _groups.backward("instancenorm", dout, cache, out, backend)
