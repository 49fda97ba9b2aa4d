"""What runs on: loss calls of every kind, and iterations of a trainer on a tiny model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from support import oracle
from support.cases import OBJECTIVES, applicable

import flowdppo_fast as fast

from .probe import Limits, Record, Watch, watched

ROOT = Path(__file__).parents[2]
SIGMAS = [1.0 - i / 10 for i in range(11)]
ROWS, LATENT = 8, (4, 16, 16)
KEPT = 2

LOSS_LIMITS = Limits()
# every iteration leaves its metrics, twice: those that train() returns, and those that plots are drawn from
TRAINER_LIMITS = Limits(
    resident=16 << 10, resident_slack=16 << 20, heap=8 << 10, heap_slack=256 << 10, objects=2.0, blocks=150.0
)
# matplotlib keeps the layout of thousands of labels
PLOT_LIMITS = dataclasses.replace(
    TRAINER_LIMITS, objects=10.0, objects_slack=3000, blocks=300.0, blocks_slack=6000, resident_slack=32 << 20
)


def loss_call(backend: str) -> tuple[Callable[[int], object], int]:
    """A call by its number, and how many kinds of it there are.

    It is a forward and a backward on tensors of its own: all objectives in both forms, eager and single pass, stored
    and seeded noise, one step or a step per row, with and without a reference.
    """
    kinds = [
        (form, name, single, seeded, stacked, reference)
        for form in ("velocity", "means")
        for name in OBJECTIVES
        if applicable(name, form)
        for single in (False, True)
        for seeded in ((False, True) if form == "velocity" else (False,))
        for stacked, reference in ((False, False), (True, True))
    ]
    steps = fast.sde_schedule("flow_sde", SIGMAS, eta=0.7)

    def call(number: int) -> object:
        form, name, single, seeded, stacked, with_reference = kinds[number % len(kinds)]
        g = torch.Generator().manual_seed(number)
        old, noise, away = (torch.randn(ROWS, *LATENT, generator=g) for _ in range(3))
        new = (old + 0.05 * away).requires_grad_(not single)
        advantages = torch.randn(ROWS, generator=g)
        options = {"single_pass": single, "backend": backend}
        objective, _ = OBJECTIVES[name].bounded(1e-3)
        # a schedule of each rollout is a new object
        step = fast.SDEStep.stack([steps[1 + (number + row) % 8] for row in range(ROWS)]) if stacked else steps[3]
        reference = old - 0.05 * away if with_reference else None
        if with_reference:
            options["kl_weight"] = 0.1
        if form == "velocity":
            source = fast.PhiloxNoise(number, 8 * number) if seeded else noise
            out = fast.fused_policy_velocity_loss(
                new, old, source, step, advantages, objective=objective, reference_velocity=reference, **options
            )
        else:
            std, dt = (torch.as_tensor(x) for x in (step.std, step.dt))
            out = fast.fused_policy_loss(
                new, old, old + oracle.lift(std, noise).float() * noise, std, advantages, objective=objective, dt=dt,
                reference_prev_sample_mean=reference, **options,
            )  # fmt: skip
        if not single:
            out.loss.backward()
        return out.metrics()

    return call, len(kinds)


def run_losses(calls: int, backend: str = "cpu", say: Callable[[str], None] = lambda text: None) -> Record:
    call, kinds = loss_call(backend)
    # what is made once per kind is made before anybody looks
    for number in range(2 * kinds):
        call(number)
    return watched(call, calls, say)


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def every(iterations: int) -> tuple[int, int]:
    """Iterations between checkpoints, and between plots and evaluations: some of each are in the warm-up."""
    return max(2, iterations // 100), max(2, iterations // 40)


def run_trainer(iterations: int, folder: Path, plots: bool, say: Callable[[str], None] = lambda text: None) -> Record:
    """Iterations with everything that a run writes: both logs, checkpoints, and plots and pages of images if asked for.

    One more is run than is looked at: the last one evaluates once more.
    """
    checkpoint_every, plot_every = every(iterations)
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from pipeline import DigitsPipeline

    from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=4, in_channels=1, out_channels=1, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=11, caption_projection_dim=16, pooled_projection_dim=11,
        pos_embed_max_size=2,
    )  # fmt: skip
    config = FlowDPPOConfig.from_dict(
        {
            "model": {"train": "lora", "lora_rank": 2, "ema_decay": 0.9},
            "sampling": {
                "num_steps": 3, "sde_steps": [0, 1], "prompts_per_rollout": 2, "group_size": 2, "batch_size": 2,
                "background_rewards": True,
            },
            "advantage": {"history": 4},
            "optimizer": {"micro_batch_size": 4},
            "evaluation": {"every": plot_every},
            "run": {
                "iterations": iterations + 1, "output_dir": str(folder), "progress": False, "device": "cpu",
                "checkpoint_every": checkpoint_every, "keep_checkpoints": KEPT,
                "plot_every": plot_every if plots else None,
            },
        }
    )  # fmt: skip
    prompts = [str(digit) for digit in range(10)]
    pipeline = DigitsPipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler())
    trainer = FlowDPPOTrainer(pipeline, brightness, prompts, config, eval_prompts=prompts[:2])
    watch = Watch(iterations, say)
    trainer.train(on_iteration=lambda metrics: watch.called())
    return watch.record


def unexpected_files(folder: Path, iterations: int, plots: bool) -> list[str]:
    """Files after :func:`run_trainer` that its settings do not ask for, and those that they ask for and are absent."""
    checkpoint_every, plot_every = every(iterations)
    done = iterations + 1
    expected = {"config.yaml", "metrics.jsonl", "metrics.png", "report.html", "rows.jsonl"}
    if plots:
        expected |= {f"images/rollout-{i:06d}.png" for i in range(plot_every, done + 1, plot_every)}
    expected |= {f"images/eval-{i + 1:06d}.png" for i in range(0, done, plot_every)}
    expected.add(f"images/eval_final-{done:06d}.png")
    last = sorted({*range(checkpoint_every, done + 1, checkpoint_every), done})[-KEPT:]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    # every checkpoint has the files of every other
    files = {path.rpartition("/")[2] for path in found if path.startswith("checkpoints/")}
    expected |= {f"checkpoints/iteration-{i:06d}/{file}" for i in last for file in files}
    return sorted(found ^ expected)
