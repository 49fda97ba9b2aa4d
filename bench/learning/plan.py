"""The sweep: which cells, in which order.

Earlier stages tell more, and within a stage all cells get one seed before any gets the next, so that an unfinished
sweep has fewer seeds and not fewer methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .methods import METHODS
from .requests import Cell
from .results import Run

EPOCHS = (1, 2, 4, 8)
RATES = (1.0, 0.5, 0.25, 0.125)
# the order of the sweep: task, studies, seeds
STAGES = (
    ("digits", ("tuned",), range(0, 3)),
    ("shapes", ("pair",), range(0, 3)),
    ("digits", ("pair",), range(3, 6)),
    ("digits", ("pair_three_rewards", "pair_four_epochs"), range(0, 3)),
    ("shapes", ("tuned",), range(0, 3)),
    ("digits", ("tuned",), range(3, 6)),
    ("digits", ("masks", "three_rewards", "reuse_pair"), range(0, 1)),
    ("digits", ("kl_weight", "guidance"), range(0, 2)),
    ("digits", ("masks", "three_rewards", "reuse_pair"), range(1, 3)),
    ("digits", ("tuned",), range(6, 8)),
    ("digits", ("kl_weight", "guidance"), range(0, 3)),
    ("shapes", ("tuned",), range(3, 5)),
    ("digits", ("frontier", "threshold", "two_rewards"), range(0, 3)),
    ("digits", ("reuse_pair", "three_rewards", "masks"), range(3, 8)),
    ("shapes", ("tuned",), range(5, 8)),
    ("shapes", ("three_rewards", "reuse", "masks"), range(0, 3)),
    ("digits", ("frontier", "threshold", "two_rewards", "kl_weight", "guidance"), range(3, 8)),
    ("digits", ("reuse",), range(0, 8)),
    ("shapes", ("frontier",), range(0, 3)),
    ("shapes", ("three_rewards", "reuse", "masks", "frontier"), range(3, 8)),
)
# subsets of other studies that only say what comes first
_FIRST = ("pair", "pair_four_epochs", "pair_three_rewards")


def values(method: str, settings: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """What a method's sweep varies, as entries of :class:`Cell`: as many for each method."""
    kind = METHODS[method].bound
    if kind is None:
        # nothing to bound: the learning rate is what can be chosen
        return [{"bound": None, "rate": rate} for rate in RATES]
    return [{"bound": bound} for bound in settings["bounds"][method]]


def frontier(task: str, settings: Mapping[str, Any]) -> list[Cell]:
    """Every method over its sweep."""
    return [Cell(task, method, **entry) for method in METHODS for entry in values(method, settings)]  # type: ignore[arg-type]


def tuned(task: str, method: str, settings: Mapping[str, Any]) -> Cell:
    """A method with the value that tuning chose."""
    return Cell(task, method, **settings["tuned"][method])


def studies(task: str, settings: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """Cells by study, without seeds; a cell may serve several studies and is run once."""
    best = {method: tuned(task, method, settings) for method in METHODS}
    several = [method for method in METHODS if method != "symmetric"]
    pair = ("flow_grpo", "flow_dppo")
    found = {
        "tuned": list(best.values()),
        "pair": [best[method] for method in pair],
        "pair_four_epochs": [replace(best[method], inner_epochs=4) for method in pair],
        "pair_three_rewards": [replace(best[method], rewards=3) for method in pair],
        "frontier": frontier(task, settings),
        "masks": [
            Cell(task, name, bound) for bound in settings["bounds"]["flow_dppo"] for name in ("flow_dppo", "symmetric")
        ],
        "two_rewards": [replace(best[method], rewards=2) for method in several],
        "three_rewards": [replace(best[method], rewards=3) for method in several],
        "reuse_pair": [replace(best[method], inner_epochs=count) for count in EPOCHS for method in pair],
        "reuse": [replace(best[method], inner_epochs=count) for count in EPOCHS for method in several],
    }
    if task == "digits":
        thresholds = [*settings["more_thresholds"], *settings["bounds"]["flow_dppo"]]
        found["threshold"] = [Cell(task, "flow_dppo", bound=bound) for bound in sorted(thresholds)]
        found["kl_weight"] = [
            replace(best[method], kl_weight=weight) for weight in settings["kl_weights"] for method in pair
        ]
        guided = ("flow_grpo", "flow_dppo", "flow_cps", "flow_dppo_cps", "unclipped")
        found["guidance"] = [replace(best[method], guidance=settings["guidance"]) for method in guided]
    else:
        # the larger task costs more: eight epochs and two rewards are left out
        found["reuse"] = [cell for cell in found["reuse"] if cell.inner_epochs < 8]
    return found


def by_study(settings: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """All runs by task and study, with seeds."""
    found: dict[str, dict[str, Cell]] = {}
    for task, names, seeds in STAGES:
        cells = studies(task, settings)
        for name in (name for name in names if name not in _FIRST):
            runs = found.setdefault(f"{task} {name}", {})
            runs |= {run.name: run for seed in seeds for run in (replace(cell, seed=seed) for cell in cells[name])}
    return {study: list(runs.values()) for study, runs in found.items()}


def sweep(settings: Mapping[str, Any]) -> list[Cell]:
    """All runs in order, each once: stage by stage, seed by seed."""
    order: dict[str, Cell] = {}
    for task, names, seeds in STAGES:
        cells = studies(task, settings)
        for seed in seeds:
            for name in names:
                for cell in cells[name]:
                    run = replace(cell, seed=seed)
                    order.setdefault(run.name, run)
    return list(order.values())


def tuning(settings: Mapping[str, Any]) -> list[Cell]:
    """Runs on other seeds, from which each method's value is chosen; the same number for each."""
    cells = frontier("digits", settings)
    return [replace(cell, seed=seed) for seed in settings["tuning_seeds"] for cell in cells]


def choose(runs: Iterable[Run]) -> dict[str, dict[str, float | None]]:
    """Per method the value whose runs end with the highest mean reward on trained prompts."""
    scores: dict[str, dict[tuple, list[float]]] = {}
    for run in runs:
        entry = (run.cell.bound, run.cell.rate)
        scores.setdefault(run.cell.method, {}).setdefault(entry, []).append(run.reward())
    chosen = {}
    for method, entries in scores.items():
        bound, rate = max(entries, key=lambda entry: sum(entries[entry]) / len(entries[entry]))
        chosen[method] = {"bound": bound, "rate": rate}
    return chosen


def quick(settings: Mapping[str, Any]) -> list[Cell]:
    """One short run of every method."""
    return [tuned("digits", method, settings) for method in METHODS]
