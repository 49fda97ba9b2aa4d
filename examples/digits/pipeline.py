"""Diffusers pipeline for a class-conditional flow-matching transformer that draws small digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DigitsPipeline(DiffusionPipeline):
    """Draws digits. Pixels are the latents: there is no VAE and no text encoder.

    Args:
        transformer: predicts the velocity ``noise - data`` of ``[B, 1, H, W]`` latents in about [-1, 1] (-1 = paper,
            1 = ink) at the timestep ``1000 * sigma``. Class ``num_embeds_ada_norm`` is the class of no digit.
        scheduler: flow-matching scheduler; ``set_timesteps``, ``timesteps`` and ``step`` are all that is used of it.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        # in training mode DiT drops class labels at random, in each block on its own: a model that is fine-tuned on
        # recorded steps would then see other labels than those the steps were sampled with
        for block in self.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def num_classes(self) -> int:
        return self.transformer.config.num_embeds_ada_norm

    def encode_prompt(self, prompt: int | str | list[int | str], num_images_per_prompt: int = 1) -> torch.Tensor:
        """Class labels of prompts, int64 ``[len(prompt) * num_images_per_prompt]``, images of a prompt adjacent.

        Raises:
            ValueError: if a prompt is not a digit.
        """
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        names = [str(value).strip() for value in prompts]
        known = {str(label): label for label in range(self.num_classes)}
        for name in names:
            if name not in known:
                raise ValueError(f"prompt must be digits from 0 to {self.num_classes - 1}, got {name!r}")
        labels = torch.tensor([known[name] for name in names], dtype=torch.long, device=self._execution_device)
        return labels.repeat_interleave(num_images_per_prompt)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Standard normal latents ``[batch_size, 1, H, W]`` in the transformer's dtype, or ``latents`` moved there.

        Raises:
            ValueError: if ``latents`` has another shape.
        """
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {list(shape)}, got {list(latents.shape)}")
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
            num_inference_steps: number of transformer calls; levels are ``1, 1 - 1/n, ..., 1/n, 0`` before the
                scheduler's shift.
            guidance_scale: above 1, classifier-free guidance from one batch ``[no digit, asked digit]`` of ``2 * B``.
            num_images_per_prompt: images for each entry of ``prompt``.
            generator: for the first latents and for a scheduler that draws noise.
            latents: first latents, ``[B, 1, H, W]``; drawn if absent.
            output_type: ``"pil"``, ``"np"`` (``[B, H, W, 1]``), ``"pt"`` (``[B, 1, H, W]``), both float32 in
                [0, 1], or ``"latent"`` (``[B, 1, H, W]``, about [-1, 1]).
            return_dict: return :class:`ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called after each step as ``callback(pipeline, i, t, {"latents": latents})``; may
                return a dict with other ``"latents"``.

        Raises:
            ValueError: if a prompt is no digit, a number is out of range or ``output_type`` is unknown.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

        labels = self.encode_prompt(prompt, num_images_per_prompt)
        latents = self.prepare_latents(len(labels), generator, latents)
        do_guidance = guidance_scale > 1
        if do_guidance:
            labels = torch.cat([torch.full_like(labels, self.num_classes), labels])

        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        timesteps = self.scheduler.timesteps

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                latent_input = torch.cat([latents, latents]) if do_guidance else latents
                velocity = self.transformer(
                    hidden_states=latent_input,
                    timestep=t.expand(len(latent_input)),
                    class_labels=labels,
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

        images = latents if output_type == "latent" else self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def _to_images(latents: torch.Tensor, output_type: str):
        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = VaeImageProcessor.pt_to_numpy(images)
        return array if output_type == "np" else VaeImageProcessor.numpy_to_pil(array)
