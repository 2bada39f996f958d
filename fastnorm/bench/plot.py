"""The report as a picture: each variant's share of the memory floor, by case."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fastnorm.bench import machine
from fastnorm.bench.cases import DIRECTIONS, OPS
from fastnorm.bench.run import Report, Row, Section
from fastnorm.bench.table import milliseconds

# Okabe and Ito's palette, which colour-blind readers can tell apart: greys for the baselines in NumPy.
_STYLES = {
    "staged": ("#b8b8b8", "staged (NumPy graph)"),
    "alt": ("#7d7d7d", "alt (NumPy closed form)"),
    "torch": ("#d55e00", "PyTorch"),
    "jax": ("#cc79a7", "JAX"),
    "fused numpy": ("#e69f00", "fused, NumPy reference backend"),
    "fused numba": ("#009e73", "fused, Numba"),
    "fused cpp": ("#0072b2", "fused, C++"),
}
_ORDER = list(_STYLES)
_INK, _MUTED, _GRID, _WRONG = "#222222", "#666666", "#e6e6e6", "#c00000"
_LONGEST = 1.25
"""Where bars are cut: small arrays stay in a cache, and a disturbed floor can be slow."""
_BAR, _GAP = 1.0, 1.3
"""Height of a bar, and of the space between groups."""


def draw(report: Report, prefix: Path) -> list[Path]:
    """Write PREFIX.png and PREFIX.svg. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(report)
    bars = sum(_height(pair) for pair in groups)
    settings: Any = {"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "fastnorm", "text.color": _INK}
    with pyplot.rc_context(settings):
        size = (10.0, 2.0 + 0.185 * bars)
        figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, squeeze=False)
        _arrange(figure, size)
        for index, (panel, direction) in enumerate(zip(axes[0], ("forward", "backward"), strict=True)):
            _panel(panel, [pair[index] for pair in groups], [_height(pair) for pair in groups])
            panel.set_title(direction.capitalize(), loc="left", fontsize=10, fontweight="bold", pad=8)
        _label_groups(axes[0][0], groups)
        _headings(figure, report, size)
        paths = [prefix.with_name(prefix.name + ending) for ending in (".png", ".svg")]
        figure.savefig(paths[0], dpi=200)
        figure.savefig(paths[1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def _groups(report: Report) -> list[tuple[Section, Section]]:
    """(forward, backward) of each case."""
    return list(zip(report.sections[::2], report.sections[1::2], strict=True))


def _shown(section: Section) -> list[Row]:
    known = [row for row in section.rows if row.best is not None]
    return sorted(known, key=lambda row: _ORDER.index(row.variant) if row.variant in _STYLES else -1)


def _height(pair: tuple[Section, Section]) -> float:
    return max(len(_shown(section)) for section in pair) * _BAR + _GAP


def _arrange(figure: Any, size: tuple[float, float]) -> None:
    width, height = size
    figure.subplots_adjust(
        left=1.45 / width, right=1 - 0.3 / width, top=1 - 1.05 / height, bottom=0.85 / height, wspace=0.1
    )


def _panel(axes: Any, sections: list[Section], heights: list[float]) -> None:
    top = 0.0
    largest = max((row.share_of_floor or 0.0 for section in sections for row in section.rows), default=0.0)
    limit = min(max(1.0, largest), _LONGEST)
    for section, height in zip(sections, heights, strict=True):
        for index, row in enumerate(_shown(section)):
            assert row.best is not None
            assert row.share_of_floor is not None
            colour, _ = _STYLES.get(row.variant, (_MUTED, row.variant))
            y = top + (index + 0.5) * _BAR
            share = min(row.share_of_floor, limit)
            axes.barh(y, share, height=0.82 * _BAR, color=colour, linewidth=0, zorder=2)
            text = f"{milliseconds(row.best)} ms"
            if row.share_of_floor > limit:
                text += f" ({row.share_of_floor:.1f})"
            if not row.correct:
                text += "  WRONG"
            inside = share > 1.0 - 0.16 * limit  # else the label would reach the floor line
            end = min(share, 1.0) if inside else share
            axes.annotate(
                text, (end, y), (-4 if inside else 4, 0), textcoords="offset points",
                ha="right" if inside else "left", va="center_baseline", fontsize=7.5, zorder=4,
                color="white" if inside else _MUTED if row.correct else _WRONG,
            )  # fmt: skip
        top += height
    axes.axvline(1.0, color=_INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=3)
    axes.annotate(
        "memory floor", (1.0, 1.0), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="center", va="bottom", fontsize=7.5, color=_INK,
    )  # fmt: skip
    axes.set_xlim(0, 1.06 * limit)
    axes.set_ylim(top - _GAP + 0.35, -0.35)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    bare = "copying x" if sections[0].direction == "forward" else "adding dout and x"
    axes.set_xlabel(f"share of the memory floor: time of {bare} / time", color=_MUTED, fontsize=8.5)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.tick_params(axis="x", length=0, colors=_MUTED)
    axes.tick_params(axis="y", length=0, labelleft=False)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.axvline(0.0, color=_MUTED, linewidth=0.8, zorder=3)


_LAYOUTS = {"ND": "(N, D)"}


def _label_groups(axes: Any, groups: list[tuple[Section, Section]]) -> None:
    several = len({section.dtype for section, _ in groups}) > 1
    top = 0.0
    for pair in groups:
        section, height = pair[0], _height(pair)
        middle = top + (height - _GAP) / 2
        lines = [
            f"{_LAYOUTS.get(section.layout, section.layout)}  {section.nbytes / 2**20:.0f} MB",
            "×".join(map(str, section.shape)),  # noqa: RUF001
            *([section.dtype] if several else []),
        ]
        for text, shift, style in (
            (OPS[section.op].title, 6, {"fontweight": "bold", "color": _INK, "va": "bottom"}),
            ("\n".join(lines), 4, {"color": _MUTED, "va": "top", "fontsize": 8, "linespacing": 1.35}),
        ):
            axes.annotate(
                text, (0, middle), (-8, shift), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", **style,
            )  # fmt: skip
        top += height


def _headings(figure: Any, report: Report, size: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    width, height = size
    dtypes = ", ".join(dict.fromkeys(section.dtype for section in report.sections))
    where = f"{report.machine['cpu']}, {report.config['threads']} threads, {dtypes}"
    left = 0.2 / width
    figure.text(left, 1 - 0.2 / height, "fastnorm against the memory floor", fontsize=13, fontweight="bold", va="top")
    figure.text(
        left, 1 - 0.47 / height, f"{where}. Floor: {report.floor}, same run. Longer is better; time at the bar.",
        fontsize=8.5, color=_MUTED, va="top",
    )  # fmt: skip
    present = {row.variant for section in report.sections for row in _shown(section)}
    handles = [Patch(color=colour, label=label) for name, (colour, label) in _STYLES.items() if name in present]
    figure.legend(
        handles=handles, ncols=len(handles), loc="lower left", bbox_to_anchor=(left - 0.08 / width, 0.1 / height),
        frameon=False, fontsize=8, handlelength=1.0, handleheight=0.9, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip


# ---- the targets run: share of the floor by size --------------------------------------------------

_PANELS = (
    ("batchnorm", "ND", "BatchNorm (N, D)"),
    ("batchnorm", "NCHW", "BatchNorm NCHW"),
    ("batchnorm", "NHWC", "BatchNorm NHWC"),
    ("layernorm", "ND", "LayerNorm (N, D)"),
)
_LINES = {"fused cpp": "C++", "fused numba": "Numba", "torch": "PyTorch"}
_SMALLEST, _LARGEST = 48 << 10, 340 << 20
_TOP = 1.1


def draw_sizes(report: Report, prefix: Path) -> list[Path]:
    """Write PREFIX.png and PREFIX.svg: a panel for each layout and direction. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = [each for each in report.sections if each.group in ("cache", "large")]
    settings: Any = {"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "fastnorm", "text.color": _INK}
    width, height = 11.0, 6.3
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(2, len(_PANELS), figsize=(width, height), sharex=True, sharey=True)
        figure.subplots_adjust(
            left=0.75 / width, right=1 - 0.2 / width, top=1 - 1.05 / height, bottom=0.8 / height, wspace=0.14,
            hspace=0.1,
        )  # fmt: skip
        for line, direction in zip(axes, DIRECTIONS, strict=True):
            for panel, (op, layout, _) in zip(line, _PANELS, strict=True):
                own = [each for each in sections if (each.op, each.layout, each.direction) == (op, layout, direction)]
                _size_panel(panel, own)
            line[0].set_ylabel(f"{direction}: share of the floor", color=_MUTED, fontsize=8.5)
        for panel in axes.flat:
            _mark_caches(panel, report.machine.get("caches", {}), named=panel in axes[0])
        for panel, (_, _, name) in zip(axes[0], _PANELS, strict=True):
            panel.set_title(name, loc="left", fontsize=9.5, fontweight="bold", pad=14)
        _size_headings(figure, report, (width, height))
        paths = [prefix.with_name(prefix.name + ending) for ending in (".png", ".svg")]
        figure.savefig(paths[0], dpi=200)
        figure.savefig(paths[1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def _mark_caches(axes: Any, caches: dict[str, str], *, named: bool) -> None:
    for name, edge in machine.cache_bytes(caches).items():
        if _SMALLEST < edge < _LARGEST:
            axes.axvline(edge, color=_GRID, linewidth=1.0, zorder=0)
            if named:
                axes.annotate(name, (edge, 1.0), (0, 2), xycoords=("data", "axes fraction"),
                              textcoords="offset points", ha="center", va="bottom", fontsize=7,
                              color=_MUTED)  # fmt: skip


def _size_panel(axes: Any, sections: list[Section]) -> None:
    axes.axhline(1.0, color=_INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    for variant in reversed(_LINES):
        points = [
            (section.nbytes, row.share_of_floor, row.share_of_plan)
            for section in sections
            if (row := section.row(variant)) and row.share_of_floor and row.share_of_plan
        ]
        colour = _STYLES[variant][0]
        axes.scatter(
            [size for size, _, _ in points], [min(share, _TOP) for _, share, _ in points],
            s=9, color=colour, alpha=0.45, linewidth=0, zorder=3,
        )  # fmt: skip
        axes.plot(*_by_octave([(size, share) for size, share, _ in points]), color=colour, linewidth=1.8, zorder=4)
        if variant == "fused cpp":
            planned = _by_octave([(size, share) for size, _, share in points])
            axes.plot(*planned, color=colour, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=4)
    axes.set_xscale("log", base=2)
    axes.set_xlim(_SMALLEST, _LARGEST)
    axes.set_ylim(0, _TOP)
    axes.set_xticks([1 << power for power in (16, 20, 24, 28)], ["64 KB", "1 MB", "16 MB", "256 MB"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_MUTED, labelsize=7.5)
    axes.minorticks_off()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)


def _by_octave(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Geometric means of sizes and shares, of the points between two powers of two at a time."""
    octaves: dict[int, list[tuple[int, float]]] = {}
    for size, share in sorted(points):
        octaves.setdefault(round(math.log2(size)), []).append((size, share))
    return (
        [geometric_mean([size for size, _ in own]) for own in octaves.values()],
        [min(geometric_mean([share for _, share in own]), _TOP) for own in octaves.values()],
    )


def _size_headings(figure: Any, report: Report, size: tuple[float, float]) -> None:
    from matplotlib.lines import Line2D

    width, height = size
    left = 0.2 / width
    where = f"{report.machine['cpu']}, {report.config['threads']} threads, float32"
    figure.text(left, 1 - 0.18 / height, "Share of the memory floor by array size", fontsize=13, fontweight="bold",
                va="top")  # fmt: skip
    figure.text(
        left, 1 - 0.46 / height,
        f"{where}. Floor: the fastest copy (forward) or addition (backward) of the same arrays, same run. "
        "A point a shape, lines their means by size.",
        fontsize=8.5, color=_MUTED, va="top",
    )  # fmt: skip
    figure.text(0.5, 0.4 / height, "size of x", fontsize=8.5, color=_MUTED, ha="center")
    handles = [Line2D([], [], color=_STYLES[name][0], linewidth=1.8, label=label) for name, label in _LINES.items()]
    dotted = Line2D([], [], color=_STYLES["fused cpp"][0], linewidth=1.1, linestyle=(0, (1, 1.5)))
    dotted.set_label("C++, of the floor for reading twice where no slab fits a cache")
    figure.legend(
        handles=[*handles, dotted], ncols=4, loc="lower left", bbox_to_anchor=(left - 0.08 / width, 0.06 / height),
        frameon=False, fontsize=8, handlelength=1.6, columnspacing=1.6,
    )  # fmt: skip
