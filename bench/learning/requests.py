"""From a short description of a run to its complete request, by the settings that were frozen after tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowdppo_fast.trainer import FlowDPPOConfig

from .methods import METHODS, objective_settings
from .paths import SETTINGS
from .tasks import load_task

# rewards of a task by how many of them are optimised together
REWARDS = {
    "digits": {1: ("judge",), 2: ("judge", "bold"), 3: ("judge", "bold", "slant")},
    "shapes": {1: ("judge",), 2: ("judge", "big"), 3: ("judge", "big", "warm")},
}


@dataclass(frozen=True)
class Cell:
    """What a run varies; everything else comes from the settings.

    Attributes:
        task: ``"digits"`` or ``"shapes"``.
        method: key of :data:`~bench.learning.methods.METHODS`.
        bound: nats, None for a method without one.
        rewards: how many rewards.
        inner_epochs: passes over a rollout.
        guidance: scale of classifier-free guidance in training and evaluation; 1 is none.
        kl_weight: weight of the KL to the pretrained model, with LoRA adapters; None trains all weights.
        rate: factor on the learning rate.
        seed: of the run.
    """

    task: str
    method: str
    bound: float | None
    rewards: int = 1
    inner_epochs: int = 2
    guidance: float = 1.0
    kl_weight: float | None = None
    rate: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """File name without its ending."""
        parts = [self.task, self.method]
        if self.bound is not None:
            parts.append(f"b{self.bound:g}")
        if self.rate != 1:
            parts.append(f"r{self.rate:g}")
        if self.rewards != 1:
            parts.append(f"{self.rewards}rewards")
        if self.inner_epochs != 2:
            parts.append(f"e{self.inner_epochs}")
        if self.guidance != 1:
            parts.append(f"g{self.guidance:g}")
        if self.kl_weight is not None:
            parts.append(f"lora-k{self.kl_weight:g}")
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def group(self) -> tuple:
        """The cell without its seed."""
        return tuple(value for key, value in asdict(self).items() if key != "seed")


def load_settings(path: Path = SETTINGS) -> dict[str, Any]:
    return json.loads(path.read_text())


def request(cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The complete request of a cell.

    Raises:
        ValueError: a cell that makes no run.
    """
    task, method = load_task(cell.task), METHODS[cell.method]
    own = settings["tasks"][cell.task]
    names = REWARDS[cell.task][cell.rewards]
    trainer: dict[str, Any] = {section: dict(entries) for section, entries in own["trainer"].items()}
    sampling, optimizer = trainer["sampling"], trainer["optimizer"]
    sampling["sampler"] = method.sampler
    if cell.guidance != 1:
        sampling["pipeline_kwargs"] = {"guidance_scale": cell.guidance}
    trainer["model"] = {"train": "full"}
    if cell.kl_weight is not None:
        trainer["model"] = {"train": "lora", "lora_rank": own["lora"]["rank"]}
        optimizer["learning_rate"] = own["lora"]["learning_rate"]
    optimizer["learning_rate"] *= cell.rate
    optimizer["inner_epochs"] = cell.inner_epochs
    trainer["objective"] = objective_settings(method, cell.bound, task.elements)
    if cell.kl_weight:
        trainer["objective"]["kl_weight"] = cell.kl_weight
    # several rewards are normalised one by one and count alike, as in the paper (GDPO)
    trainer["advantage"] = {
        **trainer.get("advantage", {}),
        "reward_weights": dict.fromkeys(names, 1 / len(names)),
        "per_reward": len(names) > 1,
    }
    iterations = trainer["run"]["iterations"]
    trainer["run"] = {
        **trainer["run"], "seed": cell.seed, "device": "cpu", "progress": False,
        "checkpoint_every": iterations, "keep_checkpoints": 1, "plot_every": None,
    }  # fmt: skip
    complete = FlowDPPOConfig.from_dict(trainer).to_dict()
    # where a run writes is no part of what it is
    del complete["run"]["output_dir"]
    return {
        "cell": asdict(cell),
        "task": cell.task,
        "rewards": list(names),
        "method": cell.method,
        "bound": cell.bound,
        "trainer": complete,
        "evaluation": {
            **own["evaluation"],
            "num_steps": sampling["num_steps"],
            "guidance": cell.guidance,
            "clips": settings["clips"],
        },
    }
