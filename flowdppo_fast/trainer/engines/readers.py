"""Rollouts from where they were sampled: a server's answers, or the scheduler that an engine was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...noise import PhiloxNoise
from ..record.scheduler import NoisySteps, Transition
from .container import EngineRollout
from .wire import decode


def read_sglang(
    answers: Sequence[Mapping[str, Any]], steps: Sequence[int], *, sampler: str = "flow_sde", eta: float = 0.7,
    state_steps: Sequence[int] | None = None,
) -> EngineRollout:  # fmt: skip
    """Answers of SGLang's ``POST /rollout/generate``, one per image, to a request with ``rollout_debug_mode`` and
    ``rollout_return_dit_trajectory``.

    Args:
        steps: ``rollout_sde_step_indices`` of the request.
        sampler, eta: what its ``rollout_sde_type`` and ``rollout_noise_level`` mean here (``"sde"`` is ``"flow_sde"``).
        state_steps: ``rollout_return_step_indices`` of the request; None means all T+1 latents. Where the answer has
            ``latent_step_indices``, these count.

    Raises:
        ValueError: a field that is missing or does not fit.
    """
    rows = [
        _row(place, decode(answer), tuple(steps), sampler, eta, state_steps) for place, answer in enumerate(answers)
    ]
    if not rows:
        raise ValueError("answers: got none, expected one per image")
    return EngineRollout.join(rows)


def _row(
    place: int, answer: Any, steps: tuple[int, ...], sampler: str, eta: float, state_steps: Sequence[int] | None
) -> EngineRollout:
    dit, debug = (_part(place, answer, *part) for part in _PARTS.items())
    sigmas = dit["sigmas"].float()
    states, count = dit["latents"], len(sigmas) - 1
    told = dit.get("latent_step_indices")
    kept = told.tolist() if isinstance(told, Tensor) else list(range(count + 1) if state_steps is None else state_steps)
    chosen = {}
    for name in _PARTS["rollout_debug_tensors"]:
        value = debug[name]
        # of all steps, or of the chosen ones
        if len(value) not in (count, len(steps)):
            raise ValueError(
                f"answer {place}: {name} has {len(value)} steps, expected all {count} or the {len(steps)} chosen ones"
            )
        chosen[name] = value if len(value) == len(steps) else value[list(steps)]
    environment = answer.get("denoising_env") or {}
    return EngineRollout(
        chosen["rollout_model_outputs"][None],
        chosen["rollout_variance_noises"].float()[None],
        sigmas,
        steps,
        states[None],
        tuple(kept),
        sampler,
        eta,
        {name: value[None] for name, value in _tensors(environment)},
    )


# what is read of an answer, all of it tensors
_PARTS = {
    "dit_trajectory": ("latents", "sigmas"),
    "rollout_debug_tensors": ("rollout_model_outputs", "rollout_variance_noises"),
}
_SWITCHES = {
    "dit_trajectory": "rollout_return_dit_trajectory=true of an engine that sends sigmas",
    "rollout_debug_tensors": "rollout_debug_mode=true",
}


def _part(place: int, answer: Any, part: str, names: tuple[str, ...]) -> dict[str, Any]:
    found = (answer.get(part) if isinstance(answer, Mapping) else None) or {}
    missing = [name for name in names if not isinstance(found.get(name), Tensor)]
    if missing:
        raise ValueError(f"answer {place}: got no {part}.{f', {part}.'.join(missing)}, expected {_SWITCHES[part]}")
    return found


def _tensors(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Tensors at any depth with their names."""
    if isinstance(value, Tensor):
        return [(name, value)]
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, entry in pairs for found in _tensors(entry, f"{name}.{key}" if name else str(key))]


def noisy_steps(scheduler: Any) -> NoisySteps | None:
    """What draws noise on the chosen steps of ``scheduler``; None: no step was chosen."""
    found = getattr(vars(scheduler).get("step"), "_steps", None)
    return found if isinstance(found, NoisySteps) and found.chosen else None


class TrajectoryCollector:
    """Keeps a rollout of the scheduler that a pipeline or an engine runs with.

    vLLM-Omni takes such a scheduler per pipeline and request (a :class:`FlowMatchSDEScheduler` is the
    ``FlowMatchEulerDiscreteScheduler`` that it asks for), our own recorder has it as ``pipeline.scheduler`` within
    ``recording``.

    >>> collector = TrajectoryCollector(scheduler)
    >>> pipeline(...)
    >>> rollout = collector.get_trajectory()

    Args:
        scheduler: of the rollout; what it does is not changed.
        states: indices in 0..T of the latents to keep; None keeps those around chosen steps, the first and the last.

    Raises:
        ValueError: a scheduler without chosen steps.
    """

    def __init__(self, scheduler: Any, states: Sequence[int] | None = None):
        steps = noisy_steps(scheduler)
        if steps is None:
            raise ValueError(f"scheduler: got a {type(scheduler).__name__} that draws no noise, expected chosen steps")
        self.scheduler, self.steps = scheduler, steps
        self._wanted = None if states is None else set(states)
        self._step, self._told = scheduler.step, steps.on_step
        scheduler.step = self._kept_step
        steps.on_step = self._on_step
        self.reset()

    def reset(self) -> None:
        """Forgets what was kept."""
        self._states: dict[int, Tensor] = {}
        self._transitions: list[Transition] = []

    def get_trajectory(self, conditioning: Mapping[str, Tensor] | None = None) -> EngineRollout:
        """The rollout that ran since :meth:`reset`.

        Raises:
            ValueError: not all chosen steps were run, or tokens were held still, which a rollout has no place for.
        """
        made, wanted = [t.index for t in self._transitions], list(self.steps.chosen)
        if made != wanted or not made:
            raise ValueError(f"scheduler: ran the chosen steps {made}, expected {wanted or 'at least one'} in one call")
        if any(t.active is not None for t in self._transitions):
            raise ValueError("scheduler: held some tokens still on a chosen step, expected one timestep for all")
        kept = sorted(self._states)
        noises = [t.noise for t in self._transitions]
        stored = [noise for noise in noises if isinstance(noise, Tensor)]
        streams = [torch.as_tensor(noise.stream) for noise in noises if isinstance(noise, PhiloxNoise)]
        return EngineRollout(
            torch.stack([t.velocity for t in self._transitions], dim=1),
            PhiloxNoise(self.steps.seed, torch.stack(streams, dim=1)) if streams else torch.stack(stored, dim=1),
            self.scheduler.sigmas.to(torch.float32).cpu(),
            tuple(wanted),
            torch.stack([self._states[index] for index in kept], dim=1),
            tuple(kept),
            self.steps.sampler,
            self.steps.eta,
            dict(conditioning or {}),
        )

    def _on_step(self, index: int, transition: Transition | None) -> None:
        if transition is not None:
            self._transitions.append(transition)
        if self._told is not None:
            self._told(index, transition)

    def _kept_step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        made = self._step(model_output, timestep, sample, **options)
        index = self.scheduler.step_index - 1
        wanted = self._wanted
        if wanted is None:
            chosen = self.steps.chosen
            wanted = {0, len(self.scheduler.timesteps), *chosen, *(step + 1 for step in chosen)}
        if index in wanted:
            # pipelines may write to their latents
            self._states[index] = sample.detach().clone()
        if index + 1 == len(self.scheduler.timesteps) and index + 1 in wanted:
            following = made[0] if isinstance(made, tuple) else made.prev_sample
            self._states[index + 1] = following.detach().clone()
        return made
