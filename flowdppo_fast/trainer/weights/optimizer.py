"""One optimizer step: gradients summed over processes, clipped, and taken or left out without asking the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import OptimizerConfig
from .distributed import Workers

_FIRST_SCALE, _GROWTH_INTERVAL = 2.0**14, 1000


class PolicyOptimizer:
    """AdamW that leaves weights, moments and step counts alone where a step must not be taken.

    A step is left out where the loss or a gradient is not finite, and, with ``target_kl``, for the rest of a rollout
    once the mean KL from the rollout's policy exceeds it. Both are decided on the device.

    Args:
        parameters: float32 weights, or this process's shards of them.
        settings: of the optimizer.
        workers: processes to sum gradients over.
        scaled: multiply losses by :attr:`scale`, for float16 autocast; it is halved when a gradient overflows and
            doubled after a long run of steps without (Micikevicius et al., arXiv 1710.03740, Sec. 3.2).
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], settings: OptimizerConfig, workers: Workers, *, scaled: bool
    ):
        self.parameters, self.settings, self.workers, self.scaled = list(parameters), settings, workers, scaled
        s = settings
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=True
        )
        device = self.parameters[0].device
        self.scale = torch.full((), _FIRST_SCALE if scaled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)
        # updates that are done, and those of the run
        self._done, self._updates = 0, 1

    def begin_rollout(self, iteration: int = 0, iterations: int = 1) -> None:
        """Steps may be taken again; gradients of an update that was interrupted are gone.

        Args:
            iteration, iterations: those that are done, and those of the whole run, for the learning rate.
        """
        each = self.settings.updates_per_rollout * self.settings.inner_epochs
        self._done, self._updates = iteration * each, iterations * each
        self.stopped.zero_()
        self.adamw.zero_grad(set_to_none=False)

    def step(self, loss: Tensor, kl: Tensor) -> dict[str, Tensor]:
        """Takes one step with the gradients at hand and clears them; no host sync.

        Args:
            loss, kl: 0-d; this process's share of the update's loss and of its mean KL from the rollout's policy.

        Returns:
            0-d device tensors: ``grad_norm`` before clipping, ``skipped`` (not finite), ``stopped`` (too far) and
            ``kl`` of all processes.
        """
        loss, kl = self.workers.sum(torch.stack([loss, kl])).unbind()
        return self.workers.sharding.inside(lambda: self._take(loss, kl), update=True)

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return float(self.adamw.param_groups[0]["lr"])

    def _take(self, loss: Tensor, kl: Tensor) -> dict[str, Tensor]:
        s = self.settings
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.workers.sharding.sum_gradients(gradients)
        if self.scaled:
            torch._foreach_mul_(gradients, 1.0 / self.scale)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.workers.sharded:
            norm = self.workers.sum(norm.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.parameters, s.max_grad_norm or float("inf"), norm, foreach=True)
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        if s.target_kl is not None:
            self.stopped |= kl > s.target_kl
        for group in self.adamw.param_groups:
            group["lr"] = scheduled_rate(self.settings, self._done, self._updates)
        self._done += 1
        # where this is 1 the fused optimizer changes nothing; the host need not know
        self.adamw.found_inf = (bad | self.stopped).float()  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=False)
        # a scale that is too large is found by overflowing: no fault of the run
        fault = bad & (self.scale <= 1.0)
        if self.scaled:
            self.good_steps = torch.where(bad, 0.0, self.good_steps + 1.0)
            grown = torch.where(self.good_steps % _GROWTH_INTERVAL == _GROWTH_INTERVAL - 1, 2.0, 1.0)
            self.scale = (self.scale * torch.where(bad, 0.5, grown)).clamp(min=1.0)
        return {"grad_norm": norm, "skipped": fault.float(), "stopped": self.stopped.float(), "kl": kl}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides AdamW's own state."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        self.scale.copy_(state["scale"])
        self.good_steps.copy_(state["good_steps"])


def scheduled_rate(settings: OptimizerConfig, done: int, updates: int) -> float:
    """The learning rate of the update after ``done`` of ``updates``.

    It depends on their number alone, so a run that continues has it without keeping it.
    """
    rate, warmup = settings.learning_rate, settings.warmup_updates
    if done < warmup:
        return rate * (done + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return rate
    left = max(updates - done, 0) / max(updates - warmup, 1)
    return rate * (left if settings.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))
