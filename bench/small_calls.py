"""Microseconds of a public call on 4x8, before there is anything to compute: ours, its kernel's, and PyTorch's.

    python bench/small_calls.py

float32 with both parameters, images of 4x8x2x2 for groups; the C++ backend on one thread and PyTorch's function on as
many, by turns in bursts, into new arrays. 'kernel' is what the extension's functions take of a call, with the arguments
that it has for them. PyTorch's backward goes through autograd. A second table has the steps of BatchNorm's forward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastnorm
from fastnorm import _arrays, _dispatch, _layout, _memory
from fastnorm.backends import KernelTable
from fastnorm.bench import measure
from fastnorm.ops import _arguments

Call = Callable[[], Any]

ROWS, IMAGES = (4, 8), (4, 8, 2, 2)
EPS = 1e-5


def running(**more: Any) -> dict[str, Any]:
    """A dictionary as CS231n's: 'train' with running statistics."""
    return {"mode": "train", "running_mean": np.zeros(8, np.float32), "running_var": np.ones(8, np.float32), **more}


def contests() -> Iterator[tuple[str, Call, Call]]:
    """(name, ours, PyTorch's)"""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    function = torch.nn.functional
    rng = np.random.default_rng(0)
    x, image = (rng.standard_normal(shape, np.float32) for shape in (ROWS, IMAGES))
    gamma, beta = np.ones(8, np.float32), np.zeros(8, np.float32)
    leaves = [torch.from_numpy(each.copy()).requires_grad_() for each in (x, image, gamma, beta)]
    rows, images, weight, bias = (leaf.detach() for leaf in leaves)
    x_leaf, image_leaf, *parameters = leaves
    old = [torch.zeros(8), torch.ones(8)]

    def back(ours: Call, theirs: Any, leaf: Any) -> tuple[Call, Call]:
        """Backward of a forward of ours, and of a result of theirs."""
        _, cache = ours()
        op, dout = cache.op, image if leaf is image_leaf else x
        function = getattr(fastnorm, f"{op}_backward")
        grad, needed = torch.from_numpy(dout), [each for each in (leaf, *parameters) if uses(theirs, each)]
        return (
            lambda: function(dout, cache, backend="cpp"),
            lambda: torch.autograd.grad(theirs, needed, grad, retain_graph=True),
        )

    def uses(result: Any, leaf: Any) -> bool:
        return torch.autograd.grad(result.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None

    def batchnorm(param: dict[str, Any] | None) -> Call:
        return lambda: fastnorm.batchnorm_forward(x, gamma, beta, param, backend="cpp")

    train = batchnorm(running())
    yield "BatchNorm forward", train, lambda: function.batch_norm(rows, *old, weight, bias, True)
    yield "without options", batchnorm(None), lambda: function.batch_norm(rows, None, None, weight, bias, True)
    yield (
        "PyTorch's convention", batchnorm(running(convention="pytorch")),
        lambda: function.batch_norm(rows, *old, weight, bias, True),
    )  # fmt: skip
    yield "test mode", batchnorm(running(mode="test")), lambda: function.batch_norm(rows, *old, weight, bias)
    yield "BatchNorm backward", *back(train, function.batch_norm(x_leaf, *old, *parameters, True), x_leaf)

    def layernorm() -> Any:
        return fastnorm.layernorm_forward(x, gamma, beta, {}, backend="cpp")

    yield "LayerNorm forward", layernorm, lambda: function.layer_norm(rows, (8,), weight, bias)
    yield "LayerNorm backward", *back(layernorm, function.layer_norm(x_leaf, (8,), *parameters), x_leaf)

    def rmsnorm() -> Any:
        return fastnorm.rmsnorm_forward(x, gamma, backend="cpp")

    yield "RMSNorm forward", rmsnorm, lambda: function.rms_norm(rows, (8,), weight, EPS)
    yield "RMSNorm backward", *back(rmsnorm, function.rms_norm(x_leaf, (8,), parameters[0], EPS), x_leaf)

    def groupnorm() -> Any:
        return fastnorm.groupnorm_forward(image, gamma, beta, 2, backend="cpp")

    yield "GroupNorm forward", groupnorm, lambda: function.group_norm(images, 2, weight, bias)
    yield "GroupNorm backward", *back(groupnorm, function.group_norm(image_leaf, 2, *parameters), image_leaf)

    def instancenorm(param: dict[str, Any] | None) -> Call:
        return lambda: fastnorm.instancenorm_forward(image, gamma, beta, param, backend="cpp")

    plain = instancenorm(None)
    yield "InstanceNorm forward", plain, lambda: function.instance_norm(images, None, None, weight, bias)
    yield (
        "with running statistics", instancenorm(running()),
        lambda: function.instance_norm(images, *old, weight, bias),
    )  # fmt: skip
    result = function.instance_norm(image_leaf, None, None, *parameters)
    yield "InstanceNorm backward", *back(plain, result, image_leaf)

    seeded = {"p": 0.5, "seed": 231}
    _, draw = fastnorm.dropout_forward(x, seeded, backend="cpp")
    dropped = function.dropout(x_leaf, 0.5)
    yield (
        "dropout forward", lambda: fastnorm.dropout_forward(x, seeded, backend="cpp"),
        lambda: function.dropout(rows, 0.5),
    )  # fmt: skip
    yield (
        "dropout backward", lambda: fastnorm.dropout_backward(x, draw, backend="cpp"),
        lambda: torch.autograd.grad(dropped, x_leaf, rows, retain_graph=True),
    )  # fmt: skip
    for axes, ours, theirs in ((0, x, rows), ((0, 2), image, images)):
        yield (
            f"moments over {axes}", lambda axes=axes, ours=ours: fastnorm.moments(ours, axes, backend="cpp"),
            lambda axes=axes, theirs=theirs: torch.var_mean(theirs, axes, correction=0),
        )  # fmt: skip
    _, mean, var = fastnorm.moments(x, 0, backend="cpp")
    yield (
        "normalize", lambda: fastnorm.normalize(x, mean, var, gamma, beta, backend="cpp"),
        lambda: function.batch_norm(rows, *old, weight, bias),
    )  # fmt: skip


def kernels_of(call: Call) -> Call:
    """The calls of kernels that a call makes, without the rest of it."""
    table: Any = _dispatch.kernels("cpp")
    made: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    real = {name: getattr(table, name) for name in vars(KernelTable) if not name.startswith("_")}

    def recording(kernel: Callable[..., None]) -> Callable[..., None]:
        def record(*arguments: Any) -> None:
            made.append((kernel, arguments))
            kernel(*arguments)

        return record

    try:
        for name, kernel in real.items():
            setattr(table, name, recording(kernel))
        call()
    finally:
        for name, kernel in real.items():
            setattr(table, name, kernel)
    if len(made) == 1:
        kernel, arguments = made[0]
        return lambda: kernel(*arguments)
    return lambda: [kernel(*arguments) for kernel, arguments in made]


def steps() -> dict[str, Call]:
    """Those of BatchNorm's forward with CS231n's dictionary, in their order."""
    x, gamma, beta = np.ones(ROWS, np.float32), np.ones(8, np.float32), np.zeros(8, np.float32)
    param = running()
    options = _arguments.batchnorm_options(param, x, 8)
    mean, var = _arrays.pair(8, x)
    mean[:], var[:] = 0, 1
    table = _dispatch.kernels("cpp")
    out = np.empty_like(x)
    return {
        "the table of kernels": lambda: _dispatch.kernels("cpp"),
        "a look at the arrays": lambda: _layout.plain_channels(x, gamma, beta, 1),
        "options": lambda: _arguments.batchnorm_options(param, x, 8),
        "memory of the output": lambda: _memory.empty_like(x),
        "memory of the statistics": lambda: _arrays.pair(8, x),
        "the kernel": lambda: table.channel_forward(x, 4, 8, 1, gamma, beta, EPS, out, mean, var),
        "running statistics": lambda: _arguments.store_running(param, options, mean, var, x.dtype, 4),
        "the cache": lambda: _arguments.Cache("batchnorm", x, gamma, beta, mean, var, EPS, (1,), False),
    }


def main() -> None:
    fastnorm.set_num_threads(1)
    print("| call | C++ | kernel | PyTorch |")
    print("| --- | ---: | ---: | ---: |")
    for name, ours, theirs in contests():
        found = measure.bursts({"ours": ours, "kernel": kernels_of(ours), "theirs": theirs})
        print(f"| {name} | " + " | ".join(f"{timing.best * 1e6:.2f}" for timing in found.values()) + " |", flush=True)
    print("\n| step of BatchNorm's forward | us |")
    print("| --- | ---: |")
    for name, timing in measure.bursts(steps()).items():
        print(f"| {name} | {timing.best * 1e6:.2f} |")


if __name__ == "__main__":
    main()
