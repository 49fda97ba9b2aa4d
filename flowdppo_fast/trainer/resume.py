"""How a run begins, what its checkpoints hold, and how it continues from one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from torch import Tensor

from . import checkpoint
from .config import FlowDPPOConfig
from .guidance import GuidanceRule
from .logs import ADVICE, METRICS_FILE, ROWS_FILE, drop_later_lines

if TYPE_CHECKING:
    from .trainer import FlowDPPOTrainer

logger = get_logger(__name__)

# settings that may differ between a run and its continuation
FREE_SETTINGS = (
    "checkpoint_every", "device", "iterations", "keep_checkpoints", "output_dir", "plot_every", "progress", "project",
    "row_log", "trackers",
)  # fmt: skip


def save_run(trainer: FlowDPPOTrainer) -> Path:
    """Writes a checkpoint: weights, averages, optimizer, rewards so far, random states and iteration.

    All processes have to come here; the main one writes.

    Raises:
        RuntimeError: it cannot be written.
    """
    weights, workers, folder = trainer.weights, trainer.workers, trainer.output / "checkpoints"
    randoms = workers.gather_objects([checkpoint.random_state()])
    moments = checkpoint.optimizer_values(trainer.optimizer.adamw)
    tensors: dict[str, dict[str, Tensor]] = {
        **weights.state(),
        "optimizer": {
            f"{name}/{entry}": value
            for entry, values in moments.items()
            for name, value in workers.sharding.whole(values).items()
        },
        "scale": trainer.optimizer.state(),
        "history": trainer.history.tables,
        **{f"random-{rank}": tensors for rank, (tensors, _) in enumerate(randoms)},
    }
    state = {
        "version": _version(),
        # tried first: where several rules fit, the run goes on with the one it had
        "rules": [dataclasses.asdict(rule) for rule in trainer.recorder.rules],
        "random": [state for _, state in randoms],
        "skipped_updates": trainer.skipped_updates,
        "config": trainer.config.to_dict(),
    }
    if workers.is_main:
        keep = trainer.config.run.keep_checkpoints
        workers.attempt(checkpoint.save_checkpoint, folder, trainer.iteration, tensors, state, keep)
    workers.agree()
    return checkpoint.checkpoint_path(folder, trainer.iteration)


def begin_run(trainer: FlowDPPOTrainer, resume: bool) -> list[dict[str, float]]:
    """Prepares the output folder or restores the newest checkpoint; returns the metrics so far.

    The main process decides; the others have to see the same folder.

    Raises:
        ValueError: the folder holds a run and ``resume`` is False, or one with other settings.
        RuntimeError: the folder cannot be written to, or all its checkpoints are damaged.
    """
    workers = trainer.workers
    path = workers.attempt(_find, trainer, resume) if workers.is_main else None
    workers.agree()
    path = workers.from_main(path)
    if path is not None:
        workers.attempt(_restore, trainer, path)
    workers.agree()
    lines = workers.attempt(_begin_logs, trainer) if workers.is_main else None
    workers.agree()
    return [json.loads(line) for line in workers.from_main(lines)]


def _find(trainer: FlowDPPOTrainer, resume: bool) -> Path | None:
    """The checkpoint to continue from."""
    output, folder = trainer.output, trainer.output / "checkpoints"
    begun = (output / METRICS_FILE).exists() or checkpoint.checkpoints(folder)
    if not resume and trainer.iteration == 0 and begun:
        raise ValueError(
            f"run.output_dir: {output} holds a run already, expected a new folder; pass resume=True to continue it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(folder)
        path = checkpoint.newest_checkpoint(folder) if resume else None
        if path is not None:
            state = checkpoint.load_state(path)
            _check_settings(trainer.config, state["config"], f"{path}, written by version {state.get('version')},")
            # a kill may have come between writing this one and removing another
            checkpoint.remove_old(path, trainer.config.run.keep_checkpoints)
    except OSError as cause:
        raise RuntimeError(f"run.output_dir: {output} cannot be written to ({cause})") from cause
    return path


def _check_settings(config: FlowDPPOConfig, saved: dict[str, dict[str, Any]], path: str) -> None:
    own, usual = config.to_dict(), FlowDPPOConfig().to_dict()
    unknown = [f"{s}.{key}" for s, entries in saved.items() for key in entries if key not in own.get(s, {})]
    if unknown:
        raise ValueError(
            f"config: {path} has settings that this version does not know: {', '.join(unknown)}; expected the version "
            "that wrote it"
        )
    differing, absent = [], []
    for section, entries in own.items():
        for key, value in entries.items():
            if section == "run" and key in FREE_SETTINGS:
                continue
            if key not in saved.get(section, {}):
                absent.append(f"{section}.{key}")
                if value == usual[section][key]:
                    continue
            if saved.get(section, {}).get(key) != value:
                differing.append(f"{section}.{key}")
    if differing:
        raise ValueError(f"config: {path} has other settings of {', '.join(differing)}, expected the same")
    if absent:
        logger.warning("%s does not know %s: they are what is usual now", path, ", ".join(absent))


def _restore(trainer: FlowDPPOTrainer, path: Path) -> None:
    if not path.exists():
        raise RuntimeError(f"run.output_dir: {path} is not there, expected a folder that all processes share")
    tensors, state = checkpoint.load_checkpoint(path)
    weights = trainer.weights
    weights.load_state(tensors)
    trainer.optimizer.load_state(tensors["scale"])
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors["optimizer"].items():
        name, _, entry = key.rpartition("/")
        moments.setdefault(entry, {})[name] = value
    own = {entry: trainer.workers.sharding.own(whole) for entry, whole in moments.items()}
    checkpoint.load_optimizer(trainer.optimizer.adamw, own)
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
    trainer.recorder.rules = [
        GuidanceRule(**{**rule, "terms": tuple(map(tuple, rule["terms"]))}) for rule in state["rules"]
    ]
    trainer.iteration, trainer.skipped_updates = state["iteration"], state["skipped_updates"]
    logger.info("continuing from %s", path)


def _version() -> str:
    try:
        return importlib.metadata.version("flowdppo_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _begin_logs(trainer: FlowDPPOTrainer) -> list[str]:
    """Logs end where the checkpoint does: what came after it will be done, and logged, again."""
    output = trainer.output
    path = output / METRICS_FILE
    try:
        for log in (path, output / ROWS_FILE):
            drop_later_lines(log, trainer.iteration)
        copy = output / ".config.yaml"
        trainer.config.save(copy)
        copy.rename(output / "config.yaml")
        lines = path.read_text().splitlines() if path.exists() else []
    except OSError as cause:
        raise RuntimeError(f"run.output_dir: {output} cannot be written to ({cause}); {ADVICE}") from cause
    if len(lines) != trainer.iteration:
        logger.warning("%s has %d lines, expected %d: some were lost", path, len(lines), trainer.iteration)
    return lines
