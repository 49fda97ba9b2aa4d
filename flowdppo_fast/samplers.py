"""Samplers: every stochastic flow sampler as ``mu = a*x + b*v``, ``x' = mu + S*e`` (one affine family).

The four numbers of a step are computed once on the host in float64 (:class:`SDEStep`) and travel to the kernels as a
small per-row table. Adding a sampler means adding one function to :data:`SAMPLERS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .layout import expand_to_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The noise levels a sampler may look at besides its own two: the whole descending schedule, 1 -> 0."""

    sigma_max: float
    first: float
    last: float

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[float]) -> Schedule:
        """``sigma_max`` is ``sigmas[1]``, the level that stands in for 1 where ``1 - sigma`` would be 0."""
        return cls(sigma_max=sigmas[1], first=sigmas[1], last=sigmas[-1])


def _reverse_sde(std_dev: float, sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """Coefficients ``(a, b, S)`` of the reverse-time SDE with diffusion ``std_dev`` at ``sigma``."""
    dt = sigma_next - sigma
    a = 1.0 + std_dev**2 * dt / (2.0 * sigma)
    b = (1.0 + std_dev**2 * (1.0 - sigma) / (2.0 * sigma)) * dt
    return a, b, std_dev * math.sqrt(-dt)


def flow_sde(sigma: float, sigma_next: float, eta: float, schedule: Schedule) -> tuple[float, float, float]:
    """Flow-GRPO's sampler: ``s = eta * sqrt(sigma / (1 - sigma))``, ``sigma_max`` in place of ``sigma == 1``."""
    guarded = schedule.sigma_max if sigma == 1.0 else sigma
    return _reverse_sde(eta * math.sqrt(sigma / (1.0 - guarded)), sigma, sigma_next)


def dance(sigma: float, sigma_next: float, eta: float, schedule: Schedule) -> tuple[float, float, float]:
    """DanceGRPO's sampler: constant diffusion ``s = eta``."""
    return _reverse_sde(eta, sigma, sigma_next)


def wan(sigma: float, sigma_next: float, eta: float, schedule: Schedule) -> tuple[float, float, float]:
    """flow_grpo's video sampler: diffusion linear in sigma; no noise level, ``eta`` only switches it off at 0."""
    std_dev = schedule.last + (schedule.first - schedule.last) * sigma
    return _reverse_sde(std_dev if eta > 0.0 else 0.0, sigma, sigma_next)


def cps(sigma: float, sigma_next: float, eta: float, schedule: Schedule) -> tuple[float, float, float]:
    """Flow-CPS: coefficients-preserving sampler, ``S = sigma' * sin(eta*pi/2)``; no noise at ``sigma' = 0``."""
    std = sigma_next * math.sin(eta * math.pi / 2.0)
    # the direction that is kept; max() because eta = 1 leaves a rounding error below zero
    kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
    a = (1.0 - sigma_next) + kept
    b = -sigma * (1.0 - sigma_next) + (1.0 - sigma) * kept
    return a, b, std


def ode(sigma: float, sigma_next: float, eta: float, schedule: Schedule) -> tuple[float, float, float]:
    """The probability-flow Euler step: no noise, so no density and no training row."""
    return 1.0, sigma_next - sigma, 0.0


SAMPLERS: dict[str, Callable[[float, float, float, Schedule], tuple[float, float, float]]] = {
    "flow_sde": flow_sde,
    "dance": dance,
    "wan": wan,
    "cps": cps,
    "ode": ode,
}


@dataclass(frozen=True)
class SDEStep:
    """One denoising step ``mu = a*x + b*v``, ``x' = mu + S*e`` with ``e ~ N(0, I)``, or several stacked.

    Args:
        sample_coef: ``a``.
        velocity_coef: ``b`` (negative for the samplers above: a step removes noise).
        std: ``S``, the standard deviation of the step's Gaussian, in latent units.
        dt: ``sigma_next - sigma``, negative.
        sampler: name of the sampler, for messages.
        sigma, sigma_next: noise levels, for messages.

    Numbers are python floats (one step for all rows) or float64 CPU tensors whose shape broadcasts against the rows
    (``[S]`` for stacked steps, ``[B]`` for a step per row); see :meth:`stack`. Source: spec table of samplers
    (Flow-GRPO 2505.05470, DanceGRPO, Flow-CPS 2509.05952).
    """

    sample_coef: float | Tensor
    velocity_coef: float | Tensor
    std: float | Tensor
    dt: float | Tensor
    sampler: str = "custom"
    sigma: float | Tensor = math.nan
    sigma_next: float | Tensor = math.nan
    _tables: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    _silent: int | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def from_sigmas(
        cls, sampler: str, sigma: float, sigma_next: float, *, eta: float = 0.7, schedule: Schedule | None = None
    ) -> SDEStep:
        """The step of ``sampler`` from ``sigma`` down to ``sigma_next`` (levels in (0, 1] and [0, 1)).

        Args:
            eta: noise level, >= 0 (for ``cps`` at most 1).
            schedule: needed by ``flow_sde`` at ``sigma == 1`` and by ``wan``.

        Raises:
            ValueError: unknown sampler, levels out of order or range, negative ``eta``, or a schedule that is needed
                and missing.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(map(repr, SAMPLERS))}")
        if not 0.0 <= sigma_next < sigma <= 1.0:
            raise ValueError(
                f"sigma, sigma_next: got {sigma:g} -> {sigma_next:g}, expected 0 <= sigma_next < sigma <= 1"
            )
        if eta < 0.0 or (sampler == "cps" and eta > 1.0):
            raise ValueError(f"eta: got {eta:g}, expected a noise level >= 0 (and <= 1 for 'cps')")
        if schedule is None:
            if sampler == "wan" or (sampler == "flow_sde" and sigma == 1.0):
                raise ValueError(
                    f"schedule: sampler {sampler!r} at sigma={sigma:g} needs the whole schedule; "
                    "pass schedule=Schedule.from_sigmas(sigmas)"
                )
            schedule = Schedule(math.nan, math.nan, math.nan)
        a, b, std = SAMPLERS[sampler](sigma, sigma_next, eta, schedule)
        return cls(a, b, std, sigma_next - sigma, sampler, sigma, sigma_next)

    @classmethod
    def stack(cls, steps: Sequence[SDEStep]) -> SDEStep:
        """One :class:`SDEStep` holding ``[S]`` tensors, for rows ``[B, S]`` (or ``[B]``, one step per row).

        Raises:
            ValueError: no steps.
        """
        if not steps:
            raise ValueError("steps: got none, expected at least one SDEStep")
        names = {step.sampler for step in steps}

        def column(name: str) -> Tensor:
            return torch.tensor([float(getattr(step, name)) for step in steps], dtype=torch.float64)

        return cls(
            column("sample_coef"),
            column("velocity_coef"),
            column("std"),
            column("dt"),
            names.pop() if len(names) == 1 else "mixed",
            column("sigma"),
            column("sigma_next"),
        )

    @property
    def is_scalar(self) -> bool:
        """True when one set of python floats serves all rows."""
        return not isinstance(self.std, torch.Tensor)

    @property
    def kl_scale(self) -> float | Tensor:
        """``k = b/S``: ``u = k * (new - old)`` on velocities."""
        return self.velocity_coef / self.std

    def row_values(self) -> list[float]:
        """``[S, k, -dt]`` of a scalar step, for training rows.

        Raises:
            ValueError: the step has no density (``S == 0``).
        """
        self._check_density()
        return [self.std, self.kl_scale, -self.dt]  # type: ignore[list-item]

    def row_table(self, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[R, 3]`` table of ``S, k, -dt`` per row on ``device``; built once per (rows, device, dtype) and kept.

        Raises:
            ValueError: a step has no density (``S == 0``), or its shape does not broadcast to ``rows``.
        """
        key = ("row", rows, device, dtype)
        if key not in self._tables:
            self._check_density()
            self._tables[key] = _table((self.std, self.kl_scale, -self.dt), rows, device, dtype)
        return self._tables[key]

    def step_values(self) -> list[float]:
        """``[a, b, S]`` of a scalar step, for the sampler."""
        return [self.sample_coef, self.velocity_coef, self.std]  # type: ignore[list-item]

    def step_table(self, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[R, 3]`` table of ``a, b, S`` per row on ``device``, kept like :meth:`row_table`."""
        key = ("step", rows, device, dtype)
        if key not in self._tables:
            columns = (self.sample_coef, self.velocity_coef, self.std)
            self._tables[key] = _table(columns, rows, device, dtype)
        return self._tables[key]

    def __post_init__(self) -> None:
        # looked up on the host once: no training call has to read a tensor for it
        zero = (torch.as_tensor(self.std) == 0.0).flatten().tolist()
        object.__setattr__(self, "_silent", zero.index(True) if True in zero else None)

    def _check_density(self) -> None:
        if self._silent is None:
            return
        levels = (torch.as_tensor(level).flatten() for level in (self.sigma, self.sigma_next))
        sigma, sigma_next = (float(level[min(self._silent, level.numel() - 1)]) for level in levels)
        raise ValueError(
            f"step: step {self._silent} of sampler {self.sampler!r} from sigma={sigma:g} to sigma_next={sigma_next:g} "
            "adds no noise (std == 0), so it has no density and cannot be a training row; leave it out of the "
            "trained steps or raise eta"
        )


def _table(columns: tuple, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    expanded = [expand_to_rows(torch.as_tensor(column, dtype=torch.float64), "step", rows) for column in columns]
    return torch.stack(expanded, dim=-1).reshape(-1, 3).to(device=device, dtype=dtype)


def sde_schedule(sampler: str, sigmas: Sequence[float], *, eta: float = 0.7) -> list[SDEStep]:
    """All steps of a descending schedule ``sigmas`` (``[T+1]`` levels, 1 -> 0) under one sampler.

    Raises:
        ValueError: fewer than two levels, or anything :meth:`SDEStep.from_sigmas` refuses.
    """
    levels = [float(level) for level in sigmas]
    if len(levels) < 2:
        raise ValueError(f"sigmas: got {len(levels)} levels, expected at least 2 (a schedule of T steps has T+1)")
    schedule = Schedule.from_sigmas(levels)
    return [
        SDEStep.from_sigmas(sampler, sigma, sigma_next, eta=eta, schedule=schedule)
        for sigma, sigma_next in itertools.pairwise(levels)
    ]
