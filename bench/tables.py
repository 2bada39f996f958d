"""The figures of a report as Markdown tables, for docs/performance.md, and its plot.

python bench/tables.py bench/results/NAME.json [PREFIX]

NAME.json is what `python -m fastnorm bench` writes, with or without `--targets`. With PREFIX the plot is drawn
again, as PREFIX.png and PREFIX.svg.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from fastnorm.bench import plot, table, target_tables
from fastnorm.bench.cases import DIRECTIONS
from fastnorm.bench.run import Report, Section
from fastnorm.bench.target_tables import Table, case_label

VARIANTS = ("staged", "alt", "fused numpy", "fused numba", "fused cpp", "torch", "jax")


def report_tables(report: Report) -> Iterator[Table]:
    """A table for each direction of the report without `--targets`: minima in ms."""

    def cells(section: Section) -> list[str]:
        rows = [section.row(variant) for variant in VARIANTS]
        ours = section.row("fused cpp")
        share = ours.share_of_floor if ours else None
        return [
            case_label(section),
            table.milliseconds(section.floor_best),
            *(table.milliseconds(row and row.best) for row in rows),
            "-" if share is None else f"{share:.2f}",
        ]

    for direction in DIRECTIONS:
        own = [section for section in report.sections if section.direction == direction]
        columns = ["case", "floor", *VARIANTS, "cpp: share of floor"]
        yield Table(f"{direction.capitalize()}, ms", columns, [cells(section) for section in own])


def main() -> None:
    report = Report.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    judged = any(section.group for section in report.sections)
    for each in target_tables.tables(report) if judged else report_tables(report):
        print(target_tables.markdown(each))
    if len(sys.argv) > 2:
        (plot.draw_sizes if judged else plot.draw)(report, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
