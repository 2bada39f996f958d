"""How a call is cut up, as data: from the sizes, the alignment and the bytes of an element.

What decides bits is the sizes and the alignment alone: no number here comes from the device but the bytes of L2,
which decide the order of launches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

WARP = 32
MOST_THREADS = 512
"""Of a block that takes one row: 128 registers a thread."""
FORWARD_ELEMENTS = 32
"""Elements of x that a thread keeps; of float64 half."""
BACKWARD_ELEMENTS = 16
"""Elements of dy, x, dgamma and dbeta that a thread keeps of each."""
FORWARD_BLOCK, BACKWARD_BLOCK = 128, 256
"""Threads of a block of several rows, a warp each."""
BLOCK = 256
"""Threads of a block of the channel family."""
BLOCKS = 512
"""That fill a large device."""


def width(itemsize: int, length: int, *addresses: int) -> int:
    """Elements of one access, 16 bytes of them at most, so that runs of `length` elements are whole accesses."""
    most = 16 // itemsize
    while most > 1 and (length % most or any(address % (most * itemsize) for address in addresses)):
        most //= 2
    return most


class Rows(NamedTuple):
    """A kernel of `_rows`: a warp or a block for each row."""

    width: int
    vectors: int
    whole: bool
    """Whether a team is a block."""
    held: bool
    """Whether the backward keeps dy and x between its sums and dx."""
    threads: int
    part: int
    """Rows of a block."""
    blocks: int


def row_forward(rows: int, cols: int, itemsize: int, width: int) -> Rows | None:
    """None where a row is too long for the registers of a block."""
    pieces = cols // width
    # float64 takes two registers, and single elements one more for the address of each
    most = (FORWARD_ELEMENTS // 2 if itemsize == 8 or width == 1 else FORWARD_ELEMENTS) // width
    if pieces <= WARP * most:
        part = FORWARD_BLOCK // WARP
        return Rows(width, -(-pieces // WARP), False, True, FORWARD_BLOCK, part, -(-rows // part))
    threads = _whole(pieces, most)
    if threads > MOST_THREADS:
        return None
    return Rows(width, -(-pieces // threads), True, True, threads, 1, rows)


def row_backward(rows: int, cols: int, itemsize: int, width: int) -> Rows | None:
    """None where a row is too long for the sums of dgamma and dbeta to stay in registers."""
    pieces = cols // width
    most = max(1, (BACKWARD_ELEMENTS // 2 if itemsize == 8 else BACKWARD_ELEMENTS) // width)
    if pieces <= WARP * most:
        part = _part(rows, BACKWARD_BLOCK // WARP)
        return Rows(width, -(-pieces // WARP), False, True, BACKWARD_BLOCK, part, -(-rows // part))
    part = _part(rows, 1)
    for held, vectors in ((True, most), (False, 2 * most)):
        threads = _whole(pieces, vectors)
        if threads <= MOST_THREADS:
            return Rows(width, -(-pieces // threads), True, held, threads, part, -(-rows // part))
    return None


def _whole(pieces: int, vectors: int) -> int:
    """Threads of a block for a row of so many vectors."""
    return -(-pieces // (vectors * WARP)) * WARP


def _part(rows: int, teams: int) -> int:
    """Rows of a block: BLOCKS fill a large device, and their dgamma and dbeta are a few percent of the memory
    that is moved; from 32 rows a team on there are more blocks rather than longer ones."""
    return max(1, min(32, rows // (BLOCKS * teams))) * teams


class Runs(NamedTuple):
    """How `_runs` cuts a channel or row of (outer, channels, inner): `chunks` for each, in blocks of `threads`."""

    width: int
    span: int
    """Runs of a chunk."""
    length: int
    """Elements of each run that a chunk takes."""
    pieces: int
    """Chunks along a run."""
    chunks: int
    threads: int


CHUNK = 1 << 14
"""Elements of a chunk, 64 a thread: a float32 sum of them is as good as one in a tree."""


def runs(outer: int, inner: int, width: int) -> Runs:
    pieces = -(-inner // CHUNK)
    length = -(-inner // (pieces * 8)) * 8 if pieces > 1 else inner
    pieces = -(-inner // length)
    span = max(1, min(outer, CHUNK // length))
    return Runs(width, span, length, pieces, -(-outer // span) * pieces, BLOCK)


class Columns(NamedTuple):
    """How `_columns` cuts rows of channels*inner columns: blocks of `across` vectors by `down` rows at a time."""

    width: int
    across: int
    down: int
    rows: int
    """Rows of a chunk."""
    tiles: int
    """Blocks side by side."""
    chunks: int
    threads: int


SHORT_RUN = 64
"""Runs shorter than this are worked on as columns."""


def by_columns(outer: int, channels: int, inner: int) -> bool:
    return channels > 1 and inner < SHORT_RUN and outer >= 8


def columns(outer: int, columns: int, width: int) -> Columns:
    """`outer` rows of so many columns."""
    vectors = columns // width
    across = min(WARP, vectors)
    down = BLOCK // across
    tiles = -(-vectors // across)
    rows = down * max(4, min(64, outer * tiles // (2 * BLOCKS * down)))
    return Columns(width, across, down, rows, tiles, -(-outer // rows), BLOCK)


def slab(channels: int, channel_bytes: int, level2: int, least: int) -> int:
    """Channels that are taken through sums and output before the next ones, in L2 from the first to the second: all
    of them where they fit, or where not even `least`, the narrowest worth a launch, do."""
    fitting = level2 // 2 // channel_bytes // least * least
    return channels if fitting == 0 or fitting >= channels else fitting


def least(columns: Columns, inner: int) -> int:
    """Channels whose columns are whole blocks side by side, so that no slab cuts one."""
    block = columns.across * columns.width
    return block // math.gcd(block, inner)
