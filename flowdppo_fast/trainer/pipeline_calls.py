"""Calls of the transformers and of the pipeline around them: their precision, the images and their rewards."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import FlowDPPOConfig
from .prompts import PromptSource, text_of
from .rewards import BackgroundScorer, Reward, score
from .weights.distributed import Workers
from .weights.sharding import T

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PipelineCalls:
    """What a run calls ``pipeline`` and ``reward`` for.

    Args:
        workers: processes that call them at the same time, each for rows of its own.
        device: where prompts and images are.
    """

    def __init__(self, pipeline: Any, reward: Reward, config: FlowDPPOConfig, workers: Workers, device: torch.device):
        self.pipeline, self.reward, self.config = pipeline, reward, config
        self.workers, self.device = workers, device

    def run(self, function: Callable[[], T]) -> T:
        """``function()``, which calls transformers."""

        def in_precision() -> T:
            with self.autocast():
                return function()

        return self.workers.sharding.call(in_precision)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the run."""
        dtype = _AUTOCAST.get(self.config.model.mixed_precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def images(
        self, source: PromptSource, entries: list[dict], seeds: list[int], num_steps: int, options: Mapping[str, Any]
    ) -> Any:
        """Images of one pipeline call, one per entry of ``source``."""
        # equal neighbours are one prompt with several images, if all runs of them have a common length
        runs = [len(list(run)) for _, run in itertools.groupby(entries, key=id)]
        arguments = {
            **source.arguments(entries, math.gcd(*runs), self.device),
            **options,
            "num_inference_steps": num_steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": self.config.sampling.output_type,
            "return_dict": False,
        }
        with torch.no_grad():
            return self.run(lambda: self.pipeline(**arguments))[0]

    def rewards(self, images: Any, entries: list[dict], scorer: BackgroundScorer | None = None) -> Callable[[], Any]:
        """Starts to score the images of a call; what is returned waits for the rewards."""
        texts = [text_of(entry) for entry in entries]
        metadata = [entry.get("metadata", {}) for entry in entries]
        # a reward may fail on one process alone
        attempt = self.workers.attempt
        if scorer is None:
            rewards = attempt(score, self.reward, images, texts, metadata, self.device)
            return lambda: rewards
        handle = attempt(scorer.submit, images, texts, metadata)
        return lambda: None if handle is None else attempt(handle.result)

    def scored(self, source: PromptSource, entries: list[dict], *how: Any) -> tuple[Any, dict[str, Tensor]]:
        """:meth:`images` with their rewards by name."""
        images = self.images(source, entries, *how)
        return images, self.rewards(images, entries)()
