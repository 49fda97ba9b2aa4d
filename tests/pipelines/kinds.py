"""Pipelines that do something between model and scheduler that no other here does: one case per kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedMixGuidance

from flowdppo_fast.trainer.record.recorder import TrajectoryRecorder
from flowdppo_fast.trainer.record.trajectory import Trajectory

from .cases import generators
from .tiny import (
    MASK,
    Family,
    Sizes,
    absent,
    ltx2,
    pictures,
    plain_vae,
    sana,
    sana_text,
    sd3,
    signed,
    text,
    text_of,
    wan_vae,
    z_image,
    z_text,
)


@dataclass(frozen=True)
class Kind:
    """A pipeline and how to call it.

    Attributes:
        odd: what no other pipeline does.
        options: further arguments of the call.
        steps: the chosen ones of six.
        rows: prompts of the call.
    """

    odd: str
    family: Family
    options: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (1, 2)
    rows: int = 4

    def recorded(self, pipeline: Any = None) -> tuple[TrajectoryRecorder, Trajectory, Callable[[], Any]]:
        """A recording of a call of the tiny pipeline, and the call."""
        sizes, pipeline = self.family.tiny, pipeline or self.family.pipeline()
        video = "num_frames" in inspect.signature(pipeline.__call__).parameters

        @torch.no_grad()
        def call() -> Any:
            torch.manual_seed(0)
            return pipeline(
                **self.family.inputs(sizes, self.rows), **(sizes.video if video else sizes.image), **self.options,
                num_inference_steps=6, generator=generators(self.rows), output_type="latent",
            )  # fmt: skip

        recorder = TrajectoryRecorder(pipeline)
        with recorder.recording(self.steps, seed=11) as trajectory:
            call()
        return recorder, trajectory, call


def lumina_next(sizes: Sizes) -> diffusers.LuminaPipeline:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=sizes.height // 8, in_channels=sizes.channels, hidden_size=24, num_layers=sizes.blocks,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, cross_attention_dim=sizes.text, learn_sigma=True,
    )  # fmt: skip
    return diffusers.LuminaPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        **absent("vae", "text_encoder", "tokenizer"),
    )  # fmt: skip


def prx_pixel(sizes: Sizes) -> diffusers.PRXPixelPipeline:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=3, patch_size=8, context_in_dim=sizes.text, hidden_size=16, mlp_ratio=2.0, num_heads=2,
        depth=sizes.blocks, axes_dim=[4, 4], bottleneck_size=8,
    )  # fmt: skip
    return diffusers.PRXPixelPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **absent("text_encoder", "tokenizer"),
    )  # fmt: skip


def joyimage(sizes: Sizes) -> diffusers.JoyImageEditPipeline:
    transformer = diffusers.JoyImageEditTransformer3DModel(
        in_channels=sizes.channels, hidden_size=16, num_attention_heads=2, text_dim=sizes.text, mlp_width_ratio=2.0,
        num_layers=sizes.blocks, rope_dim_list=[2, 2, 4],
    )  # fmt: skip
    return diffusers.JoyImageEditPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=wan_vae(sizes.channels),
        **absent("text_encoder", "tokenizer", "processor"),
    )  # fmt: skip


def hunyuan_image(sizes: Sizes) -> diffusers.HunyuanImagePipeline:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=sizes.channels, out_channels=sizes.channels, num_attention_heads=2, attention_head_dim=16,
        num_layers=sizes.blocks, num_single_layers=sizes.blocks, num_refiner_layers=sizes.blocks, mlp_ratio=2.0,
        text_embed_dim=sizes.text, text_embed_2_dim=sizes.text, rope_axes_dim=(8, 8),
    )  # fmt: skip
    guider = AdaptiveProjectedMixGuidance(
        guidance_scale=3.0, adaptive_projected_guidance_scale=4.0, adaptive_projected_guidance_rescale=2.0,
        adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_start_step=2,
    )  # fmt: skip
    return diffusers.HunyuanImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), guider=guider, ocr_guider=guider,
        **absent("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )  # fmt: skip


def hunyuan_image_text(sizes: Sizes, prompts: int) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        made = {}
        for end in ("", "_2"):
            made[f"prompt_embeds{end}"] = torch.randn(prompts, sizes.tokens, sizes.text, dtype=sizes.dtype)
            made[f"prompt_embeds_mask{end}"] = torch.ones(prompts, sizes.tokens, dtype=torch.long)
        return made

    return signed(make)


def hidream(sizes: Sizes) -> diffusers.HiDreamImagePipeline:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=sizes.channels, out_channels=sizes.channels, num_layers=sizes.blocks,
        num_single_layers=sizes.blocks, attention_head_dim=8, num_attention_heads=2, text_emb_dim=sizes.pooled,
        caption_channels=[sizes.text, sizes.text], num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1], force_inference_output=True,
    )  # fmt: skip
    encoders = [f"{kind}{end}" for kind in ("text_encoder", "tokenizer") for end in ("", "_2", "_3", "_4")]
    pipeline = diffusers.HiDreamImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, **absent(*encoders)
    )
    # it makes images of this area, whatever is asked for
    pipeline.default_sample_size = sizes.height // 8
    return pipeline


def hidream_text(sizes: Sizes, prompts: int) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        return {
            "prompt_embeds_t5": torch.randn(prompts, sizes.tokens, sizes.text, dtype=sizes.dtype),
            # layers first
            "prompt_embeds_llama3": torch.randn(2, prompts, sizes.tokens, sizes.text, dtype=sizes.dtype),
            "pooled_prompt_embeds": torch.randn(prompts, sizes.pooled, dtype=sizes.dtype),
        }

    return signed(make)


def sd3_control(residuals: int) -> Callable[[Sizes], Any]:
    def build(sizes: Sizes) -> Any:
        base = sd3(replace(sizes, blocks=2))
        side = sizes.height // 8
        controlnet = diffusers.SD3ControlNetModel(
            sample_size=side, in_channels=sizes.channels, num_layers=residuals, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=sizes.text, caption_projection_dim=16,
            pooled_projection_dim=sizes.pooled, out_channels=sizes.channels, pos_embed_max_size=side,
        )  # fmt: skip
        return diffusers.StableDiffusion3ControlNetPipeline(
            **{**base.components, "vae": plain_vae(sizes.channels), "controlnet": controlnet}
        )

    return build


def control_text(sizes: Sizes, prompts: int) -> dict[str, Any]:
    return {**text(sizes, prompts, pooled=True), "control_image": pictures(sizes, prompts)}


def sana_pag(sizes: Sizes) -> diffusers.SanaPAGPipeline:
    base = sana()(replace(sizes, blocks=2))
    return diffusers.SanaPAGPipeline(**base.components, pag_applied_layers="transformer_blocks.1")


def z_image_control(sizes: Sizes) -> diffusers.ZImageControlNetPipeline:
    base = z_image(sizes)
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=sizes.channels, dim=32,
        n_refiner_layers=sizes.blocks, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    return diffusers.ZImageControlNetPipeline(
        **{**base.components, "vae": plain_vae(sizes.channels), "controlnet": controlnet}
    )


def z_control_text(sizes: Sizes, prompts: int) -> dict[str, Any]:
    return {**z_text(sizes, prompts), "control_image": pictures(sizes, prompts)}


def ltx2_whole(sizes: Sizes) -> diffusers.LTX2Pipeline:
    """With what normalizes its latents at the end."""
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=sizes.channels, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 3,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
    )  # fmt: skip
    sound = diffusers.AutoencoderKLLTX2Audio(ch_mult=(1,), num_res_blocks=1)
    return diffusers.LTX2Pipeline(**{**ltx2(sizes).components, "vae": vae, "audio_vae": sound})


def helios(sizes: Sizes) -> diffusers.HeliosPipeline:
    transformer = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=sizes.channels, out_channels=sizes.channels,
        text_dim=sizes.text, freq_dim=16, ffn_dim=16, num_layers=sizes.blocks, rope_dim=(4, 4, 4),
    )  # fmt: skip
    return diffusers.HeliosPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=wan_vae(sizes.channels),
        **absent("text_encoder", "tokenizer"),
    )  # fmt: skip


BINNED = {"use_resolution_binning": False}
LINES = {
    f"{kind}{name}": value
    for kind in ("", "audio_")
    for name, value in (("guidance_scale", 3.0), ("stg_scale", 0.0), ("modality_scale", 1.0), ("guidance_rescale", 0.0))
}
CLIP = Sizes(height=64, width=64, frames=17)
KINDS = {
    "lumina-next": Kind(
        "guidance on three of the channels, the learned variance cut off", Family(lumina_next, text_of(mask=MASK)),
        {"guidance_scale": 4.0},
    ),
    "prx-pixel": Kind(
        "the transformer gives the clean image",
        Family(prx_pixel, lambda s, n: {**text(s, n, mask=MASK), **BINNED}, tiny=Sizes(height=32, width=32)),
        {"guidance_scale": 1.0},
    ),
    # with guidance it takes one prompt
    "prx-pixel-guided": Kind(
        "a batch of one, doubled",
        Family(prx_pixel, lambda s, n: {**text(s, n, mask=MASK), **BINNED}, tiny=Sizes(height=32, width=32)),
        {"guidance_scale": 4.0},
        rows=1,
    ),
    "joyimage-edit": Kind(
        "several images per row, a norm over channels",
        Family(joyimage, lambda s, n: text(s, n, mask="prompt_embeds_mask"), tiny=Sizes(height=64, width=64)),
        {"guidance_scale": 4.0},
    ),
    "hunyuan-image": Kind(
        "a guider of its own: adaptive projected guidance with momentum, after plain guidance",
        Family(hunyuan_image, hunyuan_image_text, tiny=Sizes(height=128, width=128)), steps=(0, 1, 3),
    ),
    "hidream": Kind(
        "layers before rows in an argument, a negated output", Family(hidream, hidream_text), {"guidance_scale": 4.0}
    ),
    "sd3-control-2": Kind(
        "a control net with as many residuals as half the rows", Family(sd3_control(2), control_text),
        {"guidance_scale": 4.0},
    ),
    "sd3-control-4": Kind("a control net with as many residuals as rows", Family(sd3_control(4), control_text)),
    "sana-pag": Kind(
        "attention processors set for a call", Family(sana_pag, sana_text, tiny=Sizes(height=128, width=128)),
        {"guidance_scale": 4.0, "pag_scale": 3.0},
    ),
    "z-image-control": Kind(
        "a control net that shares layers with the transformer", Family(z_image_control, z_control_text),
        {"guidance_scale": 4.0},
    ),
    "ltx2": Kind(
        "sound beside the picture, guidance of the clean latents",
        Family(ltx2_whole, text_of(mask=MASK), tiny=CLIP), LINES,
    ),
    "helios": Kind(
        "chunks, one pass through the schedule each", Family(helios, text_of(), tiny=replace(CLIP, frames=40))
    ),
}  # fmt: skip
