"""Every op, case, direction and variant, checked and timed.

    pytest bench                                    a few cases in float32
    pytest bench --full --dtype float32 --dtype float16
    pytest bench -k "layernorm and backward" --benchmark-json=figures.json

Variants run one after the other here, each for a fixed time; `python -m fastnorm bench` takes turns.

The table has a group for each case and direction. Fused variants write to a reused `out=`; those marked
'fresh' into a new array each call. `extra_info` in the JSON has the bytes moved, GB/s, the share of the
memory floor measured in the same session, and the error against the float64 reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastnorm
from fastnorm.bench import check, dropout, roof
from fastnorm.bench.cases import DIRECTIONS, Case, suite_cases
from fastnorm.bench.peers import EVERYDAY, PEERS
from fastnorm.bench.variants import Variant, variants

# JAX and PyTorch warn of matters of their own.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


def _parameters(config: pytest.Config) -> Iterator[Any]:
    chosen = variants(with_peers=() if config.getoption("--no-peers") else EVERYDAY)
    dtypes = list(dict.fromkeys(config.getoption("--dtype") or ["float32"]))
    for case in suite_cases(full=config.getoption("--full"), dtypes=dtypes):
        for direction in DIRECTIONS:
            for variant in chosen:
                if variant.computes(case, direction):
                    for label, reuse in variant.labels.items():
                        yield pytest.param(case, direction, variant, label, reuse, id=f"{case}, {direction}: {label}")


def _dropout_parameters(config: pytest.Config) -> Iterator[Any]:
    chosen = variants(with_peers=() if config.getoption("--no-peers") else EVERYDAY)
    shapes = ((4, 8), (256, 1024), (16384, 1024))
    for dtype in dict.fromkeys(config.getoption("--dtype") or ["float32"]):
        for shape in (*shapes, (65536, 1024)) if config.getoption("--full") else shapes:
            for direction in DIRECTIONS:
                for variant in chosen:
                    if dropout.computes(variant, dtype):
                        for label, reuse in variant.labels.items():
                            name = f"dropout {'x'.join(map(str, shape))} {dtype}, {direction}"
                            yield pytest.param(shape, dtype, direction, variant, label, reuse, id=f"{name}: {label}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(("case", "direction", "variant", "label", "reuse"), list(_parameters(metafunc.config)))
    else:
        names = ("shape", "dtype", "direction", "variant", "label", "reuse")
        metafunc.parametrize(names, list(_dropout_parameters(metafunc.config)))


@pytest.mark.benchmark(min_rounds=3, max_time=0.25, disable_gc=True)
def test_op(
    benchmark: Any,
    case: Case,
    direction: Any,
    variant: Variant,
    label: str,
    reuse: bool,
    inputs: Callable[..., Any],
    reference: Callable[..., Any],
    floor: Callable[..., float],
) -> None:
    call = variant.bind(case, inputs(case), direction, case.empty() if reuse else None)
    error = check.error(case, call.arrays(call.run()), reference(case, direction))
    correct = error <= check.tolerance(case, exact=variant.exact)
    assert correct or variant.name in PEERS  # PyTorch sums LayerNorm's dgamma in float16 and bfloat16

    benchmark.group = f"{case}, {direction}"
    benchmark.name = label
    moved = case.bytes_moved(direction)
    benchmark.extra_info |= {
        "op": case.op.name,
        "layout": case.layout.label,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "direction": direction,
        "variant": variant.name,
        "backend": variant.backend,
        "out": "reused" if reuse else "fresh",
        "threads": fastnorm.get_num_threads(),
        "bytes_moved": moved,
        "error": error,
        "correct": correct,
        "floor": roof.description(),
        "floor_seconds": floor(case, direction),
    }
    benchmark(call.run)
    if benchmark.stats is not None:  # None with --benchmark-disable
        best = benchmark.stats.stats.min
        benchmark.extra_info["gigabytes_per_second"] = moved / best / 1e9
        benchmark.extra_info["share_of_floor"] = floor(case, direction) / best


@pytest.mark.benchmark(min_rounds=3, max_time=0.25, disable_gc=True)
def test_dropout(
    benchmark: Any, shape: tuple[int, int], dtype: str, direction: Any, variant: Variant, label: str, reuse: bool
) -> None:
    x = dropout.values(shape, dtype)
    call = dropout.bind(variant, x, direction, np.zeros_like(x) if reuse else None)
    assert dropout.error(variant, x, call()) == 0

    benchmark.group = f"dropout {shape} {dtype}, {direction}"
    benchmark.name = label
    benchmark.extra_info |= {
        "op": "dropout",
        "shape": list(shape),
        "dtype": dtype,
        "direction": direction,
        "variant": variant.name,
        "backend": variant.backend,
        "out": "reused" if reuse else "fresh",
        "threads": fastnorm.get_num_threads(),
        "bytes_moved": 2 * x.nbytes,
    }
    benchmark(call)
