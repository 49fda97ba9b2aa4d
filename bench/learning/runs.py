"""One run: from a request to what its JSON file holds. The request is complete, so a run can be repeated from it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.ops.devices import CpuDevice, CudaDevice
from bench.ops.environment import collect
from flowdppo_fast.runs.row_log import read_rows
from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer

from .decisions import summary
from .evaluate import Pretrained, draw, evaluate
from .tasks import NamedRewards, load_task

SCHEMA = 1
# metrics of the trainer that a run file keeps, where the objective has them
_KEPT_METRICS = (
    "iteration",
    "reward",
    "kl_new_old_nats",
    "kl_new_old_max",
    "masked_fraction",
    "pos_rm_fraction",
    "neg_rm_fraction",
    "clipfrac",
    "ratio_moved_fraction",
    "grad_norm",
    "kl_ref_mean",
)


class Diverged(RuntimeError):
    """A measure of the model is not finite."""


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Trains and measures; the result but ``environment`` and ``seconds`` is a function of the request, on one machine.

    A run whose model diverges ends there: ``failed`` says how, and the evaluation that was not finite is left out.

    Args:
        request: ``task``, ``rewards`` (names), ``method``, ``bound``, ``trainer`` (all sections of its settings but the
            output folder) and ``evaluation`` (``every``, ``per_prompt``, ``final_per_prompt``, ``drift_rows``,
            ``num_steps``, ``guidance``, ``clips``).

    Raises:
        ValueError: settings that make no run.
    """
    torch.set_num_threads(1)
    started, cpu_started = time.perf_counter(), time.process_time()
    task, settings = load_task(request["task"]), request["evaluation"]
    rewards = NamedRewards(task, request["rewards"])
    pipeline = task.pipeline()
    pretrained = Pretrained(pipeline.transformer)
    evaluations = []
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
        config = FlowDPPOConfig.from_dict(request["trainer"])
        # a plot in a folder that goes away costs a sixth of a run
        config.run.output_dir, config.run.row_log, config.run.plot_every = folder + "/run", True, 0
        trainer = FlowDPPOTrainer(pipeline, rewards, task.trained, config)

        def measure(iteration: int, per_prompt: int) -> None:
            result = evaluate(task, rewards, pipeline, pretrained, per_prompt, settings)
            lost = [name for name, value in named_numbers(result) if not math.isfinite(value)]
            if lost:
                raise Diverged(f"after iteration {iteration} {', '.join(lost)} of the model are not finite")
            evaluations.append({"iteration": iteration, **_rounded(result)})

        metrics_so_far: list[dict[str, float]] = []

        def after(metrics: dict[str, float]) -> None:
            metrics_so_far.append(metrics)
            iteration = int(metrics["iteration"])
            last = iteration == config.run.iterations
            if last or iteration % settings["every"] == 0:
                measure(iteration, settings["final_per_prompt" if last else "per_prompt"])

        measure(0, settings["final_per_prompt"])
        failed = None
        try:
            history = trainer.train(on_iteration=after)
        except (RuntimeError, ValueError) as error:
            pages, _ = draw(pipeline, task.trained, 1, num_steps=settings["num_steps"], guidance=settings["guidance"])
            stopped = trainer.skipped_updates > config.optimizer.max_skipped_updates
            if not (isinstance(error, Diverged) or stopped) and torch.isfinite(pages).all():
                raise
            # a model that lost its numbers is a result like any other, and none to leave out
            failed, history = str(error), metrics_so_far
        rows = read_rows(Path(folder) / "run" / "rows.jsonl")
    names = [name for name in _KEPT_METRICS if history and name in history[0]]
    return {
        "schema": SCHEMA,
        "kind": "bench.learning",
        "request": dict(request),
        "environment": {**collect(CudaDevice() if trainer.device.type == "cuda" else CpuDevice()), "threads": 1},
        "seconds": {
            "wall": round(time.perf_counter() - started, 1),
            "cpu": round(time.process_time() - cpu_started, 1),
        },
        "failed": failed,
        "history": {name: [_significant(metrics[name]) for metrics in history] for name in names},
        "evaluations": evaluations,
        "rows": summary(rows, settings["clips"]),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two results of one request differ, but for when and where they were made; empty: bit for bit the same."""
    found: list[str] = []

    def compare(where: str, left: Any, right: Any) -> None:
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            for key in sorted({*left, *right}, key=str):
                compare(f"{where}.{key}", left.get(key), right.get(key))
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            for place, (a, b) in enumerate(zip(left, right)):
                compare(f"{where}[{place}]", a, b)
        elif left != right and not (left != left and right != right):
            found.append(f"{where}: {left!r} and {right!r}")

    # through JSON, as a file was
    left, right = (json.loads(json.dumps(result)) for result in (one, other))
    for key in ("request", "failed", "history", "evaluations", "rows"):
        compare(key, left[key], right[key])
    return found


def named_numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of nested mappings and lists, with the names that lead to them; NaN for None."""
    if isinstance(value, (Mapping, list, tuple)):
        for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from named_numbers(entry, f"{name}.{key}" if name else str(key))
    elif value is None or isinstance(value, (int, float)):
        yield name, math.nan if value is None else value


def _significant(value: float) -> float | None:
    """Six digits; None for what is not finite, which JSON cannot say."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return _significant(value) if isinstance(value, float) else value
