"""PyTorch's time over ours for every op but BatchNorm and LayerNorm, from 4x8 to 16 MB, and what is slower.

python bench/against_pytorch.py [--op NAME,...] [--dtype NAME,...] [--only REGEX]
python bench/against_pytorch.py --drawn COUNT [--seed SEED] [the same options]

The first sweeps a table of shapes. Kernels that are tuned on a table get good at the table: the second draws so many
contests, of normalizations with BatchNorm and LayerNorm among them, of any shape up to 64 MB.

The public functions with the C++ backend on as many threads as PyTorch, both into new arrays, in bursts of one after
the other so that data stay in the cache. The peers are those of `python -m fastnorm bench` (fastnorm/bench/peers.py):
GroupNorm's backward is the operator that autograd calls, without the graph; `moments` meets `torch.var_mean`, with
weights (`weighted`) two passes by hand, and `normalize` BatchNorm in test mode. A line has microseconds of ours and of
theirs and the ratio, by minima and by medians; those below 1 by minima stand together at the end, and make the exit
status 1. What other programs disturbed is timed again, and says so where that did not help.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import fastnorm
from fastnorm.bench import dropout, machine, measure
from fastnorm.bench.cases import DIRECTIONS, DTYPES, OPS, Case, Direction, Shape, dtype_of
from fastnorm.bench.run import DISTURBED
from fastnorm.bench.variants import Variant

OURS, THEIRS = Variant("fused", "cpp"), Variant("torch")
ATTEMPTS = 3
LARGEST = 16 << 20
"""Bytes of x. Beyond the cache is `python -m fastnorm bench --targets`."""

IMAGES: tuple[Shape, ...] = (
    (4, 8, 1, 1), (4, 8, 2, 2), (2, 32, 4, 4), (64, 8, 4, 4), (4, 64, 8, 8), (8, 64, 7, 7), (1000, 32, 2, 2),
    (2, 256, 14, 14), (1, 64, 56, 56), (32, 512, 4, 4), (2, 320, 32, 32), (16, 512, 7, 7), (4, 64, 56, 56),
    (1, 1280, 32, 32), (16, 512, 14, 14), (8, 64, 56, 56), (1, 320, 64, 64), (32, 1280, 8, 8), (1, 32, 256, 256),
    (1, 64, 256, 256), (8, 32, 112, 112), (4, 256, 56, 56), (16, 1024, 14, 14),
)  # fmt: skip
SEQUENCES: tuple[Shape, ...] = ((4, 64, 50), (16, 256, 100), (2, 512, 2000))
BATCHES: tuple[Shape, ...] = ((4, 8), (64, 256), (256, 512), (4096, 512))
ROWS: tuple[Shape, ...] = (
    (4, 8), (1, 4096), (100, 50), (64, 256), (32, 1024), (2048, 64), (256, 1024), (16, 16384), (1024, 1024),
    (65536, 64), (4096, 768), (1000, 4096),
)  # fmt: skip
GROUPED = {"NCHW": IMAGES, "NHWC": IMAGES, "NCL": SEQUENCES, "ND": BATCHES}
SHAPES = {
    "groupnorm": GROUPED,
    "instancenorm": {"NCHW": IMAGES, "NHWC": IMAGES, "NCL": SEQUENCES},
    "rmsnorm": {"ND": ROWS},
}
DRAWN = {
    "batchnorm": ("ND", "NCHW", "NHWC"),
    "layernorm": ("ND",),
    **{op: tuple(layouts) for op, layouts in SHAPES.items()},
}
"""What contests are drawn from: every op as often as any other, of it every layout."""
DRAWN_LARGEST = 64 << 20
STATISTICS = ("moments", "weighted", "normalize")
NAMES = (*SHAPES, dropout.NAME, *STATISTICS)

Call = Callable[[], Any]


class Contest(NamedTuple):
    name: str
    bind: Callable[[], tuple[Call, Call]]
    """Makes the inputs, and the calls of ours and of PyTorch."""


def contests(ops: list[str], dtypes: list[str]) -> Iterator[Contest]:
    for op in ops:
        for dtype in dtypes:
            if op in SHAPES:
                yield from _normalizations(op, dtype)
            elif op in STATISTICS:
                yield from _statistics(op, dtype)
            else:
                yield from _dropout(dtype)


def _normalizations(op: str, dtype: str) -> Iterator[Contest]:
    for layout, shapes in SHAPES[op].items():
        for shape in shapes:
            case = Case(OPS[op], OPS[op].layout(layout), shape, dtype)
            if case.nbytes > LARGEST or not THEIRS.computes(case, "forward"):
                continue
            yield from (_normalization(case, direction) for direction in DIRECTIONS)


def _normalization(case: Case, direction: Direction) -> Contest:
    def bind() -> tuple[Call, Call]:
        inputs = case.inputs()
        return OURS.bind(case, inputs, direction).run, THEIRS.bind(case, inputs, direction).run

    return Contest(f"{case} {direction}", bind)


def drawn(ops: list[str], dtypes: list[str], seed: int) -> Iterator[Contest]:
    """Normalizations without end. Each axis is drawn alike over the logarithm of its length; half of the tables and of
    the images have powers of two; of the channels of the others, half are a multiple of 8."""
    draw = random.Random(seed)

    def length(least: int, most: int, power: bool = False) -> int:
        exponent = draw.uniform(math.log2(least), math.log2(most))
        return round(2 ** (round(exponent) if power else exponent))

    def channels(most: int) -> int:
        return 8 * length(1, most // 8) if draw.random() < 0.5 else length(2, most)

    def shape(layout: str) -> Shape:
        power = draw.random() < 0.5
        if layout == "ND":
            return length(4, 65536, power), length(8, 16384, power)
        if layout == "NCL":
            return length(1, 64), channels(1024), length(4, 4096)
        side = length(1, 128, power)
        return length(1, 256), 8 * length(1, 256, power) if power else channels(2048), side, side

    while True:
        op = OPS[draw.choice(ops)]
        layout = op.layout(draw.choice(DRAWN[op.name]))
        case = Case(op, layout, shape(layout.label), draw.choice(dtypes))
        if case.nbytes <= DRAWN_LARGEST and case.reduction > 1 and THEIRS.computes(case, "forward"):
            yield _normalization(case, draw.choice(DIRECTIONS))


def _dropout(dtype: str) -> Iterator[Contest]:
    if not dropout.computes(THEIRS, dtype):
        return
    for shape in (*ROWS, (4096, 1024)):
        rows, columns = shape
        for direction in DIRECTIONS:

            def bind(rows: int = rows, columns: int = columns, direction: Any = direction) -> tuple[Call, Call]:
                x = dropout.values((rows, columns), dtype)
                return dropout.bind(OURS, x, direction), dropout.bind(THEIRS, x, direction)

            yield Contest(f"dropout {rows}x{columns} {dtype} {direction}", bind)


def _statistics(op: str, dtype: str) -> Iterator[Contest]:
    """Over rows, columns, everything, the channels of images of both layouts, and axes that lie apart in memory."""
    if dtype == "bfloat16":  # PyTorch's tensors do not share it with NumPy's arrays without a detour
        return
    kinds: list[tuple[str, str, tuple[Shape, ...], tuple[int, ...]]] = [("columns", "ND", ROWS, (0,))]
    if op != "normalize":
        kinds += [("rows", "ND", ROWS, (1,)), ("all", "ND", ROWS, (0, 1))]
    kinds += [("NCHW", "NCHW", IMAGES, (0, 2, 3)), ("NHWC", "NHWC", IMAGES, (0, 2, 3))]
    if op == "moments":
        kinds += [("instances", "NHWC", IMAGES, (2, 3)), ("columns of images", "NCHW", IMAGES, (0, 2))]
    for kind, layout, shapes, axes in kinds:
        for shape in shapes:
            if np.prod(shape) * dtype_of(dtype).itemsize > LARGEST or shape[0] == 1:
                continue

            def bind(layout: str = layout, shape: Shape = shape, axes: tuple[int, ...] = axes) -> tuple[Call, Call]:
                torch: Any = importlib.import_module("torch")
                torch.set_num_threads(fastnorm.get_num_threads())
                x = Case(OPS["batchnorm"], OPS["batchnorm"].layout(layout), shape, dtype).inputs().x
                tensor = torch.from_numpy(x)
                if op == "moments":
                    return (
                        lambda: fastnorm.moments(x, axes, backend="cpp"),
                        lambda: torch.var_mean(tensor, axes, correction=0),
                    )
                if op == "weighted":  # one weight a position, all channels alike
                    among = [n if axis in axes else 1 for axis, n in enumerate(shape)]
                    weights = np.random.default_rng(0).random(among).astype(np.float32)
                    return (
                        lambda: fastnorm.moments(x, axes, weights=weights, backend="cpp"),
                        lambda: _weighted_by_hand(tensor, torch.from_numpy(weights), axes),
                    )
                _, mean, var = fastnorm.moments(x, axes, keepdims=True, backend="cpp")
                statistics = [torch.from_numpy(each.reshape(-1).astype(np.float32)) for each in (mean, var)]
                return (
                    lambda: fastnorm.normalize(x, mean, var, backend="cpp"),
                    lambda: torch.nn.functional.batch_norm(tensor, *statistics),
                )

            yield Contest(f"{op} {kind} {'x'.join(map(str, shape))} {dtype}", bind)


def _weighted_by_hand(x: Any, weights: Any, axes: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """PyTorch has no moments with weights: in two passes, as one would write them."""
    count = weights.sum(axes, keepdim=True)
    mean = (weights * x).sum(axes, keepdim=True) / count
    return count, mean, (weights * (x - mean) ** 2).sum(axes, keepdim=True) / count


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", help=f"of {', '.join(NAMES)}, drawn ones of {', '.join(DRAWN)} (default all)")
    parser.add_argument("--dtype", default="float32,bfloat16,float16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--only", default="", metavar="REGEX", help="contests in whose name it is found")
    parser.add_argument("--drawn", type=int, metavar="COUNT", help="so many contests drawn at random, not the table's")
    parser.add_argument("--seed", type=int, default=0, help="of those drawn (default 0)")
    options = parser.parse_args()
    names, dtypes = NAMES if options.drawn is None else tuple(DRAWN), options.dtype.split(",")
    ops = options.op.split(",") if options.op else list(names)
    if unknown := [op for op in ops if op not in names]:
        parser.error(f"--op: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    all_contests = contests(ops, dtypes) if options.drawn is None else drawn(ops, dtypes, options.seed)
    slower, count = [], 0
    for contest in itertools.islice(all_contests, options.drawn):
        if not re.search(options.only, contest.name):
            continue
        count += 1
        ours, theirs = contest.bind()
        for _ in range(ATTEMPTS):
            others = machine.OtherPrograms()
            found = measure.bursts({"ours": ours, "theirs": theirs})
            if not (disturbed := others.cpus() > DISTURBED):
                break
        best, median = (getattr(found["theirs"], which) / getattr(found["ours"], which) for which in ("best", "median"))
        times = "".join(f"{found[who].best * 1e6:10.1f}" for who in ("ours", "theirs"))
        line = f"{contest.name:58}{times}{best:8.2f}{median:8.2f}{'  disturbed' * disturbed}"
        print(line, flush=True)
        if best < 1:
            slower.append((best, line))
    print(f"\n{len(slower)} of {count} slower than PyTorch")
    for _, line in sorted(slower):
        print(line)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
