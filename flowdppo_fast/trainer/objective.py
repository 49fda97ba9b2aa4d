"""Settings of the objective, and what of it changes from step to step and from iteration to iteration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from pydantic import StrictBool
from torch import Tensor

from ..objectives import (
    DPPO,
    DRPO,
    GRPOGuard,
    KLPenalty,
    LogHinge,
    Objective,
    OwnRule,
    RatioClip,
    Unclipped,
    as_objective,
)
from ..samplers import SDEStep
from .callables import load_callable
from .settings import OF_MODULE, SECTION, BetweenZeroAndOne, Count, Decay, NotNegative, Positive, require

logger = get_logger(__name__)

# by objective, the settings that it takes
_TAKES = {
    "dppo": ("threshold", "threshold_nats", "clip_low", "clip_high", "penalty"),
    "dppo_symmetric": ("threshold", "threshold_nats"),
    "ratio_clip": ("clip_low", "clip_high"),
    "grpo_guard": ("clip_low", "clip_high"),
    "kl_penalty": ("penalty", "kl_target"),
    "drpo": ("threshold", "threshold_nats", "kl_target"),
    "drpo_ratio": ("threshold", "threshold_nats", "kl_target"),
    "log_hinge": ("clip_high",),
    "unclipped": (),
}
_OF_SOME = ("threshold", "threshold_nats", "clip_low", "clip_high", "penalty", "kl_target")


@dataclass
class ObjectiveConfig:
    """> Parameters that control the bound on each update.

    Args:
        name: ``"dppo"``, ``"dppo_symmetric"``, ``"ratio_clip"``, ``"grpo_guard"``, ``"kl_penalty"``, ``"drpo"``,
            ``"drpo_ratio"``, ``"log_hinge"`` or ``"unclipped"``.
        callable: one of your own in place of ``name``, ``package.module:attribute``: a function of a row's values
            (``flowdppo_fast.rules``), or an objective.
        threshold: bound of the mean-reduced KL for the DPPO objectives, None means 1e-5; that of the two DRPO
            objectives, None means 0.2; or a function's number.
        threshold_nats: in place of ``threshold``, in nats of a whole latent, which mean the same at every size.
        threshold_per: ``"step"`` for the same threshold at each step, or ``"noise_level"`` for the same per unit of
            noise level that a step removes: the threshold is then the average one.
        clip_low, clip_high: clip range for the two clipping objectives, None means theirs (1e-4; GRPO-Guard 2e-6); with
            ``"dppo"`` rows beyond the clip are dropped too; margin of ``"log_hinge"``; or a function's.
        penalty: weight of the KL for ``"kl_penalty"``; with ``"dppo"`` the strength of a pull back on rows beyond the
            threshold, None means no pull.
        kl_target: the penalty adapts to it: after an iteration it is doubled where the mean KL of the last update's
            rows exceeds 1.5 times this, and halved where it stays below this over 1.5; None means that it stays.
        step_weight: what rows of a step are multiplied by: ``"none"``, ``"inverse_scale"`` (Flash-GRPO's ``1/|k|``),
            ``"std"`` (TempFlow-GRPO's noise level ``S``) or ``"inverse_dt"``.
        kl_weight: weight of the KL to the reference model, >= 0.
        reference_kl: ``"gaussian"``, ``"without_dt"`` for flow_grpo's convention, or without a scale ``"mean_mse"`` or
            ``"velocity_mse"``.
        mean_over: ``"rows"`` for the mean loss over all rows of a micro-batch, or ``"kept"`` for its sum over the
            number of rows that the bound keeps.
        reference_every: iterations between two moves of the reference model; None means that it stays the model as it
            was at the start.
        reference_decay: what the reference model keeps of itself when it moves towards the trained one; 0 resets it.
        drift_budget: the run ends once the KL to the reference model, in nats per denoising step, exceeds this.
        allow_idle: accept settings with which the bound cannot act, that is one update per rollout.
    """

    __pydantic_config__ = SECTION

    name: Literal[
        "dppo", "dppo_symmetric", "ratio_clip", "grpo_guard", "kl_penalty", "drpo", "drpo_ratio", "log_hinge",
        "unclipped",
    ] = "dppo"  # fmt: skip
    callable: str | None = None
    threshold: Positive | None = None
    threshold_nats: Positive | None = None
    threshold_per: Literal["step", "noise_level"] = "step"
    clip_low: BetweenZeroAndOne | None = None
    clip_high: Positive | None = None
    penalty: Positive | None = None
    kl_target: Positive | None = None
    step_weight: Literal["none", "inverse_scale", "std", "inverse_dt"] = "none"
    kl_weight: NotNegative = 0.0
    reference_kl: Literal["gaussian", "without_dt", "velocity_mse", "mean_mse"] = "gaussian"
    mean_over: Literal["rows", "kept"] = "rows"
    reference_every: Count | None = None
    reference_decay: Decay = 0.0
    drift_budget: Positive | None = None
    allow_idle: StrictBool = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0 or self.drift_budget is not None

    def build(self) -> Objective:
        """The objective of this section.

        Raises:
            ValueError, TypeError: ``callable`` names nothing, or something else.
        """
        if self.callable is not None:
            return self._own(self.callable)
        low, high = self.clip_low, self.clip_high
        if self.name.startswith("dppo"):
            return DPPO(
                DPPO().threshold if self.threshold is None else self.threshold,
                symmetric=self.name == "dppo_symmetric",
                threshold_nats=self.threshold_nats,
                low=low,
                high=high,
                pull=self.penalty,
            )
        if self.name.startswith("drpo"):
            threshold = DRPO().threshold if self.threshold is None else self.threshold
            return DRPO(threshold, "kl" if self.name == "drpo" else "ratio", threshold_nats=self.threshold_nats)
        if self.name == "kl_penalty":
            assert self.penalty is not None
            return KLPenalty(self.penalty)
        if self.name == "log_hinge":
            return LogHinge() if high is None else LogHinge(high)
        if self.name == "unclipped":
            return Unclipped()
        kind = RatioClip if self.name == "ratio_clip" else GRPOGuard
        return kind(kind.low if low is None else low, kind.high if high is None else high)

    def _own(self, name: str) -> Objective:
        found = load_callable(name, "objective.callable")
        if not isinstance(found, FunctionType):
            return as_objective(found)
        threshold, low, high = (
            math.inf if value is None else value for value in (self.threshold, self.clip_low, self.clip_high)
        )
        return OwnRule(found, threshold=threshold, low=low, high=high)

    def check(self, updates_per_rollout: int, inner_epochs: int) -> None:
        """Settings that contradict each other.

        Raises:
            ValueError: they do.
        """
        if self.callable is not None:
            named = OF_MODULE.fullmatch(self.callable) is not None
            require(named, "objective.callable", self.callable, "package.module:attribute")
            require(self.name == "dppo", "objective.name", self.name, "none beside objective.callable")
        else:
            for name in _OF_SOME:
                value = getattr(self, name)
                require(
                    value is None or name in _TAKES[self.name], f"objective.{name}", value,
                    f"none: {self.name!r} takes {', '.join(_TAKES[self.name]) or 'no number'}",
                )  # fmt: skip
            require(
                self.name != "kl_penalty" or self.penalty is not None, "objective.penalty", self.penalty,
                "a number > 0 for 'kl_penalty'",
            )  # fmt: skip
            require(
                self.clip_high is None or self.clip_low is not None or self.name != "dppo", "objective.clip_low",
                self.clip_low, "a number in (0, 1) beside objective.clip_high",
            )  # fmt: skip
            require(
                self.clip_low is None or self.penalty is None, "objective.penalty", self.penalty,
                "none beside objective.clip_low: 'dppo' clips or pulls back",
            )  # fmt: skip
        require(
            self.threshold is None or self.threshold_nats is None, "objective.threshold_nats", self.threshold_nats,
            "none beside objective.threshold",
        )  # fmt: skip
        require(
            self.reference_every is None or self.needs_reference, "objective.reference_every", self.reference_every,
            "none without objective.kl_weight or objective.drift_budget: there is no reference model",
        )  # fmt: skip
        require(
            updates_per_rollout * inner_epochs > 1 or self.name == "unclipped" or self.allow_idle,
            "optimizer.updates_per_rollout",
            updates_per_rollout,
            "2 or more, or optimizer.inner_epochs of 2 or more: in the only update of a rollout every ratio is 1, so "
            f"{self.callable or self.name} bounds nothing; objective.allow_idle=true accepts that",
        )

    def of_loss(self, step: SDEStep, rows: tuple[int, ...], num_steps: int, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of a loss on ``rows`` that end with the steps ``step``, of ``num_steps`` from noise to
        data."""
        given: dict[str, Any] = {"kl_weight": self.kl_weight, "reference_kl": self.reference_kl}
        if self.mean_over == "kept":
            given["reduction"] = "kept"
        if self.step_weight != "none" or self.threshold_per != "step":
            std, scale, neg_dt = step.row_table(rows, device, torch.float32).T.reshape(3, *rows)
            if self.threshold_per == "noise_level":
                # noise levels run from 1 to 0, so these factors have a mean of 1
                given["threshold_weights"] = num_steps * neg_dt
            if self.step_weight != "none":
                given["row_weights"] = _step_weights(self.step_weight, std, scale, neg_dt)
        return given


def over_budget(metrics: Mapping[str, float], budget: float | None) -> bool:
    """Whether the KL to the reference model exceeds ``objective.drift_budget``; says so."""
    if budget is None or not metrics["kl_ref_nats"] > budget:
        return False
    logger.warning(
        "the KL to the reference model is %.3g nats per step, objective.drift_budget=%.3g: the run ends",
        metrics["kl_ref_nats"],
        budget,
    )
    return True


def _step_weights(kind: str, std: Tensor, scale: Tensor, neg_dt: Tensor) -> Tensor:
    return std if kind == "std" else 1.0 / (scale.abs() if kind == "inverse_scale" else neg_dt)


def adapted(objective: Objective, history: Iterable[Mapping[str, float]], target: float | None) -> Objective:
    """``objective`` with its penalty as PPO adapts it to a target KL (arXiv 1707.06347, Sec. 4).

    A function of what the iterations so far have logged, so a run that goes on has the penalty that it had.

    Args:
        history: metrics of the iterations to adapt to; those without ``kl_last_update`` leave the penalty.
        target: mean KL of the last update's rows; None leaves the penalty.
    """
    factor = 1.0
    for metrics in history if target is not None else ():
        kl = metrics.get("kl_last_update", math.nan)
        assert target is not None
        factor *= 2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0
    if isinstance(objective, KLPenalty):
        return dataclasses.replace(objective, weight=objective.weight * factor)
    if isinstance(objective, DRPO):
        name = "threshold" if objective.threshold_nats is None else "threshold_nats"
        return dataclasses.replace(objective, **{name: getattr(objective, name) / factor})  # type: ignore[arg-type]
    return objective
