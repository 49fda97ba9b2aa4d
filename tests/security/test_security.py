"""Loading a checkpoint, a config or a reward cannot run somebody's code, and nothing is fetched unless asked for."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer
from flowdppo_fast.trainer.recipe import Recipe

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "flowdppo_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
PICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
NETWORK = {"http", "socket", "ssl", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub"}
# the one exception class of the one reader of .pth files, which loads weights only
MAY_NAME_PICKLERS = {"flowdppo_fast/trainer/rewards/aesthetic.py"}
# the reward client and server, which somebody has to name in a config or start, and the config of a base model that was
# named by its place on the hub
MAY_USE_THE_NETWORK = {
    "flowdppo_fast/trainer/rewards/http.py",
    "flowdppo_fast/trainer/rewards/serve.py",
    "flowdppo_fast/trainer/export.py",
}


def path_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}


@pytest.mark.parametrize("source", SOURCES, ids=path_of)
def test_sources_unpickle_nothing_run_nothing_and_fetch_nothing(source):
    tree = ast.parse(source.read_text())
    if path_of(source) not in MAY_NAME_PICKLERS:
        assert not imports(tree) & PICKLERS
    if path_of(source) not in MAY_USE_THE_NETWORK:
        assert not imports(tree) & NETWORK
    assert "subprocess" not in imports(tree)
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"), name
        assert not name.endswith((".loads", ".load")) or not name.startswith(("pickle", "marshal")), name
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        if name == "yaml.load":
            loader = getattr(sys.modules[module_of(source)], keywords["Loader"])
            assert issubclass(loader, yaml.SafeLoader)
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") == "False"


def module_of(source: Path) -> str:
    name = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    __import__(name)
    return name


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


@pytest.mark.parametrize("reader", [FlowDPPOConfig, Recipe])
@pytest.mark.parametrize("tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:os.system"])
def test_a_config_cannot_run_code(tmp_path, reader, tag):
    marker = tmp_path / "code-was-run"
    path = tmp_path / "config.yaml"
    path.write_text(f"run:\n  output_dir: {tag} ['{marker}']\n")
    with pytest.raises((yaml.YAMLError, ValueError, TypeError)):
        reader.from_yaml(path)
    with pytest.raises((yaml.YAMLError, ValueError, TypeError)):
        FlowDPPOConfig.from_yaml(ROOT / "examples/digits/config.yaml", [f"run.output_dir={tag} ['{marker}']"])
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
