"""Every page: python runs, commands parse, other blocks are what they say."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import yaml

pytest.importorskip("diffusers")

from .commands import check
from .pages import ALL, COMMAND_LINE, LANGUAGES, ROOT, SHELL, Block, Page

NOT_RUN = [block for page in ALL for block in page.blocks() if block.reason is not None]


def having(*languages: str) -> list[Page]:
    return [page for page in ALL if any(block.reason is None for block in page.blocks(*languages))]


@pytest.fixture(autouse=True)
def ordinary_memory(poisoned_memory):
    """Whole models allocate uninitialised memory for good reasons; the kernels' own tests poison it."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("page", having("python"), ids=str)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    """All blocks of a page in one namespace, as a reader would type them in the root of the repository."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace: dict = {"__name__": page.path.stem}
    for block in page.blocks("python"):
        if block.reason is None:
            # lines of a traceback are those of the page
            exec(compile("\n" * (block.line - 1) + block.body, str(page.path), "exec"), namespace)
    printed = capsys.readouterr().out
    for said in re.findall(r"^prints ``(.+?)``", page.text, re.MULTILINE | re.DOTALL):
        assert " ".join(said.split()) in printed


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_blocks_that_are_not_run_here(block):
    """Counted and printed, with the reason; python among them must at least compile."""
    assert block.language in ("python", *SHELL), "only blocks that could run need a reason"
    assert block.reason.startswith("needs "), block.reason
    if block.language == "python":
        compile(block.body, str(block), "exec")
    pytest.skip(f"{block} is not run: {block.reason}")


@pytest.mark.parametrize("page", [page for page in ALL if page.commands()], ids=str)
def test_commands_are_understood(page):
    """By the parser of the program; settings on the command line are checked against the config they change."""
    for where, words in page.commands():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            try:
                check(words, patch)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{where}: {' '.join(words)}: {error}") from error


@pytest.mark.parametrize("page", ALL, ids=str)
def test_blocks_are_what_they_say(page):
    blocks = page.blocks()
    assert {block.language for block in blocks} <= LANGUAGES
    assert page.text.count("```") == 2 * len(blocks), "a fence is not closed"
    for block in blocks:
        if block.language in ("", "text"):
            assert not COMMAND_LINE.search(block.body), f"{block}: commands are in a block of bash or sh"
        elif block.language == "yaml":
            _check_yaml(block, integration="integrations" in page.path.parts)
        elif block.language == "json" and not _is_json(block.body):
            assert all(_is_json(line) for line in block.body.splitlines()), f"{block}: neither JSON nor JSON lines"


def _check_yaml(block: Block, *, integration: bool) -> None:
    values = yaml.safe_load(block.body)
    assert isinstance(values, dict), block
    # other trainers have sections of the same names
    if not integration and values.keys() & {"pipeline", "rewards", "sampling", "optimizer", "model"}:
        from flowdppo_fast.trainer.recipe import Recipe

        smallest = {
            "pipeline": {"pretrained": "owner/name"},
            "prompts": {"train": ["x"]},
            "rewards": [{"name": "clip"}],
        }
        Recipe.from_dict(
            {**smallest, **{k: {**smallest.get(k, {}), **v} if isinstance(v, dict) else v for k, v in values.items()}}
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True
