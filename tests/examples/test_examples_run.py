"""The examples run from beginning to end in short, learn on their fixed seeds, and leave what they say they leave."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

EXAMPLES = Path(__file__).parents[2] / "examples"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_again(module, folder: Path, *arguments: str) -> list[dict[str, float]]:
    """The history of a second start, which must not train anything."""
    before = (folder / "metrics.jsonl").read_bytes()
    history = module.main(["--output", str(folder), *arguments])
    assert (folder / "metrics.jsonl").read_bytes() == before
    return history


def test_finetune_makes_what_tiny_models_draw_brighter(tmp_path, capsys, learning):
    # on held-out prompts and seeds; one model alone is too near to its noise, together they gain 0.0334, sd 0.0085 over
    # eight seeds (FLOWDPPO_LEARNING_SEEDS=8)
    learning.check(sum(finetuned(name, tmp_path / name, capsys) for name in ("sd3", "flux", "wan")), 0)


def finetuned(architecture: str, folder: Path, capsys) -> float:
    """Runs the example on a tiny model, looks at all that it leaves, and returns what it gained."""
    finetune = importlib.import_module("finetune")
    history = finetune.main(["--architecture", architecture, "--iterations", "8", "--output", str(folder)])
    assert lines(folder) == history
    assert all(math.isfinite(m["loss"]) and m["nonfinite_rows"] == 0 for m in history)
    # half of the updates begin where the rollout was drawn
    assert all(m["ratio_moved_fraction"] >= 0.5 for m in history)
    said = capsys.readouterr().out
    for name in ("metrics.png", "images", "final"):
        assert str(folder / name) in said
        assert (folder / name).exists()
    pipeline = getattr(importlib.import_module("tiny_models"), architecture)()
    # diffusers reads what was trained
    adapter = str(folder / "final" / "transformer")
    pipeline.transformer.load_lora_adapter(adapter, use_safetensors=True)
    trained = [p for name, p in pipeline.transformer.named_parameters() if "lora_B" in name]
    assert trained
    assert all(weight.any() for weight in trained)
    return history[-1]["eval_final/reward"] - history[0]["eval/reward"]


def test_finetune_takes_released_weights_from_a_folder(tmp_path, capsys):
    finetune, tiny_models = (importlib.import_module(name) for name in ("finetune", "tiny_models"))
    tiny_models.wan().save_pretrained(tmp_path / "model")
    arguments = ["--architecture", "wan", "--model", str(tmp_path / "model"), "--size", "16", "--iterations", "1"]
    (metrics,) = finetune.main([*arguments, "--output", str(tmp_path / "run")])
    assert math.isfinite(metrics["eval_final/reward"])
    config = (tmp_path / "run" / "config.yaml").read_text()
    # what is for released weights was taken, and what is for the tiny ones was not
    assert "mixed_precision: bf16" in config
    assert "max_sequence_length" not in config
    with pytest.raises((OSError, ValueError), match="nowhere"):
        finetune.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "other")])


@pytest.mark.slow
def test_finetune_on_two_processes_does_what_one_does(tmp_path):
    """Started by the command that its docstring gives."""
    finetune = importlib.import_module("finetune")
    command = re.search(r"accelerate launch (.*) examples/finetune.py$", finetune.__doc__, re.MULTILINE)[1]
    arguments = ["--iterations", "2", "--output", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *command.split()]
    launched = subprocess.run(
        [*launch, "examples/finetune.py", *arguments], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    # the other process says nothing
    assert launched.stdout.count("brightness of held-out prompts") == 1
    one = finetune.main(["--iterations", "2", "--output", str(tmp_path / "one")])
    two = run_again(finetune, tmp_path / "two", "--iterations", "2")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        # the same rows in other batches: rounding, which updates enlarge
        assert b["reward"] == pytest.approx(a["reward"], abs=1e-5)
        assert b["rows"] == a["rows"]


def test_custom_reward_logs_every_name_and_trains_on_the_weighted_ones(tmp_path, capsys, learning):
    example = importlib.import_module("custom_reward")
    history = example.main(["--iterations", "8", "--output", str(tmp_path)])
    assert {f"reward/{name}" for name in example.WEIGHTS} == {n for n in history[0] if n.startswith("reward/")}

    def total(m, prefix):
        return sum(weight * m[f"{prefix}/{name}"] for name, weight in example.WEIGHTS.items())

    for m in history:
        assert m["reward"] == pytest.approx(total(m, "reward"), abs=1e-5)
    # before the first iteration, every fifth, and after the last
    assert ["eval/warm" in m for m in history] == [True, False, False, False, False, True, False, False]
    # over eight seeds (FLOWDPPO_LEARNING_SEEDS=8): 0.0241, sd 0.0046
    learning.check(total(history[-1], "eval_final") - total(history[0], "eval"), 2e-3)
    assert "as bright as asked" in capsys.readouterr().out


def test_custom_reward_reads_the_metadata():
    look = importlib.import_module("custom_reward").Look()
    images = torch.full((2, 3, 8, 8), 0.5)
    images[:, 0] = 0.8
    named = look(images, ["a", "b"], [{"brightness": 0.6}, {"brightness": 0.4}])
    assert named["as bright as asked"].tolist() == pytest.approx([0.0, -0.2], abs=1e-6)
    assert named["warm"].tolist() == pytest.approx([0.3, 0.3])


@pytest.fixture
def toy():
    return importlib.import_module("loss_in_your_loop")


def test_both_doors_of_the_loss_give_one_gradient(toy):
    torch.manual_seed(0)
    model = toy.Velocity()
    rollout = toy.sample(model, 16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.bend[2].weight.normal_(std=0.05)
    found = {}
    for name, door in toy.DOORS.items():
        model.zero_grad()
        out = door(model, rollout, 1e-3)
        out.loss.backward()
        found[name] = model.bend[0].weight.grad.clone(), out.rows
    (a, rows), (b, others) = found.values()
    assert a.abs().max() > 0
    # means are differences of states, in float32
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
    assert torch.equal(rows.kept, others.kept)
    assert 0 < rows.kept.sum() < rows.kept.numel()


def test_the_flow_that_the_toy_starts_from_draws_standard_normal_numbers(toy):
    rollout = toy.sample(toy.Velocity(), 400, torch.Generator().manual_seed(1))
    # rewards are -mean((x - pattern)**2) over 32 numbers, x ~ N(0, 1), pattern of +-1: -2 on average
    assert float(rollout.rewards.mean()) == pytest.approx(-2.0, abs=0.1)


@pytest.mark.parametrize("door", ["velocity", "means"])
def test_a_loop_of_ones_own_learns_through_either_door(toy, door, capsys, learning, monkeypatch):
    monkeypatch.setattr(toy, "SEED", learning.seed)
    history = toy.main(["--door", door, "--iterations", "20"])
    # over eight seeds (FLOWDPPO_LEARNING_SEEDS=8): 1.18, sd 0.052
    learning.check(history[-1]["reward"] - history[0]["reward"], 0.5)
    assert max(m["masked_fraction"] for m in history) > 0
    assert "iteration  20" in capsys.readouterr().out


def test_custom_objective_has_a_right_gradient_and_learns_beside_the_built_in_one(toy, capsys, learning, monkeypatch):
    monkeypatch.setattr(toy, "SEED", learning.seed)
    example = importlib.import_module("custom_objective")
    assert example.check_gradient() < 1e-7
    histories = example.main(["--iterations", "20"])
    for name, history in histories.items():
        # over eight seeds (FLOWDPPO_LEARNING_SEEDS=8): 1.16 and 1.18, sd 0.046 and 0.052
        learning.check(history[-1]["reward"] - history[0]["reward"], 0.5, name)
    assert "gradient against finite differences" in capsys.readouterr().out
    # a stronger pull keeps the policy closer
    kl = {s: example.main(["--iterations", "4", "--strength", str(s)])["smooth KL"][-1] for s in (0.1, 100.0)}
    assert kl[100.0]["kl_new_old_mean"] < kl[0.1]["kl_new_old_mean"]


@pytest.mark.bits(across="again")
def test_a_tiny_model_hears_its_prompt_and_survives_a_folder(tmp_path):
    """What the examples rely on: another prompt is another picture, and the latents decide most of it."""
    pipeline = importlib.import_module("tiny_models").sd3()
    call = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 24, "num_inference_steps": 2}

    def draw(pipe: DiffusionPipeline, prompt: str, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, generator=generator, output_type="pt", return_dict=False, **call)[0]

    picture = draw(pipeline, "a tram")
    assert not torch.equal(picture, draw(pipeline, "a fox"))
    assert (picture - draw(pipeline, "a tram", 1)).abs().mean() > 0.05
    pipeline.save_pretrained(tmp_path)
    # weights that lie elsewhere in memory may be multiplied with other roundings
    torch.testing.assert_close(draw(DiffusionPipeline.from_pretrained(tmp_path), "a tram"), picture, atol=1e-5, rtol=0)
