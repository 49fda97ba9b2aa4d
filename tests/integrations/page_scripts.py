"""Scripts that the pages edit, stand-ins and real ones, and what it takes to run parts of them."""

from __future__ import annotations

import ast
import builtins
import contextlib
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from . import edits
from .standins import scripts

FOLDER = os.environ.get("FLOWDPPO_PEER_REPOS")
PAGES = {"flow_grpo.md": "flow_grpo/diffusers_patch", "dance_grpo.md": "fastvideo/train_grpo_hunyuan.py"}
PAGES |= {"mix_grpo.md": "fastvideo/utils/sampling_utils.py", "miles_diffusion.md": "miles/utils/sde_log_prob.py"}
SCRIPTS = [(page, file) for page in PAGES for block in edits.blocks(page) for file in block.files]
ROWS, STEPS = 3, 5


def checkout(page):
    """The first checkout of a page's trainer that has all its scripts."""
    files = [file for block in edits.blocks(page) for file in block.files]
    for root in sorted(Path(FOLDER).iterdir()):
        if all((root / file).exists() for file in [*files, PAGES[page]]):
            return root
    pytest.fail(f"no checkout below FLOWDPPO_PEER_REPOS has {PAGES[page]} and all scripts of docs/integrations/{page}")


def stand_in(page, file):
    if page == "miles_diffusion.md":
        return scripts.miles()
    return scripts.flow_grpo(file) if page == "flow_grpo.md" else scripts.fastvideo(file, mix=page == "mix_grpo.md")


def sources(page, file):
    """The script to edit: the stand-in, and the real one where checkouts are given."""
    yield stand_in(page, file)
    if FOLDER:
        yield (checkout(page) / file).read_text()


class Tiny(nn.Module):
    """A velocity field under the names that scripts call a transformer by."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, width)

    @property
    def module(self):
        return self

    @contextlib.contextmanager
    def disable_adapter(self):
        yield

    def forward(self, hidden_states, *args, **kwargs):
        return (torch.tanh(self.linear(hidden_states)),)


def statements(tree, found):
    """The innermost list of statements that has one for which ``found`` is true, and where."""
    for node in ast.walk(tree):
        for field in ("body", "orelse"):
            body = getattr(node, field, None)
            if not isinstance(body, list):
                continue
            for at, statement in enumerate(body):
                if found(statement) and not any(
                    found(inner)
                    for inner in ast.walk(statement)
                    if inner is not statement and isinstance(inner, ast.stmt)
                ):
                    yield body, at


def ours(tree):
    """The imports that an edit added."""
    return [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("flowdppo_fast")]


def has_text(statement, text):
    return text in ast.unparse(statement)


def run_statements(body, namespace):
    """Executes statements; names that the script has and the test has not are inert."""
    module = ast.Module(body, [])
    loaded = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    for name in loaded - namespace.keys() - set(dir(builtins)):
        namespace[name] = MagicMock(name=name)
    exec(compile(module, "script", "exec"), namespace)


@contextlib.contextmanager
def registered(*modules):
    before = {module.__name__: sys.modules.get(module.__name__) for module in modules}
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
