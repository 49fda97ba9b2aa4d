"""What a replay has to equal before anything is trained on it: the recording, and a new one at other weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...losses import row_statistics
from ...objectives import DPPO
from .trajectory import Trajectory
from .watch import Watch, modules_of

logger = logging.getLogger(__name__)
# of a weight's root mean square; far above rounding, and a sum of such moves is still a model
_MOVE = 0.02


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


@dataclass(frozen=True)
class MovedCheck:
    """Result of :meth:`TrajectoryRecorder.verify_moved`.

    Attributes:
        moved_kl: the mean-reduced KL between the velocities before and after the move, of the worst row.
        difference: largest absolute difference between replay and new recording.
        kl: the mean-reduced KL that it makes.
        gradient: relative difference of a row's gradient under checkpointing; None: there is no checkpointing.
    """

    moved_kl: float
    difference: float
    kl: float
    gradient: float | None


@dataclass(frozen=True)
class Bound:
    """What a difference may be: nothing, or where ``strict`` is off, a KL of a tenth of the threshold."""

    strict: bool = True
    threshold: float | None = None

    @property
    def kl(self) -> float:
        """A tenth of the threshold, or of the default one."""
        finite = self.threshold is not None and math.isfinite(self.threshold)
        return (self.threshold if finite else DPPO().threshold) / 10  # type: ignore[operator]

    def check(self, said: str, kl: float, causes: str) -> None:
        """Raises or warns of a difference.

        Raises:
            ValueError: it may not be.
        """
        if self.strict or not kl <= self.kl:
            way_out = "; run.strict_replay=false accepts this one" if kl <= self.kl else ""
            raise ValueError(f"pipeline: {said}; {causes}{way_out}")
        logger.warning("%s; run.strict_replay is off", said)


def verify(recorder: Any, trajectory: Trajectory, rows: Sequence[int], bound: Bound) -> ReplayCheck:
    """See :meth:`TrajectoryRecorder.verify`."""
    same, everything = 0.0, range(len(trajectory))
    with torch.no_grad():
        for position, record in enumerate(trajectory.steps):
            replayed = recorder.replay(trajectory, steps=[position])
            recorded, *rest = trajectory.select(everything, range(position, position + 1))
            difference, kl = _deviation(replayed, recorded, *rest)
            same = max(same, difference)
            if difference:
                bound.check(
                    f"replaying step {record.index} of {recorder.name} at unchanged weights differs from the recorded "
                    f"velocity by up to {difference:.3g} (a KL of {kl:.3g}), expected 0",
                    kl,
                    "the transformer is no function of its arguments (dropout, caching, kernels that are not "
                    "deterministic), or its weights changed",
                )
    replayed = recorder.replay(trajectory, rows).detach()
    difference, kl = _deviation(replayed, *trajectory.select(rows, range(len(trajectory.steps))))
    if not kl <= bound.kl:
        raise ValueError(
            f"pipeline: replaying {len(rows)} rows and {len(trajectory.steps)} steps of {recorder.name} in one batch "
            f"differs from the recorded velocity by up to {difference:.3g}, a KL of {kl:.3g}, expected at most "
            f"{bound.kl:.3g}, a tenth of the threshold; a row's output depends on the other rows of its batch, or "
            "rounds too coarsely"
        )
    return ReplayCheck(trajectory.steps[0].rule, same, difference, kl, bound.kl)


def verify_moved(
    recorder: Any, trajectory: Trajectory, call: Callable[[], Any], parameters: Sequence[Tensor] | None, bound: Bound
) -> MovedCheck:
    """See :meth:`TrajectoryRecorder.verify_moved`."""
    first, name = trajectory.steps[0].index, recorder.name
    device = trajectory.device or trajectory.velocity.device
    devices = [device] if device.type == "cuda" else []
    # a call that starts in the middle of the schedule has no step before its first one
    for at_once in dict.fromkeys([first == 0, True]):
        move = _Move(modules_of(recorder)[0] if parameters is None else parameters)
        watch = Watch(recorder, [first], functools.partial(move.before_step, first), _Enough)
        try:
            with torch.random.fork_rng(devices):
                with contextlib.suppress(_Enough), recorder._watched(watch, seed=0, first_row=0):
                    if at_once:
                        move.make()
                    call()
                with torch.no_grad():
                    replayed = recorder.replay(trajectory, steps=[0])
        finally:
            move.undo()
        if move.before:
            break
    watch.check_chosen()
    recorded, noise, step = trajectory.select(range(len(trajectory)), range(1))
    fresh = watch.transitions[0].velocity
    fresh = (fresh if watch.transitions[0].active is None else fresh * watch.transitions[0].active)[:, None]
    if fresh.shape != recorded.shape:
        raise ValueError(
            f"pipeline: a second call of {name} gives velocities {list(fresh[:, 0].shape)}, expected "
            f"{list(recorded[:, 0].shape)} like the first one"
        )
    difference, kl = _deviation(replayed, fresh, noise, step)
    if difference:
        bound.check(
            f"with the trained weights moved a little, the replay of step {first} of {name} differs from a new "
            f"recording by up to {difference:.3g} (a KL of {kl:.3g}), expected 0",
            kl,
            "something that depends on the trained weights is a constant in the replay (a module that is no component "
            "of the pipeline, or a result that is kept between calls), or a second call is given other inputs; "
            "run.check_replay=false trains all the same",
        )
    _, moved = _deviation(fresh, recorded, noise, step)
    if not moved:
        logger.warning(
            "step %d of %s has the same velocity at other weights, so whether the replay follows them is not known",
            first, name,
        )  # fmt: skip
    return MovedCheck(moved, difference, kl, _gradient(recorder, trajectory))


class _Enough(BaseException):
    """Ends a call of the pipeline whose further steps are not needed; no error, so nobody logs it as one."""


class _Move:
    """Makes weights a little different, and again what they were, bit for bit."""

    def __init__(self, weights: Sequence[Tensor] | Sequence[nn.Module]):
        found = [p for x in weights for p in (x.parameters() if isinstance(x, nn.Module) else [x])]
        self.parameters = list(dict.fromkeys(p for p in found if p.requires_grad))
        self.before: list[Tensor] = []

    def before_step(self, step: int, upcoming: int) -> None:
        """Makes them so when ``step`` comes up."""
        if upcoming == step:
            self.make()

    @torch.no_grad()
    def make(self) -> None:
        if self.before:
            return
        self.before = [p.detach().clone() for p in self.parameters]
        for place, p in enumerate(self.parameters):
            drawn = torch.randn(p.shape, generator=torch.Generator(p.device).manual_seed(place), device=p.device)
            size = p.float().square().mean().sqrt()
            # an adapter that was just added is zero
            p.add_((drawn * torch.where(size > 0, size, 1.0) * _MOVE).to(p.dtype))
        # half-precision copies of the weights as they were
        torch.clear_autocast_cache()

    @torch.no_grad()
    def undo(self) -> None:
        for p, value in zip(self.parameters, self.before):
            p.copy_(value)
        torch.clear_autocast_cache()


def _gradient(recorder: Any, trajectory: Trajectory) -> float | None:
    """How far a row's gradient under gradient checkpointing is from that without.

    Raises:
        ValueError: by more than the roundings of the velocity's dtype.
    """
    modules = list(dict.fromkeys(call.module for call in trajectory.steps[0].calls))
    parts: list[Any] = [x for m in modules for x in m.modules() if getattr(x, "gradient_checkpointing", False)]
    parameters = list(dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad))
    if not parts or not parameters:
        return None

    def gradient() -> Tensor:
        velocity = recorder.replay(trajectory, [0], [0])
        made = torch.autograd.grad(velocity.float().square().mean(), parameters, allow_unused=True)
        return torch.cat([x.double().flatten() for x in made if x is not None])

    own = gradient()
    try:
        for part in parts:
            part.gradient_checkpointing = False
        plain = gradient()
    finally:
        for part in parts:
            part.gradient_checkpointing = True
    error = float((own - plain).norm() / plain.norm()) if own.shape == plain.shape else math.inf
    most = 2 * torch.finfo(trajectory.velocity.dtype).eps
    if not error <= most:
        raise ValueError(
            f"pipeline: under gradient checkpointing a row's gradient of {recorder.name} differs by {error:.3g} of its "
            f"size from that without, expected at most {most:.3g}: what the blocks depend on is another when they run "
            "again in the backward; set model.gradient_checkpointing=false"
        )
    return error


def _deviation(replayed: Tensor, recorded: Tensor, noise: Any, step: Any) -> tuple[float, float]:
    """Largest difference of replayed velocities, and the KL it costs in the worst row and step."""
    difference = float((replayed - recorded).double().abs().max())
    _, squared = row_statistics(replayed.detach(), recorded, noise, step, row_dims=2)
    return difference, float(squared.max()) / 2
