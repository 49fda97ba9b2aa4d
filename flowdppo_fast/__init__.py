"""flowdppo_fast: fused kernels and losses for Flow-DPPO, and a thin trainer for any diffusers flow pipeline.

>>> from flowdppo_fast import fused_dppo_velocity_loss
>>> out = fused_dppo_velocity_loss(velocity, old_velocity, noise, step, advantages)
>>> out.loss.backward()
"""

from .backend import BACKENDS, build_info, resolve_backend
from .loss_module import FlowDPPOLoss
from .losses import (
    fused_dppo_loss,
    fused_dppo_velocity_loss,
    fused_policy_loss,
    fused_policy_velocity_loss,
    row_statistics,
)
from .matching import matching_loss, matching_statistics
from .noise import PhiloxNoise
from .objectives import DPPO, DRPO, GRPOGuard, KLPenalty, LogHinge, RatioClip, Unclipped
from .results import LossMetrics, LossOutput, RowResults
from .samplers import SAMPLERS, ScheduleLevels, SDEStep, sde_schedule
from .sampling import sde_step, sde_step_with_logprob

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "DPPO",
    "DRPO",
    "SAMPLERS",
    "FlowDPPOLoss",
    "GRPOGuard",
    "KLPenalty",
    "LogHinge",
    "LossMetrics",
    "LossOutput",
    "PhiloxNoise",
    "RatioClip",
    "RowResults",
    "SDEStep",
    "ScheduleLevels",
    "Unclipped",
    "build_info",
    "fused_dppo_loss",
    "fused_dppo_velocity_loss",
    "fused_policy_loss",
    "fused_policy_velocity_loss",
    "matching_loss",
    "matching_statistics",
    "resolve_backend",
    "row_statistics",
    "sde_schedule",
    "sde_step",
    "sde_step_with_logprob",
]
