"""PyTorch and JAX on the same cases, where they are installed.

What is compared is the kernel: PyTorch's backward is the operator that autograd calls, without the graph's
bookkeeping; JAX's is the compiled pull-back over residuals that the forward kept, not a recomputed forward.
PyTorch runs on as many threads as fastnorm. JAX has no setting for that: it takes all CPUs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastnorm
from fastnorm.backends import Array
from fastnorm.bench.cases import Case, Direction, Inputs

EPS = 1e-5

Bound = tuple[Callable[[], Any], Callable[[Any], tuple[Array | None, ...]]]
"""The fields of `variants.Call`."""


class Peer(NamedTuple):
    module: str
    computes: Callable[[Case], bool]
    """Whether it has the op and the dtype."""
    bind: Callable[[Case, Inputs, Direction], Bound]

    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


# ---- PyTorch --------------------------------------------------------------------------------------


def _bind_torch(case: Case, inputs: Inputs, direction: Direction) -> Bound:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(fastnorm.get_num_threads())

    def tensor(array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(result: Any) -> Array:
        if result.dtype == torch.bfloat16:
            halves: Array = result.view(torch.int16).numpy().view(inputs.x.dtype)
            return halves
        numbers: Array = result.numpy()
        return numbers

    x, gamma, beta, dout = map(tensor, inputs)
    if case.op.family == "channel":  # PyTorch's channels are axis 1
        x, dout = x.movedim(case.axis, 1), dout.movedim(case.axis, 1)
    forward, backward = _TORCH[case.op.name](torch, x, gamma, beta, dout)

    def arrays(result: Any) -> tuple[Array | None, ...]:
        first, *rest = result if isinstance(result, tuple) else (result,)
        if case.op.family == "channel":
            first = first.movedim(1, case.axis)
        return (array(first), *(array(each) for each in rest))

    return (forward if direction == "forward" else backward(), arrays)


def _torch_batchnorm(torch: Any, x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, Any]:
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.batch_norm(x, mean, var, gamma, beta, training=True, eps=EPS)

    def backward() -> Any:
        _, saved_mean, saved_rstd = torch.ops.aten.native_batch_norm(x, gamma, beta, mean, var, True, 0.1, EPS)
        return lambda: torch.ops.aten.native_batch_norm_backward(
            dout, x, gamma, mean, var, saved_mean, saved_rstd, True, EPS, [True, True, True]
        )

    return forward, backward


def _torch_layernorm(torch: Any, x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, Any]:
    shape = list(gamma.shape)

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.layer_norm(x, shape, gamma, beta, EPS)

    def backward() -> Any:
        _, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, gamma, beta, EPS)
        return lambda: torch.ops.aten.native_layer_norm_backward(
            dout, x, shape, mean, rstd, gamma, beta, [True, True, True]
        )

    return forward, backward


# op -> (torch, x, gamma, beta, dout) -> (the forward, what makes the backward)
_TORCH = {"batchnorm": _torch_batchnorm, "layernorm": _torch_layernorm}


# ---- JAX ------------------------------------------------------------------------------------------


def _bind_jax(case: Case, inputs: Inputs, direction: Direction) -> Bound:
    jax: Any = importlib.import_module("jax")
    jnp: Any = importlib.import_module("jax.numpy")
    affine = tuple(n if axis not in case.reduced_axes else 1 for axis, n in enumerate(case.shape))
    if case.op.family == "row":
        affine = case.parameter_shape

    def normalized(x: Any, gamma: Any, beta: Any) -> Any:
        wide = x.astype(jnp.float32)
        mean = wide.mean(case.reduced_axes, keepdims=True)
        var = jnp.square(wide - mean).mean(case.reduced_axes, keepdims=True)
        xhat = (wide - mean) * jax.lax.rsqrt(var + EPS)
        return (gamma.reshape(affine) * xhat + beta.reshape(affine)).astype(x.dtype)

    x, gamma, beta, dout = map(jnp.asarray, inputs)
    if direction == "forward":
        compiled = jax.jit(normalized).lower(x, gamma, beta).compile()
        return (
            lambda: jax.block_until_ready(compiled(x, gamma, beta)),
            lambda result: (np.asarray(result),),
        )
    _, residuals = jax.jit(lambda *arguments: jax.vjp(normalized, *arguments))(x, gamma, beta)
    pull_back = jax.jit(lambda back, grad: back(grad)).lower(residuals, dout).compile()
    return (
        lambda: jax.block_until_ready(pull_back(residuals, dout)),
        lambda result: tuple(map(np.asarray, result)),
    )


def _jax_computes(case: Case) -> bool:
    return case.op.name in ("batchnorm", "layernorm") and case.dtype != "float64"  # a switch of the whole process


PEERS = {
    "torch": Peer("torch", lambda case: case.op.name in _TORCH, _bind_torch),
    "jax": Peer("jax", _jax_computes, _bind_jax),
}
