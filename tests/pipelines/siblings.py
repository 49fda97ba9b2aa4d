"""Relatives of the families: other pipelines around the same components, called with what they take besides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .kinds import Kind
from .tiny import (
    MASK,
    Family,
    Sizes,
    absent,
    chroma,
    flux,
    pictures,
    plain_vae,
    sana,
    sana_text,
    sd3,
    shifting,
    text,
    wan,
    wan_scheduler,
    wan_vae,
    z_image,
    z_text,
)


def around(kind: type, base: Callable[[Sizes], Any], **further: Callable[[Sizes], Any]) -> Callable[[Sizes], Any]:
    """A pipeline of class ``kind`` with the components of another one and ``further`` ones."""

    def build(sizes: Sizes) -> Any:
        parts = {**base(sizes).components, **{name: make(sizes) for name, make in further.items()}}
        known = inspect.signature(kind.__init__).parameters
        missing = {name for name, p in known.items() if p.default is p.empty and name != "self"}
        return kind(**{name: parts.get(name) for name in known if name in parts or name in missing})

    return build


def with_image(inputs: Callable[[Sizes, int], dict], **options: Any) -> Callable[[Sizes, int], dict]:
    """Inputs with an image per row."""
    return lambda sizes, count: {**inputs(sizes, count), "image": pictures(sizes, count), **options}


def with_mask(inputs: Callable[[Sizes, int], dict], **options: Any) -> Callable[[Sizes, int], dict]:
    """Inputs with an image per row and a mask of its left half."""

    def make(sizes: Sizes, count: int) -> dict:
        mask = torch.zeros(count, 1, sizes.height, sizes.width)
        mask[..., : sizes.width // 2] = 1.0
        return {**with_image(inputs, **options)(sizes, count), "mask_image": mask}

    return make


def vae(sizes: Sizes) -> diffusers.AutoencoderKL:
    return plain_vae(sizes.channels)


def pooled(sizes: Sizes, count: int) -> dict[str, Tensor]:
    return text(sizes, count, pooled=True)


def masked(sizes: Sizes, count: int) -> dict[str, Tensor]:
    return text(sizes, count, mask=MASK)


def aura(sizes: Sizes) -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=sizes.height // 8, in_channels=sizes.channels, out_channels=sizes.channels,
        num_mmdit_layers=sizes.blocks, num_single_dit_layers=sizes.blocks, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=sizes.text, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        **absent("vae", "text_encoder", "tokenizer"),
    )  # fmt: skip


def ovis(sizes: Sizes) -> diffusers.OvisImagePipeline:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=4 * sizes.channels, out_channels=4 * sizes.channels, num_layers=sizes.blocks,
        num_single_layers=sizes.blocks, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=sizes.text,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.OvisImagePipeline(
        transformer=transformer, scheduler=shifting(), **absent("vae", "text_encoder", "tokenizer")
    )


def skyreels(sizes: Sizes) -> diffusers.SkyReelsV2Pipeline:
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=sizes.channels, out_channels=sizes.channels,
        text_dim=sizes.text, freq_dim=16, ffn_dim=16, num_layers=sizes.blocks, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.SkyReelsV2Pipeline(
        transformer=transformer, scheduler=wan_scheduler(), **absent("vae", "text_encoder", "tokenizer")
    )


def sana_video(sizes: Sizes) -> diffusers.SanaVideoPipeline:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=sizes.channels, out_channels=sizes.channels, num_attention_heads=2, attention_head_dim=12,
        num_layers=sizes.blocks, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=sizes.text, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.SanaVideoPipeline(
        transformer=transformer, scheduler=sana()(sizes).scheduler, **absent("vae", "text_encoder", "tokenizer")
    )


def prx(sizes: Sizes) -> diffusers.PRXPipeline:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=sizes.channels, context_in_dim=sizes.text, hidden_size=16, mlp_ratio=2.0, num_heads=2,
        depth=sizes.blocks, axes_dim=[4, 4],
    )  # fmt: skip
    return diffusers.PRXPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **absent("vae", "text_encoder", "tokenizer"),
    )  # fmt: skip


def clip_latents(sizes: Sizes, count: int) -> dict[str, Any]:
    shape = (count, sizes.channels, 2, sizes.height // 8, sizes.width // 8)
    return {**text(sizes, count), "latents": torch.randn(shape), "strength": 0.99}


D = diffusers
GUIDED = {"guidance_scale": 4.0}
PLAIN = {"use_resolution_binning": False}


def _of(kind: type, base: Callable, inputs: Callable, options: dict | None = None, **further: Any) -> Kind:
    tiny = further.pop("tiny", Sizes())
    return Kind("a relative", Family(around(kind, base, **further), inputs, tiny=tiny), options or GUIDED)


def unguided(inputs: Callable[[Sizes, int], dict]) -> Callable[[Sizes, int], dict]:
    """Without negative prompts, which the pipeline does not take."""
    return lambda s, n: {key: value for key, value in inputs(s, n).items() if not key.startswith("negative_")}


SIBLINGS: dict[type, Kind] = {
    D.FluxInpaintPipeline: _of(D.FluxInpaintPipeline, flux(), with_mask(pooled, strength=0.99), {}, vae=vae),
    D.FluxControlPipeline: _of(
        D.FluxControlPipeline, flux(in_channels=32, out_channels=16),
        lambda s, n: {**unguided(pooled)(s, n), "control_image": pictures(s, n)}, vae=vae,
    ),
    D.StableDiffusion3Img2ImgPipeline: _of(
        D.StableDiffusion3Img2ImgPipeline, sd3, with_image(pooled, strength=0.99), vae=vae
    ),
    D.StableDiffusion3InpaintPipeline: _of(
        D.StableDiffusion3InpaintPipeline, sd3, with_mask(pooled, strength=0.99), vae=vae, tiny=Sizes(channels=16)
    ),
    D.StableDiffusion3PAGPipeline: _of(
        D.StableDiffusion3PAGPipeline, sd3, pooled, {**GUIDED, "pag_scale": 2.0},
        pag_applied_layers=lambda s: ["blocks.1"],
    ),
    D.ZImageImg2ImgPipeline: _of(D.ZImageImg2ImgPipeline, z_image, with_image(z_text, strength=0.99), vae=vae),
    D.ZImageInpaintPipeline: _of(D.ZImageInpaintPipeline, z_image, with_mask(z_text, strength=0.99), vae=vae),
    D.ChromaImg2ImgPipeline: _of(D.ChromaImg2ImgPipeline, chroma, with_image(masked, strength=0.99), vae=vae),
    D.WanVideoToVideoPipeline: _of(
        D.WanVideoToVideoPipeline, wan(), clip_latents, vae=lambda s: wan_vae(s.channels)
    ),
    D.AuraFlowPipeline: _of(D.AuraFlowPipeline, aura, masked),
    D.OvisImagePipeline: _of(D.OvisImagePipeline, ovis, lambda s, n: {**text(s, n), "negative_prompt": None}),
    D.SkyReelsV2Pipeline: _of(D.SkyReelsV2Pipeline, skyreels, text),
    D.SanaVideoPipeline: _of(D.SanaVideoPipeline, sana_video, lambda s, n: {**sana_text(s, n), **PLAIN}),
    D.PRXPipeline: _of(D.PRXPipeline, prx, lambda s, n: {**masked(s, n), **PLAIN}, {"guidance_scale": 1.0}),
}  # fmt: skip
