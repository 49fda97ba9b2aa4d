"""What surrounds a run: the caller's state of torch, interruptions in the same process, names and sizes that differ."""

from __future__ import annotations

import contextlib
import itertools
import json

import numpy as np
import pytest
import torch

from flowdppo_fast.cli import main
from flowdppo_fast.runs.row_log import read_rows
from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer
from flowdppo_fast.trainer.pipeline_calls import join_rewards, shared_options
from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.rewards.aesthetic import AestheticScore

PROMPTS = ["3", "8", "1"]


@pytest.fixture
def config(small_config, tmp_path):
    numbers = itertools.count()

    def make(**sections):
        shape = {"num_steps": 4, "sde_steps": [0, 1], "prompts_per_rollout": 2, "group_size": 2}
        usual = {
            "model": {"train": "lora", "lora_rank": 2},
            "sampling": shape,
            "optimizer": {"learning_rate": 0.05, "micro_batch_size": 2, "updates_per_rollout": 2, "inner_epochs": 1},
            "run": {"iterations": 2, "output_dir": str(tmp_path / f"run{next(numbers)}")},
        }
        return small_config(**{name: {**usual.get(name, {}), **sections.get(name, {})} for name in {*usual, *sections}})

    return make


def bright(images, prompts, metadata):
    return images.float().flatten(1).mean(1)


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.weights.parameters])


@contextlib.contextmanager
def defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast switched off": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "defaults": lambda: defaults(torch.float64, "meta"),
}


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_run_is_the_same_in_any_state_of_the_caller(pipes, config, precision):
    """An outer autocast once kept half-precision copies of the weights of the start for the whole run."""

    def run(state):
        pipeline, settings = pipes.digits(), config(model={"mixed_precision": precision})
        with state():
            trainer = FlowDPPOTrainer(pipeline, bright, PROMPTS, settings)
            history = trainer.train()
        return weights_of(trainer), [row["kl_new_old_mean"] for row in history]

    expected, drift = run(contextlib.nullcontext)
    assert all(kl > 0 for kl in drift)
    for name, state in STATES.items():
        found, drifted = run(state)
        assert torch.equal(found, expected), name
        assert drifted == drift, name


def interrupted(trainer, method, error, after):
    """Makes the call number ``after`` of a trainer's method fail."""
    inner, calls = getattr(trainer, method), itertools.count(1)

    def failing(*args, **options):
        result = inner(*args, **options)
        if next(calls) == after:
            raise error
        return result

    setattr(trainer, method, failing)


@pytest.mark.parametrize(
    ("method", "after", "error"),
    [
        ("_micro_batch", 6, RuntimeError("out of memory")),
        ("update", 3, KeyboardInterrupt()),
        ("sample", 2, KeyboardInterrupt()),
        ("_read", 2, RuntimeError("disk full")),
    ],
)
def test_going_on_after_an_interruption_is_never_having_stopped(pipes, config, method, after, error):
    whole = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, config(run={"iterations": 3}))
    norms = [row["grad_norm"] for row in whole.train()]
    trainer = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, config(run={"iterations": 3}))
    interrupted(trainer, method, error, after)
    with pytest.raises(type(error)):
        trainer.train()
    assert [row["grad_norm"] for row in trainer.train(resume=True)] == norms
    assert torch.equal(weights_of(trainer), weights_of(whole))


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("where", ["log", "finish"])
def test_going_on_after_a_tracker_failed_is_never_having_stopped(pipes, config, monkeypatch, after, where):
    pytest.importorskip("tensorboard")
    whole = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, config(run={"iterations": 3}))
    expected = [row["grad_norm"] for row in whole.train()]
    trainer = FlowDPPOTrainer(
        pipes.digits(), bright, PROMPTS, config(run={"iterations": 3, "trackers": ["tensorboard"]})
    )
    calls, log = itertools.count(1), trainer.accelerator.log

    def failing(*args, **options):
        if next(calls) == after:
            raise ConnectionError("the tracker's server is gone")
        log(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator, "log", failing)
        if where == "finish":
            patch.setattr("accelerate.tracking.TensorBoardTracker.finish", failing)
        with pytest.raises(ConnectionError):
            trainer.train()
    assert [row["grad_norm"] for row in trainer.train(resume=True)] == expected
    lines = (trainer.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
    assert torch.equal(weights_of(trainer), weights_of(whole))


@pytest.mark.parametrize("resume", [True, False])
def test_an_interruption_before_the_first_checkpoint_is_told(pipes, config, resume):
    trainer = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, config())
    interrupted(trainer, "update", KeyboardInterrupt(), 1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(RuntimeError, match="no checkpoint to go back to"):
        trainer.train(resume=resume)


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_in_a_folder_is_refused_while_the_first_goes_on(pipes, config, resume):
    settings = config(run={"iterations": 2})
    second = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings)
    refused = []

    def attempt(metrics):
        for method in (lambda: second.train(resume=resume), second.save_checkpoint):
            with pytest.raises(
                ValueError, match=r"is written to by another run \(process \d+ on .*\), expected a folder"
            ):
                method()
            refused.append(metrics["iteration"])

    first = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings)
    assert len(first.train(on_iteration=attempt)) == 2
    assert refused == [1, 1, 2, 2]
    # the first has ended, its folder is free
    assert len(second.train(resume=True)) == 2
    assert not (first.output / ".running.json").exists()


def test_a_folder_with_files_of_others_is_left_alone(pipes, config):
    settings = config()
    trainer = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings)
    trainer.output.mkdir()
    (trainer.output / "config.yaml").write_text("mine: true\n")
    with pytest.raises(ValueError, match=r"has config\.yaml, which no run wrote"):
        trainer.train()
    assert [path.name for path in trainer.output.iterdir()] == ["config.yaml"]
    assert (trainer.output / "config.yaml").read_text() == "mine: true\n"


class OtherNames:
    """A reward whose call number ``number`` returns other names."""

    def __init__(self, number, names):
        self.calls, self.number, self.names = itertools.count(), number, names

    def __call__(self, images, prompts, metadata):
        names = self.names if next(self.calls) == self.number else ("a", "b")
        return {name: bright(images, prompts, metadata) * (1 + (name == "b")) for name in names}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("names", [("a",), ("a", "c"), ("a", "b", "c")])
def test_names_of_rewards_that_change_are_an_error(pipes, config, number, names):
    """Between the calls of a rollout, and between rollouts."""
    settings = config(sampling={"batch_size": 2}, advantage={"history": 4})
    trainer = FlowDPPOTrainer(pipes.digits(), OtherNames(number, names), PROMPTS, settings)
    with pytest.raises(ValueError, match=rf"reward: got the names .* in call {number % 2}, expected \['a', 'b'\]"):
        trainer.train()


def test_the_order_of_names_means_nothing(pipes, config):
    def run(names):
        reward = OtherNames(1, names)
        settings = config(sampling={"batch_size": 2}, advantage={"reward_weights": {"a": 1.0, "b": -3.0}})
        return FlowDPPOTrainer(pipes.digits(), reward, PROMPTS, settings).train()

    assert [row["reward/b"] for row in run(("b", "a"))] == [row["reward/b"] for row in run(("a", "b"))]


class Told:
    """Stands in for the processes of a run: what the others say."""

    def __init__(self, *others):
        self.others, self.count = others, 1 + len(others)

    def gather_objects(self, own):
        return [*self.others, *own]


def test_processes_are_told_who_had_other_names():
    own = [{"b": torch.ones(2), "a": torch.zeros(2)}, {"a": torch.zeros(1), "b": torch.ones(1)}]
    joined = join_rewards(own, Told([["a", "b"]]))
    assert list(joined) == ["a", "b"]
    assert joined["b"].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match=r"\['a', 'b'\] in call 0 of process 1, expected \['a', 'c'\] as in call 0 of"):
        join_rewards(own, Told([["a", "c"]]))


def test_other_prompts_on_resume_are_an_error(pipes, config):
    settings = config(run={"iterations": 1})
    FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings).train()
    settings.run.iterations = 2
    for prompts in (["8", "3", "1"], ["3", "8", "1", "1"], ["3", "8"]):
        with pytest.raises(ValueError, match=rf"prompts: got {len(prompts)}, .* expected its 3 prompts"):
            FlowDPPOTrainer(pipes.digits(), bright, prompts, settings).train(resume=True)
    FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings).train(resume=True)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "micro_batch_size", 1),
        ("optimizer", "steps_per_micro_batch", 1),
        ("sampling", "batch_size", 2),
        ("sampling", "offload_trajectories", True),
        ("model", "offload_idle", True),
    ],
)
def test_after_running_out_of_memory_a_run_goes_on_with_less(pipes, config, section, key, value):
    settings = config(run={"iterations": 1})
    FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings).train()
    setattr(getattr(settings, section), key, value)
    settings.run.iterations = 2
    assert len(FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings).train(resume=True)) == 2


def test_other_settings_of_what_is_computed_are_still_refused(pipes, config):
    settings = config(run={"iterations": 1})
    FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings).train()
    settings.sampling.eta = 0.5
    with pytest.raises(ValueError, match=r"other settings of sampling\.eta"):
        FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, settings).train(resume=True)


def test_nats_and_elements_are_those_of_each_row(pipes, config):
    """Two sizes in one rollout: half of the rows have four times the elements."""
    given = {name: value[0] for name, value in pipes.text_inputs(1).items() if not name.startswith("negative")}
    prompts = [{**given, "height": size, "width": size} for size in (8, 16)]
    settings = config(sampling={"pipeline_kwargs": {"guidance_scale": 1.0}, "output_type": "latent"})
    trainer = FlowDPPOTrainer(pipes.sd3(), bright, prompts, settings)
    history = trainer.train()
    lines = [json.loads(line) for line in (trainer.output / "rows.jsonl").read_text().splitlines()]
    sizes = sorted({line["elements"] for line in lines})
    assert sizes[1] == 4 * sizes[0]
    rows = read_rows(trainer.output / "rows.jsonl")
    second = rows.where(rows.iteration == 1)
    assert history[0]["kl_new_old_nats"] == pytest.approx(float(second.kl.mean()), rel=1e-4)


def test_one_negative_serves_all_prompts_of_a_call():
    given = {"prompt": ["a", "b"]}
    embedded = torch.randn(1, 5, 4)
    with torch.inference_mode():
        made = torch.ones(1, 3)
    options = {"negative_prompt": "x", "negative_prompt_embeds": embedded, "negative_pooled": made, "prompt_2": "y"}
    shared = shared_options(options, given, torch.device("cpu"))
    assert shared["negative_prompt"] == ["x", "x"]
    assert shared["prompt_2"] == "y"
    assert shared["negative_prompt_embeds"].shape == (2, 5, 4)
    assert not shared["negative_pooled"].is_inference()


def test_true_guidance_without_a_negative_is_not_left_off_in_silence(pipes, config):
    given = {name: value[0] for name, value in pipes.text_inputs(1).items() if not name.startswith("negative")}
    settings = config(sampling={"pipeline_kwargs": {"true_cfg_scale": 3.0}})
    with pytest.raises(ValueError, match=r"true_cfg_scale=3\.0 without a negative prompt"):
        FlowDPPOTrainer(pipes.flux(), bright, [given], settings)


@pytest.mark.parametrize(
    "given", [np.arange(2), np.array([0, 1], np.int32), torch.arange(2), range(2), (np.int64(0), np.uint8(1))]
)
def test_lists_of_settings_are_whatever_holds_their_numbers(config, tmp_path, given):
    settings = config(sampling={"sde_steps": given}, run={"output_dir": tmp_path / "a path"})
    assert settings.to_dict()["sampling"]["sde_steps"] == [0, 1]
    assert settings.run.output_dir == str(tmp_path / "a path")
    settings.save(tmp_path / "c.yaml")
    assert FlowDPPOConfig.from_yaml(tmp_path / "c.yaml") == settings


def test_arrays_among_a_pipelines_arguments_stay_arrays(config):
    picture = np.zeros((2, 2), np.uint8)
    assert config(sampling={"pipeline_kwargs": {"image": picture}}).sampling.pipeline_kwargs["image"] is picture


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_prompts_of_two_bytes_a_letter_are_no_prompts(tmp_path, encoding):
    """Without a byte order mark they are valid UTF-8, with a NUL beside each letter."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("three\neight\n".encode(encoding))
    with pytest.raises(ValueError, match=r"prompts\.train: .*prompts\.txt has NUL characters.*expected UTF-8"):
        Recipe.from_dict(
            {"pipeline": {"pretrained": "a/b"}, "prompts": {"train": str(path)}, "rewards": [{"name": "jpeg"}]}
        ).load_prompts()


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(pipes, config, tmp_path, monkeypatch):
    home, here = tmp_path / "häuser und mehr", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    trainer = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, config(run={"output_dir": "~/a run", "iterations": 1}))
    trainer.train()
    trainer.save_pretrained("~/saved")
    assert main(["export", "~/a run", "--output=~/out"]) == 0
    assert main(["diagnose", "~/a run", "--plot=~/plot.png"]) in (0, 1)
    (home / "head.safetensors").touch()
    assert AestheticScore("~/head.safetensors").head_path == home / "head.safetensors"
    # other libraries keep caches there
    there = sorted(path.name for path in home.iterdir() if not path.name.startswith("."))
    assert there == ["a run", "head.safetensors", "out", "plot.png", "saved"]
    assert list(here.iterdir()) == []


def test_prompts_that_cannot_be_counted_are_refused_by_name(pipes, config):
    with pytest.raises(ValueError, match=r"prompts: got <generator .*, expected a non-empty sequence of texts"):
        FlowDPPOTrainer(pipes.digits(), bright, (prompt for prompt in PROMPTS), config())
