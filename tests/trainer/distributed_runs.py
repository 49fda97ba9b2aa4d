"""What the processes of ``test_distributed.py`` and ``test_survival.py`` do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from digits_example import PROMPTS, ink
from processes import builders
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer


def two_rewards(images, prompts, metadata):
    return {"ink": ink(images, prompts, metadata), "top": images[:, :, :4].mean((1, 2, 3))}


def noisy(images, prompts, metadata):
    """A reward that draws from the global generator."""
    return ink(images, prompts, metadata) + 0.01 * torch.rand(len(prompts))


def odd(images, prompts, metadata):
    return ink(images, prompts, metadata) * torch.tensor([float(int(prompt) % 2) for prompt in prompts])


def mean(images, prompts, metadata):
    return images.flatten(1).mean(1)


def fails_on_process_1(images, prompts, metadata):
    import torch.distributed

    fails_on_process_1.calls += 1
    if torch.distributed.get_rank() == 1 and fails_on_process_1.calls == 2:
        raise ConnectionError("the reward server is gone")
    return ink(images, prompts, metadata)


fails_on_process_1.calls = 0

REWARDS = {
    "one": ink,
    "two": two_rewards,
    "noisy": noisy,
    "odd": odd,
    "fails": fails_on_process_1,
    "broken": odd,
    "mean": mean,
}


def settings(folder: str | Path, sections: dict[str, dict]) -> dict[str, dict]:
    values: dict[str, dict] = {
        "model": {"train": "lora", "lora_rank": 3},
        "sampling": {"num_steps": 5, "sde_steps": [0, 1, 2], "prompts_per_rollout": 4, "group_size": 4},
        "objective": {"threshold": 1e-6},
        "optimizer": {"learning_rate": 1e-2, "micro_batch_size": 4, "inner_epochs": 2, "max_grad_norm": 1e6},
        "run": {"iterations": 2, "checkpoint_every": 1, "progress": False, "device": "cpu", "plot_every": 0},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    values["run"]["output_dir"] = str(folder)
    return values


def make_trainer(
    folder: str | Path, sections: dict[str, dict], pipeline: str = "digits", reward: str = "one"
) -> FlowDPPOTrainer:
    made = builders()
    prompts: Any = PROMPTS
    if pipeline == "sd3":
        torch.manual_seed(7)
        inputs = [made.text_inputs(1) for _ in range(4)]
        prompts = [{name: value[0] for name, value in row.items()} for row in inputs]
        extra = {"pipeline_kwargs": {"guidance_scale": 2.0, "height": 8, "width": 8}}
        sections = {**sections, "sampling": {**sections.get("sampling", {}), **extra}}
    elif pipeline == "relay":
        torch.manual_seed(7)
        prompts = [{"shift": torch.randn(6)} for _ in range(4)]
    pipe = getattr(made, f"make_{pipeline}")()
    if sections.pop("half_base", False):
        pipe.transformer.to(torch.bfloat16)
    config = FlowDPPOConfig.from_dict(settings(folder, sections))
    held_out = prompts[:3] if config.evaluation.every is not None else None
    torch.manual_seed(0)
    return FlowDPPOTrainer(pipe, REWARDS[reward], prompts, config, eval_prompts=held_out)


def train(
    folder: str, sections: dict[str, dict], pipeline: str = "digits", reward: str = "one", resume: bool = False
) -> None:
    """A run; advantages and gradients of each update are written beside what the trainer writes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    logging.getLogger("flowdppo_fast").addHandler(logging.FileHandler(Path(folder) / "warnings"))
    trainer = make_trainer(folder, sections, pipeline, reward)
    kept: dict[str, torch.Tensor] = {}
    step, sample = trainer.optimizer.step, trainer.sample

    def spy_on_step(loss, kl):
        number = sum(name.startswith("update") for name in kept)
        clip = torch.nn.utils.clip_grads_with_norm_

        def keep(parameters, *args, **kwargs):
            parts = trainer.workers.sharding.whole([p.grad for p in parameters]).values()
            kept[f"update{number}"] = torch.cat([part.flatten() for part in parts]).clone()
            return clip(parameters, *args, **kwargs)

        torch.nn.utils.clip_grads_with_norm_ = keep
        try:
            return step(loss, kl)
        finally:
            torch.nn.utils.clip_grads_with_norm_ = clip

    def spy_on_sample(iteration):
        rollout = sample(iteration)
        kept[f"advantages{iteration}"] = rollout.advantages.clone()
        if reward == "broken" and iteration == 1:
            # of the last process; no reward can do it, one that is not finite is an error of its own
            rollout.advantages[-1] = float("nan")
        return rollout

    trainer.optimizer.step, trainer.sample = spy_on_step, spy_on_sample
    history = trainer.train(resume=resume)
    trainer.save_pretrained(Path(folder) / "final")
    if trainer.workers.is_main:
        save_file(kept, str(Path(folder) / "kept.safetensors"))
        parts = sum(isinstance(module, FSDPModule) for module in trainer.pipeline.transformer.modules())
        facts = {"processes": trainer.workers.count, "parts": parts}
        (Path(folder) / "facts.json").write_text(json.dumps(facts))
        (Path(folder) / "history.json").write_text(json.dumps(history))


def killed(folder: str, sections: dict[str, dict], pipeline: str = "digits", reward: str = "one") -> None:
    """A run whose process 1 is killed in its second iteration."""
    import os
    import signal

    trainer = make_trainer(folder, sections, pipeline, reward)
    update = trainer.update

    def die(*args, **kwargs):
        if trainer.iteration == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args, **kwargs)

    trainer.update = die  # type: ignore[method-assign]
    trainer.train()


def fail(folder: str, sections: dict[str, dict], expected: str, reward: str = "one") -> None:
    """A run that must end with an error that has ``expected`` in its text; each process leaves the text in a file."""
    import os

    text = "no error"
    try:
        make_trainer(folder, sections, reward=reward).train()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"error-{os.environ.get('RANK', '0')}").write_text(text)
    if expected not in text:
        raise AssertionError(text)


def arrive_late(folder: str) -> None:
    """Process 1 comes two seconds after process 0, which must have waited."""
    import os
    import time

    from accelerate import Accelerator

    from flowdppo_fast.trainer.weights.distributed import Workers

    accelerator = Accelerator(cpu=True)
    there = Path(folder) / "process 1 is there"
    if os.environ["RANK"] == "1":
        time.sleep(2)
        there.write_text("")
    Workers(accelerator)
    assert there.exists()


def start_differently(folder: str, what: str, expected: str) -> None:
    """Process 1 has a transformer, or prompts, of its own."""
    import os

    made = builders()
    pipe = made.make_digits()
    other = os.environ["RANK"] == "1"
    prompts = PROMPTS[::-1] if other and "prompts" in what else PROMPTS
    if other and "weights" in what:
        with torch.no_grad():
            pipe.transformer.proj_out.bias[0].add_(1e-3)
    try:
        FlowDPPOTrainer(pipe, ink, prompts, FlowDPPOConfig.from_dict(settings(folder, {})))
    except ValueError as error:
        text = str(error)
    else:
        text = "no error"
    if expected not in text:
        raise AssertionError(text)


def mortal(folder: str, sections: dict[str, dict], kind: str | None, at: int, counts: str | None) -> None:
    """A run that goes on from where it is and kills itself at the ``at``-th moment of a ``kind``: before something is
    done to a ``file`` of the run, in the middle of a file of ``tensors`` or of a ``line`` of a log, or in a ``reward``.

    Args:
        counts: a file for the number of moments of each kind.
    """
    import os
    import signal
    import sys

    from flowdppo_fast.runs import logs
    from flowdppo_fast.trainer import checkpoint

    seen = dict.fromkeys(("time", "file", "tensors", "line", "reward"), 0)

    def moment(name: str) -> bool:
        seen[name] += 1
        return name == kind and seen[name] == at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    touches = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")

    def on_event(event: str, args: tuple) -> None:
        if event in touches and str(args[0]).startswith(folder) and moment("file"):
            die()

    def save(tensors, path, save_file=checkpoint.save_file):
        save_file(tensors, path)
        if moment("tensors"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    class Torn:
        """A log whose line is cut off in the middle."""

        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def writelines(self, lines):
            for line in lines:
                if moment("line"):
                    self.file.write(line[: len(line) // 2])
                    self.file.flush()
                    die()
                self.file.write(line)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def reward(images, prompts, metadata):
        if moment("reward"):
            die()
        return noisy(images, prompts, metadata)

    sys.addaudithook(on_event)
    checkpoint.save_file = save
    logs.open = lambda path, mode: (Torn if mode == "a" else open)(path, mode)
    REWARDS["mortal"] = reward
    trainer = make_trainer(folder, sections, reward="mortal")
    trainer.train(resume=True)
    if counts is not None:
        Path(counts).write_text(json.dumps(seen))
