"""Statistics and what stands on them, beside the normalizations: each checked and timed by itself.

    moments     of each column                                     moves x
    weighted    the same with a weight a row                       moves x
    normalize   with statistics that are there                     moves x and out
    chunks      BatchNorm of a batch in CHUNKS chunks, both ways   moves what BatchNorm moves

The floor is that of reading x, of a copy, of an addition. A batch in chunks is read twice each way: beyond the cache
two thirds of its floor forward, and 0.6 backward, are all that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastnorm
from fastnorm._layout import FLOAT64, accumulation_dtype
from fastnorm.backends import Array
from fastnorm.bench import check, dropout, roof
from fastnorm.bench.cases import OPS, Case, Direction, Inputs, dtype_of
from fastnorm.bench.run import Part, Report, Section, add_beside, beside
from fastnorm.bench.tolerances import scaled_tolerance
from fastnorm.bench.variants import Variant

CHUNKS = 4


class Piece(NamedTuple):
    name: str
    direction: Direction
    arrays: int
    """Of x's size that it moves."""

    @property
    def writes(self) -> bool:
        return self.arrays > 1

    def computes(self, variant: Variant) -> bool:
        """fastnorm's backends; weights are for host memory alone. (The peers are in bench/against_pytorch.py.)"""
        return variant.name == "fused" and (self.name, variant.backend) != ("weighted", "cuda")


PIECES = (
    Piece("moments", "forward", 1),
    Piece("weighted", "forward", 1),
    Piece("normalize", "forward", 2),
    Piece("chunks", "forward", 2),
    Piece("chunks", "backward", 3),
)
NAMES = tuple(dict.fromkeys(piece.name for piece in PIECES))


def bind(piece: Piece, inputs: Inputs, backend: str | None, out: Array | None = None) -> Callable[[], Any]:
    """The call to check and to time."""
    x, gamma, beta, dout = inputs
    if piece.name == "moments":
        return lambda: fastnorm.moments(x, 0, backend=backend)
    if piece.name == "weighted":
        weights = _weights(x)
        return lambda: fastnorm.moments(x, 0, weights=weights, backend=backend)
    if piece.name == "normalize":
        _, mean, var = fastnorm.moments(x, 0, backend=backend)
        return lambda: fastnorm.normalize(x, mean, var, gamma, beta, out=out, backend=backend)
    chunks, grads = np.array_split(x, CHUNKS), np.array_split(dout, CHUNKS)
    outs = None if out is None else np.array_split(out, CHUNKS)
    if piece.direction == "forward":
        return lambda: fastnorm.batchnorm_forward(chunks, gamma, beta, out=outs, backend=backend)[0]
    _, cache = fastnorm.batchnorm_forward(chunks, gamma, beta, backend=backend)
    return lambda: fastnorm.batchnorm_backward(grads, cache, out=outs, backend=backend)


def _weights(x: Array) -> Array:
    return np.random.default_rng(0).random((len(x), 1), np.float32)


def error(piece: Piece, case: Case, got: Any, want: tuple[Array, ...]) -> float:
    """The largest deviation from the reference, scaled to values of 1."""
    if piece.name == "chunks":
        parts, *sums = (got,) if piece.direction == "forward" else got
        return check.error(case, (np.concatenate(parts), *sums), want)
    if piece.name == "normalize":
        return check.error(case, (got,), want)
    return float(
        np.max([np.max(np.abs(one - other) / (1 + np.abs(other))) for one, other in zip(got, want, strict=True)])
    )


def _reference(piece: Piece, case: Case, inputs: Inputs) -> tuple[Array, ...]:
    if not piece.writes:
        return tuple(bind(piece, inputs, "numpy")())
    return check.reference(case, inputs, piece.direction)  # normalize of a batch's own statistics is its forward


def _tolerance(piece: Piece, case: Case) -> float:
    if piece.writes:
        return check.tolerance(case, exact=True)
    return scaled_tolerance(FLOAT64, accumulation_dtype(dtype_of(case.dtype)), case.reduction, exact=True)


def _case(size: int, dtype: str) -> Case:
    """A batch as large as dropout's, of a row a chunk at least."""
    rows, columns = dropout.sizes(size, dtype)
    return Case(OPS["batchnorm"], OPS["batchnorm"].layout("ND"), (max(CHUNKS, rows), columns), dtype)


def add_to(
    report: Report,
    size: int,
    dtypes: Sequence[str],
    names: Sequence[str],
    variants: Sequence[Variant],
    *,
    seconds: float,
) -> None:
    """Measure the pieces of these names in each dtype, each timed for about so many seconds."""
    chosen = [piece for piece in PIECES if piece.name in names]

    def parts() -> Iterator[Part]:
        for dtype in dtypes:
            case = _case(size, dtype)
            inputs, out = case.inputs(), case.empty()
            for piece in chosen:
                name = f"{piece.name} {dtype}, {piece.direction}"
                yield name, partial(_section, piece, case, inputs, out, variants, seconds)

    add_beside(report, report.pieces, parts(), len(dtypes) * len(chosen))


def _section(
    piece: Piece, case: Case, inputs: Inputs, out: Array, variants: Sequence[Variant], seconds: float
) -> Section:
    section = Section(
        piece.name, "ND", case.shape, case.dtype, case.nbytes, piece.direction, bytes_moved=piece.arrays * case.nbytes
    )
    bound = {
        variant: {
            label: bind(piece, inputs, variant.backend, out if reuse else None)
            for label, reuse in variant.labels.items()
            if reuse or piece.writes
        }
        for variant in variants
        if piece.computes(variant)
    }
    floor = roof.floor(inputs, out, piece.direction) if piece.writes else roof.reading(inputs.x)
    want = _reference(piece, case, inputs)
    return beside(
        section,
        bound,
        floor,
        lambda _, got: error(piece, case, got, want),
        _tolerance(piece, case),
        out,
        seconds=seconds,
    )
