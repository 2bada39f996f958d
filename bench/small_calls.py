"""Microseconds a public call costs on small float32 arrays, beside PyTorch's where it is installed.

python bench/small_calls.py
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

import fastnorm

SHAPES = ((4, 8), (100, 50), (64, 256), (32, 1024))


def microseconds(call: Callable[[], Any]) -> float:
    number = max(1, int(0.005 / max(timeit.timeit(call, number=20) / 20, 1e-7)))
    return min(timeit.repeat(call, number=number, repeat=20)) / number * 1e6


def peers(x: np.ndarray[Any, Any], gamma: np.ndarray[Any, Any], beta: np.ndarray[Any, Any]) -> list[Callable[[], Any]]:
    try:
        import torch
        import torch.nn.functional as functional
    except ImportError:
        return []
    tensors = [torch.from_numpy(array) for array in (x, gamma, beta)]
    columns = x.shape[1]
    running = torch.zeros(columns), torch.ones(columns)
    return [
        lambda: functional.batch_norm(tensors[0], *running, *tensors[1:], True, 0.1, 1e-5),
        lambda: functional.layer_norm(tensors[0], (columns,), *tensors[1:]),
    ]


def main() -> None:
    rng = np.random.default_rng(0)
    print("us a call, minima    batchnorm: forward  torch  backward    layernorm: forward  torch  backward")
    for shape in SHAPES:
        x, dout = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
        gamma, beta = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
        param = {"mode": "train", "eps": 1e-5, "momentum": 0.9}
        batch_cache = fastnorm.batchnorm_forward(x, gamma, beta, param)[1]
        layer_cache = fastnorm.layernorm_forward(x, gamma, beta, {})[1]
        calls: list[Callable[[], Any]] = [
            lambda: fastnorm.batchnorm_forward(x, gamma, beta, param),  # noqa: B023 (called before the next turn)
            lambda: fastnorm.batchnorm_backward(dout, batch_cache),  # noqa: B023
            lambda: fastnorm.layernorm_forward(x, gamma, beta, {}),  # noqa: B023
            lambda: fastnorm.layernorm_backward(dout, layer_cache),  # noqa: B023
        ]
        ours = [microseconds(call) for call in calls]
        theirs = [f"{microseconds(call):7.1f}" for call in peers(x, gamma, beta)] or ["      -"] * 2
        print(
            f"{'x'.join(map(str, shape)):20} {ours[0]:19.1f}{theirs[0]}{ours[1]:10.1f}"
            f"{ours[2]:22.1f}{theirs[1]}{ours[3]:10.1f}"
        )


if __name__ == "__main__":
    main()
