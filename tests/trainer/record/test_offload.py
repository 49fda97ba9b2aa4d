"""Stored bytes, trajectories on the host, idle components, and memory that does not grow."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from sd3_example import STEPS, TOKENS, bright, sd3_prompts, sd3_settings, sd3_trainer
from torch import nn

from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.record import offload as memory


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
