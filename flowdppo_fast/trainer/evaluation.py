"""Held-out prompts, sampled without noise and with the same seeds every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .advantages import weighted_reward
from .config import FlowDPPOConfig
from .pipeline_calls import PipelineCalls, check_guidance, join_rewards
from .prompts import PromptSource
from .rollout import captions
from .seeds import derive_seed
from .weights.distributed import Workers

# images of an evaluation that are kept and shown
SHOWN = 32


class Evaluation:
    """Rewards and images of ``prompts`` under the present weights.

    Args:
        prompts: as those of the trainer.
        pipeline: sampled with its own scheduler.
        config: of the run.
        workers: processes among which the images are split.
        calls: of the pipeline and the reward.
    """

    def __init__(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        pipeline: Any,
        config: FlowDPPOConfig,
        workers: Workers,
        calls: PipelineCalls,
    ):
        self.options = {**config.sampling.pipeline_kwargs, **config.evaluation.pipeline_kwargs}
        self.source = PromptSource(prompts, pipeline, [*self.options, "return_dict"])
        check_guidance(self.source, self.options)
        self.config, self.workers, self.calls = config, workers, calls

    def run(self) -> tuple[dict[str, float], list[Any], list[str]]:
        """Mean rewards over all images, and the first of this process's images with their captions."""
        e, s = self.config.evaluation, self.config.sampling
        count = e.images_per_prompt
        total = len(self.source.entries) * count
        # every process makes the same number of calls; what is left over is sampled twice and counted once
        each = -(-total // self.workers.count)
        rows = [min(self.workers.rank * each + place, total - 1) for place in range(each)]
        batch = s.batch_size or s.prompts_per_rollout * s.group_size
        images: list[Any] = []
        parts: list[dict[str, Tensor]] = []
        for part in self.source.calls([self.source.entries[row // count] for row in rows], batch):
            entries = [self.source.entries[row // count] for row in rows[part.start : part.stop]]
            seeds = [derive_seed(self.config.run.seed, "evaluation", row) for row in rows[part.start : part.stop]]
            made, rewards = self.calls.scored(self.source, entries, seeds, e.num_steps or s.num_steps, self.options)
            images += list(made)[: max(SHOWN - len(images), 0)]
            parts.append(rewards)
        self.workers.agree()
        own = join_rewards(parts, self.workers)
        named = {name: self.workers.gather(value)[:total] for name, value in own.items()}
        named["reward"] = weighted_reward(named, self.config.advantage.reward_weights)
        metrics = {name: float(value.nanmean()) for name, value in named.items()}
        return metrics, images, captions([self.source.entries[row // count] for row in rows[: len(images)]], own)
