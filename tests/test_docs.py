"""The documentation's code runs, its figures are the script's, its links lead somewhere; the examples train."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import fastnorm

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OPTIONAL = {"torch", "ml_dtypes"}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_run(page):
    blocks = list(re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    namespace: dict[str, object] = {"__name__": page.stem}
    with fastnorm.use_backend(None):
        for block in blocks:
            line = page.read_text().count("\n", 0, block.start(1))
            try:
                exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
            except ModuleNotFoundError as missing:
                if missing.name not in OPTIONAL:
                    raise
                pytest.skip(f"needs {missing.name}")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def _signature(function):
    """As a page writes it: without types."""
    found = inspect.signature(function)
    parameters = [each.replace(annotation=each.empty) for each in found.parameters.values() if each.name != "self"]
    return str(found.replace(parameters=parameters, return_annotation=found.empty))


def test_operations_page_has_every_public_function_with_its_signature():
    page = (ROOT / "docs/operations.md").read_text()
    for name, signature in re.findall(r"`([\w.]+)(\(.*?\))`", page):
        assert signature == _signature(attrgetter(name)(fastnorm)), name
    assert set(fastnorm.__all__) <= set(re.findall(r"`(\w+)", page))


def test_experiments_page_has_the_figures_of_the_last_run():
    summary = (ROOT / "docs/pictures/summary.md").read_text()
    page = (ROOT / "docs/experiments.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", summary, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert table in page


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quickstart():
    assert "the same in NCHW and NHWC" in run("quickstart.py")


def test_variance_table():
    # Rows "| mean / spread | E[x^2] | two-pass | fastnorm |": at a mean of 1e6 only fastnorm is right.
    rows = [row.strip("| ").split(" | ") for row in run("variance.py").splitlines() if row.startswith("| 1,000,000")]
    squares, two_pass, exact = map(float, rows[0][1:])
    assert squares > 1
    assert 1e-5 < two_pass < 1
    assert exact < 1e-6


def test_experiments_train(tmp_path):
    for module in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(module)
    run("run_all.py", "--quick", "--output", str(tmp_path))
    names = ("with-and-without", "weight-scales", "batch-sizes", "batch-or-layer")
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{name}.{kind}" for name in names for kind in ("png", "svg")),
        "summary.md",
    }
    accuracy = {}
    for row in (tmp_path / "summary.md").read_text().splitlines():
        cells = row.strip("| ").split(" | ")
        if len(cells) == 5 and cells[0] in ("BatchNorm", "LayerNorm", "no normalization"):
            accuracy[cells[0]] = float(cells[3].rstrip("%"))
    assert accuracy["BatchNorm"] > 90
    assert accuracy["LayerNorm"] > 90
    assert accuracy["no normalization"] < accuracy["BatchNorm"]
