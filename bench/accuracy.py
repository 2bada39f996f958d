"""Errors of ours and of the peers as the data's mean grows over its spread: tables and picture of docs/accuracy.md.

python bench/accuracy.py [--dtype NAME] [--plot PREFIX]

x is normal with spread 1 around each of the means. Every result is compared with float64 arithmetic on the same
rounded x: the largest |got - want| / (1 + |want|), that of sums of n terms over sqrt(n) + |want|, over the output of a
forward, or dx, dgamma and dbeta of a backward (`fastnorm.bench.check.error`). PyTorch's operators and its compiler,
oneDNN and JAX take part where they are installed (fastnorm/bench/peers.py); of ours the C++ and the Numba backend,
and the textbook graph in NumPy. With PREFIX the forwards are drawn, as PREFIX.png.

Not for float64: that needs a truth that is wider. tests/test_numerics.py has one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fastnorm.backends import Array
from fastnorm.bench import check
from fastnorm.bench.cases import DIRECTIONS, OPS, Case, Direction, Inputs, Shape
from fastnorm.bench.peers import PEERS
from fastnorm.bench.variants import Variant

CASES: tuple[tuple[str, str, Shape], ...] = (
    ("batchnorm", "ND", (4096, 64)),
    ("batchnorm", "NCHW", (16, 64, 28, 28)),
    ("layernorm", "ND", (256, 1024)),
    ("groupnorm", "NCHW", (8, 64, 28, 28)),
    ("instancenorm", "NCHW", (8, 64, 28, 28)),
)
MEANS = {
    "float16": (0, 10, 100),
    "bfloat16": (0, 10),  # beyond, its eight bits have nothing left of the spread
    "float32": (0, 10, 100, 1_000, 10_000, 100_000, 1_000_000),
}
VARIANTS = (
    Variant("fused", "cpp"), Variant("fused", "numba"), Variant("torch"), Variant("torch compile"), Variant("onednn"),
    Variant("jax"), Variant("staged"),
)  # fmt: skip


def around(case: Case, mean: float) -> Inputs:
    inputs = case.inputs(offset=0.0)
    x = inputs.x.astype(np.float32)
    x /= x.std(axis=case.reduced_axes, keepdims=True)
    x += mean
    return inputs._replace(x=x.astype(inputs.x.dtype))


def error(case: Case, direction: Direction, inputs: Inputs, want: tuple[Array, ...], variant: Variant) -> float | None:
    if not variant.computes(case, direction):
        return None
    call = variant.bind(case, inputs, direction)
    with np.errstate(all="ignore"):
        return check.error(case, call.arrays(call.run()), want)


def label(variant: Variant) -> str:
    return {"fused": f"fastnorm {variant.backend}", "staged": "NumPy"}.get(variant.name) or PEERS[variant.name].label


def table(direction: Direction, cases: list[Case], variants: list[Variant]) -> dict[tuple[str, str], list[float]]:
    """Prints the errors; returns them by case and variant, one for each mean."""
    names = [label(each) for each in variants]
    print(f"| {direction} | mean / spread | {' | '.join(names)} |")
    print(f"| --- | ---: |{' ---: |' * len(names)}")
    columns: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        for mean in MEANS[case.dtype]:
            inputs = around(case, mean)
            want = check.reference(case, inputs, direction)
            found = [error(case, direction, inputs, want, each) for each in variants]
            cells = ["-" if each is None else f"{each:.0e}" for each in found]
            print(f"| {title(case)} | {mean:,} | {' | '.join(cells)} |", flush=True)
            for name, each in zip(names, found, strict=True):
                if each is not None:
                    columns.setdefault((title(case), name), []).append(each)
    print()
    return columns


def title(case: Case) -> str:
    return f"{case.op.title} {case.label}".replace(" ND", "")


COLOURS = {
    "fastnorm cpp": "#0072b2", "fastnorm numba": "#009e73", "PyTorch": "#d55e00", "torch.compile": "#e69f00",
    "oneDNN": "#56b4e9", "JAX": "#cc79a7", "NumPy": "#999999",
}  # fmt: skip


def draw(columns: dict[tuple[str, str], list[float]], means: tuple[int, ...], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(name for name, _ in columns))[1:4]
    figure, panels = pyplot.subplots(1, len(titles), figsize=(11, 3.8), sharey=True, layout="constrained")
    for panel, name in zip(panels, titles, strict=True):
        for who, colour in COLOURS.items():
            if (name, who) in columns:
                panel.plot(means, columns[name, who], color=colour, label=who, marker="o", markersize=3)
        panel.set_xscale("symlog", linthresh=10)
        panel.set_yscale("log")
        panel.set_title(name, loc="left", fontsize=10, fontweight="bold")
        panel.set_xlabel("mean / spread of the data")
        panel.grid(color="#e6e6e6")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("largest error of the output, float32")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=list(MEANS))
    parser.add_argument("--plot", metavar="PREFIX", type=Path)
    options = parser.parse_args()
    variants = [each for each in VARIANTS if each.name not in PEERS or PEERS[each.name].installed()]
    cases = [Case(OPS[op], OPS[op].layout(layout), shape, options.dtype) for op, layout, shape in CASES]
    for direction in DIRECTIONS:
        columns = table(direction, cases, variants)
        if options.plot and direction == "forward":
            draw(columns, MEANS[options.dtype], options.plot.with_suffix(".png"))


if __name__ == "__main__":
    main()
