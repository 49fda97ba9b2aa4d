"""From rewards to advantages, relative to the images that share a prompt (GRPO, arXiv 2402.03300, Sec. 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def weighted_reward(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """``[R]`` sum of ``weight * reward``; rewards that ``weights`` does not name count once.

    Raises:
        ValueError: a weight for a reward that does not exist.
    """
    unknown = [name for name in weights if name not in rewards]
    if unknown:
        raise ValueError(f"reward_weights: got {unknown}, expected names of rewards: {list(rewards)}")
    return torch.stack([weights.get(name, 1.0) * value for name, value in rewards.items()]).sum(0)


def group_advantages(rewards: Tensor, group_size: int, *, std: str = "group", eps: float = 1e-4) -> Tensor:
    """Reward minus the mean of its group, over a standard deviation plus ``eps``.

    Args:
        rewards: ``[groups * group_size]``, rows of a group adjacent.
        std: ``"group"``, ``"global"`` (of all rewards) or ``"none"``; population standard deviations, as in flow_grpo.
        eps: added to the standard deviation.

    Returns:
        Advantages shaped like ``rewards``; exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: rewards that are no whole number of groups, or an unknown ``std``.
    """
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards: got shape {list(rewards.shape)}, expected [groups * {group_size}]")
    if std not in ("group", "global", "none"):
        raise ValueError(f"std: got {std!r}, expected 'group', 'global' or 'none'")
    grouped = rewards.view(-1, group_size)
    centred = grouped - grouped.mean(1, keepdim=True)
    if std == "group":
        centred = centred / (grouped.std(1, correction=0, keepdim=True) + eps)
    elif std == "global":
        centred = centred / (rewards.std(correction=0) + eps)
    # the mean of equal numbers may be an ulp off, which eps would turn into an advantage
    flat = grouped.amax(1, keepdim=True) == grouped.amin(1, keepdim=True)
    return torch.where(flat, 0.0, centred).reshape(-1)


def advantages_of(
    rewards: Mapping[str, Tensor],
    group_size: int,
    *,
    weights: Mapping[str, float],
    std: str = "group",
    eps: float = 1e-4,
    per_reward: bool = False,
) -> Tensor:
    """``[R]`` advantages of several rewards: of their weighted sum, or each normalised first (``per_reward``).

    Raises:
        ValueError: as :func:`weighted_reward` and :func:`group_advantages`.
    """
    if per_reward:
        rewards = {name: group_advantages(value, group_size, std=std, eps=eps) for name, value in rewards.items()}
        return weighted_reward(rewards, weights)
    return group_advantages(weighted_reward(rewards, weights), group_size, std=std, eps=eps)
