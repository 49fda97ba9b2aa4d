"""Tiny pipelines with random weights: diffusers' own, the digits example, and a toy whose guidance can be chosen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from digits_example import EXAMPLE
from torch import nn

from flowdppo_fast.trainer import FlowDPPOConfig


@pytest.fixture(autouse=True)
def ordinary_memory(poisoned_memory):
    """Whole models allocate uninitialised memory for good reasons; the kernels' own tests poison it."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def example_modules(monkeypatch):
    """The example's modules are imported as its scripts import them."""
    monkeypatch.syspath_prepend(str(EXAMPLE))


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def make_sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(1)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    absent = dict.fromkeys(("", "_2", "_3"))
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(),
        **{f"text_encoder{n}": None for n in absent},
        **{f"tokenizer{n}": None for n in absent},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_flux() -> FluxPipeline:
    torch.manual_seed(2)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_digits(layers: int = 2):
    from pipeline import DigitsPipeline

    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=4, in_channels=1, out_channels=1, num_layers=layers, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=11, caption_projection_dim=16, pooled_projection_dim=11,
        pos_embed_max_size=2,
    )  # fmt: skip
    pipeline = DigitsPipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class LabelPipeline(DiffusionPipeline):
    """Class-conditional DiT: integer labels, variance channels after the velocity, guidance from one doubled batch."""

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels, num_inference_steps, guidance_scale, generator, output_type):
        latents = torch.stack([torch.randn(2, 4, 4, generator=one) for one in generator])
        labels = torch.cat([torch.full_like(labels, 10), labels])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.transformer(torch.cat([latents] * 2), t.expand(len(labels)), class_labels=labels).sample
            uncond, cond = output.chunk(2)
            velocity = (uncond + guidance_scale * (cond - uncond)).chunk(2, dim=1)[0]
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        return latents


def make_dit() -> LabelPipeline:
    torch.manual_seed(5)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10, norm_elementwise_affine=False,
    )  # fmt: skip
    return LabelPipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler())


def text_inputs(rows: int) -> dict[str, torch.Tensor]:
    """Random embeddings in place of text encoders."""
    shapes = {"prompt_embeds": (5, 16), "pooled_prompt_embeds": (16,)}
    return {f"{sign}{name}": torch.randn(rows, *shape) for sign in ("", "negative_") for name, shape in shapes.items()}


def generators(rows: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(rows)]


class ToyTransformer(nn.Module):
    """Tokens ``[B, L, C]``, a shift per row and a time in, tokens out."""

    # pipelines ask for it
    dtype = torch.float32

    def __init__(self, channels: int = 6):
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, hidden_states, timestep, shift, return_dict=True):
        return (torch.tanh(self.mix(hidden_states) + shift[:, None] + timestep[:, None, None] / 1000),)


class ToyPipeline(DiffusionPipeline):
    """Tokens without a decoder; ``combine`` is everything between transformer and scheduler."""

    def __init__(self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, combine, rows=3, num_inference_steps=6, calls=1, tokens=4, reference=0, in_place=False):
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(rows, tokens, 6, generator=generator)
        shifts = torch.randn(calls, rows, 6, generator=generator)
        extra = torch.randn(rows, reference, 6, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            # without reference tokens the transformer is given the very tensor that is written to below
            inputs = torch.cat([latents, extra], dim=1) if reference else latents
            outputs = [self.transformer(inputs, timestep=t.expand(rows), shift=shift)[0] for shift in shifts]
            following = self.scheduler.step(combine(*outputs), t, latents, return_dict=False)[0]
            if in_place:
                latents.copy_(following)
            else:
                latents = following
        return latents


def make_toy() -> ToyPipeline:
    torch.manual_seed(4)
    return ToyPipeline(ToyTransformer(), FlowMatchEulerDiscreteScheduler())


class RelayPipeline(DiffusionPipeline):
    """Tokens; a second transformer takes over after two steps."""

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, shift, num_inference_steps, generator, output_type, return_dict):
        latents = torch.stack([torch.randn(4, 6, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for place, t in enumerate(self.scheduler.timesteps):
            transformer = self.transformer if place < 2 else self.transformer_2
            velocity = transformer(latents, timestep=t.expand(len(latents)), shift=shift)[0]
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        return (latents,)


def make_relay() -> RelayPipeline:
    torch.manual_seed(6)
    return RelayPipeline(ToyTransformer(), ToyTransformer(), FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="session")
def pipes() -> SimpleNamespace:
    """Builders of the pipelines above."""
    return SimpleNamespace(
        sd3=make_sd3,
        flux=make_flux,
        digits=make_digits,
        dit=make_dit,
        toy=make_toy,
        text_inputs=text_inputs,
        generators=generators,
    )


@pytest.fixture
def small_config(tmp_path):
    """Settings of a run of seconds; keyword arguments are sections that override some of them."""

    def make(**sections) -> FlowDPPOConfig:
        values = {
            "model": {"train": "full"},
            "sampling": {"num_steps": 6, "sde_steps": [0, 1, 2], "prompts_per_rollout": 4, "group_size": 4},
            "optimizer": {"learning_rate": 1e-3, "micro_batch_size": 8, "inner_epochs": 2},
            "run": {
                "iterations": 3,
                "output_dir": str(tmp_path / "run"),
                "checkpoint_every": 1,
                "progress": False,
                "plot_every": 0,
            },
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return FlowDPPOConfig.from_dict(values)

    return make
