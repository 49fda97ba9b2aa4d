"""Exponential moving average of trained parameters, with one fused update and no host sync."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class MovingAverage:
    """``average += (1 - decay) * (parameter - average)``, per :meth:`update`."""

    def __init__(self, parameters: Sequence[Tensor], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the present parameters."""
        torch._foreach_lerp_(self.averages, self.parameters, 1.0 - self.decay)


@contextlib.contextmanager
def holding(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within this context ``parameters`` hold copies of ``values``."""
    own = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), list(values))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), own)
