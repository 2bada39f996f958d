"""fastnorm in a few lines: images in both layouts, then a training loop of a small network.

python examples/quickstart.py
"""

from __future__ import annotations

import numpy as np

import fastnorm


def images() -> None:
    """BatchNorm of a batch of images: the same numbers for NCHW and for NHWC."""
    rng = np.random.default_rng(0)
    nchw = rng.normal(3.0, 2.0, (8, 16, 28, 28)).astype(np.float32)
    nhwc = np.ascontiguousarray(nchw.transpose(0, 2, 3, 1))
    gamma, beta = np.full(16, 2.0, np.float32), np.full(16, -1.0, np.float32)

    out, cache = fastnorm.spatial_batchnorm_forward(nchw, gamma, beta, {})
    out_last, cache_last = fastnorm.spatial_batchnorm_forward(nhwc, gamma, beta, {}, axis=-1)
    dx, _, _ = fastnorm.spatial_batchnorm_backward(out, cache)
    dx_last, _, _ = fastnorm.spatial_batchnorm_backward(out_last, cache_last)

    print(f"channel 0: mean {nchw[:, 0].mean():.2f} -> {out[:, 0].mean():.2f}")
    print(f"channel 0: std  {nchw[:, 0].std():.2f} -> {out[:, 0].std():.2f}")
    to_nchw = (0, 3, 1, 2)
    np.testing.assert_allclose(out_last.transpose(to_nchw), out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx_last.transpose(to_nchw), dx, rtol=1e-4, atol=1e-5)
    print("the output and dx are the same in NCHW and NHWC")


def training() -> None:
    """Two classes of points, one hidden layer with BatchNorm, plain gradient descent."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 2)).astype(np.float32)
    target = (np.hypot(x[:, 0], x[:, 1]) > 1.2).astype(np.float32)  # outside a circle or within it
    w1, w2 = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 32), (32, 1)))
    gamma, beta, bias = np.ones(32, np.float32), np.zeros(32, np.float32), np.zeros(1, np.float32)
    bn_param = {"mode": "train"}

    for _ in range(300):
        normalized, cache = fastnorm.batchnorm_forward(x @ w1, gamma, beta, bn_param)
        hidden = np.maximum(normalized, 0)
        probability = 1 / (1 + np.exp(-(hidden @ w2 + bias)))
        dscore = (probability - target[:, None]) / len(x)
        dhidden = (dscore @ w2.T) * (hidden > 0)
        dproduct, dgamma, dbeta = fastnorm.batchnorm_backward(dhidden, cache)
        gradients = (x.T @ dproduct, hidden.T @ dscore, dgamma, dbeta, dscore.sum(axis=0))
        for parameter, gradient in zip((w1, w2, gamma, beta, bias), gradients, strict=True):
            parameter -= 0.5 * gradient

    bn_param["mode"] = "test"  # from here on the running statistics
    normalized, _ = fastnorm.batchnorm_forward(x @ w1, gamma, beta, bn_param)
    correct = (np.maximum(normalized, 0) @ w2 + bias > 0)[:, 0] == (target > 0)
    print(f"trained: {correct.mean():.1%} of the points on the right side")


if __name__ == "__main__":
    images()
    training()
