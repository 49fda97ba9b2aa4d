"""flowdppo_fast: fused kernels and losses for Flow-DPPO, and a thin trainer for any diffusers flow pipeline.

>>> from flowdppo_fast import fused_dppo_velocity_loss
>>> out = fused_dppo_velocity_loss(velocity, old_velocity, noise, step, advantages)
>>> out.loss.backward()
"""

from .backend import BACKENDS, build_info, resolve
from .losses import (
    LossOptions,
    fused_dppo_loss,
    fused_dppo_velocity_loss,
    fused_grpo_guard_loss,
    fused_grpo_guard_velocity_loss,
    fused_policy_loss,
    fused_ratio_clip_loss,
    fused_ratio_clip_velocity_loss,
    fused_velocity_policy_loss,
    row_statistics,
)
from .noise import PhiloxNoise
from .objectives import DPPO, GRPOGuard, RatioClip, Unclipped
from .results import LossOutput, Metrics, Rows
from .samplers import SAMPLERS, Schedule, SDEStep, sde_schedule
from .sampling import sde_step, sde_step_with_logprob

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "DPPO",
    "SAMPLERS",
    "GRPOGuard",
    "LossOptions",
    "LossOutput",
    "Metrics",
    "PhiloxNoise",
    "RatioClip",
    "Rows",
    "SDEStep",
    "Schedule",
    "Unclipped",
    "build_info",
    "fused_dppo_loss",
    "fused_dppo_velocity_loss",
    "fused_grpo_guard_loss",
    "fused_grpo_guard_velocity_loss",
    "fused_policy_loss",
    "fused_ratio_clip_loss",
    "fused_ratio_clip_velocity_loss",
    "fused_velocity_policy_loss",
    "resolve",
    "row_statistics",
    "sde_schedule",
    "sde_step",
    "sde_step_with_logprob",
]
