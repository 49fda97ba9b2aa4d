"""A reward of one's own for a config: ``callable: examples.configs.digits_reward:readable``."""

from __future__ import annotations

from examples.digits.judge import Judge
from examples.digits.rewards import ReadableReward


def readable(checkpoint: str) -> ReadableReward:
    """The probability, in [0, 1], that the judge in the folder ``checkpoint`` gives to the asked digit."""
    return ReadableReward(Judge.from_pretrained(checkpoint))
