"""The data of one workload: a rollout with known log-ratios and divergences, in every form a contender starts from."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flowdppo_fast import PhiloxNoise, SDEStep
from flowdppo_fast.noise import philox_normal

from . import peers
from .workloads import Workload

ETA = 0.7
# one step of a 10-step schedule with shift 3; stacked rows take three
LEVELS = ((0.7, 0.6), (0.9, 0.84), (0.6, 0.47))
THRESHOLD = 1e-5
CLIP_RANGE = 1e-4
SEED = 20260611

# (KL, log-ratio, advantage) of the rows, repeated: near and far rows, moving away and back, both signs. One row in
# eight is dropped by the mask, and the same rows are clipped; no number is close enough to its bound for rounding to
# decide
_NEAR, _FAR = 4e-6, 3e-5
_PATTERN = (
    (_NEAR, 4e-5, 1.2),
    (_NEAR, -4e-5, -0.7),
    (_FAR, -2e-4, 0.9),
    (_NEAR, 4e-5, -1.1),
    (_FAR, 2e-4, -0.5),
    (_FAR, 2e-4, 0.8),
    (_NEAR, -4e-5, 0.4),
    (_NEAR, 4e-5, -1.0),
    (_NEAR, 4e-5, -0.3),
    (_FAR, 2e-4, -1.3),
    (_FAR, -2e-4, 0.6),
    (_NEAR, -4e-5, 1.4),
    (_NEAR, 4e-5, 0.7),
    (_FAR, -2e-4, -0.9),
    (_NEAR, -4e-5, -1.2),
    (_NEAR, 4e-5, 1.0),
)


@dataclass(frozen=True)
class Inputs:
    """One input set. Latents are ``[*rows, *latent]``; ``velocity`` and ``mean`` are leaves that require grad.

    Velocities and stored noise are in the workload's dtype (a model's output, and draws made in that dtype). States
    and step means are float32 whatever that dtype is, because trainers hold them so: a bf16 mean would not carry the
    KL.
    """

    velocity: Tensor
    old_velocity: Tensor
    noise: Tensor
    sample: Tensor
    prev_sample: Tensor
    mean: Tensor
    old_mean: Tensor
    old_log_prob: Tensor
    advantages: Tensor

    def clone(self) -> Inputs:
        """The same numbers in other memory."""
        return Inputs(
            **{
                f.name: (t := getattr(self, f.name)).detach().clone().requires_grad_(t.requires_grad)
                for f in fields(self)
            }
        )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (getattr(self, f.name) for f in fields(self)))

    def double(self) -> Inputs:
        """All latents in float64, detached: what the oracle sees."""
        return replace(self, **{f.name: getattr(self, f.name).detach().double() for f in fields(self)})


@dataclass(frozen=True)
class Rollout:
    """Input set 0 of a workload and what describes its rows.

    Args:
        seeded_noise: ``[R, N]`` float32 draws of ``philox``, for the oracle.
    """

    workload: Workload
    dtype: torch.dtype
    inputs: Inputs
    step: SDEStep
    levels: peers.Levels
    philox: PhiloxNoise
    seeded_noise: Tensor


def build_step(workload: Workload) -> SDEStep:
    """One scalar step, or one per column of stacked rows."""
    steps = [SDEStep.from_sigmas("flow_sde", sigma, after, eta=ETA) for sigma, after in LEVELS]
    return steps[0] if len(workload.rows) == 1 else SDEStep.stack(steps[: workload.rows[1]])


def build_levels(workload: Workload, device: torch.device, dtype: torch.dtype = torch.float32) -> peers.Levels:
    """The same step as a trainer holds it: per-row tensors with singleton latent dims."""
    pairs = torch.tensor(LEVELS[: workload.rows[1]] if len(workload.rows) == 2 else LEVELS[:1], dtype=dtype)
    shape = (*workload.rows, *(1,) * len(workload.latent))
    sigma, sigma_next = (
        pairs[:, column].expand(workload.rows).reshape(shape).contiguous().to(device) for column in (0, 1)
    )
    return peers.Levels(sigma, sigma_next, ETA)


def draw_noise(workload: Workload, device: torch.device) -> Tensor:
    """``[R, N]`` float32 Philox draws, one row at a time to bound the float64 temporaries."""
    rows = []
    for stream in range(workload.row_count):
        streams = torch.tensor([stream], dtype=torch.int64, device=device)
        rows.append(philox_normal(SEED, streams, workload.elements_per_row).float())
    return torch.cat(rows)


def build_rollout(workload: Workload, dtype: torch.dtype, device: torch.device, seeded_noise: Tensor) -> Rollout:
    """Data whose rows have the KL and log-ratio of the pattern above, up to the dtype's rounding.

    The drift of the velocity is ``c1 * e + c2 * g`` with ``g`` orthogonal to the noise ``e``: ``c1`` sets ``P``,
    ``c2`` sets ``Q``.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(workload.key.encode()))
    shape = (*workload.rows, *workload.latent)
    flat = (workload.row_count, workload.elements_per_row)

    def normal() -> Tensor:
        return torch.randn(flat, generator=generator, device=device)

    pattern = [_PATTERN[row % len(_PATTERN)] for row in range(workload.row_count)]
    kl, log_ratio, advantages = torch.tensor(pattern, dtype=torch.float64, device=device).unbind(1)
    step = build_step(workload)
    scale = torch.as_tensor(step.kl_scale, dtype=torch.float64, device=device)
    scale = scale.expand(workload.rows).reshape(-1)

    noise = seeded_noise.to(dtype)
    along = noise.float()
    energy = along.square().mean(1, dtype=torch.float64)
    across = normal()
    across -= along * ((across * along).mean(1, dtype=torch.float64) / energy).float()[:, None]
    across /= across.square().mean(1, keepdim=True, dtype=torch.float64).sqrt().float()
    stat_p = log_ratio + kl
    c1 = stat_p / (scale * energy)
    c2 = (2.0 * kl - c1.square() * scale.square() * energy).sqrt() / scale
    drift = across.mul_(c2.float()[:, None]).add_(c1.float()[:, None] * along)
    del along

    old_velocity = normal().to(dtype).reshape(shape)
    velocity = (old_velocity.float() + drift.reshape(shape)).to(dtype)
    del across, drift
    noise = noise.reshape(shape)
    sample = normal().reshape(shape)
    levels = build_levels(workload, device)
    # the rollout as the trainers run it: means, next states and log-probs in float32
    old_mean, std = peers.step_mean(old_velocity, sample, levels)
    prev_sample = old_mean + std * noise.float()
    mean, _ = peers.step_mean(velocity, sample, levels)
    inputs = Inputs(
        velocity=velocity.requires_grad_(),
        old_velocity=old_velocity,
        noise=noise,
        sample=sample,
        prev_sample=prev_sample,
        mean=mean.requires_grad_(),
        old_mean=old_mean,
        old_log_prob=peers.log_prob(prev_sample, old_mean, std, len(workload.rows)),
        advantages=advantages.float().reshape(workload.rows),
    )
    return Rollout(workload, dtype, inputs, step, levels, PhiloxNoise(SEED), seeded_noise)
