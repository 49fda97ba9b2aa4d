"""What of the GPU backends works with each supported Triton and torch, as far as a machine without a GPU can tell.

    python tests/packaging/gpu_matrix.py [--output FILE]

For each Triton, unpacked from its wheel into ``build/gpu_matrix`` and put in front of the path: the binder and the
specialisation of every kernel, and a loss with its gradient on the emulated driver against the float64 reference. For
each torch: the CUDA binding is compiled (syntax alone) against the headers of its wheel, and the private names of
torch that the package uses are looked for. It downloads gigabytes, of which it keeps the unpacked Tritons and what it
needs of torch. What failed is in the result with its reason; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TORCHES = ("2.10.0", "2.11.0", "2.13.0")
CACHE = ROOT / "build" / "gpu_matrix"
RESULTS = Path("bench/results/gpu_matrix")
GPUS = (80, 90, 100)
# headers; torch's modules, and the library in which the names of those in C++ are
_OF_TORCH = ("torch/include/", "torch/lib/libtorch_python.so", "torch/utils/", "torch/autograd/", "torch/distributed/")


def call(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        # of a compiler the first error, of Python the last line
        raise RuntimeError(next((line for line in lines if "error:" in line), lines[-1] if lines else "no message"))
    return done.stdout


def unpacked(name: str, version: str, *prefixes: str) -> Path:
    """The files of a wheel whose names begin with one of ``prefixes``."""
    folder = CACHE / f"{name}-{version}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "--only-binary=:all:")
        # constraints are for what is installed
        environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
        call(*pip, "--dest", temporary, f"{name}=={version}", env=environment)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(temporary, "files"), [x for x in archive.namelist() if x.startswith(prefixes)])
        # zip files keep no permissions
        for program in Path(temporary, "files").glob("*/backends/*/bin/*"):
            program.chmod(0o755)
        Path(temporary, "files").rename(folder)
    return folder


def private_names() -> list[str]:
    """What the package uses of torch that begins with an underscore, ``torch._C._autograd._profiler_enabled``."""
    found = set()
    for path in (*ROOT.glob("flowdppo_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        tree = ast.parse(path.read_text())
        inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                found |= {f"{node.module}.{name.name}" for name in node.names}
            elif isinstance(node, ast.Import):
                found |= {name.name for name in node.names if name.name.split(".")[0] == "torch"}
            elif isinstance(node, ast.Attribute) and node not in inner and ast.unparse(node).startswith("torch."):
                found.add(ast.unparse(node))
    return sorted(name for name in found if any(part.startswith("_") and part[1:2] != "_" for part in name.split(".")))


def missing_names(wheel: Path) -> list[str]:
    """Those of :func:`private_names` that an unpacked torch does not have: in its modules, or in C++."""
    compiled = (wheel / "torch/lib/libtorch_python.so").read_bytes()
    missing = []
    for name in private_names():
        parts = name.split(".")
        module = next((file for end in range(len(parts) - 1, 1, -1)
                       for file in (wheel.joinpath(*parts[:end]).with_suffix(".py"),
                                    wheel.joinpath(*parts[:end], "__init__.py")) if file.exists()), None)  # fmt: skip
        if module is not None:
            there = parts[-1] in module.read_text()
        else:
            # the names of methods end in a zero
            there = f"\0{parts[-1]}\0".encode() in compiled
        if not there:
            missing.append(name)
    return missing


def a_loss() -> dict:
    """Loss and gradient of the triton backend on the emulated driver, stored and seeded noise, on each GPU."""
    import torch
    import triton
    from ptx.triton_driver import install

    import flowdppo_fast as fast

    emulator = install()
    step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6, eta=0.6)
    torch.manual_seed(0)
    old = torch.randn(4, 16, 130)
    new, advantages = old + 0.05 * torch.randn_like(old), torch.randn(4)
    worst = 0.0
    for emulator.settings.arch in GPUS:
        for noise in (torch.randn_like(old), fast.PhiloxNoise(3, 5)):
            results = []
            for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
                given = noise.to(dtype) if isinstance(noise, torch.Tensor) else noise
                policy = new.to(dtype, copy=True).requires_grad_()
                out = fast.fused_policy_velocity_loss(
                    policy, old.to(dtype), given, step, advantages.to(dtype), objective=fast.DPPO(1e-3), backend=backend
                )
                out.loss.backward()
                results.append((out.loss.detach(), policy.grad))
            for got, want in zip(*results):
                worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    launches = len(emulator.log)
    if worst > 1e-4 or launches == 0:
        raise RuntimeError(f"{launches} launches, largest relative difference {worst:.1e}")
    return {"triton": triton.__version__, "launches": launches, "largest relative difference": f"{worst:.0e}"}


def try_triton(version: str) -> dict:
    entry: dict = {"triton": version}
    try:
        folder = unpacked("triton", version, "triton/")
        path = os.pathsep.join(map(str, (folder, ROOT / "tests", ROOT)))
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(CACHE / f"compiled-{version}"), "OMP_NUM_THREADS": "1"}
        said = json.loads(call(sys.executable, ROOT / "tests/codegen/launch_path.py", env=env, cwd=ROOT))
        if said["triton"] != version:
            raise RuntimeError(f"Triton {said['triton']} was imported")
        functions = said["functions"]
        refused = {name: found["binder"] for name, found in functions.items() if found["binder"]}
        others = {
            spec: lines for found in functions.values() for spec, lines in found["specialisations"].items() if lines
        }
        specialisations = sum(len(found["specialisations"]) for found in functions.values())
        entry |= {"functions": len(functions), "specialisations": specialisations}
        if refused or others:
            raise RuntimeError(f"no binder: {refused}; other code than was inspected: {others}")
        entry["loss"] = json.loads(call(sys.executable, __file__, "--loss", env=env, cwd=ROOT).splitlines()[-1])
    except (RuntimeError, OSError, ValueError) as error:
        entry["failed"] = without_folders(str(error))
    return entry


def try_torch(version: str) -> dict:
    """The CUDA binding against the headers of a torch, as ``setup.py`` compiles it, and the private names."""
    import torch

    entry: dict = {"torch": version}
    try:
        if torch.__version__.split("+")[0] == version:
            wheel = Path(torch.__file__).parents[1]
        else:
            wheel = unpacked("torch", version, *_OF_TORCH)
        if missing := missing_names(wheel):
            raise RuntimeError(f"it has no {', '.join(missing)}")
        entry["private names"] = len(private_names())
        include = wheel / "torch" / "include"
        defined = ["TORCH_TARGET_VERSION=0x020a000000000000", "TORCH_STABLE_ONLY", 'FLOWDPPO_CUDA_ARCHS="80"']
        call(
            "nvcc", "-std=c++17", "-Xcompiler=-fsyntax-only", *[f"-D{name}" for name in defined],
            f"-isystem={include}", f"-isystem={include}/torch/csrc/api/include",
            "-c", "csrc/cuda/bindings.cpp", "-o", os.devnull, cwd=ROOT,
        )  # fmt: skip
        entry["binding"] = "compiles"
    except (RuntimeError, OSError) as error:
        entry["failed"] = without_folders(str(error))
    return entry


def without_folders(text: str) -> str:
    """The end of an error message, with no path of this machine."""
    for place, name in ((CACHE, "CACHE"), (ROOT, "CHECKOUT"), (Path(sys.prefix), "PREFIX"), (Path.home(), "HOME")):
        text = text.replace(str(place), name)
    return text[-1500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS}/<date>-<commit>.json")
    parser.add_argument("--loss", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loss:
        print(json.dumps(a_loss()))
        return 0
    if shutil.which("nvcc") is None:
        parser.error("there is no CUDA compiler (nvcc) on the path")
    sha = call("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    output = options.output or ROOT / RESULTS / f"{date}-{sha[:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    compiler = call("nvcc", "--version").splitlines()[-2]
    result: dict = {"command": "make gpu-matrix", "sha": sha, "date": date, "nvcc": compiler, "tried": []}
    for attempt, version in [(try_triton, x) for x in TRITONS] + [(try_torch, x) for x in TORCHES]:
        result["tried"].append(attempt(version))
        print(json.dumps(result["tried"][-1]), flush=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failed" in entry for entry in result["tried"]))


if __name__ == "__main__":
    sys.exit(main())
