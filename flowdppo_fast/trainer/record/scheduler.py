"""A stochastic sampler on chosen steps of any diffusers flow scheduler, which stays the object that it is."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
from .trajectory import Transition

NOISE_KINDS = ("seeded", "stored")
REPLACED = ("step", "set_timesteps")
# further passes draw from streams that no row of another one reads
_PASS = 1 << 40


class NoisySteps:
    """``step`` and ``set_timesteps`` of a scheduler whose chosen steps draw noise; between them it makes Euler steps.

    The scheduler keeps its class, its config and its levels, which are read when a step is made. A copy of it is
    watched as well: it moves another latent of the same steps, such as sound.

    Noise is counter-based: row ``r`` of step ``i`` reads stream ``(first_row + r) * T + i`` of ``seed``, T being the
    number of steps. Rows may therefore be shuffled or taken apart afterwards, and a rollout that is sampled in several
    calls with increasing ``first_row`` draws what one large call would have drawn. Further passes through the schedule
    read other streams, and the latents of further copies what follows in the same one. A generator given to
    :meth:`step` is not used.

    Args:
        scheduler: a diffusers flow scheduler.
        sampler: a name from :data:`flowdppo_fast.SAMPLERS`, or ``package.module:attribute`` for one's own.
        eta: noise level of the sampler, > 0 where steps are chosen.
        sde_steps: indices of the steps that draw noise; the last step of a schedule cannot be one.
        noise: ``"seeded"`` keeps the seed and a stream per row, ``"stored"`` the same draws as a tensor.
        seed: 64-bit key of the noise.
        first_row: number of the first row, where one rollout is sampled in several calls.
        on_step: called after every step with its index and, for chosen steps, its :class:`Transition`, else None.
        on_output: called before every step with its index, the model's output and whether its negative is taken.
        on_begin: called when a pass through the schedule begins.

    Attributes:
        family: these and those of copies of the scheduler.

    Raises:
        ValueError: an unknown choice, no noise on chosen steps, or a scheduler that is not for flow matching.
    """

    def __init__(
        self, scheduler: Any, *, sampler: str = "flow_sde", eta: float = 0.7, sde_steps: Iterable[int] = (),
        noise: str = "seeded", seed: int = 0, first_row: int = 0,
        on_step: Callable[[int, Transition | None], None] | None = None,
        on_output: Callable[[int, Any, bool], None] | None = None, on_begin: Callable[[], None] | None = None,
    ):  # fmt: skip
        check_scheduler(scheduler)
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
        self.scheduler, self.sampler, self.eta, self.chosen = scheduler, sampler, float(eta), chosen
        self.noise, self.seed, self.first_row = noise, seed, first_row
        self.on_step, self.on_output = on_step, on_output
        self.on_begin = on_begin
        self.own = {name: getattr(type(scheduler), name).__get__(scheduler) for name in REPLACED}
        self.family: list[NoisySteps] = [self]
        # elements per row that other latents of a step have drawn
        self.drawn: dict[tuple[int, int], int] = {}
        self._last: int | None = None
        self._number = 0
        self._known: tuple[Any, Any] = (None, None)
        self._levels: list[float] = []
        self._plan: dict[int, SDEStep] = {}

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Within this context the scheduler's methods are these."""
        before = {name: vars(self.scheduler)[name] for name in REPLACED if name in vars(self.scheduler)}
        self.put()
        try:
            yield
        finally:
            for name in REPLACED:
                delattr(self.scheduler, name)
            vars(self.scheduler).update(before)

    def put(self) -> None:
        """From here on the scheduler's methods are these."""
        for name in REPLACED:
            setattr(self.scheduler, name, _Method(self, name))

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Sets the schedule as the scheduler does, and begins a pass through it.

        Raises:
            ValueError: the levels do not descend from at most 1, or a chosen step cannot be one.
        """
        self.own["set_timesteps"](*args, **kwargs)
        self._begin()
        self._plan_steps()

    def step(
        self, model_output: Any, timestep: Any, sample: Any, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """One step, like diffusers' ``step``; the next sample has ``model_output``'s dtype.

        Args:
            model_output, sample: ``[B, *latent]`` velocity and state.
            timestep: one of ``timesteps``.
            per_token_timesteps: ``[B, L]``; on a step that draws noise, tokens at another timestep are held still. With
                it pipelines give the negated velocity, and the next sample is float32.

        Raises:
            ValueError: per-token timesteps for samples that are not tokens ``[B, L, C]``, or that are not this step's.
        """
        if self.scheduler.step_index is None:
            self.scheduler._init_step_index(timestep)
        index: int = self.scheduler.step_index
        if index == self._last:
            raise ValueError(
                f"scheduler: {type(self.scheduler).__name__} took step {index} twice, expected one step of all rows"
            )
        if self._last is not None and index < self._last:
            self._begin()
        self._plan_steps()
        if self.on_output is not None:
            self.on_output(index, model_output, kwargs.get("per_token_timesteps") is not None)
        planned, transition = self._plan.get(index), None
        if planned is not None:
            following, transition = self._noisy_step(index, planned, model_output, timestep, sample, kwargs)
            self.scheduler._step_index = index + 1
        elif isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            (following,) = self.own["step"](model_output, timestep, sample, *args, return_dict=False, **kwargs)
        else:
            # a solver would take what it remembers of steps with noise for its own
            here, there = torch.tensor(self._levels[index : index + 2])
            following = (sample.float() + (there - here) * model_output).to(model_output.dtype)
            self.scheduler._step_index = index + 1
        self._last = index
        if self.on_step is not None:
            self.on_step(index, transition)
        return FlowMatchEulerDiscreteSchedulerOutput(following) if return_dict else (following,)  # type: ignore[arg-type]

    def _begin(self) -> None:
        self._number += self._last is not None
        self._last = None
        if self.on_begin is not None:
            self.on_begin()

    def _plan_steps(self) -> None:
        """The chosen steps of the present levels, which somebody may have edited."""
        sigmas = self.scheduler.sigmas
        now = (sigmas, None if sigmas.is_inference() else sigmas._version)
        if self._known[0] is sigmas and self._known[1] == now[1] is not None:
            return
        levels = sigmas.to(torch.float32).tolist()
        if levels and 0.0 < 1.0 - levels[0] < 2e-6:
            # multistep solvers stay a little below pure noise for their logarithms
            levels[0] = 1.0
        descending = len(levels) > 1 and all(above > below for above, below in itertools.pairwise(levels[:-1]))
        steps = len(self.scheduler.timesteps)
        if len(levels) != steps + 1 or not (
            descending and levels[-2] >= levels[-1] and levels[0] <= 1.0 and levels[-1] >= 0.0
        ):
            raise ValueError(
                f"scheduler: got levels {[round(level, 4) for level in levels]} for {steps} timesteps, "
                "expected one more level than timesteps, descending from at most 1 to at least 0"
            )
        self._plan = {index: trainable_step(self.sampler, levels, index, self.eta) for index in self.chosen}
        self._known, self._levels = now, levels

    def _noisy_step(
        self, index: int, planned: SDEStep, model_output: Any, timestep: Any, sample: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Transition]:
        # a buffer that the pipeline uses again would hold the next step's
        velocity, state = model_output.detach().clone(), sample.detach()
        dtype, active = velocity.dtype, None
        per_token = options.get("per_token_timesteps")
        if per_token is not None:
            level = float(timestep) / self.scheduler.config.num_train_timesteps
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
        return following, Transition(index, velocity, noise, planned, active, self._number)

    def _noise(self, index: int, state: Tensor) -> Tensor | PhiloxNoise:
        rows = torch.arange(self.first_row, self.first_row + len(state), device=state.device)
        stream = rows * len(self.scheduler.timesteps) + index + self._number * _PASS
        noise, place = PhiloxNoise(self.seed, stream), (self._number, index)
        before, width = self.drawn.get(place, 0), state[0].numel()
        self.drawn[place] = before + width
        if self.noise == "seeded" and not before:
            return noise
        whole = noise.materialize((len(state), before + width), device=state.device)
        return whole[:, before:].reshape(state.shape)

    def __deepcopy__(self, memo: dict) -> NoisySteps:
        made = copy.copy(self)
        memo[id(self)] = made
        made.scheduler = copy.deepcopy(self.scheduler, memo)
        made.own = {name: method.__func__.__get__(made.scheduler) for name, method in self.own.items()}
        made._known, made._plan = (None, None), {}
        # shared with the original, as is what is counted of the draws
        self.family.append(made)
        return made


class _Method:
    """Stands in for a scheduler's method, with its signature; a copy of the scheduler has one of its own."""

    def __init__(self, steps: NoisySteps, name: str):
        self._steps, self._name, self.__wrapped__ = steps, name, steps.own[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._steps, self._name)(*args, **kwargs)


def check_scheduler(scheduler: Any) -> None:
    """Whether chosen steps of a scheduler can draw noise.

    Raises:
        ValueError: it is none, or of another kind; the message says of which.
    """
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(
            f"scheduler: got a {type(scheduler).__name__}, expected one of diffusers, such as "
            "FlowMatchEulerDiscreteScheduler"
        )
    kind: Any = type(scheduler)
    name, config = kind.__name__, dict(vars(scheduler)["_internal_dict"])
    euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if not euler:
        check_source(name, config)
    for option in ("invert_sigmas", "stochastic_sampling"):
        if config.get(option):
            raise ValueError(f"config: got {option}=True, expected a plain schedule from noise (1) to data (0)")
    own = vars(scheduler).get("step")
    if (euler and kind.step is not FlowMatchEulerDiscreteScheduler.step) or not isinstance(own, (_Method, type(None))):
        raise ValueError(
            f"config: {name} has a step() of its own, expected Euler's: the steps between the trained ones would be "
            "others than yours; give the pipeline a FlowMatchEulerDiscreteScheduler"
        )


def check_source(name: str, config: dict[str, Any]) -> None:
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
