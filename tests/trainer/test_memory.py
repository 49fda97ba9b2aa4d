"""Stored bytes, trajectories on the host, idle components, memory that does not grow, and estimates."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer, memory

ROWS, STEPS, TOKENS = 16, 3, 5


def sd3_settings(**sections):
    """Settings of the small SD3: 16 rows and 3 steps of 4 x 8 x 8 latents without guidance."""
    sampling = {"pipeline_kwargs": {"height": 8, "width": 8, "guidance_scale": 1.0}, "noise": "seeded"}
    return {**sections, "sampling": {**sampling, **sections.get("sampling", {})}}


def sd3_prompts(pipes, tokens=TOKENS):
    torch.manual_seed(0)
    return [{"prompt_embeds": torch.randn(tokens, 16), "pooled_prompt_embeds": torch.randn(16)} for _ in range(2)]


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


def sd3_trainer(pipes, small_config, **sections):
    config = small_config(**sd3_settings(run={"row_log": False}, **sections))
    return FlowDPPOTrainer(pipes.sd3(), bright, sd3_prompts(pipes), config)


def test_bytes_are_those_of_the_memory_and_shared_memory_counts_once():
    x = torch.zeros(10, 4)
    assert memory.stored_bytes([x, x, {"part": x[2:3]}, [(x.view(-1), "text", None)]]) == 160
    # a view keeps all of its storage
    assert memory.stored_bytes([x[:1]]) == 160
    assert memory.stored_bytes([x, torch.zeros(3, dtype=torch.float64), nn.Linear(9, 9)]) == 184
    # neighbours in memory are not the same memory
    assert memory.stored_bytes([torch.zeros(0), torch.zeros(1)]) == 4


@pytest.mark.parametrize("noise", ["seeded", "stored"])
def test_bytes_of_a_trajectory_are_velocities_noise_and_arguments(pipes, small_config, noise):
    trainer = sd3_trainer(pipes, small_config, sampling={"noise": noise, "batch_size": 8})
    metrics = trainer._iterate()
    latent = 4 * 8 * 8 * 4
    per_step = 2 * latent + (latent if noise == "stored" else 8)
    prompt = 4 * (TOKENS * 16 + 16)
    # timesteps and the like are a few bytes per step; what rows of one prompt share may be kept once
    assert STEPS * per_step < metrics["trajectory_bytes"] <= STEPS * (per_step + 32) + prompt


class FakeDevice:
    """Copies in place of moves, which remember what they were given."""

    def __init__(self, monkeypatch):
        self.sources, self.moved, self.fetched = [], set(), 0
        monkeypatch.setattr(memory, "_to_host", self.to_host)
        monkeypatch.setattr(memory, "_to_device", self.to_device)

    def to_host(self, tensor):
        self.sources.append(weakref.ref(tensor.untyped_storage()))
        copy = tensor.clone()
        self.moved.add(copy.untyped_storage()._cdata)
        return copy

    def to_device(self, tensor, device):
        assert device == torch.device("cpu")
        self.fetched += tensor.nbytes
        return tensor.clone()


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("noise", ["seeded", "stored"])
def test_trajectories_on_the_host_give_the_same_weights_and_leave_nothing_behind(
    pipes, small_config, monkeypatch, noise
):
    settings = {"sampling": {"noise": noise, "batch_size": 8}, "model": {"train": "lora"}}
    results = []
    for offloaded in (False, True):
        settings["sampling"]["offload_trajectories"] = offloaded
        trainer = sd3_trainer(pipes, small_config, **settings)
        with monkeypatch.context() as patch:
            fake = FakeDevice(patch)
            metrics = trainer._iterate()
            rollout = trainer.sample(5)
            gc.collect()
            alive = [source for source in fake.sources if source() is not None]
            if offloaded:
                assert len(fake.sources) > 20
                assert not alive, "the device keeps what was moved to the host"
                velocity = rollout.trajectories[0].velocity
                assert velocity.untyped_storage()._cdata in fake.moved
                # a micro-batch asks for its own rows and steps only: 4 of 8 rows, 1 of 3 steps
                before, whole = fake.fetched, memory.stored_bytes(rollout.trajectories)
                trainer.recorder.replay(rollout.trajectories[0], range(4), range(1, 2))
                rollout.trajectories[0].select(range(4), range(1, 2))
                assert 0 < fake.fetched - before < whole / 4
            else:
                assert not fake.sources
                assert not fake.fetched
        results.append((metrics, [p.detach().clone() for p in trainer.weights.parameters]))
    (plain, expected), (moved, weights) = results
    assert all(torch.equal(a, b) for a, b in zip(weights, expected))
    changed = {key for key in plain if plain[key] != moved[key] and not key.startswith(("seconds", "samples_per"))}
    assert not changed


@pytest.mark.gpu
def test_trajectories_leave_the_gpu(pipes, small_config):
    results = []
    for offloaded in (False, True):
        trainer = sd3_trainer(
            pipes, small_config, model={"train": "lora"}, sampling={"offload_trajectories": offloaded}
        )
        metrics = trainer._iterate()
        trajectory = trainer.sample(5).trajectories[0]
        assert trajectory.velocity.is_pinned() == offloaded
        assert trainer.recorder.replay(trajectory, range(4)).is_cuda
        results.append((metrics["grad_norm"], [p.detach().clone() for p in trainer.weights.parameters]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


@pytest.mark.parametrize("offloaded", [False, True])
def test_idle_components_come_for_the_rollout_and_leave_for_the_updates(pipes, small_config, monkeypatch, offloaded):
    trainer = sd3_trainer(pipes, small_config, model={"offload_idle": offloaded})
    moves = []
    vae, transformer = trainer.pipeline.vae, trainer.pipeline.transformer
    for name, module in (("vae", vae), ("transformer", transformer)):
        monkeypatch.setattr(module, "to", lambda where, name=name: moves.append((name, str(where))))
    decode, update = vae.decode, trainer.update
    monkeypatch.setattr(vae, "decode", lambda *a, **k: moves.append("decode") or decode(*a, **k))
    monkeypatch.setattr(trainer, "update", lambda *a, **k: moves.append("update") or update(*a, **k))
    # on a GPU the two devices differ; here their names do
    trainer.device = torch.device("cpu", 0)
    trainer._iterate()
    arrive, leave = ([("vae", "cpu:0")], [("vae", "cpu")]) if offloaded else ([], [])
    assert moves == [*arrive, "decode", *leave, *["update"] * 4]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _live() -> tuple[int, int]:
    """How many tensors there are, and the bytes behind them."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(tensors), memory.stored_bytes(tensors)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_over_iterations(pipes, small_config):
    config = small_config(
        **sd3_settings(
            model={"train": "lora", "ema_decay": 0.9},
            sampling={"noise": "stored", "batch_size": 8, "offload_trajectories": True},
            advantage={"history": 4},
            run={"iterations": 30, "checkpoint_every": 100, "plot_every": None},
        )
    )
    trainer = FlowDPPOTrainer(pipes.sd3(), bright, sd3_prompts(pipes), config)
    resident, live = [], []

    def look(metrics):
        resident.append(_resident())
        if metrics["iteration"] in (5, 30):
            live.append(_live())

    trainer.train(on_iteration=look)
    assert live[0] == live[1]
    # the allocator takes and gives back pages as it likes; half a megabyte an iteration would be a leak
    assert max(resident[20:]) - max(resident[:10]) < 20 * 2**19


class Chain(nn.Module):
    """Doubles its input ``layers`` times; ``x * x`` keeps every input for the backward, ``x * 2`` none."""

    def __init__(self, layers: int, square: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, device="meta"))
        self.layers, self.square = layers, square

    def forward(self, x, return_dict=True):
        x = x * self.scale
        for _ in range(self.layers):
            x = x * x if self.square else x * 2
        return (x,)


@pytest.mark.parametrize("layers", [1, 5])
def test_replay_counts_what_is_alive_at_the_same_time(layers):
    x = torch.empty(8, 4, device="meta")
    size = x.nbytes
    # with nothing to keep, whatever the length: the output and its gradient, two gradients on the way, the weight's
    assert memory.replay_bytes(Chain(layers, False), {"x": x}) == 4 * size + 16
    # all inputs are kept, and in the backward the two halves of a gradient and their sum come on top
    kept = memory.replay_bytes(Chain(layers, True), {"x": x})
    assert (layers + 1) * size <= kept <= (layers + 5) * size + 16
    # two calls keep twice as much until their common backward
    both = memory.replay_bytes(Chain(layers, True), {"x": x}, calls=2)
    assert (layers + 1) * size * 2 <= both <= kept + (layers + 2) * size


def test_attention_counts_as_a_kernel_without_scores():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), device="meta"))

        def forward(self, x, return_dict=True):
            x = x * self.scale
            return (nn.functional.scaled_dot_product_attention(x, x, x),)

    length, width = 512, 8
    x = torch.empty(1, 2, length, width, device="meta")
    found = memory.replay_bytes(Attention(), {"x": x})
    assert found < 8 * x.nbytes < 2 * length * length * 4
    # and afterwards attention is itself again
    y = torch.randn(1, 2, 4, 8)
    expected = torch.softmax(y @ y.mT / 8**0.5, -1) @ y
    torch.testing.assert_close(nn.functional.scaled_dot_product_attention(y, y, y), expected)


def small_transformer():
    with torch.device("meta"):
        return SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=16,
        )  # fmt: skip


def arguments_of(rows):
    shapes = {
        "hidden_states": (4, 32, 32), "encoder_hidden_states": (TOKENS, 16), "pooled_projections": (16,), "timestep": ()
    }  # fmt: skip
    return {name: torch.empty(rows, *shape, device="meta") for name, shape in shapes.items()}


def estimated(**sections):
    sections["sampling"] = {"sde_steps": [0, 1, 2], "prompts_per_rollout": 2, "group_size": 4} | sections.get(
        "sampling", {}
    )
    config = FlowDPPOConfig.from_dict(sections)
    return memory.estimate(config, small_transformer(), arguments_of, weights=1000, trajectory=100.0, idle=7000)


def test_each_lever_lowers_its_part_of_the_estimate_and_no_other():
    plain = estimated()
    parts = ("weights", "trained", "ema", "reference", "activations", "trajectories", "idle")
    assert plain["update"] == sum(plain[name] for name in parts)
    assert plain["trajectories"] == 800
    assert plain["rollout"] == plain["update"] - plain["activations"]

    def changed(**sections):
        other = estimated(**sections)
        return {name: (plain[name], other[name]) for name in plain if plain[name] != other[name]}

    assert changed(model={"offload_idle": True}).keys() == {"idle", "host", "update"}
    assert changed(sampling={"offload_trajectories": True})["host"] == (0, 800)
    before, after = changed(model={"gradient_checkpointing": True})["activations"]
    # six blocks, of which one is computed at a time
    assert after < before / 3
    before, after = changed(optimizer={"steps_per_micro_batch": 1})["activations"]
    assert after == pytest.approx(before / 3, rel=0.1)
    before, after = changed(optimizer={"micro_batch_size": 4})["activations"]
    assert after == pytest.approx(before / 2, rel=0.1)
    assert changed(model={"ema_decay": 0.9})["ema"] == (0, plain["trained"] // 4)
    before, after = changed(model={"lora_rank": 16})["trained"]
    assert after == before / 2


def test_adapters_in_float32_cost_activations_without_autocast():
    found = []
    for precision in ("no", "bf16"):
        config = FlowDPPOConfig.from_dict({"model": {"mixed_precision": precision}})

        def half(rows):
            return {name: value.to(torch.bfloat16) for name, value in arguments_of(rows).items()}

        found.append(memory.estimate(config, small_transformer().to(torch.bfloat16), half, weights=0))
    assert found[0]["trained"] == found[1]["trained"]
    assert found[0]["activations"] > 1.2 * found[1]["activations"]


def test_trained_bytes_are_those_of_the_run(pipes, small_config):
    for train in ("lora", "full"):
        trainer = sd3_trainer(pipes, small_config, model={"train": train, "ema_decay": 0.5})
        trainer._iterate()
        weights = trainer.weights
        held = [*weights.parameters, *(p.grad for p in weights.parameters), *weights.ema.averages]
        held += [value for state in trainer.optimizer.adamw.state.values() for value in state.values() if value.ndim]
        module = pipes.sd3().transformer.to("meta")
        guess = memory.estimate(trainer.config, module, arguments_of, weights=0, activations=0)
        assert guess["trained"] + guess["ema"] == memory.stored_bytes(held)
        assert guess["activations"] == 0
