"""PyTorch, its compiler, oneDNN and JAX on the same cases, where they are installed.

What is compared is the kernel: PyTorch's backward is the operator that autograd calls, without the graph's
bookkeeping, where there is one (InstanceNorm and RMSNorm are compositions: theirs goes through the graph); JAX's is
the compiled pull-back over residuals that the forward kept, not a recomputed forward. 'torch autograd' is what a
caller pays, graph included: the peer of our small calls. Arrays are made outside of what is timed, in the layout that
the peer likes best: channels-last as PyTorch's memory_format, as oneDNN's own tensors, and for JAX, which has no
strides, in the shape that memory has. Results are the peer's own new arrays.
PyTorch runs on as many threads as fastnorm. JAX has no setting for that: it takes all CPUs.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
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
    label: str

    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


# ---- PyTorch --------------------------------------------------------------------------------------


class _Tensors(NamedTuple):
    """The inputs of a case for PyTorch, whose channels are axis 1. They share the arrays' memory."""

    x: Any
    gamma: Any
    beta: Any
    dout: Any


def _torch() -> Any:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(fastnorm.get_num_threads())
    return torch


def _tensors(torch: Any, case: Case, inputs: Inputs) -> _Tensors:
    def tensor(array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    x, gamma, beta, dout = map(tensor, inputs)
    if case.op.family != "row":
        x, dout = x.movedim(case.axis, 1), dout.movedim(case.axis, 1)
    return _Tensors(x, gamma, beta, dout)


def _arrays(torch: Any, case: Case, inputs: Inputs) -> Callable[[Any], tuple[Array | None, ...]]:
    """What turns the tensors of a result into arrays of the case's shapes."""

    def array(result: Any) -> Array:
        result = result.detach().to_dense() if result.layout is not torch.strided else result.detach()
        if result.dtype == torch.bfloat16:
            halves: Array = result.view(torch.int16).numpy().view(inputs.x.dtype)
            return halves
        numbers: Array = result.numpy()
        return numbers

    def arrays(result: Any) -> tuple[Array | None, ...]:
        first, *rest = map(array, result if isinstance(result, tuple) else (result,))
        if case.op.family != "row":
            first = np.moveaxis(first, 1, case.axis)
        return (first, *rest)

    return arrays


def _bind_torch(case: Case, inputs: Inputs, direction: Direction) -> Bound:
    torch = _torch()
    operator = _OPERATORS.get(case.op.name)
    if operator is None:
        return _through_graph(torch, case, inputs, direction, _functional(torch, case), graph_forward=False)
    forward, backward = operator(torch, case, *_tensors(torch, case, inputs))
    return forward if direction == "forward" else backward(), _arrays(torch, case, inputs)


def _torch_batchnorm(torch: Any, _: Case, x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, Any]:
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


def _torch_layernorm(torch: Any, _: Case, x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, Any]:
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


def _torch_groupnorm(torch: Any, case: Case, x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, Any]:
    samples, channels, *positions = x.shape
    sizes = samples, channels, math.prod(positions), case.groups

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.group_norm(x, case.groups, gamma, beta, EPS)

    def backward() -> Any:
        _, mean, rstd = torch.ops.aten.native_group_norm(x, gamma, beta, *sizes, EPS)
        return lambda: torch.ops.aten.native_group_norm_backward(dout, x, mean, rstd, gamma, *sizes, [True, True, True])

    return forward, backward


# op -> (torch, case, x, gamma, beta, dout) -> (the forward, what makes the backward)
_OPERATORS = {"batchnorm": _torch_batchnorm, "layernorm": _torch_layernorm, "groupnorm": _torch_groupnorm}


def _bind_onednn(case: Case, inputs: Inputs, direction: Direction) -> Bound:
    """The same operators on oneDNN's own tensors."""
    torch = _torch()
    x, gamma, beta, dout = _tensors(torch, case, inputs)
    forward, backward = _torch_batchnorm(torch, case, x.to_mkldnn(), gamma, beta, dout.to_mkldnn())
    return forward if direction == "forward" else backward(), _arrays(torch, case, inputs)


def _bind_autograd(case: Case, inputs: Inputs, direction: Direction) -> Bound:
    """What a caller of the functions pays, with the graph."""
    torch = _torch()
    return _through_graph(torch, case, inputs, direction, _functional(torch, case))


def _bind_compiled(case: Case, inputs: Inputs, direction: Direction) -> Bound:
    torch = _torch()
    dynamo: Any = importlib.import_module("torch._dynamo")
    functorch: Any = importlib.import_module("torch._functorch.config")
    dynamo.reset()  # each case gets a compilation of its own shape; past eight it would run uncompiled
    functorch.donated_buffer = False  # else the graph could be walked only once
    compiled = torch.compile(_functional(torch, case), dynamic=False, fullgraph=True)
    return _through_graph(torch, case, inputs, direction, compiled, graph_forward=False)


def _functional(torch: Any, case: Case) -> Callable[..., Any]:
    """(x, gamma, beta, running mean, running variance) -> the output."""
    functional, shape = torch.nn.functional, list(case.parameter_shape)
    calls: dict[str, Callable[..., Any]] = {
        "batchnorm": lambda x, gamma, beta, mean, var: functional.batch_norm(x, mean, var, gamma, beta, True, 0.1, EPS),
        "layernorm": lambda x, gamma, beta, *_: functional.layer_norm(x, shape, gamma, beta, EPS),
        "groupnorm": lambda x, gamma, beta, *_: functional.group_norm(x, case.groups, gamma, beta, EPS),
        "instancenorm": lambda x, gamma, beta, *_: functional.instance_norm(x, weight=gamma, bias=beta, eps=EPS),
        "rmsnorm": lambda x, gamma, *_: functional.rms_norm(x, shape, gamma, EPS),
    }
    return calls[case.op.name]


def _through_graph(
    torch: Any, case: Case, inputs: Inputs, direction: Direction, function: Callable[..., Any], *,
    graph_forward: bool = True,
) -> Bound:  # fmt: skip
    x, gamma, beta, dout = _tensors(torch, case, inputs)
    running = torch.zeros_like(gamma), torch.ones_like(gamma)
    arrays = _arrays(torch, case, inputs)
    if direction == "forward" and not graph_forward:

        def forward() -> Any:
            with torch.no_grad():
                return function(x, gamma, beta, *running)

        return forward, arrays
    leaves = [tensor.requires_grad_() for tensor in ((x, gamma, beta) if case.op.centred else (x, gamma))]
    if direction == "forward":
        return lambda: function(x, gamma, beta, *running), arrays
    out = function(x, gamma, beta, *running)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), arrays


# ---- JAX ------------------------------------------------------------------------------------------


def _bind_jax(case: Case, inputs: Inputs, direction: Direction) -> Bound:
    jax: Any = importlib.import_module("jax")
    jnp: Any = importlib.import_module("jax.numpy")
    order = case.layout.memory or tuple(range(len(case.shape)))
    memory = [case.shape[axis] for axis in order]
    reduced = tuple(place for place, axis in enumerate(order) if axis in case.reduced_axes)
    if case.op.family == "group":
        place = order.index(case.axis % len(order))
        memory[place : place + 1] = [case.groups, memory[place] // case.groups]
        reduced = tuple(each for each in range(1, len(memory)) if each != place)
    affine = tuple(n if axis in case.parameter_axes else 1 for axis, n in enumerate(case.shape))

    def normalized(x: Any, *parameters: Any) -> Any:
        wide = x.astype(jnp.float32).reshape(memory)
        if case.op.centred:
            wide = wide - wide.mean(reduced, keepdims=True)
        xhat = (wide * jax.lax.rsqrt(jnp.square(wide).mean(reduced, keepdims=True) + EPS)).reshape(x.shape)
        gamma, *beta = (each.reshape(affine).transpose(order) for each in parameters)
        return sum(beta, gamma * xhat).astype(x.dtype)

    def array(result: Any) -> Array:
        back: Array = np.asarray(result).transpose(np.argsort(order))
        return back

    x, dout = (jnp.asarray(each.transpose(order)) for each in (inputs.x, inputs.dout))
    arguments = [x, *map(jnp.asarray, (inputs.gamma, inputs.beta) if case.op.centred else (inputs.gamma,))]
    if direction == "forward":
        compiled = jax.jit(normalized).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments)), lambda result: (array(result),)
    _, residuals = jax.jit(lambda *arguments: jax.vjp(normalized, *arguments))(*arguments)
    pull_back = jax.jit(lambda back, grad: back(grad)).lower(residuals, dout).compile()
    return (
        lambda: jax.block_until_ready(pull_back(residuals, dout)),
        lambda result: (array(result[0]), *map(np.asarray, result[1:])),
    )


def _jax_computes(case: Case) -> bool:
    return case.dtype != "float64"  # a switch of the whole process


def _torch_computes(case: Case) -> bool:
    """InstanceNorm of one value a channel is refused."""
    return case.op.name != "instancenorm" or case.reduction > 1


def _onednn_computes(case: Case) -> bool:
    """Its tensors exist for float32, its training for BatchNorm of images; LayerNorm is refused (PyTorch 2.13)."""
    return case.op.name == "batchnorm" and len(case.shape) == 4 and case.dtype == "float32"


PEERS = {
    "torch": Peer("torch", _torch_computes, _bind_torch, "PyTorch"),
    "jax": Peer("jax", _jax_computes, _bind_jax, "JAX"),
    "torch compile": Peer("torch", _torch_computes, _bind_compiled, "torch.compile"),
    "onednn": Peer("torch", _onednn_computes, _bind_onednn, "oneDNN"),
    "torch autograd": Peer("torch", _torch_computes, _bind_autograd, "PyTorch autograd"),
}
EVERYDAY = ("torch", "jax")
"""Those of the report and of the pytest-benchmark suites."""
