"""Sizes of the tiny models."""

from __future__ import annotations

IMAGE_SIZE = 16
WIDTH = 12
