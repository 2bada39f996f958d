"""The CUDA kernels in Numba's simulator against the reference, run as a script: a case a line, `name: ` and what is
wrong with it, nothing where it is right. `test_cuda_kernels.py` starts it and reads that.

Blocks, chunks and registers are made small, so that every way through the kernels is taken by some thousand elements.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import ml_dtypes
import numpy as np
import pytest
import simulator

from fastnorm.backends.numba_cuda import _plan, kernels
from fastnorm.bench.tolerances import tolerance
from fastnorm.reference import kernels as reference

simulator.install()
simulator.small_blocks(pytest.MonkeyPatch(), block=64, backward_elements=8, chunk=512)
STORAGES: dict[str, Any] = {
    "float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16
}  # fmt: skip
EPS = 1e-5


class Described:
    """The attributes of a descriptor that kernels use, over an array of the host."""

    device = stream = 0

    def __init__(self, array: Any) -> None:
        self.array = array
        self.pointer, self.dtype, self.itemsize, self.size = (
            array.ctypes.data, array.dtype, array.itemsize, array.size
        )  # fmt: skip

    def empty(self, shape: Any, dtype: Any) -> Described:
        """With NaN in it: nothing may be read that was not written."""
        size = int(np.prod(shape))
        return Described(aligned(np.full(size, np.nan, dtype)))


def aligned(values: Any, offset: int = 0) -> Any:
    """A copy that begins `offset` elements after a multiple of 16 bytes."""
    raw = np.zeros(values.size + 32, values.dtype)
    begin = -raw.ctypes.data % 16 // raw.itemsize + offset
    found = raw[begin : begin + values.size]
    found[:] = values.reshape(-1)
    return found


def call(name: str, *arguments: Any) -> None:
    given = [Described(a) if isinstance(a, np.ndarray) else a for a in arguments]
    getattr(kernels, name)(*given)


def draw(rng: Any, n: int, storage: str, mean: float = 10.0, offset: int = 0) -> Any:
    return aligned((mean + rng.standard_normal(n)).astype(STORAGES[storage]), offset)


def compare(what: str, found: Any, expected: Any, magnitude: Any, stored: Any, computed: Any, terms: int) -> str:
    """Where found is further from expected than fastnorm's tolerances allow."""
    found, expected = found.astype(np.float64).reshape(-1), expected.reshape(-1)
    allowed = tolerance(expected, np.broadcast_to(magnitude, expected.shape), stored, computed, terms)
    excess = np.abs(found - expected) / allowed
    worst = float(np.max(excess)) if np.isfinite(found).all() else np.inf
    return "" if worst <= 1 else f"{what} is {worst:.3g} times the tolerance off; "


def expected_statistics(name: str, x: Any, sizes: tuple[int, ...], count: int) -> tuple[Any, Any]:
    mean, var = np.empty(count), np.empty(count)
    wide = x.astype(np.float64)
    if name == "channel":
        reference.channel_moments(wide, *sizes, mean, var)
    elif name == "group":
        reference.group_forward(wide, *sizes, None, None, EPS, np.empty_like(wide), mean, var)
    else:
        reference.channel_moments(wide, 1, *sizes, mean, var)
    return mean, var


def check(
    family: str, sizes: tuple[int, ...], storage: str, *, affine: bool = True, centred: bool = True, offset: int = 0,
    mean_value: float = 10.0, in_place: bool = False,
) -> str:  # fmt: skip
    """Forward and backward of a family against the reference in float64."""
    rng = np.random.default_rng(7)
    if family == "channel":
        outer, channels, inner = sizes
        n, statistics, parameters, terms = outer * channels * inner, channels, channels, outer * inner
    elif family == "group":
        samples, outer, channels, inner, groups = sizes
        n, statistics, parameters = samples * outer * channels * inner, samples * groups, channels
        terms = outer * inner * channels // groups
    else:
        rows, cols = sizes
        n, statistics, parameters, terms = rows * cols, rows, cols, cols
    computed = np.float64 if storage == "float64" else np.float32
    stored = STORAGES[storage]
    x = draw(rng, n, storage, mean_value if centred else 0.0, offset)
    dy = draw(rng, n, storage, 0.3, offset)
    gamma, beta = (aligned(rng.uniform(0.5, 1.5, parameters).astype(computed)) if affine else None for _ in range(2))
    y, dx = aligned(np.zeros_like(x), offset), aligned(np.zeros_like(x), offset)
    mean, var = np.full(statistics, np.nan), np.full(statistics, np.nan)
    sums = np.full(parameters, np.nan), np.full(parameters, np.nan)
    source = x.copy()
    if in_place:
        y = x
    call(f"{family}_forward", x, *sizes, gamma, beta, EPS, y, mean if centred else None, var)
    x = aligned(source, offset)
    if in_place:
        dx = x
    backward = (dy, x, *sizes, mean if centred else None, var, EPS, gamma, dx)
    # sum_dy, sum_dy_xhat of channels and groups; dgamma, dbeta of rows
    call(f"{family}_backward", *backward, *sums)

    wide, grad = source.astype(np.float64), dy.astype(np.float64)
    if centred:
        true_mean, true_var = expected_statistics(family, source, sizes, statistics)
    else:
        true_mean, true_var = None, (wide * wide).reshape(sizes).mean(axis=1)
    true_y, true_dx = np.empty_like(wide), np.empty_like(wide)
    true_sums = np.empty(parameters), np.empty(parameters)
    scratch = np.empty(statistics) if centred else None
    arguments = gamma, beta, EPS, true_y, scratch, np.empty(statistics)
    getattr(reference, f"{family}_forward")(wide, *sizes, *arguments)
    getattr(reference, f"{family}_backward")(
        grad, wide, *sizes, true_mean, true_var, EPS, gamma, true_dx, *true_sums
    )  # fmt: skip
    spread = float(np.sqrt(true_var.max()))
    peak = float(np.abs((wide - (0 if true_mean is None else true_mean.min())) / np.sqrt(true_var.min())).max()) + 1.0
    most = 1.5 if affine else 1.0
    problems = compare("var", var, true_var, true_var, np.float64, computed, terms)
    if true_mean is not None:
        problems += compare("mean", mean, true_mean, spread, np.float64, computed, terms)
    problems += compare("y", y, true_y, most * peak + most, stored, computed, terms)
    big = float(np.abs(grad).max()) * most
    rstd = 1 / np.sqrt(true_var.min() + EPS)
    problems += compare("dx", dx, true_dx, rstd * big * (2 + peak * peak), stored, computed, terms)
    reduced = n // parameters
    for what, found, expected in zip(("sum 1", "sum 2"), sums, true_sums, strict=True):
        problems += compare(what, found, expected, reduced * big * peak, np.float64, computed, reduced)
    return problems


def long_row(centred: bool, offset: int) -> str:
    """A row beyond what the registers hold, if those are made few."""
    before = _plan.MOST_THREADS, _plan.FORWARD_ELEMENTS, _plan.BACKWARD_ELEMENTS, _plan.CHUNK
    _plan.MOST_THREADS, _plan.FORWARD_ELEMENTS, _plan.BACKWARD_ELEMENTS, _plan.CHUNK = 0, 4, 4, 64
    try:
        return check("row", (2, 132), "float32", centred=centred, offset=offset)
    finally:
        _plan.MOST_THREADS, _plan.FORWARD_ELEMENTS, _plan.BACKWARD_ELEMENTS, _plan.CHUNK = before


def pieces(sizes: tuple[int, int, int]) -> str:
    """The pieces give the bits of the fused calls."""
    rng = np.random.default_rng(8)
    outer, channels, inner = sizes
    x, dy = (draw(rng, outer * channels * inner, "float32") for _ in range(2))
    gamma = aligned(rng.standard_normal(channels).astype(np.float32))
    fused, split = [], []
    for results, whole in ((fused, True), (split, False)):
        y, dx = aligned(np.zeros_like(x)), aligned(np.zeros_like(x))
        mean, var, s1, s2 = (np.empty(channels) for _ in range(4))
        if whole:
            call("channel_forward", x, *sizes, gamma, None, EPS, y, mean, var)
            call("channel_backward", dy, x, *sizes, mean, var, EPS, gamma, dx, s1, s2)
        else:
            call("channel_moments", x, *sizes, mean, var)
            call("channel_apply", x, *sizes, mean, var, EPS, gamma, None, y)
            call("channel_backward_reduce", dy, x, *sizes, mean, var, EPS, s1, s2)
            call(
                "channel_backward_apply", dy, x, *sizes, mean, var, EPS, gamma, s1, s2, float(outer * inner), dx
            )  # fmt: skip
        results += [a.tobytes() for a in (y, dx, mean, var, s1, s2)]
    return "" if fused == split else "the bits differ"


def slabs(sizes: tuple[int, int, int], slab: int) -> str:
    """The bits are the same whatever fits L2: everything, or so many channels."""
    rng = np.random.default_rng(8)
    outer, channels, inner = sizes
    x, dy = (draw(rng, outer * channels * inner, "float32") for _ in range(2))
    found = set()
    for fitting in (channels, slab):
        y, dx = aligned(np.zeros_like(x)), aligned(np.zeros_like(x))
        mean, var, s1, s2 = (np.empty(channels) for _ in range(4))
        of_channels = 2 * fitting * outer * inner * x.itemsize
        kernels._launch.level2 = lambda device, fits=of_channels: fits
        call("channel_forward", x, *sizes, None, None, EPS, y, mean, var)
        kernels._launch.level2 = lambda device, fits=2 * of_channels: fits
        call("channel_backward", dy, x, *sizes, mean, var, EPS, None, dx, s1, s2)
        found.add(tuple(a.tobytes() for a in (y, dx, mean, var, s1, s2)))
    return "" if len(found) == 1 else "the bits differ"


def hostile(sizes: tuple[int, int, int]) -> str:
    """A constant, a NaN, an outlier where the pivot is taken, each in a channel of its own."""
    outer, channels, _ = sizes
    x = np.random.default_rng(9).standard_normal(sizes).astype(np.float32)
    x[:, 0], x[-1, 1, -1], x[0, 2, 0] = 1234567.0, np.nan, 1e6
    flat, beta = aligned(x), aligned(np.full(channels, 0.3, np.float32))
    y, mean, var = aligned(np.zeros_like(flat)), np.empty(channels), np.empty(channels)
    call("channel_forward", flat, *sizes, None, beta, EPS, y, mean, var)
    true_mean, true_var = expected_statistics("channel", flat, sizes, channels)
    out, problems = y.reshape(sizes), ""
    if not (mean[0] == 1234567.0 and var[0] == 0.0 and (out[:, 0] == np.float32(0.3)).all()):
        problems += "the constant is not exact; "
    if not np.isnan(out[:, 1]).all() or np.isnan(out[:, [0, 2, 3]]).any():
        problems += "NaN is not in its channel alone; "
    good = [0, 2, 3]
    return problems + compare("mean", mean[good], true_mean[good], np.sqrt(true_var[good]), float, np.float32, outer)


def dropout(n: int, first: int, storage: str, offset: int) -> str:
    x = draw(np.random.default_rng(1), n, storage, offset=offset)
    y, expected = aligned(np.zeros_like(x), offset), np.empty_like(x)
    arguments = n, first, 0xFEDCBA9876543210, 0x80000000, 2.0
    call("dropout", x, *arguments, y)
    reference.dropout(x, *arguments, expected)
    return "" if y.tobytes() == expected.tobytes() else "the bits differ"


def cases() -> Iterator[tuple[str, Callable[[], str]]]:
    families = (
        ("channel", (3, 2, 64), (2, 3, 67), (8, 2, 72), (1, 2, 700), (40, 8, 1), (33, 5, 1), (9, 4, 7), (70, 1, 1)),
        ("row", (3, 64), (5, 96), (2, 127), (3, 512), (9, 5), (130, 8)),
        ("group", (2, 1, 4, 64, 2), (2, 9, 4, 1, 2), (3, 1, 2, 3, 2)),
    )
    for family, *shapes in families:
        for sizes in shapes:
            for storage in STORAGES:
                yield f"{family} {sizes} {storage}", lambda f=family, s=sizes, t=storage: check(f, s, t)
    for family, sizes in (("channel", (3, 2, 64)), ("channel", (40, 8, 1)), ("row", (3, 64))):
        yield f"{family} {sizes} unaligned", lambda f=family, s=sizes: check(f, s, "float32", offset=1)
        yield f"{family} {sizes} in place", lambda f=family, s=sizes: check(f, s, "float32", in_place=True)
        yield f"{family} {sizes} plain", lambda f=family, s=sizes: check(f, s, "float32", affine=False)
    for sizes in ((3, 64), (5, 96)):
        yield f"row {sizes} not centred", lambda s=sizes: check("row", s, "float32", centred=False)
    for centred, offset in ((True, 0), (True, 1), (False, 0)):
        yield f"row long {centred} {offset}", lambda c=centred, o=offset: long_row(c, o)
    for sizes, slab in (((3, 20, 64), 8), ((40, 200, 1), 128)):  # 128: the columns of a block
        yield f"pieces {sizes}", lambda s=sizes: pieces(s)
        yield f"slabs {sizes}", lambda s=sizes, n=slab: slabs(s, n)
    for sizes in ((2, 4, 300), (80, 4, 1)):
        yield f"hostile {sizes}", lambda s=sizes: hostile(s)
    for n, first, storage, offset in ((130, 0, "float32", 0), (131, 6, "bfloat16", 0), (70, 4, "float64", 1)):
        yield f"dropout {n} {first} {storage}", lambda a=(n, first, storage, offset): dropout(*a)


if __name__ == "__main__":
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, run in cases():
        if only in name:
            try:
                problem = run()
            except Exception:
                problem = traceback.format_exc().replace("\n", " | ") if not only else traceback.format_exc()
            print(f"{name}: {problem}", flush=True)
