"""A run's folder, read back: settings, metrics and rows, and the bounds that were in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..objectives import DPPO, GRPOGuard, LogHinge, RatioClip
from ..samplers import sde_schedule
from .logs import from_json
from .row_log import LoggedRows, read_rows


@dataclass(frozen=True)
class RunFolder:
    """A run's logs.

    Attributes:
        path: the folder.
        config: sections as in ``config.yaml``.
        metrics: one mapping per iteration.
        rows: the row log.
        shift: of the model's schedule, which a run folder does not hold.
    """

    path: Path
    config: Mapping[str, Any]
    metrics: list[dict[str, float]]
    rows: LoggedRows
    shift: float = 1.0

    @classmethod
    def load(cls, path: Path, shift: float = 1.0) -> RunFolder:
        """Reads a run folder.

        Raises:
            ValueError: a file is missing or is no log of a run.
        """
        import yaml

        for name in ("config.yaml", "metrics.jsonl"):
            if not (path / name).is_file():
                raise ValueError(f"{path}: no {name} there, expected a run folder of FlowDPPOTrainer")
        metrics = [from_json(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        if not metrics:
            raise ValueError(f"{path}: metrics.jsonl is empty, expected a run of at least one iteration")
        config = yaml.safe_load((path / "config.yaml").read_text())
        return cls(path, config, metrics, read_rows(path / "rows.jsonl"), shift)

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        value = self.config.get(section, {}).get(name)
        return default if value is None else value

    @property
    def objective(self) -> str:
        return self.setting("objective", "name", "dppo")

    @property
    def threshold(self) -> float | None:
        """Threshold of the mask, nats per element; None where the objective has no mask, or rows differ in it."""
        if not self.objective.startswith("dppo") or self.setting("objective", "threshold_per", "step") != "step":
            return None
        nats = self.setting("objective", "threshold_nats")
        if nats is not None:
            return nats / self.rows.sizes[0] if len(self.rows.sizes) == 1 else None
        return self.setting("objective", "threshold", DPPO().threshold)

    @property
    def margin(self) -> float | None:
        """Of the log-hinge, nats per element; None for others."""
        return self.setting("objective", "clip_high", LogHinge().margin) if self.objective == "log_hinge" else None

    @property
    def clip(self) -> float | None:
        """Clip range of plain ratio clipping, the smaller side, nats per element; None for others."""
        if self.objective != "ratio_clip":
            return None
        sides = (self.setting("objective", f"clip_{side}", getattr(RatioClip, side)) for side in ("low", "high"))
        return min(sides)

    @property
    def guard_clip(self) -> float | None:
        """The same of GRPO-Guard, whose exponent is ``P*S``; None for others."""
        if self.objective != "grpo_guard":
            return None
        sides = (self.setting("objective", f"clip_{side}", getattr(GRPOGuard, side)) for side in ("low", "high"))
        return min(sides)

    def nats(self, value: Callable[[int], float]) -> str:
        """In words what follows from N: one number of nats, or the least and the most where rows have several sizes."""
        found = [f"{value(n):.2g}" for n in (min(self.rows.sizes), max(self.rows.sizes))]
        return " to ".join(dict.fromkeys(found))

    def step_stds(self) -> dict[int, float]:
        """``S`` of the logged steps by index, for a schedule of evenly spaced levels with :attr:`shift`."""
        count = self.setting("sampling", "num_steps", 10)
        levels = [1 - place / count for place in range(count + 1)]
        levels = [self.shift * level / (1 + (self.shift - 1) * level) for level in levels]
        steps = sde_schedule(
            self.setting("sampling", "sampler", "flow_sde"), levels, eta=self.setting("sampling", "eta", 0.7)
        )
        return {int(index): float(steps[index].std) for index in np.unique(self.rows.step)}

    def series(self, name: str) -> np.ndarray:
        """A metric over the iterations that have it."""
        return np.array([line[name] for line in self.metrics if name in line], float)
