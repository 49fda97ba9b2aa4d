"""The contributing pages name files, tests and objects that exist, and stay short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "contributing.md", *sorted((ROOT / "docs" / "contributing").glob("*.md"))]
STEPS = PAGES[1:]
FOLDERS = ("flowdppo_fast", "kernels", "csrc", "bench", "tests")
ENDINGS = (".py", ".h", ".cuh", ".cu", ".cpp")


@pytest.fixture(scope="module")
def source() -> str:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    return "\n".join(path.read_text() for path in files if path != Path(__file__))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = set(re.findall(r"(?:flowdppo_fast|tests|bench|csrc|kernels|docs|examples)/[\w./]*\w", text))
    missing = {path for path in named if "NAME" not in path and not (ROOT / path).exists()}
    assert named
    assert not missing
    links = {link for link in re.findall(r"\]\(([\w./]+)\)", text) if link != "architecture.md"}
    assert all((page.parent / link).exists() for link in links), links


@pytest.mark.parametrize("page", STEPS, ids=lambda page: page.stem)
def test_tests_and_names_of_the_steps_exist(page, source):
    text = page.read_text()
    # the change in words names what does not exist yet
    steps, words = text.split("**In words**")
    assert words.strip()
    tests = set(re.findall(r"`(test_\w+)`", steps))
    assert all(f"def {name}(" in source for name in tests), tests
    # constants, classes and functions in their steps
    names = {name for name in re.findall(r"`(_?[A-Z]\w{3,}|_\w+|\w+_\w+)(?:\(\))?`", steps) if "NAME" not in name}
    assert len(names) >= 3
    unknown = {name for name in names if not re.search(rf"\b{name}\b", source)}
    assert not unknown
    # a part of the tests is named to be run
    assert "-m pytest -q tests/" in steps


@pytest.mark.parametrize("page", STEPS, ids=lambda page: page.stem)
def test_a_step_by_step_page_is_one_page(page):
    assert len(page.read_text().splitlines()) <= 60


def test_the_index_names_every_page_and_every_folder_of_tests():
    text = PAGES[0].read_text()
    assert set(re.findall(r"\(contributing/(\w+)\.md\)", text)) == {page.stem for page in STEPS}
    table = text[text.index("| `tests/`") : text.index("A part of them")]
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    assert folders <= set(re.findall(r"`(\w+)`", table))
