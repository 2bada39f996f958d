"""BatchNorm and LayerNorm on a GPU: every case against the bandwidth of the same run, PyTorch and CuPy.

    python bench/cuda.py                     everything; some minutes, most of them torch.compile's
    python bench/cuda.py --without compile   faster
    python bench/cuda.py --only layernorm/65536x16384
    python bench/cuda.py --dry-run           without a GPU: the same steps on a few small arrays in host memory

Measured first is the roof: what copying an array to another, and adding two into a third, reach on arrays of 1 GB.
Then each case in turn: all variants are run once and checked against float64, then timed in turns, with the device's
events; before each timed call the L2 is overwritten. The median counts. `share` is the case's floor, the bytes that
have to be moved over the roof, divided by the time. A forward reads x and writes the output, a backward reads two
arrays and writes one; a BatchNorm whose slab (all that one step along the channels takes) does not fit half the L2
has to read its inputs twice.

Prints a table, and writes it and the figures to bench/results/<gpu>.md and .json. Needs PyTorch; CuPy where installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastnorm
from fastnorm.bench.tolerances import scaled_tolerance

RESULTS = Path(__file__).parent / "results"
RESNET = ((64, 112), (256, 56), (64, 56), (512, 28), (128, 28), (1024, 14), (256, 14), (2048, 7), (512, 7))
"""Channels and side of ResNet-50's BatchNorms."""
BATCHES = (64, 256)
TABLES = ((4096, 1024), (16384, 4096), (65536, 1024), (65536, 8192))
ROWS = (
    (4096, 768),
    (4096, 4096),
    (4096, 16384),
    (16384, 1024),
    (16384, 8192),
    (65536, 768),
    (65536, 4096),
    (65536, 16384),
)
DTYPES = ("float32", "bfloat16")
TARGETS = {("layernorm", "forward"): 0.92, ("layernorm", "backward"): 0.80,
           ("batchnorm", "forward"): 0.90, ("batchnorm", "backward"): 0.85}  # fmt: skip
"""Shares of the roof to reach on arrays well beyond the L2."""
SECTOR = 32
"""Bytes that device memory is read in at least."""
EPS = 1e-5
CHECKED = 8
"""Channels, or 32 times as many rows, that a result is checked in."""

Call = Callable[[], Any]


class Case(NamedTuple):
    op: str
    layout: str
    """'rows', 'columns' for (N, D), 'NCHW' or 'NHWC'."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op}/{'x'.join(map(str, self.shape))}/{self.layout}/{self.dtype}"

    @property
    def bytes(self) -> int:
        """Of one array."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)

    def passes(self, arrays: int, level2: int) -> int:
        """How often the inputs have to be read: twice where a slab of them does not fit half the L2."""
        if self.op == "layernorm":
            return 1
        channels = self.shape[1]
        wide = 1 if self.layout == "NCHW" else max(1, SECTOR * math.prod(self.shape) // self.bytes)
        return 1 if arrays * self.bytes // channels * wide <= level2 // 2 else 2

    def floor(self, direction: str, level2: int) -> int:
        """The bytes that have to be moved."""
        arrays = 1 if direction == "forward" else 2
        return (arrays * self.passes(arrays, level2) + 1) * self.bytes


def cases(dry: bool) -> Iterator[Case]:
    batches, tables, rows, resnet = BATCHES, TABLES, ROWS, RESNET
    if dry:
        batches, tables, rows, resnet = (2,), ((64, 32),), ((16, 48),), ((4, 6),)
    for dtype in DTYPES[: 1 if dry else None]:
        for batch in batches:
            for channels, side in resnet:
                for layout in ("NCHW", "NHWC"):
                    yield Case("batchnorm", layout, (batch, channels, side, side), dtype)
        for shape in tables:
            yield Case("batchnorm", "columns", shape, dtype)
        for shape in rows:
            yield Case("layernorm", "rows", shape, dtype)


# ---- inputs and variants --------------------------------------------------------------------------


class Inputs(NamedTuple):
    x: Any
    dout: Any
    gamma: Any
    beta: Any


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(20240607)
    dtype = getattr(torch, case.dtype)

    def normal(shape: tuple[int, ...], mean: float, to: Any) -> Any:
        return torch.empty(shape, device=device).normal_(mean, 1.0, generator=generator).to(to)

    x, dout = normal(case.shape, 10.0, dtype), normal(case.shape, 0.0, dtype)
    if case.layout == "NHWC":
        x, dout = (values.contiguous(memory_format=torch.channels_last) for values in (x, dout))
    parameters = case.shape[-1] if case.op == "layernorm" else case.shape[1]
    return Inputs(x, dout, *(normal((parameters,), mean, torch.float32) for mean in (1.0, 0.0)))


def fastnorm_calls(case: Case, given: Inputs) -> dict[str, Call]:
    forward, backward = (getattr(fastnorm, f"{case.op}_{direction}") for direction in ("forward", "backward"))
    x, dout, gamma, beta = given if given.x.is_cuda else Inputs(*(values.numpy() for values in given))
    out, dx = (torch.empty_like(given.x) for _ in range(2))
    into, gradient = (out, dx) if given.x.is_cuda else (out.numpy(), dx.numpy())
    _, cache = forward(x, gamma, beta, {}, out=into)
    return {
        "forward": lambda: forward(x, gamma, beta, {}, out=into)[:1],
        "backward": lambda: backward(dout, cache, out=gradient),
    }


def torch_calls(case: Case, given: Inputs, compiled: bool) -> dict[str, Call]:
    """PyTorch's own functions, the backward through autograd."""
    function: Any = torch.nn.functional.layer_norm if case.op == "layernorm" else torch.nn.functional.batch_norm
    kept = given.x.dtype if case.op == "layernorm" else torch.float32  # what each of them takes

    def normalized(x: Any, gamma: Any, beta: Any) -> Any:
        if case.op == "layernorm":
            return function(x, (case.shape[-1],), gamma, beta, EPS)
        return function(x, None, None, gamma, beta, True, 0.1, EPS)

    if compiled:
        torch.compiler.reset()  # from the ninth variant of a function on it would be eager without a word
        torch._functorch.config.donated_buffer = False  # the backward below is called more than once
    call = torch.compile(normalized, dynamic=False) if compiled else normalized
    leaves = [values.detach().to(dtype).requires_grad_() for values, dtype in
              ((given.x, given.x.dtype), (given.gamma, kept), (given.beta, kept))]  # fmt: skip
    constants = [values.detach() for values in leaves]
    y = call(*leaves)

    def forward() -> Any:
        with torch.no_grad():
            return (call(*constants),)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(y, leaves, given.dout, retain_graph=True)}


def cupy_calls(case: Case, given: Inputs) -> dict[str, Call]:
    """The formula in CuPy's array operations; there is no backward, and no bfloat16 in most versions."""
    import cupy

    if case.dtype != "float32":
        return {}
    x, gamma, beta = (cupy.from_dlpack(values) for values in (given.x, given.gamma, given.beta))
    axes = (1,) if case.op == "layernorm" else tuple(axis for axis in range(x.ndim) if axis != 1)
    shape = [1 if axis != (x.ndim - 1 if case.op == "layernorm" else 1) else -1 for axis in range(x.ndim)]
    scale, shift = gamma.reshape(shape), beta.reshape(shape)

    def forward() -> Any:
        mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
        return ((x - mean) * (scale / cupy.sqrt(var + EPS)) + shift,)

    return {"forward": forward}


def variants(case: Case, given: Inputs, left_out: list[str]) -> dict[str, dict[str, Call]]:
    makers = {
        "fastnorm": lambda: fastnorm_calls(case, given),
        "eager": lambda: torch_calls(case, given, compiled=False),
        "compile": lambda: torch_calls(case, given, compiled=True),
        "cupy": lambda: cupy_calls(case, given),
    }
    found = {}
    for name, make in makers.items():
        if name not in left_out:
            with reported(case, name):
                found[name] = make()
    return found


@contextlib.contextmanager
def reported(case: Case, name: str) -> Iterator[None]:
    """A peer that cannot take a case is reported, not fatal."""
    try:
        yield
    except Exception as error:
        if name == "fastnorm":
            raise
        print(f"{case.name}: {name}: {error}", file=sys.stderr)


# ---- right, and how fast --------------------------------------------------------------------------


def truth(case: Case, given: Inputs, direction: str) -> tuple[list[Any], tuple[slice, ...]]:
    """What a result has to be, in float64, on a part of the case, and which part that is."""
    length = case.shape[1] if case.op == "batchnorm" else case.shape[0]
    part = slice(0, min(length, CHECKED * (1 if case.op == "batchnorm" else 32)))
    index = (slice(None), part) if case.op == "batchnorm" else (part,)
    x = given.x[index].double().requires_grad_()
    own = part if case.op == "batchnorm" else slice(None)
    gamma, beta = (values[own].double().requires_grad_() for values in (given.gamma, given.beta))
    if case.op == "layernorm":
        y = torch.nn.functional.layer_norm(x, (case.shape[-1],), gamma, beta, EPS)
    else:
        y = torch.nn.functional.batch_norm(x, None, None, gamma, beta, True, 0.1, EPS)
    if direction == "forward":
        return [y.detach()], index
    # the rows of a part have part of dgamma only
    wanted = (x,) if case.op == "layernorm" else (x, gamma, beta)
    return list(torch.autograd.grad(y, wanted, given.dout[index].double())), index


def error(case: Case, results: Any, given: Inputs, direction: str) -> float:
    """The largest |result - truth| / (scale + |truth|), the scale 1, or sqrt(n) for sums of n values."""
    expected, index = truth(case, given, direction)
    worst = 0.0
    for position, want in enumerate(expected):
        got = torch.as_tensor(results[position], device=want.device)
        got = (got[index] if position == 0 else got[: want.shape[0]]).double()
        scale = 1.0 if position == 0 else math.sqrt(given.x.numel() / case.shape[1])
        deviation = float(((got - want).abs() / (scale + want.abs())).max())
        worst = deviation if math.isnan(deviation) else max(worst, deviation)
    return worst


def allowed(case: Case, *, exact: bool) -> float:
    if case.dtype == "bfloat16":
        import ml_dtypes

        stored = np.dtype(ml_dtypes.bfloat16)
    else:
        stored = np.dtype(case.dtype)
    parameters = case.shape[-1] if case.op == "layernorm" else case.shape[1]
    terms = max(parameters, math.prod(case.shape) // parameters)
    return scaled_tolerance(stored, np.dtype(np.float32), terms, exact=exact)


class Clock:
    """Milliseconds of calls: by the device's events behind an overwritten L2, or of the host in a dry run."""

    def __init__(self, device: str, level2: int) -> None:
        self._cuda = device == "cuda"
        self._other = torch.empty(4 * level2, dtype=torch.uint8, device=device) if self._cuda else None

    def once(self, call: Call) -> float:
        if self._other is None:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def in_turns(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        """The median of each, all variants in turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(3):
            for call in calls.values():
                call()
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self.once(call))
        return {name: statistics.median(spent) for name, spent in times.items()}


def roof(clock: Clock, device: str, dry: bool) -> dict[str, float]:
    """GB/s of a copy and of an addition, bytes read and written."""
    n = 1 << (14 if dry else 28)
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    spent = clock.in_turns({"copy": lambda: b.copy_(a), "add": lambda: torch.add(a, b, out=c)}, 20)
    return {name: arrays * 4 * n / spent[name] / 1e6 for name, arrays in (("copy", 2), ("add", 3))}


def launch(device: str, dry: bool) -> dict[str, float]:
    """Microseconds of the host for a whole public call on a small array, the device's work not waited for."""
    case = Case("layernorm", "rows", (64, 128), "float32")
    given = inputs(case, device)
    found = {}
    for name, calls in (("fastnorm", fastnorm_calls(case, given)), ("eager", torch_calls(case, given, False))):
        for direction, call in calls.items():
            rounds, count = (2, 5) if dry else (20, 100)
            best = math.inf
            for _ in range(1 + rounds):  # the first of them compiles
                begin = time.perf_counter()
                for _ in range(count):
                    call()
                best = min(best, (time.perf_counter() - begin) / count)
                if device == "cuda":
                    torch.cuda.synchronize()
            found[f"{name} {direction}"] = best * 1e6
    return found


# ---- the report -----------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnorm": fastnorm.show_config("dicts"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "cuda of torch": torch.version.cuda,
            "driver": found["fastnorm"]["cuda"].get("driver", "unknown"),
        }
    else:
        found |= {"gpu": "none: a dry run in host memory, its times mean nothing", "driver": "none", "l2": 1 << 20}
    return found


def measured(case: Case, clock: Clock, device: str, level2: int, roofs: dict[str, float], options: Any) -> list[Any]:
    given = inputs(case, device)
    found = variants(case, given, options.without)
    rows = []
    for direction in ("forward", "backward"):
        calls, errors = {}, {}
        for name, own in found.items():
            if direction in own:
                with reported(case, name):
                    errors[name] = error(case, own[direction](), given, direction)
                    calls[name] = own[direction]
        times = clock.in_turns(calls, options.rounds)
        floor = case.floor(direction, level2) / roofs["copy" if direction == "forward" else "add"] / 1e6
        rows.append(
            {
                "case": case.name, "op": case.op, "direction": direction, "dtype": case.dtype, "bytes": case.bytes,
                "passes": case.passes(1 if direction == "forward" else 2, level2),
                "floor_ms": floor, "ms": times, "share": floor / times["fastnorm"], "errors": errors,
                "right": bool(errors["fastnorm"] <= allowed(case, exact=True)),
            }
        )  # fmt: skip
    return rows


def table(rows: list[Any]) -> str:
    peers = sorted({name for row in rows for name in row["ms"]} - {"fastnorm"})
    lines = [
        "| case | direction | reads | floor, ms | fastnorm, ms | share | "
        + " | ".join(f"{p}, times" for p in peers)
        + " |",
        "| --- | --- | --- | --- | --- | --- |" + " --- |" * len(peers),
    ]
    for row in rows:
        own = row["ms"]["fastnorm"]
        against = [f"{row['ms'][peer] / own:.2f}" if peer in row["ms"] else "" for peer in peers]
        right = "" if row["right"] else " **wrong**"
        lines.append(
            f"| {row['case']}{right} | {row['direction']} | {row['passes']} | {row['floor_ms']:.3f} | {own:.3f} | "
            f"{row['share']:.2f} | {' | '.join(against)} |"
        )
    return "\n".join(lines)


def verdicts(rows: list[Any], level2: int) -> list[str]:
    """Each target and its value: geometric means over the cases of four times the L2 and more."""
    lines = []
    for (op, direction), target in TARGETS.items():
        for dtype in DTYPES:
            own = [r for r in rows if (r["op"], r["direction"], r["dtype"]) == (op, direction, dtype)]
            large = [r["share"] for r in own if r["bytes"] >= 4 * level2]
            if large:
                mean = math.exp(statistics.fmean(map(math.log, large)))
                lines.append(
                    f"{op} {direction} {dtype}: {mean:.2f} of the floor (target {target:.2f}), "
                    f"worst {min(large):.2f}, {len(large)} cases"
                )
    slower = [f"{r['case']} {r['direction']}" for r in rows
              if r["bytes"] >= 1 << 20 and r["ms"].get("eager", math.inf) < r["ms"]["fastnorm"]]  # fmt: skip
    lines.append(f"slower than PyTorch eager from 1 MB up: {', '.join(slower) or 'none'}")
    images = [r["ms"]["eager"] / r["ms"]["fastnorm"] for r in rows if "/NCHW/" in r["case"] and "eager" in r["ms"]]
    if images:
        lines.append(f"BatchNorm NCHW against PyTorch eager: at least {min(images):.2f} times (target 2)")
    wrong = [f"{r['case']} {r['direction']}" for r in rows if not r["right"]]
    lines.append(f"wrong results: {', '.join(wrong) or 'none'}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small arrays in host memory, no GPU needed")
    parser.add_argument("--without", action="append", default=[], choices=["eager", "compile", "cupy"])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    if options.dry_run:
        options.without, options.rounds = [*options.without, "compile", "cupy"], min(options.rounds, 3)
    elif not torch.cuda.is_available():
        print("PyTorch finds no CUDA device; --dry-run goes through the steps without one", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else "cuda"
    if not options.dry_run and not fastnorm.show_config("dicts")["cuda"]["available"]:
        print(f"the cuda backend: {fastnorm.show_config('dicts')['cuda']['reason']}", file=sys.stderr)
        return 2

    about = machine(device)
    level2 = about["l2"]
    clock = Clock(device, level2)
    roofs = roof(clock, device, options.dry_run)
    calls = launch(device, options.dry_run)
    rows: list[Any] = []
    for case in cases(options.dry_run):
        if options.only in case.name:
            print(case.name, file=sys.stderr)
            rows += measured(case, clock, device, level2, roofs, options)
    head = [
        f"# {about['gpu']}",
        f"Driver {about['driver']}, PyTorch {about['torch']}, {about['date']}, by `bench/cuda.py`.",
        "Roof: " + ", ".join(f"{name} {value:.0f} GB/s" for name, value in roofs.items()) + ".",
        "A call on 64 x 128, the host's part: "
        + ", ".join(f"{name} {value:.1f} us" for name, value in calls.items()) + ".",
    ]  # fmt: skip
    text = "\n\n".join([*head, "\n".join(f"- {line}" for line in verdicts(rows, level2)), table(rows)])
    print(text)
    name = "dry-run" if options.dry_run else re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.md").write_text(text + "\n")
    report = {"machine": about, "roof": roofs, "launch_us": calls, "cases": rows}
    (options.results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
