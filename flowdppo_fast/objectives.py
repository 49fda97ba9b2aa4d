"""Objectives: small epilogues over the row statistics (P, Q), with their hand-written gradients.

A *row* is one sample at one denoising step. With ``u = k*(new-old)`` and the drawn noise ``e``, the kernels deliver per
row ``P = mean(e*u)``, ``Q = mean(u*u)`` and, where asked, ``E = mean(e*e)`` and ``R = mean((k*(new-ref))**2)``.
Everything below is O(rows): log-ratio, divergence, which rows are kept, the loss, and ``dl/dP, dl/dQ, dl/dR`` for the
backward kernel. This file is the oracle; ``csrc/objective.h`` and ``kernels/triton/epilogue.py`` are its twins. What
an objective does with a row is in ``rules.py``, for torch and Triton alike.
"""

from __future__ import annotations

import enum
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .rules import RULES, RowRule, RowValues, register

LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


TrustRegionName = Literal["kl", "mean_drift", "velocity_drift"]
LogProbKind = Literal["gaussian", "unnormalized"]
ReferenceKL = Literal["gaussian", "without_dt"]


class Rule(enum.IntEnum):
    """How a row's surrogate is bounded; the integer is what kernels switch on."""

    DPPO = 0
    DPPO_SYMMETRIC = 1
    RATIO_CLIP = 2
    GRPO_GUARD = 3
    UNCLIPPED = 4


class TrustRegion(enum.IntEnum):
    """Which divergence is compared with the threshold."""

    KL = 0
    MEAN_DRIFT = 1
    VELOCITY_DRIFT = 2


class RowField(enum.IntEnum):
    """Lines of the ``[8, R]`` row results: what users see, then the gradient coefficients ``dl/dP, dl/dQ, dl/dR``."""

    LOG_RATIO = 0
    RATIO = 1
    KL = 2
    KEPT = 3
    LOSS = 4
    GRAD_P = 5
    GRAD_Q = 6
    GRAD_R = 7


# order of the summary vector; entry 0 is the scalar loss
SUMMARY = (
    "loss",
    "policy_loss",
    "ratio_mean",
    "ratio_std",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "kl_new_old_mean",
    "kl_new_old_max",
    "kl_mask_fraction",
    "pos_rm_fraction",
    "neg_rm_fraction",
    "masked_fraction",
    "unmasked_fraction",
    "drift_mean",
    "nonfinite_rows",
    "clipfrac",
    "clipfrac_gt_one",
    "clipfrac_lt_one",
    "kl_ref_mean",
)
_COMMON = (
    "policy_loss",
    "ratio_mean",
    "ratio_std",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "kl_new_old_mean",
    "kl_new_old_max",
    "masked_fraction",
    "unmasked_fraction",
    "drift_mean",
    "nonfinite_rows",
)
_MASK_METRICS = ("kl_mask_fraction", "pos_rm_fraction", "neg_rm_fraction")
_CLIP_METRICS = ("clipfrac", "clipfrac_gt_one", "clipfrac_lt_one")


@dataclass(frozen=True)
class DPPO:
    """Flow-DPPO (arXiv 2606.11025, Eq. 14 and 18): drop a row that is far from the old policy *and* moving away.

    Args:
        threshold: bound on the divergence, > 0; a row with ``D >= threshold`` is far. Mean-reduced over latents: the
            paper's sum threshold is ``threshold * N``.
        symmetric: ablation, drop every far row.
        trust_region: ``"kl"`` (exact Gaussian KL), ``"mean_drift"`` (``mean((mu-mu_old)**2)/2``) or
            ``"velocity_drift"`` (``mean((v-v_old)**2)``, velocities only).
    """

    threshold: float = 1e-5
    symmetric: bool = False
    trust_region: TrustRegionName = "kl"

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        _check_choice("trust_region", self.trust_region, ("kl", "mean_drift", "velocity_drift"))

    @property
    def rule(self) -> Rule:
        return Rule.DPPO_SYMMETRIC if self.symmetric else Rule.DPPO

    metrics = _COMMON + _MASK_METRICS


@dataclass(frozen=True)
class RatioClip:
    """PPO ratio clipping as in Flow-GRPO: ``max(-A*r, -A*clamp(r, 1-low, 1+high))``.

    Args:
        low, high: clip ranges, > 0 (``low`` below 1); ``high`` is as ``low`` unless given. Ratios are of mean-reduced
            log-probs, so 1e-4..1e-5 is usual.
    """

    low: float = 1e-4
    high: float = None  # type: ignore[assignment]  # a float once it is made

    def __post_init__(self) -> None:
        _check_clip(self)

    rule = Rule.RATIO_CLIP
    metrics = _COMMON + _CLIP_METRICS


@dataclass(frozen=True)
class GRPOGuard:
    """GRPO-Guard (arXiv 2510.22319): clipping on the normalised ratio ``exp((L + D)*S)``, loss divided by ``-dt``.

    Args:
        low, high: clip ranges, > 0 (``low`` below 1); ``high`` is as ``low`` unless given.
        bias: ``"row"`` adds each row's own divergence (verl-omni), ``"batch"`` the batch mean (flow_grpo's behaviour).
    """

    low: float = 2e-6
    high: float = None  # type: ignore[assignment]  # a float once it is made
    bias: Literal["row", "batch"] = "row"

    def __post_init__(self) -> None:
        _check_clip(self)
        _check_choice("bias", self.bias, ("row", "batch"))

    rule = Rule.GRPO_GUARD
    metrics = _COMMON + _CLIP_METRICS


@dataclass(frozen=True)
class Unclipped:
    """The plain importance-weighted policy gradient ``-A*r``."""

    rule = Rule.UNCLIPPED
    metrics = _COMMON


@dataclass(frozen=True)
class OwnRule:
    """An objective of one's own: a rule, which torch and Triton run fused. A function alone stands for ``OwnRule(it)``.

    Args:
        decide: the rule, a function of a :class:`~flowdppo_fast.rules.RowValues`.
        penalty: what is added to every row's loss, and its derivative by the divergence; None for nothing.
        threshold, low, high: numbers that the row's comparisons use; the default of each is beyond everything.
        trust_region: as of :class:`DPPO`.
    """

    decide: Callable[[RowValues], tuple]
    penalty: Callable[[RowValues], tuple] | None = None
    threshold: float = math.inf
    low: float = math.inf
    high: float = math.inf
    trust_region: str = "kl"

    def __post_init__(self) -> None:
        register(self.decide, self.penalty)
        _check_choice("trust_region", self.trust_region, ("kl", "mean_drift", "velocity_drift"))

    @property
    def rule(self) -> int:
        return register(self.decide, self.penalty)

    metrics = _COMMON + _MASK_METRICS + _CLIP_METRICS


Objective = DPPO | RatioClip | GRPOGuard | Unclipped | OwnRule


def as_objective(value: object) -> Objective:
    """``value`` itself, or the objective that a plain function is the rule of.

    Raises:
        TypeError: neither.
    """
    if isinstance(value, types.FunctionType):
        return OwnRule(value)
    if not isinstance(value, Objective):
        got = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(
            f"objective: got {'the type ' if isinstance(value, type) else ''}{got}, expected an instance of DPPO, "
            "RatioClip, GRPOGuard or Unclipped, for example DPPO(threshold=1e-5), or a function of a row's values"
        )
    return value


class EpilogueOptions(NamedTuple):
    """Everything an epilogue needs besides tensors; ``ints`` and ``floats`` are what operator schemas carry."""

    rule: int
    trust_region: int
    sum_reduce: int
    unnormalized_log_prob: int
    batch_bias: int
    reference_without_dt: int
    threshold: float
    clip_low: float
    clip_high: float
    advantage_clip: float
    kl_weight: float

    @classmethod
    def make(
        cls,
        objective: Objective,
        *,
        latent_reduction: str = "mean",
        log_prob: str = "gaussian",
        advantage_clip: float | None = None,
        kl_weight: float = 0.0,
        reference_kl: str = "gaussian",
    ) -> EpilogueOptions:
        """Checks the options that all objectives share and packs them.

        Raises:
            ValueError: an unknown choice, a non-positive ``advantage_clip`` or a negative ``kl_weight``.
        """
        _check_choice("latent_reduction", latent_reduction, ("mean", "sum"))
        _check_choice("log_prob", log_prob, ("gaussian", "unnormalized"))
        _check_choice("reference_kl", reference_kl, ("gaussian", "without_dt"))
        if advantage_clip is not None:
            check_positive("advantage_clip", advantage_clip)
        if not is_number(kl_weight) or not 0.0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight: got {kl_weight!r}, expected a number >= 0")
        region = getattr(objective, "trust_region", "kl")
        return cls(
            rule=int(objective.rule),
            trust_region=int(TrustRegion[region.upper()]),
            sum_reduce=int(latent_reduction == "sum"),
            unnormalized_log_prob=int(log_prob == "unnormalized"),
            batch_bias=int(getattr(objective, "bias", "row") == "batch"),
            reference_without_dt=int(reference_kl == "without_dt"),
            # infinities are identities here: nothing is beyond them
            threshold=getattr(objective, "threshold", math.inf),
            clip_low=getattr(objective, "low", math.inf),
            clip_high=getattr(objective, "high", math.inf),
            advantage_clip=math.inf if advantage_clip is None else float(advantage_clip),
            kl_weight=float(kl_weight),
        )

    @property
    def ints(self) -> list[int]:
        return list(self[:6])

    @property
    def floats(self) -> list[float]:
        # numpy's numbers are no arguments of operators
        return [float(number) for number in self[6:]]

    @classmethod
    def unpack(cls, ints: list[int], floats: list[float]) -> EpilogueOptions:
        return cls(*ints, *floats)


def names() -> str:
    """What C++ has to have under the same names and in the same order; ``csrc/objective.h`` spells its own."""
    lists = {
        "rules": [rule.name.lower() for rule in Rule],
        "trust regions": [region.name.lower() for region in TrustRegion],
        "row fields": [field.name.lower() for field in RowField],
        "summary": SUMMARY,
        "options": EpilogueOptions._fields,
    }
    return "".join(f"{title}: " + "".join(f"{name} " for name in listed) for title, listed in lists.items())


def epilogue(
    stats: Tensor,
    std: Tensor,
    scale: Tensor,
    neg_dt: Tensor,
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    numel: int,
    options: EpilogueOptions,
    log_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row results and summary of one objective, in plain torch.

    Args:
        stats: ``[4, R]`` rows of ``P, Q, E, R``.
        std, scale, neg_dt: ``[R]`` ``S``, ``k`` and ``-dt``.
        advantages, row_weights, old_log_prob: ``[R]``.
        numel: N, latent elements per row.
        log_ratio: ``[R]`` where the trainer has computed it: ``P``, ``E`` and ``old_log_prob`` are not looked at.

    Returns:
        ``[8, R]`` lines of :class:`RowField` and the :data:`SUMMARY` vector, both in ``stats``' dtype. The gradient
        lines are of each row's own loss; the mean's 1/R is applied by the backward. With a given ``log_ratio`` line
        ``GRAD_P`` is ``dl/dL`` and ``GRAD_Q`` is at fixed ``L``.
    """
    o = options
    p, q, e, r = stats.unbind(0)
    count = float(numel) if o.sum_reduce else 1.0
    weight = torch.ones_like(p) if row_weights is None else row_weights
    adv = advantages.clamp(-o.advantage_clip, o.advantage_clip)

    # log-ratio L and its slopes against P and Q
    slope = count * 2.0 * std**2 if o.unnormalized_log_prob else torch.full_like(p, count)
    slope_p, slope_q = slope, -0.5 * slope
    if log_ratio is not None:
        slope_p, slope_q = torch.ones_like(p), torch.zeros_like(p)
    elif old_log_prob is None:
        log_ratio = slope * (p - 0.5 * q)
    else:
        normalizer = 0.0 if o.unnormalized_log_prob else count * (torch.log(std) + LOG_SQRT_2PI)
        log_ratio = -0.5 * slope * (e - 2.0 * p + q) - normalizer - count * old_log_prob
    half_kl = 0.5 * count
    if o.trust_region == TrustRegion.MEAN_DRIFT:
        kl, slope_kl = half_kl * std**2 * q, half_kl * std**2
    elif o.trust_region == TrustRegion.VELOCITY_DRIFT:
        kl, slope_kl = count * q / scale**2, count / scale**2
    else:
        kl, slope_kl = half_kl * q, torch.full_like(q, half_kl)

    # exponent X of the ratio, its slopes, and the divisor of the loss
    rule: RowRule = RULES[o.rule]
    exponent, gain = log_ratio, torch.ones_like(p)
    if rule.normalized:
        divergence = half_kl * q
        bias = divergence.mean().expand_as(q) if o.batch_bias else divergence
        exponent, slope_p = (log_ratio + bias) * std, slope_p * std
        slope_q = (slope_q + (0.0 if o.batch_bias else half_kl)) * std
        gain = 1.0 / neg_dt

    ratio = torch.exp(exponent)
    # decisions use r - 1 and the sign of the exponent: exp() rounds what differs from 1 by less than an ulp to 1
    excess = torch.expm1(exponent)
    far = kl >= o.threshold
    above, below = excess > o.clip_high, -excess > o.clip_low
    limit = torch.where(adv > 0, p.new_full(p.shape, 1.0 + o.clip_high), 1.0 - o.clip_low)
    row = RowValues(p, q, std, adv, exponent, ratio, kl, far, above, below, limit, o.threshold)
    dropped, bound, surrogate, slope = rule.decide(row)
    policy = weight * gain * torch.where(dropped, bound, surrogate)
    # where() keeps an overflowed ratio out of dropped rows
    slope_x = weight * gain * torch.where(dropped, 0.0, slope)
    grad_p = torch.where(dropped, 0.0, slope_x * slope_p)
    grad_q = torch.where(dropped, 0.0, slope_x * slope_q)
    if rule.penalty is not None:
        penalty, slope_penalty = rule.penalty(row)
        policy = policy + weight * gain * penalty
        grad_q = grad_q + weight * gain * slope_penalty * slope_kl
    if rule.normalized and o.batch_bias:
        # the shared bias moves with every row's Q
        grad_q = grad_q + half_kl * (slope_x * std).sum() / max(p.numel(), 1)

    reference = count * 0.5 * r * (neg_dt if o.reference_without_dt else 1.0)
    loss, grad_r = policy, torch.zeros_like(p)
    if o.kl_weight > 0.0:
        loss = policy + weight * o.kl_weight * reference
        grad_r = weight * o.kl_weight * count * 0.5 * (neg_dt if o.reference_without_dt else torch.ones_like(p))

    rows = torch.stack((log_ratio, ratio, kl, (~dropped).to(p.dtype), loss, grad_p, grad_q, grad_r))
    nonfinite = ~(torch.isfinite(log_ratio) & torch.isfinite(ratio) & torch.isfinite(kl) & torch.isfinite(loss))
    if p.numel() == 0:
        # no rows: no loss, nothing to count, and no statistics to report
        summary = p.new_full((len(SUMMARY),), math.nan)
        for name in ("loss", "policy_loss", "nonfinite_rows"):
            summary[SUMMARY.index(name)] = 0.0
        return rows, summary

    def fraction(flags: Tensor) -> Tensor:
        return flags.to(p.dtype).mean()

    values = (
        loss.mean(),
        policy.mean(),
        1.0 + excess.mean(),
        excess.std() if p.numel() > 1 else torch.zeros_like(p[0]),
        ratio.min(),
        ratio.max(),
        0.5 * log_ratio.square().mean(),
        kl.mean(),
        kl.max(),
        fraction(far),
        fraction(dropped & (adv > 0)),
        fraction(dropped & (adv < 0)),
        fraction(dropped),
        fraction(~dropped),
        (std**2 * q).mean(),
        nonfinite.to(p.dtype).sum(),
        fraction(above | below),
        fraction(above),
        fraction(below),
        reference.mean(),
    )
    return rows, torch.stack(values)


def is_number(value: object) -> bool:
    """A number of Python or numpy: tensors would have to be read back from their device to be checked or passed on."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(name: str, value: float, why: str = "") -> None:
    """Raises ValueError unless ``value`` is a finite number > 0."""
    if not is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}, expected a number > 0{why}")


def _check_clip(objective: RatioClip | GRPOGuard) -> None:
    low = objective.low
    if not is_number(low) or not 0.0 < low < 1.0:
        raise ValueError(f"low: got {low!r}, expected a number in (0, 1)")
    if objective.high is None:
        object.__setattr__(objective, "high", low)
    check_positive("high", objective.high)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
