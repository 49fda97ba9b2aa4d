"""Diffusers pipeline for a small SD3 transformer that draws words. Pixels are the latents, letters are the tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, SD3Transformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

LENGTHS = range(3, 9)
# name in a prompt -> font file, of those that matplotlib ships
TYPEFACES = {"sans": "DejaVuSans.ttf", "serif": "DejaVuSerif-Bold.ttf", "mono": "DejaVuSansMono-Bold.ttf"}
LETTERS = 26
# a token is letter (or blank, or nothing asked), place in the word and typeface, one-hot each
TOKENS, TOKEN_WIDTH = LENGTHS[-1], LETTERS + 2 + LENGTHS[-1] + len(TYPEFACES)
POOLED_WIDTH = len(LENGTHS) + len(TYPEFACES)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# what is this bright or brighter is white paper, as a scanner's white point makes it
WHITE = 1 - 10 / 255
_PROMPT = re.compile(r'"(?P<word>[a-z]+)" in (?P<typeface>[a-z]+)')


def prompt(word: str, typeface: str) -> str:
    """The prompt that asks for ``word`` in ``typeface``."""
    return f'"{word}" in {typeface}'


def parse(text: str) -> tuple[str, str]:
    """Word and typeface of a prompt; ValueError for another form, length or typeface."""
    match = _PROMPT.fullmatch(text.strip())
    if match is None or len(match["word"]) not in LENGTHS or match["typeface"] not in TYPEFACES:
        raise ValueError(
            f'prompt: got {text!r}, expected "word" in typeface, with {LENGTHS[0]} to {LENGTHS[-1]} letters a to z '
            f"and a typeface of {', '.join(TYPEFACES)}"
        )
    return match["word"], match["typeface"]


def embed(words: Sequence[tuple[str, str] | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and typefaces as one-hot embeddings: ``[B, 8, TOKEN_WIDTH]`` and pooled ``[B, POOLED_WIDTH]``, float32.

    ``None`` asks for nothing: the unconditional half of guidance.
    """
    letters = torch.full((len(words), TOKENS), LETTERS)
    faces, lengths = torch.zeros(len(words), len(TYPEFACES)), torch.zeros(len(words), len(LENGTHS))
    for row, asked in enumerate(words):
        if asked is None:
            letters[row] = LETTERS + 1
            continue
        word, face = asked
        letters[row, : len(word)] = torch.tensor([ord(letter) - ord("a") for letter in word])
        faces[row, list(TYPEFACES).index(face)] = 1
        lengths[row, LENGTHS.index(len(word))] = 1
    places = torch.eye(TOKENS).expand(len(words), -1, -1)
    one_hot = F.one_hot(letters, LETTERS + 2).float()
    tokens = torch.cat([one_hot, places, faces[:, None].expand(-1, TOKENS, -1)], dim=-1)
    return tokens, torch.cat([lengths, faces], dim=-1)


class WordsPipeline(DiffusionPipeline):
    """Draws the word that a prompt such as ``"river" in serif`` asks for.

    Args:
        transformer: predicts the velocity ``noise - data`` of ``[B, 1, H, W]`` latents in about [-1, 1] (1 = ink) at
            the timestep ``1000 * sigma``.
        scheduler: flow-matching scheduler; ``set_timesteps``, ``timesteps`` and ``step`` are all that is used of it.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SD3Transformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw ``B = len(prompt) * num_images_per_prompt`` images, those of one prompt adjacent.

        Args:
            prompt: ``"word" in typeface``, or a list of such prompts (``vocabulary.parse`` says what they may hold).
            num_inference_steps: n transformer calls, at the levels ``1, 1 - 1/n, ..., 1/n`` before shift.
            guidance_scale: above 1, classifier-free guidance from one batch ``[nothing, asked]`` of ``2 * B``.
            generator: for the first latents (one, or one per image) and for a scheduler that draws noise.
            latents: first latents ``[B, 1, H, W]``; drawn if absent.
            output_type: ``"pil"``, ``"np"`` (``[B, H, W, 1]``) or ``"pt"`` (``[B, 1, H, W]``), dark ink on white paper,
                floats in [0, 1]; or ``"latent"``.

        Raises:
            ValueError: a prompt of another form, latents of another shape, or an unknown ``output_type``.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: got {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        device, dtype = self._execution_device, self.transformer.dtype
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        asked = [parse(text) for text in prompts for _ in range(num_images_per_prompt)]
        tokens, pooled = (part.to(device, dtype) for part in embed(asked))
        do_guidance = guidance_scale > 1
        if do_guidance:
            nothing = (part.to(device, dtype) for part in embed([None] * len(asked)))
            tokens, pooled = (torch.cat(pair) for pair in zip(nothing, (tokens, pooled)))

        conditions = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        # a page is a third as high as wide
        side = self.transformer.config.sample_size
        shape = (len(asked), 1, side // 3, side)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: got shape {list(latents.shape)}, expected {list(shape)}")

        self.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps), device=device
        )
        for t in self.progress_bar(self.scheduler.timesteps):
            batch = torch.cat([latents, latents]) if do_guidance else latents
            velocity = self.transformer(
                hidden_states=batch, timestep=t.expand(len(batch)), return_dict=False, **conditions
            )[0]
            if do_guidance:
                unasked, wanted = velocity.chunk(2)
                velocity = unasked + guidance_scale * (wanted - unasked)
            latents = self.scheduler.step(velocity, t, latents, generator=generator, return_dict=False)[0]

        images = latents if output_type == "latent" else to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def to_images(latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[Image.Image]:
    """Latents (1 = ink) as pages of dark ink on white paper in [0, 1]; within 10 grey levels of white is white."""
    pages = ((0.5 - latents.float() / 2) / WHITE).clamp(0, 1)
    if output_type == "pt":
        return pages
    if output_type == "np":
        return pages.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(page) for page in (pages[:, 0] * 255).round().byte().cpu().numpy()]
