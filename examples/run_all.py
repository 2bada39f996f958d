"""Run the normalization experiments: check the gradients, train, print a table, draw the pictures.

python examples/run_all.py                                 print the tables
python examples/run_all.py --output docs/pictures          and draw the pictures of docs/experiments.md
python examples/run_all.py --experiment weight-scales      one of them
python examples/run_all.py --quick                         a short run that only shows that all works
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
from experiments import EXPERIMENTS, FULL, QUICK, Results, Table, seeded
from network import Network, Norm, gradient_error
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from threadpoolctl import threadpool_limits
from training import Data, Setup, digits, train

import fastnorm

# The same picture gives the same file.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "fastnorm",
    "savefig.dpi": 140,
}
GRADIENT_TOLERANCE = 1e-6


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--experiment", action="append", choices=EXPERIMENTS, help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, help="the directory for the pictures and summary.md; none: no files")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, few settings")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of data and parameters")
    parser.add_argument("--backend", help="fastnorm's backend; none: the first available")
    return parser.parse_args()


def check_gradients(console: Console) -> None:
    """Compare the whole network's gradient with central differences, for every kind of layer."""
    data = digits(np.float64)
    x, labels = data.x_train[:20], data.y_train[:20]
    for norm in get_args(Norm):
        network = Network(x.shape[1], (20, 20, 20), 10, norm=norm, weight_scale=0.3, dtype=np.float64)
        error = gradient_error(network, x, labels)
        console.print(f"gradient check, {norm:<9}  largest relative error {error:.1e}")
        if not error < GRADIENT_TOLERANCE:
            raise SystemExit(f"the gradients of the network with norm={norm!r} are wrong: {error:.1e}")


def trained(setups: list[Setup], data: Data, console: Console) -> Results:
    """Train every setup, with a progress bar on a terminal and a line now and then elsewhere."""

    def plainly() -> Iterator[Setup]:
        for number, setup in enumerate(setups, 1):
            yield setup
            if number % max(5, len(setups) // 10) == 0:
                console.print(f"trained {number} of {len(setups)} networks")

    def with_bar() -> Iterator[Setup]:
        columns = (TextColumn("training"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[now]}"), console=console, transient=True) as progress:
            task = progress.add_task("training", total=len(setups), now="")
            for setup in setups:
                progress.update(task, now=f"{setup.norm}, batches of {setup.batch_size}")
                yield setup
                progress.advance(task)

    # Matrices of 50 x 100 are too small for threads: on a busy machine they would only wait for one another.
    fastnorm.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        return {setup: train(setup, data) for setup in (with_bar() if console.is_terminal else plainly())}


def printed(question: str, table: Table, console: Console) -> None:
    header, rows = table
    rich_table = RichTable(title=question, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        label = index == 0 or name == "layers"
        rich_table.add_column(name, justify="left" if label else "right", no_wrap=label)
    for row in rows:
        rich_table.add_row(*row)
    console.print()
    console.print(rich_table)


def markdown(question: str, table: Table) -> str:
    header, rows = table
    lines = [f"**{question}**", "", *(" | ".join(row) for row in (header, ["---"] * len(header), *rows))]
    return "\n".join(f"| {line} |" if " | " in line else line for line in lines) + "\n"


def main() -> None:
    arguments = parsed()
    start = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    matplotlib.rcParams.update(STYLE)
    if arguments.backend:
        fastnorm.use_backend(arguments.backend)
    extent = QUICK if arguments.quick else FULL
    chosen = [EXPERIMENTS[name] for name in arguments.experiment or EXPERIMENTS]

    check_gradients(console)
    data = digits(arguments.dtype)
    setups = list(dict.fromkeys(s for e in chosen for s in seeded(e.setups(extent), extent)))
    results = trained(setups, data, console)

    tables = [(experiment.question, experiment.table(results, extent)) for experiment in chosen]
    for question, table in tables:
        printed(question, table, console)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for experiment in chosen:
            figure = experiment.draw(results, extent)
            figure.savefig(arguments.output / f"{experiment.name}.png")
            figure.savefig(arguments.output / f"{experiment.name}.svg", metadata={"Date": None})
        text = "\n".join(markdown(question, table) for question, table in tables)
        (arguments.output / "summary.md").write_text(text)
        console.print(f"\npictures and summary.md are in {arguments.output}")
    console.print(f"\n{len(setups)} networks in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
