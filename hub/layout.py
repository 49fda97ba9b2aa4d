"""Lays out a repository of the Hugging Face kernel hub from this checkout, and uploads nothing.

    python hub/layout.py FOLDER [--cpu]

``FOLDER`` gets what kernel-builder takes (``build.toml``, ``flake.nix``, ``CARD.md``, ``torch-ext/flowdppo_fast``) and
what a process loads: ``build/torch-{cpu,cuda,rocm,xpu}``, the same files with their metadata. Only the kernels and what
they need come along: neither trainer nor command line nor drop-ins. With ``--cpu``, a variant for this machine
holds the C++ library, compiled here for a namespace of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flowdppo_fast"
# noarch variants
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
# the oldest torch with the stable ABI of the C++ library, as in setup.py
TORCH = "210"


def sources() -> dict[str, Path]:
    """What a copy consists of, by its place in it: the package's own modules and Triton's kernels."""
    found = {path.name: path for path in PACKAGE.glob("*.py")}
    found |= {f"kernels/{path.name}": path for path in (ROOT / "kernels" / "triton").glob("*.py")}
    return {**dict(sorted(found.items())), "LICENSE": ROOT / "LICENSE"}


def digest(also: bytes = b"") -> str:
    """Of what is laid out: a copy of other contents is another module, with operators of its own."""
    spelled = [f"{place}\0{path.read_text()}" for place, path in sources().items()]
    return hashlib.sha256("\0".join(spelled).encode() + also).hexdigest()[:10]


def identity(backend: str, also: bytes = b"") -> str:
    """The name under which a variant is imported."""
    return f"_flowdppo_fast_{backend}_{digest(also)}"


def namespace(module: str) -> str:
    """Of a copy's operators: what ``ops.py`` makes of its module's name."""
    return f"flowdppo_{module}"


def lay_out(folder: Path) -> None:
    """Everything that needs no compiler, into an empty ``folder``."""
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(ROOT / "hub" / name, folder / name)
    _copy(folder / "torch-ext" / "flowdppo_fast")
    for backend in BACKENDS:
        _variant(folder / "build" / f"torch-{backend}", backend, identity(backend))


def add_cpu_library(folder: Path) -> Path:
    """The variant with the C++ library, for this machine's processor; returns where it is."""
    headers = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))
    module = identity("cpu", b"\0".join(path.read_bytes() for path in headers))
    made = folder / "build" / f"torch-stable-abi{TORCH}-cpu-{platform.machine()}-{platform.system().lower()}"
    _variant(made, "cpu", module)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "bench", "tests", "*.so"))
        settings = {"FLOWDPPO_BUILD_CPU": "1", "FLOWDPPO_BUILD_CUDA": "0", "FLOWDPPO_NAMESPACE": namespace(module)}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(Path(scratch, "lib"))]
        done = subprocess.run(command, cwd=tree, env={**os.environ, **settings}, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"the C++ library could not be compiled:\n{done.stderr[-4000:]}")
        for name in ("_C_cpu.so", "_build_info.json"):
            shutil.copy(Path(scratch, "lib", "flowdppo_fast", name), made / name)
    return made


def _copy(folder: Path) -> None:
    for place, path in sources().items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / place)


def _variant(folder: Path, backend: str, module: str) -> None:
    _copy(folder)
    described = {
        "name": "flowdppo-fast",
        "id": module,
        # the hub counts versions; 0 is what may still change
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(described, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made, and must not exist or be empty")
    parser.add_argument("--cpu", action="store_true", help="compile the C++ library for a variant of its own")
    arguments = parser.parse_args()
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"folder: got {arguments.folder}, which is not empty; expected a new one")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lay_out(arguments.folder)
    if arguments.cpu:
        add_cpu_library(arguments.folder)
    for path in sorted((arguments.folder / "build").iterdir()):
        print(path.name, json.loads((path / "metadata.json").read_text())["id"])


if __name__ == "__main__":
    main()
