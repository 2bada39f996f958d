"""`python -m fastnorm bench`: arguments, and what is done with the report."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import fastnorm
from fastnorm.bench import dropout, measure, pieces, plot, run, table, target_tables, targets
from fastnorm.bench.cases import DTYPES, OPS, dtype_of, report_cases, target_entries
from fastnorm.bench.peers import EVERYDAY
from fastnorm.bench.variants import variants

NAMES = (*OPS, dropout.NAME, *pieces.NAMES)
SIZE, QUICK_SIZE = 256, 32
LIMIT, QUICK_LIMIT = 70.0, 15.0
"""Seconds that it should take; on a slow machine as long as checks and three rounds take."""
BESIDE, QUICK_BESIDE = 2.0, 0.5
"""Seconds of timed rounds for each direction of dropout, which comes after the rest; half of it for each piece."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Normalize large arrays, forward and backward: staged, alt, and fused on each backend. Every result is "
        "checked against the float64 reference, then timed against the memory floor. Prints a table and writes "
        "the figures as JSON and a plot as PNG and SVG. Exit status 1 if a result is wrong."
    )
    add = parser.add_argument
    add("--size", type=_positive, metavar="MB", help=f"size of the (N, D) array; the others have 3/8 (default {SIZE})")
    add("--op", type=_names(NAMES), action="extend", metavar="NAME", help=f"of {_listed(NAMES)} (default all)")
    add("--dtype", type=_names(DTYPES), action="extend", metavar="NAME", help=f"of {_listed(DTYPES)} (default float32)")
    known = [info.name for info in fastnorm.backends()]
    add("--backend", type=_names(tuple(known)), action="extend", metavar="NAME",
        help=f"of {_listed(known)} (default all that are available)")  # fmt: skip
    add(
        "--threads",
        type=_positive,
        metavar="N",
        help=f"threads of every backend (default {fastnorm.get_num_threads()})",
    )
    add("--peers", action=argparse.BooleanOptionalAction, default=None,
        help="PyTorch and JAX too, where they are installed (with --targets the default)")  # fmt: skip
    add("--targets", action="store_true",
        help="instead: float32 beyond the cache and in it, small calls, dtypes, threads, networks, every peer, and "
        "whether the targets are met (some minutes)")  # fmt: skip
    add("--only", action="append", metavar="REGEX", default=[],
        help="with --targets: cases in whose name, such as 'large batchnorm NCHW 16x256x56x56 float32 forward', it "
        "is found; repeatable")  # fmt: skip
    add("--quick", action="store_true", help=f"a glance: {QUICK_SIZE} MB and few rounds")
    add("--output", type=Path, metavar="PREFIX",
        help="write PREFIX.json, PREFIX.png and PREFIX.svg (default fastnorm-bench, fastnorm-targets)")  # fmt: skip
    add("--no-plot", action="store_true", help="write the JSON only")


def main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    unavailable = {info.name: info.reason for info in fastnorm.backends() if not info.available}
    for name in options.backend or ():
        if name in unavailable:
            parser.error(f"argument --backend: {name!r} is not available: {unavailable[name]}")
    if options.only and not options.targets:
        parser.error("argument --only: goes with --targets")
    for name in ("size", "op", "dtype", "quick"):
        if options.targets and getattr(options, name):
            parser.error(f"argument --{name}: not with --targets, which has cases of its own; choose by --only")
    if options.output is None:
        options.output = Path("fastnorm-targets" if options.targets else "fastnorm-bench")
    dtypes = list(dict.fromkeys(options.dtype or ["float32"]))
    for name in dtypes:
        try:
            dtype_of(name)
        except ImportError as problem:
            parser.error(f"argument --dtype: {name}: {problem}; pip install ml_dtypes")
    if options.threads is not None:
        try:
            fastnorm.set_num_threads(options.threads)
        except ValueError as problem:
            parser.error(f"argument --threads: {problem}")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"argument --output: {problem}")

    backends = options.backend and list(dict.fromkeys(options.backend))
    if options.targets:
        return _targets(parser, options, backends)
    names = options.op or NAMES
    ops = tuple(name for name in names if name in OPS)
    # Where no normalization is among them, arrays are as large as beside one.
    size = _fitting(options.size or (QUICK_SIZE if options.quick else SIZE), ops or ("layernorm",), dtypes)
    cases = [case for dtype in dtypes for case in report_cases(size, ops, dtype)]
    chosen = variants(backends, with_peers=EVERYDAY if options.peers else ())
    report = run.run(cases, chosen, limit=QUICK_LIMIT if options.quick else LIMIT)
    seconds = QUICK_BESIDE if options.quick else BESIDE
    if dropout.NAME in names:
        dropout.add_to(report, size, dtypes, chosen, seconds=seconds)
    pieces.add_to(report, size, dtypes, names, chosen, seconds=seconds / 2)  # there are five of them
    return _finish(options, report, table.render(report), plot.draw)


def _targets(parser: argparse.ArgumentParser, options: argparse.Namespace, backends: list[str] | None) -> int:
    try:
        parts = targets.selected(target_entries(), options.only)
    except re.error as problem:
        parser.error(f"argument --only: {problem}")
    if not parts:
        parser.error(f"argument --only: no case has a name with {' or '.join(options.only)} in it")
    report = targets.run(parts, backends, with_peers=options.peers is not False)
    return _finish(options, report, target_tables.text(report), plot.draw_sizes)


def _finish(
    options: argparse.Namespace, report: run.Report, text: str, draw: Callable[[run.Report, Path], list[Path]]
) -> int:
    print(text)
    print(f"\n{report.seconds:.0f} s. Written: {', '.join(map(str, _write(report, options, draw)))}")
    if not report.correct:
        print("Some results are WRONG: see above.", file=sys.stderr)
    return 0 if report.correct else 1


def _write(
    report: run.Report, options: argparse.Namespace, draw: Callable[[run.Report, Path], list[Path]]
) -> list[Path]:
    figures = options.output.with_name(options.output.name + ".json")
    figures.write_text(json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n")
    if options.no_plot or not report.sections:  # what stands beside the normalizations is no picture
        return [figures]
    try:
        return [figures, *draw(report, options.output)]
    except ImportError as missing:
        print(f"No plot: {missing}. For plots: pip install fastnorm[bench]", file=sys.stderr)
        return [figures]


def _fitting(size: int, ops: tuple[str, ...], dtypes: list[str]) -> int:
    """The size, or the largest half of a half of it that the free memory can take."""
    available = measure.available_memory()
    wanted = size
    while available is not None and size > 1:
        cases = [case for dtype in dtypes for case in report_cases(size, ops, dtype)]
        if max(run.memory_needed(case, baselines=False) for case in cases) <= 0.8 * available:
            break
        size //= 2
    if size != wanted:
        print(f"Not enough free memory for {wanted} MB: measuring {size} MB instead.", file=sys.stderr)
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A comma-separated list of known names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {_listed(known)}, got {name!r}")
        return names

    return parse


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
