"""The report as text."""

from __future__ import annotations

from statistics import geometric_mean

from fastnorm.bench.run import Report, Row, Section

COLUMNS = ("variant", "min ms", "median ms", "no out= ms", "GB/s", "of floor", "extra memory", "vs staged", "error")
WIDTHS = (14, 9, 10, 11, 7, 9, 13, 10, 9)

LEGEND = """\
min, median    of rounds in which all variants take turns; fused ones write to a reused out=
no out=        the same into a new array each call (minimum)
GB/s           the bytes that must be moved (forward: read x, write out; backward: read dout and x, write dx;
               backward of dropout: read dout, write dx; moments: read x) over the minimum
of floor       the floor's minimum over this minimum; floor: {floor}, of moments
               reading x, measured in turn with the rest
extra memory   peak of one call beyond what was there before, in arrays of x's size: the larger of what
               NumPy allocated and of the growth of the process's resident memory; results and caches count
error          largest deviation from the float64 reference, scaled to values of 1; of dropout that from what the
               reference backend gives for the same seed, PyTorch's from x/p where it kept x"""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = (cell.ljust(width) if i == 0 else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)))  # fmt: skip
    return "  " + first + "".join(rest)


def milliseconds(seconds: float | None) -> str:
    """To three digits."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return format(value, ".3f" if value < 1 else ".2f" if value < 10 else ".1f" if value < 100 else ".0f")


def _row(row: Row) -> str:
    if row.best is None:
        return f"  {row.variant.ljust(WIDTHS[0])} {row.note}"
    line = _line(
        (
            row.variant,
            milliseconds(row.best),
            milliseconds(row.median),
            milliseconds(row.fresh_best),
            _number(row.gigabytes_per_second, ".1f"),
            _number(row.share_of_floor, ".2f"),
            _number(row.extra_memory, ".2f"),
            _number(row.speedup_over_staged, ".1f") + "x" * (row.speedup_over_staged is not None),
            _number(row.error, ".0e"),
        )
    )
    return line if row.correct else f"{line}  WRONG: the tolerance is {row.tolerance:.0e}"


def title(section: Section) -> str:
    shape = "x".join(map(str, section.shape))
    return (
        f"{section.op} {section.layout} {shape} {section.dtype} ({section.nbytes / 2**20:.0f} MB), {section.direction}"
    )


def _summary(report: Report) -> list[str]:
    """Each variant over all sections."""
    rows: dict[str, list[Row]] = {}
    for section in sorted(report.sections, key=lambda section: -len(section.rows)):  # the order with alt in it
        for row in section.rows:
            if row.best is not None:
                rows.setdefault(row.variant, []).append(row)
    lines = ["geometric means over the normalizations"] if rows else []
    for variant, own in rows.items():
        shares = [row.share_of_floor for row in own if row.share_of_floor]
        speedups = [row.speedup_over_staged for row in own if row.speedup_over_staged]
        line = f"  {variant.ljust(WIDTHS[0])} {geometric_mean(shares):.2f} of the floor"
        lines.append(line + (f", {geometric_mean(speedups):.1f}x staged" if speedups else ""))
    return lines


def render(report: Report) -> str:
    """The whole report."""
    machine = report.machine
    lines = [f"{machine['cpu']}, {report.config['threads']} threads of {machine['cores']} cores", ""]
    for section in (*report.sections, *report.dropout, *report.pieces):
        lines += [title(section), _line(COLUMNS)]
        lines += [_row(row) for row in section.rows]
        floor = (
            "floor", milliseconds(section.floor_best), milliseconds(section.floor_median), "-",
            f"{section.floor_gigabytes_per_second:.1f}", "1.00", "-", "-", "-",
        )  # fmt: skip
        lines += [_line(floor), ""]
    lines += [*_summary(report), "", LEGEND.format(floor=report.floor)]
    return "\n".join(lines)
