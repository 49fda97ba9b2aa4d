"""Models by their published shapes: bytes per trajectory and peak memory, computed and not measured.

A trajectory is recorded from the pipeline's own call with a transformer that does almost nothing, on tensors of the
real shapes. Peak memory is :func:`flowdppo_fast.trainer.recipe.memory.estimate_memory` of the real transformer on the
meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from flowdppo_fast.trainer import FlowDPPOConfig, TrajectoryRecorder
from flowdppo_fast.trainer.recipe.memory import estimate_memory
from flowdppo_fast.trainer.record.trajectory import trajectory_bytes

from .table import markdown
from .workloads import FLUX1_DEV, SD35_MEDIUM, default_dtype

# the published recipes train three steps and score groups of 16 or more; a group shares its prompt
_STEPS, _GROUP = (1, 2, 3), 4
_BF16 = torch.bfloat16
_WAN = {
    "patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One published model and how its pipeline is called.

    Args:
        name: as in the tables.
        pipeline, kind: names of the pipeline's and the transformer's class in diffusers.
        transformer: settings of the transformer, as in its published config.
        prompts: shape of each embedding argument of one prompt.
        call: further arguments of the call.
        what: the call in words.
        idle: parameters of text encoders and VAE, from the published weights.
        absent: components of the pipeline that a call with embeddings does not need.
        scheduler: settings of the flow-matching scheduler.
        calls: transformer calls per velocity.
    """

    name: str
    pipeline: str
    kind: str
    transformer: dict[str, Any]
    prompts: dict[str, tuple[int, ...]]
    call: dict[str, Any]
    what: str
    idle: float
    absent: tuple[str, ...]
    scheduler: dict[str, Any] = field(default_factory=lambda: {"shift": 3.0})
    calls: int = 1

    def build(self) -> nn.Module:
        """The transformer in bfloat16, without memory for its weights."""
        with torch.device("meta"), default_dtype(_BF16):
            return getattr(diffusers, self.kind)(**self.transformer)

    def record(self, rows: int) -> tuple[Any, dict[str, Any]]:
        """The trajectory of ``rows`` samples of one prompt, and the arguments of the last transformer call."""
        stand_in = _StandIn(self.build().config)
        components: dict[str, Any] = dict.fromkeys(self.absent)
        if self.pipeline == "Flux2KleinPipeline":
            # asks its VAE for the scale of latents even where they are what is wanted
            components["vae"] = _ScaleOnly()
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler)
        pipeline = getattr(diffusers, self.pipeline)(transformer=stand_in, scheduler=scheduler, **components)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        embeddings = {}
        for name, shape in self.prompts.items():
            one = torch.ones(shape, dtype=torch.bool)
            if not name.endswith("mask"):
                one = torch.randn(shape, generator=generator).to(_BF16)
            embeddings[name] = one.expand(rows, *shape)
        # the numbers of a first step at sigma = 1 do not matter here; three neighbours stand for any three
        # the stand-in's outputs are no function of its arguments
        with TrajectoryRecorder(pipeline, checks=False).recording(_STEPS) as trajectory, torch.no_grad():
            pipeline(
                **embeddings,
                **self.call,
                num_inference_steps=5,
                generator=[torch.Generator().manual_seed(row) for row in range(rows)],
                output_type="latent",
            )
        return trajectory, stand_in.seen


class _Component(nn.Module):
    """What pipelines ask of their components."""

    def __init__(self, config: Any):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=_BF16))
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        return self.scale.device


class _StandIn(_Component):
    """Has a transformer's settings and argument shapes, and gives back half of its input."""

    seen: Mapping[str, Any]

    def cache_context(self, *arguments: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor]:
        self.seen = {"hidden_states": hidden_states, **arguments}
        return (hidden_states * 0.5,)


class _ScaleOnly(_Component):
    def __init__(self) -> None:
        super().__init__(SimpleNamespace(block_out_channels=(1, 1, 1, 1), batch_norm_eps=1e-4))
        self.bn = nn.BatchNorm2d(128, affine=False)


_ENCODERS_3 = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
_SQUARE = {"height": 512, "width": 512}
_VIDEO = {"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 5.0}
_DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}
_TEXT = {"prompt_embeds": (512, 4096), "negative_prompt_embeds": (512, 4096)}

MODELS = (
    Model(
        "SD3.5-medium", "StableDiffusion3Pipeline", "SD3Transformer2DModel", SD35_MEDIUM,
        {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}, {**_SQUARE, "guidance_scale": 1.0},
        "512x512, no guidance", 4.762e9 + 0.695e9 + 0.124e9 + 0.084e9, _ENCODERS_3,
    ),
    Model(
        "FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel", FLUX1_DEV,
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}, {**_SQUARE, "guidance_scale": 3.5},
        "512x512, distilled guidance", 4.762e9 + 0.123e9 + 0.084e9, _ENCODERS_3[:5], _DYNAMIC,
    ),
    Model(
        "FLUX.2-klein-base-9B", "Flux2KleinPipeline", "Flux2Transformer2DModel",
        {
            "in_channels": 128, "num_layers": 8, "num_single_layers": 24, "attention_head_dim": 128,
            "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False,
        },
        {"prompt_embeds": (512, 12288)}, {**_SQUARE, "guidance_scale": 1.0},
        "512x512, no guidance", 8.191e9 + 0.084e9, ("vae", "text_encoder", "tokenizer"), _DYNAMIC,
    ),
    Model(
        "Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel",
        {"in_channels": 64, "out_channels": 16, "num_layers": 60, "joint_attention_dim": 3584},
        {
            "prompt_embeds": (256, 3584), "prompt_embeds_mask": (256,),
            "negative_prompt_embeds": (256, 3584), "negative_prompt_embeds_mask": (256,),
        },
        {**_SQUARE, "true_cfg_scale": 4.0}, "512x512, true CFG 4, 256 prompt tokens", 8.292e9 + 0.127e9,
        ("vae", "text_encoder", "tokenizer"), _DYNAMIC, 2,
    ),
    Model(
        "Wan2.1-T2V-1.3B", "WanPipeline", "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, _TEXT, _VIDEO,
        "480x832, 81 frames, guidance 5", 5.681e9 + 0.127e9, ("vae", "text_encoder", "tokenizer"), calls=2,
    ),
    Model(
        "Wan2.1-T2V-14B", "WanPipeline", "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}, _TEXT, _VIDEO,
        "480x832, 81 frames, guidance 5", 5.681e9 + 0.127e9, ("vae", "text_encoder", "tokenizer"), calls=2,
    ),
)  # fmt: skip


def trajectories_table() -> str:
    """Bytes kept per sample, model by model."""
    rows = []
    for model in MODELS:
        trajectory, _ = model.record(_GROUP)
        kept = trajectory_bytes([trajectory])
        elements = trajectory.velocity.shape[2:].numel()
        velocity = len(_STEPS) * elements * trajectory.velocity.element_size()
        # float32 means and next latents instead of velocities
        means = kept - velocity + len(_STEPS) * elements * 8
        rows.append(
            [
                model.name, model.what, f"{elements:,}", f"{velocity / 1e6:.2f}", f"{(kept - velocity) / 1e6:.2f}",
                f"{kept / 1e6:.2f}", f"{means / 1e6:.2f}",
            ]
        )  # fmt: skip
    header = (
        "model", "call", "elements per latent", "velocities MB", "call arguments MB", "kept per sample MB",
        "with float32 means and next latents MB",
    )  # fmt: skip
    return markdown(header, rows)


@dataclass(frozen=True)
class Setting:
    """One row of the peak-memory table: settings, and bytes per frozen weight of a linear layer."""

    name: str
    linear_bytes: float = 2.0
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


_LEVERS: dict[str, dict[str, Any]] = {
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "one step per backward": {"optimizer": {"steps_per_micro_batch": 1}},
    "idle and trajectories on the host": {
        "model": {"offload_idle": True}, "sampling": {"offload_trajectories": True}
    },
}  # fmt: skip


def settings() -> list[Setting]:
    """The levers one after the other, each on top of those before it."""
    rows = [Setting("LoRA, bfloat16 weights")]
    sections: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "sampling": {}}
    for name, changes in _LEVERS.items():
        sections = {section: {**values, **changes.get(section, {})} for section, values in sections.items()}
        rows.append(Setting(f"+ {name}", **sections))
    # half a byte, and a float32 scale per block of 64
    rows.append(Setting("+ 4-bit weights (NF4)", 0.5 + 4 / 64, **sections))
    return rows


def peak_table(models: Sequence[Model] = MODELS, say: Callable[[str], None] = lambda line: None) -> str:
    """Estimated bytes of an update and of a rollout's end, model by model and setting by setting."""
    rows = []
    for model in models:
        kept = trajectory_bytes([model.record(_GROUP)[0]])
        _, seen = model.record(1)
        known: dict[tuple, int] = {}
        for setting in settings():
            sizes = _estimate(model, setting, kept, seen, known)
            say(f"{model.name}, {setting.name}: {sizes['update'] / 1e9:.1f} GB")
            names = ("weights", "trained", "activations", "trajectories", "idle", "update", "rollout")
            rows.append([model.name, setting.name, *(f"{sizes[name] / 1e9:.2f}" for name in names)])
    header = (
        "model", "setting", "frozen weights", "LoRA, gradients, Adam", "activations", "trajectories",
        "text encoders, VAE", "update, GB", "end of rollout, GB",
    )  # fmt: skip
    return markdown(header, rows)


def _estimate(
    model: Model, setting: Setting, kept: float, seen: Mapping[str, Any], known: dict[tuple, int]
) -> dict[str, int]:
    """:func:`estimate_memory` of one row; settings that do not change the activations share them in ``known``."""
    module = model.build()
    linear = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
    rest = sum(p.numel() for p in module.parameters()) - linear
    config = FlowDPPOConfig.from_dict(
        {
            "model": {"lora_rank": 32, "mixed_precision": "bf16", **setting.model},
            "sampling": {"sde_steps": list(_STEPS), "prompts_per_rollout": 2, "group_size": 8, **setting.sampling},
            "optimizer": {"micro_batch_size": 1, **setting.optimizer},
        }
    )
    key = (config.model.gradient_checkpointing, config.optimizer.steps_per_micro_batch)
    sizes = estimate_memory(
        config,
        module,
        lambda rows: {name: _repeated(value, rows) for name, value in seen.items() if name != "return_dict"},
        weights=round(linear * setting.linear_bytes + rest * 2),
        trajectory=kept,
        idle=round(model.idle * 2),
        calls=model.calls,
        activations=known.get(key),
    )
    known[key] = sizes["activations"]
    return sizes


def _repeated(value: Any, rows: int) -> Any:
    """A row-wise argument with that many rows on the meta device; position ids are shared."""
    if isinstance(value, list) and len(value) == 1:
        return value * rows
    if not isinstance(value, Tensor):
        return value
    value = value.to("meta")
    per_row = value.ndim > 0 and len(value) == 1
    return value.expand(rows, *value.shape[1:]).contiguous() if per_row else value
