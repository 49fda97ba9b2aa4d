"""The methods, as settings of the public trainer. Bounds are given in nats, the paper's sum over the latent.

A mask with the sum threshold ``d`` drops rows whose KL over the whole latent is at least ``d``; the trainer's threshold
is ``d / N``. A clip with the sum range ``c`` clips where the log-ratio of the whole latent leaves ``[-c, c]``; the
trainer's ratio is of mean-reduced log-probs, so its range is ``c / N`` to first order. GRPO-Guard's exponent is the
log-ratio without its drift, times the step's standard deviation; its range is ``c / N`` of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A label, the sampler and the objective; ``bound`` names what the sweep varies."""

    label: str
    sampler: str
    objective: str
    bound: str | None


METHODS = {
    "unclipped": Method("unclipped", "flow_sde", "unclipped", None),
    "flow_grpo": Method("Flow-GRPO", "flow_sde", "ratio_clip", "clip"),
    "flow_cps": Method("Flow-CPS", "cps", "ratio_clip", "clip"),
    "grpo_guard": Method("GRPO-Guard", "flow_sde", "grpo_guard", "clip"),
    "flow_dppo": Method("Flow-DPPO", "flow_sde", "dppo", "threshold"),
    "flow_dppo_cps": Method("Flow-DPPO+CPS", "cps", "dppo", "threshold"),
    "symmetric": Method("symmetric mask", "flow_sde", "dppo_symmetric", "threshold"),
}


def objective_settings(method: Method, bound: float | None, elements: int) -> dict[str, Any]:
    """The trainer's ``objective`` section for a bound in nats.

    Raises:
        ValueError: a bound for a method that has none, or none for one that needs it.
    """
    if (bound is None) != (method.bound is None):
        raise ValueError(f"bound: got {bound!r} for {method.label}, expected {method.bound or 'None'}")
    settings: dict[str, Any] = {"name": method.objective}
    if method.bound == "threshold":
        settings["threshold"] = bound / elements  # type: ignore[operator]
    elif method.bound == "clip":
        settings["clip_low"] = settings["clip_high"] = bound / elements  # type: ignore[operator]
    return settings
