"""An audit that needs no network: what is installed is what constraints.txt pins, and nothing else is needed.

Known vulnerabilities are looked up by ``make audit``, which needs one.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flowdppo-fast"
# what builds the package and its libraries; [build-system] of pyproject.toml, and ninja of the dev extra
BUILD = ("setuptools", "wheel")
EXTRAS = ("trainer", "deepspeed", "ocr", "bench", "docs", "dev")

# SPDX expressions, and what older metadata says instead of one
ALLOWED = {
    "0BSD", "AFL-3.0", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0",
    "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
OLD_NAMES = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "Academic Free License (AFL)": "AFL-3.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "DFSG approved": "MIT",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def needed(name: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """What a distribution needs here."""
    wanted = ["", *extras]
    found = map(Requirement, metadata.requires(name) or ())
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in wanted)]


def closure() -> dict[str, str]:
    """Version of every distribution that the package, its extras and its build need.

    What a distribution pins to one version, as torch does with CUDA's libraries, is pinned with it and left out.
    """
    found: dict[str, str] = {}
    waiting = [(PACKAGE, frozenset(EXTRAS)), *((name, frozenset()) for name in BUILD)]
    seen = set()
    while waiting:
        entry = waiting.pop()
        if entry in seen:
            continue
        seen.add(entry)
        name, extras = entry
        if name != PACKAGE:
            found[name] = metadata.version(name)
        for requirement in needed(name, extras):
            into = canonicalize_name(requirement.name)
            exact = name == "torch" and any(part.operator == "==" for part in requirement.specifier)
            if not exact or into in pins():
                waiting.append((into, frozenset(requirement.extras)))
    return found


def without_local(version: str) -> str:
    # torch 2.13.0+cpu is torch 2.13.0 built for CPUs
    return Version(version).public


def disagreements(installed: dict[str, str], pinned: dict[str, str]) -> dict[str, list[str]]:
    return {
        "not pinned": sorted(installed.keys() - pinned.keys()),
        "pinned and not needed": sorted(pinned.keys() - installed.keys()),
        "another version": sorted(
            f"{name}: {installed[name]} is installed, {pinned[name]} is pinned"
            for name in installed.keys() & pinned.keys()
            if without_local(installed[name]) != pinned[name]
        ),
    }


def licences(name: str) -> set[str]:
    """SPDX names of a distribution's licence, from its expression, else its classifiers, else its licence field."""
    about = metadata.metadata(name)
    expression = about["License-Expression"]
    if not expression:
        classifiers = [
            line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if line[:7] == "License"
        ]
        # a heading of others, which some list as well
        classifiers = [text for text in classifiers if text != "OSI Approved"]
        expression = " AND ".join(OLD_NAMES.get(text, text) for text in classifiers)
    if not expression:
        first = ((about["License"] or "").splitlines() or ["none"])[0]
        expression = OLD_NAMES.get(first, first)
    return {part.strip(" ()") for part in re.split(r" (?:AND|OR) ", expression)}


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    return closure()


def test_constraints_are_the_closure_of_the_requirements(installed):
    if sys.version_info[:2] != (3, 11):
        pytest.skip("constraints.txt is the closure on Python 3.11, which CI runs; others need other backports")
    assert disagreements(installed, pins()) == {"not pinned": [], "pinned and not needed": [], "another version": []}


def test_each_has_a_licence_that_goes_with_ours(installed):
    refused = {name: licences(name) - ALLOWED for name in installed}
    assert {name: rest for name, rest in refused.items() if rest} == {}


def test_nothing_that_is_installed_contradicts_another():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_audit_finds_what_is_wrong(installed, monkeypatch):
    pinned = {**pins(), "torch": "2.9.0", "left-pad": "1.0"}
    del pinned["numpy"]
    assert disagreements(installed, pinned) == {
        "not pinned": ["numpy"],
        "pinned and not needed": ["left-pad"],
        "another version": [f"torch: {installed['torch']} is installed, 2.9.0 is pinned"],
    }
    about = metadata.metadata("numpy")
    del about["License-Expression"]
    about["License-Expression"] = "MIT AND GPL-3.0-only"
    monkeypatch.setattr(metadata, "metadata", lambda name: about)
    assert licences("numpy") - ALLOWED == {"GPL-3.0-only"}


def test_the_closure_follows_what_a_requirement_brings(installed, monkeypatch):
    real = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: ["pip"] if name == "pyyaml" else real(name))
    assert closure().keys() - installed.keys() == {"pip"}
