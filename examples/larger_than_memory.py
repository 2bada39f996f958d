"""Normalize a file that is larger than the memory allowed: statistics in one pass, then the result into a file.

    python examples/larger_than_memory.py                              256 MB with 64 MB of memory
    python examples/larger_than_memory.py --megabytes 2000 --memory 100

The file is made in pieces, and mapped, not read: what the kernels have gone through the system may drop. The limit
(RLIMIT_DATA, Linux) holds for all memory that the program asks for itself; loading the file whole breaks it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fastnorm

CHANNELS = 1024
MEGABYTE = 1 << 20


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=256, help="size of the file")
    parser.add_argument("--memory", type=int, default=64, help="megabytes that the program may ask for from its start")
    return parser.parse_args()


def allow(megabytes: int) -> None:
    """Let the process have this much memory beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    limit = pages * resource.getpagesize() + megabytes * MEGABYTE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def progress_line(what: str) -> Callable[[int, int | None], None]:
    """A line on the terminal that grows with the work; none where the output is not a terminal."""

    def show(done: int, total: int | None) -> None:
        if sys.stderr.isatty() and total:
            end = "\n" if done == total else ""
            print(f"\r{what} {done / total:4.0%}", end=end, file=sys.stderr, flush=True)

    return show


def made(path: Path, rows: int) -> np.memmap[tuple[int, int], np.dtype[np.float32]]:
    """A file of rows with another mean and spread in every channel, written in pieces."""
    rng = np.random.default_rng(0)
    mean, spread = rng.normal(0, 100, CHANNELS), rng.uniform(0.5, 2, CHANNELS)
    data = np.memmap(path, np.float32, "w+", shape=(rows, CHANNELS))
    for start in range(0, rows, 1024):
        piece = data[start : start + 1024]
        piece[:] = rng.standard_normal(piece.shape, np.float32) * spread + mean
    return data


def main() -> None:
    arguments = parsed()
    rows = max(2, arguments.megabytes * MEGABYTE // (4 * CHANNELS))
    fastnorm.batchnorm_forward(np.ones((2, 2)), None, None)  # threads and their stacks are there before the limit is
    allow(arguments.memory)
    with tempfile.TemporaryDirectory() as folder:
        x = made(Path(folder, "x"), rows)
        out = np.memmap(Path(folder, "out"), np.float32, "w+", shape=x.shape)
        try:
            np.array(x)
        except MemoryError:
            print(f"{x.nbytes // MEGABYTE} MB: the file does not fit in the {arguments.memory} MB allowed")

        start = time.perf_counter()
        found = fastnorm.stream_moments(x, axis=0, progress=progress_line("statistics"))
        seconds = time.perf_counter() - start
        print(f"statistics of {found.count} rows: {seconds:.2f} s, {x.nbytes / seconds / 1e9:.1f} GB/s")

        start = time.perf_counter()
        param = {"mode": "test", "running_mean": found.mean, "running_var": found.var}
        fastnorm.batchnorm_forward(x, None, None, param, out=out)
        print(f"normalized into a file: {time.perf_counter() - start:.2f} s")

        check = fastnorm.stream_moments(out, axis=0, progress=progress_line("checking"))
        mean, spread = np.abs(check.mean).max(), np.sqrt(check.var).mean()
        print(f"the result has mean {mean:.3f}, spread {spread:.3f}")


if __name__ == "__main__":
    main()
