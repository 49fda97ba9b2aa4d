"""Loading a checkpoint, a config or a reward cannot run somebody's code, and nothing is fetched unless asked for."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer, settings
from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.recipe.preflight import inspect_pipeline
from flowdppo_fast.trainer.rewards import build_rewards

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "flowdppo_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
PICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
NETWORK = {
    "http", "socket", "ssl", "requests", "httpx", "httpx2", "anyio", "aiohttp", "ftplib", "smtplib", "huggingface_hub",
    "urllib.request",
}  # fmt: skip
RUNNERS = {"subprocess", "runpy", "code", "pty", "os.system", "os.popen"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
RUNS_COMMANDS = {"os.system", "os.popen", "os.execv", "os.execve", "os.spawnv", "builtins.eval", "builtins.exec"}
UNPICKLES = {"yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "torch.serialization.add_safe_globals"}
MUST_BE_FALSE = {"trust_remote_code", "allow_pickle", "custom_pipeline"}
# text, tiles of a kernel, networks by way of transformers, logs of a run
OTHER_LOADS = {"yaml.load", "json.load", "tl.load", "self.load", "RunFolder.load"}
SAFE_LOADERS = {"yaml.SafeLoader", "_UniqueKeyLoader"}
# the exception class of the readers of .pth and .pt files, which load weights only; the last one writes
# pickles of plain values and goes through those of servers opcode by opcode
MAY_NAME_PICKLERS = {
    "flowdppo_fast/trainer/rewards/aesthetic.py",
    "flowdppo_fast/trainer/rewards/imagereward.py",
    "flowdppo_fast/trainer/rewards/protocols.py",
}
# samplers and callables of a config, a component's library (one of two), packages of integrations, commands of the
# program
MAY_IMPORT_BY_NAME = {
    "flowdppo_fast/samplers.py",
    "flowdppo_fast/trainer/callables.py",
    "flowdppo_fast/trainer/recipe/preflight.py",
    "flowdppo_fast/integrations/_trainer.py",
    "flowdppo_fast/cli/__init__.py",
}
# both sides of a branch of a pipeline that this process is running, from the file that it was imported from
MAY_RUN_TEXT = {"flowdppo_fast/trainer/record/branches.py"}
# clients and servers of rewards and of engines, which somebody has to name in a config or start, and what was named by
# its place on the hub: the config of a base model, the weights of a reward
MAY_USE_THE_NETWORK = {
    "flowdppo_fast/trainer/engines/client.py",
    "flowdppo_fast/trainer/engines/serve.py",
    "flowdppo_fast/trainer/rewards/http.py",
    "flowdppo_fast/trainer/rewards/imagereward.py",
    "flowdppo_fast/trainer/rewards/serve.py",
    "flowdppo_fast/trainer/recipe/export.py",
}


def path_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Modules by their full names, and the packages that they are in."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found | {name.split(".")[0] for name in found}


def faults(place: str, tree: ast.AST) -> list[str]:
    """What the source at ``place`` does that it must not, in its own words."""
    imported = imports(tree)
    found = sorted(imported & RUNNERS)
    if place not in MAY_NAME_PICKLERS:
        found += sorted(imported & PICKLERS)
    if place not in MAY_USE_THE_NETWORK:
        found += sorted(imported & NETWORK)
    for node in ast.walk(tree):
        # a mention is enough: run = eval
        if (
            isinstance(node, ast.Name)
            and node.id in RUNS_TEXT
            and isinstance(node.ctx, ast.Load)
            and place not in MAY_RUN_TEXT
        ):
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in RUNS_COMMANDS | UNPICKLES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg in MUST_BE_FALSE and ast.unparse(node.value) != "False":
            found.append(f"{node.arg}={ast.unparse(node.value)}")
        elif isinstance(node, ast.Constant) and node.value in MUST_BE_FALSE:
            # a key of a dictionary of options
            found.append(repr(node.value))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {key.arg: ast.unparse(key.value) for key in node.keywords}
            # whatever torch is called there
            loads = name.endswith(".load") and name not in OTHER_LOADS
            if loads and keywords.get("weights_only") != "True":
                found.append(f"{name} without weights_only=True")
            if name == "yaml.load" and keywords.get("Loader") not in SAFE_LOADERS:
                found.append(f"yaml.load with {keywords.get('Loader')}")
            literal = node.args and isinstance(node.args[0], ast.Constant)
            if name.endswith(("import_module", "resolve_name")) and not literal and place not in MAY_IMPORT_BY_NAME:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("source", SOURCES, ids=path_of)
def test_sources_unpickle_nothing_run_nothing_and_fetch_nothing(source):
    assert faults(path_of(source), ast.parse(source.read_text())) == []


def test_the_loader_of_yaml_is_a_safe_one():
    assert issubclass(settings._UniqueKeyLoader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from cloudpickle import loads", "import subprocess", "from os import system", "import runpy",
        "import socket", "from urllib import request", "import urllib.request", "import huggingface_hub",
        "eval('1')", "run = exec", "compile('1', '', 'eval')", "__import__('x')", "os.system('x')", "os.popen('x')",
        "torch.load('x')", "t.load('x')", "torch.load('x', weights_only=False)", "np.load('x', allow_pickle=True)",
        "yaml.load(x, Loader=yaml.Loader)", "yaml.load(x)", "yaml.unsafe_load(x)",
        "torch.serialization.add_safe_globals(x)",
        "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})", "importlib.import_module(name)",
        "pkgutil.resolve_name(name)",
    ],
)  # fmt: skip
def test_what_is_forbidden_is_noticed(text):
    assert faults("somewhere.py", ast.parse(text)) != []


class Bomb:
    """Pickled, it would create a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path) -> Path:
    marker = tmp_path / "code-was-run"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb works"
    marker.unlink()
    return marker


def reward(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Makes trainers of one run on the digits model."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "digits"))
    torch.use_deterministic_algorithms(False)
    from pipeline import DigitsPipeline

    def make(iterations: int = 1) -> FlowDPPOTrainer:
        config = FlowDPPOConfig.from_dict(
            {
                "model": {"train": "lora", "lora_rank": 2},
                "sampling": {"num_steps": 4, "prompts_per_rollout": 2, "group_size": 2},
                "run": {"iterations": iterations, "output_dir": str(tmp_path / "run"), "progress": False},
            }
        )
        return FlowDPPOTrainer(
            DigitsPipeline.from_pretrained(ROOT / "examples/digits/checkpoint"), reward, ["1"], config
        )

    return make


def unsealed(folder: Path) -> dict:
    """The state of a checkpoint, without the digest that an attacker can leave out."""
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    return state


@pytest.mark.parametrize("digest", ["as it was", "forged"])
@pytest.mark.parametrize("name", ["weights", "optimizer", "random-0"])
def test_a_checkpoint_with_a_pickle_in_it_is_refused_unread(trainer, marker, name, digest):
    first = trainer()
    first.train()
    (folder,) = (first.output / "checkpoints").iterdir()
    payload = pickle.dumps({"weights": Bomb(marker)})
    (folder / f"{name}.safetensors").write_bytes(payload)
    if digest == "forged":
        changed = unsealed(folder)
        changed["files"][name] |= {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        (folder / "state.json").write_text(json.dumps(changed))
    message = "expected safetensors files" if digest == "forged" else "all 1 checkpoints in .* are damaged"
    with pytest.raises(RuntimeError, match=message):
        trainer(2).train(resume=True)
    assert not marker.exists()


def test_a_checkpoint_cannot_name_files_outside_itself(trainer, tmp_path):
    first = trainer()
    first.train()
    (folder,) = (first.output / "checkpoints").iterdir()
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / "weights.safetensors").read_bytes())
    state = unsealed(folder)
    state["files"]["../../../outside"] = state["files"]["weights"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(RuntimeError, match=r"all 1 checkpoints in .* are damaged"):
        trainer(2).train(resume=True)


@pytest.mark.parametrize(
    ("entry", "file"),
    [("_class_name", "evil.py"), ("transformer", "transformer/evil.py")],
    ids=["pipeline", "component"],
)
def test_code_in_the_folder_of_a_model_is_refused(tmp_path, entry, file):
    """``pipeline.class_name`` given, so that the class that the folder names is not looked at."""
    marker, folder = tmp_path / "code-was-run", tmp_path / "model"
    shutil.copytree(ROOT / "examples/digits/checkpoint", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, entry: ["evil", "StableDiffusion3Pipeline"]}))
    (folder / file).write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nfrom diffusers import StableDiffusion3Pipeline\n"
    )
    settings = Recipe.from_dict(
        {
            "pipeline": {"pretrained": str(folder), "class_name": "StableDiffusion3Pipeline"},
            "prompts": {"train": ["1"]},
            "rewards": [{"name": "jpeg"}],
        }
    )
    with pytest.raises(ValueError, match=rf"pipeline.pretrained: got \['{file}'\], expected weights and configs alone"):
        inspect_pipeline(settings)
    assert not marker.exists()


def test_a_callable_of_a_config_is_a_dotted_name_and_nothing_else(tmp_path):
    """It is code that somebody asks for by name; no expression, no file, no call."""
    marker = tmp_path / "code-was-run"
    for name in (
        f"pathlib:Path({str(marker)!r}).touch", "os:system('true')", "os", "../evil:run", "a b:c",
        ":run", "os:", "__import__('os'):x",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="callable"):
            build_rewards([{"callable": name}])
    assert not marker.exists()


@pytest.mark.parametrize("reader", [FlowDPPOConfig, Recipe])
@pytest.mark.parametrize("tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:os.system"])
def test_a_config_cannot_run_code(tmp_path, reader, tag):
    marker = tmp_path / "code-was-run"
    path = tmp_path / "config.yaml"
    path.write_text(f"run:\n  output_dir: {tag} ['{marker}']\n")
    with pytest.raises((yaml.YAMLError, ValueError, TypeError)):
        reader.from_yaml(path)
    with pytest.raises((yaml.YAMLError, ValueError, TypeError)):
        Recipe.from_yaml(ROOT / "examples/configs/digits.yaml", [f"run.output_dir={tag} ['{marker}']"])
    assert not marker.exists()


def test_training_from_a_folder_opens_no_connection(trainer, monkeypatch):
    asked = []

    def refuse(self, address):
        asked.append(address)
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    run = trainer()
    run.train()
    run.save_pretrained(run.output / "final")
    assert asked == []
