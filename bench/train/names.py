"""Names of habits and contenders, without importing torch."""

from __future__ import annotations

RECOMPUTE, PER_STEP, EAGER, ITEMS, MEANS = "recompute", "per-step", "eager", "items", "means"
OURS, THEIRS = "this library", "all habits"
# contenders: what they are called, and their habits
CONTENDERS: dict[str, frozenset[str]] = {
    OURS: frozenset(),
    "recompute pass": frozenset({RECOMPUTE}),
    "per-step replay": frozenset({PER_STEP}),
    "eager loss": frozenset({EAGER}),
    "metrics by .item()": frozenset({ITEMS}),
    "fp32 means": frozenset({MEANS}),
    THEIRS: frozenset({RECOMPUTE, PER_STEP, EAGER, ITEMS, MEANS}),
}
WHAT = {
    OURS: "old velocity kept from the rollout, all steps of a micro-batch in one call, one fused pass, no reads",
    "recompute pass": "a second pass without gradients over all rows and steps before the updates",
    "per-step replay": "one transformer call and one backward per step instead of one for all steps",
    "eager loss": "step, log-prob, KL, mask and metrics in plain torch on float32; it needs means, so it stores them",
    "metrics by .item()": "every metric of every micro-batch is read on its own",
    "fp32 means": "step means and next latents are kept in float32 in place of velocities; fused loss on means",
    THEIRS: "all of the above",
}
