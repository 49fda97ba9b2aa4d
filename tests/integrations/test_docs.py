"""The guides: python blocks run, names in diffs exist, yaml parses, links lead somewhere, tables of keys are
complete."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "integrations").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "diff", "yaml", "text"}


def blocks(guide: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(guide.read_text()) if name == language]


def public_names(module: str) -> set[str]:
    """``__all__`` of an integration, read without importing it: its trainer need not be installed."""
    tree = ast.parse((ROOT / "flowdppo_fast" / "integrations" / f"{module}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_there_is_a_guide_for_every_integration():
    modules = {path.stem for path in (ROOT / "flowdppo_fast" / "integrations").glob("[a-z]*.py")} - {"verl_omni_plugin"}
    assert {guide.stem for guide in GUIDES} == modules | {"index", "differences", "trl", "ray"}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_blocks_say_what_they_are(guide):
    assert {language for language, _ in BLOCK.findall(guide.read_text())} <= LANGUAGES
    assert guide.read_text().count("```") == 2 * len(BLOCK.findall(guide.read_text()))


@pytest.mark.parametrize("guide", [g for g in GUIDES if blocks(g, "python")], ids=lambda guide: guide.stem)
def test_python_blocks_run(guide, capsys):
    """All blocks of a guide in order, in one namespace, as a reader would type them."""
    namespace: dict = {"__name__": guide.stem}
    for number, body in enumerate(blocks(guide, "python")):
        exec(compile(body, f"{guide.name}[{number}]", "exec"), namespace)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_names_that_guides_mention_exist(guide):
    text = guide.read_text()
    for module, names in re.findall(r"from flowdppo_fast\.integrations\.(\w+) import ([\w, ]+)", text):
        imported = {name.split(" as ")[0].strip() for name in names.split(",")}
        assert imported <= public_names(module), (module, imported)
    for module, name in re.findall(r"\b(flow_grpo|dance_grpo|mix_grpo|verl_omni|flow_factory)\.(\w+)\(", text):
        assert name in public_names(module) | {"main"}, f"{module}.{name}"
    for path in re.findall(r"flowdppo_fast\.integrations\.([\w.]+)", text):
        module, _, name = path.partition(".")
        assert (ROOT / "flowdppo_fast" / "integrations" / f"{module}.py").exists(), path
        assert not name or name in public_names(module), path
    for name in re.findall(r"from flowdppo_fast\.trainer import ([\w, ]+)", text):
        trainer = importlib.import_module("flowdppo_fast.trainer")
        assert all(hasattr(trainer, part.strip()) for part in name.split(","))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_yaml_and_links(guide):
    for body in blocks(guide, "yaml"):
        assert isinstance(yaml.safe_load(body), dict)
    text = guide.read_text()
    for target, anchor in re.findall(r"\]\(([\w./]*)(?:#([\w-]+))?\)", text):
        linked = guide if not target else guide.parent / target
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


def test_the_config_table_names_every_key_once_and_rightly():
    """Keys in the TRL table are keys of the config."""
    from flowdppo_fast.trainer import FlowDPPOConfig

    known = {f"{section}.{key}" for section, values in FlowDPPOConfig().to_dict().items() for key in values}
    text = (ROOT / "docs" / "integrations" / "trl.md").read_text()
    named = set(re.findall(r"`((?:model|sampling|advantage|objective|optimizer|run)\.\w+)", text))
    assert named <= known, named - known
    assert len(named) > 15
