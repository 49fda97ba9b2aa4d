"""One call, three answers: the backend's, the reference's in float64, and eager's for the size of honest errors."""

from __future__ import annotations

from typing import NamedTuple

import torch

import flowdppo_fast as fast

from .problems import Call, Outcome, library, textbook
from .steps import NORMAL_SLACK, as_tensor
from .tolerance import check_within, eager_bound


class Yardstick(NamedTuple):
    """What a backend's answer is held against: the reference in float64, and eager in the call's own accuracy."""

    exact: Outcome
    eager: Outcome

    @classmethod
    def of(cls, call: Call) -> Yardstick:
        return cls(library(call.upcast(), "reference"), textbook(call, compute_dtype(call)))


def compute_dtype(call: Call) -> torch.dtype:
    """What a backend computes the call in."""
    return torch.float64 if call.first.dtype == torch.float64 else torch.float32


# rows a metric summarises; the rest are fractions of rows and counts, which have to be the same
SUMMARISED = {
    "policy_loss": "loss",
    "ratio_mean": "ratio",
    "ratio_std": "ratio",
    "ratio_min": "ratio",
    "ratio_max": "ratio",
    "approx_kl": "log_ratio",
    "kl_new_old_mean": "kl",
    "kl_new_old_max": "kl",
}
QUADRATIC = ("drift_mean", "kl_ref_mean")


def of_seeded_noise(call: Call, backend: str, exact: Outcome) -> dict[str, float]:
    """How far rows and gradient move if seeded normals are off by all that a GPU's may be, the worst way round."""
    noise, allowed = call.tensors.get("noise"), NORMAL_SLACK.get(backend)
    if not isinstance(noise, fast.PhiloxNoise) or allowed is None:
        return dict.fromkeys((*exact.rows, "gradient"), 0.0)
    away = call.upcast()
    new, old = away.tensors["velocity"], away.tensors["old_velocity"]
    drawn = as_tensor(noise, call.first, len(call.problem.rows))
    away.tensors["noise"] = drawn + allowed * torch.where(new < old, -1.0, 1.0)
    moved = library(away, "reference")
    pairs = {name: (moved.rows[name], value) for name, value in exact.rows.items()}
    pairs["gradient"] = (moved.grad, exact.grad)
    return {name: float((one.double() - other.double()).abs().max()) for name, (one, other) in pairs.items()}


def check_backend(call: Call, backend: str, yardstick: Yardstick | None = None) -> Outcome:
    """Asserts that ``backend`` answers ``call`` as the float64 reference does; returns the backend's outcome."""
    actual = library(call, backend)
    assert actual.backend == backend
    exact, eager = Yardstick.of(call) if yardstick is None else yardstick
    compute = compute_dtype(call)
    condition = max(1.0, float(eager.size.max()))

    slack, seeded = {}, of_seeded_noise(call, backend, exact)
    assert torch.equal(actual.rows["kept"], exact.rows["kept"])
    for name in ("log_ratio", "ratio", "kl", "loss"):
        of_ratio = 1.0 if name == "kl" else condition
        slack[name] = eager_bound(exact.rows[name], eager.rows[name], compute, of_ratio) + seeded[name]
        if name == "log_ratio":
            # a log-ratio may be close to 0; its terms are not
            slack[name] += eager_bound(eager.size, eager.size, compute)
        check_within(f"rows.{name}", actual.rows[name], exact.rows[name], slack[name], compute)
        assert actual.rows[name].dtype == compute

    reduction, count = call.options.get("reduction"), exact.rows["loss"].numel()
    # of how many rows' losses the loss is the sum
    added = {"sum": count, "kept": count / max(int(exact.rows["kept"].sum()), 1)}.get(reduction, 1)
    check_within("loss", actual.loss, exact.loss, added * slack["loss"], compute)
    assert actual.loss.dtype == compute

    assert actual.metrics.keys() == exact.metrics.keys()
    for name, value in actual.metrics.items():
        expected = exact.metrics[name]
        if name in SUMMARISED:
            allowed = slack[SUMMARISED[name]]
            if name == "approx_kl":
                allowed *= float(exact.rows["log_ratio"].abs().max()) + allowed
            elif name == "ratio_mean":
                # 1 + mean(r - 1): exact near 1, where it matters, and never better than an ulp of 1
                allowed += torch.finfo(compute).eps
            elif name == "ratio_std":
                # likewise of r - 1, which is -1 for ratios near 0
                allowed += torch.finfo(compute).eps * float((exact.rows["ratio"] - 1.0).abs().max())
        elif name in QUADRATIC:
            allowed = eager_bound(expected, eager.metrics[name], compute)
        else:
            allowed = torch.finfo(compute).eps
        check_within(name, value, expected, allowed, compute)
        assert value.dtype == compute

    assert actual.grad.dtype == call.first.dtype
    allowed = eager_bound(exact.grad, eager.grad, compute, condition) + seeded["gradient"]
    check_within("gradient", actual.grad, exact.grad, allowed, compute)
    return actual
