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
from fastnorm.backends.numba_cpu._launch import Kernel, compiled
from fastnorm.backends.numba_cpu._scalars import (
    coefficient,
    gradient_line,
    input_gradient,
    load,
    plus,
    rounded,
    rstd,
    store,
    sum_times_xhat,
    workspace,
)
from fastnorm.backends.numba_cpu._tasks import for_each

BLOCK = 4096
"""Elements of a row that are summed in float32 before float64 takes over."""
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
def _forward_row(x, rows, cols, tiles, gamma, beta, eps, y, mean, var, row):
    mean[row], var[row] = _runs.channel_moments(x, 1, rows, cols, row, tiles)
    _normalize_row(x, y, row * cols, 0, cols, mean[row], var[row], eps, gamma, beta)


@Kernel
def forward(launcher, x, rows, cols, gamma, beta, eps, y, mean, var):
    tiles = _runs.tiling(1, cols)
    for_each(launcher, _forward_row, (x, rows, cols, tiles, gamma, beta, eps, y, mean, var), rows)


@compiled
def _normalize_piece(x, cols, pieces, mean, var, eps, gamma, beta, y, task):
    row, first = task // pieces, task % pieces * PIECE
    last = min(first + PIECE, cols)
    _normalize_row(x, y, row * cols, first, last, mean[row], var[row], eps, gamma, beta)


@Kernel
def apply(launcher, x, rows, cols, mean, var, eps, gamma, beta, y):
    pieces = -(-cols // PIECE)
    for_each(launcher, _normalize_piece, (x, cols, pieces, mean, var, eps, gamma, beta, y), rows * pieces)


# ---- backward -------------------------------------------------------------------------------------


@compiled
def _block_sums(dy, x, gamma, start, first, last, centre):
    """(sum(g), sum(g*(x - centre))) over columns first..last, g = dy*gamma."""
    sum_g = rounded(x, 0.0)
    sum_g_centred = rounded(x, 0.0)
    for j in range(first, last):
        g = load(dy, start + j) * load(gamma, j)
        sum_g = plus(sum_g, g)
        sum_g_centred = plus(sum_g_centred, g * (load(x, start + j) - centre))
    return np.float64(sum_g), np.float64(sum_g_centred)


@compiled
def _piece_sums(dy, x, gamma, start, first, last, centre):
    sum_g, sum_g_centred = 0.0, 0.0
    for block in range(first, last, BLOCK):
        sums = _block_sums(dy, x, gamma, start, block, min(block + BLOCK, last), centre)
        sum_g += sums[0]
        sum_g_centred += sums[1]
    return sum_g, sum_g_centred


@compiled
def _gradient_piece(dy, x, dx, start, first, last, mean, var, eps, gamma, cols, sum_g, sum_g_centred):
    """dx = rstd*(g - mean(g) - xhat*mean(g*xhat)) for columns first..last of a row."""
    sum_g_xhat = sum_times_xhat(rstd(var, eps), mean - rounded(x, mean), sum_g, sum_g_centred)
    centre, scale, lift, slope = gradient_line(x, mean, var, eps, 1.0, sum_g / cols, sum_g_xhat / cols)
    for j in range(first, last):
        g = load(dy, start + j) * load(gamma, j)
        store(dx, start + j, input_gradient(g, load(x, start + j), centre, scale, lift, slope))


@compiled
def _add_parameter_gradients(dy, x, start, first, last, mean, var, eps, dgamma, dbeta):
    """dgamma += dy*xhat and dbeta += dy for columns first..last of a row, in the accumulation dtype."""
    centre = rounded(x, mean)
    factor = rstd(var, eps)
    scale, shift = coefficient(x, factor), rounded(x, (mean - centre) * factor)
    for j in range(first, last):
        grad = load(dy, start + j)
        dgamma[j - first] += grad * ((load(x, start + j) - centre) * scale - shift)
        dbeta[j - first] += grad


@compiled
def _flush(sums, totals, offset, count):
    """Add float32 sums to their float64 totals and clear them."""
    for j in range(count):
        totals[offset + j] += sums[j]
        sums[j] = 0.0


@compiled
def _backward_rows(dy, x, rows, cols, share, mean, var, eps, gamma, dx, part_dgamma, part_dbeta, task):
    """`share` whole rows: dx, and their part of dgamma and dbeta where these are wanted."""
    wanted = part_dgamma.size > 0
    columns = cols if wanted else 0
    dgamma, dbeta = workspace(x, columns), workspace(x, columns)
    for j in range(columns):
        dgamma[j], dbeta[j] = 0.0, 0.0
        part_dgamma[task * cols + j], part_dbeta[task * cols + j] = 0.0, 0.0
    for row in range(task * share, min((task + 1) * share, rows)):
        start, centre = row * cols, rounded(x, mean[row])
        sum_g, sum_g_centred = 0.0, 0.0
        for first in range(0, cols, PIECE):
            sums = _piece_sums(dy, x, gamma, start, first, min(first + PIECE, cols), centre)
            sum_g += sums[0]
            sum_g_centred += sums[1]
        _add_parameter_gradients(dy, x, start, 0, columns, mean[row], var[row], eps, dgamma, dbeta)
        _gradient_piece(dy, x, dx, start, 0, cols, mean[row], var[row], eps, gamma, cols, sum_g, sum_g_centred)
        if row % CHUNK == CHUNK - 1:
            _flush(dgamma, part_dgamma, task * cols, columns)
            _flush(dbeta, part_dbeta, task * cols, columns)
    _flush(dgamma, part_dgamma, task * cols, columns)
    _flush(dbeta, part_dbeta, task * cols, columns)


@compiled
def _add_parts(parts, cols, part_dgamma, part_dbeta, dgamma, dbeta, task):
    """Sum a strip of columns over the parts, in order."""
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
def _store_piece_sums(dy, x, cols, pieces, mean, gamma, piece_g, piece_g_centred, task):
    row, first = task // pieces, task % pieces * PIECE
    piece_g[task], piece_g_centred[task] = _piece_sums(
        dy, x, gamma, row * cols, first, min(first + PIECE, cols), rounded(x, mean[row])
    )


@compiled
def _backward_columns(
    dy, x, rows, cols, pieces, mean, var, eps, gamma, dx, dgamma, dbeta, piece_g, piece_g_centred, task
):
    """A piece of every row, one after the other: dx, and dgamma and dbeta where these are wanted."""
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
        _add_parameter_gradients(
            dy, x, start, first, first + columns, mean[row], var[row], eps, piece_dgamma, piece_dbeta
        )
        _gradient_piece(dy, x, dx, start, first, last, mean[row], var[row], eps, gamma, cols, sum_g, sum_g_centred)
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
