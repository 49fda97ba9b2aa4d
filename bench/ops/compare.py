"""Two result folders side by side: ratios of medians with the band that the quartiles allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .results import FORWARD, TOTAL, Record, records
from .table import describe, markdown

FASTER, SLOWER, NOISE = "faster", "slower", "within noise"


class Change(NamedTuple):
    """Time in B over time in A; ``low`` and ``high`` are the band from opposite quartiles."""

    where: str
    contender: str
    part: str
    clock: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return SLOWER if self.low > 1.0 else FASTER if self.high < 1.0 else NOISE


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    """Everything measured in both."""
    before = {_key(record): record for record in records(a) if record.ok}
    for record in records(b):
        old = before.get(_key(record))
        if not record.ok or old is None:
            continue
        for clock in ("device", "wall"):
            for part in (FORWARD, TOTAL):
                was, now = old.samples(clock, part), record.samples(clock, part)
                if was and now:
                    workload, dtype, threads, name = _key(record)
                    where = f"{workload} {dtype}" + ("" if threads is None else f" {threads}t")
                    ratio = now.median / was.median
                    yield Change(where, name, part, clock, ratio, now.low / was.high, now.high / was.low)


def report(a: Mapping[str, Any], b: Mapping[str, Any], everything: bool) -> str:
    """Markdown: what changed beyond noise (or everything), and what only one of the two has."""
    found = list(changes(a, b))
    shown = found if everything else [change for change in found if change.verdict != NOISE]
    lines = [f"A: {describe(a)}", f"B: {describe(b)}", *_differences(a["environment"], b["environment"]), ""]
    rows = [
        [c.where, c.contender, f"{c.part}, {c.clock}", f"{c.ratio:.3f}", f"{c.low:.3f} - {c.high:.3f}", c.verdict]
        for c in sorted(shown, key=lambda change: change.ratio)
    ]
    lines.append(markdown(("case", "contender", "figure", "B / A", "noise band", "verdict"), rows))
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in (FASTER, SLOWER, NOISE)}
    lines += ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f" of {len(found)} figures"]
    keys_a, keys_b = ({_key(r) for r in records(result) if r.ok} for result in (a, b))
    for label, only in (("A", keys_a - keys_b), ("B", keys_b - keys_a)):
        if only:
            lines.append(f"only in {label}: {len(only)} contenders x cases")
    return "\n".join(lines)


def _key(record: Record) -> tuple[str, str, int | None, str]:
    return record.case["workload"], record.case["dtype"], record.case["threads"], record.name


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    names = ("cpu", "cpus", "torch", "triton", "python", "cpu_capability", "openmp")
    return [f"note: {name} differs: {a.get(name)} / {b.get(name)}" for name in names if a.get(name) != b.get(name)]
