"""Tables of docs/learning.md, each a function from loaded runs and frozen settings to markdown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import analyses, paths, plan
from .analyses import Contrast, Seeds, by_seed, difference, show
from .methods import METHODS
from .results import Run, load
from .statistics import estimate, verdict
from .tasks import load_task

# drift budgets (nats per image) and reward levels at which methods are compared; set after tuning, before the sweep
BUDGETS = "drift_budgets"
LEVELS = "reward_levels"


def _reward(run: Run) -> float:
    return run.reward()


def _drift(run: Run) -> float:
    return run.drift


def _dropped_percent(run: Run) -> float:
    dropped = run.history["masked_fraction"]
    return 100 * sum(dropped) / len(dropped)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def present_tasks(runs: Sequence[Run]) -> list[str]:
    return [task for task in ("digits", "shapes") if any(run.cell.task == task for run in runs)]


def progress(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """How much of the planned sweep is in the folder."""
    have = {run.cell.name for run in runs}
    rows = []
    everything: dict[str, None] = {}
    for study, cells in plan.by_study(settings).items():
        everything |= dict.fromkeys(cell.name for cell in cells)
        seeds: dict[tuple, int] = {}
        for cell in cells:
            seeds[cell.group] = seeds.get(cell.group, 0) + (cell.name in have)
        low, high = min(seeds.values()), max(seeds.values())
        count = str(low) if low == high else f"{low} to {high}"
        rows.append([study, str(len(seeds)), f"{count} of {len(cells) // len(seeds)}"])
    done = len(have & set(everything))
    rows.append(["all, each run once", str(len(everything)), f"{done} runs done"])
    rows.append(["stopped without finite numbers", "-", str(sum(run.failed for run in runs))])
    return markdown(["study", "cells", "seeds per cell"], rows)


def choices(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """Swept and chosen values, in nats and as the trainer's per-element numbers."""
    rows = []
    for method, about in METHODS.items():
        entry = settings["tuned"][method]
        if about.bound is None:
            swept, chosen = ", ".join(f"{rate:g}" for rate in plan.RATES), f"{entry.get('rate', 1):g}"
            rows.append([about.label, "learning rate, factor", swept, chosen, "-", "-"])
            continue
        swept, bound = ", ".join(f"{value:g}" for value in settings["bounds"][method]), entry["bound"]
        per = [f"{bound / load_task(task).elements:.2g}" for task in ("digits", "shapes")]
        rows.append([about.label, f"{about.bound}, nats", swept, f"{bound:g}", *per])
    return markdown(["method", "varied", "swept", "chosen", "per element, digits", "per element, shapes"], rows)


def tuning(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """The tuning runs, from which values were chosen: rewards and drifts of each seed. Not among ``runs``."""
    found = load(paths.TUNING)
    rows = []
    for method, about in METHODS.items():
        cells = sorted({(run.cell.bound or 0, run.cell.rate) for run in found if run.cell.method == method})
        for bound, rate in cells:
            members = [r for r in found if (r.cell.method, r.cell.bound or 0, r.cell.rate) == (method, bound, rate)]
            members.sort(key=lambda run: run.cell.seed)
            value = f"{bound:g}" if about.bound else f"rate x {rate:g}"
            rewards = ", ".join(f"{run.reward():.2f}" for run in members)
            drifts = ", ".join(f"{run.drift:.0f}" for run in members)
            rows.append([about.label, value, rewards, drifts])
    return markdown(["method", "value", "final reward, by seed", "drift, nats, by seed"], rows)


def pretrained(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """Where runs start: measures of the pretrained models, the same in every run of a task."""
    rows = []
    for task in present_tasks(runs):
        run = analyses.plain(runs, task)[0]
        for name, label in (("trained", "trained on"), ("held_out", "held out")):
            place = run.before[name]
            rows.append(
                [task, label, f"{place['rewards']['judge']:.2f}", f"{100 * place['accuracy']:.1f} %",
                 f"{place['frechet']:.2f}", f"{place['diversity']:.2f}"]
            )  # fmt: skip
    return markdown(["task", "prompts", "judge reward", "independent judge", "Frechet distance", "diversity"], rows)


def at_the_end(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """The tuned runs with one reward: reward, drift and quality after training."""
    rows = []
    for task in present_tasks(runs):
        for method, about in METHODS.items():
            members = analyses.tuned(analyses.plain(runs, task), method, settings["tuned"])
            if not members:
                continue
            values: list[Callable[[Run], float]] = [
                _reward,
                _drift,
                lambda run: 100 * run.after["held_out"]["accuracy"],
                lambda run: run.after["held_out"]["frechet"],
                lambda run: run.after["trained"]["diversity"],
            ]
            numbers = [show(by_seed(members, value), digits) for value, digits in zip(values, (2, 0, 1, 2, 2))]
            rows.append([task, about.label, *numbers])
    columns = ["task", "method", "judge reward", "drift, nats", "held out: independent judge, %", "held out: Frechet",
               "diversity"]  # fmt: skip
    return markdown(columns, rows)


def choices_of(runs: Sequence[Run], task: str, settings: Mapping[str, Any]) -> dict[str, tuple[list[Run], int]]:
    """From which runs a method's best is taken, and how many there are per seed: the tuned one, or its whole sweep."""
    plain = analyses.plain(runs, task)
    tuned = [run for method in METHODS for run in analyses.tuned(plain, method, settings["tuned"])]
    cells = {cell.group for cell in plan.frontier(task, settings)}
    sweep = [run for run in plain if run.cell.group in cells]
    return {"tuned": (tuned, 1), "sweep": (sweep, len(cells) // len(METHODS))}


def frontier(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """Best reward within a drift budget."""
    rows = []
    for task in present_tasks(runs):
        for over, (members, count) in choices_of(runs, task, settings).items():
            found = [analyses.best_at_drift(members, budget, count) for budget in settings[BUDGETS][task]]
            for method, about in METHODS.items():
                if any(method in entries for entries in found):
                    rows.append([task, over, about.label, *(show(entries.get(method)) for entries in found)])
    names = [" / ".join(f"{settings[BUDGETS][task][place]:g}" for task in present_tasks(runs)) for place in range(3)]
    return markdown(["task", "best of", "method", *(f"reward at {name} nats" for name in names)], rows)


def forgetting(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """Held-out quality where the reward first reaches a level."""
    rows = []
    for task in present_tasks(runs):
        for over, (members, count) in choices_of(runs, task, settings).items():
            for level in settings[LEVELS][task]:
                frechet = analyses.at_reward(members, level, analyses.held_out("frechet"), count)
                accuracy = analyses.at_reward(members, level, analyses.held_out("accuracy"), count, least=False)
                for method, about in METHODS.items():
                    percent = {seed: 100 * value for seed, value in accuracy.get(method, {}).items()}
                    if percent:
                        numbers = [show(frechet.get(method)), show(percent, 1)]
                        rows.append([task, over, f"{level:g}", about.label, *numbers])
    columns = ["task", "best of", "at reward", "method", "held out: Frechet", "held out: independent judge, %"]
    return markdown(columns, rows)


def balance(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """Gains of two and three rewards together, in standard deviations of the pretrained model's pages."""
    rows = []
    for task in present_tasks(runs):
        for count in (2, 3):
            for method, about in METHODS.items():
                members = several(runs, task, method, count)
                if members:
                    gains = [
                        f"{name} {show(by_seed(members, lambda run, name=name: run.gains()[name]))}"
                        for name in members[0].gains()
                    ]
                    smallest = show(by_seed(members, analyses.smallest_gain))
                    rows.append([task, str(count), about.label, "; ".join(gains), smallest])
    return markdown(["task", "rewards", "method", "gain of each, sd", "smallest gain, sd"], rows)


def several(runs: Sequence[Run], task: str, method: str, count: int) -> list[Run]:
    """Runs of a method with several rewards."""
    return [run for run in runs if (run.cell.task, run.cell.method, run.cell.rewards) == (task, method, count)]


def reused(runs: Sequence[Run], task: str, method: str, epochs: int, settings: Mapping[str, Any]) -> list[Run]:
    """Tuned runs of a method with that many inner epochs and one reward."""
    entry = {"bound": None, "rate": 1.0, **settings["tuned"][method]}
    cell = plan.Cell(task, method, entry["bound"], rate=entry["rate"], inner_epochs=epochs)
    return [run for run in runs if run.cell.group == cell.group]


def reuse(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    rows = []
    for task in present_tasks(runs):
        for method, about in METHODS.items():
            for epochs in plan.EPOCHS:
                members = reused(runs, task, method, epochs, settings)
                if members:
                    values: list[Callable[[Run], float]] = [
                        _reward, analyses.fall, _drift,
                    ]  # fmt: skip
                    numbers = [show(by_seed(members, value), digits) for value, digits in zip(values, (2, 2, 0))]
                    rows.append([task, about.label, str(epochs), *numbers])
    return markdown(["task", "method", "inner epochs", "final reward", "largest fall", "drift, nats"], rows)


def noise(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """Measured spread of the log-ratio against its prediction, per element, by KL."""
    rows = []
    for task in present_tasks(runs):
        elements = load_task(task).elements
        members = [r for r in analyses.plain(runs, task) if r.cell.method in ("flow_grpo", "flow_dppo", "unclipped")]
        for entry in analyses.pooled_noise(members):
            if entry["rows"] < 1000:
                continue
            predicted = (2 * entry["kl"]) ** 0.5
            rows.append(
                [task, f"{entry['kl']:.2g}", f"{entry['kl'] / elements:.2g}",
                 f"{entry['log_ratio_std'] / elements:.2g}",
                 f"{predicted / elements:.2g}", f"{entry['log_ratio_std'] / predicted:.2f}",
                 f"{predicted / entry['kl']:.1f}", str(entry["rows"])]
            )  # fmt: skip
    columns = ["task", "KL of the row, nats", "KL per element", "std(log r), measured", "sqrt(2D/N)",
               "measured / predicted",
               "std over mean", "rows"]  # fmt: skip
    return markdown(columns, rows)


def decisions(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    """Clips that are noise: in the Flow-GRPO runs at the tuned clip."""
    rows = []
    for task in present_tasks(runs):
        members = analyses.tuned(analyses.plain(runs, task), "flow_grpo", settings["tuned"])
        for clip in settings["clips"]:
            dropped, wrong, threshold = analyses.spurious(members, clip)
            if dropped:
                percent = [{seed: 100 * value for seed, value in one.items()} for one in (dropped, wrong)]
                rows.append([task, f"{clip:g}", show(percent[0], 1), show(threshold, 3), show(percent[1], 1)])
    columns = ["task", "clip range, nats", "dropped, % of rows", "KL that drops as many, nats",
               "spurious = missed, % of dropped"]  # fmt: skip
    return markdown(columns, rows)


def symmetric(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    rows = []
    for task in present_tasks(runs):
        plain = analyses.plain(runs, task)
        for bound in settings["bounds"]["flow_dppo"]:
            cells = [
                [r for r in plain if (r.cell.method, r.cell.bound) == (m, bound)] for m in ("flow_dppo", "symmetric")
            ]
            if not all(cells):
                continue
            rewards = {name: by_seed(group, _reward) for name, group in zip("as", cells)}
            drifts = [show(by_seed(group, _drift), 0) for group in cells]
            rows.append(
                [task, f"{bound:g}", show(rewards["a"]), show(rewards["s"]), show(difference(rewards, "a", "s")),
                 *drifts]
            )  # fmt: skip
    columns = ["task", "threshold, nats", "asymmetric: reward", "symmetric: reward", "difference", "asymmetric: drift",
               "symmetric: drift"]  # fmt: skip
    return markdown(columns, rows)


def threshold(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    rows = []
    for task in present_tasks(runs):
        plain = [run for run in analyses.plain(runs, task) if run.cell.method == "flow_dppo"]
        for bound in sorted({run.cell.bound for run in plain}):
            group = [run for run in plain if run.cell.bound == bound]
            dropped = by_seed(group, _dropped_percent)
            numbers = [show(by_seed(group, _reward)), show(by_seed(group, _drift), 0)]
            rows.append([task, f"{bound:g}", f"{bound / load_task(task).elements:.2g}", show(dropped, 1), *numbers])
    return markdown(["task", "threshold, nats", "per element", "dropped rows, %", "reward", "drift, nats"], rows)


def kl_weight(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    rows = []
    for method in ("flow_grpo", "flow_dppo"):
        for weight in settings["kl_weights"]:
            group = [run for run in runs if (run.cell.method, run.cell.kl_weight) == (method, weight)]
            if group:
                numbers = [
                    show(by_seed(group, _reward)), show(by_seed(group, _drift), 0),
                    show(by_seed(group, lambda r: r.after["held_out"]["frechet"])),
                ]  # fmt: skip
                rows.append([METHODS[method].label, f"{weight:g}", *numbers])
    return markdown(["method (LoRA, digits)", "KL weight", "reward", "drift, nats", "held out: Frechet"], rows)


def guidance(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    rows = []
    for method, about in METHODS.items():
        guided = [run for run in runs if run.cell.method == method and run.cell.guidance != 1]
        without = analyses.tuned(analyses.plain(runs, "digits"), method, settings["tuned"])
        for label, group in (("without", without), (f"scale {settings['guidance']:g}", guided)):
            if guided and group:
                gain = by_seed(group, lambda run: run.reward() - run.reward(0))
                numbers = [show(gain), show(by_seed(group, _drift), 0), show(by_seed(group, analyses.fall))]
                rows.append([about.label, label, *numbers])
    return markdown(["method (digits)", "guidance", "gain of reward", "drift, nats", "largest fall"], rows)


def contrasts(runs: Sequence[Run], settings: Mapping[str, Any]) -> list[tuple[str, Contrast]]:
    """Every claim as paired differences, signed so that positive is what the paper says."""
    found: list[tuple[str, Contrast]] = []
    pairs = (("flow_dppo", "flow_grpo"), ("flow_dppo", "grpo_guard"), ("flow_dppo_cps", "flow_cps"))
    with_unclipped = (*pairs, ("flow_dppo", "unclipped"))
    for task in present_tasks(runs):
        plain = analyses.plain(runs, task)

        def compare(
            claim: str,
            text: str,
            entries: Mapping[str, Seeds],
            which: Iterable[tuple[str, str]] = pairs,
            sign: float = 1.0,
            task: str = task,
        ) -> None:
            for one, other in which:
                names = f"{METHODS[one].label} - {METHODS[other].label}"
                found.append((task, Contrast(claim, f"{text}: {names}", difference(entries, one, other, sign))))

        def over(members: Callable[[str], list[Run]], value: Callable[[Run], float]) -> dict[str, Seeds]:
            return {method: by_seed(members(method), value) for method in METHODS}

        def chosen(method: str, plain: list[Run] = plain) -> list[Run]:
            return analyses.tuned(plain, method, settings["tuned"])

        compare("higher reward", "final reward", over(chosen, _reward), with_unclipped)
        compare("less drift", "nats less at the end", over(chosen, _drift), with_unclipped, -1)
        budget = settings[BUDGETS][task][1]
        for choice, (members, number) in choices_of(runs, task, settings).items():
            best = analyses.best_at_drift(members, budget, number)
            compare("higher reward at equal drift", f"at {budget:g} nats, {choice}", best, with_unclipped)
            for level in settings[LEVELS][task]:
                frechet = analyses.at_reward(members, level, analyses.held_out("frechet"), number)
                text = f"held-out Frechet less at reward {level:g}, {choice}"
                compare("less forgetting", text, frechet, with_unclipped, -1)
        for count in (2, 3):
            smallest = over(lambda m, t=task, n=count: several(runs, t, m, n), analyses.smallest_gain)  # type: ignore[misc]
            compare("balanced objectives", f"smallest of {count} gains, sd", smallest)
        for epochs in (4, 8):
            again = functools.partial(reused, runs, task, epochs=epochs, settings=settings)
            compare("stable reuse", f"final reward, {epochs} inner epochs", over(again, _reward))
            compare("stable reuse", f"largest fall less, {epochs} inner epochs", over(again, analyses.fall), sign=-1)
        clipping = chosen("flow_grpo")
        above = {seed: value - 1 for seed, value in by_seed(clipping, analyses.noise_over_signal).items()}
        _, wrong, _ = analyses.spurious(clipping, settings["tuned"]["flow_grpo"]["bound"])
        for text, values in (
            ("spread of log r over its mean, above 1: Flow-GRPO", above),
            ("share of clipped rows that a mask dropping as many keeps: Flow-GRPO", wrong),
        ):
            found.append(
                (task, Contrast("clipping is noisy", text, estimate(list(values.values())) if values else None))
            )
        for bound in settings["bounds"]["flow_dppo"]:
            rewards = over(
                lambda m, b=bound, p=plain: [r for r in p if (r.cell.method, r.cell.bound) == (m, b)], _reward
            )  # type: ignore[misc]
            compare("asymmetry matters", f"final reward at {bound:g} nats", rewards, [("flow_dppo", "symmetric")])
    return found


def claims(runs: Sequence[Run], settings: Mapping[str, Any]) -> str:
    rows = [
        [one.claim, task, one.text, show(one.difference), verdict(one.difference)]
        for task, one in sorted(contrasts(runs, settings), key=lambda entry: _ORDER.index(entry[1].claim))
        if one.difference is not None
    ]
    return markdown(["claim", "task", "measured (positive: as claimed)", "difference", "verdict"], rows)


_ORDER = (
    "higher reward",
    "less drift",
    "higher reward at equal drift",
    "less forgetting",
    "balanced objectives",
    "stable reuse",
    "clipping is noisy",
    "asymmetry matters",
)


TABLES: dict[str, Callable[[Sequence[Run], Mapping[str, Any]], str]] = {
    "progress": progress,
    "choices": choices,
    "tuning": tuning,
    "pretrained": pretrained,
    "claims": claims,
    "end": at_the_end,
    "frontier": frontier,
    "forgetting": forgetting,
    "balance": balance,
    "reuse": reuse,
    "noise": noise,
    "decisions": decisions,
    "symmetric": symmetric,
    "threshold": threshold,
    "kl_weight": kl_weight,
    "guidance": guidance,
}
