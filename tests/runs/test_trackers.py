"""Trackers without a network, as they are installed: what reaches them is read back from what they keep."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from accelerate import Accelerator

from flowdppo_fast.runs.tracking import RUN_ID_FILE, RunLog

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline"}


def kept(folder, suffix):
    """Media of a tracker, not the pages of the run itself."""
    return [path for path in folder.rglob(f"*{suffix}") if "media" in path.parts]


def run_id(tracker):
    return {"wandb": lambda run: run.id, "swanlab": lambda run: run.id, "trackio": lambda run: run.name}[tracker.name](
        tracker.tracker
    )


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_numbers_images_and_videos_reach_a_tracker_and_a_continued_run_is_the_same_there(name, tmp_path, monkeypatch):
    # some are read at import
    for variable, value in {**OFFLINE, "TRACKIO_DIR": str(tmp_path / "trackio")}.items():
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    ids = []
    for done in range(2):
        accelerator = Accelerator(cpu=True)
        with RunLog(accelerator, tmp_path, trackers=(name,), project="digits", config={"a": 1}, progress=False) as log:
            log.start([{"iteration": 1, "reward": 0.5}] * done)
            ids.append(run_id(accelerator.trackers[0]))
            log.iteration({"iteration": done + 1, "reward": 0.5})
            log.images("rollout", done + 1, torch.rand(2, 3, 16, 16), ["a one", "a two"])
            log.images("eval", done + 1, torch.rand(2, 5, 3, 16, 16), ["a video", "another"])
    assert ids[0] == ids[1]
    assert (tmp_path / RUN_ID_FILE).read_text().strip() in ids[0]
    assert len(kept(tmp_path, ".png")) == len(kept(tmp_path, ".gif")) == 4
    assert {Image.open(path).n_frames for path in kept(tmp_path, ".gif")} == {5}
