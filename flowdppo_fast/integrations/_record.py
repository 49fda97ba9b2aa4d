"""Keeps what a trainer's step functions say, so that no pipeline, return value or call has to change for it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Seen", "StepRecord"]


class Seen(NamedTuple):
    """One step: ``mean`` and ``std`` of its transition, the ``velocity`` it was given, and its place in the schedule.

    ``drawn``: the step made its next state and is a column of the rollout. ``place`` grows along a trajectory.
    """

    mean: Tensor
    velocity: Tensor
    std: Any
    drawn: bool
    place: float


# calls the step with its bound arguments: (what it returns, what was seen or None)
Reader = Callable[[Callable[..., Any], inspect.BoundArguments], tuple[Any, "Seen | None"]]


class StepRecord(ContextDecorator):
    """Open, it sees every call of a trainer's step functions; a ``with`` statement or a decorator opens it.

    The functions are replaced in the modules that call them (those of ``package``, the script itself, ``modules``, and
    that of a decorated function) and put back when it closes. Opening it again starts anew.

    Attributes:
        mean, std: of the last step, the mean with its graph.
    """

    def __init__(self, readers: Mapping[str, Reader], package: str, modules: tuple[Any, ...], keep: str) -> None:
        if keep not in ("means", "velocities"):
            raise ValueError(f"keep: got {keep!r}, expected 'means' or 'velocities'")
        self._readers, self._package, self._keep = readers, package, keep
        self._namespaces = [vars(module) for module in modules]
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []
        self._trajectories: list[list[Tensor]] = []
        self._place = float("inf")
        self.mean: Tensor | None = None
        self.std: Any = None

    def __call__(self, function: Any) -> Any:
        """``function`` with the record open while it runs."""
        self._namespaces.append(function.__globals__)
        return super().__call__(function)

    def __enter__(self) -> StepRecord:
        self._trajectories, self._place = [], float("inf")
        prefix = self._package + "."
        loaded = [m for n, m in list(sys.modules.items()) if n in (self._package, "__main__") or n.startswith(prefix)]
        namespaces = {id(space): space for space in [*map(vars, loaded), *self._namespaces]}
        for space in namespaces.values():
            for name, reader in self._readers.items():
                step = space.get(name)
                if isinstance(step, FunctionType):
                    space[name] = self._watched(step, reader)
                    self._replaced.append((space, name, step))
        if not self._replaced:
            raise RuntimeError(
                f"record: got no {' or '.join(self._readers)} in the script or in a loaded module of {self._package}, "
                "expected the one that the rollout calls; import the pipeline first, or name its module in modules="
            )
        return self

    def __exit__(self, *error: object) -> None:
        for space, name, step in self._replaced:
            space[name] = step
        self._replaced = []

    def means(self) -> Tensor:
        """Means of the steps that made a state, ``[B, T, *latent]`` float32; trajectories in the order they ran."""
        return self._stacked("means")

    def velocities(self) -> Tensor:
        """Velocities of the steps that made a state, ``[B, T, *latent]``, as the step was given them."""
        return self._stacked("velocities")

    def _stacked(self, what: str) -> Tensor:
        if what != self._keep:
            raise ValueError(f"{what}: got a record that keeps {self._keep}, expected record(keep={what!r})")
        lengths = sorted({len(trajectory) for trajectory in self._trajectories})
        if len(lengths) != 1:
            raise RuntimeError(
                f"{what}: got {f'trajectories of {lengths} steps' if lengths else 'no step that drew noise'}, expected "
                "as many stochastic steps in every trajectory; open the record around the sampling call, with noise"
            )
        return torch.cat([torch.stack(trajectory, dim=1) for trajectory in self._trajectories])

    def _watched(self, step: Callable[..., Any], reader: Reader) -> Callable[..., Any]:
        signature = inspect.signature(step)

        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            result, seen = reader(step, arguments)
            if seen is not None:
                self.mean, self.std = seen.mean, seen.std
                if seen.drawn:
                    self._keep_step(seen)
            return result

        return watched

    def _keep_step(self, seen: Seen) -> None:
        if seen.place <= self._place:
            self._trajectories.append([])
        self._place = seen.place
        self._trajectories[-1].append((seen.mean if self._keep == "means" else seen.velocity).detach())
