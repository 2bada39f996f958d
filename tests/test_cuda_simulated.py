"""The public functions on the cuda backend in Numba's simulator: a process of its own, since it is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import PACKAGE

TESTS = Path(__file__).parent


@pytest.mark.skipif(find_spec("numba_cuda") is None, reason="numba-cuda is not installed: pip install '.[cuda]'")
@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="this is the simulator already")
def test_device_arrays_in_the_simulator():
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--require", "cuda"]
    done = subprocess.run(
        [*command, str(TESTS / "test_device_arrays.py")], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(PACKAGE.parent), "PYTEST_ADDOPTS": ""},
        cwd=TESTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
