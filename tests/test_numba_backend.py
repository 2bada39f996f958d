"""What is particular to the Numba backend: vectors, ways to cut the work, layers, forks, caches."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")
ml_dtypes = pytest.importorskip("ml_dtypes")

numba_cpu = importlib.import_module("fastnorm.backends.numba_cpu")
formulas = importlib.import_module("fastnorm.backends.numba_formulas")
compiler = importlib.import_module("fastnorm.backends.numba_cpu._compiler")
launch = importlib.import_module("fastnorm.backends.numba_cpu._launch")
plan = importlib.import_module("fastnorm.backends.numba_cpu._plan")
runs = importlib.import_module("fastnorm.backends.numba_cpu._runs")
reference = importlib.import_module("fastnorm.reference.kernels")

Array = np.ndarray[Any, Any]


def bits(*arrays: Array) -> list[bytes]:
    return [array.tobytes() for array in arrays]


# ---- formulas: plain Python, so tested as such -----------------------------------------------------


def test_merge_of_nothing_is_exact() -> None:
    assert formulas.merged_mean(0.0, 1e300, 1.0) == 1e300
    assert formulas.merged_squares(0.0, 0.0, 1e300, 2.0, 0, 1.0) == 2.0


# ---- storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_passes_through_unchanged(dtype: Any) -> None:
    """(x - 0)*1 + 0 gives x back for every bit pattern, through runs and through columns."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    zero, one = np.zeros(1), np.ones(1)
    for sizes in ((1, 1, x.size), (x.size, 1, 1)):
        y = np.empty_like(x)
        numba_cpu.channel_apply(x, *sizes, zero, one, 0.0, None, None, y)
        number = ~np.isnan(x.astype(np.float32))
        assert (np.isnan(y.astype(np.float32)) == ~number).all()
        assert (y[number].astype(np.float32) == x[number].astype(np.float32)).all()


def test_bfloat16_of_every_pattern_of_high_bits() -> None:
    """0*1 + beta rounds beta: each bfloat16, itself, at its rounding ties and beside them, against ml_dtypes."""
    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    x = np.zeros((8, high.size), ml_dtypes.bfloat16)
    y, zero, one = np.empty_like(x), np.zeros(high.size), np.ones(high.size)
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        beta = (high | np.uint32(low)).view(np.float32)
        with np.errstate(invalid="ignore"):
            expected = beta.astype(ml_dtypes.bfloat16)
        numba_cpu.channel_apply(x, 8, high.size, 1, zero, one, 0.0, None, beta, y)
        same = (y.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(y) & np.isnan(expected)) | (beta == 0)
        assert same.all()


def test_read_only_arrays_share_the_compiled_kernel() -> None:
    x = np.random.default_rng(0).standard_normal((5, 100), dtype=np.float32)
    y, mean, var = np.empty_like(x), np.empty(5), np.empty(5)
    gamma = np.full(100, 2.0, np.float32)
    numba_cpu.row_forward(x, 5, 100, gamma, None, 1e-5, y, mean, var)
    expected = y.copy()
    kernel = runs.forward._run
    before = len(kernel.signatures)
    x.flags.writeable = gamma.flags.writeable = False
    numba_cpu.row_forward(x, 5, 100, gamma, None, 1e-5, y, mean, var)
    assert len(kernel.signatures) == before
    assert bits(y) == bits(expected)


# ---- the ways to cut the work ----------------------------------------------------------------------

SIZES = [(9, 3, 1), (64, 7, 1), (1000, 3, 1), (4099, 17, 1), (300, 600, 1), (50, 40, 49), (3, 5, 127), (2, 3, 40000)]


def forget_plans() -> None:
    for function in (plan.of_columns, plan.of_runs, plan.of_rows):
        function.cache_clear()


@pytest.fixture(autouse=True)
def plans_of_this_test() -> Iterator[None]:
    """Plans are kept by shape; tests change what else they are made from."""
    forget_plans()
    yield
    forget_plans()


def in_one_task(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "PARALLEL_FROM", 1 << 40)
    forget_plans()


def in_slabs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "PARALLEL_FROM", 0)
    patch.setattr(plan, "caches", lambda: (1 << 40, 1 << 40))
    forget_plans()


def past_the_cache(patch: pytest.MonkeyPatch) -> None:
    in_slabs(patch)
    patch.setattr(plan, "past_cache", lambda nbytes, arrays=1: True)


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("way", [in_one_task, in_slabs, past_the_cache])
@pytest.mark.parametrize("sizes", SIZES)
def test_channels_by_slabs_and_by_steps_have_the_same_bits(
    sizes: tuple[int, int, int], way: Any, by_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, channels, inner = sizes
    monkeypatch.setattr(numba_cpu, "_by_columns", lambda outer, inner: by_columns and channels * inner < 9999)
    way(monkeypatch)
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal(outer * channels * inner + 1).astype(np.float32)[1:] + 3 for _ in range(2))
    gamma, beta = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    y, mean, var = np.empty_like(x), np.empty(channels), np.empty(channels)
    numba_cpu.channel_forward(x, *sizes, gamma, beta, 1e-5, y, mean, var)
    y2, mean2, var2 = np.empty_like(x), np.empty(channels), np.empty(channels)
    numba_cpu.channel_moments(x, *sizes, mean2, var2)
    numba_cpu.channel_apply(x, *sizes, mean2, var2, 1e-5, gamma, beta, y2)
    assert bits(y, mean, var) == bits(y2, mean2, var2)

    dx, sums = np.empty_like(x), (np.empty(channels), np.empty(channels))
    numba_cpu.channel_backward(dy, x, *sizes, mean, var, 1e-5, gamma, dx, *sums)
    dx2, sums2 = np.empty_like(x), (np.empty(channels), np.empty(channels))
    numba_cpu.channel_backward_reduce(dy, x, *sizes, mean, var, 1e-5, *sums2)
    numba_cpu.channel_backward_apply(dy, x, *sizes, mean, var, 1e-5, gamma, *sums2, float(outer * inner), dx2)
    assert bits(dx, *sums) == bits(dx2, *sums2)

    expected = np.empty(channels), np.empty(channels)
    reference.channel_moments(x, *sizes, *expected)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(var, expected[1], rtol=3e-6)


def in_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "PARALLEL_FROM", 0)
    patch.setattr(plan, "caches", lambda: (0, 0))
    forget_plans()


def in_narrow_slabs(patch: pytest.MonkeyPatch) -> None:
    """A group of (20, 600, 3) in each."""
    patch.setattr(plan, "PARALLEL_FROM", 0)
    patch.setattr(plan, "caches", lambda: (1 << 16, 1 << 40))
    forget_plans()
    patch.setattr(plan, "past_cache", lambda nbytes, arrays=1: True)


@pytest.mark.parametrize("way", [in_one_task, in_slabs, in_narrow_slabs, past_the_cache])
@pytest.mark.parametrize(
    "shape", [(3, 1, 8, 200, 4), (5, 300, 40, 1, 8), (9, 20, 600, 3, 5), (2, 3, 6, 70, 3), (4, 1, 12, 1, 3)], ids=str
)
def test_groups_by_slabs_and_by_steps_have_the_same_bits(
    shape: tuple[int, int, int, int, int], way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, outer, channels, inner, groups = shape
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal(samples * outer * channels * inner + 1).astype(np.float32)[1:] for _ in range(2))
    gamma, beta = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    found = []
    for cut in (in_steps, way):
        with monkeypatch.context() as patch:
            cut(patch)
            y, dx, (mean, var) = np.empty_like(x), np.empty_like(x), np.empty((2, samples * groups))
            sum_dy, sum_dy_xhat = np.empty((2, channels))
            numba_cpu.group_forward(x, *shape, gamma, beta, 1e-5, y, mean, var)
            numba_cpu.group_backward(dy, x, *shape, mean, var, 1e-5, gamma, dx, sum_dy, sum_dy_xhat)
        found.append(bits(y, mean, var, dx, sum_dy, sum_dy_xhat))
    assert found[1] == found[0]


@pytest.mark.parametrize(("rows", "cols"), [(5, 3), (700, 127), (3, 70000), (40, 20000), (300, 4100)])
def test_rows_by_slabs_and_by_steps_have_the_same_bits(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many threads rows are too few for slabs; with one, 128 rows and more are not."""
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal(rows * cols + 1).astype(np.float32)[1:] for _ in range(2))
    gamma, beta = (rng.standard_normal(cols).astype(np.float32) for _ in range(2))
    monkeypatch.setattr(plan, "PARALLEL_FROM", 0)
    found = []
    for count, stream in ((1, False), (1, True), (1000, False), (1000, True)):
        monkeypatch.setattr(numba_cpu, "threads", lambda count=count: count)
        monkeypatch.setattr(plan, "past_cache", lambda nbytes, arrays=1, stream=stream: stream)
        y, dx, mean, var = np.empty_like(x), np.empty_like(x), np.empty(rows), np.empty(rows)
        dgamma, dbeta = np.empty(cols), np.empty(cols)
        numba_cpu.row_forward(x, rows, cols, gamma, beta, 1e-5, y, mean, var)
        numba_cpu.row_backward(dy, x, rows, cols, mean, var, 1e-5, gamma, dx, dgamma, dbeta)
        found.append(bits(y, mean, var, dx, dgamma, dbeta))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("sizes", [(4099, 1, 1), (50, 3, 49), (2, 3, 5000), (1, 2, 30000)])
def test_values_far_from_zero_and_constants(sizes: tuple[int, int, int]) -> None:
    channels = sizes[1]
    rng = np.random.default_rng(3)
    x = (1e6 + rng.uniform(-1, 1, sizes)).astype(np.float32)
    x[:, 0, :] = 1234567.0
    beta = np.full(channels, 0.3, np.float32)
    y, mean, var = np.empty_like(x), np.empty(channels), np.empty(channels)
    numba_cpu.channel_forward(x, *sizes, None, beta, 1e-5, y, mean, var)
    assert mean[0] == 1234567.0
    assert var[0] == 0.0
    assert (y[:, 0, :] == beta[0]).all()
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=(0, 2), keepdims=True)
    truth = centred / np.sqrt((centred * centred).mean(axis=(0, 2), keepdims=True) + 1e-5) + beta[0].astype(float)
    np.testing.assert_allclose(y, truth, atol=2e-6)


@pytest.mark.parametrize("far", [1, 20, 70, 100])
@pytest.mark.parametrize("sizes", [(130, 40, 1), (200, 3, 1), (130, 8, 7)])
def test_pivots_far_from_the_mean(sizes: tuple[int, int, int], far: int) -> None:
    """The first `far` rows lie apart from the others, in and across chunks of 64: the squares lose a bit or two."""
    x = np.random.default_rng(9).standard_normal(sizes).astype(np.float32)
    x[far:] += 1e4
    mean, var = np.empty(sizes[1]), np.empty(sizes[1])
    numba_cpu.channel_moments(x, *sizes, mean, var)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, wide.var(axis=(0, 2)), rtol=2e-6)


def test_a_root_beyond_float32_keeps_constants_exact() -> None:
    x = np.full((3, 4), 7.0, np.float32)
    beta = np.full(4, 0.3, np.float32)
    y, mean, var = np.empty_like(x), np.empty(4), np.empty(4)
    numba_cpu.channel_forward(x, 3, 4, 1, None, beta, 1e-300, y, mean, var)
    assert (y == beta).all()


# ---- threads, processes, disk ----------------------------------------------------------------------

WORK = """
import hashlib, importlib, os, sys, threading
import numpy as np
table = importlib.import_module("fastnorm.backends.numba_cpu")

def digest():
    rng = np.random.default_rng(5)
    total = hashlib.sha256()
    for outer, channels, inner in ((4099, 33, 1), (200000, 3, 1), (300, 2100, 1), (7, 9, 3136), (2, 1, 200001)):
        x, dy = (rng.standard_normal(outer * channels * inner).astype(np.float32) for _ in range(2))
        y, dx = np.empty_like(x), np.empty_like(x)
        mean, var, s1, s2 = (np.empty(channels) for _ in range(4))
        table.channel_forward(x, outer, channels, inner, None, None, 1e-5, y, mean, var)
        table.channel_backward(dy, x, outer, channels, inner, mean, var, 1e-5, None, dx, s1, s2)
        for array in (y, mean, var, dx, s1, s2):
            total.update(array.tobytes())
    for rows, cols in ((3000, 127), (300, 700), (3, 100000), (33, 4099)):
        x, dy = (rng.standard_normal(rows * cols).astype(np.float32) for _ in range(2))
        y, dx = np.empty_like(x), np.empty_like(x)
        mean, var, s1, s2 = np.empty(rows), np.empty(rows), np.empty(cols), np.empty(cols)
        table.row_forward(x, rows, cols, None, None, 1e-5, y, mean, var)
        table.row_backward(dy, x, rows, cols, mean, var, 1e-5, None, dx, s1, s2)
        for array in (y, mean, var, dx, s1, s2):
            total.update(array.tobytes())
    return total.hexdigest()
"""

THREADS = """
found = set()
for count in (1, 2, 3, 7):
    table.set_num_threads(count)
    found.add(digest())
several = []
workers = [threading.Thread(target=lambda: several.append(digest())) for _ in range(8)]
for worker in workers: worker.start()
for worker in workers: worker.join()
assert len(several) == 8
assert len(found | set(several)) == 1, (found, several)
import numba
assert numba.threading_layer() == os.environ.get("NUMBA_THREADING_LAYER", numba.threading_layer())
"""

FORK = """
table.set_num_threads(2)
expected = digest()
child = os.fork()
if child == 0:
    os._exit(0 if digest() == expected else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert digest() == expected
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORK + code],
        env={**os.environ, "NUMBA_NUM_THREADS": "8", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_bits_for_any_number_of_threads_and_callers(layer: str) -> None:
    """1, 2, 3, 7 threads and 8 callers at once. Under workqueue, unguarded, the latter would abort the process."""
    if layer == "omp":
        pytest.importorskip("numba.np.ufunc.omppool")
    run(THREADS, NUMBA_THREADING_LAYER=layer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_after_its_parent_did() -> None:
    """Entering the omp layer, the child would be killed."""
    run(FORK)


Part = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)
Loop = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 3)


@pytest.mark.parametrize("parts", [(0, 1, 2), (2, 1, 0), (1,), (2, 2)])
def test_a_layer_may_run_parts_one_after_the_other(parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that comes first finds nobody to wait for, and does the shares of all."""

    asked = []

    def loop(function: int, arrays: int, sizes: int, steps: int, data: int, *_: int) -> None:
        asked.append(ctypes.c_int64.from_address(sizes).value)
        number, step = (ctypes.c_int64.from_address(address).value for address in (arrays, steps))
        for part in parts:
            Part(function)(ctypes.addressof(ctypes.c_int64(number + part * step)), sizes, steps, data)

    layer = Loop(loop)
    address = ctypes.cast(layer, ctypes.c_void_p).value
    rng = np.random.default_rng(8)
    for rows, cols in ((257, 1024), (3, 100000)):  # one task a part of the rows, and two steps for each block of rows
        x, dy = (rng.standard_normal(rows * cols).astype(np.float32) for _ in range(2))
        mean, var = np.empty(rows), np.empty(rows)
        found = []
        for count in (1, 3):
            monkeypatch.setattr(launch, "_threads", count)
            monkeypatch.setattr(launch, "parallel_for", lambda: address)
            y, dx, s1, s2 = np.empty_like(x), np.empty_like(x), np.empty(cols), np.empty(cols)
            numba_cpu.row_forward(x, rows, cols, None, None, 1e-5, y, mean, var)
            numba_cpu.row_backward(dy, x, rows, cols, mean, var, 1e-5, None, dx, s1, s2)
            found.append(bits(y, dx, s1, s2))
        assert found[0] == found[1]
    assert asked == [3] * 4


OWN_COUNT = """
import numba
numba.set_num_threads(5)
table.set_num_threads(2)
digest()
assert numba.get_num_threads() == 5
"""


def test_the_callers_own_thread_count_is_left_alone() -> None:
    run(OWN_COUNT)


def test_nothing_is_compiled_at_import() -> None:
    run("from fastnorm.backends.numba_cpu import _rows\nassert not _rows.backward._run.signatures")


def test_stale_machine_code_is_noticed() -> None:
    """The stamp of the disk cache covers every source a kernel is made of, not only its own file."""
    stamp = compiler._sources_stamp()
    assert len(stamp) >= 6
    assert runs.forward._run._cache._cache_file._source_stamp == stamp


CACHED = """
import sys
import numpy as np
import fastnorm
x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
y, cache = fastnorm.layernorm_forward(x, None, None, {}, backend="numba")
dx, _, _ = fastnorm.layernorm_backward(y, cache, backend="numba")
print("compiled" if "numba.np.arrayobj" in sys.modules else "loaded", hash(y.tobytes() + dx.tobytes()))
"""


def test_machine_code_is_loaded_without_what_compiling_needs(tmp_path: Path) -> None:
    """The second process has it from the disk cache: the same bits, and none of Numba's own start."""
    first, second = (run(CACHED, NUMBA_CACHE_DIR=str(tmp_path), PYTHONHASHSEED="0").split() for _ in range(2))
    assert (first[0], second[0]) == ("compiled", "loaded")
    assert first[1] == second[1]


def test_a_backward_of_rows_has_parts_for_the_threads() -> None:
    """Not for what one thread does anyway, and not for long rows, which are cut into pieces."""
    rows = importlib.import_module("fastnorm.backends.numba_cpu._rows")
    assert [rows.part_rows(*size) for size in ((256, 1024), (300, 700), (4096, 64))] == [32, 38, 128]
    assert rows.part_rows(64, 64) == rows.part_rows(64, 262144) == rows.PART_ROWS


def test_nan_stays_in_its_channel() -> None:
    for sizes in ((4099, 5, 1), (3, 5, 1000), (2000, 5, 3)):
        x = np.random.default_rng(6).standard_normal(sizes).astype(np.float32)
        x[1, 1, 0], x[-1, 3, -1] = np.nan, np.inf
        y, mean, var = np.empty_like(x), np.empty(5), np.empty(5)
        numba_cpu.channel_forward(x, *sizes, None, None, 1e-5, y, mean, var)
        assert np.isnan(y[:, 1, :]).all()
        assert np.isnan(y[-1, 3, -1])
        assert np.isfinite(y[:, [0, 2, 4], :]).all()


def test_threads_of_python_compile_once() -> None:
    """Eight threads, first call of a dtype: the results agree and nothing fails."""
    x = np.random.default_rng(7).standard_normal((20, 30))
    found: list[bytes] = []

    def work() -> None:
        y, mean, var = np.empty_like(x), np.empty(30), np.empty(30)
        numba_cpu.channel_forward(x, 20, 30, 1, None, None, 1e-5, y, mean, var)
        found.append(y.tobytes())

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_cached_and_fresh_machine_code_give_the_same_bits(tmp_path: Any) -> None:
    """The first process compiles, the second finds the cache and compiles nothing."""
    work = "import pathlib; noted = pathlib.Path(os.environ['NUMBA_CACHE_DIR'], 'digest')\n"
    run(work + "noted.write_text(digest())", NUMBA_CACHE_DIR=str(tmp_path))
    hits = "assert sum(sum(k._run.stats.cache_misses.values()) for k in kernels) == 0\n"
    kernels = "kernels = (table._runs.forward, table._runs.backward, table._rows.backward)\n"
    run(work + "assert noted.read_text() == digest()\n" + kernels + hits, NUMBA_CACHE_DIR=str(tmp_path))
