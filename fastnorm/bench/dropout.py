"""Dropout beside the normalizations: checked and timed by itself, since it has neither statistics nor parameters.

It moves the same bytes in both directions, one read and one write: the floor is a copy, forward and backward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

import fastnorm
from fastnorm.backends import Array
from fastnorm.bench import roof
from fastnorm.bench.cases import DIRECTIONS, DROPOUT, MEGABYTE, Direction, Inputs, dtype_of
from fastnorm.bench.run import Part, Report, Row, Section, add_beside, beside
from fastnorm.bench.variants import Variant

NAME = DROPOUT.name
COLUMNS = 1024
P, SEED = 0.5, 231
SIGMAS = 6
"""Standard deviations by which the number of kept elements may be off."""


def computes(variant: Variant, dtype: str) -> bool:
    """Whether the variant has dropout: fastnorm's backends, and PyTorch for the dtypes that NumPy shares with it."""
    return variant.name == "fused" or (variant.name == "torch" and dtype != "bfloat16")


def sizes(size: int, dtype: str) -> tuple[int, int]:
    """The shape of the report's array, as large as LayerNorm's: 3/8 of `size` megabytes."""
    return max(1, 3 * size * MEGABYTE // (8 * COLUMNS * dtype_of(dtype).itemsize)), COLUMNS


def values(shape: tuple[int, int], dtype: str) -> Array:
    """Standard normal numbers."""
    drawn = np.random.default_rng([0, *shape]).standard_normal(shape, np.float32)
    return drawn.astype(dtype_of(dtype), copy=False)


def bind(variant: Variant, x: Array, direction: Direction, out: Array | None = None) -> Callable[[], Array]:
    """The call to check and to time. x is also the gradient of a backward; `out` is for fastnorm's."""
    if variant.name == "torch":
        return _bind_torch(x, direction)
    param = {"p": P, "seed": SEED}
    if direction == "forward":
        return lambda: fastnorm.dropout_forward(x, param, out=out, backend=variant.backend)[0]
    _, cache = fastnorm.dropout_forward(x, param, backend=variant.backend)
    return lambda: fastnorm.dropout_backward(x, cache, out=out, backend=variant.backend)


def _bind_torch(x: Array, direction: Direction) -> Callable[[], Array]:
    """The function as called, and the backward as autograd runs it: a product with the mask that it kept."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(fastnorm.get_num_threads())
    tensor = torch.from_numpy(x)
    dropout = torch.nn.functional.dropout
    if direction == "forward":
        return lambda: dropout(tensor, 1 - P, True).numpy()
    leaf = tensor.clone().requires_grad_()
    out = dropout(leaf, 1 - P, True)
    return lambda: torch.autograd.grad(out, leaf, tensor, retain_graph=True)[0].numpy()


def error(variant: Variant, x: Array, got: Array) -> float:
    """How far a result is from a right one, which has no error at all, since 1/p is a power of two.

    fastnorm's: the largest deviation from the reference with the same seed. PyTorch's mask is its own: the largest
    deviation of what it kept from x/p; infinite where it kept too many or too few.
    """
    if got.shape != x.shape or got.dtype != x.dtype:
        return float("inf")
    if variant.name == "fused":
        want, _ = fastnorm.dropout_forward(x, {"p": P, "seed": SEED}, backend="numpy")
    else:
        kept = got != 0
        if abs(np.count_nonzero(kept) - x.size * P) > SIGMAS * np.sqrt(x.size * P * (1 - P)):
            return float("inf")
        want = np.where(kept, x * x.dtype.type(1 / P), x.dtype.type(0))
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(got, want, strict=True))


def checked(
    x: Array, out: Array, dtype: str, direction: Direction, variants: Sequence[Variant]
) -> tuple[Section, dict[str, Callable[[], Any]]]:
    """A section with every variant's result checked, and the calls to time; ours also into new arrays."""
    section = Section(NAME, "ND", x.shape, dtype, x.nbytes, direction, bytes_moved=2 * x.nbytes)
    calls: dict[str, Callable[[], Any]] = {}
    for variant in (each for each in variants if computes(each, dtype)):
        bound = {label: bind(variant, x, direction, out if reuse else None) for label, reuse in variant.labels.items()}
        out.fill(0)
        errors = [error(variant, x, call()) for call in bound.values()]
        row = Row(variant.label, variant.name, variant.backend, error=max(errors), tolerance=0.0)
        row.correct = row.error == 0
        section.rows.append(row)
        calls |= bound
    return section, calls


def add_to(report: Report, size: int, dtypes: Sequence[str], variants: Sequence[Variant], *, seconds: float) -> None:
    """Measure forward and backward in each dtype, each timed for about so many seconds."""

    def parts() -> Iterator[Part]:
        for dtype in dtypes:
            x = values(sizes(size, dtype), dtype)
            out = np.zeros_like(x)
            own = [variant for variant in variants if computes(variant, dtype)]
            for direction in DIRECTIONS:
                yield f"{NAME} {dtype}, {direction}", partial(_section, x, out, dtype, direction, own, seconds)

    add_beside(report, report.dropout, parts(), len(dtypes) * len(DIRECTIONS))


def _section(
    x: Array, out: Array, dtype: str, direction: Direction, variants: Sequence[Variant], seconds: float
) -> Section:
    section = Section(NAME, "ND", x.shape, dtype, x.nbytes, direction, bytes_moved=2 * x.nbytes)
    nothing = np.empty(0, x.dtype)
    bound = {
        variant: {label: bind(variant, x, direction, out if reuse else None) for label, reuse in variant.labels.items()}
        for variant in variants
    }
    floor = roof.floor(Inputs(x, nothing, nothing, x), out, "forward")
    return beside(section, bound, floor, lambda variant, got: error(variant, x, got), 0.0, out, seconds=seconds)
