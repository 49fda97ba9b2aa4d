"""Random pipelines made of diffusers' real classes: tiny ones to run, and hollow ones at the published sizes to weigh.

A :class:`Family` builds its pipeline from a table of sizes. ``tiny`` sizes make a whole model of a few thousand
weights. ``published`` sizes are those of the released model where they decide what a trajectory holds (latent channels,
width and length of the text embedding, resolution); blocks and heads decide nothing, so there are none but one head.
Text encoders and, unless an image is given, VAEs are left out: ready-made embeddings go in and latents come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

MASK = "prompt_attention_mask"


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a family follow from.

    Attributes:
        blocks: transformer blocks of each kind.
        channels: latent channels as the transformer gets them.
        text, tokens, pooled: width and number of the text tokens, width of the pooled text.
        height, width, frames: of the output, in pixels and frames.
        dtype: of weights and embeddings.
    """

    blocks: int = 1
    channels: int = 4
    text: int = 16
    tokens: int = 5
    pooled: int = 16
    height: int = 32
    width: int = 32
    frames: int = 5
    dtype: torch.dtype = torch.float32

    @property
    def image(self) -> dict[str, int]:
        return {"height": self.height, "width": self.width}

    @property
    def video(self) -> dict[str, int]:
        return {**self.image, "num_frames": self.frames}


@dataclass(frozen=True)
class Family:
    """A pipeline class and how to build and call it.

    Attributes:
        build: makes the pipeline.
        inputs: ``(sizes, prompts)`` to keyword arguments of a call with one image per prompt, tensors with a batch dim.
        published: sizes of the released model ``model``, None where there is none or its VAE would have to encode them.
        tiny: sizes of the model that tests run.
        one_prompt: a call takes no more than one prompt, which then has all of the images.
    """

    build: Callable[[Sizes], Any]
    inputs: Callable[[Sizes, int], dict[str, Any]]
    model: str = ""
    published: Sizes | None = None
    tiny: Sizes = field(default_factory=Sizes)
    one_prompt: bool = False

    def pipeline(self, sizes: Sizes | None = None, seed: int = 0) -> Any:
        """The pipeline with random weights; layers that start at zero are random too, so that all inputs matter."""
        sizes = sizes or self.tiny
        torch.manual_seed(seed)
        pipeline = self.build(sizes)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(True).eval()
                if sizes.dtype != torch.float32:
                    component.to(sizes.dtype)
        for name, component in pipeline.components.items():
            if name.startswith(("transformer", "controlnet")) and component is not None:
                for parameter in component.parameters():
                    if not parameter.any() or parameter.ndim > 1:
                        nn.init.normal_(parameter, std=0.3 / max(parameter[0].numel(), 1) ** 0.5)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def arguments(self, prompts: int, images: int, sizes: Sizes | None = None, seed: int = 0) -> dict[str, Any]:
        """Arguments of a call for ``images`` images of each of ``prompts`` prompts, with random embeddings."""
        torch.manual_seed(seed)
        if self.one_prompt:
            return {**self.inputs(sizes or self.tiny, 1), "num_images_per_prompt": prompts * images}
        given = self.inputs(sizes or self.tiny, prompts)
        return {key: repeat_rows(value, images) for key, value in given.items()}


def repeat_rows(value: Any, count: int) -> Any:
    """Tensors and lists with every entry ``count`` times in a row."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(count, dim=0)
    return [entry for entry in value for _ in range(count)] if isinstance(value, list) else value


def absent(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def signed(make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Arguments of the prompt and, with ``negative_`` before their names, of the negative prompt."""
    return {**make(), **{f"negative_{name}": value for name, value in make().items()}}


def text(sizes: Sizes, prompts: int, *, pooled: bool = False, mask: str | None = None) -> dict[str, Tensor]:
    def make() -> dict[str, Tensor]:
        made = {"prompt_embeds": torch.randn(prompts, sizes.tokens, sizes.text, dtype=sizes.dtype)}
        if pooled:
            made["pooled_prompt_embeds"] = torch.randn(prompts, sizes.pooled, dtype=sizes.dtype)
        if mask is not None:
            lengths = torch.arange(prompts) % 2 + sizes.tokens - 1
            made[mask] = torch.arange(sizes.tokens) < lengths[:, None]
        return made

    return signed(make)


def sana_text(sizes: Sizes, prompts: int) -> dict[str, Any]:
    """The negative prompt is "" unless it is taken away."""
    return {**text(sizes, prompts, mask=MASK), "negative_prompt": None, "use_resolution_binning": False}


def photo(sizes: Sizes, seed: int = 0) -> Image.Image:
    """A random image."""
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (sizes.height, sizes.width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def pictures(sizes: Sizes, prompts: int) -> Tensor:
    """``[prompts, 3, height, width]`` in [0, 1]."""
    return torch.rand(prompts, 3, sizes.height, sizes.width)


def plain_vae(channels: int = 4) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip


def wan_vae(channels: int) -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels, latents_std=[1.5] * channels,
    )  # fmt: skip


def ltx_vae(channels: int) -> diffusers.AutoencoderKLLTXVideo:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=channels, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip


def sd3(sizes: Sizes) -> diffusers.StableDiffusion3Pipeline:
    side = max(sizes.height, sizes.width) // 8
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=side, patch_size=2, in_channels=sizes.channels, out_channels=sizes.channels,
        num_layers=2 * sizes.blocks, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=sizes.text,
        caption_projection_dim=16, pooled_projection_dim=sizes.pooled, pos_embed_max_size=side,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **absent("vae", *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))),
    )  # fmt: skip


def flux_transformer(sizes: Sizes, **options: Any) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, num_layers=sizes.blocks, num_single_layers=sizes.blocks, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=sizes.text, pooled_projection_dim=sizes.pooled,
        axes_dims_rope=(4, 4, 8), **{"in_channels": 4 * sizes.channels, "guidance_embeds": True, **options},
    )  # fmt: skip


def shifting() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def flux(kind: type = diffusers.FluxPipeline, *, vae: bool = False, **options: Any) -> Callable[[Sizes], Any]:
    def build(sizes: Sizes) -> Any:
        return kind(
            transformer=flux_transformer(sizes, **options), scheduler=shifting(),
            vae=plain_vae(sizes.channels) if vae else None,
            **absent("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        )  # fmt: skip

    return build


def flux2_vae(channels: int) -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, latent_channels=channels, layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip


def flux2(kind: type, guidance_embeds: bool, **options: Any) -> Callable[[Sizes], Any]:
    def build(sizes: Sizes) -> Any:
        transformer = diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=4 * sizes.channels, num_layers=sizes.blocks, num_single_layers=sizes.blocks,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=sizes.text, mlp_ratio=2.0,
            timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
        )  # fmt: skip
        return kind(
            transformer=transformer, scheduler=shifting(), vae=flux2_vae(sizes.channels), **options,
            **absent("text_encoder", "tokenizer"),
        )  # fmt: skip

    return build


def qwen(kind: type = diffusers.QwenImagePipeline, *, vae: bool = False) -> Callable[[Sizes], Any]:
    def build(sizes: Sizes) -> Any:
        transformer = diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=4 * sizes.channels, out_channels=sizes.channels, num_layers=sizes.blocks,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=sizes.text, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        processor = {"processor": None} if vae else {}
        return kind(
            transformer=transformer, scheduler=shifting(), vae=qwen_vae(sizes.channels) if vae else None,
            **processor, **absent("text_encoder", "tokenizer"),
        )  # fmt: skip

    return build


def qwen_vae(channels: int) -> diffusers.AutoencoderKLQwenImage:
    """The pipelines for images make a million pixels of any image: this one compresses 64 times."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=2, z_dim=channels, dim_mult=[1] * 7, num_res_blocks=1, temperal_downsample=[False] * 6,
        latents_mean=[0.1] * channels, latents_std=[1.5] * channels,
    )  # fmt: skip


def wan_transformer(sizes: Sizes, **options: Any) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        **{"in_channels": sizes.channels, "out_channels": sizes.channels, **options}, num_attention_heads=2,
        attention_head_dim=12, text_dim=sizes.text, freq_dim=16, ffn_dim=16, num_layers=sizes.blocks,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def wan_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def wan(two: bool = False, **options: Any) -> Callable[[Sizes], diffusers.WanPipeline]:
    def build(sizes: Sizes) -> diffusers.WanPipeline:
        return diffusers.WanPipeline(
            transformer=wan_transformer(sizes), transformer_2=wan_transformer(sizes) if two else None,
            scheduler=wan_scheduler(), **options, **absent("vae", "text_encoder", "tokenizer"),
        )  # fmt: skip

    return build


def wan_i2v(two: bool = False, clip: bool = False, **options: Any) -> Callable[[Sizes], Any]:
    def build(sizes: Sizes) -> diffusers.WanImageToVideoPipeline:
        # latents, a mask per frame of a group of four, and the latents of the given frame
        inputs = sizes.channels if options.get("expand_timesteps") else 2 * sizes.channels + 4
        seen = {"image_dim": 8, "added_kv_proj_dim": 24} if clip else {}
        encoder = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=32, patch_size=16
        )
        return diffusers.WanImageToVideoPipeline(
            transformer=wan_transformer(sizes, in_channels=inputs, **seen),
            transformer_2=wan_transformer(sizes, in_channels=inputs) if two else None,
            image_encoder=CLIPVisionModel(encoder) if clip else None,
            image_processor=CLIPImageProcessor(size=32, crop_size=32) if clip else None,
            scheduler=wan_scheduler(), vae=wan_vae(sizes.channels), **options, **absent("text_encoder", "tokenizer"),
        )  # fmt: skip

    return build


def hunyuan(sizes: Sizes) -> diffusers.HunyuanVideoPipeline:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=sizes.channels, out_channels=sizes.channels, num_attention_heads=2, attention_head_dim=16,
        num_layers=sizes.blocks, num_single_layers=sizes.blocks, num_refiner_layers=sizes.blocks, mlp_ratio=2.0,
        text_embed_dim=sizes.text, pooled_projection_dim=sizes.pooled, rope_axes_dim=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **absent("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )  # fmt: skip


def ltx(
    kind: type = diffusers.LTXPipeline, scheduler: Callable[[], Any] | None = None, *, vae: bool = False
) -> Callable[[Sizes], Any]:
    def build(sizes: Sizes) -> Any:
        transformer = diffusers.LTXVideoTransformer3DModel(
            in_channels=sizes.channels, out_channels=sizes.channels, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, num_layers=sizes.blocks, caption_channels=sizes.text,
        )  # fmt: skip
        return kind(
            transformer=transformer, scheduler=(scheduler or stretching)(),
            vae=ltx_vae(sizes.channels) if vae else None, **absent("text_encoder", "tokenizer"),
        )  # fmt: skip

    return build


def ltx2(sizes: Sizes) -> diffusers.LTX2Pipeline:
    """Video and sound; ``sizes.text`` is the width of all layers of the text encoder together."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=sizes.channels, out_channels=sizes.channels, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=sizes.blocks, caption_channels=sizes.text // 2,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=sizes.text // 2, text_proj_in_factor=2, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=sizes.text // 4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=sizes.text // 4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )  # fmt: skip
    return diffusers.LTX2Pipeline(
        transformer=transformer, connectors=connectors, scheduler=stretching(),
        **absent("vae", "audio_vae", "vocoder", "text_encoder", "tokenizer"),
    )  # fmt: skip


def stretching() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )


def sana(learned_sigma: bool = False) -> Callable[[Sizes], diffusers.SanaPipeline]:
    def build(sizes: Sizes) -> diffusers.SanaPipeline:
        transformer = diffusers.SanaTransformer2DModel(
            in_channels=sizes.channels, out_channels=(1 + learned_sigma) * sizes.channels, num_attention_heads=2,
            attention_head_dim=8, num_layers=sizes.blocks, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=sizes.text, sample_size=32,
        )  # fmt: skip
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
        )
        return diffusers.SanaPipeline(
            transformer=transformer, scheduler=scheduler, **absent("vae", "text_encoder", "tokenizer")
        )

    return build


def lumina2(sizes: Sizes) -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=sizes.channels, hidden_size=24, num_layers=sizes.blocks,
        num_refiner_layers=sizes.blocks, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
        axes_dim_rope=(4, 4, 4), axes_lens=(300, 512, 512), cap_feat_dim=sizes.text,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        **absent("vae", "text_encoder", "tokenizer"),
    )  # fmt: skip


def z_image(sizes: Sizes) -> diffusers.ZImagePipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=sizes.channels, dim=32, n_layers=sizes.blocks, n_refiner_layers=sizes.blocks, n_heads=2,
        n_kv_heads=2, cap_feat_dim=sizes.text, axes_dims=[4, 4, 8], axes_lens=[1024, 512, 512],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **absent("vae", "text_encoder", "tokenizer"),
    )  # fmt: skip


def cogview4(sizes: Sizes) -> diffusers.CogView4Pipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=sizes.channels, out_channels=sizes.channels, num_layers=sizes.blocks, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=sizes.text, time_embed_dim=16, condition_dim=8, rope_axes_dim=(256, 256),
        sample_size=128,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    return diffusers.CogView4Pipeline(
        transformer=transformer, scheduler=scheduler, **absent("vae", "text_encoder", "tokenizer")
    )


def chroma(sizes: Sizes) -> diffusers.ChromaPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4 * sizes.channels, num_layers=sizes.blocks, num_single_layers=sizes.blocks, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=sizes.text, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        **absent("vae", "text_encoder", "tokenizer"),
    )  # fmt: skip


def z_text(sizes: Sizes, prompts: int) -> dict[str, list[Tensor]]:
    """Lists of embeddings of different lengths."""

    def make() -> list[Tensor]:
        return [torch.randn(sizes.tokens - i % 2, sizes.text, dtype=sizes.dtype) for i in range(prompts)]

    return {"prompt_embeds": make(), "negative_prompt_embeds": make()}


def text_of(**options: Any) -> Callable[[Sizes, int], dict[str, Any]]:
    return lambda sizes, prompts: text(sizes, prompts, **options)
