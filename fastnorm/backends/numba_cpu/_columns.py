"""The channel family where adjacent elements belong to different channels: (outer, channels, inner), inner short.

The memory is a matrix of `outer` rows and channels*inner columns; loops run along a row, so that every
column has its own accumulator and nothing is summed across a vector. The spec of the tiling:

    for block of channels:              at most WIDTH columns
        for part of rows:               about PART elements; parts run in parallel where blocks are few
            for chunk of rows:          CHUNK rows, exact two-pass per column, the chunk being in the cache
            merge the chunks in order
            merge the columns that belong to one channel, in order
        merge the parts in order

Where a row is shorter than WIDTH, `fold` rows that follow one another are worked on as one longer row, and
their columns merged at the end: three channels would fill a fifth of a vector. The last rows of a part may
not fill a folded row; they are worked on unfolded.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels: x, dy, y, dx are 1-D storage arrays, sizes are integers.

from __future__ import annotations

import numpy as np

from fastnorm.backends.numba_cpu._launch import Kernel, compiled
from fastnorm.backends.numba_cpu._scalars import (
    affine_line,
    centred_squares,
    gradient_line,
    input_gradient,
    load,
    merged,
    normalized,
    rounded,
    rstd,
    store,
    sum_times_xhat,
    workspace,
)
from fastnorm.backends.numba_cpu._tasks import for_each

WIDTH = 512
"""Columns of a block: 2 KB of a float32 row; 256 took up to 1.3 times as long on (40000, 512)."""
CHUNK = 64
"""Rows of a chunk: at most this many additions in float32; 128 KB of float32 at full width."""
PART = 1 << 17
"""Elements of a part at full width."""


def blocks(channels: int, inner: int) -> int:
    """Blocks of channels that the columns are cut into."""
    width = -(-channels * inner // WIDTH)
    return -(-channels // -(-channels // width))


_compiled_blocks = compiled(blocks)


@compiled
def grid(outer, channels, inner):
    """(channels a block, blocks, rows folded into one, rows a part, parts)"""
    blocks = _compiled_blocks(channels, inner)
    group = -(-channels // blocks)
    fold = 1 if blocks > 1 else max(1, min(WIDTH // (channels * inner), outer // 16))
    rows = -(-PART // (group * inner * fold)) * fold
    return group, blocks, fold, rows, -(-outer // rows)


@compiled
def _extent(task, outer, channels, grid):
    """(first channel, channels, first row, rows) of a task: blocks side by side first, then downwards."""
    group, blocks, _, part_rows, _ = grid
    first, row = task % blocks * group, task // blocks * part_rows
    return first, min(group, channels - first), row, min(part_rows, outer - row)


@compiled
def _section(section, rows, fold):
    """(first row, folded rows, rows folded into one): section 0 is what fold divides, 1 the rows left over."""
    folded = rows // fold
    return (0, folded, fold) if section == 0 else (folded * fold, rows - folded * fold, 1)


@compiled
def _matrix_moments(x, start, stride, rows, columns, mean, squares):
    """Mean and centred squares of each column of a matrix; a chunk's first row is the pivot."""
    total, centre, deviations = workspace(x, columns), workspace(x, columns), workspace(x, columns)
    for chunk in range(0, rows, CHUNK):
        count = min(CHUNK, rows - chunk)
        top = start + chunk * stride
        for j in range(columns):
            total[j] = 0.0
            deviations[j] = 0.0
        for row in range(1, count):
            base = top + row * stride
            for j in range(columns):
                total[j] += load(x, base + j) - load(x, top + j)
        for j in range(columns):
            centre[j] = rounded(x, load(x, top + j) + np.float64(total[j]) / count)
        for row in range(count):
            base = top + row * stride
            for j in range(columns):
                deviation = load(x, base + j) - centre[j]
                deviations[j] += deviation * deviation
        for j in range(columns):
            chunk_mean = load(x, top + j) + np.float64(total[j]) / count
            chunk_squares = centred_squares(np.float64(deviations[j]), count, chunk_mean - centre[j])
            mean[j], squares[j] = merged(chunk, mean[j], squares[j], count, chunk_mean, chunk_squares)


@compiled
def _merge_columns(mean, squares, rows, seen, inner, channels, fold, first, into_mean, into_squares):
    """Merge the columns of each channel into its place; `seen` elements of it are there already."""
    for channel in range(channels):
        count, target = seen, first + channel
        for copy in range(fold):
            for i in range(inner):
                j = (copy * channels + channel) * inner + i
                into_mean[target], into_squares[target] = merged(
                    count, into_mean[target], into_squares[target], rows, mean[j], squares[j]
                )
                count += rows


@compiled
def _part_moments(x, outer, channels, inner, grid, part_mean, part_squares, begin, end):
    """Moments of a block of channels over a part of the rows, into row `part` of the part arrays."""
    for task in range(begin, end):
        first, group, row, rows = _extent(task, outer, channels, grid)
        fold = grid[2]
        width, columns = channels * inner, group * inner
        into = task // grid[1] * channels + first
        mean, squares = np.empty(columns * fold), np.empty(columns * fold)
        for section in range(2):
            above, folded, copies = _section(section, rows, fold)
            if folded > 0:
                start = (row + above) * width + first * inner
                _matrix_moments(x, start, width * copies, folded, columns * copies, mean, squares)
                _merge_columns(
                    mean, squares, folded, above * inner, inner, group, copies, into, part_mean, part_squares
                )


@compiled
def _merge_parts(outer, channels, inner, grid, part_mean, part_squares, mean, var, first, last):
    """Merge the parts of some channels, and divide."""
    part_rows, parts = grid[3], grid[4]
    for channel in range(first, last):
        seen, merged_mean, squares = 0, 0.0, 0.0
        for part in range(parts):
            count = min(part_rows, outer - part * part_rows) * inner
            i = part * channels + channel
            merged_mean, squares = merged(seen, merged_mean, squares, count, part_mean[i], part_squares[i])
            seen += count
        mean[channel], var[channel] = merged_mean, squares / seen


@Kernel
def moments(launcher, x, outer, channels, inner, mean, var):
    cut = grid(outer, channels, inner)
    blocks, parts = cut[1], cut[4]
    part_mean, part_squares = np.empty(parts * channels), np.empty(parts * channels)
    arguments = (x, outer, channels, inner, cut, part_mean, part_squares)
    for_each(launcher, _part_moments, arguments, parts * blocks)
    _merge_parts(outer, channels, inner, cut, part_mean, part_squares, mean, var, 0, channels)


@compiled
def _normalize_matrix(x, y, start, stride, rows, columns, centre, scale, shift):
    for row in range(rows):
        base = start + row * stride
        for j in range(columns):
            store(y, base + j, normalized(load(x, base + j), centre[j], scale[j], shift[j]))


@compiled
def _normalize_parts(x, y, outer, channels, inner, grid, mean, var, eps, gamma, beta, begin, end):
    for task in range(begin, end):
        first, group, row, rows = _extent(task, outer, channels, grid)
        fold = grid[2]
        width, columns = channels * inner, group * inner
        centre, scale, shift = (
            workspace(x, columns * fold), workspace(x, columns * fold), workspace(x, columns * fold),
        )  # fmt: skip
        for channel in range(group):
            c = first + channel
            line = affine_line(x, mean[c], var[c], eps, gamma[c], beta[c])
            for copy in range(fold):
                for i in range(inner):
                    j = (copy * group + channel) * inner + i
                    centre[j], scale[j], shift[j] = line
        for section in range(2):
            above, folded, copies = _section(section, rows, fold)
            start = (row + above) * width + first * inner
            _normalize_matrix(x, y, start, width * copies, folded, columns * copies, centre, scale, shift)


@Kernel
def apply(launcher, x, outer, channels, inner, mean, var, eps, gamma, beta, y):
    cut = grid(outer, channels, inner)
    arguments = (x, y, outer, channels, inner, cut, mean, var, eps, gamma, beta)
    for_each(launcher, _normalize_parts, arguments, cut[4] * cut[1])


@compiled
def _forward_blocks(
    x, y, outer, channels, inner, grid, part_mean, part_squares, mean, var, eps, gamma, beta, begin, end
):
    """Statistics of a block of channels, then, while it is in the cache, its output."""
    group, blocks, _, _, parts = grid
    for task in range(begin, end):
        for at in range(task, parts * blocks, blocks):
            _part_moments(x, outer, channels, inner, grid, part_mean, part_squares, at, at + 1)
        first = task * group
        last = min(first + group, channels)
        _merge_parts(outer, channels, inner, grid, part_mean, part_squares, mean, var, first, last)
        for at in range(task, parts * blocks, blocks):
            _normalize_parts(x, y, outer, channels, inner, grid, mean, var, eps, gamma, beta, at, at + 1)


@Kernel
def forward(launcher, x, outer, channels, inner, gamma, beta, eps, y, mean, var):
    cut = grid(outer, channels, inner)
    blocks, parts = cut[1], cut[4]
    part_mean, part_squares = np.empty(parts * channels), np.empty(parts * channels)
    arguments = (
        x, y, outer, channels, inner, cut, part_mean, part_squares, mean, var, eps, gamma, beta,
    )  # fmt: skip
    for_each(launcher, _forward_blocks, arguments, blocks)


# ---- backward -------------------------------------------------------------------------------------


@compiled
def _matrix_sums(dy, x, start, stride, rows, columns, centre, sum_dy, sum_dy_centred):
    """Add sum(dy) and sum(dy*(x - centre)) of each column; float32 chains end after CHUNK rows."""
    chunk_dy, chunk_dy_centred = workspace(x, columns), workspace(x, columns)
    for chunk in range(0, rows, CHUNK):
        for j in range(columns):
            chunk_dy[j] = 0.0
            chunk_dy_centred[j] = 0.0
        for row in range(chunk, min(chunk + CHUNK, rows)):
            base = start + row * stride
            for j in range(columns):
                grad = load(dy, base + j)
                chunk_dy[j] += grad
                chunk_dy_centred[j] += grad * (load(x, base + j) - centre[j])
        for j in range(columns):
            sum_dy[j] += chunk_dy[j]
            sum_dy_centred[j] += chunk_dy_centred[j]


@compiled
def _part_sums(dy, x, outer, channels, inner, grid, mean, part_dy, part_dy_centred, begin, end):
    """Sums of a block of channels over a part of the rows, into row `part` of the part arrays."""
    for task in range(begin, end):
        first, group, row, rows = _extent(task, outer, channels, grid)
        fold = grid[2]
        width, columns = channels * inner, group * inner
        centre = workspace(x, columns * fold)
        for copy in range(fold):
            for j in range(columns):
                centre[copy * columns + j] = rounded(x, mean[first + j // inner])
        sum_dy, sum_dy_centred = np.zeros(columns * fold), np.zeros(columns * fold)
        for section in range(2):
            above, folded, copies = _section(section, rows, fold)
            start = (row + above) * width + first * inner
            _matrix_sums(dy, x, start, width * copies, folded, columns * copies, centre, sum_dy, sum_dy_centred)
        into = task // grid[1] * channels + first
        for channel in range(group):
            total, centred = 0.0, 0.0
            for copy in range(fold):
                for i in range(inner):
                    j = (copy * group + channel) * inner + i
                    total += sum_dy[j]
                    centred += sum_dy_centred[j]
            part_dy[into + channel], part_dy_centred[into + channel] = total, centred


@compiled
def _add_parts(x, channels, parts, part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat, first, last):
    for c in range(first, last):
        total, centred = 0.0, 0.0
        for part in range(parts):
            total += part_dy[part * channels + c]
            centred += part_dy_centred[part * channels + c]
        rest = mean[c] - rounded(x, mean[c])
        sum_dy[c], sum_dy_xhat[c] = total, sum_times_xhat(rstd(var[c], eps), rest, total, centred)


@Kernel
def backward_reduce(launcher, dy, x, outer, channels, inner, mean, var, eps, sum_dy, sum_dy_xhat):
    cut = grid(outer, channels, inner)
    blocks, parts = cut[1], cut[4]
    part_dy, part_dy_centred = np.empty(parts * channels), np.empty(parts * channels)
    arguments = (dy, x, outer, channels, inner, cut, mean, part_dy, part_dy_centred)
    for_each(launcher, _part_sums, arguments, parts * blocks)
    _add_parts(x, channels, parts, part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat, 0, channels)


@compiled
def _gradient_matrix(dy, x, dx, start, stride, rows, columns, centre, scale, lift, slope):
    for row in range(rows):
        base = start + row * stride
        for j in range(columns):
            grad = input_gradient(load(dy, base + j), load(x, base + j), centre[j], scale[j], lift[j], slope[j])
            store(dx, base + j, grad)


@compiled
def _gradient_parts(
    dy, x, dx, outer, channels, inner, grid, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count, begin, end
):  # fmt: skip
    for task in range(begin, end):
        first, group, row, rows = _extent(task, outer, channels, grid)
        fold = grid[2]
        width, columns = channels * inner, group * inner
        centre, scale = workspace(x, columns * fold), workspace(x, columns * fold)
        lift, slope = workspace(x, columns * fold), workspace(x, columns * fold)
        for channel in range(group):
            c = first + channel
            line = gradient_line(x, mean[c], var[c], eps, gamma[c], sum_dy[c] / count, sum_dy_xhat[c] / count)
            for copy in range(fold):
                for i in range(inner):
                    j = (copy * group + channel) * inner + i
                    centre[j], scale[j], lift[j], slope[j] = line
        for section in range(2):
            above, folded, copies = _section(section, rows, fold)
            start = (row + above) * width + first * inner
            _gradient_matrix(dy, x, dx, start, width * copies, folded, columns * copies, centre, scale, lift, slope)


@Kernel
def backward_apply(launcher, dy, x, outer, channels, inner, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count, dx):
    cut = grid(outer, channels, inner)
    arguments = (dy, x, dx, outer, channels, inner, cut, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count)
    for_each(launcher, _gradient_parts, arguments, cut[4] * cut[1])


@compiled
def _backward_blocks(
    dy, x, dx, outer, channels, inner, grid, part_dy, part_dy_centred,
    mean, var, eps, gamma, sum_dy, sum_dy_xhat, begin, end,
):  # fmt: skip
    group, blocks, _, _, parts = grid
    count = float(outer * inner)
    for task in range(begin, end):
        for at in range(task, parts * blocks, blocks):
            _part_sums(dy, x, outer, channels, inner, grid, mean, part_dy, part_dy_centred, at, at + 1)
        first = task * group
        last = min(first + group, channels)
        _add_parts(x, channels, parts, part_dy, part_dy_centred, mean, var, eps, sum_dy, sum_dy_xhat, first, last)
        for at in range(task, parts * blocks, blocks):
            _gradient_parts(
                dy, x, dx, outer, channels, inner, grid, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count,
                at, at + 1,
            )  # fmt: skip


@Kernel
def backward(launcher, dy, x, outer, channels, inner, mean, var, eps, gamma, dx, sum_dy, sum_dy_xhat):
    cut = grid(outer, channels, inner)
    blocks, parts = cut[1], cut[4]
    part_dy, part_dy_centred = np.empty(parts * channels), np.empty(parts * channels)
    arguments = (
        dy, x, dx, outer, channels, inner, cut, part_dy, part_dy_centred,
        mean, var, eps, gamma, sum_dy, sum_dy_xhat,
    )  # fmt: skip
    for_each(launcher, _backward_blocks, arguments, blocks)
