"""Batch normalization of one batch that lies in pieces: exact statistics of the whole, forward and backward.

The statistics of the chunks are merged (Chan's rule, in the order of the list), then each chunk is normalized with
those of the whole; backward the two sums are added up before each chunk gets its dx. So a chunk is read twice each
way, as several workers would read theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from fastnorm import _layout
from fastnorm._layout import Array
from fastnorm.ops import _arguments
from fastnorm.ops._arguments import Cache
from fastnorm.ops.statistics import Moments, moments, normalize


class ChunksCache(NamedTuple):
    """What the backward of a batch in pieces needs of its forward. Opaque to callers."""

    chunks: tuple[Cache, ...]
    """One for each chunk, all with the statistics of the whole, which count as constants in them."""
    values: int
    """Values per channel in all chunks together."""
    frozen: bool
    """Whether mean and var are constants of the whole, too (test mode)."""


class Pieces(NamedTuple):
    """The operations on one chunk; those of ops/batchnorm.py, which imports this module."""

    forward: Callable[..., tuple[Array, Cache]]
    backward: Callable[..., tuple[Array, Array | None, Array | None]]
    backward_reduce: Callable[..., tuple[Array, Array]]
    backward_apply: Callable[..., Array]


def is_chunks(x: Any) -> bool:
    """Whether x is a batch in pieces: a list or tuple that begins with an array of two dimensions or more.

    Lists of numbers, of lists and of 1-D arrays are what NumPy makes of them, one array.
    """
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], np.ndarray) and x[0].ndim >= 2


def forward(
    pieces: Pieces, x: Sequence[Any], gamma: Any, beta: Any, bn_param: dict[str, Any] | None, axis: int, out: Any,
    backend: str | None,
) -> tuple[list[Array], ChunksCache]:  # fmt: skip
    """`batchnorm_forward` of the chunks x."""
    arrays = _checked_chunks(x, axis)
    first, (channel_axis,), channels = _arguments.batchnorm_x(arrays[0], axis)
    options = _arguments.batchnorm_options(bn_param, first, channels)
    dtype = _layout.storage_dtype("x[0]", first)
    accumulation = _layout.accumulation_dtype(dtype)
    gamma, _ = _layout.parameter("gamma", gamma, first, (channel_axis,), accumulation)
    beta, _ = _layout.parameter("beta", beta, first, (channel_axis,), accumulation)
    outs: Sequence[Array | None] = [None] * len(arrays)
    if out is not None:
        others = {
            "gamma": gamma,
            "beta": beta,
            "running_mean": options.running_mean,
            "running_var": options.running_var,
        }
        outs = _checked_outs(out, arrays, dtype, others, frozen=options.frozen)
    count = sum(array.size for array in arrays) // channels if channels else 0
    if options.frozen:
        results = [
            pieces.forward(array, gamma, beta, bn_param, axis=axis, out=into, backend=backend)
            for array, into in zip(arrays, outs, strict=True)
        ]
        return [result for result, _ in results], ChunksCache(tuple(cache for _, cache in results), count, True)

    reduced = tuple(number for number in range(first.ndim) if number != channel_axis)
    whole = reduce(Moments.merge, (moments(array, reduced, backend=backend) for array in arrays))
    among = [channels if number == channel_axis else 1 for number in range(first.ndim)]
    scale, shift = (value if value is None else value.reshape(among) for value in (gamma, beta))
    mean, var = whole.mean.reshape(among), whole.var.reshape(among)
    normalized = [
        normalize(array, mean, var, scale, shift, options.eps, out=into, backend=backend)
        for array, into in zip(arrays, outs, strict=True)
    ]
    if bn_param is not None and count:
        _arguments.store_running(bn_param, options, whole.mean, whole.var, dtype, count)
    caches = tuple(
        Cache("batchnorm", array, gamma, beta, whole.mean, whole.var, options.eps, (channel_axis,), True)
        for array in arrays
    )
    return normalized, ChunksCache(caches, count, False)


def backward(
    pieces: Pieces, dout: Any, cache: ChunksCache, out: Any, backend: str | None
) -> tuple[list[Array], Array | None, Array | None]:
    """`batchnorm_backward` of the chunks dout."""
    douts = _checked_douts(dout, cache)
    first = cache.chunks[0]
    gamma, beta, eps, axis = first.gamma, first.beta, first.eps, first.axes[0]
    outs: Sequence[Array | None] = [None] * len(douts)
    arrays = [_arguments.cached_x(chunk) for chunk in cache.chunks]
    if out is not None:
        others = {"gamma": gamma} | {f"dout[{number}]": array for number, array in enumerate(douts)}
        outs = _checked_outs(out, arrays, _layout.storage_dtype("x", arrays[0]), others, frozen=False)
    sums = [
        pieces.backward_reduce(grad, array, first.mean, first.var, eps, axis=axis, backend=backend)
        for grad, array in zip(douts, arrays, strict=True)
    ]
    sum_dout, sum_dout_xhat = (sum(parts[1:], start=parts[0]) for parts in zip(*sums, strict=True))
    if cache.frozen or not cache.values:
        dx = [
            pieces.backward(grad, chunk, out=into, backend=backend)[0]
            for grad, chunk, into in zip(douts, cache.chunks, outs, strict=True)
        ]
    else:
        dx = [
            pieces.backward_apply(
                grad, array, first.mean, first.var, gamma, sum_dout, sum_dout_xhat, cache.values, eps,
                axis=axis, out=into, backend=backend,
            )
            for grad, array, into in zip(douts, arrays, outs, strict=True)
        ]  # fmt: skip
    return dx, *_layout.gradients(sum_dout_xhat, sum_dout, gamma, beta)


def _checked_chunks(x: Sequence[Any], axis: int) -> list[Array]:
    """The chunks as arrays that agree in dtype and in all but the axis of the batch: 0, or 1 with channels along 0."""
    arrays = [_layout.host_array(f"x[{number}]", chunk) for number, chunk in enumerate(x)]
    first, (channel_axis,), _ = _arguments.batchnorm_x(arrays[0], axis)
    batch_axis = 1 if channel_axis == 0 else 0

    def rest(array: Array) -> tuple[int, ...]:
        return tuple(n for number, n in enumerate(array.shape) if number != batch_axis)

    for number, array in enumerate(arrays):
        if array.ndim != first.ndim or rest(array) != rest(first):
            expected = f"the shape of x[0], {first.shape}, in all but axis {batch_axis}"
            raise ValueError(f"x[{number}]: expected {expected}, got {array.shape}")
        if array.dtype != first.dtype:
            raise ValueError(f"x[{number}]: expected the dtype of x[0], {first.dtype}, got {array.dtype}")
    return arrays


def _checked_list(name: str, value: Any, length: int) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of {length} arrays, one for each chunk, got {type(value).__name__}")
    if len(value) != length:
        raise ValueError(f"{name}: expected {length} arrays, one for each chunk, got {len(value)}")
    return value


def _checked_outs(
    out: Any, arrays: list[Array], dtype: np.dtype[Any], others: dict[str, Any], *, frozen: bool
) -> list[Array]:
    """The caller's arrays, each apart from all inputs and from the others; in test mode each may be its own chunk."""
    given = _checked_list("out", out, len(arrays))
    chunks = {f"x[{number}]": array for number, array in enumerate(arrays)}
    checked: list[Array] = []
    for number, (each, array) in enumerate(zip(given, arrays, strict=True)):
        before = {f"out[{earlier}]": written for earlier, written in enumerate(checked)}
        try:
            may_be = array if frozen else None
            checked.append(_layout.checked_out(each, array, dtype, {**chunks, **others, **before}, may_be=may_be))
        except (TypeError, ValueError) as error:
            raise type(error)(f"out[{number}]{str(error).removeprefix('out')}") from None
    return checked


def _checked_douts(dout: Any, cache: ChunksCache) -> list[Array]:
    given = _checked_list("dout", dout, len(cache.chunks))
    arrays = []
    for number, (each, chunk) in enumerate(zip(given, cache.chunks, strict=True)):
        array = _layout.host_array(f"dout[{number}]", each)
        _layout.storage_dtype(f"dout[{number}]", array)
        shape = _arguments.cached_x(chunk).shape
        if array.shape != shape:
            raise ValueError(f"dout[{number}]: expected the shape of x[{number}], {shape}, got {array.shape}")
        arrays.append(array)
    return arrays
