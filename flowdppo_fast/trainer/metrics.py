"""Metrics of micro-batches, kept on the device as vectors, and how they become the metrics of an iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..objectives import SUMMARY
from ..results import LossOutput

_EXTRA = ("ratio_moved_fraction", "replay_log_ratio_max")
_NAMES = (*SUMMARY, *_EXTRA)
_MAXIMA, _MINIMA, _SUMS = ("ratio_max", "kl_new_old_max", "replay_log_ratio_max"), ("ratio_min",), ("nonfinite_rows",)
# standard deviations do not combine by averaging, and the complement says nothing new
_DROPPED = ("ratio_std", "unmasked_fraction")


def micro_vector(out: LossOutput, *, on_policy: bool) -> Tensor:
    """All numbers of one micro-batch as a float32 vector.

    Before the first update of a rollout (``on_policy``) ratios are 1 up to the rounding of the replay: then no row
    counts as moved, and the largest ``|log_ratio|`` is the noise floor below which thresholds mean nothing.
    """
    rows, zero = out.rows, torch.zeros_like(out.loss)
    moved = zero if on_policy else (rows.ratio != 1).to(zero.dtype).mean()
    floor = rows.log_ratio.abs().max() if on_policy else zero
    return torch.cat([out.summary, torch.stack([moved, floor])]).float()


def reduce_micro(vectors: Sequence[Tensor], shares: Sequence[float], names: Sequence[str]) -> dict[str, Tensor]:
    """Metrics of several micro-batches as 0-d tensors: extremes and counts as such, others as means weighted by rows.

    Args:
        vectors: from :func:`micro_vector`.
        shares: weight of each micro-batch.
        names: metrics that mean something for the objective (``LossOutput.metric_names``).
    """
    table = torch.stack(list(vectors))
    weights = torch.tensor(shares, device=table.device)
    values = {}
    for name in ("loss", *names, *_EXTRA):
        line = table[:, _NAMES.index(name)]
        if name in _MAXIMA:
            values[name] = line.max()
        elif name in _MINIMA:
            values[name] = line.min()
        elif name in _SUMS:
            values[name] = line.sum()
        elif name not in _DROPPED:
            values[name] = (line * weights).sum() / weights.sum()
    return values
