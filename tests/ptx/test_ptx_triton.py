"""A part of the kernels' and the API's tests on compiled kernels, through Triton's own launcher; ``make ptx`` has all.

In a process of its own: here Triton may have been imported for interpretation (``tests/triton``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = Path(__file__).with_name("short_form.txt")
KERNELS = {
    "partials_kernel", "statistics_kernel", "gradient_kernel", "step_kernel", "log_prob_kernel", "epilogue_kernel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_kernels_on_the_emulator(tmp_path):
    tally = tmp_path / "tally.json"
    # a worker of pytest-xdist must not take this run for another worker, and kernels must not be interpreted
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    env |= {"PYTHONPATH": str(ROOT / "tests"), "FLOWDPPO_PTX_TALLY": str(tally)}
    plugins = ("-p", "ptx.tally", "-p", "ptx.plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", *plugins, f"@{SHORT}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(tally.read_text())
    assert found["outcomes"]["passed"] >= len(SHORT.read_text().splitlines())
    assert found["outcomes"].keys() == {"passed"}
    assert found["launches"].keys() >= KERNELS
    assert {int(arch) for arch in found["architectures"]} == {80, 90, 100}
