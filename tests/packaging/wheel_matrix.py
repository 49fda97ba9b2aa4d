"""Builds sdist and wheel from a clean checkout and tries the wheel in fresh environments without a compiler.

    python tests/packaging/wheel_matrix.py [--only PYTHON=TORCH ...] [--output FILE]

Needs the interpreters it is asked for (``python3.10`` and so on), and takes gigabytes and minutes: every torch is
installed with all it depends on. Without ``auditwheel`` the wheel keeps the tag of the machine it was built on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ("3.10=2.10.0", "3.11=2.11.0", "3.12=2.13.0", "3.13=2.15.0")
# the tools of a smoke test, and no compiler
TOOLS = ("env", "sh", "uname", "ls", "cat", "ldconfig", "rm", "mkdir")


def call(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path, dict]:
    """sdist, wheel, and what they are, from the committed tree alone."""
    checkout = folder / "checkout"
    checkout.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", checkout], input=archive, check=True)
    dist = folder / "dist"
    dist.mkdir()
    environment = {**os.environ, "FLOWDPPO_BUILD_CPU": "1"}
    backend = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    name = call(sys.executable, "-c", backend, dist, cwd=checkout, env=environment).splitlines()[-1]
    # the wheel is built from the sdist: what that lacks shows
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        dist,
        dist / name,
        env=environment,
    )
    (wheel,) = dist.glob("*.whl")
    info = {"sdist": name, "wheel as built": wheel.name, "sdist bytes": (dist / name).stat().st_size}
    if shutil.which("auditwheel") is not None:
        repaired = folder / "repaired"
        excluded = [f"--exclude={library}" for library in ("libtorch*.so", "libc10*.so", "libcudart.so*")]
        call("auditwheel", "repair", *excluded, "-w", repaired, wheel)
        (wheel,) = repaired.glob("*.whl")
    info |= {"wheel": wheel.name, "wheel bytes": wheel.stat().st_size}
    return dist / name, wheel, info


def try_wheel(folder: Path, wheel: Path, python: str, torch: str, triton: bool) -> dict:
    """The smoke test in a fresh environment."""
    environment = folder / f"python{python}-torch{torch}"
    interpreter = environment / "bin" / "python"
    if not environment.exists():
        call(f"python{python}", "-m", "venv", environment)
        call(interpreter, "-m", "pip", "install", "-q", f"torch=={torch}", "numpy")
        call(interpreter, "-m", "pip", "install", "-q", "--no-deps", wheel)
    if not triton:
        subprocess.run([interpreter, "-m", "pip", "uninstall", "-q", "-y", "triton"], check=True)
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in TOOLS:
        found = shutil.which(tool)
        if found and not (tools / tool).exists():
            (tools / tool).symlink_to(found)
    output = call(
        interpreter, ROOT / "tests/packaging/smoke.py", cwd=folder,
        env={"PATH": str(tools), "HOME": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(output.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=MATRIX, metavar="PYTHON=TORCH")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, wheel, info = build(folder)
        tried = []
        for pair in options.only:
            python, torch = pair.split("=")
            for triton in (True, False):
                tried.append(try_wheel(folder, wheel, python, torch, triton))
                print(json.dumps(tried[-1]), flush=True)
            shutil.rmtree(folder / f"python{python}-torch{torch}")
    result = {
        "command": "python tests/packaging/wheel_matrix.py",
        "sha": call("git", "rev-parse", "HEAD", cwd=ROOT).strip(),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "seconds": round(time.perf_counter() - started),
        **info,
        "tried": tried,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
