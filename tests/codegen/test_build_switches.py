"""What setup.py says about backends that it cannot build, or was told not to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setup(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """setup.py in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FLOWDPPO_", "CUDA_"))}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env=env | environment, capture_output=True, text=True)


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


# nvcc that knows one GPU and compiles nothing: it fails, or leaves an object of the C++ compiler's
NVCC = """#!/bin/sh
case "$*" in
  *--dryrun*) echo "#$ TOP={toolkit}" ;;
  *--list-gpu-code*) echo sm_80 ;;
  *--version*) printf 'Cuda compilation tools, release 0.0, V0.0.0\\nBuild none\\n' ;;
  *) {compile} ;;
esac
"""
FAILS = "echo planted error >&2; exit 1"
WORKS = 'for last; do :; done; echo "" | c++ -x c++ -c - -o "$last"'


def tree_with_nvcc(tmp_path: Path, compile: str) -> tuple[Path, Path]:
    """The sources of a build whose C++ is next to nothing, and a toolkit whose nvcc does as it is told."""
    toolkit, tree = tmp_path / "toolkit", tmp_path / "tree"
    for folder in ("bin", "include", "lib64"):
        (toolkit / folder).mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime.h").touch()
    subprocess.run(["ar", "rcs", str(toolkit / "lib64" / "libcudart_static.a")], check=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(toolkit=toolkit, compile=compile))
    nvcc.chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    for folder in ("csrc", "kernels", "flowdppo_fast"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for source in (tree / "csrc").glob("*/*.cpp"):
        source.write_text("")
    return tree, toolkit


@pytest.mark.parametrize("where", ["in a kernel", "in the binding"])
def test_a_failed_cuda_build_takes_nothing_down_with_it(tmp_path, where):
    tree, toolkit = tree_with_nvcc(tmp_path, FAILS if where == "in a kernel" else WORKS)
    if where == "in the binding":
        (tree / "csrc" / "cuda" / "bindings.cpp").write_text("#error planted error\n")
    package = tree / "flowdppo_fast"
    # of an earlier build
    (package / "_C_cuda.so").touch()
    build = ("-q", "build_ext", "--inplace", "--build-temp", str(tmp_path / "temp"))
    done = setup(*build, folder=tree, CUDA_HOME=str(toolkit), FLOWDPPO_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "planted error" in done.stdout + done.stderr
    assert "installed without its CUDA backend: its build failed: " in done.stderr
    assert (package / "_C_cpu.so").exists()
    assert not (package / "_C_cuda.so").exists()
    info = json.loads((package / "_build_info.json").read_text())
    assert info["missing"].keys() == {"_C_cuda"}
    assert info["isas"]
    assert "nvcc" not in info
    # what doctor and an error say; the C++ library has nothing in it
    (package / "_C_cpu.so").unlink()
    asked = "import torch; torch.version.cuda = '0'; from flowdppo_fast import backend; print(backend._CUDA_PROBLEM)"
    said = subprocess.run([sys.executable, "-c", asked], cwd=tree, capture_output=True, text=True)
    assert f"the last build went without it: {info['missing']['_C_cuda']}" in said.stdout, said.stderr

    # asked for by name it is an error
    done = setup(*build, folder=tree, CUDA_HOME=str(toolkit), FLOWDPPO_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "planted error" in done.stdout + done.stderr
