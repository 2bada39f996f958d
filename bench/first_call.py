"""Seconds of the first call of the Numba backend in a process, with an empty cache of machine code and with a warm one.

    python bench/first_call.py

Without the imports of fastnorm and Numba, which the last column gives. Each figure is the least of three processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

PROCESS = """
import sys
import time

import numpy as np

import fastnorm

start = time.perf_counter()
import numba
imported = time.perf_counter()
op, *shape = sys.argv[1:]
x = np.random.default_rng(0).standard_normal([int(size) for size in shape], np.float32)
parameters = np.ones(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
begin = time.perf_counter()
y, cache = getattr(fastnorm, f"{op}_forward")(x, *parameters, {}, backend="numba")
middle = time.perf_counter()
getattr(fastnorm, f"{op}_backward")(y, cache, backend="numba")
print(middle - begin, time.perf_counter() - middle, imported - start)
"""
CASES = (
    ("BatchNorm", "batchnorm", (64, 32)),
    ("BatchNorm", "batchnorm", (4096, 1024)),
    ("BatchNorm NCHW", "batchnorm", (16, 64, 28, 28)),
    ("LayerNorm", "layernorm", (64, 32)),
    ("LayerNorm", "layernorm", (4096, 1024)),
)
RUNS = 3


def seconds(op: str, shape: tuple[int, ...], cache: str) -> list[float]:
    """Of the forward, the backward after it, and the import of Numba."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", PROCESS, op, *map(str, shape)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [float(value) for value in printed.split()]


def main() -> None:
    print("| case | empty cache, forward | then backward | warm cache, forward | then backward | import of Numba |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, op, shape in CASES:
        empty, warm = [], []
        for _ in range(RUNS):
            with tempfile.TemporaryDirectory() as cache:
                empty.append(seconds(op, shape, cache))
                warm.append(seconds(op, shape, cache))
        cold_forward, cold_backward, _ = map(min, zip(*empty, strict=True))
        forward, backward, importing = map(min, zip(*warm, strict=True))
        size = "x".join(map(str, shape))
        print(
            f"| {name} {size} | {cold_forward:.2f} | {cold_backward:.2f} | {forward:.3f} | {backward:.3f} "
            f"| {importing:.2f} |"
        )


if __name__ == "__main__":
    main()
