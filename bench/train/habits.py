"""The trainer with the habits of other trainers, each of which can be switched on.

Own code, from the published formulas and from what is known of those trainers' loops.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.ops import peers
from flowdppo_fast import SDEStep, fused_dppo_loss, sde_step
from flowdppo_fast.objectives import SUMMARY, RowField
from flowdppo_fast.results import LossOutput
from flowdppo_fast.trainer import FlowDPPOTrainer, TrajectoryRecorder
from flowdppo_fast.trainer.record.arguments import row_index
from flowdppo_fast.trainer.record.offload import stored_bytes
from flowdppo_fast.trainer.record.trajectory import Trajectory
from flowdppo_fast.trainer.rollout import Rollout

from .names import EAGER, ITEMS, MEANS, PER_STEP, RECOMPUTE

# metrics that the other trainers do not have
_OURS_ALONE = ("drift_mean", "nonfinite_rows")


@dataclass
class Means:
    """What a trainer keeps that works on step means, for ``B`` rows and ``S`` steps.

    Attributes:
        samples: S states ``[B, *latent]`` in the model's dtype: the memory of the recorded call arguments.
        next_samples: ``[B, S, *latent]`` float32.
        old_means: ``[B, S, *latent]`` float32.
        old_log_probs: ``[B, S]`` float32.
        levels: of the steps, ``[1, S, 1, ...]``.
    """

    samples: list[Tensor]
    next_samples: Tensor
    old_means: Tensor
    old_log_probs: Tensor
    levels: peers.Levels

    def take(self, rows: Sequence[int], steps: range) -> tuple[Tensor, Tensor, Tensor, Tensor, peers.Levels]:
        """State, next state, old mean, old log-prob ``[b, S, ...]`` of some rows and steps, and the steps' levels."""
        index, part = row_index(rows, self.old_means.device), slice(steps.start, steps.stop)
        sample = torch.stack([self.samples[position][index] for position in steps], dim=1)
        kept = (tensor[:, part][index] for tensor in (self.next_samples, self.old_means, self.old_log_probs))
        levels = self.levels._replace(sigma=self.levels.sigma[:, part], sigma_next=self.levels.sigma_next[:, part])
        return sample, *kept, levels  # type: ignore[return-value]

    def renew(self, velocity: Tensor) -> None:
        """Old means and log-probs of another old velocity ``[B, S, *latent]``."""
        for position, sample in enumerate(self.samples):
            levels = peers.Levels(self.levels.sigma[:, position], self.levels.sigma_next[:, position], self.levels.eta)
            mean, std = peers.step_mean(velocity[:, position], sample, levels)
            self.old_means[:, position] = mean
            self.old_log_probs[:, position] = peers.log_prob(self.next_samples[:, position], mean, std, 1)


class HabitRecorder(TrajectoryRecorder):
    """A recorder that can also keep :class:`Means`; ``trajectory.means`` holds them."""

    keeps_means = False

    @contextlib.contextmanager
    def recording(self, sde_steps: Iterable[int], **options: Any) -> Iterator[Trajectory]:  # type: ignore[override]
        chosen = set(sde_steps)
        states: list[tuple[Tensor, Tensor]] = []
        with super().recording(chosen, **options) as trajectory:
            if self.keeps_means:
                _watch(self.pipeline.scheduler, chosen, states)
            yield trajectory
        if self.keeps_means:
            trajectory.means = self._means(trajectory, states)  # type: ignore[attr-defined]

    def _means(self, trajectory: Trajectory, states: list[tuple[Tensor, Tensor]]) -> Means:
        step, velocity = trajectory.sde_step, trajectory.velocity
        shape = (1, len(states)) + (1,) * (velocity.ndim - 2)
        sigma, sigma_next = (
            torch.as_tensor(level).float().to(velocity.device).view(shape) for level in (step.sigma, step.sigma_next)
        )
        samples = [_argument(record, sample) for record, (sample, _) in zip(trajectory.steps, states)]
        following = torch.stack([after.float() for _, after in states], dim=1)
        levels = peers.Levels(sigma, sigma_next, self.options["eta"])
        means = Means(samples, following, torch.empty_like(following), following.new_empty(following.shape[:2]), levels)
        means.renew(velocity)
        return means


class HabitTrainer(FlowDPPOTrainer):
    """:class:`FlowDPPOTrainer` with :attr:`habits`, starting each iteration from the same weights."""

    habits: frozenset[str] = frozenset()

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any):
        super().__init__(pipeline, *arguments, **options)
        self.recorder = HabitRecorder(pipeline, **self.recorder.options)
        self.loss_clock = LossClock(self.device)
        self._start = [p.detach().clone() for p in self.weights.parameters]

    def begin(self, habits: frozenset[str]) -> None:
        """The next iteration is the first one again, with these habits."""
        self.habits = habits
        self.config.optimizer.steps_per_micro_batch = 1 if PER_STEP in habits else None
        self.recorder.keeps_means = bool({EAGER, MEANS} & habits)  # type: ignore[attr-defined]
        self.state.iteration = 0
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.weights.parameters], self._start)
            for state in self.optimizer.adamw.state.values():
                for value in state.values():
                    value.zero_()

    def sample(self, iteration: int) -> Rollout:
        rollout = super().sample(iteration)
        if self.recorder.keeps_means:  # type: ignore[attr-defined]
            for trajectory in rollout.trajectories:
                # the shape is still asked for; the numbers are gone
                velocity = trajectory.velocity
                trajectory.velocity = velocity.new_zeros(()).expand(velocity.shape)
        return rollout

    def update(self, rollout: Rollout, rows: range, *, number: int) -> dict[str, list]:
        if RECOMPUTE in self.habits and number == 0:
            self._recompute(rollout)
        return super().update(rollout, rows, number=number)

    def _recompute(self, rollout: Rollout) -> None:
        """A pass over all rows and steps without gradients, in the geometry of the updates, for the old policy."""
        o = self.config.optimizer
        for trajectory in rollout.trajectories:
            width = o.steps_per_micro_batch or len(trajectory.steps)
            velocity = torch.empty_like(trajectory.velocity, memory_format=torch.contiguous_format)
            for start in range(0, len(trajectory), o.micro_batch_size):
                part = range(start, min(start + o.micro_batch_size, len(trajectory)))
                for first in range(0, len(trajectory.steps), width):
                    steps = range(first, min(first + width, len(trajectory.steps)))
                    replay = functools.partial(self.recorder.replay, trajectory, part, steps)
                    with torch.no_grad():
                        replayed = self.calls.run(replay)
                    velocity[part.start : part.stop, steps.start : steps.stop] = replayed
            if self.recorder.keeps_means:  # type: ignore[attr-defined]
                trajectory.means.renew(velocity)  # type: ignore[attr-defined]
            else:
                trajectory.velocity = velocity

    def _loss(
        self,
        trajectory: Trajectory,
        rows: Sequence[int],
        steps: range,
        velocity: Tensor,
        reference: Tensor | None,
        advantages: Tensor,
    ) -> LossOutput:
        with self.loss_clock.running():
            if EAGER in self.habits:
                return self._eager(trajectory.means, rows, steps, velocity, advantages)  # type: ignore[attr-defined]
            if MEANS in self.habits:
                taken = trajectory.means.take(rows, steps)  # type: ignore[attr-defined]
                out = self._fused_means(taken, trajectory.sde_step[steps.start : steps.stop], velocity, advantages)
            else:
                out = super()._loss(trajectory, rows, steps, velocity, reference, advantages)
            if ITEMS in self.habits:
                for name, value in out.metrics().items():
                    if name not in _OURS_ALONE:
                        value.item()
            return out

    def _eager(
        self, means: Means, rows: Sequence[int], steps: range, velocity: Tensor, advantages: Tensor
    ) -> LossOutput:
        sample, following, old_mean, old_log_prob, levels = means.take(rows, steps)
        leaf = velocity.detach().requires_grad_()
        threshold = self.objective.threshold  # type: ignore[attr-defined]
        output = peers.dppo(leaf, sample, following, old_mean, old_log_prob, advantages, levels, threshold)
        if ITEMS in self.habits:
            peers.synced(output)
        (grad,) = torch.autograd.grad(output.loss, leaf)
        return _as_loss_output(output, advantages, threshold, grad)

    def _fused_means(
        self,
        taken: tuple[Tensor, Tensor, Tensor, Tensor, peers.Levels],
        step: SDEStep,
        velocity: Tensor,
        advantages: Tensor,
    ) -> LossOutput:
        sample, following, old_mean, _, _ = taken
        leaf = velocity.detach().requires_grad_()
        stepped = sde_step(sample, leaf, step, prev_sample=following, return_mean=True, row_dims=2)
        assert stepped.mean is not None
        std = torch.as_tensor(step.std).float().to(velocity.device)
        threshold = self.objective.threshold  # type: ignore[attr-defined]
        out = fused_dppo_loss(stepped.mean, old_mean, following, std, advantages, threshold=threshold)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        return out._replace(loss=out.loss.detach(), grad=grad)

    def _read(self, rollout: Rollout, results: dict[str, list]) -> dict[str, float]:
        metrics = super()._read(rollout, results)
        held: list[Any] = list(rollout.trajectories)
        for trajectory in rollout.trajectories:
            if self.recorder.keeps_means:  # type: ignore[attr-defined]
                means = trajectory.means  # type: ignore[attr-defined]
                held.append([means.samples, means.next_samples, means.old_means, means.old_log_probs])
        return {**metrics, "trajectory_bytes": stored_bytes(held) / sum(map(len, rollout.trajectories))}


class LossClock:
    """Time between the replayed velocity and its gradient: the process's CPU time, or the GPU stream's own time."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[Any] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans.append((begin, self._now()))

    def read(self) -> float:
        """Seconds since the last reading; waits for the device."""
        spans, self._spans = self._spans, []
        if self._cuda:
            torch.cuda.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3
        return sum(end - begin for begin, end in spans)

    def _now(self) -> Any:
        if not self._cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _watch(scheduler: Any, chosen: set[int], states: list[tuple[Tensor, Tensor]]) -> None:
    """Keeps the states around the chosen steps of ``scheduler``."""
    step = scheduler.step

    # pipelines look at the parameters of this method
    @functools.wraps(step)
    def watched(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        result = step(model_output, timestep, sample, **options)
        if scheduler.step_index - 1 in chosen:
            states.append((sample.detach(), result[0].detach()))
        return result

    scheduler.step = watched


def _argument(record: Any, sample: Tensor) -> Tensor:
    """The argument of the recorded call that is the state: kept once, as the trainers do.

    Raises:
        ValueError: the transformer was not given the state as it is.
    """
    for leaf in record.calls[0].leaves:
        held = leaf if isinstance(leaf, Tensor) else getattr(leaf, "values", None)
        if isinstance(held, Tensor) and held.shape == sample.shape and torch.equal(held, sample):
            return held
    raise ValueError("pipeline: the transformer is not called with the scheduler's state, expected one that is")


def _as_loss_output(output: peers.PeerOutput, advantages: Tensor, threshold: float, grad: Tensor) -> LossOutput:
    """Eager results in the form that the trainer's metrics read; a few operations on rows."""
    assert output.kl is not None
    ratio = output.log_ratio.exp()
    kept = ~((output.kl >= threshold) & (((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))))
    lines = ratio.new_zeros(len(RowField), advantages.numel())
    for name, value in (("LOG_RATIO", output.log_ratio), ("RATIO", ratio), ("KL", output.kl), ("KEPT", kept)):
        lines[RowField[name]] = value.flatten()
    loss = output.loss.detach()
    zero = torch.zeros_like(loss)
    summary = torch.stack([loss if name == "loss" else output.metrics.get(name, zero) for name in SUMMARY])
    names = tuple(name for name in SUMMARY if name in output.metrics)
    return LossOutput(loss, lines, summary, tuple(advantages.shape), names, "eager", grad)
