"""The plan as data: what fits a cache is read once, bits depend on no cache and no thread count, errors name names."""

from __future__ import annotations

import numpy as np
import pytest

import fastnorm

core = pytest.importorskip("fastnorm._core", reason="the extension is not built")
L2, L3 = core.build_info()["l2"], core.build_info()["l3"]


def test_images_go_slab_by_slab_and_are_read_once():
    plan = fastnorm.plan("batchnorm", (16, 256, 56, 56), threads=2)
    assert plan.sizes == (16, 256, 3136)
    assert (plan.reads, plan.writes, plan.shared) == (1, 1, False)
    assert plan.slab_bytes <= max(L2 // 2, 16 * 3136 * 4)
    assert plan.bytes == plan.floor == 2 * 16 * 256 * 3136 * 4
    assert not plan.side_by_side
    assert plan.ahead == plan.slab * 3136 * 4


def test_short_runs_are_walked_across_channels():
    plan = fastnorm.plan("batchnorm", (50, 2048, 7, 7), threads=2)
    assert plan.side_by_side
    assert plan.slab * 49 % 16 == 0, "slabs of whole lines"


def test_short_runs_of_few_rows_stay_runs():
    for length, fewest in ((3, 2), (15, 2), (16, 9), (49, 25), (64, 33), (256, 33)):
        across = [fastnorm.plan("batchnorm", (rows, 512, length)).side_by_side for rows in range(1, 40)]
        assert across == [False] * (fewest - 1) + [True] * (40 - fewest)
    assert not fastnorm.plan("batchnorm", (1000, 512, 257)).side_by_side


def test_runs_and_columns_count_as_work_for_threads():
    for shape in ((6, 8192), (2, 2048, 3), (1, 1024, 49)):
        assert fastnorm.plan("batchnorm", shape, threads=2).slab == shape[1] // 2, "of fewer elements than 64 Ki"
    for shape in ((6, 512), (2, 128, 3), (1, 128, 49)):
        assert fastnorm.plan("batchnorm", shape, threads=2).slab == shape[1], "too little work to share"


@pytest.mark.parametrize(
    ("op", "shape", "forward", "backward"),
    [("layernorm", (1024, 16), 2, 2), ("rmsnorm", (2048, 4), 2, 2), ("layernorm", (500, 16), 1, 1),
     ("layernorm", (64, 800), 1, 2), ("batchnorm", (48, 1024), 1, 2), ("batchnorm", (32, 512), 1, 1)],
)  # fmt: skip
def test_threads_are_woken_for_rows_and_for_a_backward_sooner_than_for_elements(op, shape, forward, backward):
    assert [fastnorm.plan(op, shape, direction=d, threads=2).threads for d in ("forward", "backward")] == [
        forward, backward,
    ]  # fmt: skip


@pytest.mark.skipif(L3 < 8 << 20, reason="a thread's share of L3 does not hold these rows")
@pytest.mark.parametrize(
    ("rows", "cols", "shared"),
    [(4, 16384, False), (3, 30_000, False), (2, 100_000, False), (1, 100_000, True), (3, 100_000, True),
     (5, 100_000, False), (4096, 768, False)],
)  # fmt: skip
def test_rows_are_shared_only_where_threads_would_wait(rows, cols, shared):
    plan = fastnorm.plan("layernorm", (rows, cols), threads=2)
    assert (plan.shared, plan.threads) == (shared, 2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(1, 512, 28, 28), (2, 320, 32, 32), (16, 512, 7, 7), (400, 1000)])
def test_threads_get_as_many_channels_each(shape, direction):
    for threads in (2, 3, 4):
        plan = fastnorm.plan("batchnorm", shape, direction=direction, threads=threads)
        slabs = -(-shape[1] // plan.slab)
        most = -(-slabs // threads) * plan.slab
        assert plan.shared or most <= 1.15 * shape[1] / threads, "some is for whole lines"


def test_a_tall_matrix_beyond_every_cache_is_read_twice():
    rows = 4 * L3 // (1024 * 4)
    for direction, least in (("forward", 1), ("backward", 2)):
        plan = fastnorm.plan("batchnorm", (rows, 1024), direction=direction)
        assert (plan.reads, plan.shared, plan.streams) == (2 * least, True, True)
        assert plan.bytes == (2 * least + 1) * rows * 4096
        assert plan.floor == (least + 1) * rows * 4096
        assert plan.ahead == 0
        assert "fetching nothing ahead" in str(plan)


def test_a_matrix_of_middling_height_is_read_once_in_slabs_that_fit_the_last_cache():
    rows, threads = L3 // (16 * 1024), 2  # 1 KB of each is an eighth of a thread's share
    shape = (rows, 2 * L3 // (4 * rows) // 16 * 16)
    for direction, least in (("forward", 1), ("backward", 2)):
        plan = fastnorm.plan("batchnorm", shape, direction=direction, threads=threads)
        assert (plan.reads, plan.shared) == (least, False)
        assert plan.bytes == plan.floor
        assert L2 // 2 < plan.slab_bytes <= least * L3 // 8
        assert plan.slab * 4 % 64 == 0, "whole lines"
    ragged = fastnorm.plan("batchnorm", (rows, shape[1] + 1), threads=threads)
    assert (ragged.reads, ragged.shared) == (2, True), "rows begin within lines"


@pytest.mark.skipif(12 * L2 > L3, reason="a thread's share of the last cache holds no row of three KB")
def test_slabs_of_short_runs_past_the_cache_are_whole_lines():
    samples = L2 // 2 // (10 * 49 * 4 * 2)  # x and dout of 10 channels fit half of L2, of 16 they don't
    shape = (samples, (L3 // (samples * 49 * 4) + 16) // 16 * 16, 7, 7)
    for direction, least in (("forward", 1), ("backward", 2)):
        plan = fastnorm.plan("batchnorm", shape, direction=direction, threads=2)
        assert (plan.reads, plan.shared, plan.streams, plan.slab % 16) == (least, False, True, 0)
    assert L2 // 2 < plan.slab_bytes <= 2 * L2, "an array of it fits a core's cache"
    forward = fastnorm.plan("batchnorm", shape, threads=2)
    assert 2 * forward.slab_bytes < L2, "a slab and the next one"


def test_memory_order_counts_not_the_shape():
    images = np.empty((8, 64, 112, 112), np.float32)
    channels_last = images.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    assert fastnorm.plan("batchnorm", channels_last).sizes == (8 * 112 * 112, 64, 1)
    assert fastnorm.plan("batchnorm", channels_last) == fastnorm.plan("batchnorm", (8, 112, 112, 64), axis=-1)
    assert fastnorm.plan("batchnorm", images[:, ::2]).packed
    assert not fastnorm.plan("batchnorm", images).packed


def test_an_array_with_gaps_is_planned_in_the_order_it_is_packed_in():
    memory = np.empty((8, 14, 14, 2 * 64), np.float32)
    with_gaps = memory[..., ::2].transpose(0, 3, 1, 2)  # channels last in memory
    plan = fastnorm.plan("batchnorm", with_gaps)
    assert (plan.packed, plan.sizes) == (True, (8 * 14 * 14, 64, 1))
    swapped = np.empty((4, 6), ">f4")
    assert fastnorm.plan("layernorm", swapped).packed


def test_groups_go_sample_by_sample():
    images = (16, 256, 56, 56)
    plan = fastnorm.plan("groupnorm", images, groups=32, threads=2)
    assert plan.sizes == (16, 1, 256, 3136)
    assert (plan.reads, plan.writes, plan.slab % 8) == (1, 1, 0), "whole groups of 8 channels"
    assert plan.bytes == plan.floor == 2 * 16 * 256 * 3136 * 4
    assert fastnorm.plan("instancenorm", images).sizes == plan.sizes
    last = fastnorm.plan("groupnorm", (16, 56, 56, 256), groups=32, axis=-1)
    assert (last.sizes, last.packed) == ((16, 3136, 256, 1), False)
    assert fastnorm.plan("groupnorm", np.empty((4, 8), order="F"), groups=2).packed
    assert "16, outer 1, channels 256" in str(plan)
    assert "channels of a sample" in str(plan)
    assert fastnorm.plan("rmsnorm", (4096, 768)).slab == fastnorm.plan("layernorm", (4096, 768)).slab


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_group_of_a_row_is_walked_as_that_row(direction):
    plan = fastnorm.plan("groupnorm", (4096, 768), groups=1, direction=direction)
    row = fastnorm.plan("layernorm", (4096, 768), direction=direction)
    assert (plan.slab, plan.slab_bytes, plan.ahead) == (768 * row.slab, row.slab_bytes, row.ahead)


@pytest.mark.parametrize(("side", "together"), [(8, 4), (10, 2), (12, 1), (14, 1), (16, 1)])
def test_groups_that_fill_a_first_level_cache_are_a_slab(side, together):
    """In a backward, 32 KB of dy and x."""
    plan = fastnorm.plan("groupnorm", (4, 512, side, side), groups=32, direction="backward", threads=2)
    assert not plan.streams
    assert plan.slab == 16 * together


@pytest.mark.skipif(12 * L2 > L3, reason="what leaves a core's L2 is stored past the cache")
def test_channels_of_one_sample_that_leaves_l2_are_a_slab_of_a_first_level_cache():
    def slab(samples, channels, side, direction):
        return fastnorm.plan("batchnorm", (samples, channels, side, side), direction=direction, threads=1).slab

    many = 2 * L2 // (28 * 28 * 8)
    assert slab(1, many, 28, "backward") == (32 << 10) // (28 * 28 * 8)
    for shape in ((1, many // 2, 28), (1, 16 * many, 7), (2, many, 28)):
        assert slab(*shape, "backward") * shape[0] * shape[2] ** 2 * 8 > 64 << 10, shape
    assert slab(1, many, 28, "forward") * 28 * 28 * 4 > 64 << 10


@pytest.mark.parametrize("side", [7, 20])
def test_smaller_and_larger_groups_are_taken_together_from_l2(side):
    plan = fastnorm.plan("groupnorm", (4, 512, side, side), groups=32, direction="backward", threads=2)
    assert plan.slab * side * side * 8 > 64 << 10


def test_a_slab_of_groups_has_no_more_than_a_sample():
    plan = fastnorm.plan("groupnorm", (1000, 32, 8, 8), groups=2, direction="backward", threads=2)
    assert plan.slab == 32


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_small_samples_are_a_slab_together(direction):
    def slab(*shape):
        return fastnorm.plan("groupnorm", shape, groups=4, direction=direction, axis=-1, threads=2).slab

    for samples in (100, 10_000):  # for one thread and for two
        assert slab(samples, 2, 2, 8) == 8 * 32, "each one row: as many as have 1,024 elements"
        assert slab(samples, 5, 5, 12) == 12 * 3
        assert slab(samples, 3, 3, 32) in range(32 * 2, 32 * 15, 32), "of several rows each, with room between them"
    assert slab(5, 2, 2, 8) == 5 * 8, "no more than there are"
    assert "5 samples" in str(fastnorm.plan("groupnorm", (5, 2, 2, 8), groups=4, direction=direction, axis=-1))
    assert slab(10_000, 2, 2, 512) == 512, "of many channels one alone"
    assert slab(10_000, 40, 40, 8) == 8, "of many positions, too"


@pytest.mark.parametrize(("direction", "side"), [("forward", 45), ("backward", 37)])
def test_one_statistic_of_runs_is_shared_by_all_threads(direction, side):
    """One that a core's L2 holds, too."""

    def shared(*shape, axis=1):
        return fastnorm.plan("groupnorm", shape, groups=1, axis=axis, direction=direction, threads=2).shared

    assert shared(1, 37, side, side)
    assert not shared(1, 37, 20, 20), "too little to wake threads for"
    assert not shared(1, side, side, 37, axis=-1), "columns, whose parts lie apart"


def test_few_samples_of_runs_are_taken_in_parts_where_threads_would_wait():
    def slab(samples, *shape, **options):
        return fastnorm.plan("groupnorm", (samples, *shape), groups=32, threads=2, **options).slab

    assert slab(3, 256, 14, 14) == 128
    assert slab(4, 256, 14, 14) == 256, "two a thread"
    assert slab(3, 14, 14, 256, axis=-1) == 256, "the parts of columns lie apart"


def test_many_short_runs_are_work_for_several_threads():
    """As many elements in fewer, longer runs are not."""
    assert fastnorm.plan("groupnorm", (7, 640, 8), groups=2, threads=2).threads == 2
    assert fastnorm.plan("groupnorm", (7, 10, 512), groups=2, threads=2).threads == 1


@pytest.mark.parametrize(("share", "alone"), [(0.3, False), (0.4, True)])
def test_past_the_cache_such_a_group_is_a_slab_where_l3_would_not_hold_it(share, alone):
    samples = int(share * L3) // (512 * 14 * 14 * 4)
    plan = fastnorm.plan("groupnorm", (samples, 512, 14, 14), groups=32, direction="backward", threads=2)
    assert plan.streams
    assert (plan.slab == 16) == alone


@pytest.mark.skipif(12 * L2 > L3, reason="what is stored past the cache is not much larger than a core's L2")
def test_samples_past_the_cache_are_whole_where_channels_are_last():
    positions, samples = L2 // (1024 * 4), L3 // L2
    past = fastnorm.plan("groupnorm", (samples, positions, 1024), groups=32, axis=-1, threads=2)
    assert (past.streams, past.shared, past.slab) == (True, False, 1024), "rows follow one another in memory"
    within = fastnorm.plan("groupnorm", (4, positions, 1024), groups=32, axis=-1, threads=2)
    assert (within.streams, within.shared, within.slab % 32) == (False, False, 0)
    assert within.slab_bytes <= L2 // 2


@pytest.mark.skipif(4 * L2 > L3, reason="two samples beyond a core's L2 do not fit half of L3")
@pytest.mark.parametrize(("samples", "threads", "shared"), [(2, 2, False), (4, 2, False), (3, 2, True), (1, 2, True)])
def test_samples_are_shared_only_where_threads_would_wait(samples, threads, shared):
    positions = L2 // (256 * 4)
    plan = fastnorm.plan("groupnorm", (samples, positions, 256), groups=32, axis=-1, threads=threads)
    assert (plan.shared, plan.slab) == (shared, 256)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_dropout_is_cut_into_tasks_and_moves_the_least(direction):
    for dtype, itemsize in (("float16", 2), ("float32", 4), ("float64", 8)):
        for elements in (1, 32, 16383, 16384, 32767, 32768, 1 << 20, L3 // itemsize + 5):
            plan = fastnorm.plan("dropout", (elements,), dtype=dtype, direction=direction, threads=2)
            assert (plan.sizes, plan.reads, plan.writes, plan.shared) == ((elements,), 1, 1, False)
            assert plan.bytes == plan.floor == 2 * elements * itemsize
            assert plan.streams == (elements * itemsize >= 2 * L3 // 5)
            least = 1 << 16 if plan.streams else 1 << 14
            tasks = -(-elements // plan.slab)
            assert tasks <= max(1, elements // least), "none of a rest: a task is worth waking a thread"
            assert plan.slab == elements or plan.slab % 384 == 0, "whole draws of random numbers"
            assert plan.slab_bytes == plan.slab * itemsize
    assert fastnorm.plan("dropout", (60, 70)).slab == fastnorm.plan("dropout", (4200,), threads=7).slab == 4200
    assert fastnorm.plan("dropout", (1 << 15,)).slab <= (1 << 14) + 384, "two tasks"
    assert "elements 4200" in str(fastnorm.plan("dropout", (60, 70)))
    assert "sums    none" in str(fastnorm.plan("dropout", (60, 70)))


def test_dropout_reads_c_order():
    assert not fastnorm.plan("dropout", np.empty((4, 6))).packed
    assert not fastnorm.plan("dropout", np.empty((1, 6), order="F")).packed
    for other in (np.empty((4, 6), order="F"), np.empty((4, 6))[:, ::2], np.empty((4, 6), ">f4"), np.empty(4, int)):
        assert fastnorm.plan("dropout", other).packed


def test_small_results_stay_in_cache():
    assert not fastnorm.plan("layernorm", (64, 64)).streams
    assert fastnorm.plan("layernorm", (L3 // 4096, 4096)).streams
    for op, shape in ("layernorm", (-1, 1024)), ("batchnorm", (-1, 64, 56, 56)), ("instancenorm", (-1, 64, 56, 56)):
        fits = (5 * L3 // 16 // (4 * -np.prod(shape)), *shape[1:])
        assert not fastnorm.plan(op, fits).streams
        assert fastnorm.plan(op, fits, direction="backward").streams


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [("batchnorm", (65536, 64)), ("batchnorm", (256, 8192)), ("batchnorm", (8, 64, 112, 112)),
     ("layernorm", (4096, 768)), ("layernorm", (4, 1 << 20))],
)  # fmt: skip
def test_the_order_of_sums_ignores_threads(op, shape, direction):
    groups = {fastnorm.plan(op, shape, direction=direction, threads=threads).groups for threads in (1, 2, 16, 1024)}
    assert len(groups) == 1


def test_the_backward_of_short_rows_past_the_cache_sums_the_next_row():
    def slab(rows: int, cols: int) -> int:
        return fastnorm.plan("layernorm", (rows, cols), direction="backward").slab

    rows = L3 // 4096
    assert slab(rows, 1024) == 2, "the row that is stored and the next one"
    assert slab(rows, 1000) == 2, "where rows end does not matter"
    assert slab(rows, 4096) == 2, "nor whether they stay in a first-level cache"
    assert slab(rows, 32768) == 4, "they would leave the second"
    assert slab(rows * 128, 8) == 4, "they are less than two lines"
    assert slab(64, 1024) == 4, "in the cache"


def test_a_plan_is_printable():
    text = str(fastnorm.plan("batchnorm", (4 * L3 // 4096, 1024), threads=2))
    assert "2 reads" in text
    assert "1.5 times the least" in text
    assert "past the cache" in text


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_count_in_bytes(dtype):
    assert fastnorm.plan("layernorm", (100, 50), dtype=dtype).floor == 2 * 5000 * np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    ("arguments", "options", "error", "name"),
    [
        (("groupednorm", (4, 8)), {}, ValueError, "op"),
        (("groupnorm", (4, 8)), {}, TypeError, "groups"),
        (("dropout", (4, 8)), {"groups": 2}, TypeError, "groups"),
        (("dropout", (4, 8)), {"axis": 1}, TypeError, "axis"),
        (("dropout", (0, 8)), {}, ValueError, "x"),
        (("groupnorm", (4, 8)), {"groups": 3}, ValueError, "groups"),
        (("groupnorm", (4, 8)), {"groups": 2, "axis": 0}, ValueError, "axis"),
        (("batchnorm", (4, 8)), {"groups": 2}, TypeError, "groups"),
        (("batchnorm", 7), {}, TypeError, "x"),
        (("batchnorm", (4, -8)), {}, ValueError, "x"),
        (("batchnorm", (0, 8)), {}, ValueError, "x"),
        (("batchnorm", (4, 8)), {"axis": 2}, ValueError, "axis"),
        (("batchnorm", (4, 8)), {"direction": "sideways"}, ValueError, "direction"),
        (("batchnorm", (4, 8)), {"threads": 0}, ValueError, "threads"),
        (("batchnorm", (4, 8)), {"dtype": "complex64"}, TypeError, "dtype"),
        (("batchnorm", np.empty((4, 8))), {"dtype": "float32"}, TypeError, "dtype"),
    ],
)
def test_refuses(arguments, options, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        fastnorm.plan(*arguments, **options)
