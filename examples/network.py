"""A fully connected network in NumPy with fastnorm's layers. A template: copy it and change it.

    {fully connected -> [BatchNorm | LayerNorm] -> ReLU} x len(hidden) -> fully connected -> softmax

Each layer's forward returns a cache for its backward, as in CS231n. The normalization layers are fastnorm's;
the rest is a few lines each.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

import fastnorm

Array = np.ndarray[Any, Any]
Norm = Literal["none", "batchnorm", "layernorm"]
Mode = Literal["train", "test"]


def affine_forward(x: Array, weight: Array, bias: Array | None) -> tuple[Array, Any]:
    """out = x @ weight + bias for x of (N, D), weight of (D, M), bias of (M,) or None."""
    out = x @ weight
    if bias is not None:
        out += bias
    return out, (x, weight, bias is not None)


def affine_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array | None]:
    """(dx, dweight, dbias). bias was copied to N rows, so its gradient is the sum over them."""
    x, weight, has_bias = cache
    return dout @ weight.T, x.T @ dout, dout.sum(axis=0) if has_bias else None


def softmax_loss(scores: Array, labels: Array) -> tuple[float, Array]:
    """Mean cross-entropy of (N, classes) scores against (N,) labels, and its gradient."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(np.mean(np.log(totals[:, 0]) - shifted[rows, labels]))
    dscores = exponentials / totals
    dscores[rows, labels] -= 1
    return loss, dscores / len(labels)


class Network:
    """The network above.

    Weights are drawn from a normal distribution of standard deviation `weight_scale`; biases and beta start
    at 0, gamma at 1. A layer with BatchNorm has no bias: subtracting the batch mean would cancel it, and beta
    does its work. With LayerNorm it stays, because LayerNorm subtracts one mean for all features together.
    """

    def __init__(
        self, inputs: int, hidden: tuple[int, ...], classes: int, *,
        norm: Norm = "none", weight_scale: float = 0.02, dtype: DTypeLike = np.float32, seed: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.norm = norm
        self.depth = len(hidden)
        self.params: dict[str, Array] = {}
        # BatchNorm's running statistics: a dictionary a layer, filled by the forward in train mode.
        self.bn_params: list[dict[str, Any]] = [{"momentum": 0.9} for _ in hidden]
        for layer, (rows, columns) in enumerate(pairwise((inputs, *hidden, classes))):
            last = layer == self.depth
            self.params[f"weight{layer}"] = (weight_scale * rng.standard_normal((rows, columns))).astype(dtype)
            if last or norm != "batchnorm":
                self.params[f"bias{layer}"] = np.zeros(columns, dtype)
            if not last and norm != "none":
                self.params[f"gamma{layer}"] = np.ones(columns, dtype)
                self.params[f"beta{layer}"] = np.zeros(columns, dtype)

    def scores(self, x: Array, mode: Mode) -> tuple[Array, list[Any]]:
        """(N, classes) scores, and the caches of all layers.

        Mode 'train' normalizes with the batch's statistics and updates the running ones; 'test' uses those.
        """
        caches: list[Any] = []
        for layer in range(self.depth):
            x, affine = affine_forward(x, self.params[f"weight{layer}"], self.params.get(f"bias{layer}"))
            norm = None
            if self.norm != "none":
                gamma, beta = self.params[f"gamma{layer}"], self.params[f"beta{layer}"]
                if self.norm == "batchnorm":
                    bn_param = self.bn_params[layer]
                    bn_param["mode"] = mode
                    x, norm = fastnorm.batchnorm_forward(x, gamma, beta, bn_param)
                else:
                    x, norm = fastnorm.layernorm_forward(x, gamma, beta)
            x = np.maximum(x, 0)
            caches.append((affine, norm, x > 0))
        out, affine = affine_forward(x, self.params[f"weight{self.depth}"], self.params[f"bias{self.depth}"])
        caches.append(affine)
        return out, caches

    def loss(self, x: Array, labels: Array) -> tuple[float, dict[str, Array]]:
        """The training loss of a batch, and its gradient for every parameter."""
        scores, caches = self.scores(x, "train")
        loss, dx = softmax_loss(scores, labels)
        found: dict[str, Array | None] = {}
        dx, found[f"weight{self.depth}"], found[f"bias{self.depth}"] = affine_backward(dx, caches.pop())
        for layer in reversed(range(self.depth)):
            affine, norm, active = caches.pop()
            dx = dx * active
            if self.norm == "batchnorm":
                dx, found[f"gamma{layer}"], found[f"beta{layer}"] = fastnorm.batchnorm_backward(dx, norm)
            elif self.norm == "layernorm":
                dx, found[f"gamma{layer}"], found[f"beta{layer}"] = fastnorm.layernorm_backward(dx, norm)
            dx, found[f"weight{layer}"], found[f"bias{layer}"] = affine_backward(dx, affine)
        return loss, {name: gradient for name, gradient in found.items() if gradient is not None}

    def accuracy(self, x: Array, labels: Array) -> float:
        """The share of labels that the network predicts, in test mode."""
        scores, _ = self.scores(x, "test")
        return float(np.mean(scores.argmax(axis=1) == labels))


def gradient_error(network: Network, x: Array, labels: Array, *, step: float = 1e-6, entries: int = 40) -> float:
    """How far the analytic gradients are from central differences: the worst over the parameter arrays.

    An array's error is the largest difference over up to `entries` of its elements, divided by its largest
    gradient. float64 only: in float32 the differences drown in rounding.
    """
    rng = np.random.default_rng(0)
    _, gradients = network.loss(x, labels)
    worst = 0.0
    for name, gradient in gradients.items():
        values, expected = network.params[name].reshape(-1), gradient.reshape(-1)
        chosen = rng.permutation(values.size)[:entries]
        differences = []
        for index in chosen:
            before = values[index]
            values[index] = before + step
            above, _ = network.loss(x, labels)
            values[index] = before - step
            below, _ = network.loss(x, labels)
            values[index] = before
            differences.append((above - below) / (2 * step) - expected[index])
        worst = max(worst, float(np.abs(differences).max() / np.abs(expected).max()))
    return worst
