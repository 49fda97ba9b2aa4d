"""Objectives as users name them, and as operators carry them: a rule's number, a few choices and a few numbers.

What an objective does with a row is in ``rules.py``, what is made of that in ``epilogue.py``.
"""

from __future__ import annotations

import enum
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, NamedTuple

from .rules import RowValues, register

TrustRegionName = Literal["kl", "mean_drift", "velocity_drift"]
LogProbKind = Literal["gaussian", "unnormalized"]
ReferenceKL = Literal["gaussian", "without_dt", "velocity_mse", "mean_mse"]
Reduction = Literal["mean", "kept", "sum", "none"]


class Rule(enum.IntEnum):
    """How a row's surrogate is bounded; the integer is what kernels switch on."""

    DPPO = 0
    DPPO_SYMMETRIC = 1
    RATIO_CLIP = 2
    GRPO_GUARD = 3
    UNCLIPPED = 4
    DPPO_CLIPPED = 5
    DPPO_PULLED = 6
    KL_PENALTY = 7
    DRPO = 8
    DRPO_RATIO = 9
    LOG_HINGE = 10


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
_REGIONS = ("kl", "mean_drift", "velocity_drift")
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
        threshold_nats: in place of ``threshold`` and summed over latents, so that it means the same at every size; > 0.
        low, high: clip ranges as of :class:`RatioClip`; rows that clipping would drop are dropped too. None: no clip.
        pull: of a pull back, > 0: far rows, dropped or not, add ``pull * |A| * (D/threshold - 1)``. None: none.
    """

    threshold: float = 1e-5
    symmetric: bool = False
    trust_region: TrustRegionName = "kl"
    threshold_nats: float | None = field(default=None, kw_only=True)
    low: float | None = field(default=None, kw_only=True)
    high: float | None = field(default=None, kw_only=True)
    pull: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_threshold(self)
        if self.low is not None or self.high is not None:
            _check_clip(self)
            object.__setattr__(self, "metrics", self.metrics + _CLIP_METRICS)
        if self.pull is not None:
            check_positive("pull", self.pull)
        asked = {"symmetric": self.symmetric, "low": self.low is not None, "pull": self.pull is not None}
        together = [name for name, is_asked in asked.items() if is_asked]
        if len(together) > 1:
            raise ValueError(f"{', '.join(together)}: got them together, expected one of them; leave out the others")

    @property
    def rule(self) -> Rule:
        if self.low is not None:
            return Rule.DPPO_CLIPPED
        if self.pull is not None:
            return Rule.DPPO_PULLED
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
class KLPenalty:
    """PPO's other form (arXiv 1707.06347, Sec. 4), with the divergence as a penalty: ``-A*r + c*D``.

    Args:
        weight: ``c``, > 0. The trainer's ``objective.kl_target`` adapts it.
        trust_region: as of :class:`DPPO`.
    """

    weight: float
    trust_region: TrustRegionName = "kl"

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)
        _check_choice("trust_region", self.trust_region, _REGIONS)

    rule = Rule.KL_PENALTY
    metrics = _COMMON


@dataclass(frozen=True)
class DRPO:
    """DRPO (arXiv 2606.09821) for Gaussians: a smooth bound in place of a mask, ``-A*r + |A|*D/threshold``.

    Near the old policy a row comes to rest ``threshold/(1 + threshold)`` of its natural gradient away, whatever the
    scale of its advantage. So the threshold is a length of step and no number of nats.

    Args:
        threshold: > 0; mean-reduced over latents.
        on: ``"kl"`` (the above), or ``"ratio"`` for the square that DRPO has: ``-A*r + |A|*(r - 1)**2/(2*threshold)``.
        trust_region: as of :class:`DPPO`.
        threshold_nats: as of :class:`DPPO`.
    """

    threshold: float = 0.2
    on: Literal["kl", "ratio"] = "kl"
    trust_region: TrustRegionName = "kl"
    threshold_nats: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_threshold(self)
        _check_choice("on", self.on, ("kl", "ratio"))

    @property
    def rule(self) -> Rule:
        return Rule.DRPO if self.on == "kl" else Rule.DRPO_RATIO

    metrics = (*_COMMON, "kl_mask_fraction")


@dataclass(frozen=True)
class LogHinge:
    """PCPO's hinge (arXiv 2509.25774) on the log-ratio: ``max(0, |A|*margin - A*L)``.

    Args:
        margin: > 0; a row counts until ``L`` is that far in its advantage's direction. Mean-reduced like ``L``.
    """

    margin: float = 1e-4

    def __post_init__(self) -> None:
        check_positive("margin", self.margin)

    rule = Rule.LOG_HINGE
    metrics = _COMMON


@dataclass(frozen=True)
class OwnRule:
    """An objective of one's own: a rule, which torch and Triton run fused. A function alone stands for ``OwnRule(it)``.

    Args:
        decide: the rule, a function of a :class:`~flowdppo_fast.rules.RowValues`.
        penalty: what is added to every row's loss, and its derivative by the divergence; None for nothing.
        threshold, low, high: numbers that the row's comparisons use; the default of each is beyond everything.
        strength: a number for the penalty.
        trust_region: as of :class:`DPPO`.
    """

    decide: Callable[[RowValues], tuple]
    penalty: Callable[[RowValues], tuple] | None = None
    threshold: float = math.inf
    low: float = math.inf
    high: float = math.inf
    trust_region: str = "kl"
    strength: float = 0.0

    def __post_init__(self) -> None:
        register(self.decide, self.penalty)
        _check_choice("trust_region", self.trust_region, _REGIONS)

    @property
    def rule(self) -> int:
        return register(self.decide, self.penalty)

    metrics = _COMMON + _MASK_METRICS + _CLIP_METRICS


Objective = DPPO | RatioClip | GRPOGuard | Unclipped | KLPenalty | DRPO | LogHinge | OwnRule
# whose loss or mask sees how far a row is from the old policy
SEES_DRIFT = (DPPO, GRPOGuard, KLPenalty, DRPO)


def threshold_of(objective: Objective, numel: int | None) -> float:
    """The bound on the divergence of rows of ``numel`` elements, mean-reduced; infinite where there is none.

    Raises:
        ValueError: a threshold in nats, and nobody knows the number of elements.
    """
    nats = getattr(objective, "threshold_nats", None)
    if nats is None:
        return getattr(objective, "threshold", math.inf)
    if numel is None:
        raise ValueError(
            f"threshold_nats: got {nats!r} for rows of unknown size, expected threshold, the mean over latent elements"
        )
    return nats / numel


def strength_of(objective: Objective, threshold: float) -> float:
    """What the objective's penalty is multiplied by."""
    if isinstance(objective, DPPO):
        return 0.0 if objective.pull is None else objective.pull / threshold
    if isinstance(objective, DRPO):
        return 1.0 / threshold
    return getattr(objective, "strength", getattr(objective, "weight", 0.0))


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
            "RatioClip, GRPOGuard, KLPenalty, DRPO, LogHinge or Unclipped, for example DPPO(threshold=1e-5), or a "
            "function of a row's values"
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
    strength: float

    @classmethod
    def make(
        cls,
        objective: Objective,
        *,
        numel: int | None = None,
        latent_reduction: str = "mean",
        log_prob: str = "gaussian",
        advantage_clip: float | None = None,
        kl_weight: float = 0.0,
        reference_kl: str = "gaussian",
    ) -> EpilogueOptions:
        """Checks the options that all objectives share and packs them.

        Args:
            numel: latent elements per row, which a threshold in nats needs.

        Raises:
            ValueError: an unknown choice, a non-positive ``advantage_clip`` or a negative ``kl_weight``; a threshold in
                nats for rows of unknown size.
        """
        _check_choice("latent_reduction", latent_reduction, ("mean", "sum"))
        _check_choice("log_prob", log_prob, ("gaussian", "unnormalized"))
        _check_choice("reference_kl", reference_kl, ("gaussian", "without_dt", "velocity_mse", "mean_mse"))
        if advantage_clip is not None:
            check_positive("advantage_clip", advantage_clip)
        if not is_number(kl_weight) or not 0.0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight: got {kl_weight!r}, expected a number >= 0")
        region = getattr(objective, "trust_region", "kl")
        # summed, divergences are in nats themselves
        threshold = threshold_of(objective, 1 if latent_reduction == "sum" else numel)
        low, high = (getattr(objective, name, None) for name in ("low", "high"))
        return cls(
            rule=int(objective.rule),
            trust_region=int(TrustRegion[region.upper()]),
            sum_reduce=int(latent_reduction == "sum"),
            unnormalized_log_prob=int(log_prob == "unnormalized"),
            batch_bias=int(getattr(objective, "bias", "row") == "batch"),
            reference_without_dt=int(reference_kl == "without_dt"),
            # infinities are identities here: nothing is beyond them
            threshold=threshold,
            clip_low=math.inf if low is None else low,
            clip_high=getattr(objective, "margin", math.inf) if high is None else high,
            advantage_clip=math.inf if advantage_clip is None else float(advantage_clip),
            kl_weight=float(kl_weight),
            strength=strength_of(objective, threshold),
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


def is_number(value: object) -> bool:
    """A number of Python or numpy: tensors would have to be read back from their device to be checked or passed on."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(name: str, value: float, why: str = "") -> None:
    """Raises ValueError unless ``value`` is a finite number > 0."""
    if not is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}, expected a number > 0{why}")


def _check_threshold(objective: DPPO | DRPO) -> None:
    check_positive("threshold", objective.threshold)
    if objective.threshold_nats is not None:
        check_positive("threshold_nats", objective.threshold_nats)
    _check_choice("trust_region", objective.trust_region, _REGIONS)


def _check_clip(objective: RatioClip | GRPOGuard | DPPO) -> None:
    low = objective.low
    if low is None or not is_number(low) or not 0.0 < low < 1.0:
        raise ValueError(f"low: got {low!r}, expected a number in (0, 1)")
    if objective.high is None:
        object.__setattr__(objective, "high", low)
    assert objective.high is not None
    check_positive("high", objective.high)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
