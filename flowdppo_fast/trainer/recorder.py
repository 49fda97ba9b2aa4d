"""Records chosen denoising steps of a diffusers pipeline and calls its transformer again with what it saw.

The pipeline runs its own ``__call__``. While it is recorded, its scheduler is a
:class:`FlowMatchSDEScheduler`, and a forward hook on the transformer(s) keeps the arguments of the calls that belong to
chosen steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..noise import PhiloxNoise
from ..samplers import SDEStep
from .guidance import GuidanceRule, find_rule
from .scheduler import FlowMatchSDEScheduler, Transition

# position ids of packed latents without a batch dim: [L, 3], shared by all rows even where L happens to equal the batch
_UNBATCHED_IDS = ("img_ids", "txt_ids")


@dataclass
class Call:
    """One transformer call: arguments as flat leaves, and how many copies of the batch each leaf holds (0: shared)."""

    module: nn.Module
    leaves: list[Any]
    copies: list[int]
    spec: TreeSpec


@dataclass
class RecordedStep:
    """A chosen step: its index in the schedule, the transformer calls, the rule from their outputs to the velocity, and
    the largest difference that the rule leaves (0.0: bitwise)."""

    index: int
    calls: list[Call]
    rule: GuidanceRule
    rule_error: float


@dataclass
class Trajectory:
    """The chosen steps of one pipeline call on ``B`` rows.

    Attributes:
        steps: S recorded steps in schedule order.
        velocity: ``[B, S, *latent]`` velocities after guidance, in the dtype the scheduler was given.
        noise: ``[B, S, *latent]`` float32, or :class:`PhiloxNoise` with streams ``[B, S]``.
        step: :class:`SDEStep` stacked to ``[S]``.
        groups: positions of steps that one transformer call can replay together.
    """

    steps: list[RecordedStep] = field(default_factory=list)
    velocity: Tensor = None  # type: ignore[assignment]
    noise: Tensor | PhiloxNoise = None  # type: ignore[assignment]
    step: SDEStep = None  # type: ignore[assignment]
    groups: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.velocity)

    def select(self, rows: Sequence[int], steps: range | None = None) -> tuple[Tensor, Tensor | PhiloxNoise, SDEStep]:
        """Old velocities ``[b, S, *latent]``, noise and steps ``[S]`` of ``rows`` at positions ``steps`` (or all)."""
        index = row_index(rows, self.velocity.device)
        part = slice(None) if steps is None else slice(steps.start, steps.stop)
        velocity = self.velocity[:, part][index]
        if isinstance(self.noise, PhiloxNoise):
            noise: Tensor | PhiloxNoise = PhiloxNoise(self.noise.seed, self.noise.stream[:, part][index])  # type: ignore[index]
        else:
            noise = self.noise[:, part][index]
        return velocity, noise, self.step[part]


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
        self._rule: GuidanceRule | None = None
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
        chosen = sorted(sde_steps)
        trajectory = Trajectory()
        transitions: list[Transition] = []
        pending: list[tuple[nn.Module, tuple, dict, Any]] = []
        copier = _Copier()

        def on_call(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            pending.append((module, args, kwargs, output))

        def on_step(index: int, transition: Transition | None) -> None:
            if transition is not None:
                trajectory.steps.append(self._record(transition, pending, copier))
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
        _finish(trajectory, transitions)
        steps = tuple(t.step for t in transitions)
        trajectory.step = self._stacked.setdefault(steps, SDEStep.stack(steps))

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

    def verify(self, trajectory: Trajectory, rows: Sequence[int]) -> ReplayCheck:
        """Replays a trajectory whose policy is still the present one; nothing else may be replayed before.

        Step by step with the recorded batch the velocities must come out bitwise (or as near as an inexact rule comes).
        In the training geometry, all steps of ``rows`` in one batch and with gradients enabled, matrix products may
        round otherwise: there the root-mean-square difference may be ``16 * eps`` of the root-mean-square velocity.

        Raises:
            ValueError: a difference beyond that; the message names the pipeline and the largest difference.
        """
        same = 0.0
        with torch.no_grad():
            for position, record in enumerate(trajectory.steps):
                recorded = trajectory.velocity[:, position]
                difference = float((self.replay(trajectory, steps=[position])[:, 0] - recorded).abs().max())
                same = max(same, difference)
                if not difference <= record.rule_error:
                    raise ValueError(
                        f"pipeline: replaying step {record.index} of {self.name} at unchanged weights differs from the "
                        f"recorded velocity by up to {difference:.3g}, expected {record.rule_error:.3g}; the "
                        "transformer is no function of its arguments (dropout, caching), or its weights changed"
                    )
        recorded = trajectory.select(rows)[0]
        deviation = (self.replay(trajectory, rows).detach() - recorded).double()
        error = float(deviation.square().mean().sqrt() / recorded.double().square().mean().sqrt())
        tolerance = 16 * torch.finfo(recorded.dtype).eps
        largest = float(deviation.abs().max())
        if not error <= tolerance:
            raise ValueError(
                f"pipeline: replaying {len(rows)} rows and {len(trajectory.steps)} steps of {self.name} in one batch "
                f"differs from the recorded velocity by up to {largest:.3g} (relative {error:.3g}, expected at most "
                f"{tolerance:.3g}); a row's output depends on the other rows of its batch"
            )
        return ReplayCheck(trajectory.steps[0].rule, same, largest, error, tolerance)

    def _record(self, transition: Transition, pending: list[tuple], copier: _Copier) -> RecordedStep:
        batch = len(transition.velocity)
        calls: list[Call] = []
        branches: list[Tensor] = []
        for position, (module, args, kwargs, output) in enumerate(pending):
            result = _first_output(output)
            if len(result) % batch:
                raise ValueError(
                    f"pipeline: {self.name} called its transformer with {len(result)} rows for {batch} latents, "
                    "expected a multiple of them"
                )
            branches += result.chunk(len(result) // batch)
            calls.append(copier.call(position, module, args, kwargs, batch, len(result) // batch))
        if not branches:
            raise ValueError(f"pipeline: {self.name} made no transformer call before step {transition.index}")
        try:
            self._rule, error = find_rule(branches, transition.velocity, self._rule)
        except ValueError as cause:
            raise ValueError(f"pipeline: {self.name}, step {transition.index}: {cause}") from None
        return RecordedStep(transition.index, calls, self._rule, error)

    @staticmethod
    def _replay_group(trajectory: Trajectory, positions: list[int], rows: Sequence[int] | None) -> Tensor:
        """``[b, len(positions), *latent]`` from one transformer call per recorded call slot."""
        records = [trajectory.steps[p] for p in positions]
        batch = len(trajectory) if rows is None else len(rows)
        index = None if rows is None else row_index(rows, trajectory.velocity.device)
        branches: list[Tensor] = []
        for slot in zip(*(record.calls for record in records), strict=True):
            leaves = [
                _gather([call.leaves[i] for call in slot], copies, len(trajectory), rows, index)
                for i, copies in enumerate(slot[0].copies)
            ]
            args, kwargs = tree_unflatten(leaves, slot[0].spec)
            result = _first_output(slot[0].module(*args, **kwargs))
            branches += result.chunk(len(result) // (batch * len(records)))
        velocity = records[0].rule(branches, trajectory.velocity.shape[2:], trajectory.velocity.dtype)
        return velocity.unflatten(0, (batch, len(records)))


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers as an int64 tensor on ``device``; the copy to a GPU does not wait for it."""
    index = torch.tensor(list(rows))
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


class _Copier:
    """Keeps the arguments of calls; a tensor that is passed again, unchanged, is kept once."""

    def __init__(self) -> None:
        self._last: dict[int, dict[int, tuple[Tensor, int, Tensor]]] = {}

    def call(self, slot: int, module: nn.Module, args: tuple, kwargs: dict, batch: int, branches: int) -> Call:
        leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, list))
        unbatched = {id(kwargs[n]) for n in _UNBATCHED_IDS if isinstance(kwargs.get(n), Tensor) and kwargs[n].ndim == 2}
        copies = [0 if id(leaf) in unbatched else _batch_copies(leaf, batch, branches) for leaf in leaves]
        # only the previous call in this slot is looked at: what is shared between steps is passed to each of them
        seen, self._last[slot] = self._last.get(slot, {}), {}
        kept = []
        for leaf in leaves:
            if isinstance(leaf, list):
                kept.append([self._keep(x, seen, slot) for x in leaf])
            else:
                kept.append(self._keep(leaf, seen, slot))
        return Call(module, kept, copies, spec)

    def _keep(self, leaf: Any, seen: dict, slot: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        source, version, copy = seen.get(id(leaf), (None, -1, None))
        if source is not leaf or version != leaf._version:
            # a copy, because some pipelines write the next latents into the same memory
            copy = leaf.detach().clone(memory_format=torch.contiguous_format)
        self._last[slot][id(leaf)] = (leaf, leaf._version, copy)
        return copy


def _batch_copies(leaf: Any, batch: int, branches: int) -> int:
    """Copies of the batch that a leaf holds along its first dim: ``branches`` (doubled batch), 1, or 0 if shared."""
    if (isinstance(leaf, Tensor) and leaf.ndim > 0) or (
        isinstance(leaf, list) and not any(isinstance(x, (int, float, str)) for x in leaf)
    ):
        size = len(leaf)
    else:
        return 0
    return branches if size == branches * batch else int(size == batch)


def _gather(leaves: list[Any], copies: int, batch: int, rows: Sequence[int] | None, index: Tensor | None) -> Any:
    """One argument of the batched call: ``copies`` x rows x steps along the first dim, for row-wise leaves."""
    first, steps = leaves[0], len(leaves)
    if copies == 0:
        return first
    if isinstance(first, list):
        chosen = range(batch) if rows is None else rows
        return [leaf[c * batch + r] for c in range(copies) for r in chosen for leaf in leaves]
    shared = all(leaf is first for leaf in leaves)
    picked = []
    for leaf in leaves[:1] if shared else leaves:
        leaf = leaf.unflatten(0, (copies, batch))
        picked.append(leaf if index is None else leaf[:, index])
    if steps == 1:
        return picked[0].flatten(0, 1)
    stacked = picked[0].unsqueeze(2).expand(-1, -1, steps, *picked[0].shape[2:]) if shared else torch.stack(picked, 2)
    return stacked.flatten(0, 2)


def _finish(trajectory: Trajectory, transitions: list[Transition]) -> None:
    trajectory.velocity = torch.stack([t.velocity for t in transitions], dim=1)
    seeded = [t.noise for t in transitions if isinstance(t.noise, PhiloxNoise)]
    stored = [t.noise for t in transitions if isinstance(t.noise, Tensor)]
    if seeded:
        streams = [torch.as_tensor(noise.stream) for noise in seeded]
        trajectory.noise = PhiloxNoise(seeded[0].seed, torch.stack(streams, dim=1))
    else:
        trajectory.noise = torch.stack(stored, dim=1)
    for position, record in enumerate(trajectory.steps):
        group = trajectory.groups[-1] if trajectory.groups else None
        if group is not None and _joinable(trajectory.steps[group[0]], record):
            group.append(position)
        else:
            trajectory.groups.append([position])


def _joinable(a: RecordedStep, b: RecordedStep) -> bool:
    """Whether one call can replay both steps: same modules and structure, and what rows share is the same for both."""
    if a.rule != b.rule or len(a.calls) != len(b.calls):
        return False
    for x, y in zip(a.calls, b.calls):
        if x.module is not y.module or x.spec != y.spec or x.copies != y.copies:
            return False
        for left, right, copies in zip(x.leaves, y.leaves, x.copies):
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                if left.dtype != right.dtype or left.shape[min(copies, 1) :] != right.shape[min(copies, 1) :]:
                    return False
                if copies == 0 and left is not right and not torch.equal(left, right):
                    return False
            elif (not isinstance(left, list) and left != right) or (
                isinstance(left, list) and copies == 0 and not _same_list(left, right)
            ):
                return False
    return True


def _same_list(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y for x, y in zip(a, b)
    )


def _first_output(output: Any) -> Tensor:
    """The prediction of a diffusers transformer: first entry of its output; lists of rows are stacked."""
    result = output if isinstance(output, (Tensor, list)) else output[0]
    return torch.stack(result) if isinstance(result, list) else result
