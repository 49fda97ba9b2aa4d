"""Rows of a trainer that has log-probs and drifts in place of latents: random ones, and what every backend must make
of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowdppo_fast import reference
from flowdppo_fast.objectives import SUMMARY, EpilogueOptions, RowField, Rule

from .cases import COUNTED, OBJECTIVES, bounds_for
from .tolerance import check_within, largest_finite

Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unnormalized": {"log_prob": "unnormalized"},
    "reference": {"with_reference": True, "kl_weight": 0.3},
    "reference_without_dt": {"with_reference": True, "kl_weight": 0.3, "reference_kl": "without_dt"},
    "without_drift": {"with_drift": False},
    "advantage_clip_and_weights": {"advantage_clip": 0.7, "with_weights": True},
}
# columns of the step table in turn (0: one step for all rows); a table of S alone lacks dt
CASES = [
    (objective, option, (0, 3, 1)[number % (2 if "guard" in objective or "dt" in option else 3)])
    for number, (objective, option) in enumerate(itertools.product(OBJECTIVES, OPTIONS))
    if option != "without_drift"
    or objective in ("ratio_clip", "ratio_clip_asymmetric", "unclipped", "drpo_ratio", "log_hinge")
]


@dataclasses.dataclass
class GivenRows:
    """The arguments of ``log_prob_loss``, in the schema's order."""

    log_prob: Tensor
    old_log_prob: Tensor
    drift: Tensor | None
    reference_drift: Tensor | None
    step: Tensor | None
    step_values: list[float]
    advantages: Tensor
    row_weights: Tensor | None
    ints: list[int]
    floats: list[float]

    def args(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def map(self, function: Callable[[Tensor], Tensor]) -> GivenRows:
        """The same with ``function`` of every tensor."""
        return GivenRows(*(function(x) if isinstance(x, Tensor) else x for x in self.args()))

    def exact(self) -> GivenRows:
        """For the reference on the CPU in float64; numbers as a kernel sees them, in the accumulation dtype."""
        wide = self.map(lambda x: x.cpu().double())
        wide.step_values = [float(torch.tensor(value, dtype=self.log_prob.dtype)) for value in self.step_values]
        return wide


def draw(
    objective: str,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    columns: int = 0,
    spread: float = 0.05,
    drift: float = 0.02,
    with_drift: bool = True,
    with_reference: bool = False,
    with_weights: bool = False,
    **options: Any,
) -> GivenRows:
    """Random rows, and a bound in the middle of what they reach, so that no rounding can move one across.

    ``spread`` is the standard deviation of their log-ratios, ``drift`` the mean of their drifts.
    """

    def normal() -> Tensor:
        return torch.randn(rows, dtype=torch.float64)

    old = -1.2 + 0.1 * normal()
    vectors = (
        old + spread * normal(),
        old,
        drift * normal().square() if with_drift else None,
        drift * normal().square() if with_reference else None,
    )
    table = torch.stack((0.3 + 0.2 * torch.rand(rows), torch.ones(rows), 0.05 + 0.05 * torch.rand(rows)), 1)
    tensors = (
        *vectors, table[:, :columns].contiguous() if columns else None, normal(),
        torch.rand(rows) + 0.5 if with_weights else None,
    )  # fmt: skip
    log_prob, old, to_old, to_reference, step, advantages, weights = (x if x is None else x.to(dtype) for x in tensors)
    values = [] if columns else [0.35, 1.0 / 0.35, 0.08]

    def bounded(*bounds: float) -> GivenRows:
        packed = EpilogueOptions.make(OBJECTIVES[objective].bounded(*bounds)[0], numel=1, **options)
        return GivenRows(
            log_prob, old, to_old, to_reference, step, values, advantages, weights, packed.ints, packed.floats
        )

    call = bounded(0.5)
    if rows == 0:
        return call
    reached = reference.log_prob_loss(*call.exact().args())[1]
    rows_reached = {field.name.lower(): reached[field] for field in RowField}
    return bounded(*bounds_for(OBJECTIVES[objective], rows_reached, 1.0, 1.0))


def is_decidable(call: GivenRows) -> bool:
    """Whether no row is so close to its bound that honest roundings may decide."""
    rows = reference.log_prob_loss(*call.exact().args())[1]
    eps = torch.finfo(call.log_prob.dtype).eps
    # a log-ratio is as exact as the log-probs that it is the difference of
    size = call.log_prob.abs().max().double()
    moved = (rows[RowField.RATIO] - 1.0).abs()
    reached = [(rows[RowField.KL], rows[RowField.KL]), (moved, size), (moved, size)]
    if call.ints[0] == Rule.LOG_HINGE:
        reached[2] = (rows[RowField.LOG_RATIO].abs(), size)
    return all(
        bool(((value - bound).abs() > 16 * eps * (size + bound)).all())
        for (value, size), bound in zip(reached, call.floats)
        if math.isfinite(bound)
    )


def check(operator: Operator, call: GivenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Asserts that ``operator`` makes of the rows what the reference makes of them in float64; returns its results."""
    loss, rows, summary = (x.cpu() for x in operator(*call.args()))
    exact = call.exact()
    _, exact_rows, exact_summary = reference.log_prob_loss(*exact.args())
    dtype = call.log_prob.dtype
    assert loss.shape == ()
    assert loss.dtype == rows.dtype == summary.dtype == dtype
    assert torch.equal(loss, summary[0]) or bool(torch.isnan(loss))
    # the log-ratio is a difference of two log-probs; a ratio is as exact as its exponent is small
    size = 1.0 + largest_finite(exact.log_prob) + largest_finite(exact.old_log_prob)
    size += largest_finite(exact_rows[RowField.RATIO].log())
    ulps = 8 * torch.finfo(dtype).eps * size

    def close(name: str, got: Tensor, want: Tensor, relative: float, terms: Tensor | None = None) -> None:
        # of the largest value, or of the terms that add up to it
        scale = max(largest_finite(want), 0.0 if terms is None else largest_finite(terms))
        check_within(name, got, want, relative * scale, dtype)

    for field in RowField:
        # under a bias of the batch dl/dQ is a mean of what dl/dL is made of
        terms = exact_rows[RowField.GRAD_P] if field == RowField.GRAD_Q else None
        close(field.name, rows[field], exact_rows[field], 0.0 if field == RowField.KEPT else ulps, terms)
    # of what cancels in a summary
    added_up = {
        "loss": exact_rows[RowField.LOSS],
        "policy_loss": exact_rows[RowField.LOSS],
        "ratio_std": exact_rows[RowField.RATIO] - 1.0,
    }
    for name, got, want in zip(SUMMARY, summary, exact_summary):
        # a count is exact, its division by the number of rows rounds
        close(name, got, want, torch.finfo(dtype).eps if name in COUNTED else ulps, added_up.get(name))
    return loss, rows, summary


def check_no_rows(operator: Operator, objective: str) -> None:
    """Asserts that of no rows there is a loss of 0 and nothing to report, as in the reference."""
    call = draw(objective, 0)
    for got, want in zip(operator(*call.args()), reference.log_prob_loss(*call.args())):
        assert torch.equal(torch.isnan(got.cpu()), torch.isnan(want))
        assert torch.equal(got.cpu().nan_to_num(), want.nan_to_num())


def check_not_finite(operator: Operator, objective: str, field: str, bad: float) -> None:
    """Asserts that a number that is not finite goes where the reference lets it go."""
    call = draw(objective, 6)
    getattr(call, field)[2] = bad
    check(operator, call)


def check_overflow(operator: Operator, objective: str) -> None:
    """Asserts that a dropped row has no gradient even where its ratio overflows."""
    call = draw(objective, 4)
    call.log_prob[1], call.drift[1], call.advantages[1] = 2000.0, 50.0, 1.0  # type: ignore[index]
    _, rows, _ = check(operator, call)
    assert rows[RowField.RATIO, 1] == math.inf
    assert rows[RowField.GRAD_P :, 1].tolist() == [0.0] * 3
