"""Records chosen denoising steps of a diffusers pipeline and calls its transformer again with what it saw.

The pipeline runs its own ``__call__``. While it is recorded, its scheduler is a
:class:`FlowMatchSDEScheduler`, and a forward hook on the transformer(s) keeps the arguments of the calls that belong to
chosen steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from ...samplers import SDEStep
from .arguments import ArgumentStore, Call, join, row_index
from .guidance import GuidanceRule, find_rule
from .offload import fetch
from .scheduler import FlowMatchSDEScheduler, Transition
from .trajectory import RecordedStep, Trajectory

logger = get_logger(__name__)


@dataclass(frozen=True)
class ReplayCheck:
    """Result of :meth:`TrajectoryRecorder.verify`.

    Attributes:
        rule: the rule of the first chosen step.
        same_geometry: largest absolute difference when each step is replayed with the recorded batch.
        batched_geometry: largest absolute difference when steps and rows are batched as they will be in training.
        batched_error: root-mean-square difference over the root-mean-square velocity in that geometry.
        tolerance: what ``batched_error`` may be.
    """

    rule: GuidanceRule
    same_geometry: float
    batched_geometry: float
    batched_error: float
    tolerance: float


class TrajectoryRecorder:
    """Records and replays the denoising steps of ``pipeline``.

    Args:
        pipeline: any diffusers flow pipeline; components named ``transformer*`` are recorded.
        sampler, eta, noise: see :meth:`FlowMatchSDEScheduler.from_config`.

    Raises:
        ValueError: the pipeline has no transformer or no flow-matching scheduler.
    """

    def __init__(self, pipeline: Any, *, sampler: str = "flow_sde", eta: float = 0.7, noise: str = "seeded"):
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        self.options: dict[str, Any] = {"sampler": sampler, "eta": eta, "noise": noise}
        self.modules = {
            name: module
            for name, module in pipeline.components.items()
            if name.startswith("transformer") and isinstance(module, nn.Module)
        }
        if not self.modules:
            raise ValueError(
                f"pipeline: {self.name} has no component named transformer*, so there is nothing to record"
            )
        FlowMatchSDEScheduler.from_config(pipeline.scheduler, **self.options)
        # rules that were found, the newest first: scales may change with the step and come back
        self.rules: list[GuidanceRule] = []
        # stacked steps by their parts: a step keeps its tables on the device, so rollouts share them
        self._stacked: dict[tuple[SDEStep, ...], SDEStep] = {}

    @contextlib.contextmanager
    def recording(self, sde_steps: Iterable[int], *, seed: int = 0, first_row: int = 0) -> Iterator[Trajectory]:
        """Within this context one call of the pipeline is recorded; afterwards its own scheduler is back, in any case.

        Args:
            sde_steps: indices of the steps that draw noise and are recorded.
            seed, first_row: of the noise, see :class:`FlowMatchSDEScheduler`.

        Raises:
            ValueError: no rule reproduces a velocity, or not all chosen steps were run.
        """
        cached = [name for name, module in self.modules.items() if getattr(module, "is_cache_enabled", False)]
        if cached:
            raise ValueError(
                f"pipeline: {self.name} has a cache enabled on {', '.join(cached)}, so its outputs depend on earlier "
                "steps; call disable_cache()"
            )
        chosen = sorted(sde_steps)
        trajectory = Trajectory()
        transitions: list[Transition] = []
        pending: list[tuple[nn.Module, tuple, dict, Any]] = []
        store = ArgumentStore()

        def on_call(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            pending.append((module, args, kwargs, output))

        def on_step(index: int, transition: Transition | None) -> None:
            if transition is not None:
                if transitions and transitions[-1].index == index:
                    raise ValueError(
                        f"pipeline: {self.name} took step {index} twice, with a scheduler of its own for a second "
                        "latent such as sound; one latent per step can be trained"
                    )
                trajectory.steps.append(self._record(transition, pending, store))
                transitions.append(transition)
            pending.clear()

        own = self.pipeline.scheduler
        scheduler = FlowMatchSDEScheduler.from_config(
            own, sde_steps=chosen, seed=seed, first_row=first_row, on_step=on_step, **self.options
        )
        hooks = [m.register_forward_hook(on_call, with_kwargs=True) for m in self.modules.values()]
        self.pipeline.scheduler = scheduler
        try:
            yield trajectory
        finally:
            self.pipeline.scheduler = own
            for hook in hooks:
                hook.remove()
        if [t.index for t in transitions] != chosen:
            raise ValueError(
                f"sde_steps: {self.name} ran the chosen steps {[t.index for t in transitions]}, expected {chosen} in "
                "one call of the pipeline"
            )
        steps = tuple(t.step for t in transitions)
        trajectory.finish(transitions, self._stacked.setdefault(steps, SDEStep.stack(steps)))

    def replay(
        self, trajectory: Trajectory, rows: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> Tensor:
        """Velocities ``[b, S, *latent]`` of the present weights, with gradients if they are enabled.

        Args:
            trajectory: what was recorded.
            rows: rows to replay, default all.
            steps: positions of recorded steps, default all; those that fit together share one transformer call.
        """
        parts = [[p for p in group if steps is None or p in steps] for group in trajectory.groups]
        velocities = [self._replay_group(trajectory, part, rows) for part in parts if part]
        return velocities[0] if len(velocities) == 1 else torch.cat(velocities, dim=1)

    def verify(self, trajectory: Trajectory, rows: Sequence[int], *, strict: bool = True) -> ReplayCheck:
        """Replays a trajectory whose policy is still the present one; nothing else may be replayed before.

        Step by step, with the recorded batch and as many threads, velocities must come out bitwise (or as near as an
        inexact rule comes). In the training geometry, all steps of ``rows`` in one batch and with gradients enabled,
        matrix products may round otherwise: there the root-mean-square difference may be ``16 * eps`` of the
        root-mean-square velocity, eps being that of the transformer's outputs, times the rule's gain of independent
        roundings.

        Args:
            rows: of the training geometry.
            strict: False holds the recorded batch to the second bound as well, with a warning.

        Raises:
            ValueError: a difference beyond that; the message names the pipeline and the largest difference.
        """
        same = 0.0
        with torch.no_grad():
            for position, record in enumerate(trajectory.steps):
                recorded = fetch(trajectory.velocity[:, position], trajectory.device)
                deviation = (self.replay(trajectory, steps=[position])[:, 0] - recorded).double()
                difference = float(deviation.abs().max())
                same = max(same, difference)
                if difference <= record.rule_error:
                    continue
                error = float(deviation.square().mean().sqrt() / recorded.double().square().mean().sqrt())
                rounding = error <= 16 * record.eps * record.rule.gain
                said = (
                    f"replaying step {record.index} of {self.name} at unchanged weights differs from the recorded "
                    f"velocity by up to {difference:.3g} (relative {error:.3g}), expected {record.rule_error:.3g}"
                )
                if strict or not rounding:
                    way_out = "; run.strict_replay=false accepts this one, which is within rounding" if rounding else ""
                    raise ValueError(
                        f"pipeline: {said}; the transformer is no function of its arguments (dropout, caching, kernels "
                        f"that are not deterministic), or its weights changed{way_out}"
                    )
                logger.warning("%s; within rounding, and run.strict_replay is off", said)
        recorded = trajectory.select(rows)[0]
        deviation = (self.replay(trajectory, rows).detach() - recorded).double()
        error = float(deviation.square().mean().sqrt() / recorded.double().square().mean().sqrt())
        tolerance = 16 * max(record.eps * record.rule.gain for record in trajectory.steps)
        largest = float(deviation.abs().max())
        if not error <= tolerance:
            raise ValueError(
                f"pipeline: replaying {len(rows)} rows and {len(trajectory.steps)} steps of {self.name} in one batch "
                f"differs from the recorded velocity by up to {largest:.3g} (relative {error:.3g}, expected at most "
                f"{tolerance:.3g}); a row's output depends on the other rows of its batch"
            )
        return ReplayCheck(trajectory.steps[0].rule, same, largest, error, tolerance)

    def _record(self, transition: Transition, pending: list[tuple], store: ArgumentStore) -> RecordedStep:
        batch = len(transition.velocity)
        calls: list[Call] = []
        branches: list[Tensor] = []
        for module, args, kwargs, output in pending:
            result = _first_output(output)
            if len(result) % batch:
                raise ValueError(
                    f"pipeline: {self.name} called its transformer with {len(result)} rows for {batch} latents, "
                    "expected a multiple of them"
                )
            branches += result.chunk(len(result) // batch)
            try:
                calls.append(store.call(module, args, kwargs, batch, len(result) // batch))
            except ValueError as cause:
                raise ValueError(f"pipeline: {self.name}, step {transition.index}: {cause}") from None
        if not branches:
            raise ValueError(f"pipeline: {self.name} made no transformer call before step {transition.index}")
        try:
            rule, error = find_rule(branches, transition.velocity, self.rules)
        except ValueError as cause:
            raise ValueError(f"pipeline: {self.name}, step {transition.index}: {cause}") from None
        self.rules = [rule, *(other for other in self.rules if other != rule)]
        device = branches[0].device.type
        autocast = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
        eps = max(torch.finfo(dtype).eps for dtype in (branches[0].dtype, *autocast))
        return RecordedStep(transition.index, calls, rule, error, eps, transition.active)

    @staticmethod
    def _replay_group(trajectory: Trajectory, positions: list[int], rows: Sequence[int] | None) -> Tensor:
        """``[b, len(positions), *latent]`` from one transformer call per recorded call slot."""
        records = [trajectory.steps[p] for p in positions]
        batch = len(trajectory) if rows is None else len(rows)
        branches: list[Tensor] = []
        for slot in zip(*(record.calls for record in records), strict=True):
            args, kwargs = fetch(join(slot, rows, trajectory.velocity.device), trajectory.device)
            result = _first_output(slot[0].module(*args, **kwargs))
            branches += result.chunk(len(result) // (batch * len(records)))
        velocity = records[0].rule(branches, trajectory.velocity.shape[2:], trajectory.velocity.dtype)
        velocity = velocity.unflatten(0, (batch, len(records)))
        active = [record.active for record in records if record.active is not None]
        if active:
            moved = torch.stack(active, dim=1)
            moved = moved if rows is None else moved[row_index(rows, moved.device)]
            velocity = velocity * fetch(moved, trajectory.device)
        return velocity


def _first_output(output: Any) -> Tensor:
    """The prediction of a diffusers transformer: first entry of its output; lists of rows are stacked."""
    result = output if isinstance(output, (Tensor, list)) else output[0]
    return torch.stack(result) if isinstance(result, list) else result
