"""Triton backend: the operators of :mod:`flowdppo_fast.reference` on a GPU, with the same signatures.

Forward is a streaming pass and one small epilogue, backward one streaming pass. Nothing here synchronises, tunes itself
or adds up in an order that depends on timing; what is launched depends on shapes, dtypes and alignment alone.
"""

from .gradient import launch_gradient, row_grad
from .launch import geometry_of
from .objective import (
    launch_policy_loss,
    launch_policy_loss_and_grad,
    log_prob_loss,
    policy_loss,
    policy_loss_and_grad,
)
from .sampler_step import sde_step
from .statistics import row_stats

__all__ = [
    "geometry_of", "launch_gradient", "launch_policy_loss", "launch_policy_loss_and_grad", "log_prob_loss",
    "policy_loss", "policy_loss_and_grad", "row_grad", "row_stats", "sde_step",
]  # fmt: skip
