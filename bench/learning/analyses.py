"""From loaded runs to numbers: what each claim is measured by. No analysis looks at anything but run files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .methods import METHODS
from .requests import Cell
from .results import Run
from .statistics import Estimate, estimate, paired

Seeds = dict[int, float]


@dataclass(frozen=True)
class Contrast:
    """One comparison of a claim: what is subtracted, and the paired estimate (positive: as the paper says)."""

    claim: str
    text: str
    difference: Estimate | None


def plain(runs: Iterable[Run], task: str) -> list[Run]:
    """The frontier's runs of a task: one reward, two inner epochs, no guidance, all weights trained."""
    chosen = []
    for run in runs:
        cell = run.cell
        if cell == Cell(task, cell.method, cell.bound, rate=cell.rate, seed=cell.seed):
            chosen.append(run)
    return chosen


def curve(run: Run, value: Callable[[Mapping], float]) -> tuple[np.ndarray, np.ndarray]:
    """A measure of all evaluations of a run against its drift, nats."""
    places = run.result["evaluations"]
    return np.array([place["drift_nats"] for place in places]), np.array([value(place) for place in places])


def reward_of(place: Mapping, prompts: str = "trained") -> float:
    """Mean of the optimised rewards at an evaluation."""
    scores = place[prompts]["rewards"].values()
    return sum(scores) / len(scores)


def crossing(along: np.ndarray, measured: np.ndarray, level: float) -> float | None:
    """``measured`` where ``along`` first reaches ``level``, linear between evaluations; None if it never does."""
    for place in range(1, len(along)):
        if along[place - 1] <= level <= along[place]:
            share = (level - along[place - 1]) / max(along[place] - along[place - 1], 1e-12)
            return float(measured[place - 1] + share * (measured[place] - measured[place - 1]))
    return None


def best_at_drift(runs: Sequence[Run], budget: float) -> dict[str, Seeds]:
    """Per method and seed the highest reward that any run of its sweep had when its drift reached ``budget`` nats, or
    before, if that run never drifted so far. Every method has as many runs to choose from."""
    found: dict[str, Seeds] = {}
    for method, seeds in _by_seed(runs).items():
        for seed, members in seeds.items():
            rewards = []
            for run in members:
                drift, reward = curve(run, reward_of)
                inside = reward[drift <= budget]
                at = crossing(drift, reward, budget)
                rewards.append(at if at is not None else float(inside[-1]))
            found.setdefault(method, {})[seed] = max(rewards)
    return found


def at_reward(
    runs: Sequence[Run], level: float, value: Callable[[Mapping], float], *, least: bool = True
) -> dict[str, Seeds]:
    """Per method and seed a measure where the reward first reaches ``level``: the best over the method's sweep.

    Runs that never reach the level are left out; a method and seed without any has no entry.
    """
    found: dict[str, Seeds] = {}
    for method, seeds in _by_seed(runs).items():
        for seed, members in seeds.items():
            values = []
            for run in members:
                _, reward = curve(run, reward_of)
                _, measured = curve(run, value)
                at = crossing(reward, measured, level)
                if at is not None:
                    values.append(at)
            if values:
                found.setdefault(method, {})[seed] = min(values) if least else max(values)
    return found


def _by_seed(runs: Iterable[Run]) -> dict[str, dict[int, list[Run]]]:
    """Runs by method and seed, only for seeds whose sweep is complete, so that nobody chooses from fewer."""
    found: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.cell.method, {}).setdefault(run.cell.seed, []).append(run)
    full = {method: max(len(members) for members in seeds.values()) for method, seeds in found.items()}
    ordered = sorted(found, key=list(METHODS).index)
    return {m: {s: found[m][s] for s in sorted(found[m]) if len(found[m][s]) == full[m]} for m in ordered}


def by_seed(runs: Iterable[Run], value: Callable[[Run], float], **cell: object) -> Seeds:
    """A measure by seed, of the runs whose cell has the given entries."""
    chosen = (run for run in runs if all(getattr(run.cell, key) == entry for key, entry in cell.items()))
    return {run.cell.seed: value(run) for run in chosen}


def fall(run: Run, width: int = 3) -> float:
    """Largest fall of the rollouts' reward, a running mean of ``width``, from its own best so far."""
    smooth = np.convolve(run.history["reward"], np.ones(width) / width, "valid")
    return float((np.maximum.accumulate(smooth) - smooth).max())


def smallest_gain(run: Run) -> float:
    return min(run.gains().values())


def held_out(name: str) -> Callable[[Mapping], float]:
    """A quality measure on held-out prompts."""
    return lambda place: place["held_out"][name]


def pooled_noise(runs: Iterable[Run]) -> list[dict[str, float]]:
    """Noise tables of several runs as one: per KL bin weighted by rows, with the spread of ``z`` put together."""
    bins: dict[int, list[dict[str, float]]] = {}
    for run in runs:
        for entry in run.result["rows"]["noise"]:
            bins.setdefault(round(4 * np.log10(entry["kl"]) - 0.5), []).append(entry)
    table = []
    for place in sorted(bins):
        entries = bins[place]
        weight = np.array([entry["rows"] for entry in entries], float)
        weight /= weight.sum()

        def mean(values: Sequence[float], weight: np.ndarray = weight) -> float:
            return float(np.dot(weight, values))

        def spread(name: str, entries: list = entries) -> float:
            centre = mean([entry[f"{name}_mean"] for entry in entries])
            return mean([entry[f"{name}_std"] ** 2 + (entry[f"{name}_mean"] - centre) ** 2 for entry in entries]) ** 0.5

        table.append(
            {
                "rows": sum(entry["rows"] for entry in entries),
                "kl": mean([entry["kl"] for entry in entries]),
                "log_ratio_mean": mean([entry["log_ratio_mean"] for entry in entries]),
                "log_ratio_std": spread("log_ratio"),
                "z_std": spread("z"),
            }
        )
    return table


def spurious(runs: Iterable[Run], clip: float) -> tuple[Seeds, Seeds, Seeds]:
    """By seed, over runs: share dropped by the clip, share of it that is spurious, and the matched threshold (nats)."""
    dropped, wrong, threshold = {}, {}, {}
    for run in runs:
        for entry in run.result["rows"]["decisions"]:
            if entry["clip"] == clip:
                dropped[run.cell.seed], wrong[run.cell.seed] = entry["dropped"], entry["spurious"]
                threshold[run.cell.seed] = entry["threshold"]
    return dropped, wrong, threshold


def difference(one: Mapping[str, Seeds], left: str, right: str, sign: float = 1.0) -> Estimate | None:
    """Paired ``sign * (left - right)`` of two methods."""
    if left not in one or right not in one:
        return None
    return paired(
        {seed: sign * value for seed, value in one[left].items()},
        {seed: sign * value for seed, value in one[right].items()},
    )


def show(values: Seeds | Estimate | None, digits: int = 2) -> str:
    """``median [low, high] n=count`` for a table; a dash where there is nothing."""
    if not values:
        return "-"
    found = values if isinstance(values, Estimate) else estimate(list(values.values()))
    number = f"{found.median:.{digits}f}"
    if found.low == found.low:
        number += f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"{number} n={found.count}"


def tuned(runs: Iterable[Run], method: str, chosen: Mapping[str, Mapping]) -> list[Run]:
    """Runs of a method at the value that tuning chose."""
    entry = {"bound": None, "rate": 1.0, **chosen[method]}
    return [
        r for r in runs if r.cell.method == method and (r.cell.bound, r.cell.rate) == (entry["bound"], entry["rate"])
    ]
