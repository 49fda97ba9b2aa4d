"""Fills the generated tables of docs/learning.md and draws its figures, from run files alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.pages import put
from flowdppo_fast.runs import figures as style

from . import analyses, figures, mask_and_clip, paths, plan, tables
from .methods import METHODS
from .results import Run, load
from .statistics import estimate
from .tasks import load_task


def blocks(runs: Sequence[Run], settings: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by the names of their places."""
    whole = [run for run in runs if not run.failed]
    return {
        f"learning:{name}": table(runs if name == "progress" else whole, settings)
        for name, table in tables.TABLES.items()
    }


def update(folder: Path, settings: Mapping[str, Any], page: Path, pictures: Path, *, check: bool) -> int:
    """Writes tables and figures; with ``check`` only looks at the tables. Returns the exit status."""
    runs = load(folder)
    status = put(page, blocks(runs, settings), check=check, program="bench.learning")
    if check or status != 0:
        return status
    held = json.loads(paths.ROWS.read_text())
    # the README's figure lies beside the folder of the page's
    for path in (*draw(runs, settings, pictures), mask_and_clip.draw(held, pictures.parent / "mask_and_clip.png")):
        print(path)
    return 0


@style.style()
def draw(runs: Sequence[Run], settings: Mapping[str, Any], folder: Path) -> list[Path]:
    """All figures for which there are runs."""
    whole = [run for run in runs if not run.failed]
    made = [figure(whole, settings, folder / f"{name}.png") for name, figure in _FIGURES.items()]
    return [path for path in made if path is not None]


_REWARD = "judge reward on trained prompts\n[margins of a real page]"


def _drift(place: Mapping) -> float:
    return place["drift_nats"]


def _all(run: Run) -> Sequence[Mapping]:
    return run.result["evaluations"]


def _frontier(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> Path | None:
    axes = (_drift, analyses.reward_of), (figures.DRIFT, _REWARD)
    return figures.along_training(runs, tables.present_tasks(runs), *axes, path, settings["tuned"], _all)


def _forgetting(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> Path | None:
    label = "Frechet distance on held-out prompts\n[feature variances]"
    axes = (analyses.reward_of, analyses.held_out("frechet")), (_REWARD, label)
    return figures.along_training(runs, tables.present_tasks(runs), *axes, path, settings["tuned"], analyses.alike)


def _hacking(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> Path | None:
    label = "held-out prompts that an independent\njudge reads as asked [share]"
    axes = (analyses.reward_of, analyses.held_out("accuracy")), (_REWARD, label)
    return figures.along_training(runs, tables.present_tasks(runs), *axes, path, settings["tuned"], _all)


def _balance(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> Path | None:
    sets = [(task, count) for task in tables.present_tasks(runs) for count in (2, 3)]
    found = []
    for task, count in sets:
        values = {}
        for method in METHODS:
            members = tables.several(runs, task, method, count)
            if members:
                values[method] = {name: [run.gains()[name] for run in members] for name in members[0].gains()}
        if values:
            found.append((task, count, values))
    if not found:
        return None
    figure, axes = style.panels(len(found), height=3.4)
    for axis, (task, count, values) in zip(axes, found):
        figures.side_by_side(values, axis, "gain\n[sd of the pretrained model's pages]")
        axis.set_title(f"{task}, {count} rewards")
    style.legend(figure, axes)
    return style.save(figure, path)


def _reuse(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> Path | None:
    tasks = [t for t in tables.present_tasks(runs) if any(r.cell.task == t and r.cell.inner_epochs != 2 for r in runs)]
    if not tasks:
        return None
    figure, axes = style.panels(2 * len(tasks), height=3.6)
    values: list[tuple[str, Callable[[Run], float]]] = [
        ("final judge reward\n[margins of a real page]", lambda run: run.reward()),
        ("largest fall from the run's own best\n[margins of a real page]", analyses.fall),
    ]
    for number, task in enumerate(tasks):
        for axis, (label, value) in zip(axes[2 * number :], values):
            groups: dict[str, dict[float, list[float]]] = {}
            for method in METHODS:
                for epochs in plan.EPOCHS:
                    members = tables.reused(runs, task, method, epochs, settings)
                    if members:
                        groups.setdefault(method, {})[epochs] = [value(run) for run in members]
            groups = {method: points for method, points in groups.items() if len(points) > 1}
            figures.against(groups, axis, "inner epochs per rollout")
            run = sorted({epochs for points in groups.values() for epochs in points})
            axis.set_xticks(run, [str(epochs) for epochs in run])
            axis.minorticks_off()
            axis.set(ylabel=label, title=task)
    style.legend(figure, axes)
    return style.save(figure, path)


def _noise(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> Path | None:
    tasks = tables.present_tasks(runs)
    if not tasks:
        return None
    figure, (left, right) = style.panels(2, height=4.2)
    for task in tasks:
        look, elements = figures.TASKS[task], load_task(task).elements
        members = [r for r in analyses.plain(runs, task) if r.cell.method in ("flow_grpo", "flow_dppo", "unclipped")]
        table = [entry for entry in analyses.pooled_noise(members) if entry["rows"] >= 200]
        kl = [entry["kl"] / elements for entry in table]
        spread = [entry["log_ratio_std"] / elements for entry in table]
        left.plot(kl, spread, **look.kwargs(linestyle="", label=f"{task}, N = {elements:,}"))
        left.plot(kl, [(2 * value / elements) ** 0.5 for value in kl], color=look.colour, linestyle=":")
    left.plot([], [], color=style.INK, linestyle=":", label="sqrt(2 D / N)")
    left.set_xscale("log")
    span = left.get_xlim()
    left.plot(span, span, color=style.GREY, linestyle="--", linewidth=1.2, label="D itself: the mean is -D")
    left.set_xlim(span)
    style.log_scale(left.xaxis)
    style.log_scale(left.yaxis)
    left.set(
        title="How noisy one ratio is", xlabel="KL of a row: D [nats per element]",
        ylabel="standard deviation of log r\n[nats per element]",
    )  # fmt: skip
    for task, place_of_text in zip(tasks, ((5, 7), (-6, -15))):
        members = analyses.tuned(analyses.plain(runs, task), "flow_grpo", settings["tuned"])
        points: dict[float, tuple[float, float]] = {}
        for clip in settings["clips"]:
            dropped, wrong, _ = analyses.spurious(members, clip)
            if dropped:
                pair = (estimate(list(values.values())).median for values in (dropped, wrong))
                points[clip] = tuple(100 * value for value in pair)  # type: ignore[assignment]
        right.plot(*zip(*points.values()), **figures.TASKS[task].kwargs())
        for clip, place in points.items():
            right.annotate(
                f"{clip:g}", place, textcoords="offset points", xytext=place_of_text, ha="center", fontsize=9
            )
    right.set(
        title="Flow-GRPO: what its clip drops", xlabel="rows that the clip drops [%]\n(numbers: clip range [nats])",
        ylabel="of these near by the exact KL [%]",
    )  # fmt: skip
    right.margins(0.12)
    right.set_ylim(bottom=0)
    style.legend(figure, (left,))
    return style.save(figure, path)


_MASKS = ("flow_dppo", "flow_dppo_cps", "symmetric")


def _thresholds(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> Path | None:
    swept = {
        t: {r.cell.bound for r in analyses.plain(runs, t) if r.cell.method in _MASKS} for t in ("digits", "shapes")
    }
    tasks = [task for task, bounds in swept.items() if len(bounds) > 1]
    if not tasks:
        return None
    figure, axes = style.panels(2 * len(tasks), height=3.6)
    values: list[tuple[str, Callable[[Run], float]]] = [
        ("final judge reward\n[margins of a real page]", lambda run: run.reward()),
        (figures.DRIFT, lambda run: run.drift),
    ]
    for number, task in enumerate(tasks):
        plain = analyses.plain(runs, task)
        for axis, (label, value) in zip(axes[2 * number :], values):
            groups: dict[str, dict[float, list[float]]] = {}
            for method in _MASKS:
                for run in plain:
                    if run.cell.method == method:
                        groups.setdefault(method, {}).setdefault(run.cell.bound, []).append(value(run))
            figures.against(groups, axis, "threshold of the mask [nats per step]")
            axis.set(ylabel=label, title=task)
    style.legend(figure, axes)
    return style.save(figure, path)


_FIGURES: dict[str, Callable[[Sequence[Run], Mapping[str, Any], Path], Path | None]] = {
    "frontier": _frontier,
    "forgetting": _forgetting,
    "hacking": _hacking,
    "balance": _balance,
    "reuse": _reuse,
    "noise": _noise,
    "thresholds": _thresholds,
}
