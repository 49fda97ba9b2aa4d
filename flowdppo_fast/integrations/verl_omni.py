"""verl-omni (verl-project/verl-omni): fused ``flow_dppo``, ``flow_grpo``, ``grpo_guard``, ``kl`` and scheduler step.

``register()`` puts them into verl-omni's own registry under the names that are there, so ``loss_mode``, config keys,
data keys and metric names stay as they are. Every worker calls it on import with

    actor_rollout_ref.model.external_lib=flowdppo_fast.integrations.verl_omni_plugin

The interface hands a loss log-probs and means but not the next state, so the ratio is ``log_probs - old_log_probs`` as
in verl-omni, unless ``log_ratio="means"`` is chosen; one streaming pass over the means adds the divergence, and all
metrics cross to the host in one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backend import BackendName
from ..epilogue import LOG_SQRT_2PI
from ..losses import fused_policy_loss
from ..objectives import DPPO, GRPOGuard, RatioClip
from ..results import LossOutput
from ..samplers import on_host
from ..sampling import sde_step
from ..schedule import HostSchedule, per_row
from ._rows import UNIRL_METRICS, log_prob_policy_loss, squared_drift
from ._trainer import module_of

_SOURCE = "https://github.com/verl-project/verl-omni"
_algos = module_of("verl_omni.trainer.diffusion.diffusion_algos", "verl-omni", _SOURCE)
_FlowGRPOLoss: Any = _algos.FlowGRPOLoss
_FlowDPPOLoss: Any = _algos.FlowDPPOLoss
_GRPOGuardLoss: Any = _algos.GRPOGuardLoss
_KLLoss: Any = _algos.KLLoss

__all__ = [
    "FlowDPPOLoss",
    "FlowGRPOLoss",
    "GRPOGuardLoss",
    "KLLoss",
    "Options",
    "register",
    "sample_previous_step",
    "unregister",
]

_ACTION = "flowdppo_action"
_SAMPLERS = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance"}


@dataclass(frozen=True)
class Options:
    """Where verl-omni's conventions can be had instead of the exact ones.

    Args:
        sde_type: ``"sde"``, ``"cps"`` or ``"dance_sde"``; None reads ``config.model_config.algo.sde_type``, and is
            ``"sde"`` for a config without it, as verl-omni's own default for the key.
        sigma: ``"exact"`` divides the KL by the standard deviation of the sampler at hand; ``"verl-omni"`` by
            ``std_dev_t * sqrt_dt`` under every sampler, which is too small for ``cps`` and ``dance_sde`` (their
            ``std_dev_t`` is the standard deviation already, so the KL comes out ``1/|dt|`` too large).
        guard_scale: ``"row"`` takes each row's own step in GRPO-Guard, ``"batch"`` verl-omni's batch means of it. The
            same number where all rows of a call share the step.
        log_ratio: ``"log_probs"`` is verl-omni's, new minus old log-probs; ``"means"`` takes it from the means in the
            same pass as the KL (``flow_dppo`` and ``grpo_guard``): nothing cancels, and no log-prob's graph is walked.
            It needs the fused scheduler step, which leaves the next state beside the mean.
        kl_with_dt: False is verl-omni's reference KL, ``(mu-mu_ref)**2 / (2*std_dev_t**2)``; True divides by the
            variance.
        backend: as for the losses.
    """

    sde_type: str | None = None
    sigma: str = "exact"
    guard_scale: str = "row"
    log_ratio: str = "log_probs"
    kl_with_dt: bool = False
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("sde_type", (None, *_SAMPLERS)),
            ("sigma", ("exact", "verl-omni")),
            ("guard_scale", ("row", "batch")),
            ("log_ratio", ("log_probs", "means")),
            ("kl_with_dt", (False, True)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, choices))}"
                )
        if self.log_ratio == "means" and (self.sigma, self.guard_scale) != ("exact", "row"):
            raise ValueError(
                f"log_ratio: got 'means' with sigma={self.sigma!r} and guard_scale={self.guard_scale!r}, expected "
                "'exact' and 'row'; a log-ratio made of means is right for the true standard deviation of each row only"
            )

    def std(self, std_dev_t: Tensor, sqrt_dt: Tensor, config: Any) -> Tensor:
        """Standard deviation of the step, ``[B]`` or 0-d."""
        s, root = _flat(std_dev_t), _flat(sqrt_dt)
        if self.sigma == "verl-omni" or self.sampler(config) == "flow_sde":
            return s * root
        return s

    def sampler(self, config: Any) -> str:
        """The sampler's name here.

        Raises:
            ValueError: ``config`` names one that verl-omni has not.
        """
        found = self.sde_type or getattr(getattr(getattr(config, "model_config", None), "algo", None), "sde_type", None)
        found = "sde" if found is None else found
        if found not in _SAMPLERS:
            raise ValueError(
                f"sde_type: got {found!r} from config.model_config.algo.sde_type, expected 'sde', 'cps' or "
                "'dance_sde'; name it with register(sde_type=...)"
            )
        return _SAMPLERS[found]


class FlowGRPOLoss(_FlowGRPOLoss):
    """verl-omni's ``flow_grpo`` and ``dance_grpo`` objective, with one sync for its metrics."""

    options = Options()

    @classmethod
    def compute_loss(
        cls,
        *,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        config: Any,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Clipped loss (0-d) and metrics; arguments ``[B]``, config keys ``clip_ratio`` and ``adv_clip_max``."""
        settings = config.diffusion_loss
        out = log_prob_policy_loss(
            RatioClip(settings.clip_ratio, settings.clip_ratio),
            log_prob,
            old_log_prob,
            advantages,
            1.0,
            advantage_clip=settings.adv_clip_max,
            row_weights=_detached(rollout_is_weights),
            backend=cls.options.backend,
        )
        return out.loss, _floats(out, _CLIP_NAMES)


class FlowDPPOLoss(_FlowDPPOLoss):
    """verl-omni's ``flow_dppo`` objective: one pass over the means, one sync, the right sigma for every sampler."""

    options = Options()

    @classmethod
    def compute_loss(
        cls,
        *,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        config: Any,
        old_prev_sample_mean: Tensor,
        prev_sample_mean: Tensor,
        std_dev_t: Tensor,
        sqrt_dt: Tensor,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Masked loss (0-d) and metrics. Config keys ``kl_mask_threshold`` and ``add_kl_coefficient``.

        Log-probs and advantages are ``[B]``, means ``[B, *latent]``, ``std_dev_t [B, 1, ...]`` or 0-d, ``sqrt_dt [B]``
        or 0-d.
        """
        settings, options = config.diffusion_loss, cls.options
        with_kl = getattr(settings, "add_kl_coefficient", True)
        objective = DPPO(settings.kl_mask_threshold, trust_region="kl" if with_kl else "mean_drift")
        std = options.std(std_dev_t, sqrt_dt, config)
        weights = _detached(rollout_is_weights)
        if options.log_ratio == "means":
            out = fused_policy_loss(
                prev_sample_mean,
                old_prev_sample_mean.detach(),
                _action(prev_sample_mean),
                std,
                advantages.detach(),
                objective=objective,
                log_prob="unnormalized" if options.sampler(config) == "cps" else "gaussian",
                row_weights=weights,
                backend=options.backend,
            )
        else:
            # a mask passes no gradient on
            drift = squared_drift(prev_sample_mean.detach(), old_prev_sample_mean, backend=options.backend)
            out = log_prob_policy_loss(
                objective, log_prob, old_log_prob, advantages, std, drift=drift, row_weights=weights,
                backend=options.backend,
            )  # fmt: skip
        return out.loss, _floats(out, _MASK_NAMES, population_std=True)


class GRPOGuardLoss(_GRPOGuardLoss):
    """verl-omni's ``grpo_guard`` objective.

    Under ``cps`` the log-probs lack ``1/(2*S**2)``; with ``sigma="exact"`` it is put back, so that the bias which the
    guard adds has the scale of the log-ratio it corrects.
    """

    options = Options()

    @classmethod
    def compute_loss(
        cls,
        *,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        config: Any,
        old_prev_sample_mean: Tensor,
        prev_sample_mean: Tensor,
        std_dev_t: Tensor,
        sqrt_dt: Tensor,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Guarded loss (0-d) and metrics; arguments as in :meth:`FlowDPPOLoss.compute_loss`.

        Config keys ``clip_ratio`` and ``adv_clip_max``.
        """
        settings, options = config.diffusion_loss, cls.options
        if options.guard_scale == "batch":
            std_dev_t, sqrt_dt = std_dev_t.mean(), sqrt_dt.mean()
        std = options.std(std_dev_t, sqrt_dt, config)
        objective = GRPOGuard(settings.clip_ratio, settings.clip_ratio)
        dt = -(_flat(sqrt_dt) ** 2)
        shared = {
            "advantage_clip": settings.adv_clip_max,
            "row_weights": _detached(rollout_is_weights),
            "backend": options.backend,
        }
        if options.log_ratio == "means":
            out = fused_policy_loss(
                prev_sample_mean,
                old_prev_sample_mean.detach(),
                _action(prev_sample_mean),
                std,
                advantages.detach(),
                objective=objective,
                dt=dt,
                **shared,  # type: ignore[arg-type]
            )
            return out.loss, _floats(out, _CLIP_NAMES)
        if options.sigma == "exact" and options.sampler(config) == "cps":
            log_prob, old_log_prob = log_prob / (2.0 * std**2), old_log_prob / (2.0 * std**2)
        drift = squared_drift(prev_sample_mean, old_prev_sample_mean, backend=options.backend)
        out = log_prob_policy_loss(
            objective,
            log_prob,
            old_log_prob,
            advantages,
            std,
            dt=dt,
            drift=drift,
            **shared,  # type: ignore[arg-type]
        )
        return out.loss, _floats(out, _CLIP_NAMES)


class KLLoss(_KLLoss):
    """verl-omni's ``kl`` term to the reference policy, in one pass, on latents of any rank."""

    options = Options()

    @classmethod
    def compute_loss(
        cls,
        *,
        prev_sample_mean: Tensor,
        ref_prev_sample_mean: Tensor,
        std_dev_t: Tensor,
        sqrt_dt: Tensor | None = None,
        config: Any = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean KL (0-d) and its metric; means ``[B, *latent]``."""
        std = _flat(std_dev_t)
        if cls.options.kl_with_dt:
            if sqrt_dt is None:
                raise ValueError("sqrt_dt: got None, expected sqrt(-dt); kl_with_dt=True divides by the variance")
            std = cls.options.std(std_dev_t, sqrt_dt, config)
        drift = squared_drift(prev_sample_mean, ref_prev_sample_mean, backend=cls.options.backend)
        loss = (drift / (2.0 * std**2)).mean()
        return loss, {"actor/kl_loss": loss.item()}

    def __call__(self, *, config: Any, model_output: Mapping[str, Any], data: Mapping[str, Any]) -> Any:
        loss, metrics = self.compute_loss(
            prev_sample_mean=model_output["prev_sample_mean"],
            ref_prev_sample_mean=data["ref_prev_sample_mean"],
            std_dev_t=model_output["std_dev_t"],
            sqrt_dt=model_output.get("sqrt_dt"),
            config=config,
        )
        return _algos.DiffusionLossResult(loss=loss, metrics=metrics)


_LOSSES = {
    "flow_dppo": FlowDPPOLoss,
    "flow_grpo": FlowGRPOLoss,
    "dance_grpo": FlowGRPOLoss,
    "grpo_guard": GRPOGuardLoss,
    "kl": KLLoss,
}
_replaced: dict[str, Any] = {}


def register(
    *, losses: tuple[str, ...] = tuple(_LOSSES), fused_step: bool = True, options: Options | None = None, **flags: Any
) -> None:
    """Puts the fused losses, and the fused scheduler step, in the place of verl-omni's.

    Calling it again changes the options; :func:`unregister` puts verl-omni's own back.

    Args:
        losses: names to replace, of ``flow_dppo``, ``flow_grpo``, ``dance_grpo``, ``grpo_guard``, ``kl``.
        fused_step: also replace ``FlowMatchSDEDiscreteScheduler.sample_previous_step`` by :func:`sample_previous_step`.
        options: :class:`Options`.
        flags: or its fields as keywords.

    Raises:
        ValueError: a loss that is not one of the above, or a flag out of its choices.
        ImportError: ``fused_step`` and the installed verl-omni has no such scheduler.
    """
    options = options if options is not None else Options(**flags)
    for name in losses:
        if name not in _LOSSES:
            raise ValueError(f"losses: got {name!r}, expected some of {', '.join(map(repr, _LOSSES))}")
        _replaced.setdefault(name, _algos.DIFFUSION_LOSS_REGISTRY.get(name))
        base = _LOSSES[name]
        _algos.register_diffusion_loss(name)(type(base.__name__, (base,), {"options": options}))
    if fused_step:
        scheduler = _scheduler_class()
        _replaced.setdefault("sample_previous_step", scheduler.sample_previous_step)
        scheduler.sample_previous_step = sample_previous_step


def unregister() -> None:
    """Puts back what :func:`register` replaced."""
    for name, original in _replaced.items():
        if name == "sample_previous_step":
            _scheduler_class().sample_previous_step = original
        elif original is None:
            _algos.DIFFUSION_LOSS_REGISTRY.pop(name, None)
        else:
            _algos.DIFFUSION_LOSS_REGISTRY[name] = original
    _replaced.clear()


def sample_previous_step(
    self: Any,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor | None = None,
    generator: torch.Generator | None = None,
    per_token_timesteps: Tensor | None = None,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
) -> tuple[Tensor | None, ...]:
    """``FlowMatchSDEDiscreteScheduler.sample_previous_step`` in one or two launches; same signature and returns.

    Latents may be of any float dtype (verl-omni asserts float32); results are float32. Timesteps are looked up with one
    sync per call instead of one per row.

    Args:
        sample, model_output: ``[B, *latent]``; differentiable in the second.
        timestep: ``[B]``; None takes the scheduler's own position.
        generator: of the drawn noise.
        per_token_timesteps: must be None.
        noise_level: eta, one for all rows or ``[B]``.
        prev_sample: the next state of a recorded step; None draws it.
        sde_type: ``"sde"``, ``"cps"`` or ``"dance_sde"``.
        return_logprobs, return_sqrt_dt: what is returned besides, see below.
        include_logprob_normalizer: False leaves the normaliser out of the log-prob.

    Returns:
        ``(prev_sample, log_prob [B] or None, prev_sample_mean, std_dev_t)`` and ``sqrt_dt [B]`` if asked; ``std_dev_t``
        is ``[B, 1, ...]``, or 0-d when ``timestep`` is None, and the standard deviation itself for ``cps`` and
        ``dance_sde``.

    Raises:
        ValueError: unknown ``sde_type`` or a timestep outside the schedule. NotImplementedError: per-token timesteps.
    """
    if per_token_timesteps is not None:
        raise NotImplementedError("per_token_timesteps: this step has one timestep per sample, as verl-omni's own has")
    if sde_type not in _SAMPLERS:
        raise ValueError(f"sde_type: got {sde_type!r}, expected 'sde', 'cps' or 'dance_sde'")
    host = HostSchedule.of(self)
    indices = [self.step_index] if timestep is None else host.indices(timestep)
    eta: float | list[float] = noise_level.flatten().tolist() if isinstance(noise_level, Tensor) else noise_level
    if isinstance(eta, list) and len(eta) == 1:
        eta = eta[0]
    if isinstance(eta, list) and len(indices) == 1:
        indices = indices * len(eta)
    step = host.step(_SAMPLERS[sde_type], indices, eta)
    result = sde_step(
        sample,
        model_output,
        step,
        # verl-omni ignores a generator beside a recorded state
        generator=generator if prev_sample is None else None,
        prev_sample=None if prev_sample is None else prev_sample.detach(),
        dtype=torch.float32,
        return_mean=True,
        log_prob=None if not return_logprobs else ("unnormalized" if sde_type == "cps" else "gaussian"),
    )
    if prev_sample is not None:
        # the losses get the mean and not the state; log_ratio="means" needs both
        setattr(result.mean, _ACTION, result.prev_sample)
    std, sqrt_dt = on_host(step.std), torch.sqrt(-on_host(step.dt))
    log_prob = result.log_prob
    if log_prob is not None and not include_logprob_normalizer and sde_type != "cps":
        log_prob = log_prob + (torch.log(std) + LOG_SQRT_2PI).to(log_prob)
    std_dev_t = per_row(std / sqrt_dt if sde_type == "sde" else std, sample)
    # verl-omni's shapes: 0-d in the sequential loop, [B, 1, ...] where timesteps were given
    std_dev_t = std_dev_t.reshape(()) if timestep is None and std_dev_t.numel() == 1 else std_dev_t
    if timestep is not None:
        std_dev_t = std_dev_t.expand(timestep.numel(), *std_dev_t.shape[1:])
    first = (result.prev_sample, log_prob, result.mean, std_dev_t)
    if not return_sqrt_dt:
        return first
    rows = sample.shape[0] if timestep is None else timestep.numel()
    return (*first, per_row(sqrt_dt, sample).flatten().expand(rows).clone())


# metric of verl-omni -> metric here; ppo_kl is added from the rows
_CLIP_NAMES = {
    "actor/pg_clipfrac": "clipfrac",
    "actor/pg_clipfrac_higher": "clipfrac_gt_one",
    "actor/pg_clipfrac_lower": "clipfrac_lt_one",
    "actor/ratio_mean": "ratio_mean",
    "actor/ratio_std": "ratio_std",
}
_MASK_NAMES = {f"actor/{name}": name for name in UNIRL_METRICS if name != "policy_loss"}


def _floats(out: LossOutput, names: Mapping[str, str], *, population_std: bool = False) -> dict[str, float]:
    """verl-omni's metrics as floats, one device-to-host copy. Its flow_dppo has the population's ratio_std."""
    metrics = out.metrics()
    tensors = [-out.rows.log_ratio.mean(), *(metrics[name] for name in names.values())]
    values = dict(zip(["actor/ppo_kl", *names], torch.stack(tensors).tolist()))
    count = out.rows.log_ratio.numel()
    if population_std and count > 0:
        values["actor/ratio_std"] *= ((count - 1) / count) ** 0.5
    return values


def _flat(value: Tensor) -> Tensor:
    """``[B, 1, ...]`` as ``[B]``; 0-d stays."""
    return value if value.ndim == 0 else value.reshape(value.shape[0])


def _action(mean: Tensor) -> Tensor:
    """The next state that the fused step left beside ``mean``.

    Raises:
        ValueError: it is not there.
    """
    if not hasattr(mean, _ACTION):
        raise ValueError(
            "prev_sample_mean: got a mean that the fused scheduler step did not make, expected one of it; "
            "log_ratio='means' needs register(fused_step=True) and an adapter that returns the scheduler's mean"
        )
    return getattr(mean, _ACTION)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _scheduler_class() -> Any:
    module = module_of("verl_omni.pipelines.schedulers.flow_match_sde", "verl-omni", _SOURCE)
    return module.FlowMatchSDEDiscreteScheduler
