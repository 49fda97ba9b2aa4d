"""What the trainers' steps share: their output, conventions and stand-ins from the tests, a schedule, reads."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..inputs import ETA, LEVELS, Inputs, Rollout

_TESTS = Path(__file__).resolve().parents[3] / "tests"
# a schedule whose second step is the one of the inputs
SIGMAS = (1.0, *LEVELS[0], 0.0)
INDEX = 1
# beyond the advantages of the inputs, so that clamping costs its launch and changes nothing
ADVANTAGE_CLIP = 5.0


@dataclass
class StepOutput:
    """What a step leaves.

    Args:
        value: the trainer's 0-d loss, or the float it reports.
        log_ratio: gives that of each row when asked, because trainers do not keep it.
        kl: per row, or one number where a trainer reports the mean alone, or None.
        metrics: as logged.
        grad: where the call itself runs the backward.
    """

    value: Tensor | float
    log_ratio: Callable[[], Tensor]
    kl: Tensor | float | None
    metrics: dict[str, Any]
    grad: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        return torch.as_tensor(self.value)


Call = Callable[[Inputs], StepOutput]


def taken_grad(i: Inputs) -> Tensor:
    """The gradient that a backward left in the velocity, which has none afterwards: the next call starts anew."""
    grad, i.velocity.grad = i.velocity.grad, None
    assert grad is not None
    return grad


def difference(log_prob: Tensor, old_log_prob: Tensor) -> Callable[[], Tensor]:
    return lambda: log_prob.detach() - old_log_prob


def problem(needs: Sequence[str]) -> str | None:
    """Why a trainer that ``needs`` certain packages cannot be measured here, or None."""
    if not (_TESTS / "integrations" / "conventions.py").is_file():
        return "the trainers' conventions are in tests/integrations, which this tree lacks"
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"it needs {', '.join(absent)}, not installed here" if absent else None


@functools.cache
def of_tests(name: str) -> Any:
    if str(_TESTS) not in sys.path:
        # last, so that nothing is shadowed
        sys.path.append(str(_TESTS))
    return importlib.import_module(f"integrations.{name}")


def installed(name: str, *version: str) -> contextlib.AbstractContextManager[Any]:
    """An integration on top of the stand-in of its trainer, which is importable inside the ``with`` only."""
    modules = of_tests(f"standins.{name}").build(*version)
    return of_tests("standins").installed(modules, f"flowdppo_fast.integrations.{name}")


def eager(i: Inputs, sigma: Tensor, sigma_next: Tensor, sampler: str = "flow_sde", eta: float = ETA) -> Any:
    """The convention's replay in float32."""
    velocity, state, after = i.velocity.float(), i.sample.float(), i.prev_sample.float()
    replay = of_tests("conventions").replay
    return replay(sampler, state, velocity, after, sigma, sigma_next, eta, list(SIGMAS))


def scheduler_of(rollout: Rollout) -> tuple[SimpleNamespace, Tensor]:
    """A diffusers scheduler's tables and the rows' timesteps, on the device."""
    device = rollout.inputs.velocity.device
    sigmas = torch.tensor(SIGMAS, device=device)
    scheduler = SimpleNamespace(sigmas=sigmas, timesteps=sigmas[:-1] * 1000.0)
    return scheduler, scheduler.timesteps[INDEX].repeat(rollout.workload.row_count)


def look_up(scheduler: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of the rows, each looked up in the schedule by itself: a sync per row."""
    index = [(scheduler.timesteps == t).nonzero()[0].item() for t in timestep]
    return scheduler.sigmas[index], scheduler.sigmas[[i + 1 for i in index]]


def read(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Every metric as a float, a sync each."""
    return {name: value.item() for name, value in metrics.items()}
