"""A repository for the kernel hub is laid out from this checkout, and copies run beside the installed package.

``make release-check`` does the same through the package ``kernels``, with the C++ library in the copy.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
# a kernel of the hub may ask for little else
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "flowdppo-fast"
    done = subprocess.run([sys.executable, ROOT / "hub/layout.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_repository_has_what_builder_and_loader_read(repository):
    general = tomllib.loads((repository / "build.toml").read_text())["general"]
    variants = {
        path.name: json.loads((path / "metadata.json").read_text()) for path in (repository / "build").iterdir()
    }
    assert set(variants) == {f"torch-{backend}" for backend in general["backends"]}
    for name, described in variants.items():
        assert f"torch-{described['backend']['type']}" == name
        assert (described["name"], described["version"]) == (general["name"], general["version"])
        assert described["id"].isidentifier()
    files = {path.relative_to(repository / "torch-ext/flowdppo_fast") for path in repository.glob("torch-ext/**/*.py")}
    assert {Path("__init__.py"), Path("kernels/__init__.py")} <= files
    assert not {path.parts[0] for path in files} & {"trainer", "cli", "runs", "integrations"}


def test_a_copy_imports_nothing_but_torch_triton_and_python(repository):
    for path in repository.glob("torch-ext/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            foreign = {name.partition(".")[0] for name in names} - ALLOWED
            assert not foreign, f"{path.name}: {foreign}"


def test_two_versions_run_beside_the_installed_package(repository, tmp_path):
    other = tmp_path / "torch-cpu"
    shutil.copytree(repository / "build/torch-cpu", other)
    described = json.loads((other / "metadata.json").read_text())
    (other / "metadata.json").write_text(json.dumps({**described, "id": described["id"] + "_next"}))
    command = [sys.executable, ROOT / "tests/packaging/hub_copies.py", repository / "build/torch-cpu", other]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["module"] for entry in json.loads(done.stdout)] == [described["id"], described["id"] + "_next"]


def test_a_library_of_another_namespace_is_not_loaded(repository, tmp_path):
    other = tmp_path / "torch-cpu"
    shutil.copytree(repository / "build/torch-cpu", other)
    # as if a wheel's files had been copied along
    for name in ("_C_cpu.so", "_build_info.json"):
        shutil.copy(ROOT / "flowdppo_fast" / name, other / name)
    ask = (
        "import flowdppo_fast, hub_copies, pathlib, sys;"
        f"module = hub_copies.from_path(pathlib.Path({str(other)!r}));"
        "print(sys.modules[module.__name__ + '.backend'].problem('cpu', 'cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT / "tests/packaging")
    assert done.returncode == 0, done.stderr
    assert "_C_cpu.so has its operators in 'flowdppo' and this copy of the package has them in" in done.stdout
