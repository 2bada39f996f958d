"""Data, optimizers and the training loop for `network.Network`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from network import Array, Network, Norm
from numpy.typing import DTypeLike
from sklearn.datasets import load_digits

import fastnorm

TRAINING_SAMPLES = 1000


class Data(NamedTuple):
    """Inputs of (N, 64) and labels 0..9, split once and for all."""

    x_train: Array
    y_train: Array
    x_val: Array
    y_val: Array


def digits(dtype: DTypeLike = np.float32) -> Data:
    """scikit-learn's digits (8x8 pixels, grey levels 0..16): 1,000 to train on, 797 to validate.

    Each pixel is standardised with the training samples' moments. eps is one grey level squared, since a
    pixel that is black in nearly every sample would else become huge in the few where it isn't.
    """
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = bunch.data[order].astype(dtype), bunch.target[order]
    train = fastnorm.moments(x[:TRAINING_SAMPLES], axis=0)
    x = fastnorm.normalize(x, train.mean, train.var, eps=1.0)
    return Data(x[:TRAINING_SAMPLES], y[:TRAINING_SAMPLES], x[TRAINING_SAMPLES:], y[TRAINING_SAMPLES:])


class Optimizer(Protocol):
    """What the training loop asks of an optimizer."""

    def step(self, params: dict[str, Array], gradients: dict[str, Array]) -> None:
        """Update the parameters in place."""


class Momentum:
    """Gradient descent with momentum: velocity = momentum*velocity - rate*gradient; w += velocity."""

    def __init__(self, rate: float, momentum: float = 0.9) -> None:
        self.rate, self.momentum = rate, momentum
        self.velocity: dict[str, Array] = {}

    def step(self, params: dict[str, Array], gradients: dict[str, Array]) -> None:
        for name, gradient in gradients.items():
            velocity = self.velocity.setdefault(name, np.zeros_like(gradient))
            velocity *= self.momentum
            velocity -= self.rate * gradient
            params[name] += velocity


class Adam:
    """Adam (Kingma and Ba, 2014): steps of the size of `rate`, whatever the gradient's scale."""

    def __init__(self, rate: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.rate, self.beta1, self.beta2, self.eps = rate, beta1, beta2, eps
        self.steps = 0
        self.first: dict[str, Array] = {}
        self.second: dict[str, Array] = {}

    def step(self, params: dict[str, Array], gradients: dict[str, Array]) -> None:
        self.steps += 1
        rate = self.rate / (1 - self.beta1**self.steps)
        correction = (1 - self.beta2**self.steps) ** -0.5
        for name, gradient in gradients.items():
            first = self.first.setdefault(name, np.zeros_like(gradient))
            second = self.second.setdefault(name, np.zeros_like(gradient))
            first += (1 - self.beta1) * (gradient - first)
            second += (1 - self.beta2) * (gradient * gradient - second)
            params[name] -= rate * first / (np.sqrt(second) * correction + self.eps)


@dataclass(frozen=True)
class Setup:
    """Everything that decides a training run; equal setups give equal bits."""

    norm: Norm
    hidden: tuple[int, ...]
    weight_scale: float = 0.02
    batch_size: int = 50
    epochs: int = 10
    optimizer: Literal["adam", "momentum"] = "adam"
    rate: float = 1e-3
    seed: int = 0


class History(NamedTuple):
    """A training run, one value an epoch."""

    loss: Array
    """Mean training loss over the batches of the epoch."""
    train_accuracy: Array
    """In test mode on all training samples, after the epoch; val_accuracy likewise."""
    val_accuracy: Array


def train(setup: Setup, data: Data) -> History:
    """Train a network from scratch. The last samples of an epoch that fill no batch are left out."""
    rng = np.random.default_rng([setup.seed, 1])
    dtype = data.x_train.dtype
    network = Network(
        data.x_train.shape[1], setup.hidden, 10,
        norm=setup.norm, weight_scale=setup.weight_scale, dtype=dtype, seed=setup.seed,
    )  # fmt: skip
    optimizer: Optimizer = {"adam": Adam, "momentum": Momentum}[setup.optimizer](setup.rate)
    history: list[Any] = []
    for _ in range(setup.epochs):
        losses = []
        order = rng.permutation(len(data.y_train))
        for start in range(0, len(order) - setup.batch_size + 1, setup.batch_size):
            batch = order[start : start + setup.batch_size]
            loss, gradients = network.loss(data.x_train[batch], data.y_train[batch])
            optimizer.step(network.params, gradients)
            losses.append(loss)
        history.append(
            (np.mean(losses), network.accuracy(data.x_train, data.y_train), network.accuracy(data.x_val, data.y_val))
        )
    return History(*np.array(history).T)
