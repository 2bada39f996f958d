"""The channel family where adjacent elements belong to different channels: (outer, channels, inner), inner short.

The memory is a matrix of `outer` rows and channels*inner columns; loops run along a row, so that every column has
its own accumulator and nothing is summed across a vector. The spec of the tiling:

    for block of channels:              at most WIDTH columns
        for part of rows:               about PART elements; parts run in parallel where blocks are few
            for chunk of rows:          CHUNK rows, exact two-pass per column, the chunk being in the cache
            merge the chunks in order
            merge the columns that belong to one channel, in order
        merge the parts in order

Where a row is shorter than WIDTH, `fold` rows that follow one another are worked on as one longer row, and their
columns merged at the end: three channels would fill a fifth of a vector. The last rows of a part may not fill a
folded row; they are worked on unfolded.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x, dy, y, dx are 1-D storage arrays, sizes are integers.

from __future__ import annotations

from fastnorm.backends.numba_cpu._launch import Kernel, compiled
from fastnorm.backends.numba_cpu._output import writer_of_columns
from fastnorm.backends.numba_cpu._runs import COEFFICIENTS, FINISH, SUMS, WRITE, gradient_lines, normalizing_lines
from fastnorm.backends.numba_cpu._scalars import (
    centred_squares,
    input_gradient,
    least,
    merged_mean,
    merged_squares,
    normalized,
    rounded,
    rstd,
    sum_times_xhat,
)
from fastnorm.backends.numba_cpu._tasks import hand_out
from fastnorm.backends.numba_cpu._vectors import (
    SCRATCH,
    begun,
    element,
    fence,
    lanes,
    load,
    load4,
    load_part,
    prefetch,
    put,
    scratch,
    spread4,
    store4,
)

WIDTH = 512
"""Columns of a block: 2 KB of a float32 row; 256 took up to 1.3 times as long on (40000, 512)."""
CHUNK = 64
"""Rows of a chunk: at most this many additions in float32; 128 KB of float32 at full width."""
TOGETHER = 8
"""Rows that are added to the running sums of a chunk together, so that these stay in registers."""
PART = 1 << 17
"""Elements of a part at full width."""
BAND = 1 << 16
"""Elements that one task writes where the statistics are known."""


Grid = tuple[int, int, int, int, int]


def grid(outer: int, channels: int, inner: int) -> Grid:
    """(channels a block, blocks, rows folded into one, rows a part, parts)"""
    blocks = -(-channels // -(-channels // -(-channels * inner // WIDTH)))
    group = -(-channels // blocks)
    fold = 1 if blocks > 1 else max(1, min(WIDTH // (channels * inner), outer // 16))
    rows = -(-PART // (group * inner * fold)) * fold
    return group, blocks, fold, rows, -(-outer // rows)


@compiled
def _share(out, task, steps, outer, channels, inner, grid):
    """(first channel, last channel, first part, last part) of a task: a block of channels, all its rows or a part.

    Where all rows lie alike, blocks start where lines of the output do: the first is narrower, the last wider.
    """
    group, blocks, _, _, parts = grid
    block, part, upto = task, 0, parts
    if steps == SUMS:
        block, part = task % blocks, task // blocks
        upto = part + 1
    shifted = begun(out) if inner == 1 and channels % lanes(out) == 0 else 0
    first = block * group - shifted if block > 0 else 0
    last = (block + 1) * group - shifted if block < blocks - 1 else channels
    return first, last, part, upto


@compiled
def _section(section, rows, fold):
    """(first row, folded rows, rows folded into one): section 0 is what fold divides, 1 the rows left over."""
    folded = rows // fold
    return (0, folded, fold) if section == 0 else (folded * fold, rows - folded * fold, 1)


# ---- forward ---------------------------------------------------------------------------------------


def _sum_down(term):
    """sums[j] = the sum of term(x - centre) down each column, a few rows at a time, so that they stay in registers."""

    @compiled
    def sum_down(x, top, stride, rows, columns, centre, sums):
        zero = spread4(x, 0.0)
        for first in range(0, rows, TOGETHER):
            last = least(first + TOGETHER, rows)
            for j in range(0, columns, 4 * lanes(x)):
                middle = load4(centre, j, SCRATCH, zero)
                running = load4(sums, j, SCRATCH, zero) if first > 0 else zero
                for row in range(first, last):
                    running += term(load4(x, top + row * stride + j, columns - j, middle) - middle)
                store4(sums, j, running, SCRATCH)

    return sum_down


@compiled
def _itself(deviation):
    return deviation


@compiled
def _squared(deviation):
    return deviation * deviation


_deviations = _sum_down(_itself)
_squares = _sum_down(_squared)


@compiled
def _matrix_moments(x, start, stride, rows, columns, mean, squares):
    """Mean and centred squares of each column of a matrix; a chunk's first row is the pivot."""
    zero = spread4(x, 0.0)
    centre, sums, chunk_mean = scratch(x), scratch(x), scratch(mean)
    for chunk in range(0, rows, CHUNK):
        count = least(CHUNK, rows - chunk)
        top = start + chunk * stride
        share = count / (chunk + count)
        for j in range(0, columns, 4 * lanes(x)):
            store4(centre, j, load4(x, top + j, columns - j, zero), SCRATCH)
        _deviations(x, top, stride, count, columns, centre, sums)
        for j in range(columns):
            exact = element(centre, j) + element(sums, j) / count
            put(chunk_mean, j, exact)
            put(centre, j, exact)
        _squares(x, top, stride, count, columns, centre, sums)
        for j in range(columns):
            exact = element(chunk_mean, j)
            more = centred_squares(element(sums, j), count, exact - element(centre, j))
            if chunk > 0:
                more = merged_squares(element(mean, j), element(squares, j), exact, more, chunk, share)
                exact = merged_mean(element(mean, j), exact, share)
            put(mean, j, exact)
            put(squares, j, more)


@compiled
def _merge_columns(mean, squares, rows, seen, inner, channels, fold, first, into_mean, into_squares):
    """Merge the columns of each channel into its place; `seen` elements of it are there already."""
    for channel in range(channels):
        count, target = seen, first + channel
        for copy in range(fold):
            for i in range(inner):
                j = (copy * channels + channel) * inner + i
                share = rows / (count + rows)
                squares_there = into_squares[target] if count > 0 else 0.0
                mean_there = into_mean[target] if count > 0 else 0.0
                into_squares[target] = merged_squares(mean_there, squares_there, mean[j], squares[j], count, share)
                into_mean[target] = merged_mean(mean_there, mean[j], share)
                count += rows


@compiled
def _part_moments(x, outer, channels, inner, grid, part_mean, part_squares, first, group, part):
    """Moments of a block of channels over a part of the rows, into row `part` of the part arrays."""
    _, _, fold, part_rows, _ = grid
    row, into = part * part_rows, part * channels + first
    rows = least(part_rows, outer - row)
    mean, squares = scratch(part_mean), scratch(part_mean)
    for section in range(2):
        above, folded, copies = _section(section, rows, fold)
        if folded > 0:
            start = ((row + above) * channels + first) * inner
            width = channels * inner * copies
            _matrix_moments(x, start, width, folded, group * inner * copies, mean, squares)
            _merge_columns(mean, squares, folded, above * inner, inner, group, copies, into, part_mean, part_squares)


@compiled
def _merge_parts(outer, channels, inner, grid, part_mean, part_squares, mean, var, first, last):
    """Merge the parts of some channels, and divide."""
    _, _, _, part_rows, parts = grid
    seen = 0
    for part in range(parts):
        count = least(part_rows, outer - part * part_rows) * inner
        share = count / (seen + count)
        for c in range(first, last):
            i = part * channels + c
            squares, exact = element(part_squares, i), element(part_mean, i)
            if part > 0:
                squares = merged_squares(element(mean, c), element(var, c), exact, squares, seen, share)
                exact = merged_mean(element(mean, c), exact, share)
            put(mean, c, exact)
            put(var, c, squares)
        seen += count
    for c in range(first, last):
        var[c] /= seen


@compiled
def _lines_of_columns(lines, channels, inner, fold, kinds, first, last, columns, length):
    """The `kinds` coefficients of channels first..last for each of their columns in a folded row, and for those with
    which the row starts behind its end, too."""
    width = channels * inner
    for kind in range(kinds):
        for c in range(first, last):
            value = element(lines, kind * channels + c)
            for i in range(c * inner, (c + 1) * inner):
                for j in range(i, length, width):
                    put(columns, kind * length + j, value)


@compiled
def _write_extent(task, steps, run, outer, channels, inner, blocks, first, last):
    """The memory that a task writes: a band of all, the last first, since it was read last; or a block's rows."""
    size = outer * channels * inner
    if steps == WRITE:
        band = -(-size // BAND) - 1 - task
        return band * BAND, least((band + 1) * BAND, size)
    if blocks == 1:
        return 0, size
    return (run * channels + first) * inner, (run * channels + last) * inner


@compiled
def _normalized_whole(arrays, i, j, ahead):
    x, columns, length = arrays
    prefetch(x, i + ahead)
    scale, shift = load(columns, length + j), load(columns, 2 * length + j)
    return normalized(load(x, i), load(columns, j), scale, shift)


@compiled
def _normalized_part(arrays, i, j, count):
    x, columns, length = arrays
    centre, scale, shift = load(columns, j), load(columns, length + j), load(columns, 2 * length + j)
    return normalized(load_part(x, i, 0, count, centre), centre, scale, shift)


_write_normalized = writer_of_columns(_normalized_whole, _normalized_part)


@Kernel
def forward(
    launcher, begin, end, x, y, outer, channels, inner, grid, steps, part_mean, part_squares, mean, var, eps,
    parameters, lines, columns, past_cache, ahead,
):  # fmt: skip
    """lines, columns: room for three coefficients a channel, and a column of a folded row and a line more."""
    if launcher:
        hand_out(launcher, begin, end)
        return
    period, length = channels * inner * grid[2], columns.size // 3
    for task in range(begin, end):
        first, last, part, upto = _share(y, task, steps, outer, channels, inner, grid)
        if steps & SUMS:
            for i in range(part, upto):
                _part_moments(x, outer, channels, inner, grid, part_mean, part_squares, first, last - first, i)
        if steps & FINISH:
            _merge_parts(outer, channels, inner, grid, part_mean, part_squares, mean, var, first, last)
        if steps & COEFFICIENTS:
            normalizing_lines(x, mean, var, eps, parameters, lines, channels, first, last)
            _lines_of_columns(lines, channels, inner, grid[2], 3, first, last, columns, length)
        if steps & WRITE:
            for run in range(1 if steps == WRITE or grid[1] == 1 else outer):
                at, end_at = _write_extent(task, steps, run, outer, channels, inner, grid[1], first, last)
                _write_normalized((x, columns, length), y, at, end_at, period, past_cache, ahead)
    fence()


# ---- backward --------------------------------------------------------------------------------------


@compiled
def _matrix_sums(dy, x, start, stride, rows, columns, centre, sum_dy, sum_dy_centred):
    """Add sum(dy) and sum(dy*(x - centre)) of each column; float32 chains end after CHUNK rows."""
    zero = spread4(x, 0.0)
    chunk_dy, chunk_dy_centred = scratch(x), scratch(x)
    for first in range(0, rows, TOGETHER):
        last = least(first + TOGETHER, rows)
        for j in range(0, columns, 4 * lanes(x)):
            middle = load4(centre, j, SCRATCH, zero)
            running_dy, running = zero, zero
            if first % CHUNK > 0:
                running_dy, running = load4(chunk_dy, j, SCRATCH, zero), load4(chunk_dy_centred, j, SCRATCH, zero)
            for row in range(first, last):
                at = start + row * stride + j
                grad = load4(dy, at, columns - j, zero)
                running_dy += grad
                running += grad * (load4(x, at, columns - j, middle) - middle)
            store4(chunk_dy, j, running_dy, SCRATCH)
            store4(chunk_dy_centred, j, running, SCRATCH)
        if last % CHUNK == 0 or last == rows:
            for j in range(columns):
                put(sum_dy, j, element(sum_dy, j) + element(chunk_dy, j))
                put(sum_dy_centred, j, element(sum_dy_centred, j) + element(chunk_dy_centred, j))


@compiled
def _part_sums(dy, x, outer, channels, inner, grid, mean, part_dy, part_dy_centred, first, group, part):
    """Sums of a block of channels over a part of the rows, into row `part` of the part arrays."""
    _, _, fold, part_rows, _ = grid
    row, into = part * part_rows, part * channels + first
    rows, columns = least(part_rows, outer - row), group * inner
    centre, sum_dy, sum_dy_centred = scratch(x), scratch(mean), scratch(mean)
    for c in range(group):
        for copy in range(fold):
            for j in range(copy * columns + c * inner, copy * columns + (c + 1) * inner):
                centre[j], sum_dy[j], sum_dy_centred[j] = mean[first + c], 0.0, 0.0
    for section in range(2):
        above, folded, copies = _section(section, rows, fold)
        start = ((row + above) * channels + first) * inner
        width = channels * inner * copies
        _matrix_sums(dy, x, start, width, folded, columns * copies, centre, sum_dy, sum_dy_centred)
    for c in range(group):
        total_dy, centred = 0.0, 0.0
        for copy in range(fold):
            for j in range(copy * columns + c * inner, copy * columns + (c + 1) * inner):
                total_dy += sum_dy[j]
                centred += sum_dy_centred[j]
        part_dy[into + c], part_dy_centred[into + c] = total_dy, centred


@compiled
def _add_parts(x, channels, parts, part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat, first, last):
    for c in range(first, last):
        sum_dy[c], sum_dy_xhat[c] = 0.0, 0.0
    for part in range(parts):
        for c in range(first, last):
            put(sum_dy, c, element(sum_dy, c) + element(part_dy, part * channels + c))
            put(sum_dy_xhat, c, element(sum_dy_xhat, c) + element(part_dy_centred, part * channels + c))
    for c in range(first, last):
        rest = mean[c] - rounded(x, mean[c])
        sum_dy_xhat[c] = sum_times_xhat(rstd(var[c], eps), rest, sum_dy[c], sum_dy_xhat[c])


@compiled
def _gradient_whole(arrays, i, j, ahead):
    dy, x, columns, length = arrays
    prefetch(dy, i + ahead)
    prefetch(x, i + ahead)
    centre, scale = load(columns, j), load(columns, length + j)
    lift, slope = load(columns, 2 * length + j), load(columns, 3 * length + j)
    grad = load(dy, i) * load(columns, 4 * length + j)
    return input_gradient(grad, load(x, i), centre, scale, lift, slope)


@compiled
def _gradient_part(arrays, i, j, count):
    dy, x, columns, length = arrays
    centre, scale = load(columns, j), load(columns, length + j)
    lift, slope = load(columns, 2 * length + j), load(columns, 3 * length + j)
    gain = load(columns, 4 * length + j)
    grad, value = load_part(dy, i, 0, count, lift) * gain, load_part(x, i, 0, count, centre)
    return input_gradient(grad, value, centre, scale, lift, slope)


_write_gradient = writer_of_columns(_gradient_whole, _gradient_part)


@Kernel
def backward(
    launcher, begin, end, dy, x, dx, outer, channels, inner, grid, steps, part_dy, part_dy_centred, mean, var, eps,
    factors, sum_dy, sum_dy_xhat, count, lines, columns, past_cache, ahead,
):  # fmt: skip
    """lines, columns: as in `forward`, for five coefficients."""
    if launcher:
        hand_out(launcher, begin, end)
        return
    period, length = channels * inner * grid[2], columns.size // 5
    for task in range(begin, end):
        first, last, part, upto = _share(dx, task, steps, outer, channels, inner, grid)
        if steps & SUMS:
            for i in range(part, upto):
                _part_sums(dy, x, outer, channels, inner, grid, mean, part_dy, part_dy_centred, first, last - first, i)
        if steps & FINISH:
            _add_parts(x, channels, grid[4], part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat, first, last)
        if steps & COEFFICIENTS:
            gradient_lines(x, mean, var, eps, factors, sum_dy, sum_dy_xhat, count, lines, channels, first, last)
            _lines_of_columns(lines, channels, inner, grid[2], 5, first, last, columns, length)
        if steps & WRITE:
            for run in range(1 if steps == WRITE or grid[1] == 1 else outer):
                at, end_at = _write_extent(task, steps, run, outer, channels, inner, grid[1], first, last)
                _write_gradient((dy, x, columns, length), dx, at, end_at, period, past_cache, ahead)
    fence()
