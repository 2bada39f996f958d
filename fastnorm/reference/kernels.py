"""The kernel contract in NumPy, float64 inside: the backend 'numpy', and the truth the others are held to.

Every function walks over blocks of about a megabyte, so that no float64 copy of a whole array exists.
Formulas are those of `KernelTable`, written on blocks of (outer, channels, inner); a row is a channel of
(1, rows, cols).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastnorm.backends import Array, flat

BLOCK = 1 << 17
"""Elements a block: its float64 copy is 1 MB."""
RUN = 512
"""Elements side by side in memory that a block takes at least."""


def _blocks(outer: int, channels: int, inner: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices that cut (outer, channels, inner) into blocks of at most BLOCK elements.

    The order of merging, given by the sizes alone. Rows of a block are at least RUN elements of memory where
    the array has that many: shorter ones cost a page and a line each, 3 to 7 times the time of channels-last.
    """
    inner_step = min(inner, BLOCK)
    run = min(channels, max(1, RUN // inner_step))
    outer_step = min(outer, max(1, BLOCK // (inner_step * run)))
    channel_step = min(channels, max(1, BLOCK // (inner_step * outer_step)))
    for c in range(0, channels, channel_step):
        for o in range(0, outer, outer_step):
            for i in range(0, inner, inner_step):
                yield slice(o, o + outer_step), slice(c, c + channel_step), slice(i, i + inner_step)


def _rstd(var: Array, eps: float) -> Array:
    """1/sqrt(var + eps), and 0 where var + eps is 0: a constant then gives beta."""
    total = var + eps
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total == 0.0, 0.0, 1.0 / np.sqrt(total))


def _column(values: Array | None, channels: slice, absent: float) -> Any:
    """Per-channel values of a block, to broadcast along its outer and inner axes."""
    return absent if values is None else values[channels].astype(np.float64)[None, :, None]


def channel_moments(x: Array, outer: int, channels: int, inner: int, mean: Array, var: Array) -> None:
    x = flat(x).reshape(outer, channels, inner)
    count = np.zeros(channels)
    mean[:] = 0.0
    var[:] = 0.0  # holds the sum of centred squares until the end
    with np.errstate(invalid="ignore", over="ignore"):
        for o, c, i in _blocks(outer, channels, inner):
            block = x[o, c, i].astype(np.float64)
            n = block.shape[0] * block.shape[2]
            pivot = block[:1, :, :1].copy()  # makes the mean of a constant exact
            block -= pivot
            block_mean = block.sum(axis=(0, 2), keepdims=True) / n
            block -= block_mean
            squares = (block * block).sum(axis=(0, 2))
            delta = (pivot + block_mean).reshape(-1) - mean[c]  # Chan's merge
            total = count[c] + n
            var[c] += squares + np.where(count[c] > 0, delta * delta * (count[c] * n / total), 0.0)
            mean[c] += delta * (n / total)
            count[c] = total
    var /= count


def channel_weighted_moments(
    x: Array, outer: int, channels: int, inner: int, weights: Array, each: bool,
    count: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    x, weights = flat(x).reshape(outer, channels, inner), weights.reshape(outer, -1, inner)
    count[:], mean[:], var[:] = 0.0, 0.0, 0.0  # var holds the sum of centred squares until the end
    with np.errstate(invalid="ignore", over="ignore"):
        for o, c, i in _blocks(outer, channels, inner):
            weight = np.broadcast_to(weights[o, c if each else slice(None), i], x[o, c, i].shape).astype(np.float64)
            weight[~(weight >= 0)] = np.nan
            block, n = x[o, c, i].astype(np.float64), weight.sum(axis=(0, 2))
            block[weight == 0] = 0.0
            block_mean = np.zeros((1, n.size, 1))
            for _ in range(2):  # again around the first mean, whose rounding shows where it is far from 0
                block_mean += _share((weight * (block - block_mean)).sum(axis=(0, 2)), n)[None, :, None]
            squares = (weight * (block - block_mean) ** 2).sum(axis=(0, 2))
            delta = block_mean.reshape(-1) - mean[c]  # Chan's merge
            share = _share(n, count[c] + n)
            between = count[c] * share
            var[c] += squares + np.where(between > 0, delta * delta * between, 0.0)
            mean[c] += delta * share
            count[c] += n
        var[:] = _share(var, count)


def _share(part: Array, whole: Array) -> Array:
    """part/whole, and 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def channel_apply(
    x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None, beta: Array | None, y: Array,
) -> None:  # fmt: skip
    x, y = (flat(a).reshape(outer, channels, inner) for a in (x, y))
    rstd = _rstd(var, eps)
    with np.errstate(invalid="ignore", over="ignore"):
        for o, c, i in _blocks(outer, channels, inner):
            block = x[o, c, i].astype(np.float64)
            block -= _column(mean, c, 0.0)
            block *= _column(rstd, c, 1.0)
            block *= _column(gamma, c, 1.0)
            block += _column(beta, c, 0.0)
            y[o, c, i] = block


def channel_forward(
    x: Array, outer: int, channels: int, inner: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    channel_moments(x, outer, channels, inner, mean, var)
    channel_apply(x, outer, channels, inner, mean, var, eps, gamma, beta, y)


def channel_backward_reduce(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    dy, x = (flat(a).reshape(outer, channels, inner) for a in (dy, x))
    rstd = _rstd(var, eps)
    sum_dy[:] = 0.0
    sum_dy_xhat[:] = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for o, c, i in _blocks(outer, channels, inner):
            grad = dy[o, c, i].astype(np.float64)
            xhat = (x[o, c, i].astype(np.float64) - _column(mean, c, 0.0)) * _column(rstd, c, 1.0)
            sum_dy[c] += grad.sum(axis=(0, 2))
            sum_dy_xhat[c] += (grad * xhat).sum(axis=(0, 2))


def channel_backward_apply(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
) -> None:  # fmt: skip
    dy, x, dx = (flat(a).reshape(outer, channels, inner) for a in (dy, x, dx))
    rstd = _rstd(var, eps)
    with np.errstate(invalid="ignore", over="ignore"):
        for o, c, i in _blocks(outer, channels, inner):
            grad = dy[o, c, i].astype(np.float64)
            xhat = (x[o, c, i].astype(np.float64) - _column(mean, c, 0.0)) * _column(rstd, c, 1.0)
            grad -= _column(sum_dy, c, 0.0) / count
            grad -= xhat * (_column(sum_dy_xhat, c, 0.0) / count)
            dx[o, c, i] = grad * _column(rstd, c, 1.0) * _column(gamma, c, 1.0)


def channel_backward(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    shape = outer, channels, inner
    channel_backward_reduce(dy, x, *shape, mean, var, eps, sum_dy, sum_dy_xhat)
    channel_backward_apply(dy, x, *shape, mean, var, eps, gamma, sum_dy, sum_dy_xhat, float(outer * inner), dx)


def _samples(samples: int, *arrays: Array) -> Iterator[tuple[int, list[Array]]]:
    """The number of each sample and its part of each array."""
    parts = [flat(array).reshape(samples, -1) for array in arrays]
    for n in range(samples):
        yield n, [part[n] for part in parts]


def group_moments(
    x: Array, samples: int, outer: int, channels: int, inner: int, groups: int, mean: Array, var: Array
) -> None:
    centre, spread = np.empty(channels), np.empty(channels)
    means, variances = (a.reshape(samples, groups) for a in (mean, var))
    with np.errstate(invalid="ignore", over="ignore"):
        for n, (source,) in _samples(samples, x):
            channel_moments(source, outer, channels, inner, centre, spread)
            by_group = centre.reshape(groups, -1)
            means[n] = by_group[:, 0] + (by_group - by_group[:, :1]).mean(axis=1)  # exact for equal ones
            between = by_group - means[n, :, None]
            variances[n] = (spread.reshape(groups, -1) + between * between).mean(axis=1)


def group_forward(
    x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
) -> None:  # fmt: skip
    group_moments(x, samples, outer, channels, inner, groups, mean, var)
    centre, spread = (np.repeat(a.reshape(samples, groups), channels // groups, axis=1) for a in (mean, var))
    for n, (source, target) in _samples(samples, x, y):
        channel_apply(source, outer, channels, inner, centre[n], spread[n], eps, gamma, beta, target)


def group_backward(
    dy: Array, x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    mean: Array, var: Array, eps: float, gamma: Array | None,
    dx: Array, sum_dy: Array, sum_dy_xhat: Array,
) -> None:  # fmt: skip
    width, shape = channels // groups, (outer, channels, inner)
    scale = np.ones(channels) if gamma is None else gamma.astype(np.float64)
    by_channel = np.empty((2, channels))
    sum_dy[:] = 0.0
    sum_dy_xhat[:] = 0.0
    means, variances = (a.reshape(samples, groups) for a in (mean, var))
    with np.errstate(invalid="ignore", over="ignore"):
        for n, (dy_n, x_n, dx_n) in _samples(samples, dy, x, dx):
            centre, spread = np.repeat(means[n], width), np.repeat(variances[n], width)
            channel_backward_reduce(dy_n, x_n, *shape, centre, spread, eps, *by_channel)
            sum_dy += by_channel[0]
            sum_dy_xhat += by_channel[1]
            sums = (scale * by_channel).reshape(2, groups, width).sum(axis=2)
            mean_g, mean_g_xhat = np.repeat(sums / (width * outer * inner), width, axis=1)
            rstd = _rstd(spread, eps)
            grads, values, results = (a.reshape(shape) for a in (dy_n, x_n, dx_n))
            for o, c, i in _blocks(*shape):
                xhat = (values[o, c, i].astype(np.float64) - _column(centre, c, 0.0)) * _column(rstd, c, 1.0)
                block = grads[o, c, i].astype(np.float64) * _column(scale, c, 1.0)
                block -= _column(mean_g, c, 0.0)
                block -= xhat * _column(mean_g_xhat, c, 0.0)
                results[o, c, i] = block * _column(rstd, c, 1.0)


def _row_squares(x: Array, rows: int, cols: int, squares: Array) -> None:
    """The mean of squares of each row."""
    x = flat(x).reshape(rows, cols)
    squares[:] = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for _, r, k in _blocks(1, rows, cols):
            block = x[r, k].astype(np.float64)
            squares[r] += (block * block).sum(axis=1) / cols


def row_forward(
    x: Array, rows: int, cols: int,
    gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array | None, var: Array,
) -> None:  # fmt: skip
    if mean is None:
        _row_squares(x, rows, cols, var)
        mean = np.zeros(rows)
    else:
        channel_moments(x, 1, rows, cols, mean, var)
    x, y = (flat(a).reshape(rows, cols) for a in (x, y))
    rstd = _rstd(var, eps)
    with np.errstate(invalid="ignore", over="ignore"):
        for _, r, k in _blocks(1, rows, cols):
            block = (x[r, k].astype(np.float64) - mean[r, None]) * rstd[r, None]
            if gamma is not None:
                block *= gamma[k]
            if beta is not None:
                block += beta[k]
            y[r, k] = block


def row_backward(
    dy: Array, x: Array, rows: int, cols: int,
    mean: Array | None, var: Array, eps: float, gamma: Array | None,
    dx: Array, dgamma: Array | None, dbeta: Array | None,
) -> None:  # fmt: skip
    dy, x, dx = (flat(a).reshape(rows, cols) for a in (dy, x, dx))
    rstd = _rstd(var, eps)
    centred = mean is not None
    mean = np.zeros(rows) if mean is None else mean
    mean_g, mean_g_xhat = np.zeros(rows), np.zeros(rows)
    for total in (dgamma, dbeta):
        if total is not None:
            total[:] = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for _, r, k in _blocks(1, rows, cols):
            grad = dy[r, k].astype(np.float64)
            xhat = (x[r, k].astype(np.float64) - mean[r, None]) * rstd[r, None]
            if dgamma is not None and dbeta is not None:
                dgamma[k] += (grad * xhat).sum(axis=0)
                dbeta[k] += grad.sum(axis=0)
            if gamma is not None:
                grad *= gamma[k]
            if centred:
                mean_g[r] += grad.sum(axis=1) / cols
            mean_g_xhat[r] += (grad * xhat).sum(axis=1) / cols
        for _, r, k in _blocks(1, rows, cols):
            grad = dy[r, k].astype(np.float64)
            xhat = (x[r, k].astype(np.float64) - mean[r, None]) * rstd[r, None]
            if gamma is not None:
                grad *= gamma[k]
            dx[r, k] = (grad - mean_g[r, None] - xhat * mean_g_xhat[r, None]) * rstd[r, None]


PHILOX_ROUNDS = 7


def philox(
    counter: tuple[Array, Array, Array, Array], key: tuple[int, int], rounds: int = PHILOX_ROUNDS
) -> tuple[Array, Array, Array, Array]:
    """Philox-4x32 (Salmon, Moraes, Dror and Shaw, 2011) of counters and a key; 32-bit words in uint64 arrays."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        even, odd = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd & low, (even >> 32) ^ c3 ^ k1, even & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def numbers(first: int, n: int, seed: int, stream: int) -> Array:
    """The random numbers of 16 bits of elements first, first + 1, ..., first + n - 1: eight of a counter."""
    index = np.arange(first // 8, (first + n - 1) // 8 + 1, dtype=np.uint64)
    counter = index & 0xFFFFFFFF, index >> 32, np.full_like(index, stream), np.zeros_like(index)
    words = np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)), axis=1)
    return np.stack([words & 0xFFFF, words >> 16], axis=2).reshape(-1)[first % 8 :][:n]


def words(first: int, n: int, seed: int) -> Array:
    """Their random words of 32 bits."""
    return numbers(first, n, seed, 0) << 16 | numbers(first, n, seed, 1)


def dropout(x: Array, n: int, first: int, seed: int, threshold: int, scale: float, y: Array) -> None:
    x, y = flat(x), flat(y)
    dtype: Any = np.float64 if x.dtype == np.float64 else np.float32  # not wider: the bits are the same everywhere
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, n, BLOCK):
            block = x[start : start + BLOCK].astype(dtype) * dtype(scale)
            kept = words(first + start, block.size, seed) < threshold
            y[start : start + BLOCK] = np.where(kept, block, dtype(0))


def set_num_threads(count: int) -> None:
    """NumPy's loops run on one thread whatever the count."""
