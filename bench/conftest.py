"""Options of the benchmark suites, and what their tests share: inputs, references, the memory floor."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest

from fastnorm.bench import check, roof
from fastnorm.bench.cases import DTYPES, Case, Direction, Inputs


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastnorm")
    group.addoption("--full", action="store_true", help="every shape, not the default few")
    group.addoption("--dtype", action="append", choices=DTYPES, help="dtypes to measure, repeatable (default float32)")
    group.addoption("--no-peers", action="store_true", help="leave out PyTorch and JAX")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A table that fits a terminal, unless other columns were asked for."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install fastnorm[bench]")
    if not config.option.benchmark_columns:
        config.option.benchmark_columns = ["min", "median", "rounds"]


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> Inputs:
    return case.inputs()


@functools.lru_cache(maxsize=1)
def _reference(case: Case, direction: Direction) -> tuple[object, ...]:
    return check.reference(case, _inputs(case), direction)


def _floor(case: Case, direction: Direction) -> float:
    call = roof.floor(_inputs(case), case.empty(), direction)
    seconds = []
    deadline = time.perf_counter() + 0.3
    while len(seconds) < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.fixture(scope="session")
def inputs() -> Callable[[Case], Inputs]:
    """The inputs of a case, made once for all of its variants."""
    return _inputs


@pytest.fixture(scope="session")
def reference() -> Callable[[Case, Direction], tuple[object, ...]]:
    """The float64 answer, computed once for all of a case's variants."""
    return _reference


@pytest.fixture(scope="session")
def floor() -> Callable[[Case, Direction], float]:
    """The memory floor of a case in seconds, measured once a session for each size."""
    by_size: dict[tuple[int, Direction], float] = {}

    def of(case: Case, direction: Direction) -> float:
        key = case.nbytes, direction
        if key not in by_size:
            by_size[key] = _floor(case, direction)
        return by_size[key]

    return of
