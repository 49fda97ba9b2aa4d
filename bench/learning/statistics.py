"""Medians and bootstrap intervals over seeds, the same from call to call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000


class Estimate(NamedTuple):
    """Median over ``count`` seeds with a 95 % interval; the interval is empty (nan) for fewer than 3 seeds."""

    median: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Median and percentile bootstrap interval (Efron) of values from different seeds.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, float)
    if not len(data):
        raise ValueError("values: got none, expected at least one")
    if len(data) < 3:
        return Estimate(float(np.median(data)), float("nan"), float("nan"), len(data))
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[draws], axis=1), [0.025, 0.975])
    return Estimate(float(np.median(data)), float(low), float(high), len(data))


def paired(one: dict[int, float], other: dict[int, float]) -> Estimate | None:
    """Estimate of ``one - other`` over the seeds that both have; None where there is none."""
    common = sorted(set(one) & set(other))
    return estimate([one[seed] - other[seed] for seed in common]) if common else None


def verdict(difference: Estimate | None) -> str:
    """``"shown"`` where the interval is above 0, ``"opposite"`` below 0, else ``"not shown"``."""
    if difference is None or math.isnan(difference.low):
        return "not measured"
    if difference.low > 0:
        return "shown"
    return "opposite" if difference.high < 0 else "not shown"
