"""Calls of the transformers and of the pipeline around them: their precision, the images and their rewards."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..objectives import threshold_of
from .config import FlowDPPOConfig
from .engines.readers import noisy_steps
from .engines.sampling import EngineSampling
from .prompts import PromptSource, text_of
from .record.checks import ReplayCheck
from .record.recorder import TrajectoryRecorder
from .record.trajectory import Trajectory
from .rewards import BackgroundScorer, Reward, score
from .weights.distributed import Workers
from .weights.policy import PolicyWeights
from .weights.precision import autocast
from .weights.sharding import T

logger = get_logger(__name__)
# of a modular pipeline
_OUTPUTS = ("images", "videos", "image", "video", "latents")


class PipelineCalls:
    """What a run calls ``pipeline`` and ``reward`` for.

    Args:
        weights: of the transformers; its processes call them at the same time, each for rows of its own.
        device: where prompts and images are.
    """

    def __init__(
        self, pipeline: Any, reward: Reward, config: FlowDPPOConfig, weights: PolicyWeights, device: torch.device
    ):
        self.pipeline, self.reward, self.config = pipeline, reward, config
        self.weights, self.workers, self.device = weights, weights.workers, device
        # sharded weights move between calls only
        self._moves = config.run.check_replay and not weights.workers.sharded
        self._drawn: tuple[Trajectory, Callable[[], Any]] | None = None
        engines = EngineSampling(pipeline, weights.modules, config, weights.workers) if config.engines.urls else None
        self._engines = engines

    def run(self, function: Callable[[], T]) -> T:
        """``function()``, which calls transformers, in the precision of the run."""

        def in_precision() -> T:
            dtype, weights = self.config.model.autocast_dtype, self.weights
            with autocast(self.device.type, dtype, weights.called, own=weights.half):
                return function()

        return self.workers.sharding.inside(in_precision)

    def images(
        self, source: PromptSource, entries: list[dict], seeds: list[int], num_steps: int, options: Mapping[str, Any]
    ) -> Any:
        """Images of one pipeline call, one per entry of ``source``; servers sample a recorded one."""
        # equal neighbours are one prompt with several images, if all runs of them have a common length
        runs = [len(list(run)) for _, run in itertools.groupby(entries, key=id)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def given(rows: slice, group_size: int) -> dict[str, Any]:
            own = source.arguments(entries[rows], 1 if self.config.sampling.repeat_texts else group_size, self.device)
            return {**own, **shared_options(options, own, self.device)}

        arguments = {
            **given(slice(None), math.gcd(*runs)),
            "num_inference_steps": num_steps,
            # which draws the same, and some take no list
            "generator": generators if len(generators) > 1 else generators[0],
            "output_type": self.config.sampling.output_type,
        }
        if not hasattr(self.pipeline, "blocks"):
            arguments["return_dict"] = False
        with torch.no_grad():
            if self._engines is None or noisy_steps(self.pipeline.scheduler) is None:
                return images_of(self.run(lambda: self.pipeline(**arguments)))
            groups = [slice(*pair) for pair in itertools.pairwise(itertools.accumulate(runs, initial=0))]
            asked = [(given(rows, rows.stop - rows.start), seeds[rows]) for rows in groups]
            with self._engines.sampled(asked) as further:
                return images_of(self.run(lambda: self.pipeline(**arguments, **further)))

    def send_weights(self) -> None:
        """Gives the present weights to the servers, if there are any; all processes have to come here."""
        if self._engines is not None:
            self._engines.send_weights()

    def drew(self, trajectory: Trajectory, call: Callable[[], Any]) -> None:
        """Takes a trajectory as it is trained on and stored; ``call`` drew it."""
        if self._engines is not None:
            self._engines.settle(trajectory)
        if self._moves:
            self._drawn = trajectory, call
        if self.config.sampling.offload_trajectories:
            trajectory.offload(self.device)

    def verify_moved(self, recorder: TrajectoryRecorder, objective: Any) -> None:
        """:meth:`TrajectoryRecorder.verify_moved` of what was drawn last, once in a run."""
        if self._drawn is not None:
            bounds = self._bounds(objective, self._drawn[0])
            verify = functools.partial(recorder.verify_moved, *self._drawn, **bounds)
            self._moves, self._drawn = False, None
            with self._engines.again() if self._engines else contextlib.nullcontext():
                logger.info("the replay follows the weights: %s", self.run(verify))

    def verify(
        self, recorder: TrajectoryRecorder, trajectory: Trajectory, rows: Sequence[int], objective: Any
    ) -> ReplayCheck:
        """:meth:`TrajectoryRecorder.verify` with the bounds of the run."""
        return self.run(functools.partial(recorder.verify, trajectory, rows, **self._bounds(objective, trajectory)))

    def _bounds(self, objective: Any, trajectory: Trajectory) -> dict[str, Any]:
        threshold = threshold_of(objective, trajectory.elements)
        return {"strict": self.config.run.strict_replay, "threshold": threshold}

    def rewards(self, images: Any, entries: list[dict], scorer: BackgroundScorer | None = None) -> Callable[[], Any]:
        """Starts to score the images of a call; what is returned waits for the rewards."""
        texts = [text_of(entry) for entry in entries]
        # null in a file of prompts is no metadata
        metadata = [entry.get("metadata") or {} for entry in entries]
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


def images_of(output: Any) -> Any:
    """What a pipeline drew: first in a tuple, by name in the state of a modular one.

    Raises:
        ValueError: a state without images.
    """
    if isinstance(output, tuple):
        return output[0]
    values = output.values
    name = next((name for name in _OUTPUTS if values.get(name) is not None), None)
    if name is None:
        raise ValueError(f"pipeline: its state has {sorted(values)}, expected one of {', '.join(_OUTPUTS)}")
    return values[name]


def shared_options(options: Mapping[str, Any], given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """``options`` of every call as a call takes them: negatives once per prompt, tensors of no inference mode.

    Diffusers repeats one negative text itself in some pipelines and not in others; all of them take one per prompt.

    Args:
        given: the arguments of the call's prompts, lists and tensors with an entry per prompt.
    """
    prompts = next((len(value) for value in given.values() if isinstance(value, (list, Tensor))), None)
    shared = {}
    for name, value in options.items():
        if isinstance(value, Tensor):
            value = value.clone() if value.is_inference() else value
            value = value.to(device)
            if name.startswith("negative_") and prompts is not None and value.ndim and len(value) == 1:
                value = value.expand(prompts, *value.shape[1:])
        elif isinstance(value, str) and name.startswith("negative_prompt") and prompts is not None:
            value = [value] * prompts
        shared[name] = value
    return shared


def check_guidance(source: PromptSource, options: Mapping[str, Any]) -> None:
    """True guidance that a pipeline would leave off, with no more than a warning, is an error.

    Raises:
        ValueError: ``true_cfg_scale`` above 1 without a negative prompt.
    """
    scale = options.get("true_cfg_scale")
    names = {*options, *source.entries[0]}
    if scale is not None and scale > 1 and not any(name.startswith("negative_prompt") for name in names):
        raise ValueError(
            f"sampling.pipeline_kwargs: got true_cfg_scale={scale} without a negative prompt, expected negative_prompt "
            "beside it or in the prompts (' ' is the usual one): without it the pipeline draws without guidance"
        )


def join_rewards(
    calls: Sequence[Mapping[str, Tensor]], workers: Workers, known: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Rewards of this process's calls, joined by name; names are in one order on all processes.

    Args:
        calls: rewards ``[rows]`` of each call by name, in any order.
        known: the names so far, None at first.

    Raises:
        ValueError: names that differ between calls, processes or iterations; all processes are told who had what.
    """
    told = workers.gather_objects([[list(call) for call in calls]])
    names = list(known or told[0][0])
    for rank, made in enumerate(told):
        for number, got in enumerate(made):
            if set(got) != set(names):
                process = f" of process {rank}" if workers.count > 1 else ""
                before = "before" if known else f"in call 0{' of process 0' if workers.count > 1 else ''}"
                raise ValueError(
                    f"reward: got the names {sorted(got)} in call {number}{process}, expected {sorted(names)} as "
                    f"{before}"
                )
    return {name: torch.cat([call[name] for call in calls]) for name in names}
