"""The functions of the CS231n assignment and of d2l as their readers write them, to compare with.

Batch and layer normalization of (N, D), group normalization of (N, C, H, W), and d2l's batch normalization of
(N, C, H, W) with parameters of (1, C, 1, 1).
"""

from __future__ import annotations

import numpy as np


def batchnorm_forward(x, gamma, beta, bn_param):
    mode = bn_param["mode"]
    eps = bn_param.get("eps", 1e-5)
    momentum = bn_param.get("momentum", 0.9)
    _, width = x.shape
    running_mean = bn_param.get("running_mean", np.zeros(width, dtype=x.dtype))
    running_var = bn_param.get("running_var", np.zeros(width, dtype=x.dtype))
    cache = None
    if mode == "train":
        sample_mean = np.mean(x, axis=0)
        sample_var = np.var(x, axis=0)
        x_hat = (x - sample_mean) / (np.sqrt(sample_var + eps))
        out = gamma * x_hat + beta
        cache = (gamma, x, sample_mean, sample_var, eps, x_hat)
        running_mean = momentum * running_mean + (1 - momentum) * sample_mean
        running_var = momentum * running_var + (1 - momentum) * sample_var
    elif mode == "test":
        x_hat = (x - running_mean) / (np.sqrt(running_var + eps))
        out = gamma * x_hat + beta
    else:
        raise ValueError(f'Invalid forward batchnorm mode "{mode}"')
    bn_param["running_mean"] = running_mean
    bn_param["running_var"] = running_var
    return out, cache


def batchnorm_backward(dout, cache):
    gamma, x, sample_mean, sample_var, eps, x_hat = cache
    samples, width = dout.shape
    dbeta = np.sum(dout, axis=0)
    dgammax = dout
    dgamma = np.sum(dgammax * x_hat, axis=0)
    dxhat = dgammax * gamma
    xmu = x - sample_mean
    divar = np.sum(dxhat * xmu, axis=0)
    ivar = 1 / (np.sqrt(sample_var + eps))
    dxmu1 = dxhat * ivar
    dsqrtvar = -1.0 / ((np.sqrt(sample_var + eps)) ** 2) * divar
    dvar = 0.5 * 1.0 / np.sqrt(sample_var + eps) * dsqrtvar
    dsq = 1.0 / samples * np.ones((samples, width)) * dvar
    dxmu2 = 2 * xmu * dsq
    dx1 = dxmu1 + dxmu2
    dmu = -1 * np.sum(dxmu1 + dxmu2, axis=0)
    dx2 = 1.0 / samples * np.ones((samples, width)) * dmu
    return dx1 + dx2, dgamma, dbeta


def batchnorm_backward_alt(dout, cache):
    gamma, x, sample_mean, sample_var, eps, x_hat = cache
    m = x.shape[0]
    dgamma = np.sum(x_hat * dout, axis=0)
    dbeta = np.sum(dout, axis=0)
    dx_hat = dout * gamma
    dvar = np.sum(dx_hat * (x - sample_mean) * (-0.5) * np.power(sample_var + eps, -1.5), axis=0)
    dmean = np.sum(dx_hat * -1 / np.sqrt(sample_var + eps), axis=0) + dvar * np.mean(-2 * (x - sample_mean), axis=0)
    dx = 1 / np.sqrt(sample_var + eps) * dx_hat + dvar * 2.0 / m * (x - sample_mean) + 1.0 / m * dmean
    return dx, dgamma, dbeta


def layernorm_forward(x, gamma, beta, ln_param):
    eps = ln_param.get("eps", 1e-5)
    sample_mean = np.mean(x, axis=1).reshape(-1, 1)
    sample_var = np.var(x, axis=1).reshape(-1, 1)
    x_hat = (x - sample_mean) / (np.sqrt(sample_var + eps))
    return gamma * x_hat + beta, (gamma, x, sample_mean, sample_var, eps, x_hat)


def layernorm_backward(dout, cache):
    gamma, x, sample_mean, sample_var, eps, x_hat = cache
    d = x.shape[1]
    dx_hat = dout * gamma
    dvar = np.sum(dx_hat * (x - sample_mean) * (-0.5) * np.power(sample_var + eps, -1.5), axis=1, keepdims=True)
    dmean = np.sum(dx_hat * -1 / np.sqrt(sample_var + eps), axis=1, keepdims=True) + dvar * np.mean(
        -2 * (x - sample_mean), axis=1, keepdims=True
    )
    dx = 1 / np.sqrt(sample_var + eps) * dx_hat + dvar * 2.0 / d * (x - sample_mean) + 1.0 / d * dmean
    return dx, np.sum(x_hat * dout, axis=0), np.sum(dout, axis=0)


def spatial_groupnorm_forward(x, gamma, beta, G, gn_param):  # noqa: N803
    eps = gn_param.get("eps", 1e-5)
    samples, channels, height, width = x.shape
    grouped = x.reshape(samples * G, -1)
    mean, var = grouped.mean(axis=1, keepdims=True), grouped.var(axis=1, keepdims=True)
    x_norm = ((grouped - mean) / np.sqrt(var + eps)).reshape(samples, channels, height, width)
    return x_norm * gamma + beta, (G, x, x_norm, mean, var, beta, gamma, eps)


def spatial_groupnorm_backward(dout, cache):
    groups, x, x_norm, mean, var, _, gamma, eps = cache
    dbeta = np.sum(dout, axis=(0, 2, 3), keepdims=True)
    dgamma = np.sum(dout * x_norm, axis=(0, 2, 3), keepdims=True)
    dx_norm = (dout * gamma).reshape(x.shape[0] * groups, -1)
    centred = x.reshape(dx_norm.shape) - mean
    n = dx_norm.shape[1]
    dvar = np.sum(dx_norm * centred * (-0.5) * (var + eps) ** -1.5, axis=1, keepdims=True)
    dmean = np.sum(-dx_norm / np.sqrt(var + eps), axis=1, keepdims=True) + dvar * np.mean(
        -2 * centred, 1, keepdims=True
    )
    dx = dx_norm / np.sqrt(var + eps) + dvar * 2 / n * centred + dmean / n
    return dx.reshape(x.shape), dgamma, dbeta


def batch_norm(x, gamma, beta, moving_mean, moving_var, eps, momentum, *, training):
    """d2l's, for (N, D) and (N, C, H, W), with NumPy in the place of torch."""
    if not training:
        x_hat = (x - moving_mean) / np.sqrt(moving_var + eps)
    else:
        assert len(x.shape) in (2, 4)
        axes, keepdims = (0, False) if len(x.shape) == 2 else ((0, 2, 3), True)
        mean = x.mean(axis=axes, keepdims=keepdims)
        var = ((x - mean) ** 2).mean(axis=axes, keepdims=keepdims)
        x_hat = (x - mean) / np.sqrt(var + eps)
        moving_mean = momentum * moving_mean + (1.0 - momentum) * mean
        moving_var = momentum * moving_var + (1.0 - momentum) * var
    return gamma * x_hat + beta, moving_mean, moving_var
