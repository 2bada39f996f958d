"""How a call is cut up, from its sizes, the caches and the number of threads. It decides about speed only: what
decides bits, the order of sums, stands with the kernels and depends on the shape alone."""

from __future__ import annotations

import functools
import math
from pathlib import Path

from fastnorm.backends import Array
from fastnorm.backends.numba_cpu import _columns, _rows, _runs
from fastnorm.backends.numba_cpu._launch import PARALLEL_FROM
from fastnorm.backends.numba_cpu._output import READ_AHEAD
from fastnorm.backends.numba_cpu._runs import COEFFICIENTS, FINISH, SUMS, WRITE
from fastnorm.backends.numba_cpu._tasks import Step, plan_of

Sizes = tuple[int, int, int]

NEAR = 1 << 14
"""Bytes of a slab of channels that are one run each: with half of L2, (131072, 128) took 4.4 ms instead of 3.5."""
LINE = 64
LONG_ROWS = 1 << 23
"""Bytes of dy and x between the sums of long rows and their output: a share of L3."""
NARROWEST = 1 << 10
"""Bytes of a row of a slab of columns: shorter ones make more page and line changes than the cache saves."""


@functools.cache
def caches() -> tuple[int, int]:
    """Bytes of L2, of one core, and of L3, shared by all, as Linux tells; elsewhere a guess."""
    found = {2: 1 << 20, 3: 8 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if level in found and size.endswith("K"):
            found[level] = int(size[:-1]) << 10
    return found[2], found[3]


def in_one_task(size: int) -> bool:
    """Whether an array is so small that one thread takes it through all steps at once."""
    return size < PARALLEL_FROM


def past_cache(nbytes: int, arrays: int = 1) -> bool:
    """Whether an output of this size, of a call that reads so many arrays of it, is better stored past the cache.

    As in csrc/include/fastnorm/plan.hpp.
    """
    return nbytes >= caches()[1] * 2 // (5 if arrays == 1 else 8)


PLANS = 1 << 12
"""Plans that are kept: each costs 1 to 2 us to make, and a program has few shapes."""


@functools.lru_cache(PLANS)
def of_columns(steps: int, samples: int, sizes: Sizes, span: int, itemsize: int, arrays: int, threads: int) -> Array:
    """The plan of a kernel of `_columns` that reads so many arrays of samples of these sizes."""
    outer, channels, inner = sizes
    grid = _columns.grid(*sizes)
    size, group, blocks, parts = outer * channels * inner, *grid[:2], grid[4]
    if steps & SUMS and steps & WRITE:
        slab = _slab_of_columns(samples, sizes, span, grid, itemsize, arrays, threads)
        if slab:
            return plan_of(Step(samples * -(-channels // slab), steps, slab))
    together = -(-group // span) * span
    groups, bands = -(-channels // together), -(-size // _columns.BAND)
    # So many samples at a time that they stay in cache between the steps, if one does.
    some = min(samples, max(1, caches()[1] // 2 // (size * itemsize * arrays)))
    return plan_of(
        *(
            Step(
                min(some, samples - first) * tasks,
                steps & part,
                channels_of_a_task,
                first=first,
                backwards=part == WRITE and samples == 1,
            )
            for first in range(0, samples, some)
            for part, tasks, channels_of_a_task in (
                (SUMS, blocks * parts, group),
                (FINISH | COEFFICIENTS, groups, together),
                (WRITE, bands, channels),
            )
            if steps & part
        )
    )


def _slab_of_columns(
    samples: int, sizes: Sizes, span: int, grid: _columns.Grid, itemsize: int, arrays: int, threads: int
) -> int:
    """Channels of a sample that a task takes through all steps, in cache from the first to the last; 0 where that is
    not possible or would leave threads idle, and all threads share each step instead."""
    outer, channels, inner = sizes
    channel_bytes = outer * inner * itemsize * arrays
    level2, level3 = caches()
    if in_one_task(samples * outer * channels * inner):
        return channels
    fitting = level2 // 2 // channel_bytes
    if samples >= threads and fitting >= channels:
        return channels
    if grid[1] > 1:  # else rows may be folded: their channels stay together
        line = LINE // itemsize
        whole = span if span > 1 else line // math.gcd(line, inner)
        slab = min(fitting, channels // -(-2 * threads // samples)) // whole * whole
        if slab * inner * itemsize >= NARROWEST:
            return slab
        # Slabs in a thread's share of L3, where the whole does not stay there: (2048, 8192) forward 3.6 to 3.1 ms,
        # backward 6.5 to 5.4. Narrower rows of a slab and those of short runs pay in C++ alone.
        row_bytes = channels * itemsize
        if samples == span == inner == 1 and row_bytes % LINE == 0 and outer * row_bytes >= level3 // 4 * 3:
            slab = level3 // (8 * threads) // (outer * itemsize) // whole * whole
            if slab * itemsize >= NARROWEST:
                return slab
    return channels if samples >= 2 * threads and channels * channel_bytes <= level3 // (2 * threads) else 0


@functools.lru_cache(PLANS)
def of_runs(steps: int, sizes: Sizes, span: int, itemsize: int, arrays: int, threads: int) -> Array:
    """The plan of a kernel of `_runs`, for channels or rows, of which `span` stay together."""
    outer, channels, inner = sizes
    tiles = _runs.tiling(outer, inner)
    size, blocks, parts = outer * channels * inner, tiles[3], tiles[4]
    if steps & SUMS and steps & WRITE:
        slab = channels
        if not in_one_task(size):
            at_once = NEAR if outer == 1 else caches()[0] // 2
            slab = span * _slab(channels // span, span * outer * inner * itemsize * arrays, at_once, threads)
        if slab:
            return plan_of(Step(-(-channels // slab), steps, slab, slab * inner))
    some = max(1, min(_runs.PART_BLOCKS // blocks, channels // (4 * threads)))
    return plan_of(
        *(
            Step(tasks, steps & part, group, ahead, backwards=part == WRITE)
            for part, tasks, group, ahead in (
                (SUMS, -(-channels // some) * parts, some, 0),
                (FINISH | COEFFICIENTS, 1, channels, 0),
                (WRITE, -(-size // _runs.PIECE), 1, READ_AHEAD),
            )
            if steps & part
        )
    )


def _slab(channels: int, channel_bytes: int, at_once: int, threads: int) -> int:
    """Channels that a task takes through all steps, in cache from the first to the last; 0 where that is not
    possible or would leave threads idle, and all threads share each step instead."""
    level2, level3 = caches()
    if channels < 2 * threads or channel_bytes > level3 // (2 * threads):
        return channels if channels * channel_bytes <= level2 // 4 else 0
    return max(1, min(at_once // channel_bytes, channels // (4 * threads)))


@functools.lru_cache(PLANS)
def of_rows(rows: int, cols: int, itemsize: int, finish: bool, threads: int) -> Array:
    """The plan of the backward of rows; `finish`: dgamma and dbeta are wanted."""
    part_rows, row_bytes = _rows.part_rows(rows, cols), 2 * cols * itemsize
    parts, pieces = -(-rows // part_rows), -(-cols // _rows.PIECE)
    steps = []
    if parts >= threads or in_one_task(rows * cols):
        slab = max(1, min(part_rows, caches()[0] // 4 // row_bytes))
        steps.append(Step(parts, SUMS | WRITE, slab, slab * cols, 0, rows))
    else:
        block = max(1, min(part_rows, LONG_ROWS // row_bytes))
        for part in range(0, rows, part_rows):
            for first in range(part, min(part + part_rows, rows), block):
                last = min(first + block, part + part_rows, rows)
                written = -(-(last - first) * cols // _runs.PIECE)
                steps.append(Step(pieces, SUMS, last - first, 0, first, last))
                steps.append(Step(written, WRITE, last - first, READ_AHEAD, first, last))
    if finish:
        steps.append(Step(-(-cols // _rows.STRIP), FINISH, 1, 0, 0, rows))
    return plan_of(*steps)


@functools.lru_cache(PLANS)
def of_steps(*steps: tuple[int, int]) -> Array:
    """The plan of steps with these tasks and bits."""
    return plan_of(*(Step(*step) for step in steps))
