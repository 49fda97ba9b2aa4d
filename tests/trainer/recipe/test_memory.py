"""What a run needs of a device's memory, computed before it starts."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from sd3_example import TOKENS, sd3_trainer
from torch import nn

from flowdppo_fast.trainer import FlowDPPOConfig
from flowdppo_fast.trainer.recipe import memory
from flowdppo_fast.trainer.record.offload import stored_bytes


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
    return memory.estimate_memory(config, small_transformer(), arguments_of, weights=1000, trajectory=100.0, idle=7000)


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


def test_adapters_in_float32_cost_activations_beside_weights_in_bfloat16():
    found = []
    for precision in ("no", "bf16"):
        config = FlowDPPOConfig.from_dict({"model": {"mixed_precision": precision}})

        def half(rows):
            return {name: value.to(torch.bfloat16) for name, value in arguments_of(rows).items()}

        found.append(memory.estimate_memory(config, small_transformer().to(torch.bfloat16), half, weights=0))
    # 16 bytes, and 2 of the copy
    assert found[1]["trained"] / found[0]["trained"] == 18 / 16
    assert found[0]["activations"] > 1.2 * found[1]["activations"]


def test_trained_bytes_are_those_of_the_run(pipes, small_config):
    for train in ("lora", "full"):
        trainer = sd3_trainer(pipes, small_config, model={"train": train, "ema_decay": 0.5})
        trainer._iterate()
        weights = trainer.weights
        held = [*weights.parameters, *(p.grad for p in weights.parameters), *weights.ema.averages]
        held += [value for state in trainer.optimizer.adamw.state.values() for value in state.values() if value.ndim]
        module = pipes.sd3().transformer.to("meta")
        guess = memory.estimate_memory(trainer.config, module, arguments_of, weights=0, activations=0)
        assert guess["trained"] + guess["ema"] == stored_bytes(held)
        assert guess["activations"] == 0
