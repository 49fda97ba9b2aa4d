"""The trainer: sample groups, score them, turn rewards into advantages, update a few times on the recorded steps."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from ..losses import fused_policy_velocity_loss
from ..objectives import Objective, as_objective
from ..results import LossOutput
from ..rules import RowValues
from ..runs.logs import ROWS_FILE, append_lines
from ..runs.row_log import row_part
from ..runs.tracking import RunLog
from .advantages import RewardHistory, StepAdvantages, advantages_of, group_spread, per_step, weighted_reward
from .ambient import own_state
from .checkpoint import load_random_state, random_state
from .config import FlowDPPOConfig
from .evaluation import Evaluation
from .metrics import METRICS, micro_vector, peak_memory, read_iteration
from .mismatch import MismatchGate
from .objective import adapted, over_budget
from .pipeline_calls import PipelineCalls, check_guidance, join_rewards
from .prompts import PromptSource
from .record.arguments import row_index
from .record.offload import on_device
from .record.recorder import ReplayCheck, TrajectoryRecorder
from .record.trajectory import Trajectory, trajectory_bytes
from .resume import RunState
from .rewards import BackgroundScorer, Reward
from .rollout import Rollout, captions
from .row_plan import check_processes, choose_steps, plan_calls, plan_updates, summary
from .seeds import derive_seed
from .weights.arrival import check_arrival
from .weights.distributed import Workers
from .weights.optimizer import PolicyOptimizer
from .weights.policy import PolicyWeights

logger = get_logger(__name__)

# images of a rollout that are shown in the output folder
_SHOWN = 16


class _Drawn(NamedTuple):
    """A rollout before its advantages."""

    groups: list[dict]
    trajectories: list[Trajectory]
    calls: list[range]
    rewards: dict[str, Tensor]
    page: tuple[Any, list[str]] | None


class FlowDPPOTrainer:
    """Fine-tunes the transformer(s) of any diffusers flow pipeline towards a reward with Flow-DPPO (arXiv 2606.11025).

    Args:
        pipeline: a diffusers pipeline with a flow-matching scheduler; its own scheduler is put back after each rollout.
        reward: see :class:`~flowdppo_fast.trainer.rewards.Reward`.
        prompts: texts, or mappings of arguments of the pipeline's call for one prompt (``prompt``, or tensors such as
            ``prompt_embeds`` without a batch dim). ``text`` and ``metadata`` in a mapping go to the reward only.
        config: settings; checked before any weight is touched.
        eval_prompts: held-out prompts for ``evaluation.every``.
        step_advantages: a function of the advantages ``[R]``, the rewards by name and the indices of the trained steps,
            which gives each step its own, ``[R, S]``. None: all steps of an image have its advantage.
        objective: in place of the one that ``config.objective`` names: an objective, or a function of a row's values
            (:mod:`flowdppo_fast.rules`), which is fused with the rest.

    Raises:
        ValueError, TypeError: settings, prompts or a pipeline that cannot be trained with them.
    """

    @own_state()
    def __init__(
        self,
        pipeline: Any,
        reward: Reward,
        prompts: Sequence[str | Mapping[str, Any]],
        config: FlowDPPOConfig | None = None,
        *,
        eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
        objective: Objective | Callable[[RowValues], tuple] | None = None,
        step_advantages: StepAdvantages | None = None,
    ):
        self.config = config = config or FlowDPPOConfig()
        config.validate()
        s, o = config.sampling, config.optimizer
        if (config.evaluation.every is None) != (eval_prompts is None):
            raise ValueError(
                f"eval_prompts: got {'none' if eval_prompts is None else 'some'} with evaluation.every="
                f"{config.evaluation.every}, expected both or neither"
            )
        self.pipeline, self.reward, self.step_advantages = pipeline, reward, step_advantages
        self.prompts = PromptSource(prompts, pipeline, [*s.pipeline_kwargs, "return_dict"])
        check_guidance(self.prompts, s.pipeline_kwargs)
        self.recorder = TrajectoryRecorder(pipeline, sampler=s.sampler, eta=s.eta, noise=s.noise)
        check_arrival(pipeline, self.recorder.modules, train=config.model.train, precision=config.model.mixed_precision)
        self._given_objective = config.objective.build() if objective is None else as_objective(objective)
        self.objective = self._given_objective
        self.accelerator = Accelerator(cpu=config.run.device == "cpu")
        self.workers = Workers(self.accelerator)
        self.updates = plan_updates(config, self.workers)
        self.device = self.workers.device
        check_processes(config, self.workers, self.prompts, len(self.recorder.modules))
        # reading a tensor on the CPU waits for nothing, so a gradient that is zero is worth looking for
        self._looks = not self.workers.sharded and (self.device.type == "cpu" or o.skip_dropped_backward)
        for name, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False)
                # what is sharded may be too large for one device
                if self.workers.sharded and name not in self.recorder.modules:
                    component.to(self.device)
        if not self.workers.sharded:
            pipeline.to(self.device)
        # what is not needed while the transformers are trained
        self._idle = [
            component
            for name, component in pipeline.components.items()
            if config.model.offload_idle
            and isinstance(component, torch.nn.Module)
            and name not in self.recorder.modules
        ]
        self.weights = PolicyWeights(
            self.recorder.modules,
            config.model,
            config.run.seed,
            self.device,
            config.objective,
            self.workers,
        )
        scaled = config.model.mixed_precision == "fp16"
        self.optimizer = PolicyOptimizer(self.weights.parameters, o, self.workers, scaled=scaled)
        self.history = RewardHistory(len(self.prompts.entries), config.advantage.history)
        self._places = {id(entry): place for place, entry in enumerate(self.prompts.entries)}
        self.calls = PipelineCalls(pipeline, reward, config, self.weights, self.device)
        self.evaluation = (
            None if eval_prompts is None else Evaluation(eval_prompts, pipeline, config, self.workers, self.calls)
        )
        self.output = Path(config.run.output_dir).expanduser()
        self.state = RunState(
            config,
            self.output,
            self.workers,
            self.weights,
            self.optimizer,
            self.history,
            self.prompts.fingerprints(),
        )
        # of the first call, and the kinds of calls that were checked
        self.replay_check: ReplayCheck | None = None
        self._verified: set[tuple] = set()
        self._doing: Callable[[str], None] = lambda text: None  # for the progress bar
        # kind, images and captions of the present iteration, for the output folder
        self._pages: list[tuple[str, Any, list[str]]] = []
        self._gate = MismatchGate(self.objective, self.workers, config.run.stop_on_mismatch)

    @property
    def iteration(self) -> int:
        """Iterations that are done."""
        return self.state.iteration

    @property
    def skipped_updates(self) -> int:
        """Updates of the run so far whose loss or gradient was not finite."""
        return self.state.skipped_updates

    @own_state()
    def train(
        self, *, resume: bool = False, on_iteration: Callable[[dict[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Runs the remaining iterations; returns the metrics of all iterations, those before a resume included.

        Args:
            resume: continue from the newest complete checkpoint of ``run.output_dir``; start afresh if it has none.
            on_iteration: called after each iteration with its metrics.

        Raises:
            ValueError: the folder holds a run that goes on, or has other settings, or ``resume`` is False.
            RuntimeError: too many updates were skipped because a loss or gradient was not finite, or an interrupted
                iteration has to be undone and there is no checkpoint to go back to.
        """
        run = self.config.run
        self.pipeline.set_progress_bar_config(disable=True)
        with self.state.begun(resume) as history, self._log() as log:
            log.start(history)
            self._doing = log.doing
            log.say(summary(self.config, self.workers, self.weights, self.device))
            self.objective = adapted(self._given_objective, history, self.config.objective.kl_target)
            ended = self.iteration >= run.iterations or bool(
                history and over_budget(history[-1], self.config.objective.drift_budget)
            )
            while not ended:
                metrics = self._iterate()
                ended = self.iteration == run.iterations or over_budget(metrics, self.config.objective.drift_budget)
                if ended and self.evaluation is not None:
                    metrics |= self._evaluate("eval_final")
                history.append(metrics)
                for kind, images, texts in self._pages:
                    self.workers.attempt(log.images, kind, self.iteration, images, texts)
                self.workers.attempt(log.iteration, metrics)
                if self.iteration % run.checkpoint_every == 0 or ended:
                    self.save_checkpoint()
                if on_iteration is not None:
                    on_iteration(metrics)
                if self.skipped_updates > self.config.optimizer.max_skipped_updates:
                    raise RuntimeError(
                        f"{self.skipped_updates} updates were skipped because the loss or a gradient was not finite, "
                        f"expected at most optimizer.max_skipped_updates={self.config.optimizer.max_skipped_updates}"
                    )
        return history

    def _log(self) -> RunLog:
        run = self.config.run
        return RunLog(
            self.accelerator, self.output, trackers=run.trackers, project=run.project, config=self.config.to_dict(),
            total=run.iterations, progress=run.progress, plot_every=run.plot_every,
        )  # fmt: skip

    @own_state()
    def sample(self, iteration: int) -> Rollout:
        """The rollout of ``iteration``: a function of the seed, ``iteration`` and the present weights.

        Every process samples its share of each update's rows and knows the rewards of all.
        """
        s, a = self.config.sampling, self.config.advantage
        drawn = self._draw(iteration, s.same_latents)
        places = [self._places[id(entry)] for entry in drawn.groups]
        past = self.history.past(drawn.rewards, places)
        advantages = advantages_of(
            drawn.rewards, s.group_size, weights=a.reward_weights, std=a.std, eps=a.eps, per_reward=a.per_reward,
            past=past,
        )  # fmt: skip
        self.history.add(drawn.rewards, places)
        advantages = per_step(self.step_advantages, advantages, drawn.rewards, drawn.trajectories[0].steps)
        return Rollout(drawn.trajectories, drawn.calls, drawn.rewards, advantages, drawn.page)

    @own_state()
    def noise_share(self) -> float:
        """Share of the reward's variance within groups that the noise of the trained steps explains.

        The next rollout is sampled twice and let go: with the same first latents in a group, where nothing else
        differs, and as they are drawn. Both variances are estimates, so their ratio may pass 1. NaN where no reward
        varies.
        """
        group_size, weights = self.config.sampling.group_size, self.config.advantage.reward_weights
        variances = []
        for same in (True, False):
            total = weighted_reward(self._draw(self.iteration, same).rewards, weights)
            variances.append(float(group_spread(total, group_size)[0].square().mean()))
        return variances[0] / variances[1] if variances[1] else math.nan

    def _draw(self, iteration: int, same_latents: bool) -> _Drawn:
        """Trajectories of a rollout and the rewards of all processes."""
        s, seed = self.config.sampling, self.config.run.seed
        groups = self.prompts.groups(iteration, s.prompts_per_rollout, seed)
        calls = plan_calls(s, self.workers, self.updates, self.prompts, groups)
        trajectories, pending, shown = [], [], None
        self.calls.send_weights()
        # nothing is sampled while the rewards of an only call are computed
        background = s.background_rewards and len(calls) > 1
        with BackgroundScorer(self.reward, self.device) if background else contextlib.nullcontext() as scorer:
            for number, rows in enumerate(calls, 1):
                self._doing(f"sampling {number}/{len(calls)}")
                entries = [groups[row // s.group_size] for row in rows]
                trajectory, images = self._record(iteration, rows, entries, same_latents)
                trajectories.append(trajectory)
                pending.append(self.calls.rewards(images, entries, scorer))
                if rows is calls[0] and self._shows(iteration + 1):
                    shown = images[:_SHOWN], entries[:_SHOWN]
            rewards = [result() for result in pending]
        self.workers.agree()
        own = join_rewards(rewards, self.workers, self.state.reward_names)
        self.state.reward_names = list(own)
        table = self.workers.collect(torch.stack(list(own.values())), self.updates)
        page = None if shown is None else (shown[0], captions(shown[1], rewards[0]))
        return _Drawn(groups, trajectories, calls, dict(zip(own, table)), page)

    @own_state()
    def update(self, rollout: Rollout, rows: range, *, number: int) -> dict[str, list]:
        """One optimizer step on ``rows`` of a rollout, without a host sync on a GPU.

        Args:
            rows: of all processes; each has an equal share of them at hand.
            number: updates made since the rollout; before the first, ratios that differ from 1 are rounding.

        Returns:
            ``vectors``, ``shares``, ``elements`` per row and ``parts`` of the micro-batches and ``steps`` of the
            update, on the device.
        """
        o = self.config.optimizer
        vectors, shares, elements, parts = [], [], [], []
        for trajectory, local, places in rollout.locate(rows):
            count = len(trajectory.steps)
            width = min(o.steps_per_micro_batch or count, count)
            for start, first in itertools.product(range(0, len(local), o.micro_batch_size), range(0, count, width)):
                part, steps = slice(start, start + o.micro_batch_size), range(first, min(first + width, count))
                advantages = rollout.advantages_of(row_index(places[part], self.device), steps)
                shares.append(len(advantages) * len(steps) / (len(rows) * count))
                out = self._micro_batch(trajectory, local[part], steps, advantages, shares[-1])
                vectors.append(micro_vector(out, self.objective, trajectory.elements, on_policy=number == 0))
                indices = [trajectory.steps[position].index for position in steps]
                elements.append(trajectory.elements)
                parts.append(row_part(out, number, indices, first, places[part], trajectory.elements))
                self._metric_names = out.metric_names
        if number == 0:
            self._gate.check(vectors)
        own = torch.stack([share * vector for share, vector in zip(shares, vectors)]).sum(0)
        loss, kl = (own[METRICS.index(name)] for name in ("loss", "kl_new_old_mean"))
        step = self.optimizer.step(loss, kl)
        self.weights.stepped()
        return {"vectors": vectors, "shares": shares, "elements": elements, "parts": parts, "steps": [step]}

    @own_state()
    def evaluate(self) -> tuple[dict[str, float], list[Any], list[str]]:
        """Mean rewards of the held-out prompts, this process's images and their captions.

        Raises:
            ValueError: the trainer was given no ``eval_prompts``.
        """
        if self.evaluation is None:
            raise ValueError("eval_prompts: got none, expected held-out prompts")
        with self.weights.averaged(), on_device(self._idle, self.device):
            return self.evaluation.run()

    @own_state()
    def save_checkpoint(self) -> Path:
        """Writes everything that :meth:`train` with ``resume=True`` continues from; returns the folder."""
        return self.state.save()

    @own_state()
    def save_pretrained(self, folder: str | Path) -> None:
        """Trained weights (the moving average if there is one) as diffusers loads them: LoRA adapters by
        ``load_lora_adapter``, full transformers by ``from_pretrained``; one folder per transformer."""
        self.weights.save_pretrained(Path(folder).expanduser())
        self.workers.agree()

    def _record(self, iteration: int, rows: range, entries: list[dict], same_latents: bool) -> tuple[Trajectory, Any]:
        """Trajectory and images of one pipeline call."""
        s, seed = self.config.sampling, self.config.run.seed
        chosen = choose_steps(
            s.candidate_steps,
            s.sde_steps_per_rollout,
            s.step_choice,
            position=iteration // s.window_every,
            seed=derive_seed(seed, iteration, "steps", rows[0] // s.group_size if s.per_group_steps else 0),
        )
        noise_seed = derive_seed(seed, iteration, "noise")
        first = s.group_size if same_latents else 1
        seeds = [derive_seed(seed, iteration, "latents", row // first) for row in rows]
        call = functools.partial(self.calls.images, self.prompts, entries, seeds, s.num_steps, s.pipeline_kwargs)
        with self.recorder.recording(chosen, seed=noise_seed, first_row=rows[0]) as trajectory:
            images = call()
        self.calls.drew(trajectory, call)
        return trajectory, images

    def _iterate(self) -> dict[str, float]:
        """One rollout and its updates; metrics are read from the device once, at the end."""
        o, seed = self.config.optimizer, self.config.run.seed
        self._pages = []
        every = self.config.evaluation.every
        evaluated = self._evaluate("eval") if every is not None and self.iteration % every == 0 else {}
        measured = self.config.sampling.measure_noise_share and self.iteration == 0
        started = time.perf_counter()
        state = random_state()
        try:
            with on_device(self._idle, self.device):
                share = self.noise_share() if measured else None
                rollout = self.sample(self.iteration)
                self.calls.verify_moved(self.recorder, self.objective)
        except Exception:
            # a reward server that went away must not cost what was trained since the last checkpoint
            if self.iteration and (self.workers.count == 1 or self.workers.agreed):
                load_random_state(*state)
                self.save_checkpoint()
            raise
        sampled = time.perf_counter()
        self._verify(rollout)
        self.optimizer.begin_rollout(self.iteration, self.config.run.iterations)
        # until the iteration is over the weights are those of no checkpoint
        self.state.within = True
        results: dict[str, list] = {"vectors": [], "shares": [], "elements": [], "parts": [], "steps": []}
        for epoch in range(o.inner_epochs):
            order = list(self.updates)
            if epoch:
                random.Random(derive_seed(seed, self.iteration, "order", epoch)).shuffle(order)
            for rows in order:
                self._doing(f"update {len(results['steps']) + 1}/{len(self.updates) * o.inner_epochs}")
                for key, values in self.update(rollout, rows, number=len(results["steps"])).items():
                    results[key] += values
        self.state.iteration += 1
        self.state.within = False
        metrics = self._read(rollout, results) | evaluated
        self.objective = adapted(self.objective, [metrics], self.config.objective.kl_target)
        self.weights.move_reference(self.iteration)
        if share is not None:
            metrics["noise_share"] = share
        ended = time.perf_counter()
        metrics["seconds_sampling"], metrics["seconds_updates"] = sampled - started, ended - sampled
        metrics["samples_per_second"] = len(rollout.advantages) / (ended - started)
        if rollout.page is not None:
            self._pages.append(("rollout", *rollout.page))
        return metrics

    def _verify(self, rollout: Rollout) -> None:
        """The replay must give the recorded velocities before anything is trained on it: at every step and of every
        kind of call once."""
        kinds = [trajectory.kinds for trajectory in rollout.trajectories]
        new = [not kind <= self._verified.union(*kinds[:place]) for place, kind in enumerate(kinds)]
        if self.workers.sharded:
            # all processes replay the same calls
            new = [any(one) for one in zip(*self.workers.gather_objects([new]))]
        for trajectory in itertools.compress(rollout.trajectories, new):
            rows = range(min(self.config.optimizer.micro_batch_size, len(trajectory)))
            check = self.calls.verify(self.recorder, trajectory, rows, self.objective)
            self.replay_check = self.replay_check or check
            logger.info("replay reproduces the rollout: %s", check)
        self._verified = self._verified.union(*kinds)

    def _micro_batch(
        self, trajectory: Trajectory, rows: Sequence[int], steps: range, advantages: Tensor, share: float
    ) -> LossOutput:
        """Forward, loss and backward of some rows with some of their steps."""
        objective = self.config.objective
        reference = None

        def replay() -> Tensor:
            return self.recorder.replay(trajectory, rows, steps)

        if objective.needs_reference:
            with torch.no_grad(), self.weights.reference():
                reference = self.calls.run(replay)
        velocity = self.calls.run(replay)
        out = self._loss(trajectory, rows, steps, velocity, reference, advantages)
        assert out.grad is not None
        # on a GPU looking for a gradient costs a sync
        if not (self._looks and not out.grad.any()):
            velocity.backward(out.grad * (share * self.optimizer.scale))
        return out

    def _loss(
        self,
        trajectory: Trajectory,
        rows: Sequence[int],
        steps: range,
        velocity: Tensor,
        reference: Tensor | None,
        advantages: Tensor,
    ) -> LossOutput:
        """Loss, metrics and gradient of replayed velocities ``[b, S, *latent]`` with advantages ``[b, S]``."""
        old, noise, step = trajectory.select(rows, steps)
        return fused_policy_velocity_loss(
            velocity,
            old,
            noise,
            step,
            advantages,
            objective=self.objective,
            reference_velocity=reference,
            advantage_clip=self.config.advantage.clip,
            single_pass=True,
            **self.config.objective.of_loss(step, advantages.shape, self.config.sampling.num_steps, velocity.device),
        )

    def _read(self, rollout: Rollout, results: dict[str, list]) -> dict[str, float]:
        """Metrics of the iteration that just ended, as floats: read from the device once."""
        metrics, lines = read_iteration(self.iteration, rollout, results, self.config, self.workers, self._metric_names)
        self._gate.warn(metrics)
        self.state.skipped_updates += int(metrics["skipped_updates"])
        if lines and self.workers.is_main:
            self.workers.attempt(append_lines, self.output / ROWS_FILE, lines)
        metrics |= {"skipped_updates": self.skipped_updates, "learning_rate": self.optimizer.learning_rate}
        return {**metrics, "trajectory_bytes": trajectory_bytes(rollout.trajectories), **peak_memory(self.device)}

    def _evaluate(self, prefix: str) -> dict[str, float]:
        metrics, images, texts = self.evaluate()
        if self.config.sampling.output_type != "latent":
            self._pages.append((prefix, images, texts))
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    def _shows(self, iteration: int) -> bool:
        """Whether images of this iteration go to the output folder."""
        every = self.config.run.plot_every or 0
        return every > 0 and iteration % every == 0 and self.config.sampling.output_type != "latent"
