"""What a run leaves beside its checkpoints: metrics, plots, pages of images, trackers and the progress bar."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker, filter_trackers
from tqdm.auto import tqdm

from .logs import METRICS_FILE, append_lines, to_json, writing

logger = get_logger(__name__)

PLOT_FILE, IMAGES_FOLDER, RUN_ID_FILE = "metrics.png", "images", "tracker_id.txt"
# a folder with it is a run's, of which there can be a report
CONFIG_FILE = "config.yaml"
# metric: how the progress bar writes it
_POSTFIX = {
    "reward": ("reward", "{:.3f}"),
    "kl_new_old_mean": ("kl", "{:.1e}"),
    "masked_fraction": ("masked", "{:.1%}"),
    "samples_per_second": ("samples/s", "{:.3g}"),
}


class RunLog:
    """Writes what happens in a run. Only the main process writes; on the others every method returns at once.

    In ``folder``: ``metrics.jsonl`` (a line per iteration), ``metrics.png``, ``images/KIND-ITERATION.png``,
    ``report.html`` (:mod:`~.report`), ``tensorboard/``, ``wandb/`` and ``swanlab/`` where those trackers are on.
    trackio keeps its runs in a place of its own (``TRACKIO_DIR``). Images reach all four with their captions, videos as
    videos.

    Args:
        accelerator: whose trackers are started, and which knows the main process.
        folder: of the run; made if absent.
        trackers: ``"tensorboard"``, ``"wandb"``, ``"trackio"``, ``"swanlab"``, or trackers of accelerate's
            ``GeneralTracker`` class.
        project: name of the project for trackers.
        config: settings of the run for trackers; nested keys are joined by dots.
        total: iterations of the whole run, for the progress bar.
        progress: show the progress bar.
        plot_every: iterations between plots and before the one at the end; None means only that one, 0 none at all.

    Raises:
        ValueError: a tracker whose package is not installed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: str | Path,
        *,
        trackers: Sequence[str | GeneralTracker] = (),
        project: str = "flowdppo",
        config: Mapping[str, Any] | None = None,
        total: int | None = None,
        progress: bool = True,
        plot_every: int | None = 10,
    ):
        self.accelerator, self.folder, self.project = accelerator, Path(folder), project
        self.config, self.total, self.progress, self.plot_every = dict(config or {}), total, progress, plot_every
        self._trackers = list(trackers)
        usable = filter_trackers(self._trackers, self.folder)
        # accelerate drops silently what is not installed
        missing = [name for name in self._trackers if isinstance(name, str) and name not in map(str, usable)]
        if missing:
            raise ValueError(f"trackers: {missing} not installed, expected: pip install {' '.join(missing)}")
        self.history: list[dict[str, Any]] = []
        self._bar: tqdm | None = None

    def start(self, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Opens everything. To be called by all processes.

        Args:
            history: metrics of the iterations that are done, those in ``metrics.jsonl``.
        """
        if self._trackers:
            self._start_trackers(len(history))
        if not self.accelerator.is_main_process:
            return
        self.history = [dict(metrics) for metrics in history]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._bar = tqdm(
            total=self.total, initial=len(history), disable=not self.progress, unit="it", dynamic_ncols=True
        )

    def say(self, text: str) -> None:
        """Lines beside the progress bar, where there is one."""
        if self._bar is not None and self.progress:
            self._bar.write(text, file=sys.stderr)

    def doing(self, text: str) -> None:
        """What is being done within an iteration, before the progress bar."""
        if self._bar is not None:
            self._bar.set_description(text)

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """One iteration is done: ``metrics`` are numbers by name, with ``iteration`` (from 1).

        The line is on the disk when this returns; a checkpoint should be written after it.

        Raises:
            RuntimeError: the line, or the plot, cannot be written.
        """
        if self._bar is not None:
            self.history.append(dict(metrics))
            append_lines(self.folder / METRICS_FILE, [to_json(dict(metrics))])
        # after the line: a tracker that fails takes nothing of the run with it
        if self._trackers:
            numbers = {key: value for key, value in metrics.items() if key != "iteration"}
            self.accelerator.log(numbers, step=int(metrics["iteration"]))
        if self._bar is None:
            return
        shown = {name: form.format(metrics[key]) for key, (name, form) in _POSTFIX.items() if key in metrics}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self.plot_every and metrics["iteration"] % self.plot_every == 0:
            self._plot()

    def images(self, kind: str, iteration: int, images: Any, captions: Sequence[str]) -> Path | None:
        """Writes a page of images, or of videos as strips of frames.

        Args:
            kind: ``"rollout"``, ``"eval"`` or the like; the first part of the file's name.
            iteration: after which they were drawn.
            images: what the pipeline returned, see :func:`~flowdppo_fast.runs.grids.image_grid`.
            captions: a text per image, see :func:`~flowdppo_fast.runs.grids.caption`.

        Returns:
            The file, None on other processes than the main one.

        Raises:
            RuntimeError: it cannot be written.
        """
        if not self.accelerator.is_main_process:
            return None
        from .grids import image_grid
        from .media import send

        page = image_grid(images, captions)
        folder = self.folder / IMAGES_FOLDER
        path = folder / f"{kind}-{iteration:06d}.png"
        temporary = folder / f".{path.name}.writing"
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            page.save(temporary, format="PNG")
            os.replace(temporary, path)
        for tracker in self.accelerator.trackers if self._trackers else ():
            send(tracker, kind, iteration, images, captions, page)
        return path

    def close(self) -> None:
        """Draws the last plot and closes everything; the folder is whole at any time before, too."""
        if self._trackers:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers = []
        if self._bar is not None:
            if self.history and self.plot_every != 0:
                self._plot()
            self._bar.close()
            self._bar = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:
            # what went wrong first, a full disk for one, is what has to be seen
            logger.warning("the last plot could not be drawn: %s", second)

    def _start_trackers(self, done: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.project_configuration.set_directories(str(self.folder / "tensorboard"))
        self.accelerator.log_with = filter_trackers(self._trackers, self.folder)
        options = {
            # drops what a killed run logged beyond its checkpoint
            "tensorboard": {"purge_step": done + 1} if done else {},
            "wandb": {"dir": str(self.folder), "id": self._run_id(), "resume": "allow"},
            "trackio": {"name": f"{self.folder.resolve().name}-{self._run_id()}", "resume": "allow"},
            "swanlab": {"log_dir": str(self.folder / "swanlab"), "id": self._run_id(), "resume": "allow"},
        }
        config = None if done else _flat(self.config)
        self.accelerator.init_trackers(self.project, config=config, init_kwargs=options)

    def _run_id(self) -> str | None:
        """The run's id at trackers, kept in the folder so that a continued run is the same one there."""
        if not {"wandb", "trackio", "swanlab"} & set(map(str, self._trackers)) or not self.accelerator.is_main_process:
            return None
        path = self.folder / RUN_ID_FILE
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8] + "\n")
        return path.read_text().strip()

    def _plot(self) -> None:
        from .plots import plot_run
        from .report import write_report

        path = self.folder / PLOT_FILE
        with writing(path):
            plot_run(self.history, path)
        if (self.folder / CONFIG_FILE).is_file():
            try:
                write_report(self.folder)
            except ValueError as error:
                # a page for readers ends no run
                logger.warning("no report of the run so far: %s", error)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; trackers take numbers, truth values and texts."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat
