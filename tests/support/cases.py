"""Every objective and every option of the losses, with bounds that drop some rows and keep some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import flowdppo_fast as fast

from . import oracle
from .problems import Call, Problem, make_call, textbook


@dataclass(frozen=True)
class Case:
    """An objective as the library and as the textbook call it, its bound still open."""

    rule: str
    region: str = "kl"
    skew: float = 1.0
    bias: str = "row"

    @property
    def velocity_only(self) -> bool:
        return self.region == "velocity_drift"

    def bounded(self, bound: float, clip: float = 0.5) -> tuple[Any, oracle.Rule]:
        """The library's objective and the textbook's rule for a threshold or clip range of ``bound``; ``clip`` is that
        of a mask with a clip."""
        if self.rule in ("dppo", "dppo_symmetric"):
            objective = fast.DPPO(bound, self.rule == "dppo_symmetric", self.region)
            return objective, oracle.Rule(self.rule, threshold=bound, region=self.region)
        if self.rule == "unclipped":
            return fast.Unclipped(), oracle.Rule("unclipped")
        if self.rule == "dppo_clipped":
            objective = fast.DPPO(bound, low=clip, high=clip)
            return objective, oracle.Rule(self.rule, threshold=bound, low=clip, high=clip)
        if self.rule == "dppo_pulled":
            objective = fast.DPPO(bound, trust_region=self.region, pull=0.6)
            return objective, oracle.Rule(self.rule, threshold=bound, region=self.region, strength=0.6)
        if self.rule == "kl_penalty":
            objective = fast.KLPenalty(1.0 / bound, self.region)
            return objective, oracle.Rule(self.rule, strength=1.0 / bound, region=self.region)
        if self.rule in ("drpo", "drpo_ratio"):
            objective = fast.DRPO(bound, "kl" if self.rule == "drpo" else "ratio", self.region)
            return objective, oracle.Rule(self.rule, threshold=bound, region=self.region)
        if self.rule == "log_hinge":
            return fast.LogHinge(bound), oracle.Rule(self.rule, margin=bound)
        low, high = bound, self.skew * bound
        if self.rule == "ratio_clip":
            return fast.RatioClip(low, high), oracle.Rule("ratio_clip", low=low, high=high)
        return fast.GRPOGuard(low, high, self.bias), oracle.Rule("grpo_guard", low=low, high=high, bias=self.bias)


OBJECTIVES = {
    "dppo": Case("dppo"),
    "dppo_symmetric": Case("dppo_symmetric"),
    "dppo_mean_drift": Case("dppo", region="mean_drift"),
    "dppo_velocity_drift": Case("dppo", region="velocity_drift"),
    "ratio_clip": Case("ratio_clip"),
    "ratio_clip_asymmetric": Case("ratio_clip", skew=1.25),
    "grpo_guard": Case("grpo_guard"),
    "grpo_guard_batch": Case("grpo_guard", bias="batch"),
    "unclipped": Case("unclipped"),
    "dppo_clipped": Case("dppo_clipped"),
    "dppo_pulled": Case("dppo_pulled", region="mean_drift"),
    "kl_penalty": Case("kl_penalty"),
    "drpo": Case("drpo", region="velocity_drift"),
    "drpo_ratio": Case("drpo_ratio"),
    "log_hinge": Case("log_hinge"),
}

# no row is dropped whatever the bound
NEVER_DROP = {"unclipped", "kl_penalty", "drpo", "drpo_ratio"}
# rows far from the old policy have a gradient without an advantage, or where they are dropped
PULLED_WITHOUT_ADVANTAGE, PULLED_WHERE_DROPPED = {"kl_penalty"}, {"dppo_pulled"}

# metrics that are exact in any arithmetic: fractions of rows and a count
COUNTED = (
    "kl_mask_fraction", "pos_rm_fraction", "neg_rm_fraction", "masked_fraction", "unmasked_fraction",
    "nonfinite_rows", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one",
)  # fmt: skip

# drift makes the policies close enough for sums over latents to stay in range
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference_kl": {"with_reference": True, "kl_weight": 0.3},
    "reference_kl_without_dt": {"with_reference": True, "kl_weight": 0.3, "reference_kl": "without_dt"},
    "reference_mean_mse": {"with_reference": True, "kl_weight": 0.3, "reference_kl": "mean_mse", "reduction": "kept"},
    "reference_metric_only": {"with_reference": True},
    "sum_over_latents": {"latent_reduction": "sum", "drift": 0.1},
    "unnormalized": {"log_prob": "unnormalized"},
    "old_log_prob": {"with_old_log_prob": True},
    "old_log_prob_unnormalized": {"with_old_log_prob": True, "log_prob": "unnormalized"},
    "old_log_prob_sum": {"with_old_log_prob": True, "latent_reduction": "sum", "drift": 0.1},
    "advantage_clip": {"advantage_clip": 0.8},
    "row_weights": {"with_weights": True},
    "bounds_per_row": {"with_weights": True, "with_reference": True, "with_row_bounds": True},
    "everything": {
        "with_reference": True, "kl_weight": 0.2, "with_weights": True, "with_old_log_prob": True,
        "advantage_clip": 1.0, "latent_reduction": "sum", "drift": 0.1,
    },
}  # fmt: skip


def applicable(objective: str, form: str) -> bool:
    """Whether the objective exists in the form: a drift of velocities needs velocities."""
    return form == "velocity" or not OBJECTIVES[objective].velocity_only


def middle_gap(values: Tensor) -> float:
    """A number well away from all ``values``: the geometric middle of their widest gap."""
    ordered = values.abs().flatten().sort().values
    # rows that did not move at all are on the near side of any bound
    ordered = ordered[ordered > 0]
    if ordered.numel() < 2:
        return 2.0 * float(ordered[0]) if ordered.numel() else 1.0
    gaps = ordered[1:] / ordered[:-1]
    at = int(gaps.argmax())
    return math.sqrt(float(ordered[at]) * float(ordered[at + 1]))


def bounded_call(problem: Problem, form: str, objective: str | Case, *, factor: float = 1.0, **options: Any) -> Call:
    """The call with a bound in the middle of what its rows reach, so that no rounding can move a row across.

    A ``factor`` other than 1 moves the bound away from there: wherever it then falls between the rows.
    """
    case = OBJECTIVES[objective] if isinstance(objective, str) else objective
    call = make_call(problem, form, *case.bounded(0.5), **options)
    # what the rows reach does not depend on the bound
    reached = textbook(call).rows
    weights = call.options.get("threshold_weights")
    weights = 1.0 if weights is None else weights.cpu()
    call.objective, call.rule = case.bounded(*bounds_for(case, reached, weights, factor))
    return call


def bounds_for(
    case: Case, reached: Mapping[str, Tensor], weights: Tensor | float, factor: float
) -> tuple[float, float]:
    """The bound and the clip range for :meth:`Case.bounded`, each in the middle of what rows reach."""
    clip = min(factor * middle_gap(reached["ratio"] - 1.0), 0.9)
    if case.rule in ("ratio_clip", "grpo_guard"):
        return clip, clip
    line = reached["log_ratio"] if case.rule == "log_hinge" else reached["kl"] / weights
    return factor * middle_gap(line), clip


FORMS = ("velocity", "means")
FORM_OBJECTIVES = [(form, objective) for form in FORMS for objective in OBJECTIVES if applicable(objective, form)]
FORM_OBJECTIVE_OPTIONS = [(*pair, option) for pair in FORM_OBJECTIVES for option in OPTIONS]
