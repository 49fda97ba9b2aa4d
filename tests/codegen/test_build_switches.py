"""What setup.py says about backends that it cannot build, or was told not to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FLOWDPPO_", "CUDA_"))}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True)


def without_nvcc(tmp_path: Path) -> dict[str, str]:
    # a toolkit without a compiler; the path keeps what else there is
    return {"CUDA_HOME": str(tmp_path)}


def test_a_build_that_was_asked_for_and_cannot_be_done_is_an_error(tmp_path):
    done = setup("--version", FLOWDPPO_BUILD_CPU="0", FLOWDPPO_BUILD_CUDA="1", **without_nvcc(tmp_path))
    assert done.returncode != 0
    assert "FLOWDPPO_BUILD_CUDA=1, but there is no CUDA compiler (nvcc; CUDA_HOME names a toolkit)" in done.stderr


def test_a_toolkit_that_lacks_its_headers_is_named(tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 0\n")
    nvcc.chmod(0o755)
    done = setup("--version", FLOWDPPO_BUILD_CPU="0", FLOWDPPO_BUILD_CUDA="1", **without_nvcc(tmp_path))
    assert "nvcc is there, but its toolkit has no cuda_runtime.h" in done.stderr


@pytest.mark.parametrize("variable", ["FLOWDPPO_BUILD_CPU", "FLOWDPPO_BUILD_CUDA"])
def test_an_unknown_wish_is_refused(variable):
    done = setup("--version", **{"FLOWDPPO_BUILD_CPU": "0", "FLOWDPPO_BUILD_CUDA": "0"} | {variable: "yes"})
    assert f"{variable}: got 'yes', expected 0, 1 or auto" in done.stderr


def test_an_install_without_them_says_so(tmp_path):
    done = setup(
        "-q", "build_py", "--build-lib", str(tmp_path / "lib"),
        FLOWDPPO_BUILD_CPU="0", FLOWDPPO_BUILD_CUDA="auto", **without_nvcc(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "without its C++ backend: switched off by FLOWDPPO_BUILD_CPU=0" in done.stderr
    assert "without its CUDA backend: there is no CUDA compiler" in done.stderr
    assert (tmp_path / "lib" / "flowdppo_fast" / "evidence.py").exists()
