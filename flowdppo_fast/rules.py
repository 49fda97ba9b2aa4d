"""What an objective does with a row, written once: torch calls these functions as they are, Triton compiles them.

A rule is a plain function of a :class:`RowValues`. It may compare, combine comparisons with ``&`` and ``|`` and
calculate; it may not branch on a row, and outside of torch it has no tensor methods. It returns

- ``dropped``: whether the row is taken out of the gradient, a comparison;
- ``bound``: what a dropped row adds to the loss, through which nothing flows;
- ``surrogate``: what a kept row adds to the loss;
- ``slope``: the surrogate's derivative by ``exponent``. The ratio is its own derivative, so that of ``-A*r`` is itself.

``csrc/objective.h`` is the twin for C++ and CUDA, and has no rule of a user's own.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple


class RowValues(NamedTuple):
    """What a rule knows of a row; all are tensors ``[R]`` in torch and blocks in Triton, of the accumulation dtype.

    Attributes:
        p, q: ``mean(e*u)`` and ``mean(u*u)``.
        std: ``S`` of the step.
        advantage: clamped, if that was asked for.
        exponent: ``X``, the log-ratio; of GRPO-Guard the normalised one.
        ratio: ``r = exp(X)``.
        kl: the divergence that the trust region names.
        far: ``kl >= threshold``.
        above, below: ``r - 1 > high`` and ``1 - r > low``.
        limit: the ratio at which clipping sets in: ``1 + high`` for a positive advantage, else ``1 - low``.
        threshold: the objective's number.
        size: ``|A|``.
        excess: ``r - 1``, with all its digits.
        high: the objective's number.
        strength: what penalties are multiplied by.
    """

    p: Any
    q: Any
    std: Any
    advantage: Any
    exponent: Any
    ratio: Any
    kl: Any
    far: Any
    above: Any
    below: Any
    limit: Any
    threshold: Any
    size: Any
    excess: Any
    high: Any
    strength: Any


def dppo(row: RowValues):
    """Drops a row that is far from the old policy and moving away."""
    away = ((row.advantage > 0) & (row.exponent > 0)) | ((row.advantage < 0) & (row.exponent < 0))
    surrogate = -row.advantage * row.ratio
    return row.far & away, 0.0, surrogate, surrogate


def dppo_symmetric(row: RowValues):
    """Drops every far row."""
    surrogate = -row.advantage * row.ratio
    return row.far, 0.0, surrogate, surrogate


def clipped(row: RowValues):
    """PPO's clipping: the ratio counts up to its limit."""
    dropped = ((row.advantage > 0) & row.above) | ((row.advantage < 0) & row.below)
    surrogate = -row.advantage * row.ratio
    return dropped, -row.advantage * row.limit, surrogate, surrogate


def unclipped(row: RowValues):
    """Drops no row."""
    surrogate = -row.advantage * row.ratio
    # no ratio is on both sides of 1
    return row.above & row.below, 0.0, surrogate, surrogate


def masked_and_clipped(row: RowValues):
    """Drops what the mask drops and what clipping drops."""
    away = ((row.advantage > 0) & (row.exponent > 0)) | ((row.advantage < 0) & (row.exponent < 0))
    beyond = ((row.advantage > 0) & row.above) | ((row.advantage < 0) & row.below)
    surrogate = -row.advantage * row.ratio
    return (row.far & away) | beyond, 0.0, surrogate, surrogate


def quadratic(row: RowValues):
    """DRPO on the ratio: drops no row, and the square of ``r - 1`` pulls every ratio back to 1."""
    surrogate = -row.advantage * row.ratio
    pull = row.size * row.strength * row.excess
    # no ratio is on both sides of 1
    return row.above & row.below, 0.0, surrogate + 0.5 * pull * row.excess, surrogate + pull * row.ratio


def log_hinge(row: RowValues):
    """PCPO's hinge on the log-ratio: a row counts until it has moved by the margin in its advantage's direction."""
    beyond = ((row.advantage > 0) & (row.exponent >= row.high)) | ((row.advantage < 0) & (-row.exponent >= row.high))
    return beyond, 0.0, row.size * row.high - row.advantage * row.exponent, -row.advantage


def pull(row: RowValues):
    """The divergence, as a penalty on every row."""
    return row.strength * row.kl, row.strength


def pull_by_advantage(row: RowValues):
    """DRPO: the divergence as a penalty in proportion to ``|A|``, so that where a row comes to rest depends on no
    scale."""
    strength = row.size * row.strength
    return strength * row.kl, strength


def pull_beyond(row: RowValues):
    """What of the divergence is beyond the threshold, in proportion to ``|A|``."""
    strength = row.far * (row.size * row.strength)
    return strength * (row.kl - row.threshold), strength


class RowRule(NamedTuple):
    """An objective's row functions.

    Attributes:
        decide: the rule.
        penalty: of a :class:`RowValues`, what kept and dropped rows alike add to the loss, and that by ``kl``; or None.
        normalized: GRPO-Guard's exponent, ``(L + D)*S``, and its loss divided by ``-dt``.
    """

    decide: Callable[[RowValues], tuple]
    penalty: Callable[[RowValues], tuple] | None = None
    normalized: bool = False


# by number, which is what operators carry; csrc/objective.h has the same numbers
RULES: dict[int, RowRule] = {
    0: RowRule(dppo),
    1: RowRule(dppo_symmetric),
    2: RowRule(clipped),
    3: RowRule(clipped, normalized=True),
    4: RowRule(unclipped),
    5: RowRule(masked_and_clipped),
    6: RowRule(dppo, pull_beyond),
    7: RowRule(unclipped, pull),
    8: RowRule(unclipped, pull_by_advantage),
    9: RowRule(quadratic),
    10: RowRule(log_hinge),
}
BUILT_IN = len(RULES)


def register(decide: Callable[[RowValues], tuple], penalty: Callable[[RowValues], tuple] | None = None) -> int:
    """The number of a rule of one's own; the same functions have the same number.

    Raises:
        TypeError: not plain functions, of which Triton could not read the source.
    """
    for name, function in (("rule", decide), ("penalty", penalty)):
        if not isinstance(function, types.FunctionType) and not (name == "penalty" and function is None):
            raise TypeError(f"{name}: got {type(function).__name__}, expected a function of one row (RowValues)")
    wanted = RowRule(decide, penalty)
    for number, rule in RULES.items():
        if number >= BUILT_IN and rule == wanted:
            return number
    number = len(RULES)
    RULES[number] = wanted
    return number
