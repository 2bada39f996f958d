"""The row family: (rows, cols), statistics along each row, gamma and beta by column.

A row is a channel of (1, rows, cols), so `_runs` computes its statistics. Two ways to cut the work, both
with the same bits in y and dx: a task takes whole rows, in the cache from their statistics to their output;
or, where rows are few and long, parts of rows, with a pass of its own for the output.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x, dy, y, dx are 1-D storage arrays, sizes are integers.

from __future__ import annotations

import numpy as np

from fastnorm.backends.numba_cpu import _runs
from fastnorm.backends.numba_cpu._launch import Kernel, compiled, inlined
from fastnorm.backends.numba_cpu._scalars import (
    LANES,
    across,
    clear,
    coefficient,
    gradient_line,
    input_gradient,
    load,
    rounded,
    rstd,
    stack_lanes,
    store,
    sum_times_xhat,
    workspace,
)
from fastnorm.backends.numba_cpu._tasks import for_each

BLOCK = 4096
"""Elements of a row that are summed in float32 before float64 takes over."""
BATCH = 8192
"""Elements of the rows that are worked on together, to be in L1 or L2 when they are read again."""
CHUNK = 64
"""Rows of which dgamma and dbeta are summed in float32."""
PARTS, SHARE = 64, 16
"""Rows are shared out to at most PARTS tasks of at least SHARE rows, with partial dgamma and dbeta each."""
STRIP = 512
"""Columns of which a task adds up the partial sums."""
PIECE = 1 << 14
"""Columns of a task where rows are long; the row's sums are added up in pieces of this length everywhere."""


@compiled
def _normalize_row(x, y, start, first, last, mean, var, eps, gamma, beta):
    """y = ((x - centre)*rstd - rest*rstd)*gamma + beta for columns first..last."""
    centre = rounded(x, mean)
    factor = rstd(var, eps)
    scale, shift = coefficient(x, factor), rounded(x, (mean - centre) * factor)
    for j in range(first, last):
        xhat = (load(x, start + j) - centre) * scale - shift
        store(y, start + j, xhat * load(gamma, j) + load(beta, j))


@compiled
def batch_rows(cols):
    """Rows whose statistics are computed before their output: a power of two up to CHUNK.

    One row at a time waits for its own sums, division and root: 5.9 ms for (100000, 64), in batches 4.2.
    """
    count = 1
    while count < CHUNK and 2 * count * cols <= BATCH:
        count *= 2
    return count


@compiled
def _forward_rows(x, outer, rows, cols, tiles, gamma, beta, eps, y, mean, var, begin, end):
    batch = batch_rows(cols)
    for first in range(begin, end, batch):
        last = min(first + batch, end)
        for row in range(first, last):
            mean[row], var[row] = _runs.channel_moments(x, outer, rows, cols, row, tiles)
        for row in range(first, last):
            _normalize_row(x, y, row * cols, 0, cols, mean[row], var[row], eps, gamma, beta)


@Kernel
def forward(launcher, x, outer, rows, cols, gamma, beta, eps, y, mean, var):
    """outer is 1, as an argument: for a constant, Numba would compile the sums of `_runs` a second time."""
    tiles = _runs.tiling(outer, cols)
    for_each(launcher, _forward_rows, (x, outer, rows, cols, tiles, gamma, beta, eps, y, mean, var), rows)


@compiled
def _normalize_pieces(x, cols, pieces, mean, var, eps, gamma, beta, y, begin, end):
    for task in range(begin, end):
        row, first = task // pieces, task % pieces * PIECE
        last = min(first + PIECE, cols)
        _normalize_row(x, y, row * cols, first, last, mean[row], var[row], eps, gamma, beta)


@Kernel
def apply(launcher, x, rows, cols, mean, var, eps, gamma, beta, y):
    pieces = -(-cols // PIECE)
    for_each(launcher, _normalize_pieces, (x, cols, pieces, mean, var, eps, gamma, beta, y), rows * pieces)


# ---- backward -------------------------------------------------------------------------------------


@compiled
def _block_sums(dy, x, gamma, start, first, last, centre):
    """(sum(g), sum(g*(x - centre))) over columns first..last, g = dy*gamma."""
    sum_g, sum_g_centred = stack_lanes(x), stack_lanes(x)
    whole = last - (last - first) % LANES
    clear(sum_g)
    clear(sum_g_centred)
    for j in range(first, whole, LANES):
        for lane in range(LANES):
            g = load(dy, start + j + lane) * load(gamma, j + lane)
            sum_g[lane] += g
            sum_g_centred[lane] += g * (load(x, start + j + lane) - centre)
    for lane in range(last - whole):
        g = load(dy, start + whole + lane) * load(gamma, whole + lane)
        sum_g[lane] += g
        sum_g_centred[lane] += g * (load(x, start + whole + lane) - centre)
    return across(sum_g), across(sum_g_centred)


@inlined
def _piece_sums(dy, x, gamma, start, first, last, centre):
    sum_g, sum_g_centred = 0.0, 0.0
    for block in range(first, last, BLOCK):
        sums = _block_sums(dy, x, gamma, start, block, min(block + BLOCK, last), centre)
        sum_g += sums[0]
        sum_g_centred += sums[1]
    return sum_g, sum_g_centred


@inlined
def _row_sums(dy, x, gamma, row, cols, mean):
    """`_piece_sums` of a whole row, piece by piece as `backward_long` adds them up."""
    centre = rounded(x, mean)
    sum_g, sum_g_centred = 0.0, 0.0
    for first in range(0, cols, PIECE):
        sums = _piece_sums(dy, x, gamma, row * cols, first, min(first + PIECE, cols), centre)
        sum_g += sums[0]
        sum_g_centred += sums[1]
    return sum_g, sum_g_centred


@inlined
def _row_line(x, mean, var, eps, cols, sum_g, sum_g_centred):
    """Coefficients of a row: `gradient_line` for dx, and rest*rstd for xhat = (x - centre)*scale - offset."""
    factor = rstd(var, eps)
    rest = mean - rounded(x, mean)
    sum_g_xhat = sum_times_xhat(factor, rest, sum_g, sum_g_centred)
    return gradient_line(x, mean, var, eps, 1.0, sum_g / cols, sum_g_xhat / cols), rounded(x, rest * factor)


@inlined
def _gradient_piece(dy, x, dx, start, first, last, gamma, line):
    """dx = rstd*(g - mean(g) - xhat*mean(g*xhat)) for columns first..last of a row."""
    centre, scale, lift, slope = line[0]
    for j in range(first, last):
        g = load(dy, start + j) * load(gamma, j)
        store(dx, start + j, input_gradient(g, load(x, start + j), centre, scale, lift, slope))


@inlined
def _add_parameter_gradients(dy, x, start, columns, line, dgamma, dbeta):
    """dgamma += dy*xhat and dbeta += dy for a piece of a row, in the accumulation dtype."""
    (centre, scale, _, _), offset = line
    for j in range(columns):
        grad = load(dy, start + j)
        dgamma[j] += grad * ((load(x, start + j) - centre) * scale - offset)
        dbeta[j] += grad


@compiled
def _flush(sums, totals, offset, count):
    """Add float32 sums to their float64 totals and clear them."""
    for j in range(count):
        totals[offset + j] += sums[j]
        sums[j] = 0.0


@compiled
def _backward_rows(dy, x, rows, cols, share, mean, var, eps, gamma, dx, part_dgamma, part_dbeta, begin, end):
    """`share` whole rows: dx, and their part of dgamma and dbeta where these are wanted."""
    batch = batch_rows(cols)
    sum_g, sum_g_centred = np.empty(batch), np.empty(batch)
    columns = cols if part_dgamma.size > 0 else 0
    dgamma, dbeta = workspace(x, columns), workspace(x, columns)
    for task in range(begin, end):
        for j in range(columns):
            dgamma[j], dbeta[j] = 0.0, 0.0
            part_dgamma[task * cols + j], part_dbeta[task * cols + j] = 0.0, 0.0
        for first in range(task * share, min((task + 1) * share, rows), batch):
            last = min(first + batch, (task + 1) * share, rows)
            for row in range(first, last):
                sum_g[row - first], sum_g_centred[row - first] = _row_sums(dy, x, gamma, row, cols, mean[row])
            for row in range(first, last):
                i = row - first
                line = _row_line(x, mean[row], var[row], eps, cols, sum_g[i], sum_g_centred[i])
                _add_parameter_gradients(dy, x, row * cols, columns, line, dgamma, dbeta)
                _gradient_piece(dy, x, dx, row * cols, 0, cols, gamma, line)
            if (last - task * share) % CHUNK == 0:
                _flush(dgamma, part_dgamma, task * cols, columns)
                _flush(dbeta, part_dbeta, task * cols, columns)
        _flush(dgamma, part_dgamma, task * cols, columns)
        _flush(dbeta, part_dbeta, task * cols, columns)


@compiled
def _add_parts(parts, cols, part_dgamma, part_dbeta, dgamma, dbeta, begin, end):
    """Sum a strip of columns over the parts, in order."""
    for task in range(begin, end):
        first, last = task * STRIP, min((task + 1) * STRIP, cols)
        for j in range(first, last):
            dgamma[j], dbeta[j] = part_dgamma[j], part_dbeta[j]
        for part in range(1, parts):
            for j in range(first, last):
                dgamma[j] += part_dgamma[part * cols + j]
                dbeta[j] += part_dbeta[part * cols + j]


@Kernel
def backward(launcher, dy, x, rows, cols, mean, var, eps, gamma, dx, dgamma, dbeta):
    """dgamma and dbeta have no elements where they are not wanted."""
    share = max(SHARE, -(-rows // PARTS))
    parts = -(-rows // share)
    part_dgamma, part_dbeta = np.empty(parts * dgamma.size), np.empty(parts * dgamma.size)
    arguments = (dy, x, rows, cols, share, mean, var, eps, gamma, dx, part_dgamma, part_dbeta)
    for_each(launcher, _backward_rows, arguments, parts)
    if dgamma.size > 0:
        for_each(launcher, _add_parts, (parts, cols, part_dgamma, part_dbeta, dgamma, dbeta), -(-cols // STRIP))


@compiled
def _store_piece_sums(dy, x, cols, pieces, mean, gamma, piece_g, piece_g_centred, begin, end):
    for task in range(begin, end):
        row, first = task // pieces, task % pieces * PIECE
        piece_g[task], piece_g_centred[task] = _piece_sums(
            dy, x, gamma, row * cols, first, min(first + PIECE, cols), rounded(x, mean[row])
        )


@compiled
def _backward_columns(
    dy, x, rows, cols, pieces, mean, var, eps, gamma, dx, dgamma, dbeta, piece_g, piece_g_centred, begin, end
):
    """A piece of every row, one after the other: dx, and dgamma and dbeta where these are wanted."""
    for task in range(begin, end):
        first, last = task * PIECE, min((task + 1) * PIECE, cols)
        columns = last - first if dgamma.size > 0 else 0
        piece_dgamma, piece_dbeta = workspace(x, columns), workspace(x, columns)
        for j in range(columns):
            piece_dgamma[j], piece_dbeta[j] = 0.0, 0.0
            dgamma[first + j], dbeta[first + j] = 0.0, 0.0
        for row in range(rows):
            start = row * cols
            sum_g, sum_g_centred = 0.0, 0.0
            for piece in range(row * pieces, (row + 1) * pieces):
                sum_g += piece_g[piece]
                sum_g_centred += piece_g_centred[piece]
            line = _row_line(x, mean[row], var[row], eps, cols, sum_g, sum_g_centred)
            _add_parameter_gradients(dy, x, start + first, columns, line, piece_dgamma, piece_dbeta)
            _gradient_piece(dy, x, dx, start, first, last, gamma, line)
        _flush(piece_dgamma, dgamma, first, columns)
        _flush(piece_dbeta, dbeta, first, columns)


@Kernel
def backward_long(launcher, dy, x, rows, cols, mean, var, eps, gamma, dx, dgamma, dbeta):
    """`backward` for few rows (their sums over rows stay in float32) of many columns."""
    pieces = -(-cols // PIECE)
    piece_g, piece_g_centred = np.empty(rows * pieces), np.empty(rows * pieces)
    arguments = (dy, x, cols, pieces, mean, gamma, piece_g, piece_g_centred)
    for_each(launcher, _store_piece_sums, arguments, rows * pieces)
    arguments = (
        dy, x, rows, cols, pieces, mean, var, eps, gamma, dx, dgamma, dbeta, piece_g, piece_g_centred,
    )  # fmt: skip
    for_each(launcher, _backward_columns, arguments, pieces)
