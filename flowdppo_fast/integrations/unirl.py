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

    sampler: str
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
        sampler = self.sampler
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

    sampler = "flow_sde"


class CPSSDEStrategy(_FusedDenoise, _CPSSDEStrategy):
    """UniRL's CPS strategy with a fused ``denoise``; log-probs keep UniRL's scale, ``-mean((x'-mu)**2)``."""

    sampler = "cps"


class DanceSDEStrategy(_FusedDenoise, _DanceSDEStrategy):
    """UniRL's Dance strategy with a fused ``denoise``."""

    sampler = "dance"


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
        backward: ``"segment"`` (UniRL's: one graph over all stochastic steps) or ``"step"``: replay and backward one
            step after another, so that one step's activations are held at a time; same loss, gradient and metrics.
        loss_backend: as for the losses (``backend`` is UniRL's name for its training backend).
        options: everything UniRL's ``FlowDPPO`` takes.

    Raises:
        ValueError: an unknown choice, or ``anchor="rollout"`` with ``old_logp_source="replay"``; and what UniRL's own
            refuses, such as a rollout anchor beside batched replay in its later trees.
    """

    _rounding_is_small = False

    def __init__(
        self,
        *,
        anchor: str = "replay",
        log_ratio: str = "log_probs",
        backward: str = "segment",
        loss_backend: BackendName = "auto",
        **options: Any,
    ) -> None:
        for name, value, choices in (
            ("anchor", anchor, ("replay", "rollout")),
            ("log_ratio", log_ratio, ("log_probs", "means")),
            ("backward", backward, ("segment", "step")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: got {value!r}, expected {choices[0]!r} or {choices[1]!r}")
        self.anchor, self.log_ratio, self.backward, self.loss_backend = anchor, log_ratio, backward, loss_backend
        super().__init__(**options)
        if anchor == "rollout" and self.old_logp_source != "rollout":
            raise ValueError(
                f"old_logp_source: got {self.old_logp_source!r} with anchor='rollout', expected 'rollout'; replayed "
                "log-probs need the replay that anchor='rollout' leaves out"
            )
        if anchor == "rollout":
            record_rollout_velocities(self.stage)

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
        step = _step(self.stage.strategy.sampler, sigma, sigma_next, float(self.params.eta), sigma_max)
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
        chunks = [steps] if self.backward == "segment" else [[step] for step in steps]
        share = loss_scale / len(chunks)
        parts, losses, reference_kls = [], [], []
        for chunk in chunks:
            out, kl_ref = self._chunk_loss(typed, segment, chunk, advantages)
            loss = out.loss if kl_ref is None else out.loss + self.beta * kl_ref
            (loss * share).backward()
            losses.append(loss.detach())
            reference_kls += [] if kl_ref is None else [kl_ref.detach()]
            parts.append(out._replace(loss=out.loss.detach()))
        metrics = self._metrics(parts, advantages)
        metrics["loss"] = torch.stack(losses).mean()
        if reference_kls:
            metrics["kl_ref_mean"] = torch.stack(reference_kls).mean()
        floats = LossMetrics((name, value.detach()) for name, value in metrics.items()).to_floats()
        total = floats.pop("loss")
        floats["kl_mask_threshold"] = self.kl_mask_threshold
        if "kl_ref_mean" in floats:
            floats["beta"] = float(self.beta)
        return _base.AlgorithmStepResult(loss=total, metrics=floats, num_steps_or_tokens=len(steps), has_backward=True)

    def _chunk_loss(
        self, typed: Any, segment: Any, steps: list[int], advantages: Tensor
    ) -> tuple[LossOutput, Tensor | None]:
        """Replay and loss of some steps of the segment, and the KL to the reference where ``beta`` asks for it."""
        replay = self.stage.replay(typed, segment=segment, params=self.params, step_indices=steps)
        if replay.prev_sample_means is None:
            raise RuntimeError(
                "prev_sample_means: the stage's replay returned None, expected the means of its transitions"
            )
        out = self._policy_loss(segment, steps, replay, advantages)
        if float(getattr(self, "beta", 0.0)) <= 0.0:
            return out, None
        reference = _base._reference_replay_means(
            self.stage, self._ref_model, conditions=typed, segment=segment, params=self.params, target_steps=steps
        ).to(replay.prev_sample_means.device)
        drift = squared_drift(replay.prev_sample_means, reference, row_dims=2, backend=self.loss_backend)
        return out, (drift / (2.0 * self._std(segment, steps, drift.device) ** 2)).mean()

    def _metrics(self, parts: list[LossOutput], advantages: Tensor) -> LossMetrics:
        """UniRL's metrics of all rows ``[B, S]``, whichever number of loss calls they came from."""
        whole = parts[0]
        if len(parts) > 1:
            # a second look at rows that are known: their log-ratios and divergences, side by side, under a unit std
            log_ratio, divergence = (
                torch.cat([getattr(out.rows, name) for out in parts], dim=1) for name in ("log_ratio", "kl")
            )
            adv = advantages.detach().to(log_ratio).reshape(-1, 1).expand(log_ratio.shape)
            whole = log_prob_policy_loss(
                DPPO(self.kl_mask_threshold), log_ratio, torch.zeros_like(log_ratio), adv, 1.0,
                drift=2.0 * divergence, backend=self.loss_backend,
            )  # fmt: skip
        return LossMetrics((name, value) for name, value in whole.metrics().items() if name in UNIRL_METRICS)

    def _policy_loss(self, segment: Any, steps: list[int], replay: Any, advantages: Tensor) -> LossOutput:
        log_probs, means = replay.log_probs, replay.prev_sample_means
        old_means = self._anchor(segment, "sde_means", steps).to(means.device)
        std = self._std(segment, steps, means.device)
        if means.dtype not in (torch.float32, torch.float64):
            self._check_rounded_means(means.dtype, old_means, std)
        adv = advantages.detach().to(means.device).reshape(-1, 1).expand(log_probs.shape)
        objective = DPPO(self.kl_mask_threshold, trust_region="kl" if self.add_kl_coefficient else "mean_drift")
        convention: LogProbKind = "unnormalized" if self._sampler() == "cps" else "gaussian"
        if self.log_ratio == "means":
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

    def _check_rounded_means(self, dtype: torch.dtype, old_means: Tensor, std: Tensor) -> None:
        """Refuses what replayed means in a short dtype cannot give.

        Raises:
            ValueError: ``log_ratio="means"``; or ``anchor="rollout"``, and the rounding alone is a KL above a tenth of
                the threshold.
        """
        if self.log_ratio == "means":
            raise ValueError(
                f"log_ratio: got 'means' with {dtype} replayed means, expected float32; this UniRL tree "
                "casts them to the trajectory dtype, so use log_ratio='log_probs'"
            )
        if self.anchor == "replay" or self._rounding_is_small:
            return
        # the replay of unchanged weights is these means, rounded: what is left between the two is the on-policy KL
        drift = squared_drift(old_means.to(dtype), old_means, row_dims=2, backend=self.loss_backend)
        scale = std if self.add_kl_coefficient else torch.ones_like(std)
        on_policy = float((drift / (2.0 * scale**2)).max())
        if on_policy > 0.1 * self.kl_mask_threshold:
            raise ValueError(
                f"anchor: got 'rollout' with {dtype} replayed means, expected float32; their rounding alone is a KL of "
                f"{on_policy:.1e} on unchanged weights, beside a kl_mask_threshold of {self.kl_mask_threshold:.1e}; "
                "set trajectory_precision: fp32, or anchor: replay"
            )
        self._rounding_is_small = True

    def _anchor(self, segment: Any, name: str, steps: list[int]) -> Tensor:
        field = getattr(segment, name)
        return _base.gather_sde_field(field, segment.sde_indices, steps, field_name=name).detach()

    def _sampler(self) -> str | None:
        """The sampler's name here, None for a strategy that this module has no formula of."""
        return _SAMPLERS.get(type(self.stage.strategy).canonical_name)

    def _levels(self, segment: Any, steps: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        sigmas = segment.sigmas.to(device=device, dtype=torch.float32)
        # an index tensor would have to be copied to the device, which waits for it
        now, after = (torch.stack([sigmas[i + k] for i in steps]) for k in (0, 1))
        return now, after, sigmas[1]

    def _std(self, segment: Any, steps: list[int], device: torch.device) -> Tensor:
        """``[S]`` standard deviations of the segment's transitions, on the device: the strategy's own if it has them.

        Raises:
            ValueError: a strategy without ``transition_std`` that is none of UniRL's first three.
        """
        sigma, sigma_next, sigma_max = self._levels(segment, steps, device)
        strategy, eta = self.stage.strategy, float(self.params.eta)
        # of this module's own the step is known, and theirs may read sigma_max on the host
        if hasattr(strategy, "transition_std") and not isinstance(strategy, _FusedDenoise):
            levels = {"sigma": sigma.double(), "sigma_next": sigma_next.double(), "sigma_max": sigma_max.double()}
            return strategy.transition_std(eta=eta, **levels).reshape(-1).expand(len(steps))
        sampler = self._sampler()
        if sampler is None:
            raise ValueError(
                f"pipeline.strategy: got {type(strategy).__name__} (canonical_name {strategy.canonical_name!r}), "
                f"expected one with a transition_std method or one of {', '.join(map(repr, _SAMPLERS))}; the KL is "
                "divided by the transition's variance"
            )
        return on_host(_step(sampler, sigma, sigma_next, eta, sigma_max).std)


def _recomputes_anchor(self: Any) -> bool:
    """Whether ``prepare_segment`` replays, as UniRL's train stack asks: not with ``anchor="rollout"``."""
    if self.anchor == "rollout":
        return False
    theirs = vars(self).get("recomputes_anchor", getattr(super(FlowDPPO, self), "recomputes_anchor", True))
    return bool(theirs() if callable(theirs) else theirs)


def _keep(self: Any, value: Any) -> None:
    vars(self)["recomputes_anchor"] = value


# a method in UniRL's trees of June and July 2026, an attribute or a property in later ones
FlowDPPO.recomputes_anchor = (
    _recomputes_anchor
    if callable(getattr(_FlowDPPO, "recomputes_anchor", None))
    else property(_recomputes_anchor, _keep)
)
