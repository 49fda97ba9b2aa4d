"""Which rows an update trains on, which of them a process samples in which call, and which steps are trained."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import FlowDPPOConfig, SamplingConfig
from .prompts import PromptSource, text_of
from .seeds import derive_seed
from .weights.adapters import blocks_of
from .weights.distributed import Workers
from .weights.policy import PolicyWeights

STEP_CHOICES = ("random", "window", "random_window")


def choose_steps(
    candidates: Sequence[int], count: int | None, choice: str, *, position: int, seed: int
) -> tuple[int, ...]:
    """``count`` of ``candidates`` (None: all of them), in schedule order.

    Args:
        candidates: indices in the schedule, ascending.
        choice: ``"random"`` takes any of them (DanceGRPO), ``"window"`` neighbours in a window that moves from the
            noisiest on by one at each ``position`` and starts again after the last (MixGRPO, arXiv 2507.21802),
            ``"random_window"`` neighbours anywhere (Flow-GRPO-Fast).
        position: place of the sliding window.
        seed: of the random choices.

    Raises:
        ValueError: an unknown choice.
    """
    if choice not in STEP_CHOICES:
        raise ValueError(f"step_choice: got {choice!r}, expected one of {', '.join(map(repr, STEP_CHOICES))}")
    if count is None:
        return tuple(candidates)
    places = len(candidates) - count + 1
    if choice == "random":
        return tuple(sorted(random.Random(seed).sample(list(candidates), count)))
    start = position % places if choice == "window" else random.Random(seed).randrange(places)
    return tuple(candidates[start : start + count])


def plan_updates(config: FlowDPPOConfig, workers: Workers) -> list[range]:
    """Rows of each update of a pass over a rollout; they depend on the settings alone.

    Raises:
        ValueError: an update cannot be shared equally by the processes.
    """
    s, o = config.sampling, config.optimizer
    size = s.prompts_per_rollout * s.group_size // o.updates_per_rollout
    own = size // workers.count
    if size % workers.count or (own % s.group_size and s.group_size % own):
        raise ValueError(
            f"optimizer.updates_per_rollout: an update has {size} samples for {workers.count} processes, "
            f"expected equal shares that are a multiple or a divisor of sampling.group_size={s.group_size}"
        )
    return [range(start, start + size) for start in range(0, size * o.updates_per_rollout, size)]


def plan_calls(
    sampling: SamplingConfig,
    workers: Workers,
    updates: Sequence[range],
    prompts: PromptSource,
    groups: Sequence[dict[str, Any]],
) -> list[range]:
    """Rows of each pipeline call that this process makes for a rollout of ``groups``."""
    s = sampling
    batch = s.batch_size or s.prompts_per_rollout * s.group_size
    if s.per_group_steps:
        batch = min(batch, s.group_size)
    own: list[range] = []
    for rows in workers.rows_of(workers.rank, updates):
        if own and own[-1].stop == rows.start:
            rows = range(own.pop().start, rows.stop)
        own.append(rows)
    # prompts that differ in what a call has once, such as an image or a size, are sampled apart
    return [
        range(rows.start + part.start, rows.start + part.stop)
        for rows in own
        for part in prompts.calls([groups[row // s.group_size] for row in rows], batch)
    ]


def check_processes(config: FlowDPPOConfig, workers: Workers, prompts: PromptSource, transformers: int) -> None:
    """All processes do the same; what each of a sharded run would decide for itself is refused.

    Raises:
        ValueError: settings or prompts that differ between processes, or that a sharded run cannot have.
    """
    texts = [text_of(entry) for entry in prompts.entries]
    workers.check_same(derive_seed(config.to_dict(), texts), "settings or prompts")
    how = f"in a run with {workers.sharding.kind}"
    if workers.sharded and config.optimizer.skip_dropped_backward:
        raise ValueError(f"optimizer.skip_dropped_backward: got True, expected False {how}")
    if workers.sharded and config.sampling.per_group_steps and transformers > 1:
        raise ValueError(f"sampling.per_group_steps: got True with {transformers} transformers, expected False {how}")


def adapted(names: Sequence[str], modules: Mapping[str, nn.Module]) -> str:
    """How many layers have adapters, in how many blocks; lists of blocks without any are named.

    Args:
        names: of the trained weights.
        modules: transformers by name.
    """
    layers = {name.rpartition(".lora_")[0] for name in names}
    text, places = f"LoRA on {len(layers)} layers", {tuple(layer.split(".")[:3]) for layer in layers}
    blocks = {(module, name): count for module in modules for name, count in blocks_of(modules[module]).items()}
    if not blocks:
        return text
    found = {block: sum(place[:2] == block for place in places) for block in blocks}
    none = [f"{name} of {module} has none (model.lora_targets)" for (module, name), n in found.items() if not n]
    return "; ".join([f"{text} in {sum(found.values())} of {sum(blocks.values())} blocks", *none])


def _computed(config: FlowDPPOConfig, weights: PolicyWeights) -> str:
    """What the transformers compute in."""
    precision = config.model.mixed_precision
    if precision == "no":
        return "in the precision that they were loaded in"
    return f"computed in {precision}" if weights.half else f"in {precision} autocast"


def summary(config: FlowDPPOConfig, workers: Workers, weights: PolicyWeights, device: torch.device) -> str:
    """What will be done with what, in a few lines: device, processes, weights, images and updates of an iteration."""
    s, o, count = config.sampling, config.optimizer, workers.count
    trained = sum(shape.numel() for shape in workers.sharding.shapes.values())
    what = adapted(weights.names, weights.modules) if config.model.train == "lora" else "all weights"
    idle = torch.cuda.device_count() - count if device.type == "cuda" else 0
    lines = [
        f"{count} process{'es' * (count > 1)} on {device.type}, {workers.sharding.kind}"
        + (f"; {idle} more GPUs are idle (accelerate launch uses them)" if idle > 0 else ""),
        f"{what} of {', '.join(weights.modules)}: {trained:,} numbers, {_computed(config, weights)}",
        f"per iteration {s.prompts_per_rollout * s.group_size} images, {s.group_size} of each of "
        f"{s.prompts_per_rollout} prompts, "
        f"{s.num_steps} steps, of which {s.sde_steps_per_rollout or len(s.candidate_steps)} are trained, "
        f"{o.updates_per_rollout * o.inner_epochs} updates by {config.objective.name}",
    ]
    if device.type == "cpu" and config.run.device == "auto":
        lines.append("torch sees no GPU: this run is on the CPU (run.device: cpu says that it is meant to be)")
    return "\n".join(lines)
