"""What is trained: pipelines with random weights at real or small dimensions, and the settings of an iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from flowdppo_fast.trainer import FlowDPPOConfig

# the published recipe: 10 denoising steps of which 3 in the first half are trained, two optimizer steps per rollout.
# Step 0 is not among them because the formulas of the eager contender have no limit at sigma = 1
_NUM_STEPS, _SDE_STEPS, _UPDATES = 10, (1, 2, 3), 2


@dataclass(frozen=True)
class Workload:
    """One model and the size of an iteration.

    Args:
        name: as in results.
        device: ``"cpu"`` or ``"cuda"``.
        pipeline: ``"sd3"`` or ``"flux"``.
        transformer: settings of the transformer's class, as in its published config.
        dtype: of weights and latents.
        side: of the images, in pixels.
        tokens: of the prompt.
        prompts, group_size, micro_batch_size: see :class:`FlowDPPOConfig`.
        checkpointing: gradient checkpointing.
        free_bytes: device memory that must be free for it to be tried.
    """

    name: str
    device: str
    pipeline: str
    transformer: dict[str, Any]
    dtype: torch.dtype
    side: int
    tokens: int
    prompts: int
    group_size: int
    micro_batch_size: int
    checkpointing: bool = False
    free_bytes: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Images per iteration."""
        return self.prompts * self.group_size

    def build_transformer(self, device: torch.device | str) -> torch.nn.Module:
        """The transformer with its own random initialisation, made where it lives."""
        kind = SD3Transformer2DModel if self.pipeline == "sd3" else FluxTransformer2DModel
        with torch.device(device), _default_dtype(self.dtype):
            torch.manual_seed(0)
            return kind(**self.transformer).to(self.dtype)

    def build_pipeline(self, device: torch.device | str) -> Any:
        """The pipeline without text encoders and VAE."""
        # transformers of diffusers keep sine tables as plain attributes on the device they were made on
        transformer = self.build_transformer(device)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=self.pipeline == "flux")
        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        if self.pipeline == "sd3":
            absent |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
            return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **absent)
        return FluxPipeline(transformer=transformer, scheduler=scheduler, **absent)

    def prompt_list(self) -> list[dict[str, Any]]:
        """Random embeddings in place of encoded texts."""
        config, generator = self.transformer, torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        return [
            {
                "prompt_embeds": draw(self.tokens, config["joint_attention_dim"]),
                "pooled_prompt_embeds": draw(config["pooled_projection_dim"]),
                "text": str(number),
            }
            for number in range(self.prompts)
        ]

    def config(self, output_dir: str) -> FlowDPPOConfig:
        """Settings of the trainer."""
        return FlowDPPOConfig.from_dict(
            {
                "model": {"train": "lora", "lora_rank": 32, "gradient_checkpointing": self.checkpointing},
                "sampling": {
                    "num_steps": _NUM_STEPS,
                    "sde_steps": list(_SDE_STEPS),
                    "prompts_per_rollout": self.prompts,
                    "group_size": self.group_size,
                    "output_type": "latent",
                    "pipeline_kwargs": {"height": self.side, "width": self.side, **self.options},
                    "background_rewards": False,
                },
                "optimizer": {"updates_per_rollout": _UPDATES, "micro_batch_size": self.micro_batch_size},
                "run": {
                    "output_dir": output_dir,
                    "device": "cpu" if self.device == "cpu" else "auto",
                    "row_log": False,
                    "progress": False,
                },
            }
        )

    def describe(self) -> dict[str, Any]:
        """What a result says about the workload."""
        return {
            "name": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "side": self.side,
            "prompt_tokens": self.tokens,
            "samples": self.samples,
            "group_size": self.group_size,
            "num_steps": _NUM_STEPS,
            "trained_steps": list(_SDE_STEPS),
            "updates": _UPDATES,
            "micro_batch_size": self.micro_batch_size,
            "gradient_checkpointing": self.checkpointing,
            "transformer": {key: list(v) if isinstance(v, tuple) else v for key, v in self.transformer.items()},
        }


SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX1_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL_SD3 = {
    **SD35_MEDIUM,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 96,
    "caption_projection_dim": 96,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
}
_CPU = {"device": "cpu", "pipeline": "sd3", "dtype": torch.float32, "options": {"guidance_scale": 1.0}}
_GPU = {"device": "cuda", "dtype": torch.bfloat16, "side": 512}
WORKLOADS = (
    Workload(
        "sd3-small", transformer=SMALL_SD3, side=512, tokens=77, prompts=2, group_size=2, micro_batch_size=2, **_CPU
    ),
    Workload(
        "sd35-medium", pipeline="sd3", transformer=SD35_MEDIUM, tokens=333, prompts=2, group_size=4,
        micro_batch_size=4, free_bytes=70e9, options={"guidance_scale": 1.0}, **_GPU,
    ),
    Workload(
        "flux1-dev", pipeline="flux", transformer=FLUX1_DEV, tokens=512, prompts=2, group_size=2,
        micro_batch_size=2, checkpointing=True, free_bytes=60e9, options={"guidance_scale": 3.5}, **_GPU,
    ),
)  # fmt: skip
# a model of no size, to walk through everything in seconds
TINY = Workload(
    "tiny",
    transformer={
        **SMALL_SD3, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
        "caption_projection_dim": 16, "pooled_projection_dim": 8, "dual_attention_layers": (0,),
    },
    side=64, tokens=5, prompts=2, group_size=2, micro_batch_size=2, **_CPU,
)  # fmt: skip


def select(names: list[str], device: str) -> list[Workload]:
    """Workloads by name, or ``default``: those of ``device``.

    Raises:
        ValueError: an unknown name, or a workload of another device.
    """
    known = {workload.name: workload for workload in (*WORKLOADS, TINY)}
    if names == ["default"]:
        return [workload for workload in WORKLOADS if workload.device == device]
    for name in names:
        if name not in known or known[name].device != device:
            fitting = ", ".join(repr(w.name) for w in known.values() if w.device == device)
            raise ValueError(f"workloads: got {name!r}, expected some of {fitting} on {device!r}, or 'default'")
    return [known[name] for name in names]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
