"""The report's measurements: check every variant of every case, then time them in turns."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

import fastnorm
from fastnorm.backends import Array
from fastnorm.bench import check, machine, measure, roof
from fastnorm.bench.cases import DIRECTIONS, Case, Direction, Inputs, dtype_of
from fastnorm.bench.peers import PEERS
from fastnorm.bench.progress import Progress
from fastnorm.bench.variants import Variant

LEAST_ROUNDS, MOST_ROUNDS = 3, 50
DISTURBED = 0.2
"""CPUs that other programs may use during timed rounds. One that takes a core whole costs two threads 4 ms at a
time, the scheduler's slice: a floor of 1.5 ms then reads 8, and minima of 60 rounds 4."""
LONG = 1.0
"""Seconds of the reference backend that are not spent again on timed rounds: it competes with nobody."""


@dataclass
class Row:
    """One variant of a section. Times in seconds; None where not measured."""

    variant: str
    name: str
    backend: str | None
    threads: int | None = None
    """Where it isn't the count of the whole run."""
    best: float | None = None
    """With `out=` where the variant takes it; `fresh` is then without."""
    median: float | None = None
    rounds: int = 0
    fresh_best: float | None = None
    fresh_median: float | None = None
    gigabytes_per_second: float | None = None
    share_of_floor: float | None = None
    share_of_floor_median: float | None = None
    share_of_plan: float | None = None
    """Of the floor with the reads that the C++ backend's plan does; where those are one pass, the above."""
    speedup_over_staged: float | None = None
    extra_memory: float | None = None
    """Peak of a call beyond what was there, in arrays of x's size: the larger of the two below."""
    extra_bytes_traced: int | None = None
    extra_bytes_resident: int | None = None
    error: float | None = None
    tolerance: float | None = None
    correct: bool = True
    note: str = ""
    """Why it was skipped, or how it failed."""

    @property
    def timed_as(self) -> str:
        """Its name among the timings."""
        return self.variant if self.threads is None else f"{self.variant}, {self.threads} threads"


@dataclass
class Section:
    """A case in one direction."""

    op: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    direction: Direction
    bytes_moved: int
    floor_best: float = 0.0
    floor_median: float = 0.0
    floor_gigabytes_per_second: float = 0.0
    floors: dict[str, float] = field(default_factory=dict)
    """Where several ways compete for the floor: the best time of each."""
    others: float = 0.0
    """CPUs that other programs used during the timed rounds."""
    attempts: int = 1
    """How often it was timed to find calm; the calmest counts."""
    plan_reads: int = 0
    plan_writes: int = 0
    plan_floor_best: float = 0.0
    plan_floor_median: float = 0.0
    group: str = ""
    """What the case is for: `cases.Group`."""
    contest: bool = False
    network: str = ""
    count: int = 1
    rows: list[Row] = field(default_factory=list)

    @property
    def disturbed(self) -> bool:
        """Whether other programs kept the processor busy meanwhile."""
        return self.others > DISTURBED

    def row(self, variant: str, threads: int | None = None) -> Row | None:
        """The row of this variant, if it was timed."""
        return next(
            (row for row in self.rows if (row.variant, row.threads) == (variant, threads) and row.best is not None),
            None,
        )


@dataclass
class Report:
    date: str
    machine: dict[str, Any]
    config: dict[str, Any]
    floor: str
    seconds: float
    sections: list[Section]
    dropout: list[Section] = field(default_factory=list)
    """What fastnorm/bench/dropout.py measured."""
    pieces: list[Section] = field(default_factory=list)
    """What fastnorm/bench/pieces.py measured."""

    @property
    def correct(self) -> bool:
        """Whether every result of fastnorm is right; a peer's error is shown but is not ours."""
        sections = (*self.sections, *self.dropout, *self.pieces)
        return all(row.correct or row.name in PEERS for section in sections for row in section.rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows neither NaN nor infinity: those are None."""
        return dict(_finite(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Back from JSON."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        for key in ("sections", "dropout", "pieces"):
            known[key] = [_section_from(section) for section in values.get(key, [])]
        return cls(**known)


def _section_from(values: Mapping[str, Any]) -> Section:
    rows = [Row(**row) for row in values["rows"]]
    return Section(**{**values, "shape": tuple(values["shape"]), "rows": rows})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_needed(case: Case, *, baselines: bool) -> int:
    """Bytes that measuring a case takes: x, dout, out, a fresh result, the float64 reference, and with the
    baselines their cache and intermediates (eleven arrays of the arithmetic's type)."""
    arithmetic = max(4, dtype_of(case.dtype).itemsize)
    return 4 * case.nbytes + 8 * case.size + (11 * arithmetic * case.size if baselines else 0)


class Clock:
    """Shares what a limited time leaves for timed rounds among the sections, by their bytes.

    How long the rest takes (inputs, references, checks) is foreseen from what it took so far.
    """

    def __init__(self, limit: float, nbytes: int) -> None:
        self._start, self._limit = time.monotonic(), limit
        self._bytes_left, self._bytes_done = nbytes, 0
        self._timed = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def budget(self, nbytes: int) -> float:
        """Seconds of timed rounds for a section of this size whose checks are done."""
        self._bytes_done += nbytes
        self._bytes_left -= nbytes
        foreseen = (self.elapsed() - self._timed) / self._bytes_done * self._bytes_left
        free = self._limit - self.elapsed() - foreseen
        return max(0.0, free) * nbytes / (nbytes + self._bytes_left)

    def timed(self, seconds: float) -> None:
        self._timed += seconds


def run(cases: Sequence[Case], variants: Sequence[Variant], *, limit: float) -> Report:
    """Measure, in about `limit` seconds; more only where three rounds of everything take longer."""
    clock = Clock(limit, sum(case.nbytes for case in cases) * len(DIRECTIONS))
    sections = []
    parts = len(cases) * len(DIRECTIONS)
    with Progress(parts * (len(variants) + 1), parts) as progress:
        for case in cases:
            inputs = out = None  # the last case's go before the next one's come
            available = measure.available_memory()
            roomy = available is None or memory_needed(case, baselines=True) <= 0.9 * available
            inputs, out = case.inputs(), case.empty()
            for direction in DIRECTIONS:
                progress.part(f"{case}, {direction}")
                sections.append(_section(case, inputs, out, direction, variants, clock, progress, roomy=roomy))
    return Report(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=machine.description(),
        config=fastnorm.show_config("dicts"),
        floor=roof.description(),
        seconds=clock.elapsed(),
        sections=sections,
    )


def _section(
    case: Case, inputs: Inputs, out: Array, direction: Direction, variants: Sequence[Variant], clock: Clock,
    progress: Progress, *, roomy: bool,
) -> Section:  # fmt: skip
    section, calls = checked(case, inputs, out, direction, variants, progress, roomy=roomy)
    calls["floor"] = roof.floor(inputs, out, direction)
    start = clock.elapsed()
    timings = measure.interleaved(
        calls, budget=clock.budget(case.nbytes), least=LEAST_ROUNDS, most=MOST_ROUNDS,
        tick=lambda name: progress.detail(f"timing {name}"),
    )  # fmt: skip
    clock.timed(clock.elapsed() - start)
    progress.step()
    fill(section, timings)
    return section


def checked(
    case: Case, inputs: Inputs, out: Array, direction: Direction, variants: Sequence[Variant], progress: Progress, *,
    roomy: bool = True, watch_memory: bool = True,
) -> tuple[Section, dict[str, Callable[[], Any]]]:  # fmt: skip
    """The section with every variant's result compared with the reference, and the calls to time."""
    section = Section(
        case.op.name, case.layout.label, case.shape, case.dtype, case.nbytes, direction, case.bytes_moved(direction)
    )
    progress.detail("float64 reference")
    want = check.reference(case, inputs, direction)
    calls: dict[str, Callable[[], Any]] = {}
    for variant in variants:
        progress.step()
        if not variant.computes(case, direction):
            continue
        progress.detail(f"checking {variant.label}")
        row = Row(variant.label, variant.name, variant.backend)
        section.rows.append(row)
        if variant.name in ("staged", "alt") and not roomy:
            row.note = "skipped: not enough free memory for its intermediates"
            continue
        try:
            calls |= _checked(case, inputs, direction, variant, out, want, row, watch_memory=watch_memory)
        except Exception as problem:  # a broken variant is a result too, and must not hide the others
            reason = str(problem).strip().partition("\n")[0]
            row.correct, row.note = False, f"failed: {type(problem).__name__}: {reason}"
    return section, calls


def _checked(
    case: Case, inputs: Inputs, direction: Direction, variant: Variant, out: Array, want: tuple[Array, ...], row: Row,
    *, watch_memory: bool,
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """The calls to time; how their results compare with what they should be goes into the row."""
    bound = {
        label: variant.bind(case, inputs, direction, out if reuse else None) for label, reuse in variant.labels.items()
    }
    call = bound[variant.label]
    row.tolerance = check.tolerance(case, exact=variant.exact)
    errors = []
    for label, fresh in bound.items():
        if label != variant.label:
            errors.append(check.error(case, fresh.arrays(fresh.run()), want))
    if watch_memory and not variant.numpy_only:
        call.run()  # what a first call sets up (threads, compiled code) is no memory of the op
    out.fill(0)
    if watch_memory:
        result, memory, seconds = measure.with_memory(call.run)
        row.extra_bytes_traced, row.extra_bytes_resident = memory
        row.extra_memory = memory.peak / case.nbytes
    else:
        result, seconds = call.run(), 0.0
    errors.append(check.error(case, call.arrays(result), want))
    row.error = float(np.max(errors))  # NaN if one is, and then not within the tolerance
    row.correct = row.error <= row.tolerance
    if variant.backend == "numpy" and seconds > LONG:  # it allocates blocks only: no page faults in a first run
        row.best, row.median, row.rounds = measure.Timing.of([seconds])
        return {}
    return {label: each.run for label, each in bound.items()}


Part = tuple[str, Callable[[], Section]]
"""The name of a section, and what measures it."""


def add_beside(report: Report, sections: list[Section], parts: Iterable[Part], count: int) -> None:
    """Measure what is no case of the table, in so many parts, into these sections of the report."""
    start = time.monotonic()
    with Progress(count, count) as progress:
        for name, measured in parts:
            progress.part(name)
            sections.append(measured())
            progress.step()
    report.seconds += time.monotonic() - start


def beside(
    section: Section, bound: Mapping[Variant, Mapping[str, Callable[[], Any]]], floor: Callable[[], Any],
    error: Callable[[Variant, Any], float], tolerance: float, out: Array, *, seconds: float,
) -> Section:  # fmt: skip
    """The section of what is no case of the table: each variant's result checked, then all timed in turns.

    bound : each variant's ways of calling it; they write to `out` or to nothing
    error : of a result, which `tolerance` allows
    """
    calls: dict[str, Callable[[], Any]] = {"floor": floor}
    for variant, ways in bound.items():
        row = Row(variant.label, variant.name, variant.backend)
        section.rows.append(row)
        if not variant.numpy_only:
            ways[variant.label]()  # what a first call sets up is no memory of the op
        out.fill(0)
        result, memory, first = measure.with_memory(ways[variant.label])
        row.extra_bytes_traced, row.extra_bytes_resident = memory
        row.extra_memory = memory.peak / section.nbytes
        row.error, row.tolerance = error(variant, result), tolerance
        row.correct = row.error <= row.tolerance
        if variant.numpy_only and first > LONG:
            row.best, row.median, row.rounds = measure.Timing.of([first])
        else:
            calls |= ways
    fill(section, measure.interleaved(calls, budget=seconds, least=LEAST_ROUNDS, most=MOST_ROUNDS))
    return section


def fill(section: Section, timings: Mapping[str, measure.Timing]) -> None:
    """Put the timings into the section: of "floor", where it differs of "plan floor", and of the rows."""
    floor = timings["floor"]
    plan_floor = timings.get("plan floor", floor)
    section.plan_floor_best, section.plan_floor_median = plan_floor.best, plan_floor.median
    section.floor_best, section.floor_median = floor.best, floor.median
    section.floor_gigabytes_per_second = section.bytes_moved / floor.best / 1e9
    for row in section.rows:
        if row.timed_as in timings:
            row.best, row.median, row.rounds = timings[row.timed_as]
        fresh = timings.get(f"{row.variant}, fresh")
        if fresh is not None:
            row.fresh_best, row.fresh_median = fresh.best, fresh.median
        if row.best is not None and row.median is not None:
            row.gigabytes_per_second = section.bytes_moved / row.best / 1e9
            row.share_of_floor = floor.best / row.best
            row.share_of_floor_median = floor.median / row.median
            row.share_of_plan = plan_floor.best / row.best
            staged = next((each.best for each in section.rows if each.name == "staged"), None)
            row.speedup_over_staged = staged / row.best if staged is not None else None
