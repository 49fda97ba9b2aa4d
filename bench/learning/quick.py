"""The quick form: every method runs, all numbers are finite, and the kernels' KL is the reference's. Who wins is not
asked: a minute of training does not say."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flowdppo_fast import fused_velocity_policy_loss
from flowdppo_fast.trainer import FlowDPPOConfig, TrajectoryRecorder

from . import plan
from .requests import Cell, load_settings, request
from .results import write
from .runs import named_numbers, run
from .tasks import load_task


def shortened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of runs of seconds."""
    short = copy.deepcopy(dict(settings))
    for own in short["tasks"].values():
        own["trainer"]["sampling"] |= {"num_steps": 4, "sde_steps": [0, 1], "prompts_per_rollout": 4, "group_size": 4}
        own["trainer"]["run"]["iterations"] = 2
        own["evaluation"] |= {"every": 1, "per_prompt": 2, "final_per_prompt": 2, "drift_rows": 4}
    return short


def check(output: Path | None = None) -> Iterator[str]:
    """Yields a line per method.

    Raises:
        AssertionError: a number that is not finite, a bound that did not do what it says, or kernels that disagree.
    """
    settings = shortened(load_settings())
    for cell in [
        *plan.quick(settings),
        Cell("shapes", **_dppo(settings)),
        Cell("digits", kl_weight=0.1, **_dppo(settings)),
    ]:
        started = time.perf_counter()
        result = run(request(cell, settings))
        check_result(result)
        if output is not None:
            write(result, output / f"{cell.name}.json")
        rows = result["rows"]
        yield (
            f"{cell.name:<32} {time.perf_counter() - started:4.1f} s  reward {result['history']['reward'][-1]:.3f}  "
            f"drift {result['evaluations'][-1]['drift_nats']:.3g} nats  moved rows {rows['moved_rows']}"
        )
    for task in settings["tasks"]:
        found = kernel_difference(task)
        yield f"{task}: KL of the kernel against the reference, largest relative difference {found:.2g}"


def check_result(result: Mapping[str, Any]) -> None:
    """Mechanics of one run."""
    assert result["failed"] is None, result["failed"]
    numbers = named_numbers({key: result[key] for key in ("history", "evaluations", "rows")})
    lost = [name for name, value in numbers if not math.isfinite(value)]
    assert not lost, f"not finite: {', '.join(lost)}"
    assert result["rows"]["moved_rows"] > 0, "no update moved the policy"
    # equal bits: the drift replays each step in the batch that it was recorded in, with as many threads
    assert result["evaluations"][0]["drift_nats"] == 0, "the pretrained model differs from itself"
    assert result["evaluations"][-1]["drift_nats"] > 0, "training left the model where it was"
    json.dumps(result, allow_nan=False)


def kernel_difference(name: str) -> float:
    """Largest relative difference between the KL of the backend in use and the float64 reference's, after an update.

    Raises:
        AssertionError: more than 16 units in the last place of float32. The velocities are the same numbers, so only
            the rounding of difference, square and sum is left; the log-ratio may in addition be off by as much of
            ``sqrt(2*KL)``, the size of the terms that cancel in it.
    """
    task = load_task(name)
    pipeline = task.pipeline()
    recorder = TrajectoryRecorder(pipeline)
    prompts = list(task.trained[:4])
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    with torch.no_grad(), recorder.recording([0, 1, 2], seed=5) as trajectory:
        pipeline(prompts, num_inference_steps=6, generator=generators, output_type="latent")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in pipeline.transformer.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
        velocity = recorder.replay(trajectory)
    old, noise, step = trajectory.select(range(4))
    objective = FlowDPPOConfig().objective.build()
    found = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        source = noise.materialize(tuple(velocity.shape), row_dims=2, device=velocity.device).to(dtype)
        out = fused_velocity_policy_loss(
            objective, velocity.to(dtype), old.to(dtype), source if backend == "reference" else noise, step,
            torch.ones(velocity.shape[:2]), backend=backend,
        )  # fmt: skip
        found.append((out.rows.kl.double(), out.rows.log_ratio.double(), out.backend))
    (kl, log_ratio, used), (true_kl, true_ratio, _) = found
    assert used != "reference", "no kernel ran: the reference was compared with itself"
    difference = float(((kl - true_kl).abs() / true_kl).max())
    tolerance = 16 * torch.finfo(torch.float32).eps
    assert difference < tolerance, f"{name}: KL of {used} differs from the reference's by {difference:.2g}"
    scale = true_ratio.abs() + (2 * true_kl).sqrt()
    assert float(((log_ratio - true_ratio).abs() / scale).max()) < tolerance, f"{name}: log-ratio of {used} differs"
    return difference


def _dppo(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": "flow_dppo", **settings["tuned"]["flow_dppo"]}
