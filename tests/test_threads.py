"""Equal bits for any number of threads, many threads at once, forked children."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import OPS, case, fused, rearranged
from conftest import REASONS
from processes import run

import fastnorm
from fastnorm.bench.tolerances import tolerance

# Large enough to be cut into many chunks, none of them a multiple of anything.
SHAPES = {
    "batchnorm": [
        ((4099, 131), "C"), ((257, 2053), "C"), ((40009, 13), "C"), ((2053, 257), "F"), ((300_007, 1), "C"),
        ((7, 33, 45, 47), "C"), ((7, 33, 45, 47), "channels-last"), ((1, 3, 401, 403), "C"), ((2053, 257), "gaps"),
    ],
    "layernorm": [
        ((4099, 131), "C"), ((257, 2053), "C"), ((40009, 13), "C"), ((3, 200_003), "C"), ((1, 500_009), "C"),
        ((257, 2053), "F"), ((257, 2053), "gaps"),
    ],
    "groupnorm": [
        ((7, 33, 45, 47), "C"), ((7, 33, 45, 47), "channels-last"), ((1, 6, 401, 403), "C"),
        ((1, 6, 401, 403), "channels-last"), ((257, 2052), "C"), ((7, 66, 30, 31), "gaps"),
        ((1, 37, 45, 47), "C"), ((3, 131, 45, 47), "C"),  # one group a sample
    ],
    "instancenorm": [((7, 33, 45, 47), "C"), ((7, 33, 45, 47), "channels-last")],
    "rmsnorm": [((4099, 131), "C"), ((3, 200_003), "C")],
}  # fmt: skip


def _differences(results, expected):
    """How many elements of each result differ in their bits, and the largest difference."""
    return {
        name: (int((value != wanted).sum()), float(np.abs(value.astype(float) - wanted.astype(float)).max()))
        for (name, value), wanted in zip(results.items(), expected.values(), strict=True)
        if value.tobytes() != wanted.tobytes()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("op", "shape", "arrangement"), [(op, *row) for op, rows in SHAPES.items() for row in rows], ids=str
)
def test_equal_bits_for_any_number_of_threads(op, shape, arrangement, dtype, backend):
    this = case(op, shape, dtype=dtype)
    inputs = rearranged(this.inputs(), arrangement, arrangement)
    found = []
    for threads in (1, 2, 3, 7):
        fastnorm.set_num_threads(threads)
        results = fused(this, inputs, backend)
        _, results["mean"], results["var"] = fastnorm.moments(inputs.x, this.reduced_axes, backend=backend)
        found.append(results)
    assert [_differences(results, found[0]) for results in found[1:]] == [{}, {}, {}]


PLACES = ((0, 0, 0), (4, 4, 4), (1, 1, 3), (5, 5, 0), (4, 9, 4))
"""Elements from a line of the cache to where x begins, dout, and out and dx."""


def _moved(values, offset):
    """The same values in memory that begins so many elements after a line of the cache."""
    memory = np.empty(values.size + 64, values.dtype)
    at = -memory.ctypes.data % 64 // values.itemsize + offset
    memory[at : at + values.size] = values.ravel()
    return memory[at : at + values.size].reshape(values.shape)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(
    "shape", [(300, 1024), (70, 1040), (300, 500), (2000, 64), (64, 32, 7, 7), (20, 17, 7, 7), (4096, 1024)], ids=str
)
def test_equal_bits_wherever_arrays_begin(shape, dtype, rng, backend):
    x, dout = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    gamma, beta = rng.standard_normal((2, shape[1])).astype(dtype)
    forward, backward = fastnorm.batchnorm_forward, fastnorm.batchnorm_backward
    found = set()
    for of_x, of_dout, of_out in PLACES:
        out, dx = _moved(x, of_out), _moved(x, of_out)
        _, cache = forward(_moved(x, of_x), gamma, beta, {"mode": "train"}, axis=1, out=out, backend=backend)
        _, *sums = backward(_moved(dout, of_dout), cache, out=dx, backend=backend)
        found.add(b"".join(values.tobytes() for values in (out, dx, *sums)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(
    "shape", [(70, 256), (20, 300), (70, 1040), (13, 9216), (3, 40000), (12000, 768), (20000, 500)], ids=str
)
def test_rows_have_equal_bits_wherever_arrays_begin(shape, dtype, rng, backend):
    x, dout = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    gamma, beta = rng.standard_normal((2, shape[1])).astype(dtype)
    found: dict[str, set[bytes]] = {"layernorm": set(), "rmsnorm": set()}
    for of_x, of_dout, of_out in PLACES:
        there, dout_there = _moved(x, of_x), _moved(dout, of_dout)
        for op, given in ("layernorm", (gamma, beta)), ("rmsnorm", (gamma,)):
            forward, backward = getattr(fastnorm, f"{op}_forward"), getattr(fastnorm, f"{op}_backward")
            out, dx = _moved(x, of_out), _moved(x, of_out)
            _, cache = forward(there, *given, out=out, backend=backend)
            _, *sums = backward(dout_there, cache, out=dx, backend=backend)
            found[op].add(b"".join(values.tobytes() for values in (out, dx, *sums)))
    assert [len(bits) for bits in found.values()] == [1, 1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("cols", [12, 131, 500, 1024, 9000])
def test_rows_past_the_cache_have_the_bits_of_those_within(cols, dtype, rng, backend):
    """Where a kernel stores past the cache and goes over rows in another order, a row's result does not show it."""
    rows = (40 << 20) // (cols * np.dtype(dtype).itemsize) + 3
    some = max(500, rows // 80)
    x, dout = (rng.standard_normal((rows, cols), np.float32).astype(dtype) for _ in range(2))
    gamma, beta = rng.standard_normal((2, cols), np.float32)

    def run(part):
        out, cache = fastnorm.layernorm_forward(x[part], gamma, beta, backend=backend)
        return out, *fastnorm.layernorm_backward(dout[part], cache, backend=backend)

    out, dx, *sums = run(slice(None))
    few = [run(slice(first, first + some)) for first in range(0, rows, some)]
    assert out.tobytes() == b"".join(part[0].tobytes() for part in few)
    assert dx.tobytes() == b"".join(part[1].tobytes() for part in few)
    magnitude = np.einsum("ij,ij->j", np.abs(dout), np.abs(x) + 2, dtype=np.float64)
    for whole, parts in zip(sums, zip(*(part[2:] for part in few), strict=True), strict=True):
        allowed = 2 * tolerance(whole, magnitude, np.float32, np.float32, rows)
        assert (np.abs(whole - np.sum(parts, axis=0, dtype=np.float64)) <= allowed).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((5, 23, 1040), 26), ((3, 2500, 1000), 40), ((10, 1000, 1000), 200), ((9, 3600, 240), 240)]
)
def test_groups_have_equal_bits_wherever_arrays_begin(shape, groups, dtype, rng, backend):
    x, dout = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    gamma, beta = rng.standard_normal((2, shape[-1])).astype(dtype)
    found = set()
    for of_x, of_dout, of_out in PLACES:
        out, dx = _moved(x, of_out), _moved(x, of_out)
        _, cache = fastnorm.groupnorm_forward(_moved(x, of_x), gamma, beta, groups, axis=-1, out=out, backend=backend)
        _, *sums = fastnorm.groupnorm_backward(_moved(dout, of_dout), cache, out=dx, backend=backend)
        found.add(b"".join(values.tobytes() for values in (out, dx, *sums)))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("op", "shape"),
    [("layernorm", (700, 1031)), ("layernorm", (5000, 64)), ("rmsnorm", (700, 1031)), ("groupnorm", (40, 24, 45, 47)),
     ("layernorm", (14, 70_001)), ("groupnorm", (300, 8, 2, 2)), ("instancenorm", (60, 24, 5, 5))],
    ids=str,
)  # fmt: skip
def test_a_sample_does_not_depend_on_the_number_of_samples(op, shape, backend):
    this = case(op, shape)
    inputs = this.inputs()
    whole = fused(this, inputs, backend)
    for rows in (1, 2, 7, shape[0] // 2):
        part = inputs._replace(x=inputs.x[:rows], dout=inputs.dout[:rows])
        results = fused(case(op, (rows, *shape[1:])), part, backend)
        for name in ("y", "dx"):
            np.testing.assert_array_equal(results[name], whole[name][:rows])


def test_the_same_call_twice_gives_equal_bits(backend):
    for op in OPS:
        this = case(op, (1031, 517))
        inputs = this.inputs()
        first = fused(this, inputs, backend)
        for _ in range(10):
            assert _differences(fused(this, inputs, backend), first) == {}


@pytest.mark.parametrize("shape", [(100, 64), (257, 2053), (33, 300), (3, 5, 7, 9)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_bits_do_not_depend_on_where_the_arrays_lie(shape, dtype, backend):
    for op in OPS:
        this = case(op, shape, dtype=dtype)
        inputs = this.inputs()
        expected = fused(this, inputs, backend)
        for of_x, of_dout in (("offset", "C"), ("C", "offset"), ("offset", "offset")):
            assert _differences(fused(this, rearranged(inputs, of_x, of_dout), backend), expected) == {}


def test_eight_python_threads_at_once(backend):
    work = [case(op, shape) for op in OPS for shape in ((2053, 257), (33, 40), (64, 4099), (5, 16, 33, 9))]
    work = [(this, this.inputs()) for this in work]
    fastnorm.set_num_threads(2)
    expected = [fused(this, inputs, backend) for this, inputs in work]
    with ThreadPoolExecutor(8) as pool:
        jobs = [(n, pool.submit(fused, *work[n], backend)) for _ in range(6) for n in range(len(work))]
        for n, job in jobs:
            assert _differences(job.result(timeout=120), expected[n]) == {}


def test_changing_the_number_of_threads_during_calls(backend):
    this = case("batchnorm", (2053, 257))
    inputs = this.inputs()
    expected = fused(this, inputs, backend)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(fused, this, inputs, backend) for _ in range(30)]
        for threads in (1, 2, 3, 7) * 5:
            fastnorm.set_num_threads(threads)
        assert all(_differences(job.result(timeout=120), expected) == {} for job in jobs)


# ---- fork -----------------------------------------------------------------------------------------

FORK = """
import os, sys, warnings
import numpy as np, fastnorm
warnings.simplefilter("ignore")  # Python warns of any fork beside threads
cpu, name = sys.argv[1].split(","), sys.argv[2]
fastnorm.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((3000, 301)).astype(np.float32)

def work(backend):
    found = []
    for op in ("batchnorm", "layernorm"):
        y, cache = getattr(fastnorm, op + "_forward")(x, None, None, backend=backend)
        found += [y, getattr(fastnorm, op + "_backward")(x, cache, backend=backend)[0]]
    return found

expected = {backend: work(backend) for backend in cpu}

def same(backend):
    return all(map(np.array_equal, work(backend), expected[backend]))

child = os.fork()
if child == 0:
    status = 1
    try:
        status = 0 if same(name) else 2
    except RuntimeError as error:
        print("refused:", error, flush=True)
        status = 3
    finally:
        os._exit(status)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert all(map(same, cpu)), "the parent"
print("status", status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["cpp", "numba", "numpy"])
def test_a_forked_child_after_the_parent_used_every_cpu_backend(name):
    if REASONS[name]:
        pytest.skip(f"{name}: {REASONS[name]}")
    cpu = ",".join(name for name in ("cpp", "numba", "numpy") if not REASONS[name])
    printed = run(FORK, cpu, name, timeout=60)
    if name == "numba" and "status 3" in printed:  # allowed to refuse, clearly
        assert "fork" in printed
    else:
        assert "status 0" in printed
