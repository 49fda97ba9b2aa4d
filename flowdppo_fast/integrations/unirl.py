"""UniRL (Tencent-Hunyuan/UniRL): ``FlowDPPO`` and SDE strategies for the ``_target_`` entries of a recipe.

.. code-block:: yaml

    pipeline:
      strategy: {_target_: flowdppo_fast.integrations.unirl.FlowSDEStrategy}
    algorithm:
      _target_: flowdppo_fast.integrations.unirl.FlowDPPO

Each extends UniRL's class of the same name, so everything else in a recipe stays as it is; either can be used alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backend import BackendName
from ..losses import fused_policy_loss
from ..objectives import DPPO, LogProbKind
from ..results import LossMetrics, LossOutput
from ..rows import stats_dtype
from ..samplers import ScheduleLevels, SDEStep, diffusion, on_host
from ..sampling import sde_step
from ._rows import UNIRL_METRICS, log_prob_policy_loss, squared_drift
from ._trainer import module_of

_SOURCE = "https://github.com/Tencent-Hunyuan/UniRL"
_kernels = module_of("unirl.sde.kernels", "UniRL", _SOURCE)
_flowdppo = module_of("unirl.algorithms.flowdppo", "UniRL", _SOURCE)
_base = module_of("unirl.algorithms.base", "UniRL", _SOURCE)
_FlowSDEStrategy: Any = _kernels.FlowSDEStrategy
_CPSSDEStrategy: Any = _kernels.CPSSDEStrategy
_DanceSDEStrategy: Any = _kernels.DanceSDEStrategy
_FlowDPPO: Any = _flowdppo.FlowDPPO

__all__ = ["CPSSDEStrategy", "DanceSDEStrategy", "FlowDPPO", "FlowSDEStrategy", "record_rollout_velocities"]

_SAMPLERS = {"flow": "flow_sde", "cps": "cps", "dance": "dance"}
# below this eta UniRL takes a step as deterministic
_SILENT = 1e-7


def _step(sampler: str, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float | Tensor) -> SDEStep:
    schedule = ScheduleLevels(sigma_max, math.nan, math.nan)
    return SDEStep.from_levels(
        sampler, diffusion(sampler, sigma, sigma_next, eta=eta, schedule=schedule), sigma, sigma_next
    )


class _FusedDenoise:
    """``StepStrategy.denoise`` in one launch for the transition and one for the log-prob, in the tensors' own dtypes.

    Noise levels stay on the device: no sync per step, whatever batch of steps is replayed at once.
    """

    canonical_name: str
    recorded: list[Tensor] | None = None

    def denoise(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        generator: Any = None,
        sigma_max: float | Tensor = 0.99,
        step_index: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One transition: ``(prev_sample, log_prob [B], prev_sample_mean)``, float32; no log-prob for ``eta < 1e-7``.

        Args:
            noise_pred, sample: ``[B, *latent]`` of any rank; with batched replay ``[S*B, *latent]``.
            sigma, sigma_next: 0-d or ``[B]`` levels.
            prev_sample: the next state of a recorded step; None draws one. Either is rounded through ``sample``'s
                dtype, in which the trajectory is stored, before its log-prob is taken.
            generator: source of the noise (UniRL's newer trees pass one, June 2026 draws from the global generator).
            sigma_max: the level that stands in for ``sigma == 1``.
            step_index: not used; levels say it all.
        """
        sampler = _SAMPLERS[self.canonical_name]
        rows = sample.shape[0]
        now = torch.as_tensor(sigma, device=sample.device).reshape(-1).expand(rows)
        after = torch.as_tensor(sigma_next, device=sample.device).reshape(-1).expand(rows)
        step = _step(sampler, now, after, float(eta), sigma_max)
        convention: LogProbKind = "unnormalized" if sampler == "cps" else "gaussian"
        wide = stats_dtype(sample)
        if eta < _SILENT:
            result = sde_step(sample, noise_pred, step, generator=generator, dtype=wide, return_mean=True)
            return result.prev_sample if prev_sample is None else prev_sample.to(wide), None, result.mean  # type: ignore[return-value]
        if prev_sample is None:
            prev_sample = sde_step(sample, noise_pred, step, generator=generator, dtype=sample.dtype).prev_sample
            if self.recorded is not None:
                self.recorded.append(noise_pred.detach())
        # a state is scored as it is stored, so that rollout and replay score the same one
        action = prev_sample.detach().to(sample.dtype)
        result = sde_step(sample, noise_pred, step, prev_sample=action, return_mean=True, log_prob=convention)
        return action.to(wide), result.log_prob, result.mean  # type: ignore[return-value]


class FlowSDEStrategy(_FusedDenoise, _FlowSDEStrategy):
    """UniRL's Flow-SDE strategy with a fused ``denoise``."""


class CPSSDEStrategy(_FusedDenoise, _CPSSDEStrategy):
    """UniRL's CPS strategy with a fused ``denoise``; log-probs keep UniRL's scale, ``-mean((x'-mu)**2)``."""


class DanceSDEStrategy(_FusedDenoise, _DanceSDEStrategy):
    """UniRL's Dance strategy with a fused ``denoise``."""


class _RecordingDiffuse:
    """A stage's ``diffuse`` that leaves the velocities of its stochastic steps in ``segment.sde_means``."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage
        self.inner = stage.diffuse

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        strategy = self.stage.strategy
        strategy.recorded = []
        try:
            segment = self.inner(*args, **kwargs)
            recorded = strategy.recorded
        finally:
            strategy.recorded = None
        steps = 0 if segment.sde_indices is None else int(segment.sde_indices.numel())
        if len(recorded) != steps:
            raise RuntimeError(
                f"strategy: recorded {len(recorded)} stochastic steps of a rollout that lists {steps} in sde_indices; "
                "anchor='rollout' needs a stage that calls strategy.denoise once per step"
            )
        if recorded:
            segment.sde_means = torch.stack(recorded, dim=1)
        return segment


def record_rollout_velocities(stage: Any) -> None:
    """Makes ``stage.diffuse`` keep its velocities ``[B, S, *latent]``, in the model's dtype, in ``segment.sde_means``.

    :class:`FlowDPPO` with ``anchor="rollout"`` calls it; until its ``prepare_segment`` turns them into means, the field
    holds velocities. Calling it again changes nothing.

    Raises:
        TypeError: the stage's strategy is not one of this module's.
    """
    if not isinstance(stage.strategy, _FusedDenoise):
        raise TypeError(
            f"pipeline.strategy: got {type(stage.strategy).__name__}, expected a strategy of "
            "flowdppo_fast.integrations.unirl; anchor='rollout' records velocities in it"
        )
    if not isinstance(stage.diffuse, _RecordingDiffuse):
        stage.diffuse = _RecordingDiffuse(stage)


class FlowDPPO(_FlowDPPO):
    """UniRL's Flow-DPPO with a fused loss, the transition's own sigma, latents of any rank and one sync per micro-step.

    Args:
        anchor: ``"replay"`` (UniRL's: an extra no-grad replay at the exact training geometry, so the on-policy KL is 0
            bit for bit) or ``"rollout"``: no replay; the old means are made from velocities that the in-process rollout
            kept (``record_rollout_velocities``). Needs ``old_logp_source="rollout"`` and one of this module's
            strategies.
        log_ratio: ``"log_probs"`` (UniRL's: replayed minus anchor log-prob) or ``"means"``: from the means in the same
            pass as the KL, without cancellation. The latter needs float32 means, so a tree with UniRL's change #444.
        loss_backend: as for the losses (``backend`` is UniRL's name for its training backend).
        options: everything UniRL's ``FlowDPPO`` takes.

    Raises:
        ValueError: an unknown choice, or ``anchor="rollout"`` with ``old_logp_source="replay"``.
    """

    def __init__(
        self,
        *,
        anchor: str = "replay",
        log_ratio: str = "log_probs",
        loss_backend: BackendName = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if anchor not in ("replay", "rollout"):
            raise ValueError(f"anchor: got {anchor!r}, expected 'replay' or 'rollout'")
        if log_ratio not in ("log_probs", "means"):
            raise ValueError(f"log_ratio: got {log_ratio!r}, expected 'log_probs' or 'means'")
        if anchor == "rollout" and self.old_logp_source != "rollout":
            raise ValueError(
                f"old_logp_source: got {self.old_logp_source!r} with anchor='rollout', expected 'rollout'; replayed "
                "log-probs need the replay that anchor='rollout' leaves out"
            )
        self.anchor, self.log_ratio, self.loss_backend = anchor, log_ratio, loss_backend
        if anchor == "rollout":
            record_rollout_velocities(self.stage)
            # a method in UniRL's June 2026 tree, a class attribute in later ones
            theirs = _FlowDPPO.recomputes_anchor
            self.recomputes_anchor = partial(bool, False) if callable(theirs) else False

    def prepare_segment(self, *, conditions: Mapping[str, Any], segment: Any) -> None:
        """Freezes the old policy's means before the updates: UniRL's replay, or velocities of the rollout made means.

        Raises:
            RuntimeError: ``anchor="rollout"`` and the rollout left no velocities or log-probs.
        """
        if self.anchor == "replay":
            super().prepare_segment(conditions=conditions, segment=segment)
            return
        steps = self._resolve_target_steps(segment)
        if not steps:
            return
        if segment.sde_means is None or segment.sde_logp is None:
            raise RuntimeError(
                "anchor='rollout': the rollout left no velocities or log-probs in the segment; it needs the in-process "
                "(trainside) engine, or set anchor='replay'"
            )
        velocity = segment.sde_means
        device = velocity.device
        sigma, sigma_next, sigma_max = self._levels(segment, steps, device)
        sampler = self._sampler()
        step = _step(sampler, sigma, sigma_next, float(self.params.eta), sigma_max)
        shape = (1, -1) + (1,) * (velocity.ndim - 2)
        wide = stats_dtype(velocity)
        a, b = (on_host(x).to(wide).reshape(shape) for x in (step.sample_coef, step.velocity_coef))
        with torch.no_grad():
            states = torch.stack([segment.latents_at(i).to(device) for i in steps], dim=1)
            segment.sde_means = a * states + b * velocity

    def compute_loss_and_backward(
        self,
        *,
        conditions: Mapping[str, Any],
        segment: Any,
        advantages: Tensor,
        training_progress: float,
        loss_scale: float,
    ) -> Any:
        """Replay, loss and ``backward`` of one micro-batch; all SDE steps of the segment are rows of one loss call.

        Args:
            advantages: ``[B]``.
            loss_scale: factor on the loss before ``backward``.

        Returns:
            UniRL's ``AlgorithmStepResult`` with UniRL's metric names.
        """
        steps = self._resolve_target_steps(segment)
        if not steps:
            return _base.AlgorithmStepResult(loss=0.0, metrics={}, num_steps_or_tokens=0, has_backward=False)
        typed = _base.typed_conditions(conditions, self.conditions_cls)
        replay = self.stage.replay(typed, segment=segment, params=self.params, step_indices=steps)
        if replay.prev_sample_means is None:
            raise RuntimeError(
                "prev_sample_means: the stage's replay returned None, expected the means of its transitions"
            )
        out = self._policy_loss(segment, steps, replay, advantages)
        metrics = LossMetrics((name, value) for name, value in out.metrics().items() if name in UNIRL_METRICS)
        loss = out.loss
        beta = float(getattr(self, "beta", 0.0))
        if beta > 0.0:
            reference = _base._reference_replay_means(
                self.stage, self._ref_model, conditions=typed, segment=segment, params=self.params, target_steps=steps
            ).to(replay.prev_sample_means.device)
            drift = squared_drift(replay.prev_sample_means, reference, row_dims=2, backend=self.loss_backend)
            metrics["kl_ref_mean"] = (drift / (2.0 * self._std(segment, steps, drift.device) ** 2)).mean()
            loss = loss + beta * metrics["kl_ref_mean"]
        (loss * loss_scale).backward()
        metrics["loss"] = loss
        floats = LossMetrics((name, value.detach()) for name, value in metrics.items()).to_floats()
        total = floats.pop("loss")
        floats["kl_mask_threshold"] = self.kl_mask_threshold
        if beta > 0.0:
            floats["beta"] = beta
        return _base.AlgorithmStepResult(loss=total, metrics=floats, num_steps_or_tokens=len(steps), has_backward=True)

    def _policy_loss(self, segment: Any, steps: list[int], replay: Any, advantages: Tensor) -> LossOutput:
        log_probs, means = replay.log_probs, replay.prev_sample_means
        old_means = self._anchor(segment, "sde_means", steps).to(means.device)
        std = self._std(segment, steps, means.device)
        adv = advantages.detach().to(means.device).reshape(-1, 1).expand(log_probs.shape)
        objective = DPPO(self.kl_mask_threshold, trust_region="kl" if self.add_kl_coefficient else "mean_drift")
        convention: LogProbKind = "unnormalized" if self._sampler() == "cps" else "gaussian"
        if self.log_ratio == "means":
            if means.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"log_ratio: got 'means' with {means.dtype} replayed means, expected float32; this UniRL tree "
                    "casts them to the trajectory dtype, so use log_ratio='log_probs'"
                )
            actions = torch.stack([segment.latents_at(i + 1).to(means.device) for i in steps], dim=1)
            return fused_policy_loss(
                means, old_means, actions, std, adv.to(means.dtype), objective=objective,
                log_prob=convention, backend=self.loss_backend,
            )  # fmt: skip
        old_log_probs = self._anchor(segment, "sde_logp", steps).to(log_probs.device)
        drift = squared_drift(means.detach(), old_means, row_dims=2, backend=self.loss_backend)
        return log_prob_policy_loss(
            objective, log_probs, old_log_probs, adv.to(log_probs.dtype), std, drift=drift, log_prob_kind=convention,
            backend=self.loss_backend,
        )  # fmt: skip

    def _anchor(self, segment: Any, name: str, steps: list[int]) -> Tensor:
        field = getattr(segment, name)
        return _base.gather_sde_field(field, segment.sde_indices, steps, field_name=name).detach()

    def _sampler(self) -> str:
        return _SAMPLERS[type(self.stage.strategy).canonical_name]

    def _levels(self, segment: Any, steps: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        sigmas = segment.sigmas.to(device=device, dtype=torch.float32)
        # an index tensor would have to be copied to the device, which waits for it
        now, after = (torch.stack([sigmas[i + k] for i in steps]) for k in (0, 1))
        return now, after, sigmas[1]

    def _std(self, segment: Any, steps: list[int], device: torch.device) -> Tensor:
        """``[S]`` standard deviations of the segment's transitions, on the device."""
        sigma, sigma_next, sigma_max = self._levels(segment, steps, device)
        sampler = self._sampler()
        return on_host(_step(sampler, sigma, sigma_next, float(self.params.eta), sigma_max).std)
