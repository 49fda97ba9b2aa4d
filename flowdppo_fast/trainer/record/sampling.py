"""A scheduler to sample with: a copy of a flow scheduler with noise on chosen steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduler import REPLACED, NoisySteps, check_scheduler, check_source
from .trajectory import Transition

_EULER_NAMES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler")


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """A flow scheduler whose chosen steps draw noise (:class:`NoisySteps`), to sample with; :meth:`from_config`
    builds it."""

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Any, *, sampler: str = "flow_sde", eta: float = 0.7, sde_steps: Iterable[int] = (),
        noise: str = "seeded", seed: int = 0, first_row: int = 0,
        on_step: Callable[[int, Transition | None], None] | None = None,
        on_output: Callable[[int, Any, bool], None] | None = None, return_unused_kwargs: bool = False, **unused: Any,
    ) -> Any:  # fmt: skip
        """A copy of a flow scheduler with noise on chosen steps.

        Args:
            config: a diffusers flow scheduler or its config. Of one-call-per-step schedulers of another class, such as
                UniPC or DPM-Solver with ``use_flow_sigmas``, the noise levels and timesteps are taken, not the solver.
            sampler, eta, sde_steps, noise, seed, first_row, on_step, on_output: see :class:`NoisySteps`.
            return_unused_kwargs: as in diffusers: also return further keywords, which are not used.

        Returns:
            A scheduler of the given one's class, and the unused keywords where they are asked for. A scheduler that was
            loaded with a pipeline chooses no steps: it is the plain Euler scheduler.

        Raises:
            TypeError: further keywords that nobody asked for.
            ValueError: an unknown choice, no noise on chosen steps, or a scheduler that is not for flow matching.
        """
        if unused and not return_unused_kwargs:
            raise TypeError(f"from_config: got {', '.join(map(repr, unused))}, expected none of these keywords")
        if isinstance(config, SchedulerMixin):
            check_scheduler(config)
            scheduler: Any = copy.deepcopy(config)
            for name in REPLACED:
                vars(scheduler).pop(name, None)
        else:
            scheduler = _built(config)
        NoisySteps(
            scheduler, sampler=sampler, eta=eta, sde_steps=sde_steps, noise=noise, seed=seed, first_row=first_row,
            on_step=on_step, on_output=on_output,
        ).put()  # fmt: skip
        return (scheduler, unused) if return_unused_kwargs else scheduler


def _built(config: Any) -> Any:
    """The scheduler of a config."""
    given, config = type(config).__name__, dict(config)
    name = config.get("_class_name", "")
    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    if not name and {key for key in config if not key.startswith("_")} == known.keys() - {"self"}:
        # the config of a scheduler that was built in Python names no class
        name = FlowMatchEulerDiscreteScheduler.__name__
    if name not in _EULER_NAMES and not hasattr(diffusers, name):
        raise ValueError(
            f"config: got a {given} with _class_name={name!r}, expected a scheduler, or a config that names a class of "
            "diffusers"
        )
    if name in _EULER_NAMES:
        return FlowMatchEulerDiscreteScheduler(**{key: value for key, value in config.items() if key in known})
    check_source(name, config)
    kind: Any = getattr(diffusers, name)
    return kind.from_config(config)
