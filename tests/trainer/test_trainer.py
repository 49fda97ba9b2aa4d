"""Training runs of seconds: learning, exact resume, checkpoints, metrics, skipped updates, and no host syncs."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from digits_example import PROMPTS, ink
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from flowdppo_fast.objectives import OwnRule
from flowdppo_fast.trainer import FlowDPPOTrainer, checkpoint
from flowdppo_fast.trainer.advantages import advantages_of, group_advantages


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.pipeline.transformer.named_parameters()}


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in metrics.items() if not k.startswith(("seconds", "samples_per"))} for metrics in history]


OBJECTIVES = ["dppo", "dppo_symmetric", "ratio_clip", "grpo_guard", "unclipped"]
PULLS = ["kl_penalty", "drpo", "drpo_ratio", "log_hinge"]


@pytest.mark.parametrize(
    ("objective", "train"), [*itertools.product(OBJECTIVES, ["lora", "full"]), *itertools.product(PULLS, ["full"])]
)
def test_every_objective_raises_the_reward(pipes, small_config, learning, objective, train):
    # bounds that drop some rows and let a few iterations on 64 pixels move
    threshold, clip = (3e-4, 5e-3) if train == "lora" else (1e-2, 0.05)
    bounds = {
        **{name: {"clip_low": clip, "clip_high": clip} for name in ("ratio_clip", "grpo_guard")}, "unclipped": {},
        "kl_penalty": {"penalty": 0.5}, "drpo": {"threshold": 2.0}, "drpo_ratio": {}, "log_hinge": {"clip_high": clip},
    }  # fmt: skip
    drops = objective not in ("unclipped", "kl_penalty", "drpo", "drpo_ratio")
    config = small_config(
        model={"train": train},
        objective={"name": objective, **bounds.get(objective, {"threshold": threshold})},
        # adapters at 0.02 often lose what they have gained
        optimizer={"learning_rate": 0.005 if train == "lora" else 0.002, "micro_batch_size": 16},
        sampling={"prompts_per_rollout": 4, "group_size": 8},
        run={"iterations": 12},
    )
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    before = weights_of(trainer)
    history = trainer.train()
    first, last = (sum(m["reward"] for m in part) / 3 for part in (history[:3], history[-3:]))
    # over eight seeds (FLOWDPPO_LEARNING_SEEDS=8): LoRA 2.9 to 3.1, sd 0.31 to 0.35; full 10.2 to 12.0, sd 1.4 to 1.7
    learning.check((last - first) / history[0]["reward_std"], 1.0 if train == "lora" else 4.0)
    assert any(m["masked_fraction"] > 0 for m in history) == drops
    changed = {name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ("lora" in name) == (train == "lora") and name in changed}
    assert len(changed) >= 8
    # of the four updates per rollout, all but the first see moved ratios
    assert history[-1]["ratio_moved_fraction"] == pytest.approx(0.75, abs=0.05)
    assert all(m["replay_log_ratio_max"] < 1e-5 for m in history)


def far_rows_count_nothing(row):
    """An objective of one's own: that of the symmetric ablation."""
    surrogate = -row.advantage * row.ratio
    return row.far, 0.0, surrogate, surrogate


def even_diffusion(sigma, sigma_next, eta, schedule):
    """The same standard deviation in every step."""
    return 0.3 * eta / (sigma - sigma_next) ** 0.5


def test_objectives_and_samplers_of_ones_own(pipes, small_config, tmp_path):
    """By name in the settings, or handed over: as the built-in one does that says the same."""

    folders = (tmp_path / str(number) for number in range(4))

    def history(objective, given=None, sampler="flow_sde"):
        config = small_config(
            objective=objective, sampling={"sampler": sampler}, optimizer={"learning_rate": 0.01},
            run={"iterations": 2, "output_dir": str(next(folders))},
        )  # fmt: skip
        return FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config, objective=given).train()

    own = {"callable": f"{__name__}:far_rows_count_nothing", "threshold": 1e-5}
    built_in = history({"name": "dppo_symmetric", "threshold": 1e-5})
    named = history(own)
    given = history({}, OwnRule(far_rows_count_nothing, threshold=1e-5))
    assert named[-1]["masked_fraction"] > 0.0
    assert without_times(named) == without_times(given)
    # another backend: C++ has no rule of one's own
    for ours, theirs in zip(named, built_in, strict=True):
        for metric in ("reward", "masked_fraction", "policy_loss", "kl_new_old_mean"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-3, abs=1e-6), metric
    even = history({"threshold": 1e-5}, sampler=f"{__name__}:even_diffusion")
    assert even[0]["reward"] != built_in[0]["reward"]


def test_the_mask_fires_and_its_metrics_agree(pipes, small_config):
    config = small_config(objective={"threshold": 1e-5}, optimizer={"learning_rate": 0.01}, run={"iterations": 4})
    history = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config).train()
    assert any(m["masked_fraction"] > 0 for m in history)
    for m in history:
        assert m["masked_fraction"] == pytest.approx(m["pos_rm_fraction"] + m["neg_rm_fraction"], abs=1e-6)
        assert m["masked_fraction"] <= m["kl_mask_fraction"]
        assert m["kl_new_old_nats"] == pytest.approx(m["kl_new_old_mean"] * 64)
        assert m["rows"] == 4 * 4 * 3 * 2


def test_settings_of_sd3_with_embeddings_guidance_a_reference_and_several_rewards(pipes, small_config):
    def two(images, prompts, metadata):
        assert images.shape == (4, 3, 8, 8)
        assert prompts == ["one"] * 2 + ["two"] * 2 or set(prompts) <= {"one", "two"}
        assert {entry["weight"] for entry in metadata} <= {1, 2}
        return {"ink": images.mean((1, 2, 3)), "red": images[:, 0].mean((1, 2))}

    prompts = [
        {
            **{name: value[0] for name, value in pipes.text_inputs(1).items()},
            "text": text,
            "metadata": {"weight": weight},
        }
        for text, weight in (("one", 1), ("two", 2))
    ]
    config = small_config(
        model={"train": "lora", "lora_rank": 4, "gradient_checkpointing": True, "ema_decay": 0.9},
        sampling={
            "pipeline_kwargs": {"guidance_scale": 3.5, "height": 8, "width": 8},
            "batch_size": 4, "sde_steps_per_rollout": 2, "noise": "stored", "sampler": "cps",
        },
        advantage={"reward_weights": {"red": 0.5}, "per_reward": True, "std": "global"},
        objective={"kl_weight": 0.1, "threshold": 1e-4},
    )  # fmt: skip
    trainer = FlowDPPOTrainer(pipes.sd3(), two, prompts, config)
    history = trainer.train()
    assert trainer.replay_check.rule == "b0 + 3.5*(b1 - b0)"
    # the adapter starts as the identity, then moves away from the reference
    assert 0 <= history[0]["kl_ref_mean"] < history[-1]["kl_ref_mean"]
    assert history[0]["reward"] == pytest.approx(history[0]["reward/ink"] + 0.5 * history[0]["reward/red"], rel=1e-5)
    trainer.save_pretrained(trainer.output / "final")
    fresh = pipes.sd3().transformer
    fresh.load_lora_adapter(str(trainer.output / "final" / "transformer"), use_safetensors=True)
    own = dict(zip(trainer.weights.names, trainer.weights.ema.averages))
    for name, parameter in fresh.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, own["transformer." + name.replace("default_0", "default")])


def test_full_weights_are_saved_as_diffusers_loads_them(pipes, small_config):
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config())
    trainer.train()
    trainer.save_pretrained(trainer.output / "final")
    loaded = SD3Transformer2DModel.from_pretrained(trainer.output / "final" / "transformer")
    assert all(torch.equal(p, weights_of(trainer)[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_trains_float32_weights(pipes, small_config, precision, dtype):
    config = small_config(model={"mixed_precision": precision}, optimizer={"learning_rate": 1e-4})
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    seen = set()
    trainer.pipeline.transformer.proj_out.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    history = trainer.train()
    assert seen == {dtype}
    assert {p.dtype for p in trainer.weights.parameters} == {torch.float32}
    assert all(m["grad_norm"] > 0 and m["skipped_updates"] == 0 for m in history)


@pytest.mark.bits(across="process")
@pytest.mark.parametrize("killed_in", ["reward", "checkpoint"])
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(pipes, small_config, monkeypatch, killed_in, tmp_path):
    settings = {"model": {"train": "lora", "ema_decay": 0.8}, "sampling": {"sde_steps_per_rollout": 2}}

    def noisy(images, prompts, metadata):
        # a reward that draws: the global generator belongs to what a resume restores
        return ink(images, prompts, metadata) + 0.01 * torch.rand(len(prompts))

    def make(folder, reward, iterations=5):
        config = small_config(
            **settings, run={"iterations": iterations, "output_dir": str(tmp_path / folder), "checkpoint_every": 2}
        )
        return FlowDPPOTrainer(pipes.digits(), reward, PROMPTS, config)

    whole = make("whole", noisy)
    torch.manual_seed(0)
    expected = whole.train()

    calls, renames = [], []

    def dies_in_its_fourth_call(images, prompts, metadata):
        calls.append(1)
        if killed_in == "reward" and len(calls) == 4:
            raise KeyboardInterrupt
        return noisy(images, prompts, metadata)

    def dies_in_its_second_rename(source, target, replace=checkpoint.os.replace):
        renames.append(1)
        if killed_in == "checkpoint" and len(renames) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    broken = make("broken", dies_in_its_fourth_call)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", dies_in_its_second_rename)
        with pytest.raises(KeyboardInterrupt):
            broken.train()
    folder = tmp_path / "broken" / "checkpoints"
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["iteration-000002"]
    logged = len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines())
    assert logged == (3 if killed_in == "reward" else 4), "more was logged than the checkpoint has"

    resumed = make("broken", noisy)
    torch.manual_seed(99)
    history = resumed.train(resume=True)
    assert without_times(history) == without_times(expected)
    assert [m["iteration"] for m in history] == [1, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed).values(), weights_of(whole).values()))
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights.ema.averages, whole.weights.ema.averages))
    last = [
        load_file(tmp_path / name / "checkpoints/iteration-000005/optimizer.safetensors")
        for name in ("whole", "broken")
    ]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def test_half_written_checkpoints_are_ignored_and_old_ones_removed(pipes, small_config):
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(run={"keep_checkpoints": 2}))
    trainer.train()
    folder = trainer.output / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["iteration-000002", "iteration-000003"]
    # no state file; a file that its state names is missing; an unfinished temporary folder
    (folder / "iteration-000007").mkdir()
    (folder / "iteration-000003" / "weights.safetensors").unlink()
    (folder / ".writing-iteration-000009").mkdir()
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["iteration-000002"]
    assert (
        not list(trainer.output.rglob("*.pkl"))
        + list(trainer.output.rglob("*.bin"))
        + list(trainer.output.rglob("*.pt"))
    )


def test_folders_of_other_runs_are_refused(pipes, small_config):
    FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config()).train()
    with pytest.raises(ValueError, match="holds a run already"):
        FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config()).train()
    other = small_config(sampling={"eta": 0.3}, run={"iterations": 9})
    with pytest.raises(ValueError, match=r"other settings of sampling\.eta, expected the same"):
        FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, other).train(resume=True)


def test_metrics_file_and_config_copy(pipes, small_config):
    config = small_config()
    seen = []

    def read_back(metrics):
        # flushed before anybody is told
        seen.append(json.loads((trainer.output / "metrics.jsonl").read_text().splitlines()[-1]))
        assert seen[-1] == metrics

    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    assert trainer.train(on_iteration=read_back) == seen
    assert type(config).from_yaml(trainer.output / "config.yaml") == config
    expected = {"reward", "kl_new_old_mean", "masked_fraction", "ratio_moved_fraction", "grad_norm", "nonfinite_rows"}
    assert expected <= seen[0].keys()


def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run(pipes, small_config, monkeypatch):
    calls = []

    def sometimes_nan(*arguments, **options):
        # a reward cannot do it: one that is not finite is an error of its own
        calls.append(1)
        return advantages_of(*arguments, **options) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr("flowdppo_fast.trainer.trainer.advantages_of", sometimes_nan)
    config = small_config(optimizer={"max_skipped_updates": 3})
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    at = []

    def keep(metrics):
        at.append((weights_of(trainer), [s["step"].item() for s in trainer.optimizer.adamw.state.values()], metrics))

    # two epochs of two updates are skipped in the second iteration, one more than allowed
    with pytest.raises(RuntimeError, match="4 updates were skipped"):
        trainer.train(on_iteration=keep)
    (before, steps, _), (after, steps_after, metrics) = at
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(steps) == set(steps_after) == {4.0}
    assert metrics["skipped_updates"] == 4
    assert metrics["nonfinite_rows"] > 0


class CountSyncs(TorchDispatchMode):
    """Counts what would wait for a GPU: a number read on the host, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_updates_do_not_wait_for_the_device(pipes, small_config, name):
    pipeline = getattr(pipes, name)()
    arguments = {} if name == "digits" else {"height": 8, "width": 8, "guidance_scale": 2.0}
    prompts = PROMPTS if name == "digits" else [{k: v[0] for k, v in pipes.text_inputs(1).items()}]
    config = small_config(model={"train": "lora", "ema_decay": 0.9}, sampling={"pipeline_kwargs": arguments})
    trainer = FlowDPPOTrainer(pipeline, ink, prompts, config)
    trainer.train()
    rollout = trainer.sample(3)
    # as on a GPU, where looking for gradients that are zero would be a sync
    trainer._looks = False
    with CountSyncs() as counter:
        trainer.update(rollout, range(16), number=0)
    assert counter.found == []
    trainer._looks = True
    with CountSyncs() as counter:
        trainer.update(rollout, range(16), number=1)
    assert counter.found == ["_local_scalar_dense"] * 2


@pytest.mark.bits(across="again")
def test_a_backward_without_gradient_is_skipped_and_changes_nothing(pipes, small_config, monkeypatch):
    results = []
    for free in (True, False):
        trainer = FlowDPPOTrainer(
            pipes.digits(),
            lambda images, *_: ink(images, *_).round(),
            PROMPTS,
            small_config(run={"output_dir": "unused"}),
        )
        trainer._looks = free
        rollout = trainer.sample(0)
        # half of the micro-batches has no advantage
        rollout.advantages = torch.tensor([1.0, -1.0] * 4 + [0.0] * 8)
        trainer.update(rollout, range(16), number=0)
        results.append(weights_of(trainer))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_one_large_call_and_several_small_ones_sample_the_same(pipes, small_config):
    rollouts = [
        FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(sampling={"batch_size": size})).sample(1)
        for size in (None, 8, 2)
    ]
    assert [len(r.trajectories) for r in rollouts] == [1, 2, 8]
    for other in rollouts[1:]:
        # the same draws; matrix products of other sizes round otherwise
        torch.testing.assert_close(other.rewards["reward"], rollouts[0].rewards["reward"], rtol=1e-4, atol=1e-5)
    assert torch.equal(rollouts[0].advantages, group_advantages(rollouts[0].rewards["reward"], 4))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: got"),
        ("seven", {}, "prompts: got 'seven'"),
        ([{"prompt": "1"}, {"text": "2"}], {}, "entry 1 has the keys"),
        ([{"caption": "1"}], {}, "DigitsPipeline takes no argument 'caption'"),
        (PROMPTS, {"pipeline_kwargs": {"true_cfg_scale": 2}}, "takes no argument 'true_cfg_scale'"),
    ],
)
def test_prompts_and_arguments_are_checked_before_weights_are_touched(pipes, small_config, prompts, options, message):
    pipeline = pipes.digits()
    state = {name: p.requires_grad for name, p in pipeline.transformer.named_parameters()}
    with pytest.raises(ValueError, match=message):
        FlowDPPOTrainer(pipeline, ink, prompts, small_config(model={"train": "lora"}, sampling=options))
    assert {name: p.requires_grad for name, p in pipeline.transformer.named_parameters()} == state


def test_the_row_log_says_what_happened_to_every_row(pipes, small_config):
    config = small_config(
        objective={"threshold": 1e-5}, optimizer={"learning_rate": 0.01}, run={"iterations": 2},
        sampling={"batch_size": 4},
    )  # fmt: skip
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    history = trainer.train()
    lines = [json.loads(line) for line in (trainer.output / "rows.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["update"]) for line in lines] == [(i, u) for i in (1, 2) for u in range(4)]
    for metrics in history:
        mine = [line for line in lines if line["iteration"] == metrics["iteration"]]
        assert all(line["steps"] == [0, 1, 2] and line["elements"] == 64 for line in mine)
        # two updates an epoch, each with half of the 16 rows
        assert sorted(mine[0]["rows"] + mine[1]["rows"]) == sorted(mine[2]["rows"] + mine[3]["rows"]) == list(range(16))
        kl, kept, log_ratio = (
            torch.tensor([line[name] for line in mine], dtype=torch.float64) for name in ("kl", "kept", "log_ratio")
        )
        assert kl.shape == (4, 8, 3)
        assert float(kl.mean()) == pytest.approx(metrics["kl_new_old_mean"], rel=1e-5)
        assert 1 - float(kept.mean()) == pytest.approx(metrics["masked_fraction"], abs=1e-6)
        assert float(log_ratio[0].abs().max()) < 1e-5 < float(log_ratio[1:].abs().max())
        # a dropped row is beyond the threshold and moves on in the direction of its advantage
        advantage = torch.tensor([line["advantage"] for line in mine])[..., None]
        assert torch.equal(kept == 0, (kl >= 1e-5) & (advantage * log_ratio > 0))
    assert any(0 in row for line in lines for row in line["kept"])


def test_the_row_log_can_be_left_out_and_follows_a_resume(pipes, small_config):
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(run={"iterations": 2}))
    trainer.train()
    path = trainer.output / "rows.jsonl"
    whole = path.read_text()
    later = json.loads(whole.splitlines()[-1]) | {"iteration": 3}
    path.write_text(whole + json.dumps(later) + "\n" + '{"iteration": 3, "upd')
    FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(run={"iterations": 2})).train(resume=True)
    assert path.read_text() == whole
    path.unlink()
    FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(run={"iterations": 3, "row_log": False})).train(
        resume=True
    )
    assert not path.exists()


def test_same_latents_are_those_of_a_group_and_only_of_it(pipes, small_config, monkeypatch):
    settings = {"prompts_per_rollout": 2, "group_size": 4, "batch_size": 2}
    drawn: dict[bool, list[int]] = {}
    for same in (True, False):
        trainer = FlowDPPOTrainer(
            pipes.digits(),
            ink,
            PROMPTS,
            small_config(sampling={**settings, "same_latents": same}, run={"iterations": 1}),
        )
        seeds = drawn.setdefault(same, [])
        images = trainer.calls.images
        monkeypatch.setattr(
            trainer.calls, "images", lambda *a, images=images, seeds=seeds: seeds.extend(a[2]) or images(*a)
        )
        first = trainer.sample(0).trajectories
        assert len(first) == 4
    assert len(set(drawn[False])) == 8
    assert [drawn[True].index(seed) // 4 for seed in drawn[True]] == [0] * 4 + [1] * 4
    assert len(set(drawn[True])) == 2


def test_the_share_of_the_noise_is_small_where_there_is_little_noise(pipes, small_config, tmp_path):
    def run(name: str, **sampling) -> tuple[float, list[dict]]:
        config = small_config(
            sampling={"prompts_per_rollout": 8, "group_size": 8, **sampling}, optimizer={"micro_batch_size": 64},
            run={"iterations": 2, "output_dir": str(tmp_path / name)},
        )  # fmt: skip
        trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
        return trainer.noise_share(), trainer.train()

    much, history = run("much", eta=1.0, measure_noise_share=True)
    little, plain = run("little", eta=0.01)
    assert 0 < little < 0.01 < 0.1 < much < 2
    assert history[0]["noise_share"] == much
    assert "noise_share" not in history[1]
    assert "noise_share" not in plain[0]
    # what is measured leaves no trace in the run
    again = run("again", eta=1.0)[1]
    without = [{k: v for k, v in m.items() if k != "noise_share"} for m in without_times(history)]
    assert without == without_times(again)
