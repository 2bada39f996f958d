"""Group normalization (Wu and He, 2018, https://arxiv.org/abs/1803.08494).

The channels of each sample fall into groups, side by side. Statistics of each group of each sample, over its
channels and all positions, n values together:

    mean = sum(x) / n
    var  = sum((x - mean)^2) / n
    rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) * rstd
    out  = gamma * xhat + beta                       gamma, beta: one element per channel

Backward, with g = gamma * dout and means over the group of the sample:

    dx     = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dgamma = sum over samples and positions of dout * xhat
    dbeta  = sum over samples and positions of dout

docs/maths.md derives each line.
"""

from __future__ import annotations

from typing import Any

from fastnorm import _layout
from fastnorm._layout import Array
from fastnorm.ops import _arguments, _groups
from fastnorm.ops._arguments import Cache


def groupnorm_forward(
    x: Any, gamma: Any, beta: Any, groups: int, gn_param: dict[str, Any] | None = None, *,
    axis: int = 1, out: Array | None = None, backend: str | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """Normalize groups of channels of each sample: out = gamma * (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    x : array of (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or any shape of 2 dimensions or more
        float16, bfloat16, float32 or float64, any strides; integers and bools are promoted to float64.
    gamma, beta : arrays of one element per channel, or None
        Scale and shift. Any shape that broadcasts: (C,), (1, C, 1, 1). None means 1 and 0.
    groups : how many groups the channels fall into, a divisor of their number.
        1 normalizes each sample as a whole, as many as channels are each channel alone (`instancenorm_forward`).
    gn_param : dict or None
        eps : added to the variance, default 1e-5. mode : accepted and ignored. Any other key is an error.
    axis : the channel axis; -1 for channels-last. Not 0, which is that of the samples.
    out : array to write to, of x's shape and result dtype; no overlap with the inputs.
    backend : the name of a backend; None takes the one chosen by `use_backend` or the first available.

    Returns
    -------
    out : array of x's shape, dtype and memory layout
    cache : for `groupnorm_backward`; refers to x, copies nothing of its size.

    Raises ValueError or TypeError, naming the argument, before anything is written.
    """
    eps = _arguments.eps_alone("gn_param", gn_param)
    if groups is None:
        raise TypeError("groups: expected a whole number, got None")
    return _groups.forward("groupnorm", x, gamma, beta, groups, eps, axis, out, backend)


def groupnorm_backward(
    dout: Any, cache: Cache, *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `groupnorm_forward`: dx = rstd*(g - mean(g) - xhat*mean(g*xhat)), g = gamma*dout.

    Parameters
    ----------
    dout : array of x's shape, any real dtype and strides
    cache : from `groupnorm_forward`, of any backend
    out : array to write dx to, of x's shape and result dtype.
    backend : as in `groupnorm_forward`.

    Returns
    -------
    dx : array of x's shape, dtype and memory layout
    dgamma, dbeta : sums over samples and positions of dout * xhat and of dout, in the shape and dtype of gamma and
        beta; None where gamma or beta was None.

    Raises TypeError for what is not a cache, ValueError for another op's cache or a dout of another shape.
    """
    return _groups.backward("groupnorm", dout, cache, out, backend)


def spatial_groupnorm_forward(
    x: Any, gamma: Any, beta: Any, G: int, gn_param: dict[str, Any] | None = None, *,  # noqa: N803 (CS231n's name)
    axis: int = 1, out: Array | None = None, backend: str | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """`groupnorm_forward` for images, CS231n's name: x of (N, C, H, W), or (N, H, W, C) with axis=-1.

    Raises ValueError where x does not have 4 dimensions.
    """
    shape = _layout.as_array("x", x).shape
    if len(shape) != 4:
        raise ValueError(f"x: expected 4 dimensions (N, C, H, W), got shape {shape}")
    return groupnorm_forward(x, gamma, beta, G, gn_param, axis=axis, out=out, backend=backend)


def spatial_groupnorm_backward(
    dout: Any, cache: Cache, *, out: Array | None = None, backend: str | None = None
) -> tuple[Array, Array | None, Array | None]:
    """`groupnorm_backward` under CS231n's name for images."""
    return groupnorm_backward(dout, cache, out=out, backend=backend)
