"""The targets run as tables, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import geometric_mean
from typing import NamedTuple

from fastnorm.bench import machine, targets
from fastnorm.bench.cases import DIRECTIONS, DROPOUT, OPS
from fastnorm.bench.peers import PEERS
from fastnorm.bench.run import Report, Row, Section
from fastnorm.bench.table import milliseconds

CPP, NUMBA = targets.CPP, targets.NUMBA


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


LEGEND = """\
times          minima, ms or us; ours into a reused out=, those of peers into their own new arrays
floor          {floor} of the same arrays, measured in turn with the rest
of floor       the floor's minimum over this one: of one pass over the arrays
of plan        the same with the further reads of the C++ plan (forward r+w: 1+1 is one pass, 2+1 two)
in the cache   in bursts of one variant, so that data stay there; the floor is the fastest of NumPy's copy or
               addition, a plain one on all threads, and the non-temporal one
x PyTorch      its time over that of C++ without out=, so both into new arrays"""


def tables(report: Report) -> list[Table]:
    """Those that the report has sections for."""
    sections = report.sections
    found = [
        *(_against_floor(sections, "large", direction) for direction in DIRECTIONS),
        *(_against_floor(sections, "cache", direction) for direction in DIRECTIONS),
        *(_against_floor(sections, group, direction) for group in targets.FAMILY for direction in DIRECTIONS),
        *(_against_floor(sections, group, direction) for group in targets.OF_DROPOUT for direction in DIRECTIONS),
        *(_contest(sections, group, direction) for group in ("large", "cache") for direction in DIRECTIONS),
        _small(sections),
        _dtypes(sections),
        _threads(sections),
        _networks(sections),
        _speedups(sections),
        _verdicts(sections),
    ]
    return [table for table in found if table.rows]


def text(report: Report) -> str:
    found = report.machine
    lines = [f"{found['cpu']}, {report.config['threads']} threads of {found['cores']} cores", ""]
    for table in tables(report):
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        lines.append(table.title)
        for row in (table.columns, *table.rows):
            first, *rest = zip(row, widths, strict=True)
            lines.append("  ".join([f"  {first[0].ljust(first[1])}", *(cell.rjust(width) for cell, width in rest)]))
        lines.append("")
    return "\n".join([*lines, *_notes(report), LEGEND.format(floor=report.floor)])


def markdown(table: Table) -> str:
    lines = (table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows)
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def _notes(report: Report) -> Iterator[str]:
    """What was not timed, not right, not alone on the machine, or not what its group says."""
    cache = max(machine.cache_bytes(report.machine.get("caches", {})).values(), default=0)
    for section in report.sections:
        if section.group == "large" and section.nbytes < cache:
            yield f"{targets.case_name(section)}: not beyond this machine's cache of {cache >> 20} MB"
        if section.disturbed:
            yield f"{targets.case_name(section)}: disturbed, other programs used {section.others:.2f} CPUs"
        for row in section.rows:
            if row.note:
                yield f"{targets.case_name(section)}, {row.variant}: {row.note}"
            elif not row.correct:
                yield f"{targets.case_name(section)}, {row.variant}: error {row.error}, tolerance {row.tolerance}"


# ---- one table each -------------------------------------------------------------------------------


def case_label(section: Section) -> str:
    layout = "" if section.layout == "ND" else f" {section.layout}"
    title = (OPS | {DROPOUT.name: DROPOUT})[section.op].title
    return f"{title}{layout} {'x'.join(map(str, section.shape))}"


def _size(section: Section) -> str:
    if section.nbytes < 2**10:
        return f"{section.nbytes} bytes"
    megabytes = section.nbytes / 2**20
    return f"{megabytes:.0f} MB" if megabytes >= 1 else f"{section.nbytes / 2**10:.0f} KB"


def _time(row: Row | None, *, micro: bool = False) -> str:
    return "-" if row is None or row.best is None else milliseconds(row.best * (1e3 if micro else 1))


def _shares(row: Row | None) -> tuple[str, str]:
    """Of one pass, of the plan."""
    return (_ratio(row.share_of_floor), _ratio(row.share_of_plan)) if row else ("-", "-")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _over(peer: Row | None, ours: Row | None) -> float | None:
    return targets.time_of_new(peer) / targets.time_of_new(ours) if peer and ours else None


def _of(sections: Sequence[Section], group: str, direction: str | None = None) -> list[Section]:
    return [each for each in sections if each.group == group and direction in (None, each.direction)]


def _against_floor(sections: Sequence[Section], group: str, direction: str) -> Table:
    cached = group in targets.IN_BURSTS
    columns = ["case", "size", "floor", *(["how"] if cached else ["GB/s", "r+w"])]
    columns += ["C++", "of floor", *([] if cached else ["of plan"]), "Numba", "of floor"]
    columns += [*([] if cached else ["of plan"]), "PyTorch", "of floor", "x PyTorch"]
    rows = []
    for section in _of(sections, group, direction):
        ours, numba, torch = (section.row(name) for name in (CPP, NUMBA, "torch"))
        dtype = "" if section.dtype == "float32" else f" {section.dtype}"
        cells = [case_label(section) + dtype, _size(section), milliseconds(section.floor_best * (1e3 if cached else 1))]
        if cached:
            cells.append(min(section.floors, key=section.floors.__getitem__))
        else:
            cells += [f"{section.floor_gigabytes_per_second:.1f}", f"{section.plan_reads}+{section.plan_writes}"]
        for row, planned in ((ours, True), (numba, True), (torch, False)):
            cells += [_time(row, micro=cached), *_shares(row)[: 2 if planned and not cached else 1]]
        rows.append([*cells, _ratio(_over(torch, ours))])
    unit, where = ("us", "in the cache") if cached else ("ms", "beyond the cache")
    family = "The rest of the family, " if group in targets.FAMILY else ""
    family = "Dropout, " if group in targets.OF_DROPOUT else family
    return Table(f"{family}{direction if family else direction.capitalize()} {where}, {unit}", columns, rows)


def _contest(sections: Sequence[Section], group: str, direction: str) -> Table:
    names = (CPP, NUMBA, "torch", "torch compile", "onednn", "jax", "alt")
    cached = group == "cache"
    rows = [
        [case_label(section), *(_time(section.row(name), micro=cached) for name in names)]
        for section in _of(sections, group, direction)
        if section.contest
    ]
    unit, where = ("us", "in the cache") if cached else ("ms", "beyond the cache")
    return Table(f"All peers, {direction} {where}, {unit}", ["case", *map(_label, names)], rows)


def _label(variant: str) -> str:
    own = {CPP: "C++", NUMBA: "Numba", "alt": "NumPy alt"}
    return own[variant] if variant in own else PEERS[variant].label


def _small(sections: Sequence[Section]) -> Table:
    names = (CPP, NUMBA, "torch", "torch autograd")
    rows = [
        [f"{case_label(each)} {each.direction}"]
        + [milliseconds(targets.time_of_new(row) * 1e3) if (row := each.row(name)) else "-" for name in names]
        for each in _of(sections, "small")
    ]
    return Table("Small calls into new arrays, us", ["case", *map(_label, names)], rows)


def _dtypes(sections: Sequence[Section]) -> Table:
    own = _of(sections, "dtypes")
    single = {
        (each.op, each.layout, each.direction): row.best
        for each in own
        if each.dtype == "float32" and (row := each.row(CPP))
    }
    rows = []
    for each in own:
        ours, torch = each.row(CPP), each.row("torch")
        base = single.get((each.op, each.layout, each.direction))
        rate = base / ours.best if base and ours and ours.best else None
        rows.append(
            [f"{case_label(each)} {each.direction}", each.dtype, _time(ours), _shares(ours)[1],
             _ratio(rate), _time(torch), _ratio(_over(torch, ours))]
        )  # fmt: skip
    columns = ["case", "dtype", "C++", "of plan", "elements/s over float32", "PyTorch", "x PyTorch"]
    return Table("Dtypes beyond the cache, ms", columns, rows)


def _threads(sections: Sequence[Section]) -> Table:
    own = _of(sections, "threads")
    counts = sorted({row.threads for each in own for row in each.rows if row.threads})
    rows = []
    for each in own:
        for variant in (CPP, NUMBA):
            first = each.row(variant, counts[0])
            times = [each.row(variant, count) for count in counts]
            gains = [
                _ratio(first.best / row.best if first and first.best and row and row.best else None)
                for row in times[1:]
            ]
            cells = [f"{case_label(each)} {each.direction}", _size(each), _label(variant)]
            rows.append([*cells, *(_time(row, micro=True) for row in times), *gains])
    columns = ["case", "size", "backend", *(f"{count} threads" for count in counts)]
    return Table("Threads in the cache, us", [*columns, *(f"1 over {count}" for count in counts[1:])], rows)


def _networks(sections: Sequence[Section]) -> Table:
    times = {name: targets.network_times(sections, name) for name in (CPP, NUMBA, "torch")}
    rows = []
    for network in times[CPP]:
        seconds = [own.get(network) for own in times.values()]
        peer = times["torch"].get(network)
        rows.append([network, *map(milliseconds, seconds), _ratio(peer / times[CPP][network] if peer else None)])
    return Table(
        "All normalizations of a network, forward and backward into new arrays, ms",
        ["network", *map(_label, times), "x PyTorch"],
        rows,
    )


def _speedups(sections: Sequence[Section]) -> Table:
    names = ("torch", "torch compile", "onednn", "jax", "alt")
    own = [each for each in sections if each.group in (*targets.AGAINST_PEERS, *targets.FAMILY)]
    rows = []
    for op in OPS:
        for direction in DIRECTIONS:
            found = [
                targets.speedups([each for each in own if (each.op, each.direction) == (op, direction)], name)
                for name in names
            ]
            if any(found):
                cells = [f"{geometric_mean(each.values()):.2f} ({min(each.values()):.2f})" if each else "-"
                         for each in found]  # fmt: skip
                rows.append([f"{OPS[op].title} {direction}", *cells])
    return Table(
        "Times of peers over C++, both into new arrays: geometric mean (worst)", ["op", *map(_label, names)], rows
    )


def _verdicts(sections: Sequence[Section]) -> Table:
    words = {None: "", True: "met", False: "NOT MET"}
    rows = [
        [each.name, f"{each.value:.2f}", _ratio(each.target), words[each.met], each.note]
        for each in targets.verdicts(sections)
    ]
    return Table("Targets", ["what", "value", "target", "", "cases, or which"], rows)
