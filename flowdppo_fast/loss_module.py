"""The loss as a module, for those who configure losses by classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .backend import BackendName
from .loss_call import settings_of
from .losses import fused_policy_velocity_loss
from .noise import PhiloxNoise
from .objectives import DPPO, LogProbKind, Reduction, ReferenceKL, TrustRegionName
from .results import LossOutput
from .samplers import SDEStep


class FlowDPPOLoss(torch.nn.Module):
    """:func:`fused_dppo_velocity_loss` with its settings, for those who configure losses; it has no parameters.

    Args:
        threshold: bound on the mean-reduced KL, nats per latent element, > 0. Default 1e-5 (UniRL, verl-omni,
            FLUX.1-dev); 1e-6: Flow-Factory SD3.5, FLUX.2.
        symmetric: drop every far row, not only those that move away (an ablation). Default False.
        trust_region: the divergence that is bounded: ``"kl"`` (default; exact for Gaussians of equal variance),
            ``"mean_drift"`` (``mean((mu-mu_old)**2)/2``) or
            ``"velocity_drift"`` (``mean((v-v_old)**2)``).
        kl_weight: weight of the KL to the reference policy, >= 0; needs a reference. Default 0.
        reference_kl: ``"gaussian"`` (default), ``"without_dt"`` for flow_grpo's ``(mu-mu_ref)**2 /
            (2*std_dev_t**2)`` of the SDE samplers, where ``S = std_dev_t * sqrt(-dt)``, or without a scale
            ``"mean_mse"`` for ``mean((mu-mu_ref)**2)`` and ``"velocity_mse"`` for ``mean((v-v_ref)**2)`` (velocities
            only). The metric stays a KL.
        advantage_clip: clamp advantages to ``[-c, c]`` first (Flow-Factory, DanceGRPO: 5), > 0. Default None: as they
            are.
        reduction: over rows: ``"mean"`` (default; dropped rows stay in the denominator), ``"kept"`` (the sum over the
            number of kept rows; metrics stay means of all), ``"sum"`` or ``"none"``.
        latent_reduction: over latent elements: ``"mean"`` (default), or ``"sum"`` to multiply log-ratio and KL by N.
        log_prob: ``"gaussian"`` (default), or ``"unnormalized"`` for trainers whose CPS log-prob drops ``1/(2*S**2)``
            and the normaliser.
        single_pass: when the gradient is made. None (default): together with the loss where that is quicker, which is
            on a CPU; ``loss.backward()`` then has nothing left to read. False: in ``backward``. True: together with the
            loss, also where nothing requires a gradient; it is :attr:`LossOutput.grad`. ``"none"`` has no such form.
        backend: ``"auto"`` (default) or a name from :data:`flowdppo_fast.BACKENDS`; a named one that cannot run is an
            error.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    def __init__(
        self,
        threshold: float = 1e-5,
        *,
        symmetric: bool = False,
        trust_region: TrustRegionName = "kl",
        kl_weight: float = 0.0,
        reference_kl: ReferenceKL = "gaussian",
        advantage_clip: float | None = None,
        reduction: Reduction = "mean",
        latent_reduction: Literal["mean", "sum"] = "mean",
        log_prob: LogProbKind = "gaussian",
        single_pass: bool | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        self.objective = DPPO(threshold, symmetric, trust_region)
        # what is wrong is said here, not at the first call
        settings_of(
            self.objective, 1, True, True, True, single_pass, reduction,
            latent_reduction, log_prob, advantage_clip, kl_weight, reference_kl,
        )  # fmt: skip
        self.kl_weight = kl_weight
        self.reference_kl: ReferenceKL = reference_kl
        self.advantage_clip = advantage_clip
        self.reduction: Reduction = reduction
        self.latent_reduction: Literal["mean", "sum"] = latent_reduction
        self.log_prob: LogProbKind = log_prob
        self.single_pass = single_pass
        self.backend: BackendName = backend

    def forward(
        self,
        velocity: Tensor,
        old_velocity: Tensor,
        noise: Tensor | PhiloxNoise,
        step: SDEStep,
        advantages: Tensor,
        *,
        reference_velocity: Tensor | None = None,
        old_log_prob: Tensor | None = None,
        row_weights: Tensor | None = None,
        threshold_weights: Tensor | None = None,
    ) -> LossOutput:
        """Arguments, result and errors are those of :func:`fused_dppo_velocity_loss`."""
        return fused_policy_velocity_loss(
            velocity,
            old_velocity,
            noise,
            step,
            advantages,
            objective=self.objective,
            reference_velocity=reference_velocity,
            old_log_prob=old_log_prob,
            row_weights=row_weights,
            threshold_weights=threshold_weights,
            kl_weight=self.kl_weight,
            reference_kl=self.reference_kl,
            advantage_clip=self.advantage_clip,
            reduction=self.reduction,
            latent_reduction=self.latent_reduction,
            log_prob=self.log_prob,
            single_pass=self.single_pass,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.objective}, kl_weight={self.kl_weight}, reduction={self.reduction!r}, backend={self.backend!r}"
