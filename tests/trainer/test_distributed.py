"""Two processes do what one does: bitwise where matrix products have the same sizes, else up to their rounding."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import distributed_runs
import processes
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from flowdppo_fast.trainer.distributed import Workers

EPS = torch.finfo(torch.float32).eps

# a call of the pipeline and a micro-batch have as many rows on one process as on two
SETTINGS = {
    "lora, whole groups": {
        "pipeline": "digits",
        "reward": "two",
        "model": {"train": "lora", "lora_rank": 3, "ema_decay": 0.9},
        "sampling": {"prompts_per_rollout": 4, "group_size": 4, "batch_size": 4},
        "advantage": {"reward_weights": {"top": 0.5}, "per_reward": True, "history": 6},
        "optimizer": {"updates_per_rollout": 2},
        "evaluation": {"every": 1, "images_per_prompt": 1},
    },
    "full, groups split": {
        "pipeline": "digits",
        "reward": "one",
        "model": {"train": "full", "lora_rank": None, "ema_decay": 0.8},
        "sampling": {"prompts_per_rollout": 2, "group_size": 8, "batch_size": 4},
        "advantage": {"std": "global"},
        "objective": {"threshold": 1e-6, "kl_weight": 0.1},
        # so that a difference of gradients is no larger difference of steps
        "optimizer": {"updates_per_rollout": 2, "target_kl": 1e-5, "eps": 1e-2},
    },
    "steps of each group": {
        "pipeline": "digits",
        "reward": "one",
        "sampling": {
            "prompts_per_rollout": 2, "group_size": 4, "batch_size": 4, "sde_steps_per_rollout": 2,
            "per_group_steps": True,
        },
        # one micro-batch for each process: a sum of two has no order
        "optimizer": {"updates_per_rollout": 1},
    },
    "guidance, bf16 base": {
        "pipeline": "sd3",
        "reward": "one",
        "half_base": True,
        "model": {"train": "lora", "lora_rank": 3, "mixed_precision": "bf16", "gradient_checkpointing": True},
        "sampling": {"prompts_per_rollout": 2, "group_size": 4, "batch_size": 2, "noise": "stored"},
        "optimizer": {"updates_per_rollout": 2, "micro_batch_size": 2},
        "objective": {"threshold": 1e-6, "drift_budget": 1e-30},
    },
}  # fmt: skip


def start(folder: Path, name: str, *, count: int = 1, sharded: bool = False, resume: bool = False, **changes) -> Path:
    sections = {key: value for key, value in SETTINGS[name].items() if key not in ("pipeline", "reward")}
    sections["optimizer"] = {"learning_rate": 1e-2, "micro_batch_size": 4, "inner_epochs": 2, "max_grad_norm": 1e6} | (
        sections["optimizer"]
    )
    sections["sampling"] = {"num_steps": 5, "sde_steps": [0, 1, 2], **sections["sampling"]}
    for key, values in changes.items():
        sections[key] = {**sections.get(key, {}), **values}
    run = {"iterations": 2, "checkpoint_every": 1, "progress": False, "device": "cpu", **changes.get("run", {})}
    sections["run"] = run
    arguments = (str(folder), sections, SETTINGS[name]["pipeline"], SETTINGS[name]["reward"], resume)
    processes.run(distributed_runs.train, *arguments, count=count, sharded=sharded)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs on one process, each made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = start(tmp_path_factory.mktemp("alone") / "run", name)
        return made[name]

    return get


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Everything a run leaves, the random states apart: they depend on the number of processes."""
    found = {f"kept/{k}": v for k, v in load_file(folder / "kept.safetensors").items()}
    checkpoint = folder / "checkpoints" / f"iteration-{iteration:06d}"
    for file in [*checkpoint.glob("*.safetensors"), *(folder / "final").rglob("*.safetensors")]:
        if not file.name.startswith("random"):
            found |= {f"{file.parent.name}/{file.stem}/{k}": v for k, v in load_file(file).items()}
    # places of the reward history that are still empty
    return {name: value.nan_to_num(nan=1e6) for name, value in found.items()}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path, *, iteration: int = 2, tolerance: float = 0.0) -> None:
    """``tolerance`` is relative to the largest number of a tensor."""
    first, second = tensors(a, iteration), tensors(b, iteration)
    assert first.keys() == second.keys()
    for name, value in first.items():
        difference = float((value.double() - second[name].double()).abs().amax()) if value.numel() else 0.0
        # what is zero but for rounding (a key's bias) has no scale of its own
        scale = max(float(value.abs().max()), EPS) if value.numel() else 1.0
        assert difference <= tolerance * scale, (name, difference, scale)
    x, y = (json.loads((folder / "history.json").read_text()) for folder in (a, b))
    assert len(x) == len(y) == iteration
    for left, right in zip(x, y):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if not key.startswith(("seconds", "trajectory_bytes")):
                # means over processes are summed in another order
                assert right[key] == pytest.approx(value, rel=16 * EPS + 8 * tolerance, abs=16 * EPS), key
    # written by one process alone
    assert all(len((folder / "metrics.jsonl").read_text().splitlines()) == iteration for folder in (a, b))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_do_what_one_does(alone, tmp_path, name):
    iterations = 1 if "drift_budget" in SETTINGS[name].get("objective", {}) else 2
    two = start(tmp_path / "two", name, count=2)
    assert_same_run(alone(name), two, iteration=iterations)
    assert rows(two) == rows(alone(name))
    assert not all(kept for line in rows(two) for row in line["kept"] for kept in row) or "bf16" in name


@pytest.mark.parametrize("name", ["lora, whole groups", "full, groups split", "guidance, bf16 base"])
def test_sharded_weights_do_what_whole_ones_do(alone, tmp_path, name):
    iterations = 1 if "drift_budget" in SETTINGS[name].get("objective", {}) else 2
    sharded = start(tmp_path / "sharded", name, count=2, sharded=True)
    # gathered weights lie elsewhere in memory, where matrix products may round otherwise; the largest sum here has
    # some hundred terms, and the moments square what a gradient's rounding leaves
    tolerance = 256 * EPS if name == "full, groups split" else 0.0
    assert_same_run(alone(name), sharded, iteration=iterations, tolerance=tolerance)


def test_clipped_gradients_and_one_large_micro_batch(tmp_path):
    """Other batch sizes and a norm that is put together from shards: the same up to rounding."""
    name = "full, groups split"
    clip = {"optimizer": {"max_grad_norm": 1e-3, "micro_batch_size": 8}, "sampling": {"batch_size": None}}
    one = start(tmp_path / "one", name, **clip)
    for sharded in (False, True):
        two = start(tmp_path / f"two-{sharded}", name, count=2, sharded=sharded, **clip)
        assert_same_run(one, two, tolerance=256 * EPS)


@pytest.mark.parametrize(
    ("before", "after"), [((2, False), (2, False)), ((2, True), (1, False)), ((1, False), (2, True))]
)
def test_resume_on_the_same_and_on_another_number_of_processes(alone, tmp_path, before, after):
    name = "lora, whole groups"
    folder = tmp_path / "run"
    start(folder, name, count=before[0], sharded=before[1], run={"iterations": 1})
    start(folder, name, count=after[0], sharded=after[1], resume=True)
    whole, resumed = tensors(alone(name), 2), tensors(folder, 2)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items() if not key.startswith("kept"))
    # the first part of the run also made a final evaluation
    assert rows(folder) == rows(alone(name))
    warnings = (folder / "warnings").read_text()
    assert ("global random generators start afresh" in warnings) == (before[0] != after[0])


@pytest.mark.parametrize("sharded", [False, True])
def test_a_reward_that_fails_on_one_process_ends_the_run_on_all(tmp_path, sharded):
    sections = {
        "sampling": {"num_steps": 5, "sde_steps": [0, 1], "prompts_per_rollout": 4, "group_size": 4, "batch_size": 4}
    }
    started = time.monotonic()
    expected = "the reward server is gone"
    codes = processes.join(
        processes.start_all(
            distributed_runs.fail, str(tmp_path), sections, expected, "fails", count=2, sharded=sharded
        ),
        seconds=60,
    )
    assert codes == [0, 0]
    assert time.monotonic() - started < 60
    assert (tmp_path / "error-1").read_text() == f"ConnectionError: {expected}"
    assert (tmp_path / "error-0").read_text() == f"RuntimeError: process 1 of 2 failed: ConnectionError: {expected}"


def test_settings_that_processes_cannot_share(tmp_path):
    message = "an update has 6 samples for 2 processes, expected equal shares that are a multiple or a divisor of"
    sections = {"sampling": {"num_steps": 5, "sde_steps": [0], "prompts_per_rollout": 3, "group_size": 2},
                "optimizer": {"updates_per_rollout": 1}}  # fmt: skip
    processes.run(distributed_runs.fail, str(tmp_path), sections, message, count=2)


def test_weights_that_differ_between_processes(tmp_path):
    message = "weights of transformer: process 1 has others than process 0, expected the same on all 2 processes"
    processes.run(distributed_runs.start_differently, str(tmp_path), message, count=2)


@pytest.mark.parametrize(
    ("kind", "env", "message"),
    [
        (
            DistributedType.DEEPSPEED,
            {},
            r"distributed_type DEEPSPEED, expected processes with whole weights \(DDP\), or",
        ),
        (DistributedType.FSDP, {"FSDP_VERSION": "1"}, "fsdp_version: 1, expected 2"),
        (DistributedType.FSDP, {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: True, expected False"),
        (DistributedType.FSDP, {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "reshard_after_forward: False, expected True"),
        (
            DistributedType.FSDP,
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            r"fsdp_activation_checkpointing: True, expected False; set model\.gradient_checkpointing",
        ),
    ],
)
def test_launchers_that_cannot_be_followed(monkeypatch, kind, env, message):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **env}.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(distributed_type=kind, num_processes=2, process_index=0, is_main_process=True)
    with pytest.raises(ValueError, match=message):
        Workers(accelerator)  # type: ignore[arg-type]
