"""Diffusers pipeline for a class-conditional flow-matching transformer that draws small digits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    SD3Transformer2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DigitsPipeline(DiffusionPipeline):
    """Draws digits. Pixels are the latents and one-hot vectors the prompt embeddings: no VAE, no text encoder.

    Args:
        transformer: predicts the velocity ``noise - data`` of ``[B, 1, H, W]`` latents in about [-1, 1] (-1 = paper,
            1 = ink) at the timestep ``1000 * sigma``. The last of its ``pooled_projection_dim`` classes is "no digit".
        scheduler: flow-matching scheduler; ``set_timesteps``, ``timesteps`` and ``step`` are all that is used of it.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SD3Transformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @property
    def num_digits(self) -> int:
        """Number of digits, which is also the class of "no digit"."""
        return self.transformer.config.pooled_projection_dim - 1

    def encode_prompt(
        self, prompt: int | str | list[int | str], num_images_per_prompt: int = 1, guidance: bool = False
    ) -> torch.Tensor:
        """One-hot classes of digits.

        Args:
            prompt: a digit, as ``7`` or ``"7"``, or a list of them.
            num_images_per_prompt: how often each is repeated; copies of one are adjacent.
            guidance: put as many rows of "no digit" in front.

        Returns:
            ``[B, num_digits + 1]``, or ``[2 * B, num_digits + 1]`` with guidance, in the transformer's dtype.

        Raises:
            ValueError: a prompt is not a digit, or there is none.
        """
        prompts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        if not prompts:
            raise ValueError("prompt: got an empty list, expected at least one digit")
        known = {str(label): label for label in range(self.num_digits)}
        for name in prompts:
            if str(name).strip() not in known:
                raise ValueError(f"prompt: got {name!r}, expected a digit from 0 to {self.num_digits - 1}")
        labels = torch.tensor([known[str(name).strip()] for name in prompts])
        labels = labels.repeat_interleave(num_images_per_prompt)
        if guidance:
            labels = torch.cat([torch.full_like(labels, self.num_digits), labels])
        one_hot = F.one_hot(labels, self.num_digits + 1)
        return one_hot.to(device=self._execution_device, dtype=self.transformer.dtype)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Standard normal latents ``[batch_size, 1, H, W]`` in the transformer's dtype, or ``latents`` moved there.

        Raises:
            ValueError: ``latents`` of another shape, or another number of generators than one or ``batch_size``.
        """
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        device, dtype = self._execution_device, self.transformer.dtype
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: got a list of {len(generator)}, expected one or {batch_size}, one per image")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: got shape {list(latents.shape)}, expected {list(shape)}")
        return latents.to(device=device, dtype=dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: int | str | list[int | str],
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DigitsPipeline, int, torch.Tensor, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw ``B = len(prompt) * num_images_per_prompt`` images, those of one prompt adjacent.

        Args:
            prompt: a digit, as ``7`` or ``"7"``, or a list of them.
            num_inference_steps: number n of transformer calls; the levels are ``1, 1 - 1/n, ..., 1/n, 0`` before the
                scheduler's shift.
            guidance_scale: above 1, classifier-free guidance from one batch ``[no digit, asked digit]`` of ``2 * B``.
            num_images_per_prompt: images for each entry of ``prompt``.
            generator: for the first latents (one, or one per image) and for a scheduler that draws noise.
            latents: first latents, ``[B, 1, H, W]``; drawn if absent.
            output_type: ``"pil"`` (mode L), ``"np"`` (``[B, H, W, 1]``) or ``"pt"`` (``[B, 1, H, W]``), both float32
                in [0, 1] with 1 = ink, or ``"latent"`` (``[B, 1, H, W]``, about [-1, 1]).
            return_dict: return :class:`ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called after each step as ``callback(pipeline, i, t, {"latents": latents})``; the
                dict that it returns may hold other ``"latents"``.

        Raises:
            ValueError: a prompt that is no digit, a number below 1, latents or generators that do not fit the batch,
                or an unknown ``output_type``.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: got {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")

        do_guidance = guidance_scale > 1
        prompt_embeds = self.encode_prompt(prompt, num_images_per_prompt, guidance=do_guidance)
        batch_size = len(prompt_embeds) // (2 if do_guidance else 1)
        latents = self.prepare_latents(batch_size, generator, latents)
        token_embeds = prompt_embeds[:, None]

        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        timesteps = self.scheduler.timesteps

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                latent_input = torch.cat([latents, latents]) if do_guidance else latents
                velocity = self.transformer(
                    hidden_states=latent_input,
                    timestep=t.expand(len(latent_input)),
                    encoder_hidden_states=token_embeds,
                    pooled_projections=prompt_embeds,
                    return_dict=False,
                )[0]
                if do_guidance:
                    velocity_null, velocity_asked = velocity.chunk(2)
                    velocity = velocity_null + guidance_scale * (velocity_asked - velocity_null)

                latents = self.scheduler.step(velocity, t, latents, generator=generator, return_dict=False)[0]

                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, t, {"latents": latents})
                    latents = changed.get("latents", latents)
                progress_bar.update()

        images = latents if output_type == "latent" else _to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _to_images(latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[Image.Image]:
    images = (latents.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(page) for page in (images[:, 0] * 255).round().byte().cpu().numpy()]
