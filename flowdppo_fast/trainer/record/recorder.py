"""Records chosen denoising steps of a diffusers pipeline and computes their velocities again with other weights.

The pipeline runs its own ``__call__``. While it is recorded, :class:`NoisySteps` are those of its scheduler, hooks on
its modules keep the arguments of the calls that belong to chosen steps, and a :class:`Tape` what is done with their
outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...samplers import SDEStep
from . import checks
from .arguments import join, parts, row_index
from .checks import Bound, MovedCheck, ReplayCheck
from .layouts import scatter
from .offload import fetch
from .program import drive
from .scheduler import NoisySteps
from .surroundings import Surroundings
from .trajectory import Trajectory
from .watch import Watch, denoisers


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
        if getattr(pipeline, "scheduler", None) is None:
            raise ValueError(
                f"pipeline: {self.name} has no scheduler, expected a flow-matching one, such as "
                "FlowMatchEulerDiscreteScheduler"
            )
        NoisySteps(pipeline.scheduler, **self.options)
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
        with self._watched(watch, seed=seed, first_row=first_row):
            yield watch.trajectory
        watch.check_chosen()
        steps = tuple(t.step for t in watch.transitions)
        watch.trajectory.finish(watch.transitions, self._stacked.setdefault(steps, SDEStep.stack(steps)))

    @contextlib.contextmanager
    def _watched(self, watch: Watch, **noise: Any) -> Iterator[None]:
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
        return checks.verify(self, trajectory, rows, Bound(strict, threshold))

    def verify_moved(
        self,
        trajectory: Trajectory,
        call: Callable[[], Any],
        *,
        parameters: Sequence[Tensor] | None = None,
        strict: bool = True,
        threshold: float | None = None,
    ) -> MovedCheck:
        """Moves the trained weights a little, and compares the replay of the first recorded step with a new recording.

        The new recording has the present weights up to that step, so that all it is given is as it was, and ends with
        it. Where gradient checkpointing is on, a row's gradient is compared with that without it. Afterwards weights
        and random numbers are what they were.

        Args:
            trajectory: of the present weights.
            call: calls the pipeline as it was called for ``trajectory``.
            parameters: what is moved, default all parameters of the replayed modules that need a gradient.
            strict, threshold: see :meth:`verify`.

        Raises:
            ValueError: the replay does not follow the weights, or the gradient is another one under checkpointing.
        """
        return checks.verify_moved(self, trajectory, call, parameters, Bound(strict, threshold))

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
