"""How a run begins, what its checkpoints hold, and how it continues from one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..runs.logs import ADVICE, CHANGES_FILE, METRICS_FILE, ROWS_FILE, append_lines, drop_later_lines, from_json
from . import checkpoint
from .advantages import RewardHistory
from .config import FlowDPPOConfig
from .levers import explain_out_of_memory
from .run_folder import CHECKPOINTS, CONFIG_FILE, FolderLock, check_ours
from .weights.arrival import check_unchanged
from .weights.distributed import Workers
from .weights.optimizer import PolicyOptimizer
from .weights.policy import PolicyWeights

logger = get_logger(__name__)

# settings that may differ between a run and its continuation: where it runs, what it leaves and what it keeps in memory
_FREE = {
    "run": (
        "check_replay", "checkpoint_every", "device", "iterations", "keep_checkpoints", "output_dir", "plot_every",
        "progress", "project", "row_log", "trackers",
    ),
    "model": ("offload_idle",),
    "sampling": ("offload_trajectories",),
    "engines": ("retries", "timeout", "weights"),
    "evaluation": ("every", "num_steps", "images_per_prompt", "pipeline_kwargs"),
}  # fmt: skip
# those that change how numbers are rounded and nothing else, so that a run that went out of memory can go on
_ROUNDING = {
    "model": ("compile", "gradient_checkpointing"),
    "sampling": ("batch_size", "repeat_texts"),
    "engines": ("urls",),
    "optimizer": ("micro_batch_size", "steps_per_micro_batch"),
}


def may_differ(section: str, key: str) -> bool:
    """Whether a setting may be another one when a run continues."""
    return key in _FREE.get(section, ()) or key in _ROUNDING.get(section, ())


@dataclass
class RunState:
    """What a run is between two iterations: all that a checkpoint keeps, and gives back to a run that continues.

    Attributes:
        config: settings.
        output: folder of the run.
        workers, weights, optimizer, history: the trainer's.
        prompts: fingerprints of the prompts, in order.
        iteration: iterations that are done.
        skipped_updates: updates so far whose loss or gradient was not finite.
        reward_names: names of the rewards in the order of their columns; None before the first rollout.
        within: an iteration has begun to change the weights and is not over.
        on_begin: writes what else belongs into the folder, once it is this run's.
        allow_changed: settings that change results may be other ones than those of the run that continues.
        pipeline_settings: of a recipe, None where the run was started from Python.
    """

    config: FlowDPPOConfig
    output: Path
    workers: Workers
    weights: PolicyWeights
    optimizer: PolicyOptimizer
    history: RewardHistory
    prompts: list[str]
    iteration: int = 0
    skipped_updates: int = 0
    reward_names: list[str] | None = None
    within: bool = False
    on_begin: Callable[[Path], None] | None = None
    allow_changed: bool = False
    pipeline_settings: Any = None

    def __post_init__(self) -> None:
        self.lock = FolderLock(self.output)
        self._changed: dict[str, list[Any]] = {}

    def save(self) -> Path:
        """Writes a checkpoint: weights, averages, optimizer, rewards so far, random states and iteration.

        All processes have to come here; the main one writes.

        Raises:
            RuntimeError: it cannot be written.
            ValueError: another run writes to the folder.
        """
        weights, workers, folder = self.weights, self.workers, self.output / CHECKPOINTS
        if workers.is_main:
            workers.attempt(self.lock.check)
        randoms = workers.gather_objects([checkpoint.random_state()])
        moments = checkpoint.optimizer_values(self.optimizer.adamw)
        tensors: dict[str, dict[str, Tensor]] = {
            **weights.state(),
            "optimizer": {
                f"{name}/{entry}": value
                for entry, values in moments.items()
                for name, value in workers.sharding.whole(values).items()
            },
            "scale": self.optimizer.state(),
            "history": self.history.tables,
            **{f"random-{rank}": tensors for rank, (tensors, _) in enumerate(randoms)},
        }
        state = {
            "version": _version(),
            "random": [state for _, state in randoms],
            "skipped_updates": self.skipped_updates,
            "reward_names": self.reward_names,
            "prompts": self.prompts,
            "classes": weights.classes,
            "config": self.config.to_dict(),
        }
        if workers.is_main:
            keep = self.config.run.keep_checkpoints
            workers.attempt(checkpoint.save_checkpoint, folder, self.iteration, tensors, state, keep)
        workers.agree()
        return checkpoint.checkpoint_path(folder, self.iteration)

    @contextlib.contextmanager
    def begun(self, resume: bool) -> Iterator[list[dict[str, float]]]:
        """Within this context the output folder is this run's, prepared or restored; gives the metrics so far.

        The main process decides; the others have to see the same folder.

        Raises:
            ValueError: the folder holds a run and ``resume`` is False, or one with other settings, or another run
                writes to it, or it has files that no run wrote; or the pipeline was changed since it was given.
            RuntimeError: the folder cannot be written to, or all its checkpoints are damaged.
            torch.OutOfMemoryError: the device is too small; the message says for what, and what to change.
        """
        check_unchanged(self.weights.modules)
        if self.workers.is_main:
            self.workers.attempt(self._hold)
        self.workers.agree()
        try:
            yield self._begin(resume)
        except torch.OutOfMemoryError as cause:
            said = explain_out_of_memory(cause, self.config, self.pipeline_settings, updating=self.within)
            raise torch.OutOfMemoryError(said) from cause
        finally:
            if self.workers.is_main:
                self.lock.release()

    def _hold(self) -> None:
        try:
            self.lock.acquire()
        except OSError as cause:
            raise RuntimeError(f"run.output_dir: {self.output} cannot be written to ({cause})") from cause

    def _begin(self, resume: bool) -> list[dict[str, float]]:
        workers = self.workers
        path = workers.attempt(self._find, resume) if workers.is_main else None
        workers.agree()
        path = workers.from_main(path)
        if path is not None:
            workers.attempt(self._restore, path)
        elif self.within:
            raise RuntimeError(
                f"train: iteration {self.iteration + 1} was interrupted after its first update, and there is no "
                f"checkpoint to go back to{'' if resume else ' without resume=True'}; expected train(resume=True) with "
                "a checkpoint, or a new trainer on a pipeline that is loaded again"
            )
        workers.agree()
        lines = workers.attempt(self._begin_logs) if workers.is_main else None
        workers.agree()
        return [from_json(line) for line in workers.from_main(lines)]

    def _find(self, resume: bool) -> Path | None:
        """The checkpoint to continue from."""
        output, folder = self.output, self.output / CHECKPOINTS
        begun = (output / METRICS_FILE).exists() or checkpoint.checkpoints(folder)
        if not resume and self.iteration == 0 and begun:
            raise ValueError(
                f"run.output_dir: {output} holds a run already, expected a new folder; pass resume=True to continue it"
            )
        check_ours(output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_leftovers(folder)
            path = checkpoint.newest_checkpoint(folder) if resume else None
            if path is not None:
                state = checkpoint.load_state(path)
                where = f"{path}, written by version {state.get('version')},"
                self._changed = _check_settings(self.config, state["config"], where, allow_changed=self.allow_changed)
                self._check_prompts(state.get("prompts"), path)
                # a kill may have come between writing this one and removing another
                checkpoint.remove_old(path, self.config.run.keep_checkpoints)
        except OSError as cause:
            raise RuntimeError(f"run.output_dir: {output} cannot be written to ({cause})") from cause
        return path

    def _check_prompts(self, saved: list[str] | None, path: Path) -> None:
        """Rewards of the past and the order of a run are those of prompts by their number."""
        if saved in (None, self.prompts):
            return
        assert saved is not None
        if self.allow_changed and self.config.advantage.history is None:
            logger.warning("%s had other prompts, which this run goes on without", path)
            self._changed["prompts"] = [len(saved), len(self.prompts)]
            return
        pairs = enumerate(zip(saved, self.prompts))
        first = next((place for place, (before, now) in pairs if before != now), min(len(saved), len(self.prompts)))
        raise ValueError(
            f"prompts: got {len(self.prompts)}, of which entry {first} is not that of the run in {path.parent.parent}, "
            f"expected its {len(saved)} prompts in the same order"
        )

    def _restore(self, path: Path) -> None:
        if not path.exists():
            raise RuntimeError(f"run.output_dir: {path} is not there, expected a folder that all processes share")
        tensors, state = checkpoint.load_checkpoint(path)
        weights = self.weights
        weights.load_state(tensors)
        self.optimizer.load_state(tensors["scale"])
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            name, _, entry = key.rpartition("/")
            moments.setdefault(entry, {})[name] = value
        own = {entry: self.workers.sharding.own(whole) for entry, whole in moments.items()}
        checkpoint.load_optimizer(self.optimizer.adamw, own)
        self.history.tables = {name: table.to(self.workers.device) for name, table in tensors["history"].items()}
        rank = self.workers.rank
        if len(state["random"]) == self.workers.count:
            checkpoint.load_random_state(tensors[f"random-{rank}"], state["random"][rank])
        else:
            logger.warning(
                "%s was written by %d processes and is continued by %d: global random generators start afresh",
                path,
                len(state["random"]),
                self.workers.count,
            )
        self.iteration, self.skipped_updates = state["iteration"], state["skipped_updates"]
        self.reward_names, self.within = state.get("reward_names"), False
        logger.info("continuing from %s", path)

    def _begin_logs(self) -> list[str]:
        """Logs end where the checkpoint does: what came after it will be done, and logged, again."""
        output = self.output
        path = output / METRICS_FILE
        try:
            for log in (path, output / ROWS_FILE, output / CHANGES_FILE):
                drop_later_lines(log, self.iteration)
            if self._changed:
                # for who reads the run later
                line = {"iteration": self.iteration, "changed": self._changed}
                append_lines(output / CHANGES_FILE, [json.dumps(line, default=str)])
                self._changed = {}
            copy = output / ".config.yaml"
            self.config.save(copy)
            copy.rename(output / CONFIG_FILE)
            if self.on_begin is not None:
                self.on_begin(output)
            lines = path.read_text().splitlines() if path.exists() else []
        except OSError as cause:
            raise RuntimeError(f"run.output_dir: {output} cannot be written to ({cause}); {ADVICE}") from cause
        if len(lines) != self.iteration:
            logger.warning("%s has %d lines, expected %d: some were lost", path, len(lines), self.iteration)
        return lines


def _check_settings(
    config: FlowDPPOConfig, saved: dict[str, dict[str, Any]], path: str, *, allow_changed: bool
) -> dict[str, list[Any]]:
    """Settings that are other ones, each with what it was and what it is."""
    own, usual = config.to_dict(), FlowDPPOConfig().to_dict()
    unknown = [f"{s}.{key}" for s, entries in saved.items() for key in entries if key not in own.get(s, {})]
    if unknown:
        raise ValueError(
            f"config: {path} has settings that this version does not know: {', '.join(unknown)}; expected the version "
            "that wrote it"
        )
    differing, absent, changed = [], [], {}
    for section, entries in own.items():
        for key, value in entries.items():
            before = saved.get(section, {}).get(key, value)
            if before != value and section != "run":
                changed[f"{section}.{key}"] = [before, value]
            if key in _ROUNDING.get(section, ()) and before != value:
                logger.warning(
                    "%s.%s is %s, and was %s: numbers round otherwise from here on", section, key, value, before
                )
            if may_differ(section, key):
                continue
            if key not in saved.get(section, {}):
                absent.append(f"{section}.{key}")
                if value == usual[section][key]:
                    continue
            if saved.get(section, {}).get(key) != value:
                differing.append(f"{section}.{key}")
    if differing and not allow_changed:
        raise ValueError(
            f"config: {path} has other settings of {', '.join(differing)}, expected the same; "
            "--allow-changed (trainer.state.allow_changed = True in Python) goes on with the new ones"
        )
    if differing:
        logger.warning("%s had other settings of %s: the run is another one from here on", path, ", ".join(differing))
    if absent:
        logger.warning("%s does not know %s: they are what is usual now", path, ", ".join(absent))
    return changed


def _version() -> str:
    try:
        return importlib.metadata.version("flowdppo_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"
