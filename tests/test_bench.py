"""The targets run of the benchmarks: what is measured, how, and how it is judged."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastnorm
from fastnorm import __main__
from fastnorm.bench import check, cli, dropout, machine, measure, pieces, plot, roof, target_tables, targets
from fastnorm.bench.cases import DIRECTIONS, DROPOUT, DTYPES, OPS, Case, Entry, dtype_of, target_entries
from fastnorm.bench.peers import PEERS
from fastnorm.bench.run import Report, Row, Section, fill
from fastnorm.bench.variants import Variant

TABLES = Path(__file__).parent.parent / "bench" / "tables.py"


def small_case(op="batchnorm", layout="ND", shape=(12, 16), dtype="float32"):
    return Case(OPS[op], OPS[op].layout(layout), shape, dtype)


def section(seconds, *, floor=1.0, plan_floor=None, **fields):
    """A section whose rows have these times."""
    values = {"op": "batchnorm", "layout": "ND", "shape": (2, 3), "dtype": "float32", "direction": "forward"} | fields
    made = Section(**values, nbytes=24, bytes_moved=48)
    made.rows = [Row(variant, variant.partition(" ")[0], None) for variant in seconds]
    times = {**seconds, "floor": floor} | ({} if plan_floor is None else {"plan floor": plan_floor})
    fill(made, {name: measure.Timing(time, 2 * time, 5) for name, time in times.items()})
    return made


def judged(*sections):
    return {verdict.name: verdict for verdict in targets.verdicts(sections)}


# ---- the cases ------------------------------------------------------------------------------------


def test_sizes_of_the_groups():
    by_group = {}
    for entry in target_entries():
        by_group.setdefault(entry.group, []).append(entry.case)
    assert all(case.nbytes >= 40e6 for case in by_group["large"] + by_group["dtypes"] + by_group["family"])
    assert all(60e3 <= case.nbytes <= 2**24 for case in by_group["cache"] + by_group["family cached"])
    assert all(case.nbytes >= 40e6 for case in by_group["dropout"])
    assert {case.nbytes for case in by_group["dropout cached"]} >= {128, 2**24 // 4}
    assert max(case.nbytes for case in by_group["dropout cached"]) <= 2**24
    assert {case.dtype for case in by_group["dtypes"]} == set(DTYPES)
    tall = {case.shape for case in by_group["large"] if case.op.name == "batchnorm" and case.layout.label == "ND"}
    assert {rows for rows, _ in tall} >= {256, 65536}


def test_each_kind_meets_further_peers_once_in_the_cache_and_once_beyond():
    met = [(e.group, e.case.op.name, e.case.layout.label) for e in target_entries() if e.contest]
    kinds = [("batchnorm", "ND"), ("batchnorm", "NCHW"), ("batchnorm", "NHWC"), ("layernorm", "ND")]
    family = [(op, layout) for op in ("groupnorm", "instancenorm") for layout in ("NCHW", "NHWC")] + [("rmsnorm", "ND")]
    assert sorted(met) == sorted(
        [(group, *kind) for group in ("large", "cache") for kind in kinds]
        + [(group, *kind) for group in targets.FAMILY for kind in family]
    )


def test_dropout_is_measured_against_a_copy_and_judged(monkeypatch):
    compiled = [info.name for info in fastnorm.backends() if info.available and info.name in ("cpp", "numba")]
    monkeypatch.setattr(machine.OtherPrograms, "cpus", lambda self: 0.0)
    case = Case(DROPOUT, DROPOUT.layout("ND"), (12, 16))
    entries = [Entry("dropout", case), Entry("dropout cached", replace(case, dtype="float16"))]
    report = targets.run(targets.selected(entries, ["dropout"]), compiled, with_peers=False)
    assert [(each.group, each.direction) for each in report.sections] == [
        (group, direction) for group in targets.OF_DROPOUT for direction in DIRECTIONS
    ]
    for each in report.sections:
        assert (each.bytes_moved, each.nbytes) == (2 * each.nbytes, 192 * dtype_of(each.dtype).itemsize)
        assert (each.plan_reads, each.plan_writes) == (1, 1)
        assert each.plan_floor_best == each.floor_best > 0
        assert {row.variant: row.correct for row in each.rows} == {f"fused {name}": True for name in compiled}
    titles = {table.title for table in target_tables.tables(report)}
    assert {"Dropout, forward beyond the cache, ms", "Dropout, backward in the cache, us"} <= titles
    assert "Dropout 12x16 float16" in target_tables.text(report)
    monkeypatch.setattr(dropout, "error", lambda *_: 0.5)
    wrong = targets.run([(entries[0], "backward")], compiled, with_peers=False)
    assert [row.correct for row in wrong.sections[0].rows] == [False] * len(compiled)

    rows = section({"fused cpp": 2.0, "torch": 1.9}, floor=1.5, op="dropout", group="dropout")
    small = section({"fused cpp": 2.0, "torch": 9.0}, floor=1.5, op="dropout", shape=(4, 8), group="dropout cached")
    found = judged(rows, small)
    assert found["PyTorch over C++, time, dropout, worst"].met is False
    assert found["dropout, beyond the cache: share of the floor, worst"].value == 0.75
    assert found["dropout, in the cache: share of the fastest copy, worst"].met is None


def test_networks_have_all_of_their_normalizations():
    layers = [entry for entry in target_entries() if entry.network == "ResNet-50"]
    assert sum(entry.count for entry in layers) == 53
    assert sum(entry.count * entry.case.shape[1] for entry in layers) == 26560  # its 53,120 parameters are pairs
    assert [entry.count for entry in target_entries() if entry.network == "BERT-large"] == [2 * 24]


def test_cases_are_selected_by_name():
    parts = targets.selected(target_entries(), ["^large.*NHWC 16x256x56x56 float32 backward$", "^small.*ND 4x8 .*forw"])
    assert [(entry.group, direction) for entry, direction in parts] == [
        ("large", "backward"), ("small", "forward"), ("small", "forward"), ("small", "forward"),
    ]  # fmt: skip
    assert len(targets.selected(target_entries(), [])) == 2 * len(target_entries())


def test_bfloat16_needs_ml_dtypes(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    left = {entry.case.dtype for entry, _ in targets.selected(target_entries(), [])}
    assert left == set(DTYPES) - {"bfloat16"}


# ---- timing ---------------------------------------------------------------------------------------


def test_bursts_repeat_one_call_at_a_time(monkeypatch):
    monkeypatch.setattr(measure, "BURSTS", 2)
    monkeypatch.setattr(measure, "BURST", 0.001)
    events = []
    timings = measure.bursts(
        {name: lambda name=name: events.append(name) for name in "ab"}, tick=lambda name: events.append(f"tick {name}")
    )
    order = [event for i, event in enumerate(events) if i == 0 or event != events[i - 1]]
    assert order == ["tick a", "a", "tick b", "b"] * 2
    assert timings["a"].best <= timings["a"].median
    untimed = 2 * 2  # the first of a burst, and the one that says how many fit between two looks at the clock
    assert timings["a"].rounds == events.count("a") - untimed >= 6


def test_thread_counts():
    assert targets.thread_counts(1) == [1]
    assert targets.thread_counts(2) == [1, 2]
    assert targets.thread_counts(12) == [1, 2, 4, 8, 12]
    assert targets.thread_counts(16) == [1, 2, 4, 8, 16]


def test_threads_are_put_back_after_an_error():
    before = fastnorm.get_num_threads()

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        targets._timed({"a": broken}, {}, {"a": before + 1}, in_bursts=True)
    assert fastnorm.get_num_threads() == before


def test_other_programs_are_what_is_busy_beside_this_one(monkeypatch):
    times = iter([(0.0, 10.0, 5.0), (2.0, 14.0, 6.0), (3.0, 15.0, 9.0)])  # wall, busy, own
    monkeypatch.setattr(machine.OtherPrograms, "_now", staticmethod(lambda: next(times)))
    others = machine.OtherPrograms()
    assert others.cpus() == pytest.approx(1.5)
    assert others.cpus() == pytest.approx(1 / 3)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_busy_seconds_are_those_of_our_cpus(monkeypatch):
    assert machine._busy_seconds() > 0
    own = min(os.sched_getaffinity(0))
    lines = [
        "cpu 9 9 9 9 9 9 9 9 0 0",
        f"cpu{own} 100 20 30 4000 500 6 7 8 90 90",
        f"cpu{own + 999} 5 5 5 5 5 5 5 5 0 0",
    ]
    monkeypatch.setattr(machine, "_text", lambda path: "\n".join(lines))
    assert machine._busy_seconds() == pytest.approx(171 / os.sysconf("SC_CLK_TCK"))


def test_a_disturbed_section_is_timed_again_and_the_calmest_counts(entries, monkeypatch):
    used = [0.9, 0.4, 0.5]
    seconds = {cpus: measure.Timing(1.0 + cpus, 2.0, 3) for cpus in used}
    now = iter(used)

    class Others:
        def cpus(self):
            self.seen.append(next(now))
            return self.seen[-1]

        seen = []  # noqa: RUF012

    monkeypatch.setattr(machine, "OtherPrograms", Others)
    monkeypatch.setattr(targets, "_timed", lambda *arguments, **how: {"floor": seconds[used[len(Others.seen)]]})
    report = targets.run([(entries[0], "forward")], ["numpy"], with_peers=False)
    (found,) = report.sections
    assert (len(Others.seen), found.others, found.floor_best) == (3, 0.4, 1.4)
    assert found.disturbed
    assert found.attempts == 3
    assert "forward: disturbed, other programs used 0.40 CPUs" in target_tables.text(report)


def test_a_machine_that_is_never_calm_costs_a_limited_time(entries, monkeypatch):
    monkeypatch.setattr(machine.OtherPrograms, "cpus", lambda self: 1.0)
    monkeypatch.setattr(targets, "_timed", lambda *arguments, **how: {"floor": measure.Timing(1.0, 1.0, 1)})
    monkeypatch.setattr(targets, "REPEATS", 3)
    report = targets.run([(entries[0], "forward")] * 4, ["numpy"], with_peers=False)
    assert [each.attempts for each in report.sections] == [3, 2, 1, 1]


# ---- floors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_floor_moves_the_arrays(direction):
    case = small_case(shape=(64, 48))
    inputs, out = case.inputs(), case.empty()
    for array in inputs.x, inputs.dout:  # NumPy adds them as integers, the extension as floats: both are right here
        array[:] = np.where(np.arange(48) % 2 == (array is inputs.x), array, 0)
    expected = inputs.x.copy() if direction == "forward" else inputs.x + inputs.dout
    twice = roof.Traffic(2 * roof.ONE_PASS[direction].reads, 1)
    calls = roof.in_cache(inputs, out, direction) | {
        "one pass": roof.floor(inputs, out, direction),
        "plan": roof.plan_floor(inputs, out, direction, twice),
    }
    for call in calls.values():
        out.fill(0)
        call()
        np.testing.assert_array_equal(out, expected)


def test_the_plans_floor_reads_what_the_plan_reads(monkeypatch):
    read = []

    class Core:
        stream_read = staticmethod(read.append)
        stream_copy = stream_add = staticmethod(lambda *arrays: read.extend(arrays[:-1]))

    monkeypatch.setattr(roof, "_core", lambda: Core)
    inputs = small_case().inputs()
    for direction, of_x, of_dout in (("forward", 2, 0), ("backward", 2, 2)):
        read.clear()
        roof.plan_floor(inputs, np.empty_like(inputs.x), direction, roof.Traffic(of_x + of_dout, 1))()
        for array, count in ((inputs.x, of_x), (inputs.dout, of_dout)):
            assert sum(np.shares_memory(array, each) for each in read) == count


def test_traffic_is_the_plans():
    pytest.importorskip("fastnorm._core")
    tall = small_case(shape=(400_000, 64))
    x = np.empty(tall.shape, np.float32)  # whose values are not looked at
    assert roof.traffic(tall, x, "forward") == (2, 1)
    assert roof.traffic(tall, x, "backward") == (4, 1)
    assert roof.traffic(small_case("layernorm"), np.empty((12, 16), np.float32), "backward") == (2, 1)


# ---- peers ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("op", "layout", "shape"),
    [
        ("batchnorm", "ND", (12, 16)), ("batchnorm", "ND fortran", (12, 16)), ("batchnorm", "NCHW", (3, 16, 5, 4)),
        ("batchnorm", "NHWC", (3, 16, 5, 4)), ("batchnorm", "channels-last", (3, 5, 4, 16)),
        ("layernorm", "ND", (12, 16)), ("layernorm", "N(CHW)", (3, 2, 5, 4)), ("rmsnorm", "ND", (12, 16)),
        ("groupnorm", "NCHW", (3, 16, 5, 4)), ("groupnorm", "NHWC", (3, 16, 5, 4)),
        ("groupnorm", "channels-last", (3, 5, 4, 16)), ("instancenorm", "NCHW", (3, 16, 5, 4)),
        ("instancenorm", "NHWC", (3, 16, 5, 4)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "torch compile")) for name in PEERS]
)
def test_peers_compute_the_same(name, op, layout, shape, direction):
    pytest.importorskip(PEERS[name].module)
    case = small_case(op, layout, shape)
    variant = Variant(name)
    if not variant.computes(case, direction):
        pytest.skip("it has no such op")
    inputs = case.inputs()
    call = variant.bind(case, inputs, direction)
    error = check.error(case, call.arrays(call.run()), check.reference(case, inputs, direction))
    assert error <= check.tolerance(case, exact=False)


# ---- the run --------------------------------------------------------------------------------------


@pytest.fixture
def entries(monkeypatch):
    """One tiny case of each group, and short bursts."""
    monkeypatch.setattr(measure, "BURST", 0.0005)
    monkeypatch.setattr(targets, "WORTH", 0.0005)
    image = small_case(layout="NHWC", shape=(3, 16, 5, 4))
    found = [
        Entry("large", image, contest=True), Entry("cache", small_case(), contest=True), Entry("small", small_case()),
        *(Entry("dtypes", small_case(dtype=dtype)) for dtype in ("float32", "float16")),
        Entry("threads", small_case()), Entry("networks", image, network="Net", count=3),
        Entry("networks", small_case("layernorm"), network="Net", count=2), Entry("family", small_case("rmsnorm")),
        Entry("family cached", small_case("groupnorm", "NCHW", (3, 16, 5, 4))),
    ]  # fmt: skip
    monkeypatch.setattr(cli, "target_entries", lambda: found)
    return found


def test_every_group_is_measured_and_judged(entries):
    before = fastnorm.get_num_threads()
    compiled = [info.name for info in fastnorm.backends() if info.available and info.name in ("cpp", "numba")][:1]
    report = targets.run(targets.selected(entries, []), ["numpy", *compiled], with_peers=False)
    assert fastnorm.get_num_threads() == before
    assert report.correct
    assert len(report.sections) == 2 * len(entries)
    for each in report.sections:
        assert each.rows
        assert each.floor_best > 0
        for row in each.rows:
            assert row.correct
            assert row.backend != "numpy"
            assert row.best is not None
            assert row.share_of_floor == pytest.approx(each.floor_best / row.best)
            assert (row.threads is None) == (each.group != "threads")
        if each.group == "threads":
            assert {row.threads for row in each.rows} == set(targets.thread_counts(before))
        if each.group in targets.IN_BURSTS:
            assert each.floor_best == min(each.floors.values())
        assert (each.row("alt") is not None) == (each.group == "large" and each.direction == "backward")
    again = Report.from_dict(json.loads(json.dumps(report.as_dict())))
    assert again == report
    assert target_tables.text(again) == target_tables.text(report)


@pytest.mark.parametrize("arguments", [["--no-plot"], []])
def test_the_command(entries, tmp_path, capsys, arguments):
    prefix = tmp_path / "found" / "figures"
    if not arguments:
        pytest.importorskip("matplotlib")
    command = ["bench", "--targets", "--no-peers", "--only", "^(large|cache) ", "--output", str(prefix), *arguments]
    assert __main__.main(command) == 0
    report = Report.from_dict(json.loads(prefix.with_suffix(".json").read_text()))
    assert [each.group for each in report.sections] == ["large", "large", "cache", "cache"]
    pictures = set() if arguments else {".png", ".svg"}
    assert {path.suffix for path in prefix.parent.iterdir()} == {".json"} | pictures
    shown = capsys.readouterr().out
    assert "Targets" in shown
    assert "batchnorm NHWC 3x16x5x4 float32" in shown


def test_a_wrong_result_is_an_exit_status(entries, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "tolerance", lambda case, exact: -1.0)
    command = ["bench", "--targets", "--no-peers", "--no-plot", "--only", "^small", "--output", str(tmp_path / "x")]
    assert __main__.main(command) == 1
    assert "tolerance -1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "x"], "goes with --targets"),
        (["--targets", "--dtype", "float16"], "argument --dtype: not with --targets"),
        (["--targets", "--only", "nothing like it"], "no case has a name with nothing like it in it"),
        (["--targets", "--only", "("], "argument --only: missing )"),
    ],
)
def test_the_commands_errors(entries, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["bench", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_dropout_is_checked_and_timed_beside_the_rest(tmp_path, capsys):
    command = [
        "bench",
        "--op",
        "dropout,layernorm",
        "--size",
        "1",
        "--quick",
        "--no-plot",
        "--output",
        str(tmp_path / "x"),
    ]
    assert __main__.main(command) == 0
    report = Report.from_dict(json.loads((tmp_path / "x.json").read_text()))
    assert {each.op for each in report.sections} == {"layernorm"}
    assert [(each.op, each.direction) for each in report.dropout] == [("dropout", "forward"), ("dropout", "backward")]
    for each in report.dropout:
        assert each.bytes_moved == 2 * each.nbytes
        assert {row.backend for row in each.rows} == {info.name for info in fastnorm.backends() if info.available}
        assert all(row.error == 0 and row.share_of_floor > 0 for row in each.rows)
    assert "dropout ND 96x1024 float32 (0 MB), backward" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["one element", "its shape", "its dtype"])
def test_a_wrong_dropout_is_an_exit_status(broken, tmp_path, monkeypatch):
    right = dropout.fastnorm.dropout_backward

    def wrong(dout, cache, *, out=None, backend=None):
        dx = right(dout, cache, out=out, backend=backend)
        dx[3, 5] += broken == "one element"
        return {"its shape": dx.T, "its dtype": dx.astype(np.float64)}.get(broken, dx)

    monkeypatch.setattr(dropout.fastnorm, "dropout_backward", wrong)
    command = [
        "bench",
        "--op",
        "dropout",
        "--backend",
        "numpy",
        "--size",
        "1",
        "--quick",
        "--output",
        str(tmp_path / "x"),
    ]
    assert __main__.main(command) == 1


def _pieces(tmp_path, *arguments):
    command = ["bench", "--op", "moments,weighted,normalize,chunks", "--size", "1", "--quick", "--no-plot"]
    status = __main__.main([*command, "--output", str(tmp_path / "x"), *arguments])
    return status, Report.from_dict(json.loads((tmp_path / "x.json").read_text()))


def test_pieces_are_checked_and_timed_beside_the_rest(tmp_path, capsys):
    status, report = _pieces(tmp_path)
    assert status == 0
    arrays = [("moments", 1), ("weighted", 1), ("normalize", 2), ("chunks", 2), ("chunks", 3)]
    assert [(each.op, each.bytes_moved // each.nbytes) for each in report.pieces] == arrays
    for each in report.pieces:
        known = {info.name for info in fastnorm.backends() if info.available}
        assert {row.backend for row in each.rows} == known - ({"cuda"} if each.op == "weighted" else set())
        assert all(row.correct and row.tolerance < 1e-4 and row.share_of_floor > 0 for row in each.rows)
    assert "chunks ND 96x1024 float32 (0 MB), backward" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["moments", "normalize", "batchnorm_forward", "batchnorm_backward"])
def test_a_wrong_piece_is_an_exit_status(broken, tmp_path, monkeypatch):
    right = getattr(pieces.fastnorm, broken)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        if options["backend"] == "cpp":
            (result if broken == "normalize" else result[0][1] if broken[0] == "b" else result.var)[1] += 0.01
        return result

    monkeypatch.setattr(pieces.fastnorm, broken, wrong)
    status, report = _pieces(tmp_path, "--backend", "cpp")
    assert status == 1
    assert {each.op for each in report.pieces if not each.rows[0].correct} >= {
        "moments": {"moments", "weighted"}, "normalize": {"normalize"}
    }.get(broken, {"chunks"})  # fmt: skip


def test_a_peers_dropout_has_a_mask_of_its_own():
    torch = Variant("torch")
    x = dropout.values((64, 1024), "float32")
    kept = np.random.default_rng(1).random(x.shape) < dropout.P
    assert dropout.error(torch, x, np.where(kept, 2 * x, np.float32(0))) == 0
    assert dropout.error(torch, x, np.where(kept, 3 * x, np.float32(0))) > 0.1
    assert dropout.error(torch, x, 2 * x) == np.inf
    assert dropout.error(torch, x, np.where(kept, 2 * x, np.float32(0))[:, 1:]) == np.inf


# ---- the verdicts ---------------------------------------------------------------------------------


def test_shares_of_the_floor():
    found = judged(
        section({"fused cpp": 2.0, "fused numba": 2.5}, floor=1.0, plan_floor=1.8, group="large"),
        section({"fused cpp": 1.0, "fused numba": 1.6}, floor=0.6, group="large", direction="backward"),
    )
    mean = found["beyond the cache: share of the plan's floor, geometric mean"]
    assert mean.value == pytest.approx(math.sqrt(0.9 * 0.6))
    assert mean.target == 0.9
    assert mean.met is False
    assert found[f"{mean.name}, at least"].target == 0.8
    worst = found["beyond the cache: share of the plan's floor, worst"]
    assert (worst.value, worst.met) == (pytest.approx(0.6), False)
    assert worst.note == "batchnorm ND 2x3 float32 backward"
    one_pass = found["beyond the cache: share of the one-pass floor, geometric mean"]
    assert one_pass.value == pytest.approx(math.sqrt(0.5 * 0.6))
    assert one_pass.met is None
    numba = found["beyond the cache: Numba's speed over C++'s, geometric mean"]
    assert numba.value == pytest.approx(math.sqrt(0.8 * 0.625))
    assert numba.met is False
    assert found["beyond the cache: Numba's speed over C++'s, worst"].target == 0.75


def test_shares_of_a_copy_in_the_cache():
    floors = {"plain": 1.5, "non-temporal": 1.8, "plain, threads": 1.0}
    found = judged(section({"fused cpp": 2.0}, floor=1.0, group="cache", floors=floors))
    assert found["in the cache: share of the fastest copy or addition, worst"].value == pytest.approx(0.5)
    assert found["in the cache: share of NumPy's or the non-temporal one, worst"].value == pytest.approx(0.75)
    assert {verdict.target for verdict in found.values() if verdict.name.startswith("in the cache")} == {0.8}


def test_speed_against_peers_is_that_of_new_arrays():
    fresh = section({"fused cpp": 1.0, "fused cpp, fresh": 2.0, "torch": 3.0}, group="large")
    fresh.rows = [row for row in fresh.rows if row.variant != "fused cpp, fresh"]
    fill(fresh, {name: measure.Timing(time, time, 1) for name, time in
                 {"fused cpp": 1.0, "fused cpp, fresh": 2.0, "torch": 3.0, "floor": 1.0}.items()})  # fmt: skip
    floors = {"plain": 1.0}
    times = {"fused cpp": 1.0, "torch": 0.9, "jax": 4.0}
    found = judged(fresh, section(times, group="cache", direction="backward", floors=floors))
    worst = found["PyTorch over C++, time, worst"]
    assert (worst.value, worst.met) == (pytest.approx(0.9), False)
    assert found["PyTorch over C++, time, geometric mean"].value == pytest.approx(math.sqrt(1.5 * 0.9))
    assert found["JAX over C++, time, worst"].met
    batchnorm = found["PyTorch over C++, time, batchnorm, geometric mean"]
    assert (batchnorm.target, batchnorm.met) == (5.0, False)


def test_small_calls_backward_against_autograd():
    times = {"fused cpp": 2.0, "torch": 1.0, "torch autograd": 3.0}
    found = judged(section(times, group="small"), section(times, group="small", direction="backward"))
    assert found["small calls, batchnorm forward: PyTorch over C++, worst"].met is False
    assert found["small calls, batchnorm backward: PyTorch autograd over C++, worst"].met is True


def test_dtypes_by_elements_a_second():
    found = judged(
        section({"fused cpp": 3.0}, group="dtypes"),
        section({"fused cpp": 2.0}, group="dtypes", dtype="float16"),
        section({"fused cpp": 4.0}, floor=2.0, group="dtypes", dtype="float64"),
    )
    assert found["float16: elements a second over float32's, worst"].value == pytest.approx(1.5)
    assert found["float64: share of its plan's floor, worst"].value == pytest.approx(0.5)
    assert not any("bfloat16" in name for name in found)
    assert found["float16: elements a second over float32's, geometric mean"].target == 1.6
    assert found["float64: share of its plan's floor, geometric mean"].target == 0.85


def test_threads_against_one():
    many = section({}, group="threads")
    many.rows = [Row("fused cpp", "fused", "cpp", threads=count) for count in (1, 2, 4)]
    times = {"fused cpp, 1 threads": 4.0, "fused cpp, 2 threads": 2.5, "fused cpp, 4 threads": 1.0, "floor": 1.0}
    fill(many, {name: measure.Timing(time, time, 1) for name, time in times.items()})
    found = judged(many)
    assert found["fused cpp: time with 1 thread over time with 2, worst"].value == pytest.approx(1.6)
    assert found["fused cpp: time with 1 thread over time with 2, worst"].met is False
    assert found["fused cpp: time with 1 thread over time with 4, worst"].met is None
    assert found["fused cpp: time with 1 thread over time with 4, worst"].value == pytest.approx(4.0)


def test_networks_count_their_layers():
    net = {"group": "networks", "network": "Net"}
    sections = [
        section({"fused cpp": 1.0, "torch": 2.0}, count=3, **net),
        section({"fused cpp": 2.0, "torch": 6.0}, count=3, direction="backward", **net),
        section({"fused cpp": 5.0, "torch": 1.0}, shape=(9, 9), count=1, **net),
        section({"fused cpp": 5.0, "torch": 1.0}, shape=(9, 9), count=1, direction="backward", **net),
    ]
    assert targets.network_times(sections, "fused cpp") == {"Net": pytest.approx(3 * 3.0 + 10.0)}
    assert judged(*sections)["Net, all normalizations: PyTorch over C++, time"].value == pytest.approx(26 / 19)
    assert targets.network_times(sections[:1], "fused cpp") == {}  # half a network has no time


def test_what_was_not_measured_is_not_judged():
    assert targets.verdicts([]) == []
    assert judged(section({"torch": 1.0}, group="large")) == {}


# ---- tables and plot ------------------------------------------------------------------------------


def report_of(*sections):
    machine = {"cpu": "A processor", "cores": 2, "caches": {"L2": "1024K", "L3": "32768K"}}
    return Report("2026", machine, {"threads": 2}, "a copy", 1.0, list(sections))


def test_text_and_markdown_say_the_same():
    wrong = section({"fused cpp": 2.0, "torch": 4.0}, group="large", plan_reads=2, plan_writes=1, plan_floor=1.5)
    report = report_of(wrong)
    tables = target_tables.tables(report)
    assert [table.title for table in tables] == [
        "Forward beyond the cache, ms", "Times of peers over C++, both into new arrays: geometric mean (worst)",
        "Targets",
    ]  # fmt: skip
    first = dict(zip(tables[0].columns, tables[0].rows[0], strict=False))
    assert first["r+w"] == "2+1"
    assert list(tables[0].rows[0])[5:8] == ["2000", "0.50", "0.75"]
    assert list(tables[0].rows[0])[-1] == "2.00"
    for table in tables:
        marked = target_tables.markdown(table)
        for row in table.rows:
            assert f"| {' | '.join(row)} |" in marked
            assert all(cell in target_tables.text(report) for cell in row)
    wrong.rows[0].correct, wrong.rows[1].note = False, "failed: ValueError: no"
    assert "batchnorm ND 2x3 float32 forward, torch: failed: ValueError: no" in target_tables.text(report)
    assert "fused cpp: error None" in target_tables.text(report)
    assert "forward: not beyond this machine's cache of 32 MB" in target_tables.text(report)
    wrong.nbytes = 64 << 20
    assert "not beyond" not in target_tables.text(report)


def test_points_of_an_octave_share_a_mean():
    sizes, shares = plot._by_octave([(1 << 20, 0.5), (1 << 26, 0.4), ((1 << 26) + 8, 0.9), (1 << 28, 7.0)])
    assert sizes == pytest.approx([1 << 20, 1 << 26, 1 << 28])
    assert shares == pytest.approx([0.5, 0.6, plot._TOP])


def test_tables_and_plot_from_a_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    figures = tmp_path / "figures.json"
    for each in (section({"fused cpp": 2.0}, group="large"), section({"fused cpp": 2.0, "staged": 9.0})):
        sections = [each] if each.group else [each, section({"fused cpp": 1.0}, direction="backward")]
        figures.write_text(json.dumps(report_of(*sections).as_dict()))
        monkeypatch.setattr(sys, "argv", ["tables.py", str(figures), str(tmp_path / "plot")])
        runpy.run_path(str(TABLES), run_name="__main__")
        shown = capsys.readouterr().out
        assert "| BatchNorm 2x3 | " in shown
        assert ("**Targets**" in shown) == bool(each.group)
        for ending in (".png", ".svg"):
            tmp_path.joinpath(f"plot{ending}").unlink()  # was written
