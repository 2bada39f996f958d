"""What of the cuda backend runs in Numba's simulator: in processes of its own, since it is chosen at Numba's import."""

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
@pytest.mark.parametrize("file", ["test_device_arrays.py", "test_cuda_contract.py"])
def test_in_the_simulator(file):
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--require", "cuda"]
    done = subprocess.run(
        [*command, str(TESTS / file)], capture_output=True, text=True, timeout=600, check=False, cwd=TESTS.parent,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert " passed" in done.stdout
