"""Diffusers' flow-matching Euler scheduler with a stochastic sampler on chosen steps and the ODE on the rest."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ...noise import PhiloxNoise
from ...samplers import ScheduleLevels, SDEStep, find_sampler
from ...sampling import sde_step

NOISE_KINDS = ("seeded", "stored")
_EULER_NAMES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler")


@dataclass(frozen=True)
class Transition:
    """What a chosen step did.

    Attributes:
        index: position in the schedule, 0 is the noisiest step.
        velocity: ``[B, *latent]`` the velocity after guidance, as the scheduler was given it.
        noise: the drawn noise: ``[B, *latent]`` float32, or :class:`PhiloxNoise` with one stream per row.
        step: the :class:`SDEStep` of all rows.
        active: ``[B, L, 1]`` bool, the tokens that were moved, where the pipeline gives a timestep per token and holds
            some still; None where all were.
    """

    index: int
    velocity: Tensor
    noise: Tensor | PhiloxNoise
    step: SDEStep
    active: Tensor | None = None


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
    on_output: Callable[[int, Any, bool], None] | None = None
    # a scheduler of another class, whose levels are taken
    _source: Any = None
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
        on_output: Callable[[int, Any, bool], None] | None = None,
        return_unused_kwargs: bool = False,
        **unused: Any,
    ) -> Any:
        """A scheduler with the schedule of another flow scheduler and noise on chosen steps.

        Args:
            config: a diffusers flow scheduler or its config. Of one-call-per-step schedulers of another class, such as
                UniPC or DPM-Solver with ``use_flow_sigmas``, the noise levels and timesteps are taken, not the solver.
            sampler: a name from :data:`flowdppo_fast.SAMPLERS`, or ``package.module:attribute`` for one's own.
            eta: noise level of the sampler, > 0 where steps are chosen.
            sde_steps: indices of the steps that draw noise; the last step of a schedule cannot be one.
            noise: ``"seeded"`` keeps the seed and a stream per row, ``"stored"`` the same draws as a tensor.
            seed: 64-bit key of the noise.
            first_row: number of the first row, where one rollout is sampled in several calls.
            on_step: called after every step with its index and, for chosen steps, its :class:`Transition`, else None.
            on_output: called before every step with its index, the model's output and whether its negative is taken.
            return_unused_kwargs: as in diffusers: also return further keywords, which are not used.

        Returns:
            A :class:`FlowMatchSDEScheduler`, and the unused keywords where they are asked for. A scheduler that was
            loaded with a pipeline chooses no steps: it is the plain Euler scheduler.

        Raises:
            TypeError: further keywords that nobody asked for.
            ValueError: an unknown choice, no noise on chosen steps, or a scheduler that is not for flow matching.
        """
        if unused and not return_unused_kwargs:
            raise TypeError(f"from_config: got {', '.join(map(repr, unused))}, expected none of these keywords")
        given = config
        config = dict(getattr(given, "config", given))
        name = type(given).__name__ if isinstance(given, SchedulerMixin) else config.get("_class_name", "")
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        if not name and {key for key in config if not key.startswith("_")} == known.keys() - {"self"}:
            # the config of a scheduler that was built in Python names no class
            name = FlowMatchEulerDiscreteScheduler.__name__
        if name not in _EULER_NAMES and not hasattr(diffusers, name) and not isinstance(given, SchedulerMixin):
            raise ValueError(
                f"config: got a {type(given).__name__} with _class_name={name!r}, expected a scheduler, or a config "
                "that names a class of diffusers"
            )
        euler = isinstance(given, FlowMatchEulerDiscreteScheduler) or name in _EULER_NAMES
        if not euler:
            _check_source(name, config)
        for option in ("invert_sigmas", "stochastic_sampling"):
            if config.get(option):
                raise ValueError(f"config: got {option}=True, expected a plain schedule from noise (1) to data (0)")
        find_sampler(sampler)
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
        scheduler = cls(**{key: value for key, value in config.items() if key in known})
        if not euler:
            kind: Any = type(given) if isinstance(given, SchedulerMixin) else getattr(diffusers, name)
            scheduler._source = kind.from_config(config)
        elif isinstance(given, FlowMatchSDEScheduler):
            scheduler._source = copy.deepcopy(given._source)
            scheduler.set_shift(given.shift)
        elif isinstance(given, FlowMatchEulerDiscreteScheduler):
            if type(given).step is not FlowMatchEulerDiscreteScheduler.step:
                raise ValueError(
                    f"config: {type(given).__name__} has a step() of its own, expected Euler's: the steps between the "
                    "trained ones would be others than yours; give the pipeline a FlowMatchEulerDiscreteScheduler"
                )
            # its own levels, whatever was overridden or set on it since it was built
            scheduler._source = copy.deepcopy(given)
            scheduler.set_shift(given.shift)
        scheduler.sampler, scheduler.eta, scheduler.sde_steps = sampler, float(eta), chosen
        scheduler.noise, scheduler.seed, scheduler.first_row = noise, seed, first_row
        scheduler.on_step, scheduler.on_output = on_step, on_output
        return (scheduler, unused) if return_unused_kwargs else scheduler

    # pipelines look at the parameters of this method to see whether custom sigmas are allowed
    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args, **kwargs) -> None:  # type: ignore[override]
        """Sets the schedule like the pipeline's own scheduler.

        Raises:
            ValueError: the levels do not descend from at most 1, or a chosen step cannot be one.
        """
        if self._source is None:
            super().set_timesteps(*args, **kwargs)
        else:
            self._source.set_timesteps(*args, **{key: value for key, value in kwargs.items() if value is not None})
            self.timesteps, self.sigmas = self._source.timesteps, self._source.sigmas.to(torch.float32)
            self.num_inference_steps = len(self.timesteps)
            self._step_index = self._begin_index = None  # type: ignore[assignment]
            if 1.0 - self.sigmas[0] < 2e-6:
                # multistep solvers stay a little below pure noise for their logarithms
                self.sigmas[0] = 1.0
        levels = self.sigmas.tolist()
        descending = all(above > below for above, below in itertools.pairwise(levels[:-1])) and levels[-2] >= levels[-1]
        if len(levels) != len(self.timesteps) + 1 or not (descending and levels[0] <= 1.0 and levels[-1] >= 0.0):
            raise ValueError(
                f"scheduler: got levels {[round(level, 4) for level in levels]} for {len(self.timesteps)} timesteps, "
                "expected one more level than timesteps, descending from at most 1 to at least 0"
            )
        self._plan = {index: trainable_step(self.sampler, levels, index, self.eta) for index in self.sde_steps}

    def step(  # type: ignore[override]
        self, model_output: Any, timestep: Any, sample: Any, *, return_dict: bool = True, **kwargs: Any
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step, like diffusers' ``step``; the next sample has ``model_output``'s dtype.

        Args:
            model_output, sample: ``[B, *latent]`` velocity and state.
            timestep: one of ``timesteps``.
            per_token_timesteps: ``[B, L]``; on a step that draws noise, tokens at another timestep are held still. With
                it pipelines give the negated velocity, and the next sample is float32.

        Raises:
            ValueError: per-token timesteps for samples that are not tokens ``[B, L, C]``, or that are not this step's.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        index: int = self.step_index
        if self.on_output is not None:
            self.on_output(index, model_output, kwargs.get("per_token_timesteps") is not None)
        planned = self._plan.get(index)
        transition = None
        if planned is None:
            # the step index is set, and of the timestep only the type is looked at: multistep schedulers have integers
            (next_sample,) = super().step(model_output, float(index), sample, return_dict=False, **kwargs)
        else:
            next_sample, transition = self._noisy_step(index, planned, model_output, timestep, sample, kwargs)
            self._step_index = index + 1  # type: ignore[assignment]
        if self.on_step is not None:
            self.on_step(index, transition)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=next_sample) if return_dict else (next_sample,)

    def _noisy_step(
        self, index: int, planned: SDEStep, model_output: Any, timestep: Any, sample: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Transition]:
        velocity, state = model_output.detach(), sample.detach()
        dtype, active = velocity.dtype, None
        per_token = options.get("per_token_timesteps")
        if per_token is not None:
            level = float(timestep) / self.config.num_train_timesteps  # type: ignore[attr-defined]
            if state.ndim != 3 or abs(level - planned.sigma) > 1e-4:
                raise ValueError(
                    f"per_token_timesteps: got them on step {index} for a sample {list(state.shape)} at timestep level "
                    f"{level:.4g}, expected tokens [B, L, C] at sigma={planned.sigma:.4g} on steps with noise"
                )
            velocity, dtype = -velocity, torch.float32
            active = (per_token == torch.as_tensor(timestep).to(per_token)).expand(state.shape[:2])[..., None]
            if active.all():
                active = None
        noise = self._noise(index, state)
        following = sde_step(state, velocity, planned, noise=noise, dtype=dtype).prev_sample
        if active is not None:
            following = torch.where(active, following, state.to(dtype))
        return following, Transition(index, velocity, noise, planned, active)

    def _noise(self, index: int, state: Tensor) -> Tensor | PhiloxNoise:
        rows = torch.arange(self.first_row, self.first_row + len(state), device=state.device)
        noise = PhiloxNoise(self.seed, rows * len(self.timesteps) + index)
        return noise if self.noise == "seeded" else noise.materialize(tuple(state.shape), device=state.device)


def _check_source(name: str, config: dict[str, Any]) -> None:
    """Whether a scheduler of class ``name`` makes one transformer call per step on flow-matching levels."""
    if name.startswith("FlowMatch"):
        raise ValueError(
            f"config: got that of {name}, expected one Euler step per transformer call; give the pipeline a "
            "FlowMatchEulerDiscreteScheduler (re-noising at every step is sampler 'cps' with eta=1)"
        )
    if not config.get("use_flow_sigmas") or config.get("prediction_type") not in (None, "flow_prediction"):
        raise ValueError(
            f"config: got that of {name}, expected a flow-matching scheduler (FlowMatchEulerDiscreteScheduler, or one "
            "with use_flow_sigmas=True and prediction_type='flow_prediction')"
        )


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
        sampler, sigmas[index], sigmas[index + 1], eta=eta, schedule=ScheduleLevels.from_sigmas(sigmas)
    )
    if step.sample_coef < 0.0:
        raise ValueError(
            f"sde_steps: got {levels}, on which sampler {sampler!r} with eta={eta:g} overshoots (it multiplies the "
            f"sample by {step.sample_coef:.3g}); leave the step out, lower eta, take sampler 'cps', or start the "
            "schedule at exactly 1"
        )
    if not step.std > 0.0:
        raise ValueError(f"sde_steps: got {levels}, on which sampler {sampler!r} draws no noise (eta={eta:g})")
    return step
