"""How a run begins, what its checkpoints hold, and how it continues from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from torch import Tensor

from . import checkpoint
from .row_log import drop_later_lines

if TYPE_CHECKING:
    from .trainer import FlowDPPOTrainer

logger = get_logger(__name__)

# settings that may differ between a run and its continuation
_FREE_SETTINGS = (
    "checkpoint_every", "device", "iterations", "keep_checkpoints", "output_dir", "plot_every", "progress", "project",
    "row_log", "trackers",
)  # fmt: skip


def save_run(trainer: FlowDPPOTrainer) -> Path:
    """Writes a checkpoint: weights, averages, optimizer, rewards so far, random states and iteration."""
    folder = trainer.output / "checkpoints"
    randoms = trainer.workers.gather_objects([checkpoint.random_state()])
    if trainer.workers.is_main:
        tensors: dict[str, dict[str, Tensor]] = {
            **trainer.weights.state(),
            "optimizer": checkpoint.optimizer_tensors(trainer.optimizer.adamw, trainer.weights.names),
            "scale": trainer.optimizer.state(),
            "history": trainer.history.tables,
            **{f"random-{rank}": tensors for rank, (tensors, _) in enumerate(randoms)},
        }
        state = {
            "random": [state for _, state in randoms],
            "skipped_updates": trainer.skipped_updates,
            "config": trainer.config.to_dict(),
        }
        checkpoint.save_checkpoint(folder, trainer.iteration, tensors, state, trainer.config.run.keep_checkpoints)
    trainer.workers.wait()
    return checkpoint.checkpoints(folder)[-1]


def begin_run(trainer: FlowDPPOTrainer, resume: bool) -> list[dict[str, float]]:
    """Prepares the output folder or restores the newest checkpoint; returns the metrics so far.

    Raises:
        ValueError: the folder holds a run and ``resume`` is False, or one with other settings.
    """
    output = trainer.output
    saved = checkpoint.checkpoints(output / "checkpoints")
    path = output / "metrics.jsonl"
    if not resume and trainer.iteration == 0 and (saved or path.exists()):
        raise ValueError(
            f"run.output_dir: {output} holds a run already, expected a new folder; pass resume=True to continue it"
        )
    if resume and saved:
        _restore(trainer, saved[-1])
    # what was logged after the checkpoint will be done, and logged, again; so will a line that was cut off
    lines = path.read_text().splitlines()[: trainer.iteration] if path.exists() else []
    # all have read before one writes
    trainer.workers.wait()
    if trainer.workers.is_main:
        output.mkdir(parents=True, exist_ok=True)
        trainer.config.save(output / "config.yaml")
        path.write_text("".join(line + "\n" for line in lines))
        drop_later_lines(output / "rows.jsonl", trainer.iteration)
    return [json.loads(line) for line in lines]


def _restore(trainer: FlowDPPOTrainer, path: Path) -> None:
    tensors, state = checkpoint.load_checkpoint(path)
    differing = [
        f"{section}.{key}"
        for section, entries in trainer.config.to_dict().items()
        for key, value in entries.items()
        if not (section == "run" and key in _FREE_SETTINGS) and state["config"].get(section, {}).get(key) != value
    ]
    if differing:
        raise ValueError(f"config: {path} has other settings of {', '.join(differing)}, expected the same")
    trainer.weights.load_state(tensors)
    trainer.optimizer.load_state(tensors["scale"])
    checkpoint.load_optimizer(trainer.optimizer.adamw, trainer.weights.names, tensors["optimizer"])
    trainer.history.tables = {name: table.to(trainer.device) for name, table in tensors["history"].items()}
    rank = trainer.workers.rank
    if len(state["random"]) == trainer.workers.count:
        checkpoint.load_random_state(tensors[f"random-{rank}"], state["random"][rank])
    else:
        logger.warning(
            "%s was written by %d processes and is continued by %d: global random generators start afresh",
            path,
            len(state["random"]),
            trainer.workers.count,
        )
    trainer.iteration, trainer.skipped_updates = state["iteration"], state["skipped_updates"]
    logger.info("continuing from %s", path)
