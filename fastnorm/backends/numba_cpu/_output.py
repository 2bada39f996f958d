"""How outputs are written: as one stream of lines, past the cache where they are large.

A writer is made of the formulas of one output. Stores past the cache must be whole aligned lines (a line stored in
pieces is read first, and holds up the stores behind it), and while they wait for memory, the inputs that will be
needed next are fetched: a line for each line stored, `ahead` elements further on.
"""

# mypy: ignore-errors
# Numba infers and checks the types of what it compiles.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastnorm.backends.numba_cpu._compiler import compiled
from fastnorm.backends.numba_cpu._scalars import least
from fastnorm.backends.numba_cpu._vectors import begun, choose, lanes, spread, store, store_part

READ_AHEAD = 256
"""Elements that are fetched ahead in the stream itself, where no next slab is known."""


@compiled
def line_start(out, at, lowest):
    """Where the line starts that element `at` lies in, but at least `lowest`."""
    return at - least((begun(out) + at) % lanes(out), at - lowest)


def writer_of_runs(line: Callable[..., Any], whole: Callable[..., Any], part: Callable[..., Any]) -> Any:
    """A writer where coefficients belong to runs of `inner` elements: channels, or the rows of the row family.

    line(numbers, channel)                                the coefficients of the channel of a run
    whole(arrays, i, j, line, ahead)                      the output from element i of memory, j of the run
    part(arrays, i, j, first, last, line)                 lanes first..last of that
    """

    @compiled
    def write(arrays, out, begin, end, channels, inner, numbers, past_cache, ahead):
        """Elements begin..end of the output, which may start and end anywhere.

        A line that two runs share waits in `held` for the second. With a broken line at both ends of each run
        instead, rows of 128 took twice the time.
        """
        step = lanes(out)
        skip = (begun(out) + begin) % step if past_cache else 0
        at, filled, held = begin - skip, skip, spread(out, 0.0)
        run = begin // inner
        while at + filled < end:
            coefficients = line(numbers, run if run < channels else run % channels)
            start = run * inner
            run_end = least(start + inner, end)
            while at + filled < run_end:
                if filled == 0:
                    upto = at + (run_end - at) // step * step
                    for i in range(at, upto, step):
                        store(out, i, whole(arrays, i, i - start, coefficients, ahead), past_cache)
                    at = upto
                last = least(run_end - at, step)
                if filled < last:
                    held = choose(filled, last, part(arrays, at, at - start, filled, last, coefficients), held)
                    filled = last
                    if filled == step:
                        if skip > 0:
                            store_part(out, at, held, skip, step)
                        else:
                            store(out, at, held, past_cache)
                        at, filled, skip = at + step, 0, 0
            run += 1
        if filled > skip:
            store_part(out, at, held, skip, filled)

    return write


def writer_of_columns(whole: Callable[..., Any], part: Callable[..., Any]) -> Any:
    """A writer where coefficients belong to columns, whose number is `period`, element `begin` to number `j`.

    whole(arrays, i, j, ahead) and part(arrays, i, j, count) as above. A line may reach into the next row:
    coefficients continue beyond `period` with the first ones.
    """

    @compiled
    def write(arrays, out, begin, end, j, period, past_cache, ahead):
        step = lanes(out)
        skip = (begun(out) + begin) % step
        at = begin
        while at < end:
            lines = (end - at) // step
            if skip == 0 and lines > 0:
                lines = least(lines, (period - j + step - 1) // step)
                for i in range(0, lines * step, step):
                    store(out, at + i, whole(arrays, at + i, j + i, ahead), past_cache)
                count = lines * step
            else:
                count = least(step - skip, end - at)
                store_part(out, at, part(arrays, at, j, count), 0, count)
                skip = 0
            at, j = at + count, (j + count) % period

    return write
