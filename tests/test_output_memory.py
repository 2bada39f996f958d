"""The pool of outputs: recycled, bounded, never shared between two arrays that somebody can see."""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import os
import pickle
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from processes import run

import fastnorm
from fastnorm import _memory

pytestmark = pytest.mark.skipif(_memory.empty.__module__ == _memory.__name__, reason="the C++ extension is not built")

SMALL, LARGE = 100_000, 9_000_000  # bytes; from malloc, and from huge pages
LIMIT = 64 << 20
sizes = pytest.mark.parametrize("size", [SMALL, LARGE])


@pytest.fixture(scope="module", autouse=True)
def _collections_pass_over_what_was_there():
    """Each collection went through the objects of some 20,000 tests and all libraries: 0.3 s, three times a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _an_empty_pool():
    before = fastnorm.output_pool().limit
    gc.collect()
    fastnorm.set_output_pool(LIMIT)
    fastnorm.clear_output_pool()
    yield
    fastnorm.set_output_pool(before)


def address(array):
    return array.__array_interface__["data"][0]


LINE = 64
_PROTOTYPES = np.empty(LARGE + 2 * LINE, np.uint8)


def output(size, value=None, begun=None):
    """An array of the pool, of that many bytes; `begun`: like one that begins so many bytes into a line."""
    if begun is None:
        array = _memory.empty((size,), np.dtype(np.uint8))
    else:
        at = -address(_PROTOTYPES) % LINE + begun
        array = _memory.empty_like(_PROTOTYPES[at : at + size])
    if value is not None:
        array[...] = value
    return array


def drop(*sizes):
    """Leaves a block for each of these sizes in the pool, the last one dropped last; their addresses."""
    arrays = [output(size) for size in sizes]
    places = [address(array) for array in arrays]
    while arrays:
        del arrays[0]
    return places


def counted(call):
    """(result, hits, misses) of a call."""
    before = fastnorm.output_pool()
    result = call()
    after = fastnorm.output_pool()
    return result, after.hits - before.hits, after.misses - before.misses


# ---- recycling ------------------------------------------------------------------------------------


@sizes
def test_a_dropped_output_becomes_the_next(size):
    first = output(size)
    where = address(first)
    assert fastnorm.output_pool()[1:3] == (0, 0)
    del first
    state = fastnorm.output_pool()
    assert state.blocks == 1
    assert size <= state.held < size + 4096
    second, hits, misses = counted(lambda: output(size))
    assert (address(second), hits, misses) == (where, 1, 0)
    assert fastnorm.output_pool()[1:3] == (0, 0)


@pytest.mark.parametrize("begun", [0, 1, 16, 63])
@pytest.mark.parametrize("size", [SMALL, 2 << 20, LARGE])
def test_an_output_begins_as_far_into_a_line_as_x(size, begun):
    """If it is not stored past the cache. A block serves outputs that begin anywhere."""
    past_cache = size >= importlib.import_module("fastnorm._core").build_info()["l3"] // 4
    places = []
    for place in (begun, (begun + 48) % LINE):
        made, *counts = counted(lambda place=place: output(size, begun=place))
        assert address(made) % LINE == (0 if past_cache else place)
        places.append((address(made) // LINE, counts))
        del made
    (block, _), again = places
    assert again == (block, [1, 0])


@pytest.mark.parametrize("share", [0.5, 0.8, 1.2])
@sizes
def test_an_output_of_another_size_gets_other_memory(size, share):
    drop(size)
    assert counted(lambda: output(int(size * share)))[1:] == (0, 1)
    assert counted(lambda: output(int(size * 0.95)))[1:] == (1, 0)


def test_the_best_fit_and_of_equals_the_latest():
    places = drop(1_100_000, 1_000_000, 1_000_000, 1_050_000)
    assert address(output(1_000_000)) == places[2]


@pytest.mark.parametrize("size", [1, 1000, 20_000])
def test_small_outputs_are_left_to_malloc(size):
    assert counted(lambda: output(size))[1:] == (0, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("op", ["batchnorm", "layernorm"])
def test_steady_calls_take_no_new_memory(op, dtype, backend):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal((300, 257)).astype(getattr(ml_dtypes, dtype, dtype))
    forward, backward = getattr(fastnorm, f"{op}_forward"), getattr(fastnorm, f"{op}_backward")

    def step():
        out, cache = forward(x, None, None, {}, backend=backend)
        return out.tobytes(), backward(out, cache, backend=backend)[0].tobytes()

    expected = step()
    results, hits, misses = counted(lambda: [step() for _ in range(5)])
    assert results == [expected] * 5
    assert (hits, misses) == (10, 0)


@pytest.mark.parametrize("arrange", [np.asfortranarray, lambda x: x[::-1], lambda x: np.repeat(x, 2, axis=1)[:, ::2]])
def test_every_layout_profits(arrange):
    x = arrange(np.random.default_rng(0).standard_normal((300, 257)))
    mean, var = x.mean(axis=0), x.var(axis=0)

    def step():
        out, cache = fastnorm.layernorm_forward(x, None, None)
        dx, _, _ = fastnorm.layernorm_backward(out, cache)
        y, cache = fastnorm.batchnorm_forward(x, None, None)
        pieces = fastnorm.batchnorm_backward_apply(y, x, mean, var, None, mean, var, 300)
        return [a.copy() for a in (out, dx, y, fastnorm.normalize(x, mean, var), pieces)]

    expected = step()
    fastnorm.set_output_pool(0)
    np.testing.assert_equal(step(), expected)
    fastnorm.set_output_pool(LIMIT)
    step()
    results, hits, misses = counted(step)
    np.testing.assert_equal(results, expected)
    assert (hits >= 5, misses) == (True, 0)


def test_a_subclass_gives_a_plain_array_of_the_pool():
    class Named(np.ndarray):
        pass

    x = np.random.default_rng(0).standard_normal((300, 257)).view(Named)
    out, hits, misses = counted(lambda: fastnorm.layernorm_forward(x, None, None)[0])
    assert (type(out), hits + misses) == (np.ndarray, 1)


# ---- the bound ------------------------------------------------------------------------------------


def test_the_longest_idle_blocks_go_first_when_the_bound_is_passed():
    fastnorm.set_output_pool(10_000_000)
    places = drop(*[4_000_000] * 4)
    assert fastnorm.output_pool().held <= 10_000_000
    assert fastnorm.output_pool().blocks == 2
    again = [output(4_000_000) for _ in range(2)]
    assert [address(array) for array in again] == [places[3], places[2]]


def test_a_lower_bound_takes_effect_at_once():
    drop(*[4_000_000] * 5)
    assert fastnorm.output_pool().blocks == 5
    fastnorm.set_output_pool(9_000_000)
    assert fastnorm.output_pool().blocks == 2
    fastnorm.clear_output_pool()
    assert fastnorm.output_pool()[:3] == (9_000_000, 0, 0)


@sizes
def test_off_means_off(size):
    alive = output(size, 7)
    drop(size)
    fastnorm.set_output_pool(0)
    assert fastnorm.output_pool()[:3] == (0, 0, 0)
    assert counted(lambda: output(size))[1:] == (0, 0)
    assert (alive == 7).all()
    del alive  # made by the pool, dropped without one
    assert fastnorm.output_pool()[:3] == (0, 0, 0)


def test_an_output_beyond_the_bound_is_numpys():
    fastnorm.set_output_pool(1_000_000)
    assert counted(lambda: output(1_100_000))[1:] == (0, 0)
    assert counted(lambda: output(900_000))[1:] == (0, 1)


def test_the_number_of_blocks_is_bounded():
    drop(*[40_000] * 600)
    assert fastnorm.output_pool().blocks == 512


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_goes_back_to_the_system():
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    fastnorm.set_output_pool(1 << 30)
    before = resident()
    output(200_000_000, 1)
    assert resident() - before > 190_000_000
    fastnorm.clear_output_pool()
    assert resident() - before < 20_000_000


@pytest.mark.slow
def test_a_block_that_waited_long_goes_back():
    drop(LARGE)
    time.sleep(10.1)
    drop(SMALL)
    assert fastnorm.output_pool().blocks == 1


@pytest.mark.parametrize("wrong", [-1, 2**63, 2**70])
def test_a_bound_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"limit_bytes: expected from 0 to {sys.maxsize} bytes, got {wrong}"):
        fastnorm.set_output_pool(wrong)
    assert fastnorm.output_pool().limit == LIMIT


@pytest.mark.parametrize("wrong", ["1G", 1.5, None, True])
def test_a_bound_that_is_no_number_of_bytes(wrong):
    with pytest.raises(TypeError, match="limit_bytes: expected a whole number of bytes, got"):
        fastnorm.set_output_pool(wrong)


def test_a_numpy_integer_is_a_bound():
    fastnorm.set_output_pool(np.int64(123_456))
    assert fastnorm.output_pool().limit == 123_456


@pytest.mark.parametrize(
    ("text", "limit"), [("0", 0), ("123456", 123456), ("256M", 256 << 20), ("2g", 2 << 30), (" 16 KiB", 16 << 10)]
)
def test_environment_sets_the_bound(text, limit):
    code = "import fastnorm; print(fastnorm.output_pool().limit, fastnorm.show_config('dicts')['output pool']['limit'])"
    assert run(code, FASTNORM_OUTPUT_POOL=text).split() == [str(limit)] * 2


@pytest.mark.parametrize("text", ["-1", "lots", "1.5G", "9999999999T"])
def test_environment_with_a_wrong_bound(text):
    printed = run("import fastnorm", check=False, FASTNORM_OUTPUT_POOL=text)
    assert "ValueError: FASTNORM_OUTPUT_POOL: expected" in printed


def test_the_start_value_is_a_share_of_the_memory(monkeypatch, tmp_path):
    code = "import fastnorm; print(fastnorm.output_pool().limit)"
    assert int(run(code)) == _memory._memory() // 8
    bound = tmp_path / "memory.max"
    monkeypatch.setattr(_memory, "CONTAINER", (str(bound), str(tmp_path / "absent")))
    bound.write_text("max\n")
    machine = _memory._memory()
    bound.write_text("1048576\n")
    assert _memory._memory() == 1048576 < machine


def test_without_the_extension_numpy_allocates():
    code = """
import sys
sys.modules["fastnorm._core"] = None
import numpy as np, fastnorm
fastnorm.set_output_pool(1 << 30)
fastnorm.clear_output_pool()
x = np.random.default_rng(0).standard_normal((300, 257))
for x in (x, x[::-1], np.asfortranarray(x)):
    out, cache = fastnorm.layernorm_forward(x, None, None, backend="numpy")
    fastnorm.layernorm_backward(out, cache, backend="numpy")
print(*fastnorm.output_pool())
"""
    assert run(code).split() == ["0"] * 5


# ---- memory that somebody can see is not handed out -----------------------------------------------


def _tensor(array):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array)


def _tensor_by_dlpack(array):
    torch = pytest.importorskip("torch")
    return torch.from_dlpack(array)


@pytest.mark.parametrize(
    "see",
    [
        lambda a: a[10:20], lambda a: a.reshape(-1, 2).T, lambda a: a.view(np.int8), memoryview,
        lambda a: memoryview(a)[5:], lambda a: np.frombuffer(a, np.int16), lambda a: a.flat, lambda a: a.ctypes,
        np.from_dlpack, _tensor, _tensor_by_dlpack, lambda a: iter([a]), lambda a: lambda: a,
    ],
)  # fmt: skip
@sizes
def test_whatever_refers_to_an_output_keeps_it(see, size):
    array = output(size, 1)
    where = address(array)
    seen = see(array)
    del array
    gc.collect()
    assert fastnorm.output_pool().blocks == 0
    assert address(output(size)) != where
    fastnorm.clear_output_pool()
    del seen
    gc.collect()
    assert fastnorm.output_pool().blocks == 1
    assert address(output(size)) == where


def test_the_cache_keeps_an_output_that_is_the_next_x():
    x = np.random.default_rng(0).standard_normal((300, 257))
    hidden, first = fastnorm.layernorm_forward(x, None, None)
    out, second = fastnorm.layernorm_forward(hidden, None, None)
    kept = hidden.copy()
    del hidden
    for _ in range(3):
        fastnorm.layernorm_backward(fastnorm.layernorm_backward(out, second)[0], first)
    np.testing.assert_array_equal(second.x, kept)


def _hammer(seed, rounds, failures):
    """Outputs of random sizes, kept for random times; each carries its own number from end to end."""
    rng = np.random.default_rng(seed)
    kept = []
    for number in range(rounds):
        size = int(rng.choice([33_000, 70_000, 300_000, 2_500_000])) + int(rng.integers(0, 20_000))
        stamp = seed << 32 | number
        array = output(size // 8 * 8).view(np.int64)
        array[:: max(1, array.size // 50)] = stamp
        array[-1] = stamp
        kept.append((stamp, array))
        while len(kept) > rng.integers(0, 8):
            stamp, array = kept.pop(rng.integers(0, len(kept)))
            if not (array[:: max(1, array.size // 50)] == stamp).all() or array[-1] != stamp:
                failures.append(stamp)
            del array
        if seed == 0 and number % 50 == 0:
            fastnorm.clear_output_pool()
            fastnorm.set_output_pool(int(rng.integers(0, LIMIT)))


def test_two_arrays_never_share_memory_under_many_threads():
    failures = []
    threads = [threading.Thread(target=_hammer, args=(seed, 400, failures)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    fastnorm.set_output_pool(LIMIT)
    held = fastnorm.output_pool()
    assert held.held <= LIMIT
    assert held.hits > 0


def test_no_two_live_outputs_overlap():
    rng = np.random.default_rng(1)
    live = []
    for _ in range(500):
        live.append(output(int(rng.integers(30_000, 3_000_000)), begun=int(rng.integers(LINE))))
        if len(live) > 12:
            del live[rng.integers(0, len(live))]
        spans = sorted((address(array), address(array) + array.nbytes) for array in live)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert fastnorm.output_pool().hits > 0


def test_calls_in_many_threads_give_equal_results():
    arrays = [np.random.default_rng(n).standard_normal((200 + n, 300)) for n in range(8)]

    def work(x):
        out, cache = fastnorm.batchnorm_forward(x, None, None)
        return out.tobytes() + fastnorm.batchnorm_backward(out, cache)[0].tobytes()

    expected = [work(x) for x in arrays]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert list(pool.map(work, arrays)) == expected


# ---- an ordinary array ----------------------------------------------------------------------------


@sizes
def test_outputs_own_their_data(size):
    array = output(size)
    assert array.flags.owndata
    assert array.base is None
    assert sys.getsizeof(array) > size
    assert array.flags.writeable


@pytest.mark.parametrize("begun", [0, 48])
@pytest.mark.parametrize("factor", [0.01, 0.5, 0.95, 1.0, 1.01, 2.0, 20.0])
@sizes
def test_resize(size, factor, begun):
    array = output(size, begun=begun)
    array[...] = np.arange(size) % 251
    array.resize(int(size * factor))
    kept = min(size, array.size)
    np.testing.assert_array_equal(array[:kept], np.arange(kept) % 251)
    assert not array[kept:].any()
    array[...] = 3
    other = output(size, 4)
    assert (array == 3).all()
    assert (other == 4).all()
    del array, other
    gc.collect()
    pool = fastnorm.output_pool()
    assert pool.blocks <= 3
    assert pool.held <= LIMIT


@sizes
def test_what_resize_moves_away_from_is_recycled(size):
    array = output(size)
    where = address(array)
    array.resize(2 * size)
    assert address(output(size)) == where


@sizes
def test_pickles_and_copies_are_independent(size):
    array = output(size, 5)
    loaded, copied = pickle.loads(pickle.dumps(array, protocol=5)), array.copy()
    del array
    output(size, 6)
    assert (loaded == 5).all()
    assert (copied == 5).all()


@sizes
def test_tracemalloc_sees_outputs_and_not_idle_blocks(size):
    output(size)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        array = output(size)
        with_it, _ = tracemalloc.get_traced_memory()
        del array
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert with_it - before == pytest.approx(size, abs=5000)
    assert after - before < 5000


def test_other_arrays_are_not_of_the_pool():
    output(SMALL)
    assert counted(lambda: np.empty(SMALL, np.uint8))[1:] == (0, 0)
    assert fastnorm.output_pool().blocks == 1


def test_a_memory_handler_of_the_users_own_stays():
    """A handler other than NumPy's own, here a copy of that one in a capsule of its own, is left in place."""
    multiarray = sys.modules["numpy._core.multiarray" if int(np.__version__[0]) >= 2 else "numpy.core.multiarray"]
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = ctypes.py_object, ctypes.c_char_p
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    table = ctypes.cast(api.PyCapsule_GetPointer(multiarray._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])
    name = ctypes.c_char_p(b"mem_handler")
    original = ctypes.PYFUNCTYPE(ctypes.py_object)(table[305])()
    theirs = api.PyCapsule_New(api.PyCapsule_GetPointer(original, name), name, None)
    set_handler(theirs)
    try:
        assert counted(lambda: output(SMALL))[1:] == (0, 0)
    finally:
        set_handler(original)
    assert counted(lambda: output(SMALL))[1:] == (0, 1)


# ---- processes ------------------------------------------------------------------------------------

FORK = """
import os, threading, warnings
import numpy as np, fastnorm
from fastnorm import _memory
warnings.simplefilter("ignore")  # Python warns of any fork beside threads
alive = _memory.empty((3_000_000,), np.dtype(np.uint8))
alive[...] = 7
stop = False

def churn():
    while not stop:
        _memory.empty((100_000,), np.dtype(np.uint8))

threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(30):
    _memory.empty((2_000_000,), np.dtype(np.uint8))
    child = os.fork()
    if child == 0:
        inherited = fastnorm.output_pool().blocks
        x = np.ones((300, 300), np.float32)
        for _ in range(3):
            fastnorm.layernorm_forward(x, None, None, backend="cpp")
        fine = inherited == 0 and fastnorm.output_pool().blocks == 1 and bool((alive == 7).all())
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop = True
for thread in threads:
    thread.join()
assert (alive == 7).all()
assert fastnorm.output_pool().blocks >= 1
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_forked_children_start_with_an_empty_pool_and_do_not_hang():
    assert run(FORK, FASTNORM_BACKEND="cpp").strip() == "fine"


def test_arrays_may_outlive_everything_else_at_exit():
    code = """
import builtins, sys, threading
import numpy as np, fastnorm
builtins.kept = fastnorm.layernorm_forward(np.ones((300, 300)), None, None)[0]
sys.kept = [fastnorm.layernorm_forward(np.ones((3000, 300)), None, None) for _ in range(3)]
class Late:
    array = fastnorm.layernorm_forward(np.ones((300, 300)), None, None)[0]
    def __del__(self):
        self.array.resize(10)
        del self.array
sys.late = Late()
threading.Thread(target=lambda: threading.Event().wait(0.2) or sys.kept.clear()).start()
print("done")
"""
    assert run(code).strip() == "done"
