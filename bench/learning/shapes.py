"""The larger task's world: 64x64 RGB pages with one coloured shape, a caption, and a transformer that draws them.

Pages are white (1) with a shape in one of six colours. Pixels are the latents, 12,288 per page; a caption such as
``"red ring"`` becomes a multi-hot vector, so nothing here needs a text encoder or a VAE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from examples.digits.pipeline import DigitsPipeline

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bars")
# each colour lacks at least one primary, so that ink is what is not white
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.1),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.8, 0.1),
    "magenta": (0.8, 0.1, 0.8),
    "cyan": (0.1, 0.8, 0.8),
}
CAPTIONS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
# the smallest noise level at which the velocity is asked for exactly; below it the division is bounded
_LEAST_SIGMA = 0.05


def caption_indices(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Shape and colour numbers ``[B]`` of captions.

    Raises:
        ValueError: a caption that is not ``"<colour> <shape>"`` of the known ones.
    """
    for caption in captions:
        if caption not in CAPTIONS:
            raise ValueError(f"prompt: got {caption!r}, expected a colour and a shape such as {CAPTIONS[0]!r}")
    numbers = torch.tensor([CAPTIONS.index(caption) for caption in captions])
    return numbers // len(COLOURS), numbers % len(COLOURS)


def draw_pages(captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Pages ``[B, 3, 64, 64]`` in [0, 1] with random place, size, tilt and shade, a function of the generator."""
    shapes, colours = caption_indices(captions)
    count = len(captions)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    centre, radius, tilt = uniform(-0.15, 0.15, 2), uniform(0.42, 0.62), uniform(-0.25, 0.25)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x = (x[None] - centre[:, 0, None, None]) / radius[:, None, None]
    y = (y[None] - centre[:, 1, None, None]) / radius[:, None, None]
    cos, sin = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
    r, ax, ay = torch.hypot(x, y), x.abs(), y.abs()
    # signed distances in units of the radius, negative inside; in the order of SHAPES
    distance = torch.stack(
        [
            r - 0.9,
            torch.maximum(ax, ay) - 0.8,
            torch.maximum(ax * math.cos(math.pi / 6) - y * 0.5, y) - 0.5,
            torch.maximum(torch.minimum(ax, ay) - 0.28, torch.maximum(ax, ay) - 0.95),
            (r - 0.7).abs() - 0.22,
            torch.maximum((ay - 0.55).abs() - 0.25, ax - 0.9),
        ],
        1,
    )
    chosen = distance[torch.arange(count), shapes] * radius[:, None, None]
    # edges as soft as one pixel
    ink = torch.sigmoid(-chosen * SIZE)[:, None]
    shade = torch.tensor(list(COLOURS.values()))[colours] + uniform(-0.08, 0.08, 3)
    return torch.lerp(torch.ones(count, 3, SIZE, SIZE), shade.clamp(0, 1)[:, :, None, None], ink)


def ink_of(pages: Tensor) -> Tensor:
    """``[B, 1, H, W]``: how far a page's pixels are from white, 0 = paper, 1 = ink."""
    return 1 - pages.amin(1, keepdim=True)


class ShapesTransformer(SD3Transformer2DModel):
    """SD3 transformer that predicts the page and returns the velocity that leads to it, ``(x - page) / sigma``.

    A patch of 8x8x3 has 192 numbers and the model is 64 wide: noise would not pass through it, a page does.
    """

    def forward(self, hidden_states: Tensor, timestep: Tensor, *, return_dict: bool = True, **arguments):
        page = super().forward(hidden_states, timestep=timestep, return_dict=False, **arguments)[0]
        sigma = (timestep / 1000).clamp_min(_LEAST_SIGMA)[:, None, None, None]
        velocity = (hidden_states - page) / sigma
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


class ShapesPipeline(DigitsPipeline):
    """The digits pipeline with captions of a colour and a shape; the last entry of the vector is "no caption"."""

    def encode_prompt(
        self, prompt: str | list[str], num_images_per_prompt: int = 1, guidance: bool = False
    ) -> torch.Tensor:
        """Multi-hot vectors ``[B, shapes + colours + 1]``, or ``[2 * B, ...]`` with guidance, "no caption" first.

        Raises:
            ValueError: an unknown caption.
        """
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        vectors = caption_vectors(captions).repeat_interleave(num_images_per_prompt, 0)
        if guidance:
            vectors = torch.cat([no_caption(len(vectors)), vectors])
        return vectors.to(device=self._execution_device, dtype=self.transformer.dtype)


def caption_vectors(captions: Sequence[str]) -> Tensor:
    """``[B, 13]``: shape and colour, one-hot each, and 0 for "no caption"."""
    shapes, colours = caption_indices(captions)
    parts = F.one_hot(shapes, len(SHAPES)), F.one_hot(colours, len(COLOURS)), torch.zeros(len(captions), 1)
    return torch.cat(parts, 1).float()


def no_caption(count: int) -> Tensor:
    """``[count, 13]`` vectors of "no caption"."""
    return F.one_hot(torch.full((count,), len(SHAPES) + len(COLOURS)), len(SHAPES) + len(COLOURS) + 1).float()


def make_transformer(hidden: int = 64, heads: int = 4, layers: int = 3) -> ShapesTransformer:
    """A transformer on 64 patches of 8x8 whose blocks are identities at the start."""
    width = len(SHAPES) + len(COLOURS) + 1
    transformer = ShapesTransformer(
        sample_size=SIZE,
        patch_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        caption_projection_dim=hidden,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=SIZE // 8,
    )
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for linear in zeroed:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def make_pipeline(transformer: ShapesTransformer) -> ShapesPipeline:
    return ShapesPipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=1.0))
