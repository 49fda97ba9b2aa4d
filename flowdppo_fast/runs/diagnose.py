"""``flowdppo diagnose RUN``: what a run's logs say about its trust region, drawn, with likely trouble named.

Reads ``metrics.jsonl``, ``rows.jsonl`` and ``config.yaml`` of a run folder of :class:`~.trainer.FlowDPPOTrainer`. What
a row is, and what its noise should be: :mod:`~.row_log`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import figures
from .logs import given
from .reading import RunFolder
from .row_log import LoggedRows, clip_against_mask

# root-mean-square rounding of standard normal numbers in bfloat16
BF16_ROUNDING = 1.7e-3
# shares and factors beyond which a number is called trouble
_NEAR_THRESHOLD = 0.1
_MOST_ROWS = 0.8
_HALF = 0.5
# a reward of which the trained steps' noise explains less than this share teaches mostly luck
_LEAST_NOISE_SHARE = 0.1
# how many standard errors a change from the first to the last third of a run must have
_CHANGE = 5.0


@dataclass(frozen=True)
class Trouble:
    """A likely trouble: a short name, and a sentence with the numbers and what to do."""

    name: str
    text: str


def troubles(folder: RunFolder) -> list[Trouble]:
    """Likely troubles of a run, the gravest first; empty if nothing stands out."""
    return [Trouble(name, text) for name, check in CHECKS.items() for text in check(folder)]


def _nonfinite(folder: RunFolder) -> Iterator[str]:
    count = int(folder.series("nonfinite_rows").sum())
    if count:
        yield (
            f"{count} rows had a log-ratio, KL or loss that is not finite; lower the learning rate or set "
            "optimizer.max_grad_norm"
        )


def _one_update(folder: RunFolder) -> Iterator[str]:
    if int(folder.rows.update.max()) == 0:
        yield (
            "every rollout had one update, so every ratio was 1 and every KL 0: mask, clip and guard can do nothing; "
            "set optimizer.updates_per_rollout or optimizer.inner_epochs to 2 or more"
        )


def _mismatch(folder: RunFolder) -> Iterator[str]:
    first = folder.rows.where(folder.rows.update == 0)
    threshold, clip = folder.threshold, folder.clip
    if not len(first) or (not threshold and clip is None):
        return

    def bound(n: Any) -> Any:
        """Nats of a row of ``n`` elements."""
        return threshold * n if threshold else (clip * n) ** 2 / 2

    share = float(np.quantile(first.kl / bound(first.elements), 0.9))
    if share >= _NEAR_THRESHOLD:
        kind = "threshold" if threshold else "KL at which the clip range is one standard deviation"
        yield (
            "before the first update of a rollout, where the policies are one, 10 % of the rows have a KL of "
            f"{folder.nats(lambda n: share * bound(n))} nats or more "
            f"({folder.nats(lambda n: share * bound(n) / n)} per element), {share:.1%} of the "
            f"{kind} ({folder.nats(bound)} nats): the training pass does not compute what the rollout did (precision, "
            "batch geometry, dropout), and the bound acts on that"
        )


def _bf16_means(folder: RunFolder) -> Iterator[str]:
    threshold = folder.threshold
    if threshold is None:
        return
    floors = {step: BF16_ROUNDING**2 / (2 * std**2) for step, std in folder.step_stds().items() if std > 0}
    if not floors:
        return
    step, floor = max(floors.items(), key=lambda entry: entry[1])
    if threshold <= floor:
        yield (
            f"the threshold of {folder.nats(lambda n: threshold * n)} nats ({threshold:.2g} per element) is under the "
            f"KL of {folder.nats(lambda n: floor * n)} nats that rounding the means to bfloat16 would make on step "
            f"{step}; this trainer stores velocities and is not touched, but do not carry the threshold to one that "
            "stores bf16 means"
        )


# a penalty bounds without dropping
_DROPS_NOTHING = ("unclipped", "kl_penalty", "drpo", "drpo_ratio")


def _never_fires(folder: RunFolder) -> Iterator[str]:
    moved = folder.rows.moved
    if folder.objective in _DROPS_NOTHING or not len(moved) or not moved.kept.all():
        return
    if folder.threshold is not None:
        share = float((moved.kl / (folder.threshold * moved.elements)).max())
        yield (
            f"the mask dropped none of {len(moved)} rows: the largest KL was {float(moved.kl.max()):.2g} nats, "
            f"{'at most ' if len(moved.sizes) > 1 else ''}{share:.1%} of the threshold; what trained is the unbounded "
            "objective"
        )
    elif bound := folder.clip or folder.guard_clip or folder.margin:
        largest = float(np.abs(moved.log_ratio).max())
        yield (
            f"the clip dropped none of {len(moved)} rows: the largest log-ratio was {largest:.2g} nats, the clip range "
            f"is {folder.nats(lambda n: bound * n)}; what trained is the unbounded objective"
        )


def _drops_most(folder: RunFolder) -> Iterator[str]:
    moved = folder.rows.moved
    if len(moved) and (share := 1 - moved.kept.mean()) >= _MOST_ROWS:
        yield (
            f"{share:.0%} of the rows after a rollout's first update were dropped: later updates learn from few rows; "
            "raise the bound, lower the learning rate or make fewer updates"
        )


def _noisy_clip(folder: RunFolder) -> Iterator[str]:
    moved = folder.rows.moved
    if folder.clip is None or not len(moved):
        return
    found = clip_against_mask(moved, folder.clip * moved.elements)
    if found is not None and found["spurious"] >= _HALF:
        threshold = found["threshold"] / moved.sizes[0]
        yield (
            f"{found['spurious']:.0%} of the {found['dropped']:.1%} of rows that the clip drops are nearer to the old"
            f" policy than {folder.nats(lambda n: threshold * n)} nats, the KL at which a mask would drop as many: "
            "mostly noise of the ratio decides; objective.name=dppo with that threshold "
            f"({threshold:.2g} per element) drops the far ones"
        )


def _hacking(folder: RunFolder) -> Iterator[str]:
    up = _change(folder.series("reward"))
    if up is None or up[2] < _CHANGE:
        return
    weights = folder.setting("advantage", "reward_weights", {})
    names = {name for line in folder.metrics for name in line if name.startswith("eval/")}
    names |= {f"reward/{name}" for name, weight in weights.items() if weight == 0}
    for name in sorted(names):
        down = _change(folder.series(name))
        if down is not None and down[2] <= -_CHANGE:
            yield (
                f"the reward rose from {up[0]:.3g} to {up[1]:.3g} while {name} fell from {down[0]:.3g} to {down[1]:.3g}"
                " (means of the first and the last third): the model learns the scorer rather than the task; stop "
                "earlier, tighten the bound, or set objective.kl_weight"
            )


def _falling(folder: RunFolder) -> Iterator[str]:
    names = {name for line in folder.metrics for name in line if name == "eval/reward"}
    for name in ("reward", *sorted(names)):
        down = _change(folder.series(name))
        if down is not None and down[2] <= -_CHANGE:
            yield (
                f"{name} fell from {down[0]:.3g} to {down[1]:.3g} (means of the first and the last third): stop this run "  # noqa: E501
                "and go back to a checkpoint from before; a larger rollout (sampling.prompts_per_rollout, "
                "sampling.group_size), more trained steps or a lower optimizer.learning_rate make its gradient less noisy"  # noqa: E501
            )


def _luck(folder: RunFolder) -> Iterator[str]:
    shares = folder.series("noise_share")
    if len(shares) and shares[-1] < _LEAST_NOISE_SHARE:
        yield (
            f"the noise of the trained steps explains {shares[-1]:.1%} of the reward's variance within groups, the first "  # noqa: E501
            "latents explain the rest, which no update can change: train earlier or more steps (sampling.sde_steps), "
            "raise sampling.eta, or set sampling.same_latents"
        )


def _change(values: np.ndarray) -> tuple[float, float, float] | None:
    """Means of the first and the last third, and their difference in standard errors; None for fewer than 6 values."""
    third = len(values) // 3
    if third < 2:
        return None
    first, last = values[:third], values[-third:]
    error = float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third))
    difference = float(last.mean() - first.mean())
    return float(first.mean()), float(last.mean()), difference / max(error, 1e-12 + 1e-6 * abs(first.mean()))


# by name; the order is that of the report
CHECKS: dict[str, Callable[[RunFolder], Iterator[str]]] = {
    "numbers that are not finite": _nonfinite,
    "one update per rollout": _one_update,
    "rollout/train mismatch": _mismatch,
    "reward falls": _falling,
    "reward hacking": _hacking,
    "reward decided by the first latents": _luck,
    "bound never fires": _never_fires,
    "bound drops nearly everything": _drops_most,
    "clip decided by noise": _noisy_clip,
    "threshold under the noise of bf16 means": _bf16_means,
}


def numbers(folder: RunFolder) -> dict[str, Any]:
    """What the plots show, as numbers: KL, ratio noise and dropped share by step and sign of the advantage.

    What follows from N is a list where rows have several sizes, smallest first.
    """
    moved, first = folder.rows.moved, folder.rows.where(folder.rows.update == 0)
    steps = {
        step: {
            "rows": len(here),
            "kl_median_nats": float(np.median(here.kl)),
            "kl_90_nats": float(np.quantile(here.kl, 0.9)),
            "noise_over_predicted": float(here.standardised.std()),
            "dropped_positive_advantage": _dropped(here, here.advantage > 0),
            "dropped_negative_advantage": _dropped(here, here.advantage < 0),
        }
        for step, here in _by_step(moved)
    }
    found = None if folder.clip is None else clip_against_mask(moved, folder.clip * moved.elements)
    clip = folder.clip or folder.guard_clip
    return {
        "iterations": len(folder.metrics),
        "rows": len(folder.rows),
        "moved_rows": len(moved),
        "elements": _by_size(folder, 1),
        "objective": folder.objective,
        "threshold_nats": _by_size(folder, folder.threshold),
        "clip_nats": _by_size(folder, clip),
        # rollout against training at unchanged weights
        "mismatch_kl_nats": {
            step: {"mean": float(here.kl.mean()), "max": float(here.kl.max())} for step, here in _by_step(first)
        },
        "steps": steps,
        "clip_against_mask": found,
    }


def _by_size(folder: RunFolder, per_element: float | None) -> Any:
    if per_element is None:
        return None
    values = [per_element * n for n in folder.rows.sizes]
    return values if len(values) > 1 else values[0]


def _by_step(rows: LoggedRows) -> Iterator[tuple[int, LoggedRows]]:
    return ((int(step), rows.where(rows.step == step)) for step in np.unique(rows.step))


def _dropped(rows: LoggedRows, chosen: np.ndarray) -> float | None:
    return float(1 - rows.kept[chosen].mean()) if chosen.any() else None


@figures.style()
def draw(folder: RunFolder, path: Path) -> None:
    """Four plots into one PNG: KL by step, ratio noise, clip against mask, dropped rows by step and sign."""
    figure, axes = figures.panels(4, height=3.8)
    moved = folder.rows.moved
    for axis, plot in zip(axes, (_draw_kl, _draw_noise, _draw_decisions, _draw_dropped)):
        if len(moved):
            plot(folder, moved, axis)
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, columnspacing=1.2, handlelength=1.6)
        else:
            text = "no row after a rollout's first update"
            axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes)
    sizes = ", ".join(f"{n:,}" for n in folder.rows.sizes)
    figure.suptitle(f"{folder.path.name}: {folder.objective}, N = {sizes} elements per row")
    figures.save(figure, path)


def _draw_kl(folder: RunFolder, moved: LoggedRows, axis: Any) -> None:
    for number, step in enumerate(np.unique(moved.step)):
        here = moved.where(moved.step == step)
        iterations = np.unique(here.iteration)
        medians = [np.median(here.kl[here.iteration == iteration]) for iteration in iterations]
        look = figures.SERIES[number % len(figures.SERIES)]
        axis.plot(iterations, medians, **look.kwargs(markersize=4, label=f"step {step}"))
    threshold = folder.threshold or 0.0
    for n in folder.rows.sizes if threshold else ():
        label = "threshold" if n == folder.rows.sizes[0] else None
        axis.axhline(threshold * n, color=figures.INK, linestyle=":", linewidth=1.2, label=label)
    figures.log_scale(axis.yaxis)
    axis.set(
        title="How far updates move", xlabel="iteration [rollouts]",
        ylabel="KL(old || new), median of rows\n[nats per denoising step]",
    )  # fmt: skip


def _draw_noise(folder: RunFolder, moved: LoggedRows, axis: Any) -> None:
    for number, n in enumerate(moved.sizes):
        here = moved.where(moved.elements == n)
        edges = np.geomspace(here.kl.min(), here.kl.max() * 1.0001, 13)
        place = np.digitize(here.kl, edges)
        points = [here.where(place == bin) for bin in np.unique(place) if (place == bin).sum() >= 10]
        # what is expected of each size is a line of its own
        names = ("measured", "sqrt(2 D / N)", "D, what a clip means to bound") if number == 0 else (None,) * 3
        axis.plot(
            [p.kl.mean() / n for p in points], [p.log_ratio.std() / n for p in points], color=figures.BLUE, marker="o",
            linestyle="", label=names[0],
        )  # fmt: skip
        axis.plot(edges / n, np.sqrt(2 * edges) / n, color=figures.GREY, linestyle=":", label=names[1])
        axis.plot(edges / n, edges / n, color=figures.GREY, linestyle="--", label=names[2])
    figures.log_scale(axis.xaxis)
    figures.log_scale(axis.yaxis)
    axis.set(
        title="How noisy one ratio is", xlabel="KL of a row: D [nats per element]",
        ylabel="standard deviation of log r\n[nats per element]",
    )  # fmt: skip


def _draw_decisions(folder: RunFolder, moved: LoggedRows, axis: Any) -> None:
    # rows of several sizes are bounded by the same numbers per element only
    several = len(moved.sizes) > 1
    unit = moved.elements if several else np.ones(len(moved))
    size = float(np.median(moved.elements / unit))
    if folder.clip:
        clip = folder.clip * size
    else:
        typical = folder.threshold or float(np.quantile(moved.kl / moved.elements, 0.9))
        clip = float(np.sqrt(2 * typical / np.median(moved.elements))) * size
    found = clip_against_mask(moved, clip * unit)
    kl, log_ratio = moved.kl / unit, moved.log_ratio / unit
    if folder.threshold:
        threshold = folder.threshold * size
    else:
        threshold = found["threshold"] / moved.sizes[0] * size if found else float(kl.max())
    chosen_few = np.arange(len(moved)) % max(1, len(moved) // 3000) == 0
    kl, log_ratio, away = kl[chosen_few], log_ratio[chosen_few], moved.away[chosen_few]
    clipped, masked = away & (np.abs(log_ratio) > clip), away & (kl >= threshold)
    for label, chosen, colour, marker in (
        ("neither drops", ~clipped & ~masked, figures.PALE, "."),
        ("both drop", clipped & masked, figures.INK, "d"),
        ("clip alone", clipped & ~masked, *figures.METHODS["flow_grpo"][:2]),
        ("mask alone", masked & ~clipped, *figures.METHODS["flow_dppo"][:2]),
    ):
        axis.scatter(kl[chosen], log_ratio[chosen], s=10, color=colour, marker=marker, label=label)
    axis.axvline(threshold, color=figures.INK, linestyle=":", linewidth=1.2, label="threshold")
    axis.axhline(clip, color=figures.INK, linestyle="--", linewidth=1.2, label="clip range")
    axis.axhline(-clip, color=figures.INK, linestyle="--", linewidth=1.2)
    figures.log_scale(axis.xaxis)
    axis.set_yscale("symlog", linthresh=clip)
    # the clip range, and decades that are not too near to it for their labels
    first, last = np.ceil(np.log10(3 * clip)), np.log10(max(axis.get_ylim()[1], -axis.get_ylim()[0]))
    marks = [float(clip), *10.0 ** np.arange(first, last)]
    axis.set_yticks([sign * mark for mark in marks for sign in (-1, 1)] + [0])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    nats = "nats per element" if several else "nats"
    axis.set(title="What clip and mask drop", xlabel=f"KL of a row [{nats}]", ylabel=f"log-ratio of a row [{nats}]")


def _draw_dropped(folder: RunFolder, moved: LoggedRows, axis: Any) -> None:
    steps = np.unique(moved.step)
    # the looks that metrics.png gives the two signs
    for offset, label, sign, look, hatch in (
        (-0.2, "advantage > 0", 1, figures.SERIES[1], ""),
        (0.2, "advantage < 0", -1, figures.SERIES[2], "//"),
    ):
        shares = [_dropped(moved, (moved.step == step) & (sign * moved.advantage > 0)) or 0.0 for step in steps]
        axis.bar(
            np.arange(len(steps)) + offset, [100 * share for share in shares], 0.4, color=look.colour, hatch=hatch,
            edgecolor=figures.PAPER, label=label,
        )  # fmt: skip
    axis.set_xticks(range(len(steps)), [str(step) for step in steps])
    axis.grid(False, axis="x")
    axis.set(
        title="Rows dropped by the bound", xlabel="denoising step (0 is the noisiest)", ylabel="dropped [% of rows]"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flowdppo diagnose``."""
    parser.add_argument("run", type=given, help="run folder with metrics.jsonl, rows.jsonl and config.yaml")
    parser.add_argument("--shift", type=float, default=1.0, help="shift of the model's schedule (SD3: 3; default 1)")
    parser.add_argument("--plot", type=given, help="where the plots go (default: diagnose.png in the run folder)")
    parser.add_argument("--json", action="store_true", help="machine-readable report")


def run(args: argparse.Namespace) -> int:
    """Prints the report and writes the plots; returns 0 if nothing stands out, 1 with trouble, 2 without a run."""
    try:
        folder = RunFolder.load(args.run, args.shift)
    except ValueError as error:
        print(f"flowdppo diagnose: {error}")
        return 2
    found, values = troubles(folder), numbers(folder)
    plot = args.plot or folder.path / "diagnose.png"
    draw(folder, plot)
    if args.json:
        print(json.dumps({**values, "troubles": [vars(trouble) for trouble in found], "plot": str(plot)}, indent=2))
        return int(bool(found))
    print(f"{values['iterations']} iterations, {values['rows']} rows, {values['moved_rows']} of them after an update")
    for step, entry in values["steps"].items():
        signs = ", ".join(
            f"{sign} {'-' if share is None else format(share, '.1%')}"
            for sign, share in (
                ("A>0", entry["dropped_positive_advantage"]),
                ("A<0", entry["dropped_negative_advantage"]),
            )
        )
        print(
            f"step {step}: KL {entry['kl_median_nats']:.2g} nats (90 %: {entry['kl_90_nats']:.2g}), ratio noise "
            f"{entry['noise_over_predicted']:.2f} x sqrt(2D/N), dropped {signs}"
        )
    for trouble in found:
        print(f"! {trouble.name}: {trouble.text}")
    if not found:
        print("nothing stands out")
    print(plot)
    return int(bool(found))
