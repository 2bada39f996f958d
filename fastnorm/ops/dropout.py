"""Dropout (Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, 2014, https://jmlr.org/papers/v15/srivastava14a.html).

Each element is kept with probability p, by itself, and set to 0 otherwise:

    out[i] = x[i] * scale     where word[i] < threshold, threshold = round(p * 2^32)
             0                elsewhere

    scale = 1/p               'inverted' (the default): the expectation of out is x, and test mode is the identity
            1                 'none': the expectation of out is p*x, and test mode gives p*x

word[i] is a random number of 32 bits that depends on the seed and on i alone, the index of the element in C order,
not on the memory layout, the dtype, the backend or the number of threads:

    word[i] = 2^16 * number(i, 0) + number(i, 1)

    number(i, stream): of the eight numbers of 16 bits that Philox-4x32-7 (Salmon, Moraes, Dror and Shaw, 2011) makes of
    the counter i // 8, the stream and the key `seed`, number i % 8

The lower half decides for one element in 65,536, and is drawn for that alone. The mask needs no memory: backward draws
it again.

Backward, with the seed of forward:

    dx[i] = dout[i] * scale   where word[i] < threshold
            0                 elsewhere

docs/maths.md says more of the numbers and of the rounding of p and 1/p.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastnorm import _arrays, _layout
from fastnorm._device import on_device
from fastnorm._dispatch import kernels, kernels_for
from fastnorm._layout import Array
from fastnorm._memory import empty_like
from fastnorm.backends import KernelTable
from fastnorm.ops import _arguments
from fastnorm.ops._arguments import Draw


class DropoutCache(NamedTuple):
    """What `dropout_backward` needs of a forward: how the mask is drawn, nothing of x's size."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """Of the result, and of dx."""
    draw: Draw


def dropout_forward(
    x: Any, dropout_param: dict[str, Any], *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, DropoutCache]:
    """Keep each element with probability p, set the others to 0: out = x/p where kept, in train mode.

    Parameters
    ----------
    x : array of any shape
        float16, bfloat16, float32 or float64, any strides; integers and bools are promoted to float64. Also one on a
        CUDA device.
    dropout_param : dict
        p : the probability of keeping an element, above 0 and at most 1. (PyTorch's p is that of dropping one.)
        mode : 'train', the default, or 'test', where nothing is dropped.
        seed : whole number from 0 to 2**64 - 1. The mask depends on it, p and the shape alone. Without one, or with
        None, every call draws its own from the system; it is `cache.draw.seed`.
        scale : 'inverted', the default: kept elements are multiplied by 1/p, and test mode returns x as it is;
        'none': they stay as they are, and test mode multiplies by p.
        Any other key is an error.
    out : array to write to, of x's shape and result dtype. It may be x itself; no other overlap.
    backend : the name of a backend; None takes the one chosen by `use_backend` or the first available.

    Returns
    -------
    out : array of x's shape, dtype and memory layout, never x itself unless passed as `out`.
        What is dropped is 0 exactly, also where x has a NaN or an infinity.
    cache : for `dropout_backward`; a few numbers.

    Raises ValueError or TypeError, naming the argument, before anything is written.
    """
    table = kernels(backend)
    draw = _arguments.dropout_draw(dropout_param)
    if _layout.plain(x, None, None, 0) and _takes(out, x):
        out = empty_like(x) if out is None else out
        table.dropout(x, x.size, 0, *draw, out)
        return out, DropoutCache(x.shape, x.dtype, draw)

    x = _layout.as_array("x", x)
    table = kernels_for(x, table, backend)
    dtype = _layout.storage_dtype("x", x)
    if out is not None:
        out = _layout.checked_out(out, x, dtype, {"x": x}, may_be=x)
    return _masked(table, draw, x, dtype, dtype, out), DropoutCache(x.shape, dtype, draw)


def dropout_backward(dout: Any, cache: DropoutCache, *, out: Array | None = None, backend: str | None = None) -> Array:
    """Gradient of `dropout_forward`: dx = dout with the mask and the scale of the forward.

    Parameters
    ----------
    dout : array of x's shape, any real dtype and strides
    cache : from `dropout_forward`, of any backend, in host memory or on a device
    out : array to write dx to, of x's shape and result dtype. It may be dout itself; no other overlap.
    backend : as in `dropout_forward`.

    Returns
    -------
    dx : array of x's shape and dtype, and of dout's memory layout

    Raises TypeError for what is not a cache, ValueError for a dout of another shape.
    """
    table = kernels(backend)
    if not isinstance(cache, DropoutCache):
        raise TypeError(f"cache: expected what dropout_forward returned, got {_arguments.described(cache)}")
    shape, x_dtype, draw = cache
    if (
        _layout.plain(dout, None, None, 0) and dout.shape == shape and dout.dtype is x_dtype
        and _takes(out, dout)
    ):  # fmt: skip
        out = empty_like(dout) if out is None else out
        table.dropout(dout, dout.size, 0, *draw, out)
        return out

    dout = _layout.as_array("dout", dout)
    table = kernels_for(dout, table, backend)
    x_dtype = _layout.dtype_beside(x_dtype, dout)
    dtype = _layout.common_storage(x_dtype, _layout.storage_dtype("dout", dout))
    if dout.shape != shape:
        raise ValueError(f"dout: expected the shape of x, {shape}, got {dout.shape}")
    if out is not None:
        out = _layout.checked_out(out, dout, x_dtype, {"dout": dout}, may_be=dout)
    return _masked(table, draw, dout, dtype, x_dtype, out)


def _takes(out: Array | None, source: Array) -> bool:
    """Whether a result like `source`, which is plain, can go to the caller's out without a further look at it."""
    return out is None or (source.flags.writeable if out is source else _layout.plain_out(out, source))


def _masked(
    table: KernelTable, draw: Draw, source: Array, dtype: np.dtype[Any], out_dtype: np.dtype[Any], out: Array | None
) -> Array:
    """The kernel on an array of any layout, computed in `dtype`.

    Where a kernel cannot address the elements of both arrays in index order, they are packed. In host memory by the
    piece, in the cache: nothing of the arrays' size is allocated, and memory is read and written once. On a device,
    where so many small launches would take longer, as a whole.
    """
    out = _arrays.empty_like(source, out_dtype) if out is None else out
    fits = _layout.in_index_order(source, dtype), _layout.in_index_order(out, dtype)
    if all(fits) or on_device(source):
        work = out if fits[1] else _arrays.empty(source.shape, dtype, source)
        if not fits[0]:
            _arrays.copy(work, source)
            source = work
        if source.size:
            table.dropout(source, source.size, 0, *draw, work)
        return _layout.deliver(work, out)
    buffer = _arrays.empty((min(source.size, _layout.PIECE),), dtype, source)
    for first, index in _layout.pieces(source.shape):
        values = source[index]
        piece = buffer[: values.size].reshape(values.shape)
        _arrays.copy(piece, values)
        table.dropout(piece, piece.size, first, *draw, piece)
        _arrays.copy(out[index], piece)
    return out
