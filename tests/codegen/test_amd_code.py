"""The Triton kernels compile for AMD GPUs and fit their registers. None of them has run on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from amd import ARCHITECTURES, FORMS
from aot import EXIT_TOOLS_MISSING

SCRIPT = Path(__file__).with_name("amd.py")
# of 512 on gfx942 and 256 on gfx1100
REGISTERS = 144


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_for_amd_and_nothing_spills(arch):
    # in a process of its own, because this one may have Triton in interpreter mode
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", "--arch", arch], capture_output=True, text=True, env=env
    )
    if done.returncode == EXIT_TOOLS_MISSING:
        pytest.skip(f"cannot compile Triton kernels for AMD here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert {report["name"] for report in reports} == set(FORMS)
    assert {r["name"]: r for r in reports if r["spills"] or r["local"]} == {}
    assert {r["name"]: r["registers"] for r in reports if r["registers"] > REGISTERS} == {}
    kernels = {report["kernel"].split(".")[1] for report in reports}
    assert kernels == {
        "partials_kernel", "gradient_kernel", "step_kernel", "epilogue_kernel", "statistics_kernel", "log_prob_kernel",
    }  # fmt: skip
