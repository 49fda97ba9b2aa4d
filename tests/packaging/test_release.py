"""What a release is made of: an sdist that lacks nothing, one version, a pure-Python install that works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import flowdppo_fast

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("flowdppo_fast", "csrc", "kernels")
FILES = (
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md", "constraints.txt",
    "pyproject.toml", "setup.py",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files a release is made from, without what builds have left among them."""
    folder = tmp_path_factory.mktemp("checkout")
    built = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def setup(checkout: Path, *arguments: object) -> None:
    off = {"FLOWDPPO_BUILD_CPU": "0", "FLOWDPPO_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", *map(str, arguments)]
    done = subprocess.run(command, cwd=checkout, env=os.environ | off, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_sdist_has_all_sources(checkout, tmp_path):
    setup(checkout, "egg_info", "--egg-base", tmp_path, "sdist", "--formats=gztar", "--dist-dir", tmp_path)
    with tarfile.open(tmp_path / f"flowdppo_fast-{flowdppo_fast.__version__}.tar.gz") as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(checkout).as_posix() for name in FOLDERS for path in (checkout / name).rglob("*.*")}
    assert {name for name in sources if (checkout / name).is_file()} | set(FILES) <= packed


def test_a_pure_python_install_works_and_says_what_it_lacks(checkout, tmp_path):
    installed = tmp_path / "site-packages"
    setup(checkout, "build_py", "--build-lib", installed)
    assert (installed / "flowdppo_fast" / "py.typed").exists()
    # nothing on the path: no compiler
    environment = {"PYTHONPATH": str(installed), "PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/packaging/smoke.py"), "--pure"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout.splitlines()[-1])
    assert entry["backend"] == "reference"
    assert entry["cpu refused because"].startswith("the C++ library is not built; install with a C++ compiler present")


def test_versions_agree():
    version = flowdppo_fast.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    # the newest release, or what is to become it
    assert sections[0].startswith("[Unreleased]")
    assert any(section.startswith(f"[{version}] - ") for section in sections[1:]) or version in sections[0]


def test_hooks_run_what_is_pinned():
    """Their versions are those of .venv, so of constraints.txt, and nothing is downloaded."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")
