"""Metrics of micro-batches, kept on the device as vectors, and how they become the metrics of an iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..objectives import SUMMARY, Objective
from ..results import LossOutput
from ..runs.row_log import row_lines
from .advantages import group_spread, weighted_reward
from .config import FlowDPPOConfig
from .mismatch import MISMATCH_METRICS, mismatch_vector
from .rollout import Rollout
from .weights.distributed import Workers

_EXTRA = ("ratio_moved_fraction", "replay_log_ratio_max", *MISMATCH_METRICS)
# order of :func:`micro_vector`
METRICS = (*SUMMARY, *_EXTRA)
_MAXIMA = ("ratio_max", "kl_new_old_max", "replay_log_ratio_max", "mismatch_kl_max")
_MINIMA, _SUMS = ("ratio_min",), ("nonfinite_rows",)
# standard deviations do not combine by averaging, and the complement says nothing new
_DROPPED = ("ratio_std", "unmasked_fraction")


def micro_vector(out: LossOutput, objective: Objective, elements: int, *, on_policy: bool) -> Tensor:
    """All numbers of one micro-batch of rows of ``elements`` latent elements as a float32 vector.

    Before the first update of a rollout (``on_policy``) ratios are 1 up to the rounding of the replay: then no row
    counts as moved, and the largest ``|log_ratio|`` is the noise floor below which thresholds mean nothing.
    """
    rows, zero = out.rows, torch.zeros_like(out.loss)
    moved = zero if on_policy else (rows.ratio != 1).to(zero.dtype).mean()
    floor = rows.log_ratio.abs().max() if on_policy else zero
    mismatch = mismatch_vector(out, objective, elements, on_policy=on_policy)
    return torch.cat([out.summary, torch.stack([moved, floor]), mismatch]).float()


def reduce_micro(
    vectors: Sequence[Tensor] | Tensor, shares: Sequence[float] | Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Metrics of several micro-batches as 0-d tensors: extremes and counts as such, others as means weighted by rows.

    Args:
        vectors: from :func:`micro_vector`.
        shares: weight of each micro-batch.
        names: metrics that mean something for the objective (``LossOutput.metric_names``).
    """
    table = torch.stack(list(vectors))
    weights = torch.as_tensor(shares, device=table.device)
    values = {}
    for name in ("loss", *names, *_EXTRA):
        line = table[:, METRICS.index(name)]
        if name in MISMATCH_METRICS:
            # of the rollout's first update alone
            said = ~line.isnan()
            line, own = torch.where(said, line, 0.0), torch.where(said, weights, 0.0)
            values[name] = line.max() if name in _MAXIMA else (line * own).sum() / own.sum()
        elif name in _MAXIMA:
            values[name] = line.max()
        elif name in _MINIMA:
            values[name] = line.min()
        elif name in _SUMS:
            values[name] = line.sum()
        elif name not in _DROPPED:
            values[name] = (line * weights).sum() / weights.sum()
    return values


def read_iteration(
    iteration: int,
    rollout: Rollout,
    results: dict[str, list],
    config: FlowDPPOConfig,
    workers: Workers,
    names: Sequence[str],
) -> tuple[dict[str, float], list[str]]:
    """Metrics of one iteration as floats and the lines of its row log; all numbers are read from the device at once.

    Args:
        results: what the updates returned, joined.
        names: metrics that mean something for the objective.
    """
    total = weighted_reward(rollout.rewards, config.advantage.reward_weights)
    spread, flat = group_spread(total, config.sampling.group_size)
    steps = {name: torch.stack([step[name] for step in results["steps"]]) for name in results["steps"][0]}
    vectors = workers.gather(torch.stack(results["vectors"]))
    # rows of different calls may have different sizes
    sizes = torch.tensor([results["shares"], results["elements"]], dtype=torch.float64).T.to(total.device)
    shares, elements = workers.gather(sizes).float().unbind(1)
    reduced = reduce_micro(vectors, shares, names)
    # the paper's KL is a sum over the latent: nats per denoising step
    nats = {
        name.replace("mean", "nats"): (vectors[:, METRICS.index(name)] * elements * shares).sum() / shares.sum()
        for name in ("kl_new_old_mean", "kl_ref_mean")
        if name in reduced
    }
    values = {
        **reduced,
        **nats,
        "reward": total.nanmean(),
        "reward_std": spread.mean(),
        "zero_std_fraction": flat.float().mean(),
        "abstained_fraction": total.isnan().float().mean(),
        "grad_norm": steps["grad_norm"].mean(),
        "kl_last_update": steps["kl"][-1],
        "skipped_updates": steps["skipped"].sum(),
        "stopped_updates": steps["stopped"].sum(),
    }
    if len(rollout.rewards) > 1:
        values |= {f"reward/{name}": value.nanmean() for name, value in rollout.rewards.items()}
    scalars = torch.stack([value.float() for value in values.values()])
    parts = results["parts"] if config.run.row_log else []
    numbers = workers.gather(torch.cat([part.numbers.flatten() for part in parts])) if parts else scalars[:0]
    read = torch.cat([scalars, rollout.advantages.flatten(), numbers]).tolist()
    metrics = dict(zip(values, read))
    first = rollout.trajectories[0]
    rows = len(total) * len(first.steps) * config.optimizer.inner_epochs
    everywhere = workers.gather_objects([part.without_numbers() for part in parts])
    width = rollout.advantages.numel() // len(total)
    advantages, numbers_read = read[len(values) :], read[len(values) + len(total) * width :]
    of_rows = [advantages[row * width : (row + 1) * width] for row in range(len(total))]
    lines = list(row_lines(iteration, everywhere, numbers_read, of_rows))
    return {"iteration": iteration, **metrics, "rows": rows}, lines


def peak_memory(device: torch.device) -> dict[str, float]:
    """``peak_memory_bytes`` of a GPU since this was asked before; nothing of a CPU, which does not count."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_bytes": peak}
