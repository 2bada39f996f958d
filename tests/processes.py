"""Python in a fresh process: for imports, environment variables, forks and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastnorm

PACKAGE = Path(fastnorm.__file__).parent


def run(code: str, *arguments: str, check: bool = True, timeout: float = 120, **environment: str) -> str:
    """What the code prints. Fails where it does, unless `check` is off: then what it printed, errors included.

    FASTNORM_ variables of this process are not passed on; `environment` is.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTNORM_")}
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout if check else f"{done.returncode}\n{done.stdout}{done.stderr}"
