"""Batch normalization (Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167).

Statistics over every axis but the channel axis; n = x.size / channels values per channel:

    mean = sum(x) / n
    var  = sum((x - mean)^2) / n                     biased: divided by n, not n - 1
    rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) * rstd
    out  = gamma * xhat + beta

Backward, with L the loss and dout = dL/dout:

    dbeta  = sum(dout)
    dgamma = sum(dout * xhat)
    dx     = gamma * rstd * (dout - dbeta / n - xhat * dgamma / n)

In test mode mean and var are the running statistics, constants: dx = gamma * rstd * dout.
docs/maths.md derives each line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from fastnorm import _arrays, _layout
from fastnorm._dispatch import kernels, kernels_for
from fastnorm._layout import Array
from fastnorm._memory import empty_like
from fastnorm.ops import _arguments, _chunks
from fastnorm.ops._arguments import Cache
from fastnorm.ops._chunks import ChunksCache


@overload
def batchnorm_forward(
    x: list[Array] | tuple[Array, ...], gamma: Any, beta: Any, bn_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Sequence[Array] | None = None, backend: str | None = None,
) -> tuple[list[Array], ChunksCache]: ...  # fmt: skip
@overload
def batchnorm_forward(
    x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Array | None = None, backend: str | None = None,
) -> tuple[Array, Cache]: ...  # fmt: skip
def batchnorm_forward(
    x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Any = None, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Normalize each channel over the batch: out = gamma * (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    x : array of (N, D), (N, C, L), (N, C, H, W), (N, C, D, H, W) or any shape of 2 dimensions or more
        float16, bfloat16, float32 or float64, any strides; integers and bools are promoted to float64.
        Or a list or tuple of such arrays, the chunks of one batch: they agree in dtype and in all but the axis of
        the batch, and what holds for the array that they make up holds for them. The result, `out` and the
        backward's dout and dx are then lists of arrays like them; there is one cache and one update of bn_param.
    gamma, beta : arrays of one element per channel, or None
        Scale and shift. Any shape that broadcasts: (C,), (1, C, 1, 1). None means 1 and 0.
    bn_param : dict or None
        mode : 'train' (default) uses the batch's statistics, 'test' the running ones.
        eps : added to the variance, default 1e-5.
        momentum : default 0.9; the weight of the *old* running statistics, from 0 to 1.
        running_mean, running_var : one element per channel; in train mode new arrays are stored here,
        running = momentum * running + (1 - momentum) * batch with the biased variance, starting from
        zeros; test mode needs both.
        convention : 'cs231n' (default), or 'pytorch': momentum, 0.1 by default, is the weight of the *new*, the
        variance that is averaged is unbiased, and the running variance starts from 1.
        momentum : None averages all batches so far alike.
        num_batches_tracked : their number, stored where momentum is None, the convention PyTorch's, or it is given.
        average : an `ExponentialMovingAverage` that keeps the running statistics, instead of a momentum.
        skip_nonfinite : True keeps a batch with a NaN or Inf in any channel out of the running statistics.
        Any other key is an error.
    axis : the channel axis; -1 for channels-last.
    out : array to write to, of x's shape and result dtype. May be x itself in test mode.
    backend : the name of a backend; None takes the one chosen by `use_backend` or the first available.

    Returns
    -------
    out : array of x's shape, dtype and memory layout
    cache : for `batchnorm_backward`; refers to x, copies nothing of its size.

    Raises ValueError or TypeError, naming the argument, before anything is written.
    """
    table = kernels(backend)
    sizes = _layout.plain_channels(x, gamma, beta, axis) if type(axis) is int else None
    if sizes is not None and (out is None or _layout.plain_out(out, x, gamma, beta, bn_param)):
        outer, channels, inner = sizes
        axes = (axis % x.ndim,)
        options = _arguments.batchnorm_options(bn_param, x, channels)
        dtype, source, scale, shift = x.dtype, x, gamma, beta
        out = work = empty_like(x) if out is None else out
        in_place = False
    elif _chunks.is_chunks(x):
        return _chunks.forward(_PIECES, x, gamma, beta, bn_param, axis, out, backend)
    else:
        x, axes, channels = _arguments.batchnorm_x(x, axis)
        table = kernels_for(x, table, backend)
        options = _arguments.batchnorm_options(bn_param, x, channels)
        dtype = _layout.storage_dtype("x", x)
        accumulation = _layout.accumulation_dtype(dtype)
        gamma, scale = _layout.parameter("gamma", gamma, x, axes, accumulation)
        beta, shift = _layout.parameter("beta", beta, x, axes, accumulation)
        if out is not None:
            running = {"running_mean": options.running_mean, "running_var": options.running_var}
            others = {"x": x, "gamma": gamma, "beta": beta, **running}
            out = _layout.checked_out(out, x, dtype, others, may_be=x if options.frozen else None)
        if x.size == 0:
            result = _arrays.empty_like(x, dtype) if out is None else out
            mean = var = _arrays.zeros(channels, x)
            if options.frozen:
                mean, var = _arguments.constants(options)
            cache = Cache("batchnorm", x, gamma, beta, mean, var, options.eps, axes, options.frozen)
            return _arguments.delivered(result, result, cache)
        in_place = out is not None and _layout.same_elements(out, x)
        view, (source,), work, out = _layout.buffers((x,), dtype, dtype, out, _layout.channel_view, axes)
        outer, _, inner = view.sizes

    if options.frozen:
        mean, var = _arguments.constants(options)
        table.channel_apply(source, outer, channels, inner, mean, var, options.eps, scale, shift, work)
    else:
        mean, var = _arrays.pair(channels, source)
        table.channel_forward(source, outer, channels, inner, scale, shift, options.eps, work, mean, var)
        if bn_param is not None:
            _arguments.store_running(bn_param, options, mean, var, dtype, outer * inner)
    kept = None if in_place else x
    cache = Cache("batchnorm", kept, gamma, beta, mean, var, options.eps, axes, options.frozen)
    return _arguments.delivered(work, out, cache)


@overload
def batchnorm_backward(
    dout: Any, cache: ChunksCache, *, out: Sequence[Array] | None = None, backend: str | None = None
) -> tuple[list[Array], Array | None, Array | None]: ...
@overload
def batchnorm_backward(
    dout: Any, cache: Cache, *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, Array | None, Array | None]: ...
def batchnorm_backward(
    dout: Any, cache: Cache | ChunksCache, *, out: Any = None, backend: str | None = None
) -> tuple[Any, Array | None, Array | None]:
    """Gradients of `batchnorm_forward`: dx = gamma*rstd*(dout - dbeta/n - xhat*dgamma/n).

    Parameters
    ----------
    dout : array of x's shape, any real dtype and strides; where x was a list of chunks, a list of such arrays
    cache : from `batchnorm_forward`, of any backend. One of test mode treats the statistics as constants.
    out : array to write dx to, of x's shape and result dtype.
    backend : as in `batchnorm_forward`.

    Returns
    -------
    dx : array of x's shape, dtype and memory layout
    dgamma, dbeta : sum(dout * xhat) and sum(dout), in the shape and dtype of gamma and beta; None where
        gamma or beta was None.

    Raises TypeError for what is not a cache, ValueError for another op's cache or a dout of another shape.
    """
    if type(cache) is ChunksCache:
        return _chunks.backward(_PIECES, dout, cache, out, backend)
    table = kernels(backend)
    cache = _arguments.checked_cache(cache, "batchnorm")
    x = _arguments.cached_x(cache)
    gamma, beta, mean, var, eps = cache.gamma, cache.beta, cache.mean, cache.var, cache.eps
    sizes = _layout.plain_channels_backward(dout, x, gamma, beta, cache.axes[0])
    if sizes is not None and (out is None or _layout.plain_out(out, x, dout, gamma)):
        outer, channels, inner = sizes
        grad, source, scale = dout, x, gamma
        out = work = empty_like(x) if out is None else out
    else:
        x = _layout.as_array("x", x)
        table = kernels_for(x, table, backend)
        mean, var = _layout.beside("mean", mean, x), _layout.beside("var", var, x)
        dout = _arguments.checked_dout(dout, x)
        x_dtype = _layout.storage_dtype("x", x)
        dtype = _layout.common_storage(x_dtype, _layout.storage_dtype("dout", dout))
        gamma, scale = _layout.parameter("gamma", gamma, x, cache.axes, _layout.accumulation_dtype(dtype))
        if out is not None:
            out = _layout.checked_out(out, x, x_dtype, {"dout": dout, "x": x, "gamma": gamma})
        if x.size == 0:
            zeros = _arrays.zeros(mean.size, x)
            dx = _arrays.handed(_arrays.empty_like(x, x_dtype) if out is None else out)
            return dx, *_layout.gradients(zeros, zeros, gamma, beta)
        view, (grad, source), work, out = _layout.buffers(
            (dout, x), dtype, x_dtype, out, _layout.channel_view, cache.axes
        )
        outer, channels, inner = view.sizes

    sum_dout, sum_dout_xhat = _arrays.pair(channels, source)
    if cache.frozen:
        table.channel_backward_reduce(grad, source, outer, channels, inner, mean, var, eps, sum_dout, sum_dout_xhat)
        table.channel_apply(grad, outer, channels, inner, _arrays.zeros(channels, source), var, eps, scale, None, work)
    else:
        table.channel_backward(
            grad, source, outer, channels, inner, mean, var, eps, scale, work, sum_dout, sum_dout_xhat
        )
    dx = _layout.deliver(work, out)
    return dx, *_layout.gradients(sum_dout_xhat, sum_dout, gamma, beta)


def batchnorm_backward_reduce(
    dout: Any, x: Any, mean: Any, var: Any, eps: float = 1e-5, *, axis: int = 1, backend: str | None = None
) -> tuple[Array, Array]:
    """First half of the backward: (sum(dout), sum(dout * xhat)) per channel, as float64 of (channels,).

    They are dbeta and dgamma; summed over workers (with the merged mean and var) they are those of the
    whole batch. x, axis, backend as in `batchnorm_forward`; mean, var one element per channel.
    """
    x, axes, channels = _arguments.batchnorm_x(x, axis)
    table = kernels_for(x, kernels(backend), backend)
    dout = _arguments.checked_dout(dout, x)
    dtype = _layout.common_storage(_layout.storage_dtype("x", x), _layout.storage_dtype("dout", dout))
    mean = _arguments.per_channel("mean", mean, x, channels)
    var = _arguments.per_channel("var", var, x, channels)
    eps = _arguments.checked_eps(eps)
    sum_dout, sum_dout_xhat = _arrays.zeros(channels, x), _arrays.zeros(channels, x)
    if x.size:
        view, (grad, source) = _layout.readable((dout, x), dtype, _layout.channel_view, axes)
        outer, _, inner = view.sizes
        table.channel_backward_reduce(grad, source, outer, channels, inner, mean, var, eps, sum_dout, sum_dout_xhat)
    return _arrays.handed(sum_dout), _arrays.handed(sum_dout_xhat)


def batchnorm_backward_apply(
    dout: Any, x: Any, mean: Any, var: Any, gamma: Any, sum_dout: Any, sum_dout_xhat: Any, count: float,
    eps: float = 1e-5, *, axis: int = 1, out: Array | None = None, backend: str | None = None,
) -> Array:  # fmt: skip
    """Second half of the backward: dx = gamma*rstd*(dout - sum_dout/count - xhat*sum_dout_xhat/count).

    count is the number of values per channel that the sums ran over, all workers together. The rest as in
    `batchnorm_backward_reduce` and `batchnorm_forward`.
    """
    x, axes, channels = _arguments.batchnorm_x(x, axis)
    table = kernels_for(x, kernels(backend), backend)
    dout = _arguments.checked_dout(dout, x)
    x_dtype = _layout.storage_dtype("x", x)
    dtype = _layout.common_storage(x_dtype, _layout.storage_dtype("dout", dout))
    mean = _arguments.per_channel("mean", mean, x, channels)
    var = _arguments.per_channel("var", var, x, channels)
    sum_dout = _arguments.per_channel("sum_dout", sum_dout, x, channels)
    sum_dout_xhat = _arguments.per_channel("sum_dout_xhat", sum_dout_xhat, x, channels)
    count = _arguments.checked_count(count)
    eps = _arguments.checked_eps(eps)
    gamma, scale = _layout.parameter("gamma", gamma, x, axes, _layout.accumulation_dtype(dtype))
    if out is not None:
        out = _layout.checked_out(out, x, x_dtype, {"dout": dout, "x": x, "gamma": gamma})
    if x.size == 0:
        return _arrays.handed(_arrays.empty_like(x, x_dtype) if out is None else out)
    plan = _layout.buffers((dout, x), dtype, x_dtype, out, _layout.channel_view, axes)
    grad, source = plan.inputs
    outer, _, inner = plan.view.sizes
    table.channel_backward_apply(
        grad, source, outer, channels, inner, mean, var, eps, scale, sum_dout, sum_dout_xhat, count, plan.work
    )
    return _layout.deliver(plan.work, plan.out)


_PIECES = _chunks.Pieces(batchnorm_forward, batchnorm_backward, batchnorm_backward_reduce, batchnorm_backward_apply)


@overload
def spatial_batchnorm_forward(
    x: list[Array] | tuple[Array, ...], gamma: Any, beta: Any, bn_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Sequence[Array] | None = None, backend: str | None = None,
) -> tuple[list[Array], ChunksCache]: ...  # fmt: skip
@overload
def spatial_batchnorm_forward(
    x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Array | None = None, backend: str | None = None,
) -> tuple[Array, Cache]: ...  # fmt: skip
def spatial_batchnorm_forward(
    x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Any = None, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """`batchnorm_forward` for images, CS231n's name: x of (N, C, H, W), or (N, H, W, C) with axis=-1, or their chunks.

    Raises ValueError where x, or the first of its chunks, does not have 4 dimensions.
    """
    name, images = ("x[0]", x[0]) if _chunks.is_chunks(x) else ("x", x)
    shape = _layout.as_array(name, images).shape
    if len(shape) != 4:
        raise ValueError(f"{name}: expected 4 dimensions (N, C, H, W), got shape {shape}")
    return batchnorm_forward(x, gamma, beta, bn_param, axis=axis, out=out, backend=backend)


@overload
def spatial_batchnorm_backward(
    dout: Any, cache: ChunksCache, *, out: Sequence[Array] | None = None, backend: str | None = None
) -> tuple[list[Array], Array | None, Array | None]: ...
@overload
def spatial_batchnorm_backward(
    dout: Any, cache: Cache, *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, Array | None, Array | None]: ...
def spatial_batchnorm_backward(
    dout: Any, cache: Cache | ChunksCache, *, out: Any = None, backend: str | None = None
) -> tuple[Any, Array | None, Array | None]:
    """`batchnorm_backward` under CS231n's name for images."""
    return batchnorm_backward(dout, cache, out=out, backend=backend)
