"""bench/cuda.py without a GPU: its steps on small arrays, its arithmetic of bytes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
SCRIPT = Path(__file__).parent.parent / "bench" / "cuda.py"


@pytest.fixture(scope="module")
def cuda():
    specification = importlib.util.spec_from_file_location("bench_cuda", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_dry_run_writes_the_report(tmp_path):
    command = [sys.executable, SCRIPT, "--dry-run", "--results", tmp_path, "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "dry-run.json").read_text())
    assert report["roof"].keys() == {"copy", "add"}
    assert {row["op"] for row in report["cases"]} == {"batchnorm", "layernorm"}
    for row in report["cases"]:
        assert row["right"]
        assert row["ms"].keys() == row["errors"].keys() == {"fastnorm", "eager"}
    text = (tmp_path / "dry-run.md").read_text()
    assert text.strip() == done.stdout.strip()
    assert "wrong results: none" in text


def test_without_a_gpu_it_says_so(cuda, monkeypatch, capsys):
    if cuda.torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["cuda.py"])
    assert cuda.main() == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_wrong_result_is_seen(cuda):
    case = cuda.Case("layernorm", "rows", (16, 48), "float32")
    given = cuda.inputs(case, "cpu")
    (out,) = cuda.fastnorm_calls(case, given)["forward"]()
    assert cuda.error(case, (out,), given, "forward") <= cuda.allowed(case, exact=True)
    out[3, 5] *= 1.001
    assert cuda.error(case, (out,), given, "forward") > cuda.allowed(case, exact=True)


@pytest.mark.parametrize(
    ("op", "layout", "shape", "forward", "backward"),
    [
        ("layernorm", "rows", (65536, 16384), 1, 1),
        ("batchnorm", "NCHW", (256, 64, 112, 112), 1, 1),  # a channel has 12.8 MB
        ("batchnorm", "NHWC", (256, 64, 112, 112), 2, 2),  # a sector of every pixel is 103 MB
        ("batchnorm", "NHWC", (256, 256, 56, 56), 1, 2),  # 25.7 MB of x, as much of dout
        ("batchnorm", "columns", (65536, 8192), 1, 1),
    ],
)
def test_how_often_inputs_are_read(cuda, op, layout, shape, forward, backward):
    level2 = 60 << 20
    case = cuda.Case(op, layout, shape, "float32")
    assert (case.passes(1, level2), case.passes(2, level2)) == (forward, backward)
    assert case.floor("forward", level2) == (forward + 1) * case.bytes
    assert case.floor("backward", level2) == (2 * backward + 1) * case.bytes
