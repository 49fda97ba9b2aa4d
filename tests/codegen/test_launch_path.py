"""Every Triton kernel can be launched: its binder exists, and real arguments lead to the code that ``aot.py`` looks at.

Neither the interpreter nor ahead-of-time compilation builds a binder. Launches themselves are in ``tests/ptx``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("launch_path.py")


@pytest.fixture(scope="module")
def functions() -> dict[str, dict]:
    """What ``launch_path.py`` says of each ``triton.jit`` function, in a process that does not interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["functions"]


def test_every_function_has_a_binder(functions):
    assert len(functions) > 10
    assert {name: found["binder"] for name, found in functions.items() if found["binder"]} == {}


def test_launches_take_the_code_that_was_inspected(functions):
    kernels = {name for name, found in functions.items() if found["specialisations"]}
    assert {name for name in functions if name.endswith("_kernel")} == kernels
    wrong = {spec: lines for name in kernels for spec, lines in functions[name]["specialisations"].items() if lines}
    assert wrong == {}
