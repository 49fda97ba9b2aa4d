"""A diffusers scheduler's levels on the host: read once per schedule, so that a step costs no per-row syncs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .samplers import ScheduleLevels, SDEStep, on_host


@dataclass
class HostSchedule:
    """``sigmas`` (T+1 levels) and the index of each timestep, as python numbers."""

    sigmas: list[float]
    index_of: dict[float, int]
    _steps: dict[tuple[str, int, float], SDEStep] = field(default_factory=dict)

    @classmethod
    def of(cls, scheduler: Any) -> HostSchedule:
        """The schedule that ``scheduler`` holds now; two small copies to the host when it changed, none otherwise."""
        sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
        # tensors made in inference mode count no changes, so what they hold is read again
        tracked = not (sigmas.is_inference() or timesteps.is_inference())
        version = (sigmas._version, timesteps._version) if tracked else None
        known = _known.get(id(sigmas)) if tracked else None
        if known is not None and known[0]() is sigmas and known[1]() is timesteps and known[2] == version:
            return known[3]
        index_of: dict[float, int] = {}
        count: dict[float, int] = {}
        for index, timestep in enumerate(float(t) for t in timesteps.tolist()):
            count[timestep] = count.get(timestep, 0) + 1
            # diffusers takes the second of equal timesteps, so that image-to-image does not skip a level
            if count[timestep] <= 2:
                index_of[timestep] = index
        host = cls([float(level) for level in sigmas.tolist()], index_of)
        if tracked:
            _known[id(sigmas)] = (weakref.ref(sigmas), weakref.ref(timesteps), version, host)
        while len(_known) > _KEPT:
            _known.pop(next(iter(_known)))
        return host

    def indices(self, timestep: Tensor) -> list[int]:
        """Step index of each timestep (one sync).

        Raises:
            ValueError: a timestep that is not in the schedule.
        """
        found = []
        for value in timestep.reshape(-1).tolist():
            if float(value) not in self.index_of:
                raise ValueError(
                    f"timestep: got {value}, expected one of the scheduler's timesteps "
                    f"({', '.join(f'{t:g}' for t in self.index_of)})"
                )
            found.append(self.index_of[float(value)])
        return found

    def step(self, sampler: str, indices: Sequence[int], eta: float | Sequence[float]) -> SDEStep:
        """The steps at ``indices``: one scalar :class:`SDEStep` where all are the same, else stacked to ``[B]``."""
        # numpy's numbers are numbers
        levels = [float(eta)] * len(indices) if isinstance(eta, (int, float, Real)) else [float(level) for level in eta]
        pairs = list(zip(indices, levels))
        if len(set(pairs)) == 1:
            return self._one(sampler, *pairs[0])
        return SDEStep.stack([self._one(sampler, index, level) for index, level in pairs])

    def _one(self, sampler: str, index: int, eta: float) -> SDEStep:
        key = (sampler, index, eta)
        if key not in self._steps:
            sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
            schedule = ScheduleLevels.from_sigmas(self.sigmas)
            self._steps[key] = SDEStep.from_sigmas(sampler, sigma, sigma_next, eta=eta, schedule=schedule)
        return self._steps[key]


_KEPT = 8
_known: dict[int, tuple[weakref.ref, weakref.ref, tuple[int, int] | None, HostSchedule]] = {}


def per_row(value: float | Tensor, sample: Tensor) -> Tensor:
    """``value`` as a float32 ``[B or 1, 1, ..., 1]`` tensor beside ``sample``, the shape that trainers pass around."""
    shape = (-1,) + (1,) * (sample.ndim - 1)
    return on_host(value).to(device=sample.device, dtype=torch.float32).reshape(shape)
