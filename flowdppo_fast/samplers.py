"""Samplers: every stochastic flow sampler as ``mu = a*x + b*v``, ``x' = mu + S*e`` (one affine family).

The four numbers of a step are computed once in float64 (:class:`SDEStep`) and travel to the kernels as a small per-row
table. A sampler is its diffusion and what that makes of a step; adding one means adding an entry to :data:`SAMPLERS`.
The formulas serve python floats and tensors of levels alike.
"""

from __future__ import annotations

import functools
import itertools
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import expand_to_rows

Level = float | Tensor
# a level that stands in for 0 in a denominator
_TINY = 1e-30


@dataclass(frozen=True)
class ScheduleLevels:
    """The noise levels a sampler may look at besides its own two: of the whole descending schedule, 1 -> 0.

    Args:
        sigma_max: the level that stands in for 1 where ``1 - sigma`` would be 0 (``flow_sde``).
        first, last: the two levels between which ``wan``'s diffusion is linear in sigma.
    """

    sigma_max: Level
    first: Level
    last: Level

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[float] | Tensor) -> ScheduleLevels:
        """``sigma_max`` is ``sigmas[1]``, the level that stands in for 1 where ``1 - sigma`` would be 0.

        Raises:
            ValueError: fewer than two levels.
        """
        if len(sigmas) < 2:
            raise ValueError(
                f"sigmas: got {len(sigmas)} levels, expected at least 2 (a schedule of T steps has T+1 levels)"
            )
        return cls(sigma_max=sigmas[1], first=sigmas[1], last=sigmas[-1])


def _sqrt(x: Level) -> Level:
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def _exp(x: Level) -> Level:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def _flow_sde_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    if isinstance(sigma, Tensor):
        guarded: Level = torch.where(sigma == 1.0, schedule.sigma_max, sigma)
    else:
        guarded = schedule.sigma_max if sigma == 1.0 else sigma
    return eta * _sqrt(sigma / (1.0 - guarded))


def _constant_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    return torch.full_like(sigma, eta) if isinstance(sigma, Tensor) else eta


def _linear_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    # flow_grpo's video sampler has no noise level: eta only switches it off at 0
    on = 1.0 if eta > 0.0 else 0.0
    return on * (schedule.last + (schedule.first - schedule.last) * sigma)


def _scaled_linear_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    return eta * _linear_diffusion(sigma, sigma_next, 1.0, schedule)


def _preserving_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    return sigma_next * math.sin(eta * math.pi / 2.0)


def _precise_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    left = (sigma_next * (1.0 - sigma) / (sigma * (1.0 - sigma_next))) ** (eta**2)
    return sigma_next * _sqrt(1.0 - left)


def _dance_precise_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    # at sigma' = 0 nothing is left, and no noise is needed
    low = sigma_next.clamp_min(_TINY) if isinstance(sigma_next, Tensor) else max(sigma_next, _TINY)
    return sigma_next * _sqrt(1.0 - _exp(-(eta**2) * (1.0 / low - 1.0 / sigma)))


def _no_diffusion(sigma: Level, sigma_next: Level, eta: float, schedule: ScheduleLevels) -> Level:
    return 0.0 * sigma


def _reverse_sde(std_dev: Level, sigma: Level, sigma_next: Level) -> tuple[Level, Level, Level]:
    """``a, b, S`` of the reverse-time SDE with diffusion ``std_dev`` at ``sigma``."""
    dt = sigma_next - sigma
    a = 1.0 + std_dev**2 * dt / (2.0 * sigma)
    b = (1.0 + std_dev**2 * (1.0 - sigma) / (2.0 * sigma)) * dt
    return a, b, std_dev * _sqrt(-dt)


def _preserving_step(std_dev: Level, sigma: Level, sigma_next: Level) -> tuple[Level, Level, Level]:
    """``a, b, S`` of Flow-CPS: what is not redrawn keeps its direction."""
    # at eta = 1 rounding can leave less than zero
    left = sigma_next**2 - std_dev**2
    kept = _sqrt(left.clamp_min(0.0) if isinstance(left, Tensor) else max(left, 0.0))
    a = (1.0 - sigma_next) + kept
    b = -sigma * (1.0 - sigma_next) + (1.0 - sigma) * kept
    return a, b, std_dev


class Sampler(NamedTuple):
    """``diffusion(sigma, sigma_next, eta, schedule)`` is trainers' ``std_dev_t``; ``step`` makes ``a, b, S`` of it."""

    diffusion: Callable[[Level, Level, float, ScheduleLevels], Level]
    step: Callable[[Level, Level, Level], tuple[Level, Level, Level]]


SAMPLERS: dict[str, Sampler] = {
    # Flow-GRPO: s = eta * sqrt(sigma / (1 - sigma)), sigma_max in place of sigma == 1
    "flow_sde": Sampler(_flow_sde_diffusion, _reverse_sde),
    # DanceGRPO: s = eta
    "dance": Sampler(_constant_diffusion, _reverse_sde),
    # flow_grpo for video: s linear in sigma
    "wan": Sampler(_linear_diffusion, _reverse_sde),
    # Flow-CPS: S = sigma' * sin(eta*pi/2), none at sigma' = 0
    "cps": Sampler(_preserving_diffusion, _preserving_step),
    # Flash-GRPO: wan's, times eta
    "flash": Sampler(_scaled_linear_diffusion, _reverse_sde),
    # Precise: CPS's step, and what of the noise is redrawn depends on no size of step
    "precise": Sampler(_precise_diffusion, _preserving_step),
    # the same with DanceGRPO's diffusion
    "dance_precise": Sampler(_dance_precise_diffusion, _preserving_step),
    # the probability-flow Euler step: no noise, so no density and no training row
    "ode": Sampler(_no_diffusion, _reverse_sde),
}


def on_host(value: float | Tensor) -> Tensor:
    """A number as a float64 tensor on the CPU, whatever dtype and device are the default; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


def find_sampler(name: str) -> Sampler:
    """The sampler of that name, or the one of one's own that ``package.module:attribute`` names: a :class:`Sampler`, or
    the diffusion of a reverse-time SDE.

    Raises:
        ValueError: there is none.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if ":" not in name:
        known = ", ".join(map(repr, SAMPLERS))
        raise ValueError(f"sampler: got {name!r}, expected one of {known}, or package.module:attribute")
    return _own_sampler(name)


@functools.cache
def _own_sampler(name: str) -> Sampler:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"sampler: got {name!r}, which cannot be imported ({error})") from error
    if not isinstance(found, Sampler) and not callable(found):
        raise ValueError(f"sampler: {name!r} is a {type(found).__name__}, expected a Sampler or a diffusion")
    return found if isinstance(found, Sampler) else Sampler(found, _reverse_sde)


def diffusion(sampler: str, sigma: Tensor, sigma_next: Tensor, *, eta: float, schedule: ScheduleLevels) -> Tensor:
    """What trainers call ``std_dev_t``, float64, shaped like ``sigma``: ``s`` of the SDE samplers, ``S`` of CPS.

    Raises:
        ValueError: unknown sampler.
    """
    formulas = find_sampler(sampler)
    return on_host(formulas.diffusion(sigma.double(), sigma_next.double(), eta, _double(schedule)))


def _double(schedule: ScheduleLevels) -> ScheduleLevels:
    levels = (schedule.sigma_max, schedule.first, schedule.last)
    return ScheduleLevels(*(level.double() if isinstance(level, Tensor) else level for level in levels))


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

    Numbers are python floats (one step for all rows) or float64 tensors whose shape broadcasts against the rows
    (``[S]`` for stacked steps, ``[B]`` for a step per row); see :meth:`stack` and :meth:`from_levels`. Sources:
    Flow-GRPO 2505.05470, DanceGRPO, Flow-CPS 2509.05952, Flash-GRPO 2605.15980, Precise 2605.23522.
    """

    sample_coef: Level
    velocity_coef: Level
    std: Level
    dt: Level
    sampler: str = "custom"
    sigma: Level = math.nan
    sigma_next: Level = math.nan
    _tables: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    _silent: int | None = field(default=None, init=False, repr=False, compare=False)
    # of a scalar step that has a density
    checked_values: list[float] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def from_sigmas(
        cls, sampler: str, sigma: float, sigma_next: float, *, eta: float = 0.7, schedule: ScheduleLevels | None = None
    ) -> SDEStep:
        """The step of ``sampler`` from ``sigma`` down to ``sigma_next`` (levels in (0, 1] and [0, 1)).

        Args:
            eta: noise level, >= 0 (for ``cps`` below 2, and from 1 on less noise again, as its sine has it).
            schedule: needed by ``flow_sde`` at ``sigma == 1``, by ``wan`` and by ``flash``.

        Raises:
            ValueError: unknown sampler, levels out of order or range, negative ``eta``, or a schedule that is needed
                and missing.
        """
        formulas = find_sampler(sampler)
        # schedulers hold float32 tensors; everything is computed in float64 from their values
        sigma, sigma_next, eta = float(sigma), float(sigma_next), float(eta)
        if not 0.0 <= sigma_next < sigma <= 1.0:
            raise ValueError(
                f"sigma, sigma_next: got {sigma:g} -> {sigma_next:g}, expected 0 <= sigma_next < sigma <= 1"
            )
        if not eta >= 0.0 or (sampler == "cps" and eta >= 2.0):
            raise ValueError(f"eta: got {eta:g}, expected a noise level >= 0 (and below 2 for 'cps')")
        if schedule is None:
            if sampler in ("wan", "flash") or (sampler == "flow_sde" and sigma == 1.0):
                raise ValueError(
                    f"schedule: sampler {sampler!r} at sigma={sigma:g} needs the whole schedule; "
                    "pass schedule=ScheduleLevels.from_sigmas(sigmas)"
                )
            schedule = ScheduleLevels(math.nan, math.nan, math.nan)
        levels = (schedule.sigma_max, schedule.first, schedule.last)
        std_dev = formulas.diffusion(sigma, sigma_next, eta, ScheduleLevels(*map(float, levels)))
        return cls(*formulas.step(std_dev, sigma, sigma_next), sigma_next - sigma, sampler, sigma, sigma_next)

    @classmethod
    def from_alphas(cls, alpha: float, alpha_next: float, *, eta: float = 1.0) -> SDEStep:
        """DDIM's step (arXiv 2010.02502, Eq. 12 and 16) of a model that predicts the noise, for SD1.5 and SDXL.

        It is affine in that prediction, which losses then take in the place of a velocity.

        Args:
            alpha, alpha_next: cumulative products of the schedule, ``alphas_cumprod``, in (0, 1) and rising.
            eta: noise level in [0, 1]; 1 is DDPM's.

        Raises:
            ValueError: products out of order or range, or such an ``eta``.
        """
        alpha, alpha_next, eta = float(alpha), float(alpha_next), float(eta)
        if not 0.0 < alpha < alpha_next < 1.0:
            raise ValueError(f"alpha, alpha_next: got {alpha:g} -> {alpha_next:g}, expected 0 < alpha < alpha_next < 1")
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta: got {eta:g}, expected a number in [0, 1]")
        std = eta * math.sqrt((1.0 - alpha_next) / (1.0 - alpha) * (1.0 - alpha / alpha_next))
        scale, sigma, sigma_next = math.sqrt(alpha_next / alpha), math.sqrt(1.0 - alpha), math.sqrt(1.0 - alpha_next)
        velocity_coef = math.sqrt(1.0 - alpha_next - std**2) - scale * sigma
        return cls(scale, velocity_coef, std, sigma_next - sigma, "ddim", sigma, sigma_next)

    def __getitem__(self, part: slice) -> SDEStep:
        """Some of the steps stacked to ``[S]``; asked again, the same object with what it keeps on devices."""
        start, stop, _ = part.indices(len(on_host(self.std)))
        key = ("part", start, stop)
        if key not in self._tables:
            levels = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
            cut = {name: level[start:stop] for name, level in levels.items() if isinstance(level, Tensor)}
            self._tables[key] = replace(self, **cut)  # type: ignore[arg-type]
        return self._tables[key]

    @classmethod
    def from_levels(cls, sampler: str, std_dev: Tensor, sigma: Tensor, sigma_next: Tensor) -> SDEStep:
        """Steps from levels that live on the device, evaluated there in float64 without a sync.

        Args:
            std_dev: :func:`diffusion` of the steps, or the trainer's own ``std_dev_t``.
            sigma, sigma_next: noise levels; all three of one shape, ``[rows]``.

        Nothing on a GPU is looked at, so levels out of range and steps without noise show as non-finite rows, not as
        errors.

        Raises:
            ValueError: unknown sampler.
        """
        std_dev, sigma, sigma_next = std_dev.double(), sigma.double(), sigma_next.double()
        numbers = find_sampler(sampler).step(std_dev, sigma, sigma_next)
        return cls(*numbers, sigma_next - sigma, sampler, sigma, sigma_next)

    @classmethod
    def stack(cls, steps: Sequence[SDEStep]) -> SDEStep:
        """One :class:`SDEStep` holding ``[S]`` tensors, for rows ``[B, S]`` (or ``[B]``, one step per row).

        Raises:
            ValueError: no steps. TypeError: something else than scalar steps.
        """
        if not steps:
            raise ValueError("steps: got none, expected at least one SDEStep")
        for step in steps:
            if not isinstance(step, SDEStep) or not step.is_scalar:
                raise TypeError(f"steps: got a {type(step).__name__}, expected SDESteps of python floats")
        names = {step.sampler for step in steps}

        def column(name: str) -> Tensor:
            return torch.tensor([float(getattr(step, name)) for step in steps], dtype=torch.float64, device="cpu")

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
        assert self.checked_values is not None
        return self.checked_values

    def row_table(self, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[R, 3]`` table of ``S, k, -dt`` per row on ``device``; built once per (rows, device, dtype) and kept.

        Raises:
            ValueError: a step has no density (``S == 0``), or its shape does not broadcast to ``rows``.
        """
        self._check_density()
        return self._table("row", rows, device, dtype)

    def sampler_values(self) -> list[float]:
        """``[a, b, S]`` of a scalar step, for the sampler."""
        return [float(self.sample_coef), float(self.velocity_coef), float(self.std)]

    def sampler_table(self, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[R, 3]`` table of ``a, b, S`` per row on ``device``, kept like :meth:`row_table`."""
        return self._table("sampler", rows, device, dtype)

    def _table(self, kind: str, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        def build() -> Tensor:
            if kind == "row":
                columns = (self.std, self.kl_scale, -self.dt)
            else:
                columns = (self.sample_coef, self.velocity_coef, self.std)
            expanded = [expand_to_rows(on_host(x).double(), "step", rows) for x in columns]
            return torch.stack(expanded, dim=-1).reshape(-1, 3).to(device=device, dtype=dtype)

        if torch.compiler.is_compiling():
            # as a key of a dict the number of rows would become a constant of the graph
            return build()
        key = (kind, rows, device, dtype)
        if key not in self._tables:
            # kept, so it must not become a tensor that no backward may save
            with torch.inference_mode(False):
                self._tables[key] = build()
        return self._tables[key]

    def __post_init__(self) -> None:
        std = on_host(self.std)
        if std.device.type != "cpu":
            return
        # looked up on the host once: no training call has to read a tensor for it
        if not bool((std >= 0.0).all()):
            raise ValueError(f"std: got {self.std}, expected standard deviations >= 0")
        if bool((on_host(self.dt) >= 0.0).any()):
            raise ValueError(f"dt: got {self.dt}, expected sigma_next - sigma < 0")
        zero = (std == 0.0).flatten().tolist()
        object.__setattr__(self, "_silent", zero.index(True) if True in zero else None)
        if self.is_scalar and self._silent is None:
            # floats whatever was given: Triton compiles kernels for the type
            object.__setattr__(self, "checked_values", [float(self.std), float(self.kl_scale), -float(self.dt)])

    def _check_density(self) -> None:
        if self._silent is None:
            return
        levels = (on_host(level).flatten() for level in (self.sigma, self.sigma_next))
        sigma, sigma_next = (float(level[min(self._silent, level.numel() - 1)]) for level in levels)
        raise ValueError(
            f"step: step {self._silent} of sampler {self.sampler!r} from sigma={sigma:g} to sigma_next={sigma_next:g} "
            "adds no noise (std == 0), so it has no density and cannot be a training row; leave it out of the "
            "trained steps or raise eta"
        )


def sde_schedule(sampler: str, sigmas: Sequence[float], *, eta: float = 0.7) -> list[SDEStep]:
    """All T steps of a descending schedule under one sampler, in float64.

    Args:
        sampler: a name from :data:`SAMPLERS`.
        sigmas: ``[T+1]`` levels, 1 -> 0.
        eta: noise level, >= 0 (for ``cps`` at most 1).

    Raises:
        ValueError: fewer than two levels, or anything :meth:`SDEStep.from_sigmas` refuses.
    """
    levels = [float(level) for level in sigmas]
    schedule = ScheduleLevels.from_sigmas(levels)
    return [
        SDEStep.from_sigmas(sampler, sigma, sigma_next, eta=eta, schedule=schedule)
        for sigma, sigma_next in itertools.pairwise(levels)
    ]
