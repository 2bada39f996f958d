"""Backends to test, the slow marker, and the process-wide settings put back after every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import hypothesis
import numpy as np
import pytest

import fastnorm

try:
    from fastnorm import _core
except ImportError:
    _core = None

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" and find_spec("numba_cuda") is not None:
    import simulator

    simulator.install()

hypothesis.settings.register_profile("repeatable", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("repeatable")

ISAS = () if _core is None else tuple(_core.isas())
REASONS = {info.name: info.reason for info in fastnorm.backends()}
# The C++ backend counts once for each instruction set that this machine has.
BACKENDS = [
    target
    for name, reason in REASONS.items()
    if not reason
    for target in ([f"cpp/{isa}" for isa in ISAS] if name == "cpp" else [name])
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that need tens of gigabytes or minutes")
    parser.addoption(
        "--require", default="", metavar="BACKENDS", help="fail where one of these backends (a,b) is not available"
    )
    parser.addoption(
        "--best-isa", action="store_true", help="test the C++ backend on the best instruction set of this machine alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: needs tens of gigabytes or minutes; runs with --slow")
    for name in filter(None, config.getoption("--require").split(",")):
        if REASONS[name]:
            raise pytest.UsageError(f"--require: backend {name!r} is not available: {REASONS[name]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Backends innermost, so that they share one computation of the truth.
    order: dict[tuple[str, ...], int] = {}

    def position(item: pytest.Item) -> int:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = (repr(value) for name, value in sorted(params.items()) if name != "backend")
        return order.setdefault((str(item.path), getattr(item, "originalname", item.name), *values), len(order))

    items.sort(key=position)
    if config.getoption("--best-isa"):
        others = {f"cpp/{isa}" for isa in ISAS[:-1]}
        backends = [item.callspec.params.get("backend") if hasattr(item, "callspec") else None for item in items]
        dropped = [item for item, backend in zip(items, backends, strict=True) if backend in others]
        items[:] = [item for item, backend in zip(items, backends, strict=True) if backend not in others]
        config.hook.pytest_deselected(items=dropped)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every available backend in turn, the C++ one at each of its instruction sets."""
    name, _, isa = request.param.partition("/")
    if not isa:
        yield name
        return
    before = _core.isa()
    _core.set_isa(isa)
    yield name
    _core.set_isa(before)


@pytest.fixture(autouse=True)
def _settings_put_back() -> Iterator[None]:
    threads = fastnorm.get_num_threads()
    yield
    fastnorm.set_num_threads(threads)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)
