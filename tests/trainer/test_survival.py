"""A run that is killed again and again ends where an uninterrupted one ends, to the last bit; damage is noticed."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import distributed_runs
import processes
import pytest
import torch
from digits_example import PROMPTS, ink
from safetensors.torch import load_file

from bench.ops.devices import open_device
from bench.ops.environment import collect
from flowdppo_fast.runs import logs, tracking
from flowdppo_fast.trainer import FlowDPPOTrainer, checkpoint

# the long form, with a tally of it in a file: FLOWDPPO_KILLS=55 FLOWDPPO_KILLS_TALLY=FILE.json
# python -m pytest tests/trainer/test_survival.py -k killed_at_random -o timeout=3600
KILLS = int(os.environ.get("FLOWDPPO_KILLS", "12"))
MOMENTS = ("time", "file", "tensors", "line", "reward")
SECTIONS = {
    "model": {"train": "lora", "lora_rank": 3, "ema_decay": 0.9},
    "sampling": {
        "num_steps": 4, "sde_steps": [0, 1, 2], "sde_steps_per_rollout": 2, "prompts_per_rollout": 2, "group_size": 4,
        "batch_size": 4,
    },
    "advantage": {"history": 6},
    "optimizer": {"learning_rate": 1e-2, "micro_batch_size": 4},
    "evaluation": {"every": 2},
    "run": {"iterations": 5, "checkpoint_every": 1, "keep_checkpoints": 2},
}  # fmt: skip


def result(folder: Path) -> dict[str, object]:
    """Everything a run leaves: files of all checkpoints, logs without times."""
    left: dict[str, object] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (*folder.rglob("*.safetensors"), folder / "rows.jsonl", folder / "config.yaml")
    }
    # the folder's name is in it
    left["config.yaml"] = left["config.yaml"].replace(str(folder).encode(), b"")  # type: ignore[attr-defined]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left["metrics"] = [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "samples_per"))} for line in lines
    ]
    left["checkpoints"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    left["files"] = sorted(path.name for path in folder.iterdir())
    return left


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[dict[str, object], dict[str, int], float]:
    """What is left of a run, how many moments of each kind it has, and its seconds."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    counts = folder.with_name("counts")
    processes.run(distributed_runs.mortal, str(folder), SECTIONS, None, 0, str(counts))
    started = time.monotonic()
    shutil.rmtree(folder)
    processes.run(distributed_runs.mortal, str(folder), SECTIONS, None, 0, str(counts))
    return result(folder), json.loads(counts.read_text()), time.monotonic() - started


@pytest.mark.bits(across="process")
def test_a_run_that_is_killed_at_random_moments_ends_where_it_would_have(uninterrupted, tmp_path, capsys):
    expected, counts, seconds = uninterrupted
    seed = os.environ.get("FLOWDPPO_KILL_SEED", "0")
    draw, started = random.Random(seed), collect(open_device("cpu"))
    # of each run its attempts: when it was to be killed, and whether it was
    storm: list[list[dict[str, object]]] = []
    tally = dict.fromkeys(MOMENTS, 0)
    runs = finished = 0
    while sum(tally.values()) < KILLS:
        folder = tmp_path / f"run{runs}"
        moments: list[dict[str, object]] = []
        # a few kills each, so that many kinds of remains meet
        for _ in range(4):
            kind = MOMENTS[(sum(tally.values()) + runs) % len(MOMENTS)]
            # later moments are often beyond what is left to do: that run then ends by itself
            at = draw.randint(1, max(1, counts[kind] * 2 // 3)) if kind != "time" else 0
            process = processes.start(distributed_runs.mortal, str(folder), SECTIONS, kind, at, None)
            if kind == "time":
                at = draw.uniform(0.2, 1.0)
                time.sleep(at * seconds)
                process.kill()
            # the long form may share its machine with much else
            (code,) = processes.join([process], seconds=90 if KILLS <= 12 else 600)
            assert code in (0, -9), f"exit code {code} after a kill"
            tally[kind] += code == -9
            finished += code == 0
            moments.append({"kind": kind, "at": round(at, 3), "killed": code == -9})
            if code == 0:
                break
        processes.run(distributed_runs.mortal, str(folder), SECTIONS, None, 0, None)
        left = result(folder)
        assert left.keys() == expected.keys()
        differing = [name for name, value in expected.items() if left[name] != value]
        assert differing == [], (differing, tally)
        shutil.rmtree(folder)
        runs += 1
        storm.append(moments)
        # as it grows: what is in it is what was checked
        if path := os.environ.get("FLOWDPPO_KILLS_TALLY"):
            command = "python -m pytest tests/trainer/test_survival.py -k killed_at_random -o timeout=3600"
            summary = {
                "command": f"FLOWDPPO_KILLS={KILLS} FLOWDPPO_KILL_SEED={seed} {command}",
                "environment": started,
                "seed": seed,
                "kills": sum(tally.values()),
                "kills_by_kind": tally,
                "runs": runs,
                "resumes": sum(map(len, storm)),
                "ended_before_their_kill": finished,
                # asserted above for each of them
                "runs_bitwise_equal_to_the_uninterrupted_one": runs,
            }
            lines = ",\n".join(f"  {json.dumps(moments)}" for moments in storm)
            Path(path).write_text(f'{json.dumps(summary, indent=1)[:-2]},\n "storm": [\n{lines}\n ]\n}}\n')
    with capsys.disabled():
        print(f"\n{sum(tally.values())} kills in {runs} runs: {tally}; {finished} runs ended before their kill")


@pytest.fixture
def finished(pipes, small_config):
    """A run with two checkpoints."""
    config = small_config(
        model={"train": "lora", "lora_rank": 3}, run={"iterations": 2, "keep_checkpoints": 2},
        sampling={"num_steps": 4, "sde_steps": [0], "prompts_per_rollout": 2, "group_size": 4},
    )  # fmt: skip

    def make(**run):
        changed = type(config).from_dict({**config.to_dict(), "run": {**config.to_dict()["run"], **run}})
        return FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, changed)

    trainer = make()
    trainer.train()
    return trainer, make


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) - 3] ^= 1
    path.write_bytes(bytes(data))


def next_digit(path: Path) -> None:
    """Still JSON, but another number: the seed of numpy's generator, say."""
    data = bytearray(path.read_bytes())
    at = max(place for place, byte in enumerate(data[: len(data) // 2]) if chr(byte).isdigit())
    data[at] = ord("0") + (data[at] - ord("0") + 1) % 10
    json.loads(data)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (cut, "weights.safetensors", r"weights\.safetensors has \d+ bytes, expected"),
        (flip, "optimizer.safetensors", r"optimizer\.safetensors is not what was written"),
        (Path.unlink, "scale.safetensors", r"No such file or directory.*scale\.safetensors"),
        (cut, "state.json", r"state\.json cannot be read"),
        (next_digit, "state.json", r"state\.json cannot be read, or is not what was written"),
        (Path.unlink, "state.json", r"No such file or directory.*state\.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished, caplog, damage, file, message):
    trainer, make = finished
    folder = trainer.output / "checkpoints"
    expected = result(trainer.output)
    damage(folder / "iteration-000002" / file)
    again = make()
    again.train(resume=True)
    assert caplog.text.count("is damaged and passed over") == 1
    assert re.search(message, caplog.text)
    # it went back to iteration 1 and did iteration 2 again
    assert result(trainer.output) == expected


def test_when_all_checkpoints_are_damaged_nothing_is_started_afresh(finished):
    trainer, make = finished
    for path in (trainer.output / "checkpoints").iterdir():
        cut(path / "weights.safetensors")
    logs = (trainer.output / "metrics.jsonl").read_text()
    with pytest.raises(RuntimeError, match=r"all 2 checkpoints in .* are damaged, expected a complete one"):
        make().train(resume=True)
    assert (trainer.output / "metrics.jsonl").read_text() == logs


def test_leftovers_of_kills_are_removed_and_a_replaced_checkpoint_comes_back(finished):
    trainer, make = finished
    folder = trainer.output / "checkpoints"
    expected = result(trainer.output)
    (folder / ".writing-iteration-000003").mkdir()
    (folder / ".removing-iteration-000000").mkdir()
    # killed before an old one was removed
    shutil.copytree(folder / "iteration-000001", folder / "iteration-000000")
    # killed between the two renames that replace a checkpoint
    (folder / "iteration-000002").rename(folder / ".replaced-iteration-000002")
    again = make()
    again.train(resume=True)
    assert again.iteration == 2
    assert result(trainer.output) == expected
    # the same iteration may be saved again
    again.save_checkpoint()
    assert result(trainer.output).keys() == expected.keys()


def test_a_damaged_checkpoint_is_no_reason_to_remove_a_good_one(finished):
    trainer, make = finished
    folder = trainer.output / "checkpoints"
    shutil.copytree(folder / "iteration-000002", folder / "iteration-000009")
    flip(folder / "iteration-000009" / "weights.safetensors")
    again = make(iterations=3, keep_checkpoints=1)
    again.train(resume=True)
    assert checkpoint.newest_checkpoint(folder) == folder / "iteration-000003"
    assert not (folder / "iteration-000002").exists()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(finished, monkeypatch):
    trainer, make = finished
    before = {p: p.read_bytes() for p in (trainer.output / "checkpoints").rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    more = make(iterations=3)
    sample = more.sample

    def fill(iteration):
        # from here on no file grows beyond this; the logs still fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        return sample(iteration)

    more.sample = fill  # type: ignore[method-assign]
    try:
        with pytest.raises(
            RuntimeError, match=r"checkpoint of iteration 3 could not be written .* is iteration-000002"
        ):
            more.train(resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in (trainer.output / "checkpoints").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in (trainer.output / "checkpoints").iterdir()) == [
        "iteration-000001",
        "iteration-000002",
    ]
    make(iterations=3).train(resume=True)
    assert [p.name for p in checkpoint.checkpoints(trainer.output / "checkpoints")][-1] == "iteration-000003"


@pytest.mark.parametrize(
    ("patched", "module", "message"),
    [
        ("fsync", logs.os, r"metrics\.jsonl could not be written|rows\.jsonl could not be written"),
        ("truncate", logs.os, "cannot be written to"),
        ("mkdir", Path, "cannot be written to"),
        # what comes before the checkpoint of an iteration
        ("replace", tracking.os, r"rollout-000003\.png could not be written"),
    ],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_logs_images_and_folders_that_cannot_be_written(finished, monkeypatch, patched, module, message, code):
    trainer, make = finished
    more = make(iterations=3, plot_every=1)

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(module, patched, refuse)
        with pytest.raises(RuntimeError, match=rf"run\.output_dir: .*({message}).*{os.strerror(code)}"):
            more.train(resume=True)
    assert checkpoint.newest_checkpoint(trainer.output / "checkpoints").name == "iteration-000002"
    assert [m["iteration"] for m in make(iterations=3).train(resume=True)] == [1, 2, 3]


def unsealed(path: Path) -> dict[str, Any]:
    """The state as an older version wrote it, without a digest."""
    state = json.loads(path.read_text())
    del state["sha256"]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["sampling"].update(wobble=3), r"settings that this version does not know: sampling\.wobble"),
        (lambda c: c["sampling"].update(eta=0.1), r"written by version .*, has other settings of sampling\.eta"),
        # not the default, and an older version did not have it
        (lambda c: c["model"].pop("lora_rank"), r"has other settings of model\.lora_rank, expected the same"),
    ],
)
def test_checkpoints_of_other_versions_are_refused_with_their_reason(finished, change, message):
    trainer, make = finished
    for path in (trainer.output / "checkpoints").glob("*/state.json"):
        state = unsealed(path)
        change(state["config"])
        path.write_text(json.dumps(state))
    logs = (trainer.output / "rows.jsonl").read_text()
    with pytest.raises(ValueError, match=message):
        make(iterations=3).train(resume=True)
    assert (trainer.output / "rows.jsonl").read_text() == logs


def test_a_setting_that_an_older_version_did_not_have_is_what_is_usual(finished, caplog):
    trainer, make = finished
    for path in (trainer.output / "checkpoints").glob("*/state.json"):
        state = unsealed(path)
        del state["config"]["advantage"]["history"]
        path.write_text(json.dumps(state))
    assert len(make(iterations=3).train(resume=True)) == 3
    assert "does not know advantage.history: they are what is usual now" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(finished):
    other = finished[1](iterations=3)
    state = other.weights.state()
    name = other.weights.names[0]
    with pytest.raises(ValueError, match=f"weights has other weights than the pipeline, '{name}' among them"):
        other.weights.load_state({"weights": {k: v for k, v in state["weights"].items() if k != name}})
    with pytest.raises(ValueError, match=rf"weights has shape \[1\] for '{name}', expected that of"):
        other.weights.load_state({"weights": {**state["weights"], name: torch.zeros(1)}})


def test_nothing_is_unpickled(finished, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    _, make = finished
    again = make()
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert len(again.train(resume=True)) == 2
    assert load_file(again.output / "checkpoints/iteration-000002/weights.safetensors")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_last_plot_that_cannot_be_written(finished, monkeypatch, code):
    """The work is done and saved; only the picture is missing."""
    trainer, make = finished
    more = make(iterations=3, plot_every=None)

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("flowdppo_fast.runs.plots.plot_run", refuse)
        with pytest.raises(RuntimeError, match=rf"metrics\.png could not be written .*{os.strerror(code)}"):
            more.train(resume=True)
    assert checkpoint.newest_checkpoint(trainer.output / "checkpoints").name == "iteration-000003"
