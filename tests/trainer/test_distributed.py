"""Two processes do what one does: bitwise where matrix products have the same sizes, else up to their rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import distributed_runs
import processes
import pytest
import torch
import yaml
from accelerate.commands import launch as launch_module
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from digits_example import EXAMPLE
from safetensors.torch import load_file

from flowdppo_fast.trainer.weights.distributed import Workers

EPS = torch.finfo(torch.float32).eps
ZERO = processes.SHARDINGS["zero2"]

ACCELERATE = EXAMPLE.parent / "accelerate"
LAUNCHED = "lora, whole groups"
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
        # a matrix of one row is whole on one process and empty on the other
        "model": {"train": "lora", "lora_rank": 1, "mixed_precision": "bf16", "gradient_checkpointing": True},
        "sampling": {"prompts_per_rollout": 2, "group_size": 4, "batch_size": 2, "noise": "stored"},
        "optimizer": {"updates_per_rollout": 2, "micro_batch_size": 2},
        "objective": {"threshold": 1e-6, "drift_budget": 1e-30},
    },
    # a micro-batch that reaches one of them leaves the other without a gradient
    "two transformers": {
        "pipeline": "relay",
        "reward": "mean",
        "model": {"train": "lora", "lora_rank": 3, "lora_targets": ["mix"]},
        "sampling": {"prompts_per_rollout": 4, "group_size": 4, "batch_size": 4, "output_type": "latent"},
        "optimizer": {"updates_per_rollout": 2, "steps_per_micro_batch": 1},
    },
}  # fmt: skip


def sections_of(name: str, **changes) -> dict[str, dict]:
    sections = {key: value for key, value in SETTINGS[name].items() if key not in ("pipeline", "reward")}
    sections["optimizer"] = {"learning_rate": 1e-2, "micro_batch_size": 4, "inner_epochs": 2, "max_grad_norm": 1e6} | (
        sections["optimizer"]
    )
    sections["sampling"] = {"num_steps": 5, "sde_steps": [0, 1, 2], **sections["sampling"]}
    for key, values in changes.items():
        sections[key] = {**sections.get(key, {}), **values}
    run = {"iterations": 2, "checkpoint_every": 1, "progress": False, "device": "cpu", **changes.get("run", {})}
    return {**sections, "run": run}


def start(
    folder: Path,
    name: str,
    *,
    count: int = 1,
    sharding: str = "whole",
    reward: str | None = None,
    resume: bool = False,
    **changes,
) -> Path:
    given = SETTINGS[name]
    arguments = (str(folder), sections_of(name, **changes), given["pipeline"], reward or given["reward"], resume)
    processes.run(distributed_runs.train, *arguments, count=count, sharding=sharding)
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


def launch(config: str, folder: Path, *fate: str) -> subprocess.CompletedProcess:
    """``accelerate launch`` with one of the example configs, on two processes."""
    # as it stands for GPUs: run.device is what puts the run on CPUs
    options = ["--config_file", str(ACCELERATE / f"{config}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    arguments = [str(Path(__file__).with_name("launched.py")), str(folder), json.dumps(sections_of(LAUNCHED)), *fate]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)


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


def assert_same_tensors(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float, but: str = "-"
) -> None:
    first, second = ({k: v for k, v in found.items() if not k.startswith(but)} for found in (first, second))
    assert first.keys() == second.keys()
    for name, value in first.items():
        difference = float((value.double() - second[name].double()).abs().amax()) if value.numel() else 0.0
        # what is zero but for rounding (a key's bias) has no scale of its own
        scale = max(float(value.abs().max()), EPS) if value.numel() else 1.0
        assert difference <= tolerance * scale, (name, difference, scale)


def assert_same_run(a: Path, b: Path, *, iteration: int = 2, tolerance: float = 0.0) -> None:
    """``tolerance`` is relative to the largest number of a tensor."""
    assert_same_tensors(tensors(a, iteration), tensors(b, iteration), tolerance)
    # diffusers reads the class from its config
    configs = [{p.name: p.read_text() for p in (folder / "final").rglob("*config.json")} for folder in (a, b)]
    assert configs[0] == configs[1]
    x, y = (json.loads((folder / "history.json").read_text()) for folder in (a, b))
    assert len(x) == len(y) == iteration
    for left, right in zip(x, y):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if not key.startswith(("seconds", "samples_per", "trajectory_bytes")):
                # means over processes are summed in another order
                assert right[key] == pytest.approx(value, rel=16 * EPS + 8 * tolerance, abs=16 * EPS), key
    # written by one process alone
    assert all(len((folder / "metrics.jsonl").read_text().splitlines()) == iteration for folder in (a, b))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "two transformers"])
def test_two_processes_do_what_one_does(alone, tmp_path, name):
    iterations = 1 if "drift_budget" in SETTINGS[name].get("objective", {}) else 2
    two = start(tmp_path / "two", name, count=2)
    assert_same_run(alone(name), two, iteration=iterations)
    assert rows(two) == rows(alone(name))
    assert not all(kept for line in rows(two) for row in line["kept"] for kept in row) or "bf16" in name


@pytest.mark.parametrize(
    ("sharding", "name"),
    [
        ("fsdp2", "lora, whole groups"),
        ("fsdp2", "full, groups split"),
        ("fsdp2", "guidance, bf16 base"),
        ("zero1", "guidance, bf16 base"),
        ("zero2", "lora, whole groups"),
        ("zero3", "two transformers"),
    ],
)
def test_split_weights_do_what_whole_ones_do(alone, tmp_path, sharding, name):
    iterations = 1 if "drift_budget" in SETTINGS[name].get("objective", {}) else 2
    split = start(tmp_path / "split", name, count=2, sharding=sharding)
    # gathered weights lie elsewhere in memory, where matrix products may round otherwise; the largest sum here has
    # some hundred terms, and the moments square what a gradient's rounding leaves
    rounds_otherwise = (sharding, name) == ("fsdp2", "full, groups split") or sharding == "zero3"
    tolerance = 256 * EPS if rounds_otherwise else 0.0
    assert_same_run(alone(name), split, iteration=iterations, tolerance=tolerance)


def test_clipped_gradients_and_one_large_micro_batch(tmp_path):
    """Other batch sizes and a norm that is put together from shards: the same up to rounding."""
    name = "full, groups split"
    clip = {"optimizer": {"max_grad_norm": 1e-3, "micro_batch_size": 8}, "sampling": {"batch_size": None}}
    one = start(tmp_path / "one", name, **clip)
    for sharding in ("whole", "fsdp2"):
        two = start(tmp_path / sharding, name, count=2, sharding=sharding, **clip)
        assert_same_run(one, two, tolerance=256 * EPS)


def idle_processes(folder: Path) -> list[list[bool]]:
    """For each micro-batch whether the rows of either process have no advantage."""
    return [[not any(line["advantage"][part : part + 4]) for part in (0, 4)] for line in rows(folder)]


def test_no_process_skips_a_backward_alone(tmp_path):
    """Groups of even digits have no advantage: on one process nothing is to be done, on the other there is."""
    sections = {**sections_of("lora, whole groups"), "advantage": {}, "evaluation": {}}
    folders = [tmp_path / "one", tmp_path / "sharded"]
    for folder, (count, sharding) in zip(folders, ((1, "whole"), (2, "fsdp2"))):
        arguments = (str(folder), sections, "digits", "odd")
        processes.run(distributed_runs.train, *arguments, count=count, sharding=sharding)
    assert_same_run(*folders)
    idle = idle_processes(folders[0])
    assert [True, False] in idle or [False, True] in idle


def test_a_step_that_is_not_finite_is_left_out_by_all_and_the_run_continued_by_one(tmp_path):
    """With groups as in the test above: under ZeRO-3 no process skips a backward alone either."""

    def train(folder: Path, count: int, iterations: int) -> None:
        sections = {**sections_of("lora, whole groups", run={"iterations": iterations}), "advantage": {}}
        arguments = (str(folder), {**sections, "evaluation": {}}, "digits", "broken", True)
        processes.run(distributed_runs.train, *arguments, count=count, sharding="zero3" if count == 2 else "whole")

    one, split = tmp_path / "one", tmp_path / "split"
    train(one, 1, 3)
    train(split, 2, 2)
    idle = idle_processes(split)
    assert [True, False] in idle or [False, True] in idle
    # one of the two updates of each epoch
    history = json.loads((split / "history.json").read_text())
    assert [metrics["skipped_updates"] for metrics in history] == [0, 2]
    train(split, 1, 3)
    # gathered weights lie elsewhere in memory, as in the runs above
    assert_same_tensors(tensors(one, 3), tensors(split, 3), tolerance=256 * EPS, but="kept")


@pytest.mark.bits(across="process")
def test_a_killed_run_is_continued_with_weights_that_are_split_otherwise(alone, tmp_path):
    name = "full, groups split"
    arguments = (str(tmp_path / "run"), sections_of(name), SETTINGS[name]["pipeline"], SETTINGS[name]["reward"])
    started = processes.start_all(distributed_runs.killed, *arguments, count=2, sharding="zero2")
    # the other one is told that the connection is gone
    assert processes.join(started) == [1, -signal.SIGKILL]
    start(tmp_path / "run", name, count=2, sharding="zero3", resume=True)
    expected, ended = tensors(alone(name), 2), tensors(tmp_path / "run", 2)
    assert all(torch.equal(ended[key], value) for key, value in expected.items() if not key.startswith("kept"))
    assert rows(tmp_path / "run") == rows(alone(name))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "optimizer",
            {"skip_dropped_backward": True},
            "optimizer.skip_dropped_backward: got True, expected False in a",
        ),
        ("run", {"device": "cpu", "output_dir": "x"}, "no error"),
    ],
)
def test_what_processes_would_decide_alone_is_refused_in_sharded_runs(tmp_path, section, values, message):
    sections = {"sampling": {"num_steps": 4, "sde_steps": [0], "prompts_per_rollout": 2, "group_size": 2}}
    sections = {**sections, section: values, "run": {"iterations": 1, "progress": False, "device": "cpu"}}
    processes.run(distributed_runs.fail, str(tmp_path), sections, message, count=2, sharding="fsdp2")


@pytest.mark.bits(across="process")
@pytest.mark.parametrize(
    ("before", "after"), [((2, "whole"), (2, "whole")), ((2, "fsdp2"), (1, "whole")), ((1, "whole"), (2, "fsdp2"))]
)
def test_resume_on_the_same_and_on_another_number_of_processes(alone, tmp_path, before, after):
    name = "lora, whole groups"
    folder = tmp_path / "run"
    start(folder, name, count=before[0], sharding=before[1], run={"iterations": 1})
    start(folder, name, count=after[0], sharding=after[1], resume=True)
    whole, resumed = tensors(alone(name), 2), tensors(folder, 2)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items() if not key.startswith("kept"))
    # the first part of the run also made a final evaluation
    assert rows(folder) == rows(alone(name))
    warnings = (folder / "warnings").read_text()
    assert ("global random generators start afresh" in warnings) == (before[0] != after[0])


@pytest.mark.parametrize("sharding", ["whole", "fsdp2"])
def test_a_reward_that_fails_on_one_process_ends_the_run_on_all(tmp_path, sharding):
    sections = {
        "sampling": {"num_steps": 5, "sde_steps": [0, 1], "prompts_per_rollout": 4, "group_size": 4, "batch_size": 4}
    }
    started = time.monotonic()
    expected = "the reward server is gone"
    codes = processes.join(
        processes.start_all(
            distributed_runs.fail, str(tmp_path), sections, expected, "fails", count=2, sharding=sharding
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


def test_no_process_goes_ahead_before_all_are_connected(tmp_path):
    processes.run(distributed_runs.arrive_late, str(tmp_path), count=2)


@pytest.mark.parametrize("what", ["transformer weights", "settings or prompts"])
def test_processes_that_start_differently(tmp_path, what):
    message = f"{what} of process 1 are others than those of process 0, expected the same on all 2"
    processes.run(distributed_runs.start_differently, str(tmp_path), what, message, count=2)


@pytest.mark.parametrize(
    ("kind", "env", "message"),
    [
        (DistributedType.MEGATRON_LM, {}, r"distributed_type MEGATRON_LM, expected processes with whole weights"),
        (
            DistributedType.DEEPSPEED,
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            "deepspeed_config offload_param_device: cpu, expected none",
        ),
        (
            DistributedType.DEEPSPEED,
            {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            "deepspeed_config config_file: ds.json, expected none, and a zero_stage",
        ),
        (
            DistributedType.DEEPSPEED,
            {**ZERO, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
            "deepspeed_config zero3_init_flag: true, expected false",
        ),
        (
            DistributedType.DEEPSPEED,
            {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "zero_stage: 0, expected 1, 2 or 3",
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
    accelerator = SimpleNamespace(
        distributed_type=kind, num_processes=2, process_index=0, is_main_process=True, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=message):
        Workers(accelerator)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_configs_are_what_accelerate_reads(monkeypatch, path):
    # an unknown key is an error of accelerate's parser
    config = load_config_from_file(str(path))
    assert config.to_dict()["num_processes"] == 8 * config.num_machines
    assert config.mixed_precision == "no"
    given = yaml.safe_load(path.read_text())
    assert (config.distributed_type == DistributedType.FSDP) == ("fsdp_config" in given)
    assert given.get("fsdp_config", {}).get("fsdp_version", 2) == 2
    assert (config.distributed_type == DistributedType.DEEPSPEED) == ("deepspeed_config" in given)
    if "deepspeed_config" in given:
        launched: list = []
        monkeypatch.setattr(launch_module, "deepspeed_launcher", launched.append)
        launch_module.launch_command(
            launch_module.launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
        )
        _, env = prepare_deepspeed_cmd_env(launched[0])
        # what the tests above set
        assert processes.SHARDINGS[path.stem].items() <= env.items()


@pytest.mark.slow
def test_accelerate_launches_a_sharded_run(alone, tmp_path):
    done = launch("fsdp2", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "facts.json").read_text()) == {"processes": 2, "parts": 3}
    assert_same_run(alone(LAUNCHED), tmp_path / "run")
    # both had left their group when the interpreter ended
    assert [(tmp_path / "run" / f"group-{rank}").read_text() for rank in (0, 1)] == ["False"] * 2


@pytest.mark.bits(across="process")
def test_a_killed_process_ends_the_launch_and_the_run_can_be_continued(alone, tmp_path):
    started = time.monotonic()
    done = launch("ddp", tmp_path / "run", "process 1 dies in its second iteration")
    assert done.returncode != 0
    assert time.monotonic() - started < 150
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-000001"]
    start(tmp_path / "run", LAUNCHED, count=2, resume=True)
    expected, ended = tensors(alone(LAUNCHED), 2), tensors(tmp_path / "run", 2)
    assert all(torch.equal(ended[key], value) for key, value in expected.items() if not key.startswith("kept"))
    assert rows(tmp_path / "run") == rows(alone(LAUNCHED))
