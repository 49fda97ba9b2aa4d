"""Rewards for digit images: readable as the asked digit, and drawn in a style.

A reward is a callable ``(images, prompts, metadata) -> Tensor[B]``. Images are a ``[B, 1, H, W]`` tensor in
[0, 1] (0 = paper, 1 = ink) or a list of PIL images, prompts are digits as strings, metadata is not read. Every
reward here is float32 in [0, 1], and none of them carries a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

Images = torch.Tensor | Sequence[Image.Image]
Reward = Callable[[Images, Sequence[str], Any], torch.Tensor]


def to_tensor(images: Images) -> torch.Tensor:
    """Images as a float32 tensor ``[B, 1, H, W]`` in [0, 1].

    Raises:
        ValueError: a tensor of another shape, or an empty list.
    """
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images: got shape {list(images.shape)}, expected [B, 1, H, W]")
        return images.detach().float().clamp(0, 1)
    if not images:
        raise ValueError("images: got an empty list, expected at least one image")
    pixels = np.stack([np.asarray(image.convert("L"), dtype=np.float32) for image in images])
    return torch.from_numpy(pixels / 255.0)[:, None]


class _Ramp:
    """0 at ``low``, 1 at ``high``, linear between and constant outside."""

    def __init__(self, low: float, high: float):
        if low == high:
            raise ValueError(f"low, high: got {low:g} for both, expected different values")
        self.low, self.high = low, high

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return ((value - self.low) / (self.high - self.low)).clamp(0, 1)


class ReadableReward:
    """Probability that the judge gives to the asked digit.

    Args:
        judge: maps ``[B, 1, H, W]`` images to ``[B, 10]`` log-probabilities (:class:`judge.Judge`).
    """

    def __init__(self, judge: Callable[[torch.Tensor], torch.Tensor]):
        self.judge = judge

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str], metadata: Any = None) -> torch.Tensor:
        pixels = to_tensor(images)
        if len(prompts) != len(pixels):
            raise ValueError(f"prompts: got {len(prompts)} for {len(pixels)} images, expected one per image")
        log_probs = self.judge(pixels)
        asked = torch.tensor([int(prompt) for prompt in prompts], device=log_probs.device)
        return log_probs.gather(1, asked[:, None])[:, 0].exp()


class BoldReward:
    """Amount of ink: 0 at a mean pixel value of ``low``, 1 at ``high``, linear between.

    The real digits have 0.176 on average (standard deviation 0.019), none of them has 0.25. More ink than ``high``
    earns nothing, so filling the page does not pay.
    """

    def __init__(self, low: float = 0.15, high: float = 0.25):
        self.ramp = _Ramp(low, high)

    def __call__(self, images: Images, prompts: Sequence[str], metadata: Any = None) -> torch.Tensor:
        return self.ramp(to_tensor(images).mean(dim=(1, 2, 3)))


class SlantReward:
    """Lean to the right: 0 at a slope of ``low``, 1 at ``high``, linear between.

    The slope is that of the ink-weighted least-squares line x(y), ``-cov(x, y) / var(y)``, in pixels to the right
    per pixel upwards: 0 is upright, 0.577 leans by 30 degrees. The real digits have -0.04 on average (standard
    deviation 0.12). ``high < low`` asks for a lean to the left.
    """

    def __init__(self, low: float = -0.1, high: float = 0.5):
        self.ramp = _Ramp(low, high)

    def __call__(self, images: Images, prompts: Sequence[str], metadata: Any = None) -> torch.Tensor:
        return self.ramp(self.slope(to_tensor(images)))

    @staticmethod
    def slope(pixels: torch.Tensor) -> torch.Tensor:
        """Slope of ``[B, 1, H, W]`` images, ``[B]``; 0 for an image without ink."""
        height, width = pixels.shape[-2:]
        ink = pixels[:, 0] / pixels.sum(dim=(1, 2, 3)).clamp_min(1e-6)[:, None, None]
        y = torch.arange(height, dtype=pixels.dtype, device=pixels.device)[:, None]
        x = torch.arange(width, dtype=pixels.dtype, device=pixels.device)[None, :]
        dy = y - (ink * y).sum(dim=(1, 2), keepdim=True)
        dx = x - (ink * x).sum(dim=(1, 2), keepdim=True)
        return -(ink * dx * dy).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2)).clamp_min(1e-6)
