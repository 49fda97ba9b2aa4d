"""A pipeline call whose sampling is done by servers: the requests, and the playback of their answers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..config import FlowDPPOConfig
from ..record.scheduler import NoisySteps
from ..record.trajectory import Trajectory
from ..weights.distributed import Workers
from .client import EngineError, Engines
from .container import EngineRollout
from .playback import played, take
from .readers import noisy_steps, read_sglang
from .wire import encode

# what SGLang calls our samplers
_SDE_TYPES = {"flow_sde": "sde"}
# fields of SGLang's request that are arguments of a diffusers pipeline
_NAMED = ("negative_prompt", "width", "height", "guidance_scale", "true_cfg_scale", "num_frames", "fps")


class EngineSampling:
    """Samples recorded calls on servers.

    Args:
        modules: the transformers, whose adapters the servers are given.

    Raises:
        ValueError: weights that are split over processes.
    """

    def __init__(self, pipeline: Any, modules: Mapping[str, nn.Module], config: FlowDPPOConfig, workers: Workers):
        if workers.sharded:
            raise ValueError("engines.urls: got some with split weights, expected whole weights on each process")
        self.pipeline, self.modules, self.config, self.workers = pipeline, modules, config, workers
        self.engines = Engines(config.engines)
        self._folder = Path(config.run.output_dir).expanduser() / "engine_weights"
        # of the last call, and the one that is played again
        self._rollout: EngineRollout | None = None
        self._again: EngineRollout | None = None

    def send_weights(self) -> None:
        """Gives the present adapters to all servers; all processes have to come here."""
        workers, written = self.workers, None
        if workers.is_main:
            written = workers.attempt(self.engines.write, self.modules, self._folder)
        workers.agree()
        name, files = workers.from_main(written)
        workers.attempt(lambda: self.engines.use(name, files, send=workers.is_main))
        workers.agree()

    @contextlib.contextmanager
    def sampled(self, calls: Sequence[tuple[Mapping[str, Any], Sequence[int]]]) -> Iterator[dict[str, Any]]:
        """Within this context the pipeline plays back what the servers sampled.

        Args:
            calls: arguments and seeds of the groups of one pipeline call.

        Yields:
            Further arguments of the call.
        """
        scheduler = self.pipeline.scheduler
        # the trainer looks at a call a second time, at weights that no server has
        steps = noisy_steps(scheduler)
        assert steps is not None
        rollout = self._ask(steps, calls) if self._again is None else self._again
        latents = rollout.state(0)
        assert latents is not None
        takes = "latents" in inspect.signature(self.pipeline.__call__).parameters
        with played(scheduler, self.modules, rollout):
            yield {"latents": latents.to(self.workers.device)} if takes else {}
        self._rollout = rollout

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within this context the last call is played back, and no server is asked."""
        self._again = self._rollout
        try:
            yield
        finally:
            self._again = None

    def settle(self, trajectory: Trajectory) -> None:
        """Gives what was recorded of the last call the velocities and noise of the servers."""
        assert self._rollout is not None
        take(trajectory, self._rollout)

    def _ask(self, steps: NoisySteps, calls: Sequence[tuple[Mapping[str, Any], Sequence[int]]]) -> EngineRollout:
        e = self.config.engines
        states = sorted({0, self.config.sampling.num_steps, *(x for i in steps.chosen for x in (i, i + 1))})
        requests, first = [], steps.first_row
        for arguments, seeds in calls:
            if e.protocol == "sglang":
                requests += [self._request(steps, states, arguments, [seed], first) for seed in seeds]
            else:
                requests.append(self._request(steps, states, arguments, list(seeds), first))
            first += len(seeds)
        answered = zip(self.engines.ask(requests), requests)
        return EngineRollout.join(
            [_read(*answer, request["num_outputs_per_prompt"], steps, states) for answer, request in answered]
        )

    def _request(
        self, steps: NoisySteps, states: list[int], arguments: Mapping[str, Any], seeds: list[int],
        first_row: int,
    ) -> dict[str, Any]:  # fmt: skip
        prompt = arguments.get("prompt")
        text = prompt[0] if isinstance(prompt, list) and prompt else prompt
        request = {
            "prompt": text if isinstance(text, str) else "",
            "num_inference_steps": self.config.sampling.num_steps,
            "num_outputs_per_prompt": len(seeds),
            "seed": seeds[0],
            "generator_device": "cpu",
            "rollout": True,
            "rollout_sde_type": _SDE_TYPES.get(steps.sampler, steps.sampler),
            "rollout_noise_level": steps.eta,
            "rollout_debug_mode": True,
            "rollout_return_dit_trajectory": True,
            "rollout_sde_step_indices": list(steps.chosen),
            "rollout_return_step_indices": states,
        }
        if self.config.engines.protocol == "flowdppo":
            own = {
                "arguments": _encoded(arguments), "seeds": seeds, "noise_seed": steps.seed, "first_row": first_row,
                "weights": self.engines.name,
            }  # fmt: skip
            return {**request, "extra_sampling_params": {"flowdppo": own}}
        if not isinstance(text, str):
            raise ValueError("prompts: got no text, expected one per prompt with engines.protocol='sglang'")
        options = dict(self.config.sampling.pipeline_kwargs)
        named = {name: options.pop(name) for name in _NAMED if name in options}
        return {**request, **named, **({"extra_sampling_params": _encoded(options)} if options else {})}


def _read(url: str, answer: Any, count: int, steps: NoisySteps, states: list[int]) -> EngineRollout:
    """A server's answer to a request for ``count`` images."""
    try:
        if not isinstance(answer, list) or len(answer) != count:
            got = f"{len(answer)} images" if isinstance(answer, list) else f"a {type(answer).__name__}"
            raise ValueError(f"got {got}, expected a list of {count}")
        rollout = read_sglang(answer, steps.chosen, sampler=steps.sampler, eta=steps.eta, state_steps=states)
        rollout.check_steps()
        return rollout
    except ValueError as error:
        raise EngineError(f"{url}: wrong answer: {error}") from error


def _encoded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    coded = {}
    for name, value in arguments.items():
        try:
            coded[name] = encode(value)
        except TypeError as error:
            raise TypeError(f"engines: argument {name!r} of the pipeline cannot be sent: {error}") from None
    return coded
