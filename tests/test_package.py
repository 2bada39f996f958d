"""What an import pulls in, which way imports point, the choice of a backend, the environment."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
from conftest import ISAS, REASONS
from processes import PACKAGE, run

import fastnorm
from fastnorm import BackendUnavailableError, _dispatch
from fastnorm.backends import KernelTable

X = np.arange(24, dtype=np.float32).reshape(4, 6)
AVAILABLE = [name for name, reason in REASONS.items() if not reason]


# ---- imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import fastnorm",
        "import fastnorm, numpy; fastnorm.batchnorm_forward(numpy.ones((4, 6)), None, None, backend='numpy')",
        "import fastnorm, numpy; fastnorm.layernorm_forward(numpy.ones((4, 6)), None, None, backend='numpy')",
    ],
)
def test_import_is_light(code):
    heavy = "numba", "llvmlite", "torch", "jax", "ml_dtypes", "matplotlib", "scipy", "fastnorm.bench"
    loaded = run(f"{code}\nimport sys\nprint(*sys.modules)").split()
    assert not set(heavy) & set(loaded)


LAYERS = ("interop", "ops", "_dispatch", "backends", "_layout")
"""Each may import those after it. reference.kernels is a backend; backends do not import one another."""


def _layer(module: str) -> str:
    part = module.partition(".")[2].partition(".")[0]
    return "backends" if part == "reference" else part


def _imports():
    """(importing module, imported module) for every import of fastnorm's own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.split(".")[0] == "fastnorm":
                    yield module, name


def test_imports_point_one_way():
    checked = 0
    for module, name in _imports():
        here, there = _layer(module), _layer(name)
        if here in LAYERS and there in LAYERS and here != there:
            checked += 1
            assert LAYERS.index(here) < LAYERS.index(there), f"{module} imports {name}"
    assert checked > 5


def test_backends_import_neither_the_rest_nor_one_another():
    # The contract, the extension, the scalar formulas that both Numba targets compile, what holds off the collector.
    allowed = r"fastnorm\.(backends\.(Array|flat|KernelTable|numba_formulas(\.\w+)?)|_core|_collector)"
    for module, name in _imports():
        if _layer(module) == "backends" and module != "fastnorm.backends":
            own = ".".join(module.split(".")[:3])  # a backend may be a package of modules
            assert name.startswith(own) or re.fullmatch(allowed, name), f"{module} imports {name}"


def test_everything_public_is_there_and_documented():
    for name in fastnorm.__all__:
        assert getattr(fastnorm, name).__doc__, name
    assert sorted(fastnorm.__all__) == fastnorm.__all__


# ---- the choice of a backend ----------------------------------------------------------------------


def test_rows_of_backends():
    rows = fastnorm.backends()
    assert [row.name for row in rows] == ["cpp", "numba", "cuda", "numpy"]
    for row in rows:
        assert row.available == (row.reason == "")
    assert rows[-1].available


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_backend_is_a_table_of_kernels(name):
    assert isinstance(_dispatch.kernels(name), KernelTable)


@pytest.mark.parametrize("name", REASONS)
def test_backend_is_here(name):
    if REASONS[name]:
        pytest.skip(f"{name}: {REASONS[name]}")
    fastnorm.batchnorm_forward(X, None, None, backend=name)


class _Spy:
    """Notes which table a call went to."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in AVAILABLE:
            table = _dispatch.kernels(name)

            def noting(*arguments, _name=name, _kernel=table.row_forward):
                self.calls.append(_name)
                _kernel(*arguments)

            monkeypatch.setattr(table, "row_forward", noting)

    def last(self):
        fastnorm.layernorm_forward(X, None, None)
        return self.calls[-1]


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.delenv("FASTNORM_BACKEND", raising=False)
    fastnorm.use_backend(None)
    yield _Spy(monkeypatch)
    fastnorm.use_backend(None)


def test_the_first_available_backend_serves(spy):
    assert spy.last() == AVAILABLE[0]


@pytest.mark.parametrize("name", AVAILABLE)
def test_use_backend_sets_and_returns(name, spy):
    fastnorm.use_backend(name)
    assert spy.last() == name
    fastnorm.use_backend(None)
    assert spy.last() == AVAILABLE[0]


def test_use_backend_in_a_with_block(spy):
    with fastnorm.use_backend("numpy"):
        assert spy.last() == "numpy"
        with fastnorm.use_backend(AVAILABLE[0]):
            assert spy.last() == AVAILABLE[0]
        assert spy.last() == "numpy"
    assert spy.last() == AVAILABLE[0]
    with pytest.raises(RuntimeError, match="inside"), fastnorm.use_backend("numpy"):
        raise RuntimeError("inside")
    assert spy.last() == AVAILABLE[0]


def test_a_failed_choice_changes_nothing(spy):
    fastnorm.use_backend("numpy")
    with pytest.raises(ValueError, match="fortran"):
        fastnorm.use_backend("fortran")
    assert spy.last() == "numpy"


def test_the_argument_comes_before_the_choice(spy):
    fastnorm.use_backend("numpy")
    fastnorm.layernorm_forward(X, None, None, backend=AVAILABLE[0])
    assert spy.calls == [AVAILABLE[0]]


def test_the_environment_comes_before_the_default_and_after_the_choice(spy, monkeypatch):
    monkeypatch.setenv("FASTNORM_BACKEND", "numpy")
    fastnorm.use_backend(None)
    assert spy.last() == "numpy"
    fastnorm.use_backend(AVAILABLE[0])
    assert spy.last() == AVAILABLE[0]


def test_an_unavailable_backend_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setitem(_dispatch._MODULES, "abacus", "fastnorm.backends.abacus")
    monkeypatch.setitem(_dispatch._MODULES, "sundial", "fastnorm_sundial")
    monkeypatch.setattr(_dispatch, "_refused", dict(_dispatch._refused))
    for call in (
        lambda: fastnorm.batchnorm_forward(X, None, None, backend="abacus"),
        lambda: fastnorm.use_backend("abacus"),
    ):
        with pytest.raises(BackendUnavailableError, match=r"abacus.*not part of this version"):
            call()
    assert ("abacus", False, "not part of this version") in fastnorm.backends()
    assert issubclass(BackendUnavailableError, ValueError)


@pytest.mark.parametrize("name", AVAILABLE)
def test_environment_names_the_backend(name):
    code = "import fastnorm; print(fastnorm.show_config('dicts')['default backend'])"
    assert run(code, FASTNORM_BACKEND=name).strip() == name


def test_environment_with_an_unknown_backend():
    code = "import fastnorm, numpy; fastnorm.batchnorm_forward(numpy.ones((2, 2)), None, None)"
    assert "ValueError: FASTNORM_BACKEND: unknown backend 'fortran'" in run(
        code, check=False, FASTNORM_BACKEND="fortran"
    )


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"FASTNORM_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"OMP_NUM_THREADS": "many"}, None),
    ],
)
def test_environment_sets_the_threads(environment, threads):
    code = "import fastnorm, os; print(fastnorm.get_num_threads(), len(os.sched_getaffinity(0)))"
    found, cpus = map(int, run(code, **environment).split())
    assert found == (cpus if threads is None else threads)


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5"])
def test_environment_with_a_wrong_number_of_threads(text):
    assert f"FASTNORM_NUM_THREADS: expected a whole number from 1, got '{text}'" in run(
        "import fastnorm", check=False, FASTNORM_NUM_THREADS=text
    )


@pytest.mark.skipif(not ISAS, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ISAS)
def test_environment_sets_the_instruction_set(isa):
    code = "import fastnorm; print(fastnorm.show_config('dicts')['extension']['instruction set'])"
    assert run(code, FASTNORM_ISA=isa).strip() == isa


@pytest.mark.skipif(not ISAS, reason="the C++ extension is not built")
def test_environment_with_an_unknown_instruction_set():
    printed = run("import fastnorm; print(fastnorm.backends()[0])", FASTNORM_ISA="z80")
    assert "available=False" in printed
    assert "FASTNORM_ISA" in printed
    assert "z80" in printed


def test_show_config(capsys):
    fastnorm.show_config()
    printed = capsys.readouterr().out
    config = fastnorm.show_config("dicts")
    for name, reason in REASONS.items():
        assert config["backends"][name] == (reason or "available")
        assert name in printed
    assert config["versions"]["fastnorm"] == fastnorm.__version__
    with pytest.raises(ValueError, match="mode"):
        fastnorm.show_config("json")


def test_threads_are_one_number_for_all():
    fastnorm.set_num_threads(3)
    assert fastnorm.get_num_threads() == 3
    fastnorm.set_num_threads(np.int64(2))
    assert fastnorm.get_num_threads() == 2
