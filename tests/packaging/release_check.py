"""Everything that is done before an upload, and the upload is not.

    python tests/packaging/release_check.py [--only STEP ...] [--output FILE]

=============  ========================================================================================
step           what must hold
=============  ========================================================================================
wheels         sdist and wheels build (see ``wheels.py``), are no larger than an index takes, carry the licence and
               metadata that an index accepts
install        each wheel for this machine, installed alone into an empty environment, passes ``smoke.py``
aarch64        its wheel gives the reference's numbers, with ``FLOWDPPO_AARCH64_PYTHON`` (a command that starts a Python
               with torch on such a machine, or under an emulator)
hub            a repository for the kernel hub is loaded by the package ``kernels``, beside the installed package
trackers       W&B, trackio and SwanLab take numbers, images and videos without a network
licences       of all that is needed, in one file, with an SBOM (CycloneDX)
advisories     no pinned version is in the newest advisory data that can be installed, whose date is given
=============  ========================================================================================

The result file has every step with what it found, or with the reason why it failed or was left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_dependencies import closure, licences, pins
from wheel_matrix import RESULTS, ROOT, try_wheels, without_folders
from wheels import build, call

# what a public index takes without being asked
LARGEST = 100_000_000
HERE = Path(__file__).parent
RELEASE = ROOT / "build" / "release"
Step = Callable[[Path, dict[str, Path]], dict[str, Any]]
# what is installed here comes first: no other torch, no other numpy
START = """
import os, runpy, sys
sys.path += [os.environ["FLOWDPPO_TOOLS"]]
sys.argv = sys.argv[1:]
(runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
"""


class LeftOut(Exception):
    """Why a step was not done."""


def tools(folder: Path, *packages: str) -> Path:
    """A folder with ``packages`` and what they need."""
    place = folder / "-".join(packages)
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    call(sys.executable, "-m", "pip", "install", "-q", "--target", place, *packages, env=environment)
    return place


def run(place: Path, program: str | Path, *arguments: object) -> str:
    """What a module, or a script, says where the folder ``place`` is on the path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLOWDPPO_TOOLS": str(place)}
    return call(sys.executable, "-c", START, program, *arguments, env=environment, cwd=ROOT)


def wheels(folder: Path, made: dict[str, Path]) -> dict[str, Any]:
    found, info = build(folder)
    made |= found
    for kind, wheel in info["wheels"].items():
        if wheel["bytes"] > LARGEST:
            raise RuntimeError(f"{wheel['name']}: {wheel['bytes']} bytes, expected at most {LARGEST}")
        if not any(name.endswith("LICENSE") for name in wheel["licences"]):
            raise RuntimeError(f"{wheel['name']}: no licence in it")
        if kind != "pure" and not any(f"manylinux_2_{n}_" in wheel["name"] for n in range(17, 32)):
            info["left out"].append(f"an older system than {wheel['name']} names: FLOWDPPO_SYSROOT is not set")
    run(tools(folder, "twine"), "twine", "check", "--strict", *found.values())
    RELEASE.mkdir(parents=True, exist_ok=True)
    for path in found.values():
        shutil.copy(path, RELEASE)
    return info


def install(folder: Path, made: dict[str, Path]) -> dict[str, Any]:
    if not made:
        raise LeftOut("there are no wheels: the step wheels was not done")
    tried = try_wheels(folder, made["x86_64"], made["pure"], "{}.{}".format(*sys.version_info), pins()["torch"])
    failed = [entry["failed"] for entry in tried if "failed" in entry]
    if failed:
        raise RuntimeError(failed[0])
    return {"tried": tried}


def aarch64(folder: Path, made: dict[str, Path]) -> dict[str, Any]:
    command = os.environ.get("FLOWDPPO_AARCH64_PYTHON")
    if command is None or "aarch64" not in made:
        raise LeftOut("FLOWDPPO_AARCH64_PYTHON is not set" if command is None else "there is no aarch64 wheel")
    place = folder / "aarch64-installed"
    with zipfile.ZipFile(made["aarch64"]) as archive:
        archive.extractall(place)
    start = f"import sys; sys.path.insert(0, {str(place)!r}); exec(open({str(HERE / 'other_machine.py')!r}).read())"
    said = call(*shlex.split(command), "-c", start, cwd=folder)
    return json.loads(said.splitlines()[-1])


def hub(folder: Path, made: dict[str, Path]) -> dict[str, Any]:
    repository = folder / "hub"
    said = call(sys.executable, ROOT / "hub/layout.py", repository, "--cpu")
    loaded = run(tools(folder, "kernels"), HERE / "hub_copies.py", "--kernels", repository)
    return {"laid out": said.splitlines(), "loaded": json.loads(loaded.splitlines()[-1])}


def trackers(folder: Path, made: dict[str, Path]) -> dict[str, Any]:
    names = ("wandb", "trackio", "swanlab")
    place = tools(folder, *names)
    said = run(place, "pytest", "-q", "-p", "no:cacheprovider", "tests/runs/test_trackers.py")
    versions = sorted(path.name for path in place.glob("*.dist-info"))
    counted = next(line for line in reversed(said.splitlines()) if " passed" in line)
    if not counted.startswith(f"{len(names)} passed"):
        raise RuntimeError(said[-2000:])
    return {"tests": counted.partition(" in ")[0], "with": [x for x in versions if x.partition("-")[0] in names]}


def licences_and_sbom(folder: Path, made: dict[str, Path]) -> dict[str, Any]:
    found = closure()
    RELEASE.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} {version}: {', '.join(sorted(licences(name)))}\n" for name, version in sorted(found.items())]
    (RELEASE / "licences.txt").write_text("".join(lines))
    sbom = RELEASE / "sbom.cdx.json"
    run(tools(folder, "cyclonedx-bom"), "cyclonedx_py", "requirements", "constraints.txt", "-o", sbom)
    components = json.loads(sbom.read_text())["components"]
    absent = pins().keys() - {component["name"].lower().replace("_", "-") for component in components}
    if absent:
        raise RuntimeError(f"the SBOM lacks {', '.join(sorted(absent))}")
    return {"licences": len(lines), "components": len(components)}


def advisories(folder: Path, made: dict[str, Path]) -> dict[str, Any]:
    from packaging.specifiers import SpecifierSet

    listed = json.loads((tools(folder, "safety-db") / "safety_db" / "insecure_full.json").read_text())
    date = datetime.datetime.fromtimestamp(listed["$meta"]["timestamp"], datetime.timezone.utc)
    found = [
        f"{name} {version}: {entry['id']}"
        for name, version in pins().items()
        for entry in listed.get(name, ())
        if any(version in SpecifierSet(specification) for specification in entry["specs"])
    ]
    if found:
        raise RuntimeError("; ".join(found))
    return {"data of": f"{date:%Y-%m-%d}", "pinned": len(pins()), "listed": sum(name in listed for name in pins())}


STEPS: dict[str, Step] = {
    "wheels": wheels,
    "install": install,
    "aarch64": aarch64,
    "hub": hub,
    "trackers": trackers,
    "licences": licences_and_sbom,
    "advisories": advisories,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS}/<date>-<commit>-release.json")
    options = parser.parse_args()
    sha = call("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    output = options.output or ROOT / RESULTS / f"{date}-{sha[:10]}-release.json"
    command = " ".join(["python", "tests/packaging/release_check.py", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "sha": sha, "date": date}
    made: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as name:
        for step in options.only:
            try:
                result[step] = STEPS[step](Path(name), made)
            except LeftOut as reason:
                result[step] = {"left out": str(reason)}
            except Exception as error:
                result[step] = {"failed": without_folders(f"{type(error).__name__}: {error}", Path(name))}
            print(step, json.dumps(result[step]), flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failed" in result[step] for step in options.only))


if __name__ == "__main__":
    sys.exit(main())
