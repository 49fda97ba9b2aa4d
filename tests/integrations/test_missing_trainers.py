"""Without a trainer: one clear error from what extends it, nothing from what does not need it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

TRAINERS = {"verl_omni": "verl-omni", "unirl": "UniRL", "flow_factory": "Flow-Factory"}


class Nowhere:
    """An import hook that finds none of the trainers, whatever is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in TRAINERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def fresh(monkeypatch):
    """No trainer and no integration imported."""
    for name in TRAINERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delitem(sys.modules, f"flowdppo_fast.integrations.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "flowdppo_fast.integrations.verl_omni_plugin", raising=False)
    return monkeypatch


@pytest.fixture
def absent(fresh):
    fresh.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    return fresh


def importing(name):
    return importlib.import_module(f"flowdppo_fast.integrations.{name}")


@pytest.mark.parametrize("name", TRAINERS)
def test_says_which_trainer_is_missing_and_where_it_is(absent, name):
    pattern = rf"extends {TRAINERS[name]}, which is not installed \(no package '{name}'\); install it from https://"
    with pytest.raises(ImportError, match=pattern):
        importing(name)


def test_the_plugin_says_the_same(absent):
    with pytest.raises(ImportError, match="extends verl-omni, which is not installed"):
        importing("verl_omni_plugin")


def test_an_older_tree_is_told_apart(absent):
    package = ModuleType("flow_factory")
    package.__path__ = []
    absent.setitem(sys.modules, "flow_factory", package)
    with pytest.raises(ImportError, match=r"installed Flow-Factory has no module 'flow_factory\.trainers'"):
        importing("flow_factory")


def test_what_the_trainer_itself_misses_is_its_own_error(fresh, tmp_path):
    trainers = tmp_path / "flow_factory" / "trainers"
    trainers.mkdir(parents=True)
    (tmp_path / "flow_factory" / "__init__.py").touch()
    (trainers / "__init__.py").touch()
    (trainers / "dppo.py").write_text("import a_package_that_flow_factory_needs\n")
    fresh.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_flow_factory_needs"):
        importing("flow_factory")
    for name in [m for m in sys.modules if m.split(".")[0] == "flow_factory"]:
        del sys.modules[name]


def test_flow_grpo_dance_grpo_and_mix_grpo_need_nothing():
    """In a fresh interpreter: no trainer, no diffusers; and the package itself imports no integration."""
    code = """
import sys
import flowdppo_fast
assert not [m for m in sys.modules if m.startswith("flowdppo_fast.integrations")]
from flowdppo_fast.integrations import dance_grpo, flow_grpo, mix_grpo
heavy = {"diffusers", "transformers", "accelerate", "verl_omni", "unirl", "flow_factory"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
