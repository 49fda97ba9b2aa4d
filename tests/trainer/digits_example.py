"""The digits example as the trainer's tests use it."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
PROMPTS = [str(digit) for digit in range(10)]


def ink(images, prompts, metadata):
    """A reward for tests: the mean pixel."""
    return images.mean(dim=(1, 2, 3))
