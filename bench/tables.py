"""The figures of a report as Markdown tables, minima in ms, for docs/performance.md.

python bench/tables.py bench/results/NAME.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VARIANTS = ("staged", "alt", "fused numpy", "fused numba", "fused cpp", "torch", "jax")
OPS = {"batchnorm": "BatchNorm", "layernorm": "LayerNorm"}


def line(section: dict[str, Any]) -> str:
    rows = {row["variant"]: row for row in section["rows"]}
    name = OPS[section["op"]] + ("" if section["layout"] == "ND" else f" {section['layout']}")
    times = [f"{rows[v]['best'] * 1e3:.3g}" if v in rows and rows[v]["best"] else "-" for v in VARIANTS]
    cells = [
        f"{name} {'x'.join(map(str, section['shape']))}",
        f"{section['floor_best'] * 1e3:.3g}",
        *times,
        f"{rows['fused cpp']['share_of_floor']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    for direction in ("forward", "backward"):
        print(f"| {direction}, ms | floor | {' | '.join(VARIANTS)} | cpp: share of floor |")
        print("|---" * (len(VARIANTS) + 3) + "|")
        for section in report["sections"]:
            if section["direction"] == direction:
                print(line(section))
        print()


if __name__ == "__main__":
    main()
