"""Small workloads, and contenders with a twist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.ops.contenders import Contender, registry
from bench.ops.inputs import Inputs, Rollout, build_rollout, draw_noise
from bench.ops.oracle import Oracle
from bench.ops.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
SMALL = Workload("small", (16,), (4, 16, 16))
STACKED = Workload("small-stacked", (4, 3), (4, 16, 16))


def make_oracle(workload: Workload = SMALL, dtype: torch.dtype = torch.float32) -> Oracle:
    cpu = torch.device("cpu")
    return Oracle(build_rollout(workload, dtype, cpu, draw_noise(workload, cpu)))


def contender(name: str) -> Contender:
    return next(c for c in registry("cpu") if c.name == name)


def altered(original: Contender, name: str, change: Callable[[Any, Inputs], Any], **fields: Any) -> Contender:
    """``original`` whose output is changed before anybody sees it."""

    def prepare(rollout: Rollout) -> Callable[[Inputs], Any]:
        call = original.prepare(rollout)
        return lambda inputs: change(call(inputs), inputs)

    return replace(original, name=name, prepare=prepare, **fields)
