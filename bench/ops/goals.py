"""The goals of the op benchmark, judged from results: met, missed, or not yet measured.

A goal is judged by its worst figure over everything it speaks of. This library is represented by its main form,
velocities with stored noise, on the backend that ``auto`` takes, unless a goal names another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .results import FORWARD, TOTAL, Record, best_backend, by_name, compiled_peer, records

LARGE_BYTES = 256e6
LARGE_ROWS = 262_144
MET, MISSED, NOT_MEASURED = "met", "missed", "not yet measured"


class Figure(NamedTuple):
    """One number and where it was measured."""

    value: float
    where: str


class GoalResult(NamedTuple):
    """A goal with its verdict; ``measured`` is the worst figure and the best, in words."""

    key: str
    goal: str
    status: str
    measured: str


@dataclass(frozen=True)
class Goal:
    """``figures`` yields every number the goal speaks of in one result; the bound is a floor or a ceiling."""

    key: str
    text: str
    device: str
    bound: float
    floor: bool
    unit: str
    figures: Callable[[Mapping[str, Any]], Iterator[Figure]]

    def judge(self, results: Sequence[Mapping[str, Any]]) -> GoalResult:
        found = [
            Figure(figure.value, figure.where + (", quick run" if result["quick"] else ""))
            for result in results
            if result["device"] == self.device
            for figure in self.figures(result)
        ]
        if not found:
            return GoalResult(self.key, self.text, NOT_MEASURED, "")
        low, high = min(found), max(found)
        worst, best = (low, high) if self.floor else (high, low)
        met = worst.value >= self.bound if self.floor else worst.value <= self.bound
        text = f"{self._show(worst.value)} ({worst.where})"
        if len(found) > 1:
            text = f"worst {text}, best {self._show(best.value)}; {len(found)} figures"
        return GoalResult(self.key, self.text, MET if met else MISSED, text)

    def _show(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.0f} %"
        if self.unit == "x":
            return f"{value:.2f}x"
        if self.unit == "launches":
            return f"{value:.0f}"
        if self.unit == "MB":
            return f"{value:.2g} MB"
        return f"{value:.1f} {self.unit}"


def evaluate(results: Sequence[Mapping[str, Any]]) -> list[GoalResult]:
    """Every goal, judged over all ``results`` of its device."""
    return [goal.judge(results) for goal in GOALS]


def _where(record: Record, *more: str) -> str:
    threads = record.case["threads"]
    cores = () if threads is None else (f"{threads} thread{'s' if threads > 1 else ''}",)
    return " ".join((record.case["workload"], record.case["dtype"], *more)) + "".join(f", {core}" for core in cores)


def _ours(result: Mapping[str, Any], *forms: str, backend: str | None = None) -> Iterator[tuple[Record, dict]]:
    """Records of this library's forms, each with all timed contenders of its case."""
    backend = backend or best_backend(result)
    for case in result["cases"]:
        named = by_name(result, case)
        for form in forms:
            if f"{backend}/{form}" in named:
                yield named[f"{backend}/{form}"], named


def _bandwidth(part: str) -> Callable[[Mapping[str, Any]], Iterator[Figure]]:
    def figures(result: Mapping[str, Any]) -> Iterator[Figure]:
        for record, _ in _ours(result, "velocity", "means"):
            fraction = record.bandwidth_fraction(part)
            if fraction is not None and (record.input_bytes or 0) >= LARGE_BYTES:
                yield Figure(fraction, _where(record, record.name))

    return figures


def _seeded(result: Mapping[str, Any]) -> Iterator[Figure]:
    """Time with stored noise over time with seeded noise."""
    for record, named in _ours(result, "seeded"):
        stored = named.get(record.name.replace("/seeded", "/velocity"))
        for part in (FORWARD, TOTAL):
            ours, theirs = record.samples("device", part), stored.samples("device", part) if stored else None
            if ours and theirs and (record.input_bytes or 0) >= LARGE_BYTES:
                yield Figure(theirs.median / ours.median, _where(record, record.name))


def _speedup(
    opponent: Callable[[Mapping[str, Record], str], Record | None],
    clocks: Sequence[str],
    applies: Callable[[Record], bool] = lambda record: True,
) -> Callable[[Mapping[str, Any]], Iterator[Figure]]:
    """Opponent's time over ours, forward and forward plus backward."""

    def figures(result: Mapping[str, Any]) -> Iterator[Figure]:
        for record, named in _ours(result, "velocity"):
            if not applies(record):
                continue
            for part in (FORWARD, TOTAL):
                other = opponent(named, part)
                for clock in clocks:
                    ours, theirs = record.samples(clock, part), other.samples(clock, part) if other else None
                    if ours and theirs:
                        label = "forward" if part == FORWARD else "forward+backward"
                        yield Figure(theirs.median / ours.median, _where(record, label))

    return figures


def _eager(named: Mapping[str, Record], part: str) -> Record | None:
    return named.get("peer-eager")


def _eager_without_syncs(named: Mapping[str, Record], part: str) -> Record | None:
    return named.get("peer-eager, no syncs")


def _both(*sources: Callable[[Mapping[str, Any]], Iterator[Figure]]) -> Callable:
    def figures(result: Mapping[str, Any]) -> Iterator[Figure]:
        for source in sources:
            yield from source(result)

    return figures


def _launches(backward: bool) -> Callable[[Mapping[str, Any]], Iterator[Figure]]:
    def figures(result: Mapping[str, Any]) -> Iterator[Figure]:
        for record, _ in _ours(result, "velocity"):
            forward, total = record.entry.get("launches_forward"), record.entry.get("launches_total")
            if record.case["name"] == "sd3-512" and forward is not None and total is not None:
                yield Figure(total - forward if backward else forward, _where(record))

    return figures


def _host(backend: str) -> Callable[[Mapping[str, Any]], Iterator[Figure]]:
    def figures(result: Mapping[str, Any]) -> Iterator[Figure]:
        for record, _ in _ours(result, "velocity", backend=backend):
            taken = record.samples("host", FORWARD)
            if record.case["name"] == "sd3-512" and taken:
                yield Figure(taken.median / 1e3, _where(record))

    return figures


def _extra(result: Mapping[str, Any]) -> Iterator[Figure]:
    # a sampler step that returns means holds full-size means; that chain is no loss call and is not judged here
    for record in records(result):
        extra = record.entry.get("extra_bytes_total")
        judged = record.entry["backend"] not in (None, "reference") and not record.name.endswith("/step, then means")
        if record.ok and judged and extra is not None:
            yield Figure(extra / 1e6, _where(record, record.name))


def _long_rows(record: Record) -> bool:
    return record.case["elements_per_row"] >= LARGE_ROWS


def _large(record: Record) -> bool:
    return (record.input_bytes or 0) >= LARGE_BYTES


def _sd3_512(record: Record) -> bool:
    return record.case["name"] == "sd3-512"


GOALS: tuple[Goal, ...] = (
    Goal(
        "gpu-bandwidth-forward",
        "GPU, inputs >= 256 MB, stored noise: >= 90 % of copy bandwidth forward",
        "cuda", 0.90, True, "%", _bandwidth(FORWARD),
    ),
    Goal(
        "gpu-bandwidth-total",
        "GPU, inputs >= 256 MB, stored noise: >= 85 % of copy bandwidth forward+backward",
        "cuda", 0.85, True, "%", _bandwidth(TOTAL),
    ),
    # it reads less, and what it computes instead may take as long: docs/gpu.md
    Goal(
        "gpu-seeded",
        "GPU, inputs >= 256 MB, seeded noise: no slower than stored noise",
        "cuda", 1.0, True, "x", _seeded,
    ),
    Goal("gpu-launches-forward", "GPU, sd3-512: <= 2 launches forward", "cuda", 2, False, "launches", _launches(False)),
    Goal("gpu-launches-backward", "GPU, sd3-512: 1 launch backward", "cuda", 1, False, "launches", _launches(True)),
    Goal(
        "gpu-host-cuda", "GPU, sd3-512: host <= 15 us forward, CUDA backend", "cuda", 15.0, False, "us", _host("cuda")
    ),
    Goal(
        "gpu-host-triton",
        "GPU, sd3-512: host <= 40 us forward, Triton backend",
        "cuda", 40.0, False, "us", _host("triton"),
    ),
    Goal(
        "gpu-compiled-large",
        "GPU against peer-compiled, inputs >= 256 MB: >= 1.5x (device time)",
        "cuda", 1.5, True, "x", _speedup(compiled_peer, ("device",), _large),
    ),
    Goal(
        "gpu-compiled-sd3-512",
        "GPU against peer-compiled, sd3-512: >= 3x (wall time of the call)",
        "cuda", 3.0, True, "x", _speedup(compiled_peer, ("wall",), _sd3_512),
    ),
    Goal(
        "gpu-eager",
        "GPU against peer-eager: >= 10x everywhere (wall time; device time against the version without syncs)",
        "cuda", 10.0, True, "x", _both(_speedup(_eager, ("wall",)), _speedup(_eager_without_syncs, ("device",))),
    ),
    Goal(
        "gpu-memory", "GPU: <= 1 MB besides the gradient at any size", "cuda", 1.0, False, "MB", _extra
    ),
    Goal(
        "cpu-compiled-long-rows",
        "CPU against peer-compiled: >= 1.5x at >= 262,144 elements per row",
        "cpu", 1.5, True, "x", _speedup(compiled_peer, ("wall",), _long_rows),
    ),
    Goal(
        "cpu-compiled-anywhere",
        "CPU against peer-compiled: never slower",
        "cpu", 1.0, True, "x", _speedup(compiled_peer, ("wall",)),
    ),
    Goal("cpu-eager", "CPU against peer-eager: >= 8x", "cpu", 8.0, True, "x", _speedup(_eager, ("wall",))),
    Goal("cpu-memory", "CPU: <= 1 MB besides the gradient at any size", "cpu", 1.0, False, "MB", _extra),
)  # fmt: skip
