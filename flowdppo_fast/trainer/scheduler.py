"""Diffusers' flow-matching Euler scheduler with a stochastic sampler on chosen steps and the ODE on the rest."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from ..noise import PhiloxNoise
from ..samplers import SAMPLERS, Schedule, SDEStep
from ..sampling import sde_step

NOISE_KINDS = ("seeded", "stored")


@dataclass(frozen=True)
class Transition:
    """What a chosen step did.

    Attributes:
        index: position in the schedule, 0 is the noisiest step.
        velocity: ``[B, *latent]`` the velocity after guidance, as the scheduler was given it.
        noise: the drawn noise: ``[B, *latent]`` float32, or :class:`PhiloxNoise` with one stream per row.
        step: the :class:`SDEStep` of all rows.
    """

    index: int
    velocity: Tensor
    noise: Tensor | PhiloxNoise
    step: SDEStep


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """``FlowMatchEulerDiscreteScheduler`` whose chosen steps draw noise; built by :meth:`from_config`.

    Noise is counter-based: row ``r`` of step ``i`` reads stream ``(first_row + r) * T + i`` of ``seed``, T being the
    number of steps. Rows may therefore be shuffled or taken apart afterwards, and a rollout that is sampled in several
    calls with increasing ``first_row`` draws what one large call would have drawn. A generator given to :meth:`step` is
    not used.
    """

    sampler: str = "ode"
    eta: float = 0.0
    sde_steps: tuple[int, ...] = ()
    noise: str = "seeded"
    seed: int = 0
    first_row: int = 0
    on_step: Callable[[int, Transition | None], None] | None = None
    # the chosen steps of the schedule that was set last
    _plan: Mapping[int, SDEStep] = types.MappingProxyType({})

    @classmethod
    def from_config(  # type: ignore[override]
        cls,
        config: Any,
        *,
        sampler: str = "flow_sde",
        eta: float = 0.7,
        sde_steps: Iterable[int] = (),
        noise: str = "seeded",
        seed: int = 0,
        first_row: int = 0,
        on_step: Callable[[int, Transition | None], None] | None = None,
    ) -> FlowMatchSDEScheduler:
        """A scheduler with the schedule of another flow scheduler and noise on chosen steps.

        Args:
            config: a diffusers flow scheduler or its config. ``flow_shift`` of multistep schedulers becomes ``shift``.
            sampler: a name from :data:`flowdppo_fast.SAMPLERS`.
            eta: noise level of the sampler, > 0 where steps are chosen.
            sde_steps: indices of the steps that draw noise; the last step of a schedule cannot be one.
            noise: ``"seeded"`` keeps the seed and a stream per row, ``"stored"`` the same draws as a tensor.
            seed: 64-bit key of the noise.
            first_row: number of the first row, where one rollout is sampled in several calls.
            on_step: called after every step with its index and, for chosen steps, its :class:`Transition`, else None.

        Raises:
            ValueError: an unknown choice, no noise on chosen steps, or a scheduler that is not for flow matching.
        """
        scheduler_type = type(config).__name__
        config = dict(getattr(config, "config", config))
        name = config.get("_class_name", scheduler_type)
        if not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
            raise ValueError(
                f"config: got that of {name}, expected a flow-matching scheduler (FlowMatch..., or use_flow_sigmas)"
            )
        for option in ("invert_sigmas", "stochastic_sampling"):
            if config.get(option):
                raise ValueError(f"config: got {option}=True, expected a plain schedule from noise (1) to data (0)")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(map(repr, SAMPLERS))}")
        if noise not in NOISE_KINDS:
            raise ValueError(f"noise: got {noise!r}, expected one of {', '.join(map(repr, NOISE_KINDS))}")
        chosen = tuple(sorted(int(index) for index in sde_steps))
        if chosen and (sampler == "ode" or not eta > 0.0):
            raise ValueError(
                f"sde_steps: got steps {list(chosen)} with sampler={sampler!r}, eta={eta:g}: these draw no noise, so "
                "no step has a density; choose a stochastic sampler and eta > 0, or no steps"
            )
        if len(set(chosen)) != len(chosen) or any(index < 0 for index in chosen):
            raise ValueError(f"sde_steps: got {list(chosen)}, expected different step indices >= 0")
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        config.setdefault("shift", config.get("flow_shift", 1.0))
        scheduler = cls(**{key: value for key, value in config.items() if key in known})
        scheduler.sampler, scheduler.eta, scheduler.sde_steps = sampler, float(eta), chosen
        scheduler.noise, scheduler.seed, scheduler.first_row, scheduler.on_step = noise, seed, first_row, on_step
        return scheduler

    # pipelines look at the parameters of this method to see whether custom sigmas are allowed
    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args, **kwargs) -> None:  # type: ignore[override]
        super().set_timesteps(*args, **kwargs)
        levels = self.sigmas.tolist()
        self._plan = {index: trainable_step(self.sampler, levels, index, self.eta) for index in self.sde_steps}

    def step(  # type: ignore[override]
        self, model_output: Any, timestep: Any, sample: Any, *, return_dict: bool = True, **kwargs: Any
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step, like diffusers' ``step``; the next sample has ``model_output``'s dtype.

        Args:
            model_output, sample: ``[B, *latent]`` velocity and state.
            timestep: one of ``timesteps``.

        Raises:
            ValueError: per-token timesteps on a step that draws noise.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        index: int = self.step_index
        planned = self._plan.get(index)
        transition = None
        if planned is None:
            (next_sample,) = super().step(model_output, timestep, sample, return_dict=False, **kwargs)
        else:
            if kwargs.get("per_token_timesteps") is not None:
                raise ValueError(
                    f"per_token_timesteps: got a tensor on step {index}, expected None on steps with noise"
                )
            velocity, state = model_output.detach(), sample.detach()
            noise = self._noise(index, state)
            next_sample = sde_step(state, velocity, planned, noise=noise, dtype=velocity.dtype).prev_sample
            transition = Transition(index, velocity, noise, planned)
            self._step_index = index + 1  # type: ignore[assignment]
        if self.on_step is not None:
            self.on_step(index, transition)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=next_sample) if return_dict else (next_sample,)

    def _noise(self, index: int, state: Tensor) -> Tensor | PhiloxNoise:
        rows = torch.arange(self.first_row, self.first_row + len(state), device=state.device)
        noise = PhiloxNoise(self.seed, rows * len(self.timesteps) + index)
        return noise if self.noise == "seeded" else noise.materialize(tuple(state.shape), device=state.device)


def trainable_step(sampler: str, sigmas: list[float], index: int, eta: float) -> SDEStep:
    """Step ``index`` of a schedule ``sigmas`` (``[T+1]`` levels, 1 -> 0), if it can be a training row.

    Raises:
        ValueError: there is no such step, it is the last one, or it draws no noise; the message names step and levels.
    """
    count = len(sigmas) - 1
    if not 0 <= index < count:
        raise ValueError(f"sde_steps: got step {index}, expected 0 to {count - 2} (the schedule has {count} steps)")
    levels = f"step {index} of {count} from sigma={sigmas[index]:g} to sigma_next={sigmas[index + 1]:g}"
    if index == count - 1:
        raise ValueError(
            f"sde_steps: got the last step, {levels}; its Gaussian is too narrow to train on, expected steps up to "
            f"{count - 2}"
        )
    step = SDEStep.from_sigmas(
        sampler, sigmas[index], sigmas[index + 1], eta=eta, schedule=Schedule.from_sigmas(sigmas)
    )
    if not step.std > 0.0:
        raise ValueError(f"sde_steps: got {levels}, on which sampler {sampler!r} draws no noise (eta={eta:g})")
    return step
