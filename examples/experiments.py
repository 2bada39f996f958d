"""CS231n's normalization experiments: which networks to train, how to draw the outcome, what to print.

An experiment lists its setups; `run_all.py` trains each once for every seed and hands the histories to `draw`
and `table`. A value is the median over the seeds, a band runs from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from network import Array, Norm
from training import History, Setup

NAMES: dict[Norm, str] = {"none": "no normalization", "batchnorm": "BatchNorm", "layernorm": "LayerNorm"}
COLOURS: dict[Norm, str] = {"none": "#6b7280", "batchnorm": "#1d5fd1", "layernorm": "#d2600c"}
PLAIN_OR_BATCH: tuple[Norm, ...] = ("none", "batchnorm")
BATCH_OR_LAYER: tuple[Norm, ...] = ("batchnorm", "layernorm")
INK, PALE = "#1f2933", "#e3e6ea"

Results = dict[Setup, History]
Table = tuple[list[str], list[list[str]]]


class Extent(NamedTuple):
    """How much to train."""

    seeds: tuple[int, ...]
    scales: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    epochs: int


FULL = Extent((0, 1, 2), tuple(np.logspace(-4, 0, 20).tolist()), (2, 5, 10, 50), 10)
QUICK = Extent((0,), (1e-3, 1e-1), (10, 50), 4)


class Experiment(NamedTuple):
    """One question, one picture, one table."""

    name: str
    question: str
    setups: Callable[[Extent], list[Setup]]
    draw: Callable[[Results, Extent], Figure]
    table: Callable[[Results, Extent], Table]


def seeded(setups: Iterable[Setup], extent: Extent) -> list[Setup]:
    """Every setup with every seed."""
    return [replace(setup, seed=seed) for setup in setups for seed in extent.seeds]


def histories(results: Results, setup: Setup, extent: Extent) -> History:
    """The histories of a setup, stacked: arrays of (seeds, epochs)."""
    return History(*(np.stack(curves) for curves in zip(*(results[s] for s in seeded([setup], extent)), strict=True)))


def median(values: Array) -> float:
    """The median over the seeds."""
    return float(np.median(values))


# ---- drawing ----------------------------------------------------------------------------------------


def canvas(columns: int, *, height: float = 3.5, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A row of panels in the common style."""
    spacing = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06, wspace=0.03)
    figure = Figure(figsize=(10.5, height), layout=spacing, facecolor="white")
    panels = list(figure.subplots(1, columns, sharey=sharey, squeeze=False)[0])
    for axes in panels:
        axes.grid(True, axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa5b1")
        axes.tick_params(colors=INK, labelsize=9, length=0, pad=5)
    return figure, panels


def heading(axes: Axes, text: str) -> None:
    """A panel's title, flush left above it."""
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=9)


def under(axes: Axes, text: str) -> None:
    """What the horizontal axis shows."""
    axes.set_xlabel(text, fontsize=9, color=INK, labelpad=5)


def curve(axes: Axes, x: Array, values: Array, norm: Norm, marker: str | None = None) -> None:
    """The median of (seeds, len(x)) values as a line, their range as a band."""
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=COLOURS[norm], alpha=0.16, linewidth=0)
    axes.plot(
        x, np.median(values, axis=0), color=COLOURS[norm], label=NAMES[norm],
        linewidth=2, marker=marker, markersize=4.5, solid_capstyle="round", zorder=3 if norm == "none" else 4,
    )  # fmt: skip


def legend(figure: Figure, axes: Axes, extent: Extent) -> None:
    """One legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    if len(extent.seeds) > 1:
        handles.append(Line2D([], [], color="none"))
        labels.append(f"line: median of {len(extent.seeds)} seeds, band: their range")
    box = figure.legend(
        handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10, labelcolor=INK
    )
    if len(extent.seeds) > 1:
        box.get_texts()[-1].set(fontsize=9, color=COLOURS["none"])


def percent(axes: Axes, low: float = 0.0) -> None:
    """A vertical axis of accuracies."""
    axes.set_ylim(low, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def per_epoch(axes: Axes, epochs: int) -> None:
    """A horizontal axis of epochs."""
    axes.set_xlim(1 - 0.03 * epochs, epochs * 1.03)
    axes.set_xticks([1, *range(5, epochs, 5), epochs])
    under(axes, "epoch")


def log_loss(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


# ---- with and without BatchNorm -------------------------------------------------------------------


def depth_setups(extent: Extent) -> list[Setup]:
    return [Setup(norm=norm, hidden=(100,) * 5, epochs=extent.epochs + 5) for norm in NAMES]


def depth_draw(results: Results, extent: Extent) -> Figure:
    figure, panels = canvas(3)
    for setup in depth_setups(extent):
        epochs = np.arange(1, setup.epochs + 1)
        for axes, values in zip(panels, histories(results, setup, extent), strict=True):
            curve(axes, epochs, values, setup.norm)
            per_epoch(axes, setup.epochs)
    for axes, text in zip(panels, ("Training loss", "Training accuracy", "Validation accuracy"), strict=True):
        heading(axes, text)
    log_loss(panels[0])
    percent(panels[1])
    percent(panels[2])
    legend(figure, panels[0], extent)
    return figure


def depth_table(results: Results, extent: Extent) -> Table:
    rows = []
    for setup in depth_setups(extent):
        loss, train, val = histories(results, setup, extent)
        reached = median(
            np.array([np.argmax(of_seed > 0.9) + 1 if (of_seed > 0.9).any() else np.inf for of_seed in val])
        )
        rows.append(
            [
                NAMES[setup.norm],
                f"{median(loss[:, -1]):.3f}",
                f"{median(train[:, -1]):.1%}",
                f"{median(val.max(axis=1)):.1%}",
                f"{reached:.0f}" if np.isfinite(reached) else f"over {setup.epochs}",
            ]
        )
    return ["layers", "final loss", "final training accuracy", "best validation accuracy", "epochs to 90%"], rows


# ---- over the scale of the initial weights --------------------------------------------------------


def scales_setups(extent: Extent) -> list[Setup]:
    return [
        Setup(norm=norm, hidden=(50,) * 7, weight_scale=scale, epochs=extent.epochs)
        for norm in PLAIN_OR_BATCH
        for scale in extent.scales
    ]


def scales_values(results: Results, extent: Extent, norm: Norm) -> tuple[Array, Array, Array]:
    """Best validation accuracy, best training accuracy, final loss: arrays of (seeds, scales)."""
    of_scales = [histories(results, s, extent) for s in scales_setups(extent) if s.norm == norm]
    return (
        np.stack([h.val_accuracy.max(axis=1) for h in of_scales], axis=1),
        np.stack([h.train_accuracy.max(axis=1) for h in of_scales], axis=1),
        np.stack([h.loss[:, -1] for h in of_scales], axis=1),
    )


def scales_draw(results: Results, extent: Extent) -> Figure:
    figure, panels = canvas(3)
    for norm in PLAIN_OR_BATCH:
        for axes, values in zip(panels, scales_values(results, extent, norm), strict=True):
            curve(axes, np.array(extent.scales), values, norm, marker="o")
    for axes, text in zip(
        panels, ("Best validation accuracy", "Best training accuracy", "Final training loss"), strict=True
    ):
        heading(axes, text)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        under(axes, "standard deviation of the initial weights")
    percent(panels[0])
    percent(panels[1])
    log_loss(panels[2])
    legend(figure, panels[0], extent)
    return figure


def scales_table(results: Results, extent: Extent) -> Table:
    rows = []
    for norm in PLAIN_OR_BATCH:
        val, _, loss = (np.median(v, axis=0) for v in scales_values(results, extent, norm))
        good = [scale for scale, accuracy in zip(extent.scales, val, strict=True) if accuracy > 0.9]
        best = int(np.argmax(val))
        rows.append(
            [
                NAMES[norm],
                f"{len(good)} of {len(extent.scales)}",
                f"{min(good):.2g} to {max(good):.2g}" if good else "none",
                f"{val[best]:.1%} at {extent.scales[best]:.2g}",
                f"{val.min():.1%}",
                f"{loss.min():.3g} to {loss.max():.3g}",
            ]
        )
    header = ["layers", "scales above 90%", "which", "best validation accuracy", "worst", "final loss"]
    return header, rows


# ---- over batch sizes -----------------------------------------------------------------------------


def batch_setups(extent: Extent, norms: tuple[Norm, ...], sizes: Iterable[int]) -> list[Setup]:
    return [
        Setup(norm=norm, hidden=(100,) * 5, batch_size=size, epochs=extent.epochs, rate=10**-3.5)
        for size in sizes
        for norm in norms
    ]


def batch_draw(results: Results, extent: Extent, norms: tuple[Norm, ...], sizes: list[int]) -> Figure:
    figure, panels = canvas(len(sizes), sharey=True)
    epochs = np.arange(1, extent.epochs + 1)
    for axes, size in zip(panels, sizes, strict=True):
        for setup in batch_setups(extent, norms, [size]):
            curve(axes, epochs, histories(results, setup, extent).val_accuracy, setup.norm)
        heading(axes, f"Batches of {size}")
        per_epoch(axes, extent.epochs)
        percent(axes)
    panels[0].set_ylabel("validation accuracy", fontsize=9, color=INK)
    legend(figure, panels[0], extent)
    return figure


def batch_table(results: Results, extent: Extent, norms: tuple[Norm, ...], sizes: list[int]) -> Table:
    rows = []
    for setup in batch_setups(extent, norms, sizes):
        loss, _, val = histories(results, setup, extent)
        rows.append(
            [
                f"{setup.batch_size}",
                NAMES[setup.norm],
                f"{median(val[:, 0]):.1%}",
                f"{median(val.max(axis=1)):.1%}",
                f"{median(loss[:, -1]):.3f}",
            ]
        )
    header = ["batch size", "layers", "validation accuracy, epoch 1", "best validation accuracy", "final loss"]
    return header, rows


def course_sizes(extent: Extent) -> list[int]:
    """The batch sizes of CS231n: without 2."""
    return [size for size in extent.batch_sizes if size > 2]


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "with-and-without",
            "Five hidden layers, with and without normalization",
            depth_setups,
            depth_draw,
            depth_table,
        ),
        Experiment(
            "weight-scales",
            "Seven hidden layers, over the scale of the initial weights",
            scales_setups,
            scales_draw,
            scales_table,
        ),
        Experiment(
            "batch-sizes",
            "With and without BatchNorm, over batch sizes",
            lambda extent: batch_setups(extent, PLAIN_OR_BATCH, course_sizes(extent)),
            lambda results, extent: batch_draw(results, extent, PLAIN_OR_BATCH, course_sizes(extent)),
            lambda results, extent: batch_table(results, extent, PLAIN_OR_BATCH, course_sizes(extent)),
        ),
        Experiment(
            "batch-or-layer",
            "BatchNorm against LayerNorm, over batch sizes",
            lambda extent: batch_setups(extent, BATCH_OR_LAYER, extent.batch_sizes),
            lambda results, extent: batch_draw(results, extent, BATCH_OR_LAYER, list(extent.batch_sizes)),
            lambda results, extent: batch_table(results, extent, BATCH_OR_LAYER, list(extent.batch_sizes)),
        ),
    )
}
