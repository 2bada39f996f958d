"""The run that the targets are judged by: what is measured, and the verdicts.

large      beyond the cache; rounds in which all variants take turns, against the memory floor
cache      64 KB to 16 MB, in bursts of one variant, so that data stay in the cache; against the fastest
           copy or addition measured the same way
small      the whole public call on a few rows
dtypes     one shape in every dtype, beyond the cache
threads    the C++ and Numba backends with 1, 2, 4 ... threads, in the cache
networks   every normalization of a network; each layer's arrays come from memory
family     GroupNorm, InstanceNorm and RMSNorm, beyond the cache as `large` and in it as `cache`
dropout    the same of dropout, whose floor is a copy in both directions, from a few rows on
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Any

import fastnorm
from fastnorm.backends import Array
from fastnorm.bench import dropout, machine, measure, roof
from fastnorm.bench.cases import DIRECTIONS, DROPOUT, OPS, Case, Direction, Entry, Inputs
from fastnorm.bench.peers import EVERYDAY, PEERS
from fastnorm.bench.progress import Progress
from fastnorm.bench.run import Report, Row, Section, checked, fill
from fastnorm.bench.variants import Variant, variants

IN_BURSTS = ("cache", "small", "threads", "family cached", "dropout cached")
AGAINST_PEERS = ("large", "cache", "dtypes")
"""Groups whose cases count as won or lost; small calls and networks have targets of their own."""
ATTEMPTS, REPEATS = 3, 40
"""How often a section is timed while other programs keep the machine busy, and how often more than once in a run:
about a minute, after which the report has to name what was disturbed."""
LEAST_ROUNDS, MOST_ROUNDS, WORTH = 4, 60, 0.2
"""Rounds of a case in turns, and the seconds that each of its calls is worth."""

CPP, NUMBA = "fused cpp", "fused numba"


# ---- measuring ------------------------------------------------------------------------------------


def selected(entries: Sequence[Entry], patterns: Sequence[str]) -> list[tuple[Entry, Direction]]:
    """Those whose name ('large batchnorm NCHW 16x256x56x56 float32 forward') one of the patterns is found in.

    Without ml_dtypes those in bfloat16 are left out.
    """
    return [
        (entry, direction)
        for entry in entries
        if entry.case.dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes")
        for direction in DIRECTIONS
        if not patterns or any(re.search(each, f"{entry.group} {entry.case} {direction}") for each in patterns)
    ]


def run(
    parts: Sequence[tuple[Entry, Direction]], backends: Sequence[str] | None = None, *, with_peers: bool = True
) -> Report:
    """Measure these directions of these cases."""
    start = time.monotonic()
    sections: list[Section] = []
    before: tuple[Case, Inputs, Array] | None = None
    repeats = REPEATS
    with Progress(len(parts), len(parts)) as progress:
        for entry, direction in parts:
            progress.part(f"{entry.group}: {entry.case}, {direction}")
            case = entry.case
            if before is None or before[0] != case:
                before = None  # the last case's arrays go before the next one's come
                before = case, case.inputs(), case.empty()
            chosen = _contestants(entry, backends, with_peers)
            attempts = min(ATTEMPTS, 1 + repeats)
            sections.append(_section(entry, *before[1:], direction, chosen, progress, attempts=attempts))
            repeats -= sections[-1].attempts - 1
            progress.step()
    return Report(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=machine.description(),
        config=fastnorm.show_config("dicts"),
        floor=roof.description(),
        seconds=time.monotonic() - start,
        sections=sections,
    )


def _contestants(entry: Entry, backends: Sequence[str] | None, with_peers: bool) -> list[Variant]:
    """Who takes part: never the staged graph or the reference backend, which the other report has."""
    if entry.group == "threads" or not with_peers:
        names: tuple[str, ...] = ()
    elif entry.group == "small":
        names = ("torch", "torch autograd")
    elif entry.contest:
        names = EVERYDAY if entry.group in FAMILY else tuple(name for name in PEERS if name != "torch autograd")
    else:
        names = ("torch",)
    chosen = variants(backends, with_peers=names)
    return [
        each for each in chosen
        if not each.numpy_only or (each.name == "alt" and entry.contest and entry.group == "large")
    ]  # fmt: skip


def _section(
    entry: Entry, inputs: Inputs, out: Array, direction: Direction, chosen: Sequence[Variant], progress: Progress, *,
    attempts: int,
) -> Section:  # fmt: skip
    moves = direction  # as which direction's floor
    if entry.case.op is DROPOUT:
        source = inputs.x if direction == "forward" else inputs.dout
        section, calls = dropout.checked(source, out, entry.case.dtype, direction, chosen)
        moves = "forward"
    else:
        section, calls = checked(entry.case, inputs, out, direction, chosen, progress, watch_memory=False)
    section.group, section.contest = entry.group, entry.contest
    section.network, section.count = entry.network, entry.count
    section.plan_reads, section.plan_writes = moved = roof.traffic(entry.case, inputs.x, direction)

    if entry.group in IN_BURSTS:
        floors = roof.in_cache(inputs, out, moves)
    else:
        floors = {"floor": roof.floor(inputs, out, moves)}
        if moved != roof.ONE_PASS[moves]:
            floors["plan floor"] = roof.plan_floor(inputs, out, moves, moved)
    threads: dict[str, int] = {}
    if entry.group == "threads":
        calls, threads = _by_threads(section, calls)

    section.others = math.inf
    for section.attempts in range(1, attempts + 1):
        others = machine.OtherPrograms()
        timings = _timed(calls, floors, threads, in_bursts=entry.group in IN_BURSTS)
        if (cpus := others.cpus()) < section.others:
            section.others = cpus
            section.floors = {way: timings[way].best for way in floors}
            fill(section, timings)
        if not section.disturbed:
            break
        progress.note(f"        disturbed: other programs used {cpus:.2f} CPUs")
    return section


def _timed(
    calls: dict[str, Callable[[], Any]],
    floors: dict[str, Callable[[], Any]],
    threads: dict[str, int],
    *,
    in_bursts: bool,
) -> dict[str, measure.Timing]:
    """Of the calls and of the floors; those that `threads` names run with so many."""
    if not in_bursts:
        return measure.interleaved(calls | floors, budget=0, least=LEAST_ROUNDS, most=MOST_ROUNDS, brief=WORTH)
    most = fastnorm.get_num_threads()
    try:
        timings = measure.bursts(calls | floors, tick=lambda name: fastnorm.set_num_threads(threads.get(name, most)))
    finally:
        fastnorm.set_num_threads(most)
    return timings | {"floor": min((timings[way] for way in floors), key=lambda timing: timing.best)}


def thread_counts(most: int) -> list[int]:
    """1, 2, 4 ... and the most."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def _by_threads(
    section: Section, calls: dict[str, Callable[[], Any]]
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """A row for each count of threads in the place of each row; their calls and counts."""
    counts = thread_counts(fastnorm.get_num_threads())
    rows = [(replace(row, threads=count), count) for row in section.rows if row.variant in calls for count in counts]
    section.rows = [row for row, _ in rows]
    return (
        {row.timed_as: calls[row.variant] for row, _ in rows},
        {row.timed_as: count for row, count in rows},
    )


# ---- judging --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A figure, and what it should be."""

    name: str
    value: float
    target: float | None = None
    """At least this; None for a figure that is only told."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value >= self.target


def verdicts(sections: Sequence[Section]) -> list[Verdict]:
    """The targets that these sections have figures for."""
    return [verdict for judge in _JUDGES for verdict in judge(sections)]


def case_name(section: Section) -> str:
    shape = "x".join(map(str, section.shape))
    return f"{section.op} {section.layout} {shape} {section.dtype} {section.direction}"


def _of(sections: Sequence[Section], *groups: str) -> list[Section]:
    return [section for section in sections if section.group in groups]


def _means(
    name: str, figures: dict[str, float], *, mean: float | None = None, worst: float | None = None
) -> list[Verdict]:
    """The geometric mean of the figures by case, and the worst of them."""
    if not figures:
        return []
    least = min(figures, key=figures.__getitem__)
    return [
        Verdict(f"{name}, geometric mean", geometric_mean(figures.values()), mean, f"{len(figures)} cases"),
        Verdict(f"{name}, worst", figures[least], worst, least),
    ]


def _shares(sections: Sequence[Section], variant: str = CPP, *, of_plan: bool = False) -> dict[str, float]:
    figures = {}
    for section in sections:
        row = section.row(variant)
        share = row and (row.share_of_plan if of_plan else row.share_of_floor)
        if share:
            figures[case_name(section)] = share
    return figures


AIM_LARGE, LEAST_LARGE, WORST_LARGE = 0.90, 0.80, 0.65
IN_CACHE = 0.80
OVER_PYTORCH = {"batchnorm": 5.0, "layernorm": 1.5}
HALVES_OVER_FLOAT32, FLOAT64_OF_PLAN = 1.6, 0.85
TWO_THREADS = 1.8
NUMBA_OVER_CPP = 0.75
FAMILY = ("family", "family cached")
OF_DROPOUT = ("dropout", "dropout cached")


def _by_medians(sections: Sequence[Section]) -> dict[str, float]:
    return {
        case_name(section): section.plan_floor_median / row.median
        for section in sections
        if (row := section.row(CPP)) and row.median
    }


def _large(sections: Sequence[Section]) -> Iterator[Verdict]:
    large = _of(sections, "large")
    for verdict in _means(
        "beyond the cache: share of the plan's floor", _shares(large, of_plan=True), mean=AIM_LARGE, worst=WORST_LARGE
    ):
        yield verdict
        if verdict.target == AIM_LARGE:
            yield replace(verdict, name=f"{verdict.name}, at least", target=LEAST_LARGE)
    yield from _means("beyond the cache: the same, medians over medians", _by_medians(large))
    yield from _means("beyond the cache: share of the one-pass floor", _shares(large))


def _cache(sections: Sequence[Section]) -> Iterator[Verdict]:
    own = _of(sections, "cache")
    yield from _means(
        "in the cache: share of the fastest copy or addition", _shares(own), mean=IN_CACHE, worst=IN_CACHE
    )
    single = {
        case_name(section): min(section.floors[way] for way in ("plain", "non-temporal") if way in section.floors)
        / row.best
        for section in own
        if (row := section.row(CPP)) and row.best
    }
    yield from _means("in the cache: share of NumPy's or the non-temporal one", single, mean=IN_CACHE, worst=IN_CACHE)


def time_of_new(row: Row) -> float:
    """Seconds of a call that returns a new array, as those of the peers do."""
    seconds = row.best if row.fresh_best is None else row.fresh_best
    assert seconds is not None
    return seconds


def speedups(sections: Sequence[Section], peer: str, variant: str = CPP) -> dict[str, float]:
    """Case -> the peer's time over ours, both into new arrays."""
    pairs = {case_name(section): (section.row(peer), section.row(variant)) for section in sections}
    return {case: time_of_new(theirs) / time_of_new(ours) for case, (theirs, ours) in pairs.items() if theirs and ours}


def _small(sections: Sequence[Section]) -> Iterator[Verdict]:
    for op in OPS:
        for direction, peer in (("forward", "torch"), ("backward", "torch autograd")):
            own = [each for each in _of(sections, "small") if (each.op, each.direction) == (op, direction)]
            found = _means(
                f"small calls, {op} {direction}: {PEERS[peer].label} over C++", speedups(own, peer), worst=1.0
            )
            yield from found[1:]


def _peers(sections: Sequence[Section]) -> Iterator[Verdict]:
    for name in ("torch", "torch compile", "onednn", "jax", "alt"):
        label = PEERS[name].label if name in PEERS else "NumPy alt"
        yield from _means(f"{label} over C++, time", speedups(_of(sections, *AGAINST_PEERS), name), worst=1.0)
    for op, least in OVER_PYTORCH.items():
        own = [section for section in _of(sections, *AGAINST_PEERS) if section.op == op]
        yield from _means(f"PyTorch over C++, time, {op}", speedups(own, "torch"), mean=least)[:1]


def _dtypes(sections: Sequence[Section]) -> Iterator[Verdict]:
    own = _of(sections, "dtypes")
    times = {(s.op, s.layout, s.direction, s.dtype): row.best for s in own if (row := s.row(CPP)) and row.best}
    for dtype in ("float16", "bfloat16"):
        figures = {
            f"{op} {layout} {direction}": single / seconds
            for (op, layout, direction, which), seconds in times.items()
            if which == dtype and (single := times.get((op, layout, direction, "float32")))
        }
        yield from _means(
            f"{dtype}: elements a second over float32's", figures, mean=HALVES_OVER_FLOAT32, worst=HALVES_OVER_FLOAT32
        )
    float64 = _shares([section for section in own if section.dtype == "float64"], of_plan=True)
    yield from _means("float64: share of its plan's floor", float64, mean=FLOAT64_OF_PLAN, worst=FLOAT64_OF_PLAN)


def _threads(sections: Sequence[Section]) -> Iterator[Verdict]:
    for variant in (CPP, NUMBA):
        counts = sorted({row.threads for s in _of(sections, "threads") for row in s.rows if row.threads})
        for count in counts[1:]:
            figures = {
                case_name(section): one.best / many.best
                for section in _of(sections, "threads")
                if (one := section.row(variant, 1)) and (many := section.row(variant, count)) and one.best and many.best
            }
            least = TWO_THREADS if count == 2 else None
            name = f"{variant}: time with 1 thread over time with {count}"
            yield from _means(name, figures, mean=least, worst=least)


def _numba(sections: Sequence[Section]) -> Iterator[Verdict]:
    figures = {
        case_name(section): ours.best / numba.best
        for section in _of(sections, "large")
        if (ours := section.row(CPP)) and (numba := section.row(NUMBA)) and ours.best and numba.best
    }
    yield from _means("beyond the cache: Numba's speed over C++'s", figures, mean=NUMBA_OVER_CPP, worst=NUMBA_OVER_CPP)


def _family(sections: Sequence[Section]) -> Iterator[Verdict]:
    large, cached = (_of(sections, group) for group in FAMILY)
    yield from _means(
        "the rest of the family, beyond the cache: share of the plan's floor", _shares(large, of_plan=True),
        mean=LEAST_LARGE, worst=WORST_LARGE,
    )  # fmt: skip
    yield from _means(
        "the rest of the family, in the cache: share of the fastest copy or addition", _shares(cached),
        mean=IN_CACHE, worst=IN_CACHE,
    )  # fmt: skip
    for op in dict.fromkeys(section.op for section in large + cached):
        own = [section for section in large + cached if section.op == op]
        yield from _means(f"PyTorch over C++, time, {op}", speedups(own, "torch"), worst=1.0)


def _dropout(sections: Sequence[Section]) -> Iterator[Verdict]:
    large, cached = (_of(sections, group) for group in OF_DROPOUT)
    yield from _means(
        "dropout, beyond the cache: share of the floor", _shares(large), mean=LEAST_LARGE, worst=WORST_LARGE
    )
    yield from _means("dropout, in the cache: share of the fastest copy", _shares(cached))
    yield from _means("PyTorch over C++, time, dropout", speedups(large + cached, "torch"), worst=1.0)


def network_times(sections: Sequence[Section], variant: str) -> dict[str, float]:
    """Network -> seconds of all of its normalizations, forward and backward, into new arrays; only whole networks."""
    times: dict[str, float] = {}
    for name in dict.fromkeys(section.network for section in _of(sections, "networks")):
        own = [section for section in sections if section.network == name]
        rows = [section.row(variant) for section in own]
        if all(rows) and {section.direction for section in own} == set(DIRECTIONS):
            times[name] = sum(s.count * time_of_new(row) for s, row in zip(own, rows, strict=True) if row)
    return times


def _networks(sections: Sequence[Section]) -> Iterator[Verdict]:
    ours, theirs = (network_times(sections, variant) for variant in (CPP, "torch"))
    for name in ours:
        if name in theirs:
            yield Verdict(f"{name}, all normalizations: PyTorch over C++, time", theirs[name] / ours[name], 1.0)


_JUDGES = (_large, _cache, _small, _peers, _dtypes, _threads, _numba, _networks, _family, _dropout)
