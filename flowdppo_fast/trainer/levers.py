"""What to set where a run does not fit its device: the next lever of docs/memory.md, by what the run was doing."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from .config import FlowDPPOConfig

PHASES = {
    "encoding": "encoding texts",
    "denoising": "denoising",
    "decoding": "decoding images",
    "reward": "computing rewards",
    "update": "an update",
}


def next_lever(phase: str, config: FlowDPPOConfig, pipeline: Any = None) -> str:
    """The next setting to change, as it is written in a config; in words where no setting is left.

    Args:
        phase: a key of :data:`PHASES`.
        pipeline: the recipe's section, None where a run was started from Python.
    """
    m, s, o = config.model, config.sampling, config.optimizer
    batch = s.batch_size or s.prompts_per_rollout * s.group_size
    fewer = next((n for n in range(batch // 2, 0, -1) if n % s.group_size == 0 or s.group_size % n == 0), None)
    sliced = None if pipeline is None else pipeline.vae_slicing
    tiled = None if pipeline is None else pipeline.vae_tiling
    quantised = pipeline is not None and pipeline.quantization is not None
    steps = s.sde_steps_per_rollout or len(s.candidate_steps)
    slicing = [(not sliced, "pipeline.vae_slicing: true")] if pipeline is not None else []
    tiling = (
        [(not tiled, "pipeline.vae_tiling: true")] if pipeline is not None else [(True, "pipeline.vae.enable_tiling()")]
    )
    kept = [
        (not s.offload_trajectories and phase != "update", "sampling.offload_trajectories: true"),
        (not quantised and m.train == "lora", "pipeline.quantization: {backend: bitsandbytes_4bit}"),
    ]
    smaller = [(fewer is not None, f"sampling.batch_size: {fewer}")]
    levers = {
        "encoding": [*smaller, *kept],
        "denoising": [*smaller, *kept],
        "decoding": [*slicing, *tiling, *smaller, *kept],
        "reward": [*smaller, *kept],
        "update": [
            (m.mixed_precision == "no", "model.mixed_precision: bf16"),
            (not m.gradient_checkpointing, "model.gradient_checkpointing: true"),
            (o.micro_batch_size > 1, f"optimizer.micro_batch_size: {max(o.micro_batch_size // 2, 1)}"),
            ((o.steps_per_micro_batch or steps) > 1, "optimizer.steps_per_micro_batch: 1"),
            (not m.offload_idle, "model.offload_idle: true"),
            (not s.offload_trajectories, "sampling.offload_trajectories: true"),
            *kept,
        ],
    }[phase]
    found = next((text for wanted, text in levers if wanted), None)
    if found is not None:
        return found
    return "more processes with FSDP2 (docs/distributed.md), or a smaller model or image"


def explain_out_of_memory(error: BaseException, config: FlowDPPOConfig, pipeline: Any = None, *, updating: bool) -> str:
    """One sentence: what the run was doing when its device was full, and what to change.

    Args:
        pipeline: the recipe's section.
        updating: the weights of an iteration were being moved.
    """
    phase = "update" if updating else _phase_of(error)
    lever = next_lever(phase, config, pipeline)
    return (
        f"the device's memory is full in {PHASES[phase]}: try {lever} next (docs/memory.md), and continue with "
        f"--resume (resume=True in Python); {' '.join(str(error).split())[:300]}"
    )


def _phase_of(error: BaseException) -> str:
    """By the component of the pipeline, or the trainer's function, in which the error was raised."""
    phase, components = "denoising", {}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        own, name = frame.f_locals.get("self"), frame.f_code.co_name
        parts = getattr(own, "components", None)
        if isinstance(parts, Mapping):
            components = {id(part): key for key, part in parts.items()}
        component = components.get(id(own), "")
        if name == "_verify":
            # the replay, with gradients as in an update
            return "update"
        if component.startswith("transformer"):
            phase = "denoising"
        elif component.startswith("text_encoder"):
            phase = "encoding"
        elif component == "vae":
            phase = "decoding"
        elif name in ("rewards", "attempt") and not components:
            phase = "reward"
    return phase
