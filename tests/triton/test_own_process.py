"""The tests of this folder in a process that has Triton in interpreter mode; see ``conftest.py`` for when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
LONGEST = {FOLDER / "test_triton_objective.py"}


# in two parts, each of which has the time of one test
@pytest.mark.slow
@pytest.mark.parametrize("files", [LONGEST, set(FOLDER.glob("test_triton_*.py")) - LONGEST], ids=["objective", "rest"])
def test_kernels_in_the_interpreter(files):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    # a worker of pytest-xdist must not take this run for another worker
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, sorted(files))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
