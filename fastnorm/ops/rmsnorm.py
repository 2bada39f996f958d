"""Root mean square normalization (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

Layer normalization without centring and without a shift. For each sample, over its normalized axes, D values:

    var  = sum(x^2) / D                              the mean of squares
    rstd = 1 / sqrt(var + eps)
    xhat = x * rstd
    out  = gamma * xhat                              gamma: one element per normalized position

Backward, with g = gamma * dout and the mean over the normalized axes:

    dx     = rstd * (g - xhat * mean(g * xhat))
    dgamma = sum over samples of dout * xhat

docs/maths.md derives each line.
"""

from __future__ import annotations

from typing import Any

from fastnorm._layout import Array
from fastnorm.ops import _arguments, _rows
from fastnorm.ops._arguments import Cache


def rmsnorm_forward(
    x: Any, gamma: Any, rms_param: dict[str, Any] | None = None, *,
    axis: int = -1, out: Array | None = None, backend: str | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """Scale each sample to a root mean square of 1 over its last axes: out = gamma * x / sqrt(mean(x^2) + eps).

    Parameters
    ----------
    x : array, as in `layernorm_forward`
    gamma : array of x.shape[axis:], or None
        Scale, or any shape that broadcasts to it element for element. None means 1.
    rms_param : dict or None
        eps : added to the mean of squares, default 1e-5. mode : accepted and ignored. Any other key is an error.
    axis : the first normalized axis, as in `layernorm_forward`.
    out : array to write to, of x's shape and result dtype; no overlap with the inputs.
    backend : the name of a backend; None takes the one chosen by `use_backend` or the first available.

    Returns
    -------
    out : array of x's shape, dtype and memory layout
    cache : for `rmsnorm_backward`; refers to x, copies nothing of its size.

    Raises ValueError or TypeError, naming the argument, before anything is written.
    """
    eps = _arguments.eps_alone("rms_param", rms_param)
    return _rows.forward("rmsnorm", x, gamma, None, eps, axis, out, backend, False)


def rmsnorm_backward(
    dout: Any, cache: Cache, *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, Array | None]:
    """Gradients of `rmsnorm_forward`: dx = rstd*(g - xhat*mean(g*xhat)), g = gamma*dout.

    Parameters
    ----------
    dout : array of x's shape, any real dtype and strides
    cache : from `rmsnorm_forward`, of any backend
    out : array to write dx to, of x's shape and result dtype.
    backend : as in `rmsnorm_forward`.

    Returns
    -------
    dx : array of x's shape, dtype and memory layout
    dgamma : sum over the samples of dout * xhat, in the shape and dtype of gamma; None where gamma was None.

    Raises TypeError for what is not a cache, ValueError for another op's cache or a dout of another shape.
    """
    dx, dgamma, _ = _rows.backward("rmsnorm", dout, cache, out, backend)
    return dx, dgamma
