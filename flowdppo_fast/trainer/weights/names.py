"""The model within what ``torch.compile`` returns, and the names that its weights have there and in files."""

from __future__ import annotations

from torch import nn


def bare(module: nn.Module) -> nn.Module:
    """The model within what ``torch.compile(module)`` returns; others are returned as they are."""
    return getattr(module, "_orig_mod", module)


def plain_name(key: str) -> str:
    """A parameter's name in the model itself, where blocks of it are what ``torch.compile`` returns."""
    return key.replace("_orig_mod.", "")
