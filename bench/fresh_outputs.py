"""What a call without `out=` costs beside one with it, with and without the pool of outputs.

python bench/fresh_outputs.py [MB ...]

float32 of 1,024 columns. All variants take turns, each warmed by a call; minima. steady: each result is dropped
before the next call. first: nothing has been dropped yet. off: `set_output_pool(0)`, NumPy's own allocation.
four: four results live and are dropped together, as those of a network's layers; per call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastnorm

SIZES = (1, 4, 16, 25, 64, 256, 1024)
"""In MB of 2^20 bytes."""
FOUR = 256
"""The largest size at which four outputs fit a pool of 3 GB with room to spare."""
COLUMNS = 1024
BUDGET = 5.0
"""Seconds for each line, about."""

Call = Callable[..., Any]


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    spent = time.perf_counter() - start
    del result  # giving memory back counts where a loop pays it: in `repeated`
    return spent * 1e3


def repeated(call: Callable[[], Any], count: int) -> float:
    """Milliseconds of a call in a loop that drops each result before the next call, after one that is not counted."""
    call()

    def loop() -> None:
        for _ in range(count):
            call()

    return milliseconds(loop) / count


def together(call: Callable[[], Any]) -> float:
    """Milliseconds of a call in a loop that keeps four results and drops them together, after a loop not counted."""

    def loop() -> None:
        kept = [call() for _ in range(4)]
        kept.clear()

    loop()
    return milliseconds(loop) / 4


def line(call: Call, out: np.ndarray[Any, Any]) -> dict[str, float]:
    limit = fastnorm.output_pool().limit
    count = 3 if out.nbytes < 100 << 20 else 2
    best: dict[str, float] = {}

    def note(name: str, spent: float) -> None:
        best[name] = min(spent, best.get(name, spent))

    start, rounds = time.perf_counter(), 0
    while rounds < 4 or (time.perf_counter() - start < BUDGET and rounds < 300):
        rounds += 1
        note("out=", repeated(lambda: call(out=out), count))
        fastnorm.clear_output_pool()
        note("first", milliseconds(call))
        note("steady", repeated(call, count))
        if out.nbytes <= FOUR << 20:
            note("four", together(call))
        fastnorm.set_output_pool(0)
        note("steady, off", repeated(call, count))
        if out.nbytes <= FOUR << 20:
            note("four, off", together(call))
        fastnorm.set_output_pool(limit)
    return best


def calls(x: np.ndarray[Any, Any]) -> dict[str, Call]:
    gamma, beta = np.ones(COLUMNS, np.float32), np.zeros(COLUMNS, np.float32)
    batch = fastnorm.batchnorm_forward(x, gamma, beta, {})[1]
    layer = fastnorm.layernorm_forward(x, gamma, beta, {})[1]
    return {
        "BatchNorm forward": lambda out=None: fastnorm.batchnorm_forward(x, gamma, beta, {}, out=out),
        "BatchNorm backward": lambda out=None: fastnorm.batchnorm_backward(x[::1], batch, out=out),
        "LayerNorm forward": lambda out=None: fastnorm.layernorm_forward(x, gamma, beta, {}, out=out),
        "LayerNorm backward": lambda out=None: fastnorm.layernorm_backward(x[::1], layer, out=out),
    }


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or SIZES
    print(f"ms; pool: {fastnorm.output_pool().limit >> 20} MB\n")
    print(
        "| MB | call | out= | steady | ratio | first | ratio | steady, off | ratio | four | ratio | four, off | ratio |"
    )
    print("|" + "---|" * 13)
    for size in sizes:
        x = np.random.default_rng(0).standard_normal((size << 18) // COLUMNS * COLUMNS, dtype=np.float32)
        x = x.reshape(-1, COLUMNS)
        out = np.zeros_like(x)
        for name, call in calls(x).items():
            found = line(call, out)
            cells = [f"{found['out=']:.3g}"]
            for column in ("steady", "first", "steady, off", "four", "four, off"):
                spent = found.get(column)
                cells += ["-", "-"] if spent is None else [f"{spent:.3g}", f"{spent / found['out=']:.2f}"]
            print(f"| {size} | {name} | {' | '.join(cells)} |", flush=True)
        del x, out


if __name__ == "__main__":
    main()
