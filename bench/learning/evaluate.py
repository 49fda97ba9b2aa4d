"""A model's pages on fixed seeds: rewards, quality on trained and held-out prompts, and drift from the pretrained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits.pipeline import DigitsPipeline
from flowdppo_fast import row_statistics
from flowdppo_fast.trainer import TrajectoryRecorder
from flowdppo_fast.trainer.weights.adapters import without_adapters

from .measures import diversity, frechet, mixture
from .tasks import NamedRewards, Task

# drift is always taken along this sampler, whatever a method was trained with
DRIFT_SAMPLER, DRIFT_ETA = "flow_sde", 0.7


class Pretrained:
    """The weights a run started from, to be put back for a moment."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within this context the module is the pretrained one, adapters or not."""
        # adapters rename the layers they wrap, whose own weights they leave alone
        named = dict(self.module.named_parameters())
        common = [name for name in self.weights if name in named]
        current = {name: named[name].detach().clone() for name in common}
        with without_adapters([self.module]):
            try:
                with torch.no_grad():
                    for name in common:
                        named[name].copy_(self.weights[name])
                yield
            finally:
                with torch.no_grad():
                    for name in common:
                        named[name].copy_(current[name])


@torch.no_grad()
def draw(
    pipeline: DigitsPipeline, prompts: Sequence[str], per_prompt: int, *, num_steps: int, guidance: float
) -> tuple[Tensor, list[str]]:
    """Pages by the ODE, ``per_prompt`` adjacent ones for each prompt, and their prompts; seeds are 0, 1, ..."""
    asked = [prompt for prompt in prompts for _ in range(per_prompt)]
    # rollouts draw from 63-bit hashes, so these seeds are never trained on
    generators = [torch.Generator().manual_seed(seed) for _ in prompts for seed in range(per_prompt)]
    images = pipeline(
        asked, num_inference_steps=num_steps, guidance_scale=guidance, generator=generators, output_type="pt"
    ).images
    return images.float().cpu(), asked


def drift_nats(
    pipeline: DigitsPipeline,
    pretrained: Pretrained,
    prompts: Sequence[str],
    rows: int,
    *,
    num_steps: int,
    guidance: float,
) -> float:
    """KL of the sampling path from the pretrained model's, nats: the sum over all steps that draw noise, mean of rows.

    Along Flow-SDE with eta 0.7, on states that the present model visits; exact per step, since both step policies are
    Gaussians of equal variance. Both models see each step in the batch that it was recorded in, by as many threads:
    matrix products of other sizes round otherwise, on some processors, and equal weights would then drift.
    """
    recorder = TrajectoryRecorder(pipeline, sampler=DRIFT_SAMPLER, eta=DRIFT_ETA)
    asked = [prompts[row % len(prompts)] for row in range(rows)]
    generators = [torch.Generator().manual_seed(10_000 + row) for row in range(rows)]
    with torch.no_grad(), recorder.recording(range(num_steps - 1), seed=1) as trajectory:
        pipeline(
            asked, num_inference_steps=num_steps, guidance_scale=guidance, generator=generators, output_type="latent"
        )
    with torch.no_grad(), pretrained.restored():
        reference = torch.cat([recorder.replay(trajectory, steps=[place]) for place in range(num_steps - 1)], dim=1)
    velocity, noise, step = trajectory.select(range(rows))
    _, squared = row_statistics(velocity, reference, noise, step, rows=2)
    return float(squared.double().sum(1).mean()) / 2 * velocity.shape[2:].numel()


@torch.no_grad()
def quality(task: Task, pages: Tensor, prompts: Sequence[str], per_prompt: int) -> dict[str, float]:
    """Measures that no reward looks at: judge accuracy, Frechet distance to real pages, diversity within a prompt."""
    features = task.features(task.ink(pages))
    centre, covariance = mixture(task.real["real.mean"], task.real["real.second"], task.asked(prompts))
    return {
        "accuracy": float(task.reads(pages, prompts).double().mean()),
        "frechet": frechet(features, centre, covariance),
        "diversity": diversity(features, per_prompt),
    }


def evaluate(
    task: Task,
    rewards: NamedRewards,
    pipeline: DigitsPipeline,
    pretrained: Pretrained,
    per_prompt: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """All measures of the present weights.

    Args:
        per_prompt: pages per prompt.
        settings: ``num_steps``, ``guidance`` and ``drift_rows``.

    Returns:
        ``trained`` and ``held_out`` (rewards by name and :func:`quality`), and ``drift_nats`` on trained prompts.
    """
    options = {"num_steps": settings["num_steps"], "guidance": settings["guidance"]}
    result: dict[str, Any] = {}
    for name, prompts in (("trained", task.trained), ("held_out", task.held_out)):
        pages, asked = draw(pipeline, prompts, per_prompt, **options)
        scores = {key: float(value.double().mean()) for key, value in rewards(pages, asked).items()}
        spread = {key: float(value.double().std()) for key, value in rewards(pages, asked).items()}
        result[name] = {"rewards": scores, "reward_std": spread, **quality(task, pages, asked, per_prompt)}
    result["drift_nats"] = drift_nats(pipeline, pretrained, task.trained, settings["drift_rows"], **options)
    return result
