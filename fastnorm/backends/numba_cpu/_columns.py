"""The channel family where adjacent elements belong to different channels: (outer, channels, inner), inner short.

The memory is a matrix of `outer` rows and channels*inner columns; loops run along a row, so that every column has
its own accumulator and nothing is summed across a vector. Several such matrices may follow one another, samples with
statistics of their own, which `span` adjacent channels share. The spec of the tiling of one:

    for block of channels:              at most WIDTH columns
        for part of rows:               about PART elements; parts run in parallel where blocks are few
            for chunk of rows:          CHUNK rows, in one pass around a pivot, the mean of what was before or of half
                                        of the first chunk: sums down the columns, then of the columns
                                        that belong to one channel
            merge the chunks in order
        merge the parts in order
    merge the channels that share a statistic

Where a row is shorter than WIDTH, `fold` rows that follow one another are worked on as one longer row, with as many
copies of each column: three channels would fill a fifth of a vector. The last rows of a part may not fill a folded
row; they are worked on unfolded.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x, dy, y, dx are 1-D storage arrays, sizes are integers.

from __future__ import annotations

import functools

from fastnorm.backends.numba_cpu._compiler import compiled
from fastnorm.backends.numba_cpu._launch import Kernel
from fastnorm.backends.numba_cpu._output import READ_AHEAD, writer_of_columns
from fastnorm.backends.numba_cpu._runs import (
    COEFFICIENTS,
    FINISH,
    SUMS,
    WRITE,
    gradient_lines,
    normalizing_lines,
    of_channels,
    together,
)
from fastnorm.backends.numba_cpu._scalars import (
    centred_squares,
    input_gradient,
    least,
    merged_mean,
    merged_squares,
    normalized,
    rstd,
    sum_times_xhat,
)
from fastnorm.backends.numba_cpu._tasks import FIRST, GROUP, STEPS, hand_out
from fastnorm.backends.numba_cpu._vectors import (
    SCRATCH,
    WIDE,
    begun,
    element,
    fence,
    itemsize,
    lanes,
    load,
    load4,
    load_part,
    load_wide,
    prefetch,
    prefetch4,
    put,
    rounded,
    scratch,
    spread4,
    spread_wide,
    store4,
    store_wide,
    total,
)

WIDTH = 512
"""Columns of a block: 2 KB of a float32 row; 256 took up to 1.3 times as long on (40000, 512)."""
CHUNK = 64
"""Rows of a chunk: at most this many additions in float32; 128 KB of float32 at full width."""
TOGETHER = 8
"""Rows that are added to the running sums of a chunk together, so that these stay in registers."""
SUMMED_AHEAD = 1 << 14
"""Bytes from what is summed to what is fetched meanwhile, of rows so short that the eight taken together are fewer.
Moments of (262144, 64) on one core 3.7 to 2.9 ms; rows of 1,024 columns took longer, and so did the two arrays of the
backward."""
PART = 1 << 17
"""Elements of a part at full width."""
BAND = 1 << 16
"""Elements that one task writes where the statistics are known."""
ROOM = 64
"""Coefficients behind those of a row: what a line of the output may reach into, and more."""


Grid = tuple[int, int, int, int, int]


@functools.lru_cache
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


@compiled
def _collapse(sums, channels, inner, copies):
    """From sums of columns to those of their channels, in place."""
    width, zero = channels * inner, spread4(sums, 0.0)
    for copy in range(1, copies):
        for j in range(0, width, 4 * lanes(sums)):
            more = load4(sums, copy * width + j, SCRATCH, zero)
            store4(sums, j, load4(sums, j, SCRATCH, zero) + more, width - j)
    if inner > 1:
        for c in range(channels):
            at, running = c * inner, zero
            for i in range(0, inner, 4 * lanes(sums)):
                running += load4(sums, at + i, inner - i, zero)
            put(sums, c, total(running))


@compiled
def _expand(values, channels, inner, copies):
    """From values of channels to those of their columns, in place."""
    width, zero = channels * inner, spread4(values, 0.0)
    if inner > 1:
        for k in range(channels):
            c = channels - 1 - k
            value = spread4(values, element(values, c))
            for j in range(0, inner, 4 * lanes(values)):
                store4(values, c * inner + j, value, inner - j)
    for copy in range(1, copies):
        for j in range(0, width, 4 * lanes(values)):
            store4(values, copy * width + j, load4(values, j, SCRATCH, zero), width - j)


_kernel = functools.partial(Kernel, unroll=False)
"""Unrolled loops took a quarter longer to compile and 1.03 times as long to run."""

# ---- forward ---------------------------------------------------------------------------------------


@compiled
def _sums_down(x, top, stride, rows, columns, centre, sums, squares, ahead):
    """Sums of x - centre and of their squares down each column, a few rows at a time, so that they stay in
    registers."""
    zero = spread4(x, 0.0)
    for first in range(0, rows, TOGETHER):
        last = least(first + TOGETHER, rows)
        for j in range(0, columns, 4 * lanes(x)):
            middle, running, square = load4(centre, j, SCRATCH, zero), zero, zero
            if first > 0:
                running, square = load4(sums, j, SCRATCH, zero), load4(squares, j, SCRATCH, zero)
            for row in range(first, last):
                if ahead > 0:
                    prefetch4(x, top + row * stride + j + ahead)
                deviation = load4(x, top + row * stride + j, columns - j, middle) - middle
                running += deviation
                square += deviation * deviation
            store4(sums, j, running, SCRATCH)
            store4(squares, j, square, SCRATCH)


@compiled
def _matrix_moments(x, start, stride, rows, channels, inner, copies, seen, mean, squares, into, ahead):
    """Merge the moments of a matrix's channels into those of `seen` elements before.

    The squares are those about a pivot, less what the pivot adds: that is at most what stays, where the first half
    lies apart from the others, and of a later chunk at most twice what its merging adds. (The mean of a quarter as the
    pivot cost two bits.)
    """
    values, zero = inner * copies, spread4(x, 0.0)
    pivots, centre, sums, square, chunk_mean = scratch(x), scratch(x), scratch(x), scratch(x), scratch(mean)
    for chunk in range(0, rows, CHUNK):
        height = least(CHUNK, rows - chunk)
        top, count = start + chunk * stride, height * values
        share = count / (seen + count)
        if seen > 0:
            for c in range(0, channels, WIDE):
                store_wide(pivots, c, load_wide(mean, into + c, channels - c), SCRATCH)
        elif inner > 1:
            for c in range(channels):
                put(pivots, c, element(x, top + c * inner))
        else:
            for c in range(0, channels, 4 * lanes(x)):
                store4(pivots, c, load4(x, top + c, channels - c, zero), SCRATCH)
        for sweep in range(1 if seen > 0 else 0, 2):  # the mean of half of the rows, of all
            some = height if sweep == 1 else -(-height // 2)
            for c in range(0, channels, 4 * lanes(x)):
                store4(centre, c, load4(pivots, c, SCRATCH, zero), SCRATCH)
            _expand(centre, channels, inner, copies)
            _sums_down(x, top, stride, some, channels * values, centre, sums, square, ahead)
            for which in range(2):  # one copy of what is compiled
                _collapse(sums if which == 0 else square, channels, inner, copies)
            for c in range(0, channels, WIDE):
                exact = load_wide(pivots, c, SCRATCH) + load_wide(sums, c, SCRATCH) / (some * values)
                store_wide(chunk_mean, c, exact, SCRATCH)
                if sweep == 0:
                    store_wide(pivots, c, exact, SCRATCH)
        for c in range(0, channels, WIDE):
            at, left, exact = into + c, channels - c, load_wide(chunk_mean, c, SCRATCH)
            more = centred_squares(load_wide(square, c, SCRATCH), count, exact - load_wide(pivots, c, SCRATCH))
            if seen > 0:
                before = load_wide(mean, at, left)
                more = merged_squares(before, load_wide(squares, at, left), exact, more, seen, share)
                exact = merged_mean(before, exact, share)
            store_wide(mean, at, exact, left)
            store_wide(squares, at, more, left)
        seen += count


@compiled
def _fetched(x, channels, inner, past_cache):
    """Elements from those that are summed to those that are fetched, where they come from memory and the rows taken
    together are short; 0: none are."""
    bytes_of_row = channels * inner * itemsize(x)
    return SUMMED_AHEAD // itemsize(x) if past_cache and TOGETHER * bytes_of_row <= SUMMED_AHEAD else 0


@compiled
def _block(channels, inner, grid):
    """How many of so many channels are summed at once: a block, or all, if not many more."""
    return channels if channels * inner <= SCRATCH else grid[0]


@compiled
def _part_moments(x, sample, outer, channels, inner, grid, part_mean, part_squares, first, group, part, ahead):
    """Moments of a block of channels over a part of the rows of a sample, into the part's row of the part arrays."""
    _, _, fold, part_rows, parts = grid
    row, into = part * part_rows, (sample * parts + part) * channels + first
    rows = least(part_rows, outer - row)
    for section in range(2):
        above, folded, copies = _section(section, rows, fold)
        top = ((sample * outer + row + above) * channels + first) * inner
        stride, seen = channels * inner * copies, above * inner
        _matrix_moments(x, top, stride, folded, group, inner, copies, seen, part_mean, part_squares, into, ahead)


@compiled
def _merge_parts(outer, channels, inner, span, grid, part_mean, part_squares, mean, var, sample, first, last):
    """Merge the parts of some channels into the first part, then the channels of each statistic; and divide."""
    _, _, _, part_rows, parts = grid
    top = sample * parts * channels
    seen = least(part_rows, outer) * inner
    for part in range(1, parts):
        count = least(part_rows, outer - part * part_rows) * inner
        share = count / (seen + count)
        for c in range(first, last, WIDE):
            at, i, left = top + c, top + part * channels + c, last - c
            exact, squares = load_wide(part_mean, at, left), load_wide(part_squares, at, left)
            more, more_squares = load_wide(part_mean, i, left), load_wide(part_squares, i, left)
            store_wide(part_squares, at, merged_squares(exact, squares, more, more_squares, seen, share), left)
            store_wide(part_mean, at, merged_mean(exact, more, share), left)
        seen += count
    if span == 1:
        for c in range(first, last, WIDE):
            at, of, left = top + c, sample * channels + c, last - c
            store_wide(mean, of, load_wide(part_mean, at, left), left)
            store_wide(var, of, load_wide(part_squares, at, left) / seen, left)
        return
    for statistic in range((sample * channels + first) // span, (sample * channels + last) // span):
        at = top + statistic * span - sample * channels
        apart, squares, between = 0.0, 0.0, 0.0
        for i in range(at + 1, at + span):
            apart += element(part_mean, i) - element(part_mean, at)  # equal ones stay exact
        exact = element(part_mean, at) + apart / span
        for i in range(at, at + span):
            delta = element(part_mean, i) - exact
            squares += element(part_squares, i)
            between += delta * delta
        put(mean, statistic, exact)
        put(var, statistic, squares / (seen * span) + between / span)


@compiled
def _shift(out, columns):
    """Where coefficients of columns begin, so that a line of them is one in memory where that of the output is."""
    return (begun(out) - begun(columns)) % lanes(out)


@compiled
def _lines_of_columns(lines, kinds, sample, channels, inner, fold, first, last, columns, shift):
    """The `kinds` coefficients of channels first..last for each of their columns in a folded row, and for those with
    which the row starts behind its end, too."""
    width, samples = channels * inner, lines.size // (kinds * channels)
    pitch, room, zero = width * fold + ROOM, width * fold + ROOM - lanes(lines), spread4(lines, 0.0)
    for kind in range(kinds):
        of_channels, of_columns = (kind * samples + sample) * channels, (kind * samples + sample) * pitch + shift
        for copy in range(-(-room // width)):
            above, upto = copy * width, least(last, room - copy * width)
            if inner == 1:
                for c in range(first, upto, 4 * lanes(lines)):
                    store4(columns, of_columns + above + c, load4(lines, of_channels + c, upto - c, zero), upto - c)
                continue
            for c in range(first, last):
                value, at = spread4(lines, element(lines, of_channels + c)), above + c * inner
                upto = least(at + inner, room)
                for j in range(at, upto, 4 * lanes(lines)):
                    store4(columns, of_columns + j, value, upto - j)


@compiled
def _written(steps, outer, channels, inner, first, last, part, past_cache):
    """(first element, elements, how often a row apart, elements to what is fetched meanwhile) of what a task writes of
    a sample: a band of it, the last first, since it was read last; or its rows, or its channels in each of them."""
    size = outer * channels * inner
    if steps == WRITE:
        at = (-(-size // BAND) - 1 - part) * BAND
        return at, least(BAND, size - at), 1, READ_AHEAD
    following = last if last < channels else channels * outer
    ahead = (following - first) * inner if past_cache else READ_AHEAD
    if last - first == channels:
        return 0, size, 1, ahead
    return first * inner, (last - first) * inner, outer, ahead


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


@_kernel
def forward(
    launcher, threads, step, begin, end, plan, x, y, outer, channels, inner, span, grid, part_mean, part_squares, mean,
    var, eps, parameters, lines, columns, past_cache,
):  # fmt: skip
    """lines, columns: room for three coefficients a channel, and a column of a folded row and a line more, of each
    sample."""
    if threads:
        hand_out(launcher, threads, plan)
        return
    steps, group, first_sample = plan[step, STEPS], plan[step, GROUP], plan[step, FIRST]
    size, period, length = outer * channels * inner, channels * inner * grid[2], columns.size // 3
    shift = _shift(y, columns)
    fetched = _fetched(x, channels, inner, past_cache)
    for task in range(begin, end):
        sample, first, last, part, upto = _share(y, task, steps, outer, channels, inner, span, grid, group)
        sample += first_sample
        start, above = sample * size, sample * channels
        if steps & SUMS:
            for i in range(part, upto):
                block = first
                while block < last:
                    count = _block(last - block, inner, grid)
                    _part_moments(
                        x, sample, outer, channels, inner, grid, part_mean, part_squares, block, count, i, fetched
                    )
                    block += count
        if steps & FINISH:
            _merge_parts(outer, channels, inner, span, grid, part_mean, part_squares, mean, var, sample, first, last)
        if steps & COEFFICIENTS:
            normalizing_lines(
                x, mean, var, eps, parameters, span, channels, lines, lines.size // 3, above + first, above + last
            )  # fmt: skip
            _lines_of_columns(lines, 3, sample, channels, inner, grid[2], first, last, columns, shift)
        if steps & WRITE:
            at, count, rows, ahead = _written(steps, outer, channels, inner, first, last, part, past_cache)
            arrays = (x, columns, length, sample * (period + ROOM) + shift)
            for row in range(rows):
                top = start + at + row * channels * inner
                _write_normalized(arrays, y, top, top + count, at % period, period, past_cache, ahead)
    fence()


# ---- backward --------------------------------------------------------------------------------------


@compiled
def _matrix_sums(dy, x, start, stride, rows, channels, inner, copies, centre, sum_dy, sum_dy_centred, into):
    """Add sum(dy) and sum(dy*(x - centre)) of each channel; float32 chains end after CHUNK rows."""
    columns, zero = channels * inner * copies, spread4(x, 0.0)
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
            for which in range(2):  # one copy of what is compiled
                _collapse(chunk_dy if which == 0 else chunk_dy_centred, channels, inner, copies)
            for c in range(0, channels, WIDE):
                at, left = into + c, channels - c
                more, more_centred = load_wide(chunk_dy, c, SCRATCH), load_wide(chunk_dy_centred, c, SCRATCH)
                store_wide(sum_dy, at, load_wide(sum_dy, at, left) + more, left)
                store_wide(sum_dy_centred, at, load_wide(sum_dy_centred, at, left) + more_centred, left)


@compiled
def _part_sums(dy, x, sample, outer, channels, inner, span, grid, mean, part_dy, part_dy_centred, first, group, part):
    """Sums of a block of channels over a part of the rows of a sample, into the part's row of the part arrays."""
    _, _, fold, part_rows, parts = grid
    row, into = part * part_rows, (sample * parts + part) * channels + first
    rows, centre = least(part_rows, outer - row), scratch(x)
    c = 0
    while c < group:
        count = together(first + c, first + group, span)
        store_wide(centre, c, of_channels(mean, sample * channels + first + c, span, count), count)
        store_wide(part_dy, into + c, spread_wide(0.0), count)
        store_wide(part_dy_centred, into + c, spread_wide(0.0), count)
        c += count
    _expand(centre, group, inner, fold)
    for section in range(2):
        above, folded, copies = _section(section, rows, fold)
        top = ((sample * outer + row + above) * channels + first) * inner
        stride = channels * inner * copies
        _matrix_sums(dy, x, top, stride, folded, group, inner, copies, centre, part_dy, part_dy_centred, into)


@compiled
def _add_parts(
    x, sample, channels, span, parts, part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat, first, last,
):  # fmt: skip
    c = first
    while c < last:
        at, count = sample * channels + c, together(c, last, span)
        total_dy, centred = spread_wide(0.0), spread_wide(0.0)
        for i in range(sample * parts * channels + c, (sample + 1) * parts * channels, channels):
            total_dy += load_wide(part_dy, i, count)
            centred += load_wide(part_dy_centred, i, count)
        middle, factor = of_channels(mean, at, span, count), rstd(of_channels(var, at, span, count), eps)
        store_wide(sum_dy, at, total_dy, count)
        store_wide(sum_dy_xhat, at, sum_times_xhat(factor, middle - rounded(x, middle), total_dy, centred), count)
        c += count


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


@_kernel
def backward(
    launcher, threads, step, begin, end, plan, dy, x, dx, outer, channels, inner, span, grid, part_dy, part_dy_centred,
    mean, var, eps, factors, sum_dy, sum_dy_xhat, count, lines, columns, past_cache,
):  # fmt: skip
    """lines, columns: as in `forward`, for five coefficients."""
    if threads:
        hand_out(launcher, threads, plan)
        return
    steps, group, first_sample = plan[step, STEPS], plan[step, GROUP], plan[step, FIRST]
    size, period, length = outer * channels * inner, channels * inner * grid[2], columns.size // 5
    shift = _shift(dx, columns)
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
            _lines_of_columns(lines, 5, sample, channels, inner, grid[2], first, last, columns, shift)
        if steps & WRITE:
            at, written, rows, ahead = _written(steps, outer, channels, inner, first, last, part, past_cache)
            arrays = (dy, x, columns, length, sample * (period + ROOM) + shift)
            for row in range(rows):
                top = start + at + row * channels * inner
                _write_gradient(arrays, dx, top, top + written, at % period, period, past_cache, ahead)
    fence()
