"""Normalization as a graph of nine steps, forward and backward, in plain NumPy: to read and to compare with.

Each step is one elementary operation and its backward is one application of the chain rule. The graph is the
same for every normalization; only the axes differ, those that statistics run over (`stats`) and those that
gamma and beta are indexed by (`params`):

    batchnorm    stats = all axes but the channels     params = the channel axis
    layernorm    stats = params = the normalized axes
    groupnorm    the channel axis split in two, (groups, channels of a group);
                 stats = all axes but the samples and the groups     params = those two

RMSNorm's graph begins at step 3, with x in the place of x_minus_mu, and ends at step 8.

Everything is computed in x's accumulation dtype, as a NumPy user would write it, and every intermediate is
kept. So it is slow, takes memory, and its error grows with |mean| / spread; the fused functions do neither.
It is one of the public operations, not a backend: it validates, and it has a cache of its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastnorm import _layout
from fastnorm._layout import Array, Axes
from fastnorm.ops import _arguments, _chunks, _groups


class StagedCache(NamedTuple):
    """The intermediates of the nine steps. Only the staged backward reads it."""

    op: str
    x_minus_mu: Array
    x_minus_mu_square: Array
    sqrt_var_invert: Array
    x_norm: Array
    y_unshift: Array
    shape: tuple[int, ...]
    """x's own; with groups the intermediates have an axis more."""
    scale: Array | None
    """gamma, shaped to broadcast against the intermediates."""
    gamma: Array | None
    """As the caller gave it; beta likewise."""
    beta: Array | None
    stats: Axes
    params: Axes
    storage: np.dtype[Any]
    frozen: bool
    """Whether mu and var are constants (test mode with running statistics)."""
    centred: bool
    """Whether there are steps 1 and 2."""


def _kept_shape(shape: tuple[int, ...], kept: Axes) -> tuple[int, ...]:
    """`shape` with length one on every axis but the kept ones."""
    return tuple(n if axis in kept else 1 for axis, n in enumerate(shape))


def _others(ndim: int, axes: Axes) -> Axes:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def _inverse(sqrt_var: Array) -> Array:
    """1/sqrt_var, and 0 for 0: with eps = 0 a constant then gives beta."""
    return np.divide(1.0, sqrt_var, out=np.zeros_like(sqrt_var), where=sqrt_var != 0.0)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def _forward(
    op: str, x: Array, gamma: Any, beta: Any, eps: float, stats: Axes, params: Axes,
    constants: tuple[Array, Array] | None = None, groups: int | None = None, centred: bool = True,
) -> tuple[Array, StagedCache, Array | None, Array]:  # fmt: skip
    """(y, cache, mu, var); mu and var are `constants` where given, else those of x.

    With groups, params is the channel axis and stats is not looked at.
    """
    storage = _layout.storage_dtype("x", x)
    dtype = _layout.accumulation_dtype(storage)
    gamma, scale = _layout.parameter("gamma", gamma, x, params, dtype)
    beta, shift = _layout.parameter("beta", beta, x, params, dtype)
    own = shape = x.shape
    if groups is not None:
        shape, stats, params = _groups.split(own, params[0], groups)
    scale, shift = (v if v is None else v.reshape(_kept_shape(shape, params)) for v in (scale, shift))
    x = x.astype(dtype, copy=False).reshape(shape)
    n = dtype.type(max(1, math.prod(shape[axis] for axis in stats)))  # sums over nothing are 0, not 0/0

    mu = None
    x_minus_mu = x
    if centred:
        # 1: the mean
        mu = np.sum(x, axis=stats, keepdims=True) / n if constants is None else constants[0]
        # 2: centre
        x_minus_mu = x - mu
    # 3: square
    x_minus_mu_square = x_minus_mu**2
    # 4: the variance
    var = np.sum(x_minus_mu_square, axis=stats, keepdims=True) / n if constants is None else constants[1]
    # 5: the standard deviation
    sqrt_var = np.sqrt(var + dtype.type(eps))
    # 6: invert
    sqrt_var_invert = _inverse(sqrt_var)
    # 7: normalize
    x_norm = x_minus_mu * sqrt_var_invert
    # 8: scale
    y_unshift = x_norm if scale is None else scale * x_norm
    # 9: shift
    y = y_unshift.copy() if shift is None else y_unshift + shift

    cache = StagedCache(
        op, x_minus_mu, x_minus_mu_square, sqrt_var_invert, x_norm, y_unshift, own,
        scale, gamma, beta, stats, params, storage, constants is not None, centred,
    )  # fmt: skip
    return y.astype(storage, copy=False).reshape(own), cache, mu, var


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def _backward(dout: Any, cache: Any, op: str) -> tuple[Array, Array | None, Array | None]:
    if not isinstance(cache, StagedCache):
        raise TypeError(f"cache: expected what {op}_forward_staged returned, got {_arguments.described(cache)}")
    if cache.op != op:
        raise ValueError(f"cache: expected one of {op}_forward_staged, got one of {cache.op}_forward_staged")
    x_minus_mu, sqrt_var_invert, x_norm = cache.x_minus_mu, cache.sqrt_var_invert, cache.x_norm
    stats, shape, dtype = cache.stats, x_norm.shape, x_norm.dtype
    dout = _arguments.checked_dout(dout, x_norm.reshape(cache.shape)).astype(dtype, copy=False).reshape(shape)
    n = dtype.type(max(1, math.prod(shape[axis] for axis in stats)))
    samples = _others(x_norm.ndim, cache.params)  # the axes along which gamma and beta were broadcast

    # 9: y = y_unshift + beta. Broadcasting copied beta along `samples`, so its gradient is the sum over the copies.
    dy_unshift = dout
    dbeta = np.sum(dout, axis=samples)
    # 8: y_unshift = gamma * x_norm
    dx_norm = dy_unshift if cache.scale is None else cache.scale * dy_unshift
    dgamma = np.sum(x_norm * dy_unshift, axis=samples)
    # 7: x_norm = x_minus_mu * sqrt_var_invert
    dx_minus_mu = sqrt_var_invert * dx_norm
    if cache.frozen:  # mu and var are constants: what is left is step 2
        dx = dx_minus_mu
    else:
        dsqrt_var_invert = np.sum(x_minus_mu * dx_norm, axis=stats, keepdims=True)
        # 6: sqrt_var_invert = 1 / sqrt_var
        dsqrt_var = -(sqrt_var_invert**2) * dsqrt_var_invert
        # 5: sqrt_var = sqrt(var + eps)
        dvar = dsqrt_var * sqrt_var_invert / 2
        # 4: var = sum(x_minus_mu_square) / n
        dx_minus_mu_square = np.broadcast_to(dvar / n, shape)
        # 3: x_minus_mu_square = x_minus_mu^2. The second gradient of x_minus_mu adds to the first.
        dx_minus_mu += 2 * x_minus_mu * dx_minus_mu_square
        # 2: x_minus_mu = x - mu
        dx = dx_minus_mu
        if cache.centred:
            dmu = -np.sum(dx_minus_mu, axis=stats, keepdims=True)
            # 1: mu = sum(x) / n. The second gradient of x adds to the first.
            dx = dx + dmu / n

    return (
        dx.astype(cache.storage, copy=False).reshape(cache.shape),
        *_layout.gradients(dgamma.reshape(-1), dbeta.reshape(-1), cache.gamma, cache.beta),
    )


def batchnorm_forward_staged(
    x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any] | None = None, *, axis: int = 1
) -> tuple[Array, StagedCache]:
    """`batchnorm_forward` as a graph of nine steps; the cache is for `batchnorm_backward_staged`.

    Allocates five arrays of x's size, of which the cache keeps four: x_minus_mu, x_minus_mu_square, x_norm,
    y_unshift and the result. For float16 and bfloat16 they are float32, twice as large, and two more come
    with the conversions. Arguments, updates of bn_param and errors as in `batchnorm_forward`, but for chunks, which are
    a TypeError.
    """
    if _chunks.is_chunks(x):
        raise TypeError(f"x: expected one array, got a {type(x).__name__} of chunks; np.concatenate makes one of them")
    x, params, channels = _arguments.batchnorm_x(_layout.host_array("x", x), axis)
    options = _arguments.batchnorm_options(bn_param, x, channels)
    return _with_running("batchnorm", x, gamma, beta, bn_param, options, params)


def _with_running(
    op: str, x: Array, gamma: Any, beta: Any, param: dict[str, Any] | None, options: _arguments.BatchnormOptions,
    params: Axes,
) -> tuple[Array, StagedCache]:  # fmt: skip
    """Statistics of each channel over all samples, or constants in their place."""
    dtype = _layout.accumulation_dtype(_layout.storage_dtype("x", x))
    constants = None
    if options.frozen:
        mean, var = _arguments.constants(options)
        shape = _kept_shape(x.shape, params)
        constants = mean.astype(dtype).reshape(shape), var.astype(dtype).reshape(shape)
    out, cache, mu, var = _forward(op, x, gamma, beta, options.eps, _others(x.ndim, params), params, constants)
    if param is not None and mu is not None and not options.frozen and x.size:
        _arguments.store_running(param, options, mu, var, dtype, x.size // mu.size)
    return out, cache


def batchnorm_backward_staged(dout: Any, cache: StagedCache) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `batchnorm_forward_staged`, step by step backward: (dx, dgamma, dbeta).

    Allocates six more arrays of x's size, up to three of them at a time. Results and errors as in
    `batchnorm_backward`.
    """
    return _backward(dout, cache, "batchnorm")


def layernorm_forward_staged(
    x: Any, gamma: Any, beta: Any, ln_param: dict[str, Any] | None = None, *, axis: int = -1
) -> tuple[Array, StagedCache]:
    """`layernorm_forward` as a graph of nine steps; the cache is for `layernorm_backward_staged`.

    Allocates as much as `batchnorm_forward_staged`. Arguments and errors as in `layernorm_forward`.
    """
    x, axes = _arguments.rows_x(_layout.host_array("x", x), axis)
    out, cache, _, _ = _forward("layernorm", x, gamma, beta, _arguments.eps_alone("ln_param", ln_param), axes, axes)
    return out, cache


def layernorm_backward_staged(dout: Any, cache: StagedCache) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `layernorm_forward_staged`, step by step backward: (dx, dgamma, dbeta).

    Allocates as much as `batchnorm_backward_staged`. Results and errors as in `layernorm_backward`.
    """
    return _backward(dout, cache, "layernorm")


def rmsnorm_forward_staged(
    x: Any, gamma: Any, rms_param: dict[str, Any] | None = None, *, axis: int = -1
) -> tuple[Array, StagedCache]:
    """`rmsnorm_forward` as a graph of six steps; the cache is for `rmsnorm_backward_staged`.

    Allocates four arrays of x's size, of which the cache keeps three, and refers to x in float32 or float64.
    Arguments and errors as in `rmsnorm_forward`.
    """
    x, axes = _arguments.rows_x(_layout.host_array("x", x), axis)
    eps = _arguments.eps_alone("rms_param", rms_param)
    out, cache, _, _ = _forward("rmsnorm", x, gamma, None, eps, axes, axes, centred=False)
    return out, cache


def rmsnorm_backward_staged(dout: Any, cache: StagedCache) -> tuple[Array, Array | None]:
    """Gradients of `rmsnorm_forward_staged`, step by step backward: (dx, dgamma).

    Results and errors as in `rmsnorm_backward`.
    """
    dx, dgamma, _ = _backward(dout, cache, "rmsnorm")
    return dx, dgamma


def groupnorm_forward_staged(
    x: Any, gamma: Any, beta: Any, groups: int, gn_param: dict[str, Any] | None = None, *, axis: int = 1
) -> tuple[Array, StagedCache]:
    """`groupnorm_forward` as a graph of nine steps; the cache is for `groupnorm_backward_staged`.

    Allocates as much as `batchnorm_forward_staged`. Arguments and errors as in `groupnorm_forward`.
    """
    x, params, channels = _arguments.groups_x(_layout.host_array("x", x), axis)
    groups, eps = _arguments.checked_groups(groups, channels), _arguments.eps_alone("gn_param", gn_param)
    out, cache, _, _ = _forward("groupnorm", x, gamma, beta, eps, (), params, groups=groups)
    return out, cache


def groupnorm_backward_staged(dout: Any, cache: StagedCache) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `groupnorm_forward_staged`, step by step backward: (dx, dgamma, dbeta).

    Allocates as much as `batchnorm_backward_staged`. Results and errors as in `groupnorm_backward`.
    """
    return _backward(dout, cache, "groupnorm")


def instancenorm_forward_staged(
    x: Any, gamma: Any, beta: Any, in_param: dict[str, Any] | None = None, *, axis: int = 1
) -> tuple[Array, StagedCache]:
    """`instancenorm_forward` as a graph of nine steps; the cache is for `instancenorm_backward_staged`.

    Allocates as much as `batchnorm_forward_staged`. Arguments, updates of in_param and errors as in
    `instancenorm_forward`.
    """
    x, params, channels = _arguments.groups_x(_layout.host_array("x", x), axis)
    options = _arguments.instancenorm_options(in_param, x, channels)
    if options.frozen:
        return _with_running("instancenorm", x, gamma, beta, in_param, options, params)
    out, cache, mu, var = _forward("instancenorm", x, gamma, beta, options.eps, (), params, groups=channels)
    assert mu is not None
    if in_param is not None and options.running_mean is not None and x.size:
        count = x.size // mu.size
        mu, var = (each.reshape(-1, channels).mean(axis=0) for each in (mu, var))
        _arguments.store_running(in_param, options, mu, var, out.dtype, count)
    return out, cache


def instancenorm_backward_staged(dout: Any, cache: StagedCache) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `instancenorm_forward_staged`, step by step backward: (dx, dgamma, dbeta).

    Allocates as much as `batchnorm_backward_staged`. Results and errors as in `instancenorm_backward`.
    """
    return _backward(dout, cache, "instancenorm")
