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

from typing import Any

from fastnorm._layout import Array
from fastnorm.ops import _arguments, _rows
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
    eps = _arguments.eps_alone("ln_param", ln_param)
    return _rows.forward("layernorm", x, gamma, beta, eps, axis, out, backend, True)


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
    return _rows.backward("layernorm", dout, cache, out, backend)
