"""The backward of the row family, (rows, cols) with gamma by column; its forward is that of `_runs`.

    for part of rows:                   at most PART_ROWS rows, of which dgamma and dbeta are summed by themselves
        for piece of columns:           PIECE columns; the sums along a row are added up piece by piece
            sums along each row, sums down each column
        dx
    dgamma, dbeta = the parts added up in order

A task takes a slab of rows through both steps, or, where rows are few and long, a piece of columns of all rows
through the first.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x, dy, y, dx are 1-D storage arrays, sizes are integers.

from __future__ import annotations

from fastnorm.backends.numba_cpu._compiler import compiled
from fastnorm.backends.numba_cpu._launch import PARALLEL_FROM, Kernel
from fastnorm.backends.numba_cpu._output import line_start, writer_of_runs
from fastnorm.backends.numba_cpu._runs import FINISH, SUMS, WRITE
from fastnorm.backends.numba_cpu._runs import PIECE as WRITTEN
from fastnorm.backends.numba_cpu._scalars import (
    gradient_line,
    input_gradient,
    least,
    rstd,
    sum_times_xhat,
)
from fastnorm.backends.numba_cpu._tasks import AHEAD, FIRST, GROUP, LAST, STEPS, hand_out
from fastnorm.backends.numba_cpu._vectors import (
    element,
    fence,
    lanes,
    load,
    load4,
    load_part,
    prefetch,
    put,
    rounded,
    spread,
    spread4,
    store4,
    total,
)

PART_ROWS, FEWEST_ROWS, PARTS = 128, 32, 8
"""Rows of which dgamma and dbeta are summed in the accumulation dtype: fewer where rows are, so that there are parts
for the threads. (256, 1024) took as long on two as on one."""
PIECE = 1 << 12
"""Columns over which a row is summed in float32 before float64 takes over."""
STRIP = 512
"""Columns of which a task adds up the parts of dgamma and dbeta."""


def part_rows(rows: int, cols: int) -> int:
    """Rows of a part. Long rows are cut into pieces instead, and share one part."""
    if rows * cols < PARALLEL_FROM or cols > PIECE:
        return PART_ROWS
    return max(FEWEST_ROWS, min(PART_ROWS, -(-rows // PARTS)))


@compiled
def _sum_piece(dy, x, start, first, last, mean, factor, gamma, mask, dgamma, dbeta, offset):
    """(sum(g), sum(g*(x - centre))) of columns first..last of a row, g = dy*gamma; adds dy*xhat and dy to the
    sums down the columns, which start at `offset`."""
    near = rounded(x, mean)
    centre, scale, shift = spread4(x, near), spread4(x, factor), spread4(x, (mean - near) * factor)
    zero = spread4(x, 0.0)
    sum_g, sum_g_centred = zero, zero
    for j in range(first, last, 4 * lanes(x)):
        count = last - j
        grad = load4(dy, start + j, count, zero)
        centred = load4(x, start + j, count, centre) - centre
        g = grad * load4(gamma, j & mask, count, zero)
        sum_g += g
        sum_g_centred += g * centred
        product = grad * (centred * scale - shift)
        store4(dgamma, offset + j, load4(dgamma, offset + j, count, zero) + product, count)
        store4(dbeta, offset + j, load4(dbeta, offset + j, count, zero) + grad, count)
    return total(sum_g), total(sum_g_centred)


@compiled
def _row_line(numbers, row):
    """The pieces of a row's sums added up, and what dx needs of them."""
    x, cols, pieces, row_g, row_g_centred, mean, var, centred, eps = numbers
    sum_g, sum_g_centred = row_g[row * pieces], row_g_centred[row * pieces]
    for piece in range(row * pieces + 1, (row + 1) * pieces):
        sum_g += row_g[piece]
        sum_g_centred += row_g_centred[piece]
    if not centred:
        sum_g = 0.0
    factor, rest = rstd(var[row], eps), mean[row] - rounded(x, mean[row])
    sum_g_xhat = sum_times_xhat(factor, rest, sum_g, sum_g_centred)
    line = gradient_line(x, mean[row], factor, factor, sum_g / cols, sum_g_xhat / cols)
    return spread(x, line[0]), spread(x, line[1]), spread(x, line[2]), spread(x, line[3])


@compiled
def _gradient_whole(arrays, i, j, line, ahead):
    dy, x, gamma, mask = arrays
    prefetch(dy, i + ahead)
    prefetch(x, i + ahead)
    return input_gradient(load(dy, i) * load(gamma, j & mask), load(x, i), line[0], line[1], line[2], line[3])


@compiled
def _gradient_part(arrays, i, j, first, last, line):
    dy, x, gamma, mask = arrays
    g = load_part(dy, i, first, last, line[2]) * load_part(gamma, j & mask, first, last, line[2])
    return input_gradient(g, load_part(x, i, first, last, line[0]), line[0], line[1], line[2], line[3])


_write_gradient = writer_of_runs(_row_line, _gradient_whole, _gradient_part)


@Kernel
def backward(
    launcher, threads, step, begin, end, plan, dy, x, dx, cols, part_rows, row_g, row_g_centred, mean, var, centred,
    eps, gamma, mask, part_dgamma, part_dbeta, dgamma, dbeta, past_cache,
):  # fmt: skip
    """Rows first_row..last_row, from the first row of a part on or within one part.

    A task of SUMS and WRITE is a part of the rows, worked on `slab` rows at a time; alone, a task of SUMS is a
    piece of columns, of WRITE a piece of memory. A task of FINISH is a strip of columns of dgamma and dbeta.
    """
    if threads:
        hand_out(launcher, threads, plan)
        return
    steps, slab, ahead = plan[step, STEPS], plan[step, GROUP], plan[step, AHEAD]
    first_row, last_row = plan[step, FIRST], plan[step, LAST]
    pieces = -(-cols // PIECE)
    numbers = (x, cols, pieces, row_g, row_g_centred, mean, var, centred, eps)
    arrays = (dy, x, gamma, mask)
    for task in range(begin, end):
        if steps == FINISH:
            for j in range(task * STRIP, least((task + 1) * STRIP, cols)):
                put(dgamma, j, 0.0)
                put(dbeta, j, 0.0)
            for part in range(0, part_dgamma.size, cols):
                for j in range(task * STRIP, least((task + 1) * STRIP, cols)):
                    put(dgamma, j, element(dgamma, j) + element(part_dgamma, part + j))
                    put(dbeta, j, element(dbeta, j) + element(part_dbeta, part + j))
            continue
        top, bottom, first_piece, last_piece = first_row, last_row, 0, pieces
        if steps == SUMS:
            first_piece, last_piece = task, task + 1
        elif steps == SUMS + WRITE:
            top, bottom = first_row + task * part_rows, least(first_row + (task + 1) * part_rows, last_row)
        for first in range(top, bottom, slab):
            last = least(first + slab, bottom)
            if steps & SUMS:
                for row in range(first, last):
                    factor = rstd(var[row], eps)
                    for piece in range(first_piece, last_piece):
                        k, upto = piece * PIECE, least((piece + 1) * PIECE, cols)
                        at, offset = row * pieces + piece, row // part_rows * cols
                        row_g[at], row_g_centred[at] = _sum_piece(
                            dy, x, row * cols, k, upto, mean[row], factor, gamma, mask, part_dgamma, part_dbeta, offset
                        )
            if steps & WRITE:
                start, stop = first * cols, last * cols
                if steps == WRITE:
                    start, stop = start + task * WRITTEN, least(start + (task + 1) * WRITTEN, stop)
                else:  # a line that two slabs share is written with the second
                    start = line_start(dx, start, top * cols)
                    stop = line_start(dx, stop, top * cols) if last < bottom else stop
                _write_gradient(arrays, dx, start, stop, last_row, cols, numbers, past_cache, ahead)
    fence()
