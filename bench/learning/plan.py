"""The sweep: which cells, in which order. Earlier entries tell more, so an unfinished sweep is a smaller one, not a
lopsided one: every round adds seeds to all studies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .methods import METHODS
from .requests import Cell
from .results import Run

EPOCHS = (1, 2, 4, 8)
RATES = (1.0, 0.5, 0.25, 0.125)
# methods whose reuse, balance and so on are compared at their tuned bound
MAIN = ("flow_grpo", "flow_dppo", "grpo_guard", "flow_cps", "flow_dppo_cps", "unclipped", "symmetric")
# seeds of a round: the first of each task, then the rest
ROUNDS = {"digits": (range(0, 3), range(3, 6), range(6, 8)), "shapes": (range(0, 2), range(2, 4), range(4, 8))}


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
    best = {method: tuned(task, method, settings) for method in MAIN}
    pair = ("flow_grpo", "flow_dppo")
    found = {
        "frontier": frontier(task, settings),
        "balance": [replace(best[method], rewards=count) for count in (2, 3) for method in MAIN],
        "reuse": [replace(best[method], inner_epochs=count) for count in EPOCHS for method in MAIN],
        "guidance": [replace(best[method], guidance=settings["guidance"]) for method in MAIN[:5]],
    }
    if task == "digits":
        thresholds = [*settings["more_thresholds"], *settings["bounds"]["flow_dppo"]]
        found["threshold"] = [Cell(task, "flow_dppo", bound=bound) for bound in sorted(thresholds)]
        found["kl_weight"] = [
            replace(best[method], kl_weight=weight) for weight in settings["kl_weights"] for method in pair
        ]
    else:
        # the larger task costs more: reuse at its ends, several rewards at their most
        found["reuse"] = [cell for cell in found["reuse"] if cell.inner_epochs in (1, 4)]
        found["balance"] = [cell for cell in found["balance"] if cell.rewards == 3]
        found["guidance"] = []
    return found


def by_study(settings: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """All runs by task and study, with seeds."""
    return {
        f"{task} {study}": [replace(cell, seed=seed) for cell in cells for seeds in rounds for seed in seeds]
        for task, rounds in ROUNDS.items()
        for study, cells in studies(task, settings).items()
    }


def sweep(settings: Mapping[str, Any]) -> list[Cell]:
    """All runs in order."""
    done: dict[str, None] = {}
    order: list[Cell] = []
    for place in range(max(len(rounds) for rounds in ROUNDS.values())):
        for task, rounds in ROUNDS.items():
            for cell in _interleaved(studies(task, settings)):
                for seed in rounds[place]:
                    run = replace(cell, seed=seed)
                    if run.name not in done:
                        done[run.name] = None
                        order.append(run)
    return order


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


def _interleaved(named: Mapping[str, list[Cell]]) -> Iterator[Cell]:
    """Cells of all studies, each study at the same fraction of its length."""
    placed = [(place / len(cells), number, cell) for number, cells in enumerate(named.values()) for place, cell in enumerate(cells)]
    for _, _, cell in sorted(placed, key=lambda entry: entry[:2]):
        yield cell
