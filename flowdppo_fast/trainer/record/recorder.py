"""Records chosen denoising steps of a diffusers pipeline and computes their velocities again with other weights.

The pipeline runs its own ``__call__``. While it is recorded, :class:`NoisySteps` are those of its scheduler, hooks on
its modules keep the arguments of the calls that belong to chosen steps, and a :class:`Tape` what is done with their
outputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ...losses import row_statistics
from ...objectives import DPPO
from ...samplers import SDEStep
from .arguments import join, parts, row_index
from .layouts import scatter
from .offload import fetch
from .program import drive
from .scheduler import NoisySteps
from .surroundings import Surroundings
from .trajectory import Trajectory
from .watch import Watch, denoisers

logger = get_logger(__name__)


@dataclass(frozen=True)
class ReplayCheck:
    """Result of :meth:`TrajectoryRecorder.verify`.

    Attributes:
        rule: how the first chosen step makes its velocity of the outputs ``b0``, ``b1``, ...
        same_geometry: largest absolute difference when each step is replayed with the recorded batch.
        batched_geometry: largest absolute difference when steps and rows are batched as they will be in training.
        batched_kl: the mean-reduced KL that this difference makes at unchanged weights, of the worst row and step.
        tolerance: what ``batched_kl`` may be.
    """

    rule: str
    same_geometry: float
    batched_geometry: float
    batched_kl: float
    tolerance: float


class TrajectoryRecorder:
    """Records and replays the denoising steps of ``pipeline``.

    A replay calls what the pipeline called between two scheduler steps and what has trained parameters, which are
    those of ``transformer*`` or another denoiser, and all that need a gradient or share memory with one of these. What
    other components give is a constant.

    Args:
        pipeline: any diffusers flow pipeline.
        sampler, eta, noise: see :class:`NoisySteps`.
        checks: look at each new kind of call and step a second time while it is recorded: which arguments have an
            entry per row, and whether rows are independent. Without weights there is nothing to look at.

    Raises:
        ValueError: the pipeline has no denoiser or no flow-matching scheduler.
    """

    def __init__(
        self, pipeline: Any, *, sampler: str = "flow_sde", eta: float = 0.7, noise: str = "seeded", checks: bool = True
    ):
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        self.options: dict[str, Any] = {"sampler": sampler, "eta": eta, "noise": noise}
        self.checks = checks
        self.modules = denoisers(pipeline)
        if not self.modules:
            raise ValueError(
                f"pipeline: {self.name} has no component named transformer* and no other denoiser, expected a module "
                "whose forward takes a timestep, so there is nothing to record"
            )
        try:
            NoisySteps(getattr(pipeline, "scheduler", None), **self.options)
        except ValueError as cause:
            raise ValueError(f"pipeline: {self.name}: {cause}") from None
        # layouts of the arguments and outputs of calls, and steps that were looked at a second time
        self._layouts: dict[tuple, tuple[Any, ...]] = {}
        self._looked: dict[tuple, list[frozenset[int] | None]] = {}
        # stacked steps by their parts: a step keeps its tables on the device, so rollouts share them
        self._stacked: dict[tuple[SDEStep, ...], SDEStep] = {}

    @contextlib.contextmanager
    def recording(self, sde_steps: Iterable[int], *, seed: int = 0, first_row: int = 0) -> Iterator[Trajectory]:
        """Within this context one call of the pipeline is recorded.

        Args:
            sde_steps: indices of the steps that draw noise and are recorded, in every pass through the schedule.
            seed, first_row: of the noise, see :class:`NoisySteps`.

        Raises:
            ValueError: what a step did cannot be replayed, or not all chosen steps were run.
        """
        watch = Watch(self, sorted(sde_steps))
        with self.watched(watch, seed=seed, first_row=first_row):
            yield watch.trajectory
        watch.check_chosen()
        steps = tuple(t.step for t in watch.transitions)
        watch.trajectory.finish(watch.transitions, self._stacked.setdefault(steps, SDEStep.stack(steps)))

    @contextlib.contextmanager
    def watched(self, watch: Watch, **noise: Any) -> Iterator[None]:
        """Within this context ``watch`` follows the pipeline; afterwards nothing of it is left, in any case.

        Args:
            noise: seed and first row.
        """
        cached = [name for name, module in self.modules.items() if getattr(module, "is_cache_enabled", False)]
        if cached:
            raise ValueError(
                f"pipeline: {self.name} has a cache enabled on {', '.join(cached)}, so its outputs depend on earlier "
                "steps; call disable_cache()"
            )
        noisy = NoisySteps(
            self.pipeline.scheduler, sde_steps=watch.chosen, on_step=watch.on_step, on_output=watch.on_output,
            on_begin=watch.on_begin, **self.options, **noise,
        )  # fmt: skip
        watch.family = noisy.family
        with noisy.in_force(), watch.watching():
            yield
        watch.close()

    def replay(
        self, trajectory: Trajectory, rows: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> Tensor:
        """Velocities ``[b, S, *latent]`` of the present weights, with gradients if they are enabled.

        Args:
            trajectory: what was recorded.
            rows: rows to replay, default all.
            steps: positions of recorded steps, default all; those that fit together share one transformer call.
        """
        groups = [[p for p in group if steps is None or p in steps] for group in trajectory.groups]
        replayed = [self._replay_group(trajectory, group, rows) for group in groups if group]
        return replayed[0] if len(replayed) == 1 else torch.cat(replayed, dim=1)

    def verify(
        self, trajectory: Trajectory, rows: Sequence[int], *, strict: bool = True, threshold: float | None = None
    ) -> ReplayCheck:
        """Replays a trajectory whose policy is still the present one; nothing else may be replayed before.

        Step by step, with the recorded batch and as many threads, velocities must come out bitwise. In the training
        geometry, all steps of ``rows`` in one batch and with gradients enabled, matrix products may round otherwise:
        there the difference may cost a tenth of the threshold.

        Args:
            rows: of the training geometry.
            strict: False holds the recorded batch to the second bound as well, with a warning.
            threshold: of the mean-reduced KL in the objective; None or infinite: the default of :class:`DPPO`.

        Raises:
            ValueError: a difference beyond that; the message names the pipeline and the largest difference.
        """
        finite = threshold is not None and math.isfinite(threshold)
        same, tolerance = 0.0, (threshold if finite else DPPO().threshold) / 10  # type: ignore[operator]
        everything = range(len(trajectory))
        with torch.no_grad():
            for position, record in enumerate(trajectory.steps):
                replayed = self.replay(trajectory, steps=[position])
                difference, kl = _deviation(replayed, trajectory, everything, range(position, position + 1))
                same = max(same, difference)
                if difference == 0.0:
                    continue
                said = (
                    f"replaying step {record.index} of {self.name} at unchanged weights differs from the recorded "
                    f"velocity by up to {difference:.3g} (a KL of {kl:.3g}), expected 0"
                )
                if strict or not kl <= tolerance:
                    way_out = "; run.strict_replay=false accepts this one" if kl <= tolerance else ""
                    raise ValueError(
                        f"pipeline: {said}; the transformer is no function of its arguments (dropout, caching, kernels "
                        f"that are not deterministic), or its weights changed{way_out}"
                    )
                logger.warning("%s; run.strict_replay is off", said)
        replayed = self.replay(trajectory, rows).detach()
        difference, kl = _deviation(replayed, trajectory, rows, range(len(trajectory.steps)))
        if not kl <= tolerance:
            raise ValueError(
                f"pipeline: replaying {len(rows)} rows and {len(trajectory.steps)} steps of {self.name} in one batch "
                f"differs from the recorded velocity by up to {difference:.3g}, a KL of {kl:.3g}, expected at most "
                f"{tolerance:.3g}, a tenth of the threshold; a row's output depends on the other rows of its batch, or "
                "rounds too coarsely"
            )
        return ReplayCheck(trajectory.steps[0].rule, same, difference, kl, tolerance)

    @staticmethod
    def _replay_group(trajectory: Trajectory, positions: list[int], rows: Sequence[int] | None) -> Tensor:
        """``[b, len(positions), *latent]`` from one module call per recorded call slot."""
        records, device = [trajectory.steps[p] for p in positions], trajectory.device
        batch, here = len(trajectory), trajectory.velocity.device
        index = None if rows is None else row_index(rows, device or here)
        # rows that are not asked for repeat one that is, so that what is done to the whole batch can be done again
        places = [rows.index(row) if row in rows else 0 for row in range(batch)] if rows is not None else []
        fill = None if rows is None else (places, row_index(places, device or here))

        def answer(number: int, given: list[Any]) -> list[Any]:
            calls = [record.program.calls[number] for record in records]
            args, kwargs = fetch(join(calls, rows, here, given), device)
            with Surroundings.put_back(calls[0]):
                made = parts(calls[0].module(*args, **kwargs))
            width = batch if rows is None else len(rows)
            return [
                {
                    key: scatter(made[key[0]], key[1], calls[0].slots[key], (width, len(calls), batch), place, fill)
                    for key in call.outputs
                }
                for place, call in enumerate(calls)
            ]

        velocities = drive([record.program.run(device, rows) for record in records], answer)
        velocity = torch.stack(velocities, dim=1)
        velocity = velocity if index is None else velocity[index]
        active = [record.active for record in records if record.active is not None]
        if active:
            moved = torch.stack(active, dim=1)
            moved = moved if rows is None else moved[row_index(rows, moved.device)]
            velocity = velocity * fetch(moved, device)
        return velocity


def _deviation(replayed: Tensor, trajectory: Trajectory, rows: Sequence[int], steps: range) -> tuple[float, float]:
    """Largest difference of replayed velocities, and the KL it costs in the worst row and step."""
    recorded, noise, step = trajectory.select(rows, steps)
    difference = float((replayed - recorded).double().abs().max())
    _, squared = row_statistics(replayed.detach(), recorded, noise, step, row_dims=2)
    return difference, float(squared.max()) / 2
