"""The reward protocol: a callable on images, prompts and metadata that returns one tensor or several by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """``(images, prompts, metadata) -> [B]`` or a mapping of names to ``[B]``.

    ``images`` is what the pipeline returned (``[B, C, H, W]`` in [0, 1] for ``output_type="pt"``), ``prompts`` one text
    per image and ``metadata`` one dictionary per image.
    """

    def __call__(
        self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict]
    ) -> Tensor | Mapping[str, Tensor]: ...


def score(
    reward: Reward, images: Any, prompts: Sequence[Any], metadata: Sequence[dict], device: torch.device
) -> dict[str, Tensor]:
    """Rewards by name, float32 ``[B]`` on ``device``; a reward without names is called ``reward``.

    Raises:
        TypeError: no tensor or mapping of tensors. ValueError: not one number per image.
    """
    result = reward(images, prompts, metadata)
    named = dict(result) if isinstance(result, Mapping) else {"reward": result}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"reward: got {type(value).__name__} for {name!r}, expected a tensor with one number per image"
            )
        if value.shape != (len(prompts),):
            raise ValueError(f"reward: got shape {list(value.shape)} for {name!r}, expected [{len(prompts)}]")
        named[name] = value.detach().to(device=device, dtype=torch.float32)
    if not named:
        raise ValueError("reward: got no rewards, expected at least one")
    return named
