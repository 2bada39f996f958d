"""The channel family where adjacent elements belong to different channels: (outer, channels, inner), inner short.

The memory is a matrix of `outer` rows and channels*inner columns; loops run along a row, so that every column has
its own accumulator and nothing is summed across a vector. Several such matrices may follow one another, samples with
statistics of their own, which `span` adjacent channels share. The spec of the tiling of one:

    for block of channels:              at most WIDTH columns
        for part of rows:               about PART elements; parts run in parallel where blocks are few
            for chunk of rows:          CHUNK rows, exact two-pass per column, the chunk being in the cache
            merge the chunks in order
            merge the columns that belong to one channel, in order
        merge the parts in order
    merge the channels that share a statistic

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
ROOM = 64
"""Coefficients behind those of a row: what a line of the output may reach into, and more."""


Grid = tuple[int, int, int, int, int]


def grid(outer: int, channels: int, inner: int) -> Grid:
    """(channels a block, blocks, rows folded into one, rows a part, parts)"""
    blocks = -(-channels // -(-channels // -(-channels * inner // WIDTH)))
    group = -(-channels // blocks)
    fold = 1 if blocks > 1 else max(1, min(WIDTH // (channels * inner), outer // 16))
    rows = -(-PART // (group * inner * fold)) * fold
    return group, blocks, fold, rows, -(-outer // rows)


@compiled
def _share(out, task, steps, outer, channels, inner, span, grid, group):
    """(sample, first channel, last channel, first part, last part) of a task: `group` channels of a sample, all their
    rows or a part of them; or a band of the sample's memory instead of a part.

    Where all rows lie alike, groups start where lines of the output do: the first is narrower, the last wider.
    """
    parts = 1
    if steps == SUMS:
        parts = grid[4]
    elif steps == WRITE:
        parts = -(-outer * channels * inner // BAND)
    groups = -(-channels // group)
    sample, part, i = task // (groups * parts), task // groups % parts, task % groups
    shifted = begun(out) if span == 1 and inner == 1 and channels % lanes(out) == 0 else 0
    first = i * group - shifted if i > 0 else 0
    last = (i + 1) * group - shifted if i < groups - 1 else channels
    return sample, first, last, part, part + 1 if steps == SUMS else grid[4]


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
def _block(channels, inner, grid):
    """How many of so many channels are summed at once: a block, or all, if not many more."""
    return channels if channels * inner <= SCRATCH else grid[0]


@compiled
def _part_moments(x, sample, outer, channels, inner, grid, part_mean, part_squares, first, group, part):
    """Moments of a block of channels over a part of the rows of a sample, into the part's row of the part arrays."""
    _, _, fold, part_rows, parts = grid
    row, into = part * part_rows, (sample * parts + part) * channels + first
    rows = least(part_rows, outer - row)
    mean, squares = scratch(part_mean), scratch(part_mean)
    for section in range(2):
        above, folded, copies = _section(section, rows, fold)
        if folded > 0:
            top = ((sample * outer + row + above) * channels + first) * inner
            width = channels * inner * copies
            _matrix_moments(x, top, width, folded, group * inner * copies, mean, squares)
            _merge_columns(mean, squares, folded, above * inner, inner, group, copies, into, part_mean, part_squares)


@compiled
def _merge_parts(outer, channels, inner, span, grid, part_mean, part_squares, mean, var, sample, first, last):
    """Merge the parts of some channels into the first part, then the channels of each statistic; and divide."""
    _, _, _, part_rows, parts = grid
    top = sample * parts * channels
    seen = least(part_rows, outer) * inner
    for part in range(1, parts):
        count = least(part_rows, outer - part * part_rows) * inner
        share = count / (seen + count)
        for c in range(first, last):
            at, i = top + c, top + part * channels + c
            exact, squares = element(part_mean, at), element(part_squares, at)
            more, more_squares = element(part_mean, i), element(part_squares, i)
            put(part_squares, at, merged_squares(exact, squares, more, more_squares, seen, share))
            put(part_mean, at, merged_mean(exact, more, share))
        seen += count
    for c in range(first, last, span):
        at = top + c
        apart, squares, between = 0.0, 0.0, 0.0
        for i in range(at + 1, at + span):
            apart += element(part_mean, i) - element(part_mean, at)  # equal ones stay exact
        exact = element(part_mean, at) + apart / span
        for i in range(at, at + span):
            delta = element(part_mean, i) - exact
            squares += element(part_squares, i)
            between += delta * delta
        statistic = (sample * channels + c) // span
        put(mean, statistic, exact)
        put(var, statistic, squares / (seen * span) + between / span)


@compiled
def _lines_of_columns(lines, kinds, sample, channels, inner, fold, first, last, columns):
    """The `kinds` coefficients of channels first..last for each of their columns in a folded row, and for those with
    which the row starts behind its end, too."""
    width, samples = channels * inner, lines.size // (kinds * channels)
    room = width * fold + ROOM
    for kind in range(kinds):
        of_channels, of_columns = (kind * samples + sample) * channels, (kind * samples + sample) * room
        for c in range(first, last):
            value = element(lines, of_channels + c)
            for i in range(c * inner, (c + 1) * inner):
                for j in range(i, room, width):
                    put(columns, of_columns + j, value)


@compiled
def _written(steps, outer, channels, inner, first, last, part):
    """(first element, elements, how often, a row apart) of what a task writes of a sample: a band of it, the last
    first, since it was read last; or its rows, or its channels in each of them."""
    size = outer * channels * inner
    if steps == WRITE:
        at = (-(-size // BAND) - 1 - part) * BAND
        return at, least(BAND, size - at), 1
    if last - first == channels:
        return 0, size, 1
    return first * inner, (last - first) * inner, outer


@compiled
def _normalized_whole(arrays, i, j, ahead):
    x, columns, length, row = arrays
    prefetch(x, i + ahead)
    j += row
    scale, shift = load(columns, length + j), load(columns, 2 * length + j)
    return normalized(load(x, i), load(columns, j), scale, shift)


@compiled
def _normalized_part(arrays, i, j, count):
    x, columns, length, row = arrays
    j += row
    centre, scale, shift = load(columns, j), load(columns, length + j), load(columns, 2 * length + j)
    return normalized(load_part(x, i, 0, count, centre), centre, scale, shift)


_write_normalized = writer_of_columns(_normalized_whole, _normalized_part)


@Kernel
def forward(
    launcher, begin, end, x, y, first_sample, outer, channels, inner, span, grid, group, steps, part_mean,
    part_squares, mean, var, eps, parameters, lines, columns, past_cache, ahead,
):  # fmt: skip
    """lines, columns: room for three coefficients a channel, and a column of a folded row and a line more, of each
    sample."""
    if launcher:
        hand_out(launcher, begin, end)
        return
    size, period, length = outer * channels * inner, channels * inner * grid[2], columns.size // 3
    for task in range(begin, end):
        sample, first, last, part, upto = _share(y, task, steps, outer, channels, inner, span, grid, group)
        sample += first_sample
        start, above = sample * size, sample * channels
        if steps & SUMS:
            for i in range(part, upto):
                block = first
                while block < last:
                    count = _block(last - block, inner, grid)
                    _part_moments(x, sample, outer, channels, inner, grid, part_mean, part_squares, block, count, i)
                    block += count
        if steps & FINISH:
            _merge_parts(outer, channels, inner, span, grid, part_mean, part_squares, mean, var, sample, first, last)
        if steps & COEFFICIENTS:
            normalizing_lines(
                x, mean, var, eps, parameters, span, channels, lines, lines.size // 3, above + first, above + last
            )  # fmt: skip
            _lines_of_columns(lines, 3, sample, channels, inner, grid[2], first, last, columns)
        if steps & WRITE:
            at, count, rows = _written(steps, outer, channels, inner, first, last, part)
            arrays = (x, columns, length, sample * (period + ROOM))
            for row in range(rows):
                top = start + at + row * channels * inner
                _write_normalized(arrays, y, top, top + count, at % period, period, past_cache, ahead)
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
def _part_sums(dy, x, sample, outer, channels, inner, span, grid, mean, part_dy, part_dy_centred, first, group, part):
    """Sums of a block of channels over a part of the rows of a sample, into the part's row of the part arrays."""
    _, _, fold, part_rows, parts = grid
    row, into = part * part_rows, (sample * parts + part) * channels + first
    rows, columns = least(part_rows, outer - row), group * inner
    centre, sum_dy, sum_dy_centred = scratch(x), scratch(mean), scratch(mean)
    for c in range(group):
        middle = element(mean, (sample * channels + first + c) // span)
        for copy in range(fold):
            for j in range(copy * columns + c * inner, copy * columns + (c + 1) * inner):
                centre[j], sum_dy[j], sum_dy_centred[j] = middle, 0.0, 0.0
    for section in range(2):
        above, folded, copies = _section(section, rows, fold)
        top = ((sample * outer + row + above) * channels + first) * inner
        width = channels * inner * copies
        _matrix_sums(dy, x, top, width, folded, columns * copies, centre, sum_dy, sum_dy_centred)
    for c in range(group):
        total_dy, centred = 0.0, 0.0
        for copy in range(fold):
            for j in range(copy * columns + c * inner, copy * columns + (c + 1) * inner):
                total_dy += sum_dy[j]
                centred += sum_dy_centred[j]
        part_dy[into + c], part_dy_centred[into + c] = total_dy, centred


@compiled
def _add_parts(
    x, sample, channels, span, parts, part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat, first, last,
):  # fmt: skip
    above, top = sample * channels, sample * parts * channels
    for c in range(above + first, above + last):
        put(sum_dy, c, 0.0)
        put(sum_dy_xhat, c, 0.0)
    for part in range(parts):
        for c in range(first, last):
            i = top + part * channels + c
            put(sum_dy, above + c, element(sum_dy, above + c) + element(part_dy, i))
            put(sum_dy_xhat, above + c, element(sum_dy_xhat, above + c) + element(part_dy_centred, i))
    for statistic in range((above + first) // span, (above + last) // span):
        middle, factor = element(mean, statistic), rstd(element(var, statistic), eps)
        rest = middle - rounded(x, middle)
        for c in range(statistic * span, (statistic + 1) * span):
            put(sum_dy_xhat, c, sum_times_xhat(factor, rest, element(sum_dy, c), element(sum_dy_xhat, c)))


@compiled
def _gradient_whole(arrays, i, j, ahead):
    dy, x, columns, length, row = arrays
    prefetch(dy, i + ahead)
    prefetch(x, i + ahead)
    j += row
    centre, scale = load(columns, j), load(columns, length + j)
    lift, slope = load(columns, 2 * length + j), load(columns, 3 * length + j)
    grad = load(dy, i) * load(columns, 4 * length + j)
    return input_gradient(grad, load(x, i), centre, scale, lift, slope)


@compiled
def _gradient_part(arrays, i, j, count):
    dy, x, columns, length, row = arrays
    j += row
    centre, scale = load(columns, j), load(columns, length + j)
    lift, slope = load(columns, 2 * length + j), load(columns, 3 * length + j)
    gain = load(columns, 4 * length + j)
    grad, value = load_part(dy, i, 0, count, lift) * gain, load_part(x, i, 0, count, centre)
    return input_gradient(grad, value, centre, scale, lift, slope)


_write_gradient = writer_of_columns(_gradient_whole, _gradient_part)


@Kernel
def backward(
    launcher, begin, end, dy, x, dx, first_sample, outer, channels, inner, span, grid, group, steps, part_dy,
    part_dy_centred, mean, var, eps, factors, sum_dy, sum_dy_xhat, count, lines, columns, past_cache, ahead,
):  # fmt: skip
    """lines, columns: as in `forward`, for five coefficients."""
    if launcher:
        hand_out(launcher, begin, end)
        return
    size, period, length = outer * channels * inner, channels * inner * grid[2], columns.size // 5
    for task in range(begin, end):
        sample, first, last, part, upto = _share(dx, task, steps, outer, channels, inner, span, grid, group)
        sample += first_sample
        start, above = sample * size, sample * channels
        if steps & SUMS:
            for i in range(part, upto):
                block = first
                while block < last:
                    some = _block(last - block, inner, grid)
                    _part_sums(
                        dy, x, sample, outer, channels, inner, span, grid, mean, part_dy, part_dy_centred,
                        block, some, i,
                    )  # fmt: skip
                    block += some
        if steps & FINISH:
            _add_parts(
                x, sample, channels, span, grid[4], part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat,
                first, last,
            )  # fmt: skip
        if steps & COEFFICIENTS:
            gradient_lines(
                x, mean, var, eps, factors, span, channels, sum_dy, sum_dy_xhat, count, lines, lines.size // 5,
                above + first, above + last,
            )  # fmt: skip
            _lines_of_columns(lines, 5, sample, channels, inner, grid[2], first, last, columns)
        if steps & WRITE:
            at, written, rows = _written(steps, outer, channels, inner, first, last, part)
            arrays = (dy, x, columns, length, sample * (period + ROOM))
            for row in range(rows):
                top = start + at + row * channels * inner
                _write_gradient(arrays, dx, top, top + written, at % period, period, past_cache, ahead)
    fence()
