"""Run files: one JSON per run, how it is written, and the loader."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .requests import Cell
from .runs import SCHEMA


@dataclass(frozen=True)
class Run:
    """A loaded run file."""

    result: Mapping[str, Any]

    @cached_property
    def cell(self) -> Cell:
        return Cell(**self.result["request"]["cell"])

    @property
    def failed(self) -> bool:
        """The run lost its numbers and was stopped; it is counted, and no analysis averages over it."""
        return self.result.get("failed") is not None

    @property
    def before(self) -> Mapping[str, Any]:
        return self.result["evaluations"][0]

    @property
    def after(self) -> Mapping[str, Any]:
        return self.result["evaluations"][-1]

    @property
    def history(self) -> Mapping[str, list[float]]:
        return self.result["history"]

    def reward(self, place: int = -1, prompts: str = "trained") -> float:
        """Mean of the optimised rewards at an evaluation."""
        scores = self.result["evaluations"][place][prompts]["rewards"]
        return sum(scores.values()) / len(scores)

    def gains(self) -> dict[str, float]:
        """Gain of each optimised reward on trained prompts, in standard deviations of the pretrained model's pages."""
        before, after = self.before["trained"], self.after["trained"]
        return {
            name: (after["rewards"][name] - before["rewards"][name]) / before["reward_std"][name]
            for name in before["rewards"]
        }

    @property
    def drift(self) -> float:
        """KL of the sampling path from the pretrained model's, nats."""
        return self.after["drift_nats"]


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes a run file in one piece, with lists on one line each."""
    text = json.dumps(result, indent=1, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found.group(0)), text)
    # entries of the decision tables on one line each
    text = re.sub(r"\{[^\[\]{}]*\}", lambda found: re.sub(r"\s+", " ", found.group(0)), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial{os.getpid()}")
    partial.write_text(text + "\n")
    partial.replace(path)


def load_file(path: Path) -> Run:
    """One run file.

    Raises:
        ValueError: another kind of file, or another version's.
    """
    result = json.loads(path.read_text())
    if result.get("kind") != "bench.learning" or result.get("schema") != SCHEMA:
        got = f"kind {result.get('kind')!r}, schema {result.get('schema')!r}"
        raise ValueError(f"{path}: got {got}, expected kind 'bench.learning', schema {SCHEMA}")
    return Run(result)


def load(folder: Path) -> list[Run]:
    """All run files of a folder, in the order of their names."""
    return [load_file(path) for path in sorted(folder.glob("*.json"))]
