"""What pages say of the code, against the code: tables, names, settings, findings, paths."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("diffusers")

from flowdppo_fast import (
    DPPO,
    DRPO,
    SAMPLERS,
    GRPOGuard,
    KLPenalty,
    LogHinge,
    RatioClip,
    Unclipped,
    cli,
    ops,
    sde_schedule,
)
from flowdppo_fast.objectives import SUMMARY
from flowdppo_fast.runs import diagnose
from flowdppo_fast.trainer.config import FlowDPPOConfig
from flowdppo_fast.trainer.objective import ObjectiveConfig
from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.rewards import HTTPReward, registry, serve
from flowdppo_fast.trainer.rewards.http import _RETRIED
from flowdppo_fast.trainer.rewards.wire import VERSION, encode_request, parse_rewards

from . import configuration
from .pages import ROOT, Page, load

DOCS = ROOT / "docs"
PUBLIC = ("flowdppo_fast", "flowdppo_fast.trainer", "flowdppo_fast.trainer.rewards")
# integrations that can be imported without their trainer
STANDALONE = ("flow_grpo", "dance_grpo", "mix_grpo")
GUIDES = [load(path) for path in sorted((DOCS / "integrations").glob("*.md"))]


def page(name: str) -> Page:
    return load(DOCS / name)


# configuration.md


def test_the_settings_page_is_what_the_settings_say():
    assert configuration.generated() in configuration.PAGE.read_text(), "python -m tests.docs.configuration writes it"


@pytest.mark.parametrize(("kind", "checks"), [(FlowDPPOConfig, 12), (ObjectiveConfig, 8), (Recipe, 12)])
def test_the_settings_page_has_every_check(kind, checks):
    """Each ``require`` is provoked by one of the page's examples: a new check needs an example."""
    said = configuration.PAGE.read_text()
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(kind))) if isinstance(node, ast.Call)]
    expected = [node.args[3] for node in calls if getattr(node.func, "id", "") == "require"]
    assert len(expected) >= checks
    for words in expected:
        pattern = "".join(
            re.escape(part.value) if isinstance(part, ast.Constant) else ".*?"
            for part in (words.values if isinstance(words, ast.JoinedStr) else [words])
        )
        assert re.search(pattern, said), pattern


# troubleshooting.md


def test_every_finding_of_diagnose_is_explained():
    rows = re.findall(r"^\| ([^|`]+) \|", page("troubleshooting.md").text, re.MULTILINE)
    assert set(diagnose.CHECKS) <= set(rows)


def test_the_words_of_doctor_are_its_words():
    modules = [importlib.import_module(f"flowdppo_fast.{name}") for name in ("backend", "cli.doctor")]
    text = re.sub(r'"\s+f?"', "", "".join(map(inspect.getsource, modules)))
    for said in (
        "the C++ library is not built", "Triton is not installed", "the CUDA library is not built",
        "torch sees no GPU", "cannot be loaded under torch", "was built without CUDA", "; the GPU here is",
        "not installed",
    ):  # fmt: skip
        assert said in text
        assert said in page("troubleshooting.md").text


def test_diagnose_can_be_started(tmp_path):
    assert cli.main(["diagnose", str(tmp_path)]) == 2


# concepts/


def test_the_sampler_table_is_complete_and_right():
    """The formulas of the table, evaluated, against the steps of the library."""
    text = page("concepts/samplers.md").text
    rows = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    }
    assert set(rows) == set(SAMPLERS)
    first = rows["flow_sde"]
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64).tolist()
    for name, (_, s, *numbers) in rows.items():
        for index in (0, 4):
            sigma, following = sigmas[index], sigmas[index + 1]
            known = {"sigma": sigma, "eta": 0.7, "following": following, "dt": following - sigma}
            known |= {"sigma_1": sigmas[1], "sigma_N": sigmas[-1]}
            known["s"] = _value(
                s.replace(r"1-\sigma", r"1-\sigma_1") if name == "flow_sde" and index == 0 else s, known
            )
            texts = [mine if mine != "same" else theirs for mine, theirs in zip(numbers, first[2:])]
            step = sde_schedule(name, sigmas, eta=0.7)[index]
            assert [_value(each, known) for each in texts] == pytest.approx(
                [step.sample_coef, step.velocity_coef, step.std], rel=1e-12, abs=1e-15
            ), (name, index)


def _value(cell: str, known: dict) -> float:
    """The first formula of a cell, in TeX."""
    formula = re.match(r"\$(.+?)\$", cell)[1].replace(r"\sigma'", " following ")
    formula = re.sub(r"\\frac{([^{}]*)}{([^{}]*)}", r"((\1)/(\2))", re.sub(r"\\left|\\right", "", formula))
    formula = formula.replace("{", "(").replace("}", ")")
    words = re.findall(r"\\?[a-z]+(?:_\w)?|\d+|\S", formula.replace("dt", " dt "))
    python = [{"^": "**"}.get(word, word.removeprefix("\\")) for word in words]
    functions = {"sqrt": math.sqrt, "sin": math.sin, "exp": math.exp}
    for place in range(len(python) - 1, 0, -1):
        before, after = python[place - 1 : place + 1]
        # factors stand side by side
        if re.match(r"\w|\)", before) and re.match(r"\w|\(", after) and before not in functions:
            python.insert(place, "*")
    return float(eval("".join(python), {"__builtins__": {}}, {**known, **functions, "pi": math.pi}))


def test_the_objective_table_names_every_objective():
    text = page("concepts/objectives.md").text
    for kind in (DPPO, RatioClip, GRPOGuard, KLPenalty, DRPO, LogHinge, Unclipped):
        assert f"| `{kind.__name__}(" in text
    regions = set(re.findall(r'^\| `"(\w+)"` \|', text, re.MULTILINE))
    assert regions == {"kl", "mean_drift", "velocity_drift"}


def test_the_thresholds_in_use_have_the_default():
    (where,) = re.findall(r"^\| (\S+) \| .*the default here \|$", page("concepts/conventions.md").text, re.MULTILINE)
    assert float(where) == DPPO().threshold


# architecture.md


def _named_files(row: str) -> list[Path]:
    """Files and folders of a row: from the root, or beside the one before."""
    found: list[Path] = []
    for named in re.findall(r"`([\w./]+/|[\w./]+\.(?:py|h|cpp|cuh?|yml)|tests/\w+)`", row):
        before = found[-1] if found else ROOT
        places = [ROOT / named, (before if before.is_dir() else before.parent) / named]
        exist = [place for place in places if place.exists()]
        assert exist, f"{named}: no such file ({row})"
        found.append(exist[0])
    return found


def test_what_the_architecture_names_exists():
    """Files are there, and so are the names in one of the files of their row."""
    rows = re.findall(r"^\| .*`.*$", page("architecture.md").text, re.MULTILINE)
    assert len(rows) > 15
    for row in rows:
        source = "\n".join(file.read_text() for file in _named_files(row) if file.is_file())
        for name in re.findall(r"`([A-Z]\w+|_run|epilogue)`", row):
            assert re.search(rf"\b{name}\b", source), f"{name} ({row})"


# one_iteration.md


def test_page_and_picture_of_the_architecture_count_the_operators():
    count = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")[len(ops.SCHEMAS)]
    for text in (page("architecture.md").text, (ROOT / "docs/figures/architecture.svg").read_text()):
        assert set(re.findall(r"(\w+) schemas", text)) == {count}


def test_the_table_of_shapes():
    rows = re.findall(
        r"^\| [^|]+ \| \[([\d, ]+)\] \| ([\d,]+) \| ([\d.]+) (KiB|MiB) \|$", page("one_iteration.md").text, re.MULTILINE
    )
    assert len(rows) == 5
    for latent, elements, size, unit in rows:
        count = math.prod(int(part) for part in latent.split(","))
        assert count == int(elements.replace(",", ""))
        # the large one is rounded
        assert 2 * count / 2 ** (10 if unit == "KiB" else 20) == pytest.approx(float(size), rel=1e-3)


# rewards.md


def test_the_rewards_table_names_all_built_in_ones_with_their_classes():
    rows = re.findall(r"^\| (`[\w`, ]+`) \| `(\w+)` \|", page("rewards.md").text, re.MULTILINE)
    named = {name: kind for names, kind in rows for name in re.findall(r"\w+", names)}
    assert named == {name: kind.__name__ for name, kind in registry.BUILT_IN.items()}


def test_the_settings_of_the_rewards_page_build(monkeypatch):
    monkeypatch.setattr(registry, "load_callable", lambda *name: lambda **options: lambda *_: None)
    built = [
        registry.build_rewards(yaml.safe_load(block.body)["rewards"])[1] for block in page("rewards.md").blocks("yaml")
    ]
    assert built == [
        {"vlm_judge": 1.0},
        {"clip": 1.0, "judge/text": 1.0, "judge/style": 0.5, "bright": 0.1, "MyReward": 1.0},
        {"service/hpsv3": 1.0, "service/imagereward": 0.5, "geneval": 1.0},
    ]


def test_the_schema_is_what_is_sent_and_read():
    request, plain, named = (json.loads(block.body) for block in page("rewards.md").blocks("json"))
    sent = json.loads(encode_request(torch.zeros(2, 1, 3, 2, 2), request["prompts"], request["metadata"], "png", 95))
    assert list(sent) == list(request)
    assert request["version"] == VERSION
    assert parse_rewards(json.dumps(plain).encode(), 2).tolist() == plain["rewards"]
    assert set(parse_rewards(json.dumps(named).encode(), 2)) == set(named["rewards"])


def test_statuses_and_arguments_of_the_rewards_page_exist():
    text = page("rewards.md").text
    assert ", ".join(map(str, _RETRIED)) in text
    arguments = inspect.signature(HTTPReward).parameters
    for name in ("timeout", "deadline", "retries", "backoff", "max_response_bytes", "token_env"):
        assert name in arguments
        assert f"`{name}`" in text
    for option in re.findall(r"`(--[a-z-]+)`", text):
        assert f'"{option}"' in inspect.getsource(serve.main), option


# integrations/


def public_names(module: str) -> set[str]:
    """``__all__`` of an integration, read without importing it: its trainer need not be installed."""
    tree = ast.parse((ROOT / "flowdppo_fast" / "integrations" / f"{module}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


# run or imported for what they do, with no names of their own to use
STARTERS = {"verl_omni_plugin", "flow_factory_train"}


def integration_modules() -> set[str]:
    return {path.stem for path in (ROOT / "flowdppo_fast" / "integrations").glob("[a-z]*.py")} - STARTERS


PAGES_BESIDES = {"index", "differences", "miles_diffusion", "trl", "ray"}


def test_there_is_a_guide_for_every_integration():
    assert {guide.path.stem for guide in GUIDES} == integration_modules() | PAGES_BESIDES


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.path.stem)
def test_names_that_guides_mention_exist(guide):
    text = guide.text
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


@pytest.mark.parametrize("path", [*(guide.path for guide in GUIDES), DOCS / "troubleshooting.md"], ids=lambda p: p.stem)
def test_settings_that_prose_names_are_settings(path: Path):
    known = {f"{section}.{key}" for section, values in FlowDPPOConfig().to_dict().items() for key in values}
    named = set(
        re.findall(r"`((?:model|sampling|advantage|objective|optimizer|evaluation|run)\.\w+)", path.read_text())
    )
    assert named <= known, named - known
    assert len(named) > 15 or path.stem != "trl"


# api/


def _found(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_on_an_api_page():
    """``__all__`` of the package, the trainer and the rewards by name, integrations as whole modules."""
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    paths = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    integrations = {path for path in paths if ".integrations." in path}
    documented = [_found(path) for path in paths if path not in integrations]
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            assert any(_found(f"{module}.{name}") is one for one in documented), f"{module}.{name}"
    assert integrations == {f"flowdppo_fast.integrations.{name}" for name in integration_modules()}


# made by a method of theirs or another class's
NOT_CONSTRUCTED = ("FlowMatchSDEScheduler", "RewardHandle")


def test_the_table_of_metrics_is_complete():
    cells = re.findall(r"^\| (`[\w`, ]+`) \|", page("api/results.md").text, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"\w+", cell)]
    # the loss itself is not among the metrics
    assert sorted(named) == sorted(SUMMARY[1:])


def _parameters(kind: object) -> list[str]:
    try:
        names = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in names if name not in ("self", "args", "kwargs") and not name.startswith("_")]


def _docstring_of(target: str, module: str) -> str:
    """Docstring of what a role names, from the module that names it or by its full name."""
    name = target.rpartition(".")[2]
    found = getattr(importlib.import_module(module), name, None)
    if found is None and target.startswith("flowdppo_fast."):
        found = _found(target)
    return inspect.getdoc(found) or ""


@pytest.mark.parametrize("module", [*PUBLIC, *(f"flowdppo_fast.integrations.{name}" for name in STANDALONE)])
def test_public_docstrings_name_their_parameters(module):
    """Each parameter is in the docstring, or the docstring sends the reader to the function or class that has it."""
    for name in importlib.import_module(module).__all__:
        public = getattr(importlib.import_module(module), name)
        if not callable(public) or name in NOT_CONSTRUCTED:
            continue
        said = inspect.getdoc(public)
        assert said, name
        roles = re.findall(r":(?:func|class):`~?\.?([\w.]+)`", said)
        everything = "\n".join([said, *(_docstring_of(target, module) for target in roles)])
        missing = [one for one in _parameters(public) if not re.search(rf"\b{one}\b", everything)]
        assert not missing, f"{name}: {missing}"
