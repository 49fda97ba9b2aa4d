"""The families of pipelines that tests record: tiny sizes to run, published sizes to weigh."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .tiny import (
    MASK,
    Family,
    Sizes,
    chroma,
    cogview4,
    flux,
    flux2,
    hunyuan,
    ltx,
    lumina2,
    photo,
    pictures,
    qwen,
    sana,
    sana_text,
    sd3,
    text,
    text_of,
    wan,
    wan_i2v,
    z_image,
    z_text,
)

BF16 = {"dtype": torch.bfloat16, "blocks": 0}
IMAGE = {**BF16, "height": 1024, "width": 1024, "channels": 16}

FLUX = Sizes(**IMAGE, text=4096, tokens=512, pooled=768)
WAN = Sizes(**BF16, channels=16, text=4096, tokens=512, height=480, width=832, frames=81)
CLIP = Sizes(height=64, width=64, frames=17)
LTX = Sizes(**BF16, channels=128, text=4096, tokens=128, height=512, width=704, frames=161)

FAMILIES = {
    "StableDiffusion3": Family(
        sd3, text_of(pooled=True), "SD3.5-medium, 1024x1024", Sizes(**IMAGE, text=4096, tokens=333, pooled=2048)
    ),
    "Flux": Family(flux(), text_of(pooled=True), "FLUX.1-dev, 1024x1024", FLUX),
    "Flux2": Family(
        flux2(diffusers.Flux2Pipeline, True),
        lambda sizes, prompts: {"prompt_embeds": text(sizes, prompts)["prompt_embeds"]},
        "FLUX.2-dev, 1024x1024",
        Sizes(**{**IMAGE, "channels": 32}, text=15360, tokens=512),
    ),
    "Flux2Klein": Family(
        flux2(diffusers.Flux2KleinPipeline, False),
        text_of(),
        "FLUX.2-klein-base-4B, 1024x1024",
        Sizes(**{**IMAGE, "channels": 32}, text=7680, tokens=512),
    ),
    "QwenImage": Family(
        qwen(), text_of(mask="prompt_embeds_mask"), "Qwen-Image, 1024x1024", Sizes(**IMAGE, text=3584, tokens=512)
    ),
    "Wan": Family(wan(), text_of(), "Wan2.1-T2V-1.3B, 480x832, 81 frames", WAN),
    "Wan two transformers": Family(
        wan(two=True, boundary_ratio=0.875), text_of(), "Wan2.2-T2V-A14B, 480x832, 81 frames", WAN
    ),
    # its VAE compresses 16 times: these are the latents of 704x1280
    "Wan timestep per token": Family(
        wan(expand_timesteps=True),
        text_of(),
        "Wan2.2-TI2V-5B, 704x1280, 121 frames",
        replace(WAN, channels=48, height=352, width=640, frames=121),
    ),
    "HunyuanVideo": Family(
        hunyuan,
        text_of(pooled=True, mask=MASK),
        "HunyuanVideo, 544x960, 61 frames",
        Sizes(**BF16, channels=16, text=4096, tokens=256, pooled=768, height=544, width=960, frames=61),
    ),
    "LTX": Family(ltx(), text_of(mask=MASK), "LTX-Video, 512x704, 161 frames", LTX, CLIP),
    "Sana": Family(
        sana(),
        sana_text,
        "Sana-1.6B, 1024x1024",
        Sizes(**{**IMAGE, "channels": 32}, text=2304, tokens=300),
        Sizes(height=128, width=128),
    ),
    "Sana learned variance": Family(sana(learned_sigma=True), sana_text, tiny=Sizes(height=128, width=128)),
    "Lumina2": Family(
        lumina2, text_of(mask=MASK), "Lumina-Image-2.0, 1024x1024", Sizes(**IMAGE, text=2304, tokens=256)
    ),
    "ZImage": Family(z_image, z_text, "Z-Image, 1024x1024", Sizes(**IMAGE, text=2560, tokens=512)),
    "CogView4": Family(cogview4, text_of(), "CogView4-6B, 1024x1024", Sizes(**IMAGE, text=4096, tokens=128)),
    "Chroma": Family(chroma, text_of(mask=MASK), "Chroma1-HD, 1024x1024", Sizes(**IMAGE, text=4096, tokens=512)),
    "FluxKontext": Family(
        flux(diffusers.FluxKontextPipeline, vae=True),
        lambda sizes, prompts: {
            **text(sizes, prompts, pooled=True),
            "image": photo(sizes),
            "max_area": sizes.height * sizes.width,
            "_auto_resize": False,
        },
    ),
    "FluxImg2Img": Family(
        flux(diffusers.FluxImg2ImgPipeline, vae=True),
        lambda sizes, prompts: {
            **text(sizes, prompts, pooled=True),
            "image": pictures(sizes, prompts),
            "strength": 0.7,
        },
    ),
    "Flux2 with image": Family(
        flux2(diffusers.Flux2KleinPipeline, False),
        lambda sizes, prompts: {**text(sizes, prompts), "image": photo(replace(sizes, height=64, width=64))},
    ),
    "QwenImageEdit": Family(
        qwen(diffusers.QwenImageEditPipeline, vae=True),
        lambda sizes, prompts: {**text(sizes, prompts, mask="prompt_embeds_mask"), "image": photo(sizes)},
        tiny=Sizes(height=256, width=256),
    ),
    "QwenImageEditPlus": Family(
        qwen(diffusers.QwenImageEditPlusPipeline, vae=True),
        lambda sizes, prompts: {
            **text(sizes, prompts, mask="prompt_embeds_mask"),
            "image": [photo(sizes, seed) for seed in (0, 1)],
        },
        tiny=Sizes(height=256, width=256),
        one_prompt=True,
    ),
    "WanImageToVideo": Family(
        wan_i2v(two=True, boundary_ratio=0.875), lambda sizes, prompts: {**text(sizes, prompts), "image": photo(sizes)}
    ),
    "WanImageToVideo with image encoder": Family(
        wan_i2v(clip=True), lambda sizes, prompts: {**text(sizes, prompts), "image": photo(sizes)}
    ),
    "WanImageToVideo timestep per token": Family(
        wan_i2v(expand_timesteps=True), lambda sizes, prompts: {**text(sizes, prompts), "image": photo(sizes)}
    ),
    "LTXImageToVideo": Family(
        ltx(diffusers.LTXImageToVideoPipeline, vae=True),
        lambda sizes, prompts: {**text(sizes, prompts, mask=MASK), "image": pictures(sizes, prompts)},
        tiny=CLIP,
    ),
    "LTXCondition": Family(
        ltx(diffusers.LTXConditionPipeline, FlowMatchEulerDiscreteScheduler, vae=True),
        text_of(mask=MASK),
        tiny=CLIP,
    ),
    "LTXCondition with image": Family(
        ltx(diffusers.LTXConditionPipeline, FlowMatchEulerDiscreteScheduler, vae=True),
        lambda sizes, prompts: {**text(sizes, prompts, mask=MASK), "image": photo(sizes)},
        tiny=CLIP,
    ),
    "Flux2KleinKV": Family(
        flux2(diffusers.Flux2KleinKVPipeline, False),
        lambda sizes, prompts: {
            "prompt_embeds": text(sizes, prompts)["prompt_embeds"],
            "image": photo(replace(sizes, height=64, width=64)),
        },
    ),
}
