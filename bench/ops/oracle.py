"""What every contender must compute, in float64, from the same inputs; and how wrong it may be.

The expected loss, KL and gradient come from ``flowdppo_fast.reference`` and ``flowdppo_fast.objectives`` in float64,
one row at a time.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowdppo_fast import DPPO, RatioClip, reference
from flowdppo_fast.epilogue import epilogue
from flowdppo_fast.objectives import EpilogueOptions, Objective, RowField
from flowdppo_fast.rows import Form, RowSource

from .inputs import CLIP_RANGE, THRESHOLD, Rollout

OBJECTIVES: dict[str, Objective] = {"dppo": DPPO(THRESHOLD), "ratio_clip": RatioClip(CLIP_RANGE, CLIP_RANGE)}
# gradients of larger workloads are recomputed for each contender instead of being kept in float64
_KEEP_ELEMENTS = 1 << 24


class Start(str, enum.Enum):
    """What a contender starts from."""

    CHAIN = "velocity, sample, next state, old mean, old log-prob"
    MEANS = "mean, old mean, next state"
    VELOCITY = "velocity, old velocity, stored noise"
    SEEDED = "velocity, old velocity, seed"


@dataclass(frozen=True)
class Expected:
    """Float64 truth: scalar ``loss``, its ``scale`` (mean absolute row loss), and per row ``kl``, ``log_ratio``,
    ``coefficients`` ``[3, R]`` and ``kept`` (False where a bound removes the gradient)."""

    loss: float
    scale: float
    kl: Tensor
    log_ratio: Tensor
    coefficients: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64: of the loss (over the mean absolute row loss), of the KL (largest over rows;
    None where the method has none), of the log-ratio (largest over rows, over the mean absolute one) and of the
    gradient (L2)."""

    loss: float
    kl: float | None
    log_ratio: float
    gradient: float

    def over(self, bounds: Errors) -> list[str]:
        """Which figures are not within ``bounds``; NaN never is. The log-ratio is reported, not judged: trainers that
        subtract two log-probs of order 1 lose most of its digits, and that is a finding rather than a fault."""
        found = []
        for name in ("loss", "kl", "gradient"):
            value, bound = getattr(self, name), getattr(bounds, name)
            if value is not None and not value <= bound:
                found.append(f"{name} error {value:.2e} over {bound:.2e}")
        return found


@dataclass
class Oracle:
    """Truth for one rollout, computed on demand and kept."""

    rollout: Rollout
    _expected: dict = field(default_factory=dict)
    _gradients: dict = field(default_factory=dict)

    def expected(self, start: Start, objective: str) -> Expected:
        key = (start, objective)
        if key not in self._expected:
            self._expected[key] = self._compute(start, objective)
        return self._expected[key]

    def errors(
        self, start: Start, objective: str, loss: Tensor, kl: Tensor | None, log_ratio: Tensor, grad: Tensor
    ) -> Errors:
        """How far a contender's result is from the truth; a 0-d ``kl`` is held against the mean over rows.

        Raises:
            ValueError: a result whose shape or dtype is not that of what it belongs to.
        """
        rollout, truth = self.rollout, self.expected(start, objective)
        leaf = rollout.inputs.mean if start is Start.MEANS else rollout.inputs.velocity
        if grad.shape != leaf.shape or grad.dtype != leaf.dtype:
            raise ValueError(
                f"gradient: got {list(grad.shape)} in {grad.dtype}, expected {list(leaf.shape)} in {leaf.dtype}"
            )
        rows = truth.log_ratio.numel()
        for name, value in (("kl", kl), ("log_ratio", log_ratio)):
            mean = name == "kl" and value is not None and value.ndim == 0
            if value is not None and value.numel() != rows and not mean:
                raise ValueError(f"{name}: got {value.numel()} numbers, expected one per row ({rows})")
        kl_error = None
        if kl is not None:
            want_kl = truth.kl if kl.ndim else truth.kl.mean()
            kl_error = ((kl.double().to(want_kl.device).flatten() - want_kl).abs() / want_kl).max().item()
        ratio_error = (log_ratio.double().reshape(-1) - truth.log_ratio).abs().max() / truth.log_ratio.abs().mean()
        wrong = right = 0.0
        flat = grad.detach().reshape(rows, -1)
        for row in range(rows):
            want = self._gradient(start, objective, row)
            wrong += (flat[row].double() - want).square().sum().item()
            right += want.square().sum().item()
        return Errors(
            loss=abs(loss.item() - truth.loss) / truth.scale,
            kl=kl_error,
            log_ratio=ratio_error.item(),
            gradient=math.sqrt(wrong / right),
        )

    def bounds(self, start: Start) -> Errors:
        """What a careful float32 computation of these inputs may err by; derived from dtype and length.

        Sums of N terms in float32: ``8 * sqrt(N)`` roundings. Differences of means that are about ``1/d`` times
        larger than what they leave (``d = S * rms(u)``): ``1/d`` roundings per element, independent between elements.
        Gradients: one rounding to the result's dtype, and 64 float32 roundings of states that are ``1/S`` times
        larger than the noise they hold.
        """
        rollout = self.rollout
        unit = torch.finfo(torch.float32).eps / 2
        result = torch.float32 if start is Start.MEANS else rollout.dtype
        length = math.sqrt(rollout.workload.elements_per_row)
        std = torch.as_tensor(rollout.step.std).min().item()
        drift = (2.0 * self.expected(start, "dppo").kl.min()).sqrt().item() * std
        summed = 8.0 * length * unit
        cancelled = 16.0 * (unit / drift / length + (unit / drift) ** 2)
        return Errors(
            loss=summed,
            kl=summed + cancelled,
            log_ratio=math.inf,
            gradient=torch.finfo(result).eps / 2 + 64.0 * unit * (1.0 + 1.0 / std),
        )

    def _row(self, start: Start, row: int) -> tuple[RowSource, list[float]]:
        """Arguments of the reference operators for one row in float64, and the row's ``S, k, -dt``."""
        rollout = self.rollout
        inputs = rollout.inputs

        def flat(tensor: Tensor) -> Tensor:
            return tensor.detach().reshape(rollout.workload.row_count, -1)[row].double()[None, None]

        a, b, std, k, dt = self._numbers(row)
        if start is Start.CHAIN:
            new = a * flat(inputs.sample) + b * flat(inputs.velocity)
            latents = (new, flat(inputs.old_mean), flat(inputs.prev_sample))
        elif start is Start.MEANS:
            latents = (flat(inputs.mean), flat(inputs.old_mean), flat(inputs.prev_sample))
        else:
            noise = inputs.noise if start is Start.VELOCITY else rollout.seeded_noise
            latents = (flat(inputs.velocity), flat(inputs.old_velocity), flat(noise))
        form = Form.MEAN if start in (Start.CHAIN, Start.MEANS) else Form.VELOCITY
        # the MEAN form takes k = 1/S from S itself
        numbers = [std, k, -dt]
        return RowSource(*latents, None, None, None, numbers, 0, 0, int(form)), numbers

    def _numbers(self, row: int) -> tuple[float, ...]:
        step, rows = self.rollout.step, self.rollout.workload.rows
        columns = (step.sample_coef, step.velocity_coef, step.std, step.kl_scale, step.dt)
        return tuple(
            torch.as_tensor(column, dtype=torch.float64).expand(rows).reshape(-1)[row].item() for column in columns
        )

    def _compute(self, start: Start, objective: str) -> Expected:
        stats, numbers = [], []
        for row in range(self.rollout.workload.row_count):
            source, values = self._row(start, row)
            stats.append(reference.row_stats(*source, False))
            numbers.append(values)
        device = self.rollout.inputs.velocity.device
        std, k, neg_dt = torch.tensor(numbers, dtype=torch.float64, device=device).unbind(1)
        rows, summary = epilogue(
            torch.cat(stats, dim=1),
            std,
            k,
            neg_dt,
            self.rollout.inputs.advantages.double().reshape(-1),
            None,
            None,
            self.rollout.workload.elements_per_row,
            EpilogueOptions.make(OBJECTIVES[objective]),
        )
        return Expected(
            loss=summary[0].item(),
            scale=rows[RowField.LOSS].abs().mean().item(),
            kl=rows[RowField.KL],
            log_ratio=rows[RowField.LOG_RATIO],
            coefficients=rows[RowField.GRAD_P :],
            kept=rows[RowField.KEPT] != 0,
        )

    def _gradient(self, start: Start, objective: str, row: int) -> Tensor:
        """``[N]`` float64 gradient of the mean loss in what the contender differentiates."""
        key = (start, objective, row)
        if key in self._gradients:
            return self._gradients[key]
        source, _ = self._row(start, row)
        coefficients = self.expected(start, objective).coefficients[:, row : row + 1]
        factor = 1.0 / self.rollout.workload.row_count
        if start is Start.CHAIN:
            # through the sampler step: dmu/dv = b
            factor *= self._numbers(row)[1]
        one = coefficients.new_ones(1)
        grad = reference.row_grad(*source, coefficients, one, factor).reshape(-1)
        if self.rollout.workload.elements <= _KEEP_ELEMENTS:
            self._gradients[key] = grad
        return grad
