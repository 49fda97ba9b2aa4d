"""From rewards to advantages, relative to the images that share a prompt (GRPO, arXiv 2402.03300, Sec. 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def weighted_reward(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """``[R]`` sum of ``weight * reward``; rewards that ``weights`` does not name count once.

    NaN, an abstention, where a reward of another weight than 0 is NaN.

    Raises:
        ValueError: a weight for a reward that does not exist.
    """
    unknown = [name for name in weights if name not in rewards]
    if unknown:
        raise ValueError(f"reward_weights: got {unknown}, expected names of rewards: {list(rewards)}")
    parts = [
        weights.get(name, 1.0) * value if weights.get(name, 1.0) else torch.zeros_like(value)
        for name, value in rewards.items()
    ]
    return torch.stack(parts).sum(0)


def group_advantages(
    rewards: Tensor, group_size: int, *, std: str = "group", eps: float = 1e-4, past: Tensor | None = None
) -> Tensor:
    """Reward minus the mean of its group, over a standard deviation plus ``eps``.

    Args:
        rewards: ``[groups * group_size]``, rows of a group adjacent; NaN is an abstention, which counts towards no mean
            and no standard deviation.
        std: ``"group"``, ``"global"`` (of all ``rewards``) or ``"none"``; population standard deviations, as in
            flow_grpo.
        eps: added to the standard deviation.
        past: ``[groups, H]`` earlier rewards of each group's prompt, NaN where there is none; they count towards the
            group's mean and standard deviation.

    Returns:
        Advantages shaped like ``rewards``; exactly 0 for abstentions and in a group whose rewards are all equal.

    Raises:
        ValueError: rewards that are no whole number of groups, or an unknown ``std``.
    """
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards: got shape {list(rewards.shape)}, expected [groups * {group_size}]")
    if std not in ("group", "global", "none"):
        raise ValueError(f"std: got {std!r}, expected 'group', 'global' or 'none'")
    grouped = rewards.view(-1, group_size)
    pool = grouped if past is None else torch.cat([grouped, past], dim=1)
    known = ~pool.isnan()
    mean, spread = _moments(pool, known)
    centred = grouped - mean[:, None]
    if std == "group":
        centred = centred / (spread[:, None] + eps)
    elif std == "global":
        centred = centred / (_moments(rewards, ~rewards.isnan())[1] + eps)
    # the mean of equal numbers may be an ulp off, which eps would turn into an advantage
    return torch.where(_flat(pool, known)[:, None] | grouped.isnan(), 0.0, centred).reshape(-1)


def group_spread(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Standard deviation of each group's rewards and whether they are all equal; ``[groups]`` each."""
    grouped = rewards.view(-1, group_size)
    known = ~grouped.isnan()
    return _moments(grouped, known)[1], _flat(grouped, known)


def _flat(values: Tensor, known: Tensor) -> Tensor:
    """Whether the ``known`` values of a row are all equal; so are those of a row without any."""
    highest = torch.where(known, values, -torch.inf).amax(-1)
    return highest <= torch.where(known, values, torch.inf).amin(-1)


def _moments(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of the ``known`` values of the last dimension."""
    count = known.sum(-1).clamp_min(1)
    mean = torch.where(known, values, 0.0).sum(-1) / count
    return mean, (torch.where(known, values - mean[..., None], 0.0).square().sum(-1) / count).sqrt()


def advantages_of(
    rewards: Mapping[str, Tensor],
    group_size: int,
    *,
    weights: Mapping[str, float],
    std: str = "group",
    eps: float = 1e-4,
    per_reward: bool = False,
    past: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """``[R]`` advantages of several rewards: of their weighted sum, or each normalised first (``per_reward``).

    Args:
        past: by reward, see :func:`group_advantages`.

    Raises:
        ValueError: as :func:`weighted_reward` and :func:`group_advantages`.
    """
    if per_reward:
        normalised = {
            name: group_advantages(value, group_size, std=std, eps=eps, past=past[name] if past else None)
            for name, value in rewards.items()
        }
        return weighted_reward(normalised, weights)
    total = weighted_reward(rewards, weights)
    return group_advantages(total, group_size, std=std, eps=eps, past=weighted_reward(past, weights) if past else None)


StepAdvantages = Callable[[Tensor, Mapping[str, Tensor], Sequence[int]], Tensor]


def per_step(
    function: StepAdvantages | None, advantages: Tensor, rewards: Mapping[str, Tensor], steps: Sequence[Any]
) -> Tensor:
    """``[R, S]`` advantages of the trained ``steps``, as ``function`` makes them; ``advantages`` without one.

    Raises:
        ValueError: it returns something else.
    """
    if function is None:
        return advantages
    given = function(advantages, rewards, [step.index for step in steps])
    shape = (len(advantages), len(steps))
    if not isinstance(given, Tensor) or tuple(given.shape) != shape:
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"step_advantages: returned {got}, expected a tensor [images, trained steps], {list(shape)}")
    return given.to(advantages)


class RewardHistory:
    """The last rewards of each prompt, on the device of the rewards.

    Args:
        prompts: how many there are.
        length: rewards kept per prompt; None keeps nothing.
    """

    def __init__(self, prompts: int, length: int | None):
        self.prompts, self.length = prompts, length
        self.tables: dict[str, Tensor] = {}

    def past(self, rewards: Mapping[str, Tensor], groups: Sequence[int]) -> dict[str, Tensor] | None:
        """By reward, ``[groups, length]`` what was added for the prompts numbered ``groups``; None without history."""
        if self.length is None:
            return None
        for name, value in rewards.items():
            if name not in self.tables:
                self.tables[name] = value.new_full((self.prompts, self.length), float("nan"))
        index = torch.tensor(groups)
        return {name: self.tables[name][index.to(value.device)] for name, value in rewards.items()}

    def add(self, rewards: Mapping[str, Tensor], groups: Sequence[int]) -> None:
        """Adds ``[groups * group_size]`` rewards; the oldest make room."""
        if self.length is None:
            return
        for name, value in rewards.items():
            table = self.tables[name]
            # one after the other: a prompt may have several groups
            for prompt, group in zip(groups, value.view(len(groups), -1)):
                table[prompt] = torch.cat([table[prompt], group])[-self.length :]
