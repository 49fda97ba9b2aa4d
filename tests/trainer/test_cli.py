"""The command line: quick help, a run from a config to exported weights, and what is said before weights are loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel
from digits_example import EXAMPLE, PROMPTS, ink
from PIL import Image
from safetensors.torch import load_file

from flowdppo_fast import evidence
from flowdppo_fast.cli import main
from flowdppo_fast.runs import diagnose
from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.run_folder import FolderLock

ROOT = EXAMPLE.parents[1]
CONFIG = "examples/configs/digits.yaml"
SHORT = ["run.progress=false", "run.checkpoint_every=1", "sampling.prompts_per_rollout=4", "sampling.group_size=4"]
HEAVY = ("accelerate", "diffusers", "matplotlib", "peft", "transformers", "triton", "wandb")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Paths in the example's config are relative to the root; imports of one test are not another's."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def start(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(capsys, *arguments: str) -> str:
    """What a command says that ends with the exit status of a wrong call."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from flowdppo_fast.cli import main
try:
    main(["--help"])
except SystemExit as exit:
    assert exit.code == 0
print("imported", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = start("-c", code)
    assert done.returncode == 0, done.stderr
    for command in ("doctor", "train", "sample", "export"):
        assert command in done.stdout
    assert done.stdout.splitlines()[-1] == "imported []"


def test_doctor_as_a_module():
    done = start("-m", "flowdppo_fast.cli", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backends"]["reference"] == {"serves": ["cpu"]}
    for name, said in report["proof"].items():
        folders = evidence.PASSED.get(name)
        assert ", ".join(folders) in said if folders else said.endswith("on an emulator, never yet on a GPU")


@pytest.mark.parametrize("command", ["train", "sample", "export"])
def test_help_of_commands(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: flowdppo {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_from_a_config_to_exported_weights(tmp_path, capsys):
    folder = tmp_path / "run"
    # what a user types, in a process of its own
    done = start("-m", "flowdppo_fast.cli", "train", CONFIG, f"run.output_dir={folder}", "run.iterations=1", *SHORT)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} >= {"checkpoints", "metrics.jsonl", "recipe.yaml", "inputs.json"}
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["reward"] == pytest.approx(0.5 * metrics["reward/readable"] + 0.5 * metrics["reward/bold"])
    assert Recipe.from_yaml(folder / "recipe.yaml").config.sampling.group_size == 4

    # it continues, and only with --resume
    again = ["train", CONFIG, f"run.output_dir={folder}", "run.iterations=2", *SHORT]
    assert "holds a run already; --resume continues it" in refused(capsys, *again)
    # while another process writes to it, neither; and the recipe stays that of the run
    lock, recipe = FolderLock(folder), (folder / "recipe.yaml").read_text()
    lock.acquire()
    assert "is written to by another run" in refused(capsys, *again, "--resume")
    lock.release()
    assert (folder / "recipe.yaml").read_text() == recipe
    assert main([*again, "--resume"]) == 0
    assert "iteration 2" in capsys.readouterr().out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert "sampling.eta; expected the same" in refused(capsys, *again, "--resume", "sampling.eta=0.6")
    other = ["model.ema_decay=0.9", "rewards=[{name: jpeg}]", "prompts.train=['1']"]
    said = refused(capsys, *again, "--resume", *other)
    assert "prompts.train, model.ema_decay, rewards; expected the same" in said

    # sampling works from anywhere, from the newest weights
    os.chdir(tmp_path)
    sys.path.insert(0, str(ROOT))
    draw = ["sample", str(folder), "--prompt", "3", "--seed", "5"]
    assert main([*draw, "--n", "2", "--prompt", "7", "-o", "many.png"]) == 0
    assert main([*draw, "-o", "new.png"]) == 0
    assert main([*draw, "--iteration", "1", "-o", "old.png"]) == 0
    assert main([*draw, "--base", "-o", "base.png"]) == 0
    assert main([*draw, "--n", "2", "--set", "guidance_scale=1.5", "--steps", "4", "-o", "folder"]) == 0
    images = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ("new", "old", "base")}
    assert len(set(images.values())) == 3
    assert Image.open(tmp_path / "many.png").width >= 2 * 128
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["0000.png", "0001.png"]

    # the exported transformer is the trained one
    capsys.readouterr()
    assert main(["export", str(folder), "-o", "out"]) == 0
    said = capsys.readouterr().out
    assert "iteration 2, trained weights" in said
    assert "out/transformer/diffusion_pytorch_model.safetensors" in said
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    weights = load_file(folder / "checkpoints" / "iteration-000002" / "weights.safetensors")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[f"transformer.{name}"])


def test_an_interrupt_is_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlowDPPOTrainer, "train", interrupted)
    assert main(["train", CONFIG, f"run.output_dir={tmp_path / 'run'}", *SHORT]) == 130
    assert "--resume continues" in capsys.readouterr().out


def test_evaluation_prompts_reach_the_trainer(tmp_path):
    folder = tmp_path / "run"
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("3\n5\n")
    overrides = [
        f"prompts.eval={held_out}", "evaluation.every=1", "run.iterations=1", f"run.output_dir={folder}", *SHORT,
    ]  # fmt: skip
    assert main(["train", CONFIG, *overrides]) == 0
    metrics = json.loads((folder / "metrics.jsonl").read_text())
    assert 0 <= metrics["eval/readable"] <= 1
    assert list(json.loads((folder / "inputs.json").read_text())) == ["prompts.eval", "pipeline.pretrained"]
    # the file may be read again, but not with other prompts
    held_out.write_text("3\n6\n")
    arguments = ["train", CONFIG, *overrides, "run.iterations=2", "--resume"]
    with pytest.raises(SystemExit):
        main(arguments)
    held_out.write_text("3\n5\n")
    assert main(arguments) == 0


def test_lora_of_a_run_is_exported_without_its_base(tmp_path, capsys):
    folder, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(EXAMPLE / "checkpoint", base)
    overrides = [
        f"pipeline.pretrained={base}", "model.train=lora", "model.lora_rank=4", "model.lora_alpha=2",
        "model.ema_decay=0.5", "run.iterations=1", f"run.output_dir={folder}", *SHORT,
    ]  # fmt: skip
    assert main(["train", CONFIG, *overrides]) == 0
    assert main(["sample", str(folder), "--prompt", "3", "-o", str(tmp_path / "out.png")]) == 0
    shutil.rmtree(base)
    capsys.readouterr()
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "iteration 1, moving average" in said
    assert f"pipeline.load_lora_weights('{tmp_path / 'out'}') loads it" in said
    transformer = SD3Transformer2DModel.from_pretrained(EXAMPLE / "checkpoint" / "transformer")
    transformer.load_lora_adapter(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    assert transformer.peft_config["default_0"].lora_alpha == 2


def test_a_dry_run_reads_no_weights_and_writes_nothing(tmp_path, capsys):
    shutil.copytree(EXAMPLE / "checkpoint", tmp_path / "base", ignore=shutil.ignore_patterns("diffusion*"))
    folder = tmp_path / "run"
    overrides = [f"pipeline.pretrained={tmp_path / 'base'}", f"run.output_dir={folder}", "sampling.eta=0.5"]
    assert main(["train", CONFIG, "--dry-run", *overrides]) == 0
    said = capsys.readouterr().out
    settings, _, plan = said.partition("DigitsPipeline from")
    assert yaml.safe_load(settings)["sampling"]["eta"] == 0.5
    assert "SD3Transformer2DModel" in plan
    assert "full weights, gradients, optimizer" in plan
    assert not folder.exists()


REFUSED = [
    (["sampling.etta=1"], "sampling: got unknown 'etta'"),
    (["pipeline.pretrained=./nowhere"], "pipeline.pretrained: nowhere does not exist"),
    (["prompts.train=nothing.txt"], "prompts.train: nothing.txt does not exist"),
    (["evaluation.every=2"], "evaluation.every: got 2, expected none without prompts.eval"),
    (["sampling.pipeline_kwargs.hight=16"], "sampling.pipeline_kwargs.hight: got 'hight'"),
    (["rewards=[{name: beauty}]"], "rewards[0]: got unknown name 'beauty'"),
    (["rewards=[{callable: 'examples.digits.rewards:Nothing'}]"], "cannot be imported"),
    (["pipeline.callable=examples.digits.nothing:Pipeline"], "pipeline.callable: got"),
    (["run.trackers=[paper]"], "run.trackers: got 'paper', expected some of"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_wrong_is_said_before_weights_are_loaded(tmp_path, capsys, monkeypatch, overrides, message):
    def too_late(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("flowdppo_fast.trainer.recipe.training.load_pipeline", too_late)
    said = refused(capsys, "train", CONFIG, f"run.output_dir={tmp_path / 'run'}", *overrides)
    assert message in said
    assert not (tmp_path / "run").exists()


def test_missing_packages_of_the_trainer_are_named(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    said = refused(capsys, "train", CONFIG)
    assert "peft not installed; pip install 'flowdppo_fast[trainer]'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere", "--prompt", "3", "-o", "x.png"], "nowhere has no complete checkpoint"),
        (["sample", "nowhere", "--prompt", "3", "-o", "x.mp4"], "--output: got x.mp4"),
        (["sample", "nowhere", "--prompt", "3", "--n", "0", "-o", "x.png"], "--n: got 0"),
        (["sample", "nowhere", "--prompt", "3", "--set", "a", "-o", "x.png"], "--set: got 'a', expected key=value"),
        (["export", "nowhere", "-o", "x"], "nowhere has no complete checkpoint"),
        (["train", "nothing.yaml"], "config: nothing.yaml does not exist"),
        (["train", CONFIG, "--resume", "later"], "unrecognized arguments: later"),
        (["export", "nowhere", "-o", "x", "a=1"], "unrecognized arguments: a=1"),
    ],
)
def test_wrong_calls(capsys, arguments, message):
    assert message in refused(capsys, *arguments)
    assert not Path("x.png").exists()


def test_a_real_run_is_diagnosed(tmp_path, small_config, pipes):
    config = small_config(run={"iterations": 2})
    FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config).train()
    folder = diagnose.RunFolder.load(tmp_path / "run")
    assert folder.rows.sizes == [64]
    assert folder.threshold == pytest.approx(1e-5)
    values = diagnose.numbers(folder)
    assert values["rows"] == 2 * 16 * 3 * 2
    assert values["moved_rows"] > 0
    metrics = folder.metrics[-1]
    last = folder.rows.where(folder.rows.iteration == 2)
    assert last.kl.mean() / 64 == pytest.approx(metrics["kl_new_old_mean"], rel=1e-4)
    assert 1 - last.kept.mean() == pytest.approx(metrics["masked_fraction"], abs=1e-6)
