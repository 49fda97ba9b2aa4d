"""The reward protocol: a callable on images, prompts and metadata that returns one tensor or several by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """``(images, prompts, metadata) -> [B]`` or a mapping of names to ``[B]``.

    ``images`` is what the pipeline returned: for ``output_type="pt"`` a tensor in [0, 1], ``[B, C, H, W]`` or a video
    ``[B, F, C, H, W]``; ``"np"`` and ``"pil"`` as diffusers makes them (:func:`~.images.to_pixels` reads them all).
    ``prompts`` has one text per image and ``metadata`` one dictionary per image.

    A reward must not change the images, and must not draw from the global random states of torch, numpy or python:
    it may run in a thread beside the sampler (:class:`~.background.BackgroundScorer`), whose numbers would then
    depend on who comes first. One that needs random numbers keeps a generator of its own.

    A reward with a method ``to(device)`` can be moved (:func:`move_reward`).
    """

    def __call__(
        self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict]
    ) -> Tensor | Mapping[str, Tensor]: ...


def score(
    reward: Reward, images: Any, prompts: Sequence[Any], metadata: Sequence[dict], device: torch.device
) -> dict[str, Tensor]:
    """Rewards by name, float32 ``[B]`` on ``device``; a reward without names is called ``reward``.

    Reading whether all of them are finite waits for the device once.

    Args:
        reward: what is called, without gradients.
        images, prompts, metadata: as :class:`Reward` takes them, B of each.
        device: of the results.

    Raises:
        TypeError: no tensor or mapping of tensors.
        ValueError: not one number per image, or one that is not finite in float32; it is named with its sample.
    """
    with torch.no_grad():
        result = reward(images, prompts, metadata)
    named = dict(result) if isinstance(result, Mapping) else {"reward": result}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.is_complex():
            kind = f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"reward: got {kind} for {name!r}, expected a tensor with one number per image")
        if value.shape != (len(prompts),):
            raise ValueError(f"reward: got shape {list(value.shape)} for {name!r}, expected [{len(prompts)}]")
        named[name] = value.detach().to(device=device, dtype=torch.float32)
    if not named:
        raise ValueError("reward: got no rewards, expected at least one")
    if not torch.isfinite(torch.stack(list(named.values()))).all():
        raise ValueError(_describe_nonfinite(named, prompts))
    return named


def move_reward(reward: Reward, device: torch.device | str) -> None:
    """Moves a reward that has a method ``to(device)``; others stay as they are.

    A reward that is scored in the background is moved before the first submit or after the last result.
    """
    move = getattr(reward, "to", None)
    if callable(move):
        move(device)


def _describe_nonfinite(named: Mapping[str, Tensor], prompts: Sequence[Any]) -> str:
    name, values = next((name, v.cpu()) for name, v in named.items() if not torch.isfinite(v).all())
    wrong = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
    prompt = repr(prompts[wrong[0]])
    prompt = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
    others = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
    return (
        f"reward: got {values[wrong[0]].item()} for {name!r} of sample {wrong[0]}{others} out of {len(values)} "
        f"(prompt {prompt}), expected finite numbers"
    )
