"""A pipeline call that plays back a rollout: the engine's latents at every step, the transformer only where it is
recorded.

The pipeline runs its own ``__call__``, so prompts, guidance, decoding and what the recorder sees are those of any other
call. Between chosen steps the transformer's output is zeros that nobody looks at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ...noise import PhiloxNoise
from ..record.trajectory import Trajectory
from .container import EngineRollout
from .readers import noisy_steps


@contextlib.contextmanager
def played(scheduler: Any, modules: Mapping[str, nn.Module], rollout: EngineRollout) -> Iterator[None]:
    """Within this context one call of the pipeline with ``scheduler`` goes through the states of ``rollout``.

    Args:
        modules: the transformers.

    Raises:
        ValueError: the pipeline has another schedule, other chosen steps or other latents than the engine.
    """
    steps = noisy_steps(scheduler)
    chosen = () if steps is None else steps.chosen
    if not set(chosen) <= set(rollout.steps):
        raise ValueError(f"rollout: got steps {list(rollout.steps)}, expected {list(chosen)} among them")
    own, now = scheduler.step, 0

    def step(model_output: Any, timestep: Any, sample: Any, *, return_dict: bool = True, **options: Any) -> Any:
        nonlocal now
        if now == 0:
            _check_levels(scheduler, rollout)
        expected = rollout.state(now)
        if expected is not None and not _same(sample, expected):
            raise ValueError(
                f"rollout: the pipeline's latents {list(sample.shape)} before step {now} are not those of the engine, "
                f"{list(expected.shape)}; expected the same seeds, size and layout of latents in both"
            )
        made = own(model_output, timestep, sample, return_dict=return_dict, **options)
        now += 1
        skip(now not in chosen)
        following = rollout.state(now)
        if following is None:
            # the next state that is known comes before anyone looks
            return made
        first = made[0] if isinstance(made, tuple) else made.prev_sample
        following = following.to(first.device, first.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(following) if return_dict else (following,)  # type: ignore[arg-type]

    idle = [_Idle(module) for module in modules.values()]

    def skip(on: bool) -> None:
        for one in idle:
            one.switch(on)

    scheduler.step = step
    try:
        skip(now not in chosen)
        yield
    finally:
        skip(False)
        scheduler.step = own


def take(trajectory: Trajectory, rollout: EngineRollout) -> None:
    """Gives a recorded trajectory the velocities and noise of the engine that sampled it."""
    recorded, noise = trajectory.velocity, rollout.noise
    trajectory.velocity = rollout.velocity.to(recorded.device, recorded.dtype)
    if isinstance(noise, PhiloxNoise):
        trajectory.noise = PhiloxNoise(noise.seed, torch.as_tensor(noise.stream).to(recorded.device))
    else:
        trajectory.noise = noise.to(recorded.device, torch.float32)


class _Idle:
    """While it is switched on ``module`` computes one output of each shape, and then zeros.

    On recorded steps the module is as it was: the recorder keeps what is set on it.
    """

    def __init__(self, module: nn.Module):
        self._module, self._replaced, self._forward = module, "forward" in vars(module), module.forward
        self._made: dict[tuple, Any] = {}

    def switch(self, on: bool) -> None:
        if on or self._replaced:
            self._module.forward = self._skipped if on else self._forward  # type: ignore[method-assign]
        elif "forward" in vars(self._module):
            del self._module.forward

    def _skipped(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), *((tuple(x.shape), x.dtype) for x in leaves if isinstance(x, Tensor)))
        if key not in self._made:
            self._made[key] = tree_map(_zeros, self._forward(*args, **kwargs))
        return tree_map(_zeros, self._made[key])


def _zeros(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else value


def _check_levels(scheduler: Any, rollout: EngineRollout) -> None:
    levels = scheduler.sigmas.to(torch.float32).cpu()
    if levels.shape != rollout.sigmas.shape or not torch.allclose(levels, rollout.sigmas.cpu(), rtol=0, atol=1e-5):
        raise ValueError(
            f"rollout: the engine's levels {[round(x, 5) for x in rollout.sigmas.tolist()]} are not those of the "
            f"pipeline, {[round(x, 5) for x in levels.tolist()]}; give both the same scheduler config and steps"
        )


def _same(sample: Tensor, expected: Tensor) -> bool:
    return sample.shape == expected.shape and torch.equal(sample, expected.to(sample.device, sample.dtype))
