"""SD3, FLUX.1 and Wan in miniature: diffusers' and transformers' own classes with random weights, 32x32 pixels.

They draw nothing that one would want to look at, but they are whole pipelines, from the text of a prompt to pixels, so
that a script for the released models runs without them, on a CPU and in seconds.
"""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers

# tokens of a prompt, a letter each
_TOKENS = 24
# width of the CLIP text encoders and of T5
_CLIP_WIDTH, _T5_WIDTH = 16, 32


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3: two CLIP text encoders and a T5."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=_T5_WIDTH, caption_projection_dim=32, pos_embed_max_size=8,
        pooled_projection_dim=2 * _CLIP_WIDTH,
    )  # fmt: skip
    return _quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_image_vae(),
            text_encoder=_clip(transformers.CLIPTextModelWithProjection), tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(transformers.CLIPTextModelWithProjection), tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(transformers.T5EncoderModel, transformers.T5Config), tokenizer_3=_t5_tokenizer(),
        )
    )  # fmt: skip


def flux() -> diffusers.FluxPipeline:
    """FLUX.1, whose guidance scale is an input of the transformer (guidance-distilled): one call per step."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=_T5_WIDTH, pooled_projection_dim=_CLIP_WIDTH, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    return _quiet(
        diffusers.FluxPipeline(
            transformer=transformer, vae=_image_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            text_encoder=_clip(transformers.CLIPTextModel), tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(transformers.T5EncoderModel, transformers.T5Config), tokenizer_2=_t5_tokenizer(),
        )
    )  # fmt: skip


def wan() -> diffusers.WanPipeline:
    """Wan 2.1 text-to-video: latents ``[B, 4, frames, H, W]``, guidance from two calls per step."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, text_dim=_T5_WIDTH, freq_dim=16,
        ffn_dim=32, num_layers=2, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return _quiet(
        diffusers.WanPipeline(
            transformer=transformer, scheduler=scheduler, vae=vae,
            text_encoder=_t5(transformers.UMT5EncoderModel, transformers.UMT5Config), tokenizer=_t5_tokenizer(),
        )
    )  # fmt: skip


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    # diffusers starts the last layer at zero: the model would draw pure noise and hear no prompt
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.2)
    # and with the usual small weights a decoder's picture would be that of its biases, whatever the latents
    for layer in pipeline.vae.decoder.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            torch.nn.init.zeros_(layer.bias)
    return pipeline


def _image_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip


def _clip(kind: type) -> Any:
    tokenizer = _clip_tokenizer()
    settings = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        hidden_size=_CLIP_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=_TOKENS, projection_dim=_CLIP_WIDTH,
    )  # fmt: skip
    return kind(settings)


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    letters = string.ascii_lowercase
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_TOKENS)


def _t5(kind: type, settings: type) -> Any:
    return kind(
        settings(
            vocab_size=len(_t5_tokenizer()), d_model=_T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            relative_attention_num_buckets=8,
        )
    )  # fmt: skip


def _t5_tokenizer() -> transformers.T5Tokenizer:
    # pieces with their log-probabilities
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(letter, -2.0) for letter in string.ascii_lowercase]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=_TOKENS)
