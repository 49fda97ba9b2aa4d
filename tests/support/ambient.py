"""What a caller may have set for torch as a whole, and a scheduler to be called in it."""

from __future__ import annotations

import contextlib

import torch


class Schedule:
    """What is read of a diffusers scheduler."""

    def __init__(self, steps: int = 10):
        self.sigmas = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32, device="cpu")
        self.timesteps = 1000.0 * self.sigmas[:-1]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
