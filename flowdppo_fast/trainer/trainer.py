"""The trainer: sample groups, score them, turn rewards into advantages, update a few times on the recorded steps."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from ..losses import fused_velocity_policy_loss
from ..results import LossOutput
from . import checkpoint
from .adapters import add_lora, save_lora, without_adapters
from .advantages import advantages_of, weighted_reward
from .config import FlowDPPOConfig
from .ema import MovingAverage
from .metrics import micro_vector, reduce_micro
from .recorder import ReplayCheck, Trajectory, TrajectoryRecorder, row_index
from .rewards import Reward, score
from .rollout import PromptSource, Rollout, derive_seed
from .row_log import drop_later_lines, row_lines, row_part

logger = get_logger(__name__)

# settings that may differ between a run and its continuation
_FREE_SETTINGS = ("iterations", "output_dir", "checkpoint_every", "keep_checkpoints", "progress", "device", "row_log")


class FlowDPPOTrainer:
    """Fine-tunes the transformer(s) of any diffusers flow pipeline towards a reward with Flow-DPPO (arXiv 2606.11025).

    Args:
        pipeline: a diffusers pipeline with a flow-matching scheduler; its own scheduler is put back after each rollout.
        reward: see :class:`~flowdppo_fast.trainer.rewards.Reward`.
        prompts: texts, or mappings of arguments of the pipeline's call for one prompt (``prompt``, or tensors such as
            ``prompt_embeds`` without a batch dim). ``text`` and ``metadata`` in a mapping go to the reward only.
        config: settings; checked before any weight is touched.

    Raises:
        ValueError, TypeError: settings, prompts or a pipeline that cannot be trained with them.
    """

    def __init__(
        self,
        pipeline: Any,
        reward: Reward,
        prompts: Sequence[str | Mapping[str, Any]],
        config: FlowDPPOConfig | None = None,
    ):
        self.config = config = config or FlowDPPOConfig()
        config.validate()
        s, o = config.sampling, config.optimizer
        self.pipeline, self.reward = pipeline, reward
        self.prompts = PromptSource(prompts, pipeline, [*s.pipeline_kwargs, "return_dict"])
        self.recorder = TrajectoryRecorder(pipeline, sampler=s.sampler, eta=s.eta, noise=s.noise)
        self.objective = config.objective.build()
        self.accelerator = Accelerator(mixed_precision=config.model.mixed_precision, cpu=config.run.device == "cpu")
        if self.accelerator.num_processes > 1:
            raise ValueError(f"accelerate: got {self.accelerator.num_processes} processes, expected 1")
        self.device = self.accelerator.device
        # reading a tensor on the CPU waits for nothing, so a gradient that is zero is worth looking for
        self._free_reads = self.device.type == "cpu"
        pipeline.to(self.device)
        self.modules = list(self.recorder.modules.values())
        self.names, self.parameters = self._prepare_weights()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        decay = config.model.ema_decay
        self.ema = None if decay is None else MovingAverage(self.parameters, decay)
        self.output = Path(config.run.output_dir)
        self.iteration = 0
        self.skipped_updates = 0
        self.replay_check: ReplayCheck | None = None
        if o.updates_per_rollout * o.inner_epochs == 1:
            logger.warning("one update per rollout: every ratio is 1, so %s bounds nothing", config.objective.name)

    def train(
        self, *, resume: bool = False, on_iteration: Callable[[dict[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Runs the remaining iterations; returns the metrics of all iterations, those before a resume included.

        Args:
            resume: continue from the newest complete checkpoint of ``run.output_dir``; start afresh if it has none.
            on_iteration: called after each iteration with its metrics.

        Raises:
            ValueError: the folder holds a run and ``resume`` is False, or one with other settings.
            RuntimeError: too many updates were skipped because a loss or gradient was not finite.
        """
        run = self.config.run
        history = self._start(resume)
        self.pipeline.set_progress_bar_config(disable=True)
        bar = tqdm(
            total=run.iterations, initial=self.iteration, disable=not run.progress, unit="it", dynamic_ncols=True
        )
        with bar, open(self.output / "metrics.jsonl", "a") as log:
            while self.iteration < run.iterations:
                metrics = self._iterate()
                history.append(metrics)
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                bar.update()
                bar.set_postfix(
                    reward=f"{metrics['reward']:.3f}",
                    kl=f"{metrics['kl_new_old_mean']:.1e}",
                    masked=f"{metrics['masked_fraction']:.1%}",
                )
                if self.iteration % run.checkpoint_every == 0 or self.iteration == run.iterations:
                    self.save_checkpoint()
                if on_iteration is not None:
                    on_iteration(metrics)
                if self.skipped_updates > self.config.optimizer.max_skipped_updates:
                    raise RuntimeError(
                        f"{self.skipped_updates} updates were skipped because the loss or a gradient was not finite, "
                        f"expected at most optimizer.max_skipped_updates={self.config.optimizer.max_skipped_updates}"
                    )
        return history

    def sample(self, iteration: int) -> Rollout:
        """The rollout of ``iteration``: a function of the seed, ``iteration`` and the present weights."""
        s, a, seed = self.config.sampling, self.config.advantage, self.config.run.seed
        groups = self.prompts.groups(iteration, s.prompts_per_rollout, seed)
        # one choice of steps for the whole rollout, so that all samples come from one policy
        count = s.sde_steps_per_rollout or len(s.candidate_steps)
        chosen = random.Random(derive_seed(seed, iteration, "steps")).sample(s.candidate_steps, count)
        noise_seed = derive_seed(seed, iteration, "noise")
        total = s.prompts_per_rollout * s.group_size
        trajectories, rewards = [], []
        for start in range(0, total, s.batch_size or total):
            rows = range(start, min(start + (s.batch_size or total), total))
            entries = [groups[row // s.group_size] for row in rows]
            generators = [torch.Generator().manual_seed(derive_seed(seed, iteration, "latents", row)) for row in rows]
            recording = self.recorder.recording(chosen, seed=noise_seed, first_row=start)
            with torch.no_grad(), self.accelerator.autocast(), recording as trajectory:
                images = self.pipeline(
                    **self.prompts.arguments(entries, s.group_size, self.device),
                    **s.pipeline_kwargs,
                    num_inference_steps=s.num_steps,
                    generator=generators,
                    output_type=s.output_type,
                    return_dict=False,
                )[0]
            trajectories.append(trajectory)
            texts = [entry.get("text", entry.get("prompt")) for entry in entries]
            metadata = [entry.get("metadata", {}) for entry in entries]
            rewards.append(score(self.reward, images, texts, metadata, self.device))
        named = {name: torch.cat([part[name] for part in rewards]) for name in rewards[0]}
        advantages = advantages_of(
            named, s.group_size, weights=a.reward_weights, std=a.std, eps=a.eps, per_reward=a.per_reward
        )
        return Rollout(trajectories, named, advantages)

    def update(self, rollout: Rollout, rows: Sequence[int], *, number: int) -> dict[str, list]:
        """One optimizer step on ``rows`` of a rollout, without a host sync on a GPU.

        Args:
            number: updates made since the rollout; before the first, ratios that differ from 1 are rounding.

        Returns:
            ``vectors``, ``shares`` and ``parts`` of the micro-batches, ``norms`` and ``skips`` of the update, on the
            device.
        """
        o = self.config.optimizer
        vectors, shares, parts, loss = [], [], [], torch.zeros((), device=self.device)
        for trajectory, local, places in rollout.locate(rows):
            for start in range(0, len(local), o.micro_batch_size):
                part = slice(start, start + o.micro_batch_size)
                advantages = rollout.advantages[row_index(places[part], self.device)]
                shares.append(len(advantages) / len(rows))
                out = self._micro_batch(trajectory, local[part], advantages, shares[-1])
                vectors.append(micro_vector(out, on_policy=number == 0))
                parts.append(row_part(out, number, [step.index for step in trajectory.steps], places[part]))
                loss = loss + shares[-1] * out.loss
                self._metric_names = out.metric_names
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.max_grad_norm or float("inf"), foreach=True)
        # where this is 1 the fused optimizer leaves weights, moments and step counts alone; the host need not know
        skip = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.ema is not None:
            self.ema.update()
        return {"vectors": vectors, "shares": shares, "parts": parts, "norms": [norm], "skips": [skip]}

    def save_checkpoint(self) -> Path:
        """Writes weights, optimizer, moving average, random states and iteration; returns the folder."""
        random_tensors, random_state = checkpoint.random_state()
        tensors: dict[str, dict[str, Tensor]] = {
            "weights": dict(zip(self.names, self.parameters)),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.names),
            "random": random_tensors,
        }
        if self.ema is not None:
            tensors["ema"] = dict(zip(self.names, self.ema.averages))
        state = {"random": random_state, "skipped_updates": self.skipped_updates, "config": self.config.to_dict()}
        folder = self.output / "checkpoints"
        return checkpoint.save_checkpoint(folder, self.iteration, tensors, state, self.config.run.keep_checkpoints)

    def save_pretrained(self, folder: str | Path) -> None:
        """Trained weights (the moving average if there is one) as diffusers loads them: LoRA adapters by
        ``load_lora_adapter``, full transformers by ``from_pretrained``; one folder per transformer."""
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            for name, module in self.recorder.modules.items():
                if self.config.model.train == "lora":
                    save_lora(module, Path(folder) / name)
                else:
                    module.save_pretrained(Path(folder) / name)  # type: ignore[operator]

    def _prepare_weights(self) -> tuple[list[str], list[torch.nn.Parameter]]:
        """Freezes the pipeline, makes the trained weights float32 and returns them with their names."""
        model = self.config.model
        for component in self.pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False)
        named = []
        for name, module in self.recorder.modules.items():
            # no dropout of activations or labels: the replay must be the function that the rollout was
            module.eval()
            if model.train == "lora":
                rank = model.lora_rank or 32
                alpha = 2.0 * rank if model.lora_alpha is None else model.lora_alpha
                add_lora(module, rank, alpha, model.lora_targets, derive_seed(self.config.run.seed, "adapters", name))
            else:
                module.requires_grad_(True)
            if model.gradient_checkpointing:
                module.enable_gradient_checkpointing()  # type: ignore[operator]
            named += [(f"{name}.{key}", p) for key, p in module.named_parameters() if p.requires_grad]
        for _, parameter in named:
            parameter.data = parameter.data.to(device=self.device, dtype=torch.float32)
            # always there, so that an update whose backwards were all skipped is one with zeros
            parameter.grad = torch.zeros_like(parameter)
        return [name for name, _ in named], [parameter for _, parameter in named]

    def _iterate(self) -> dict[str, float]:
        """One rollout and its updates; metrics are read from the device once, at the end."""
        s, o, seed = self.config.sampling, self.config.optimizer, self.config.run.seed
        started = time.perf_counter()
        rollout = self.sample(self.iteration)
        sampled = time.perf_counter()
        if self.replay_check is None:
            self._verify(rollout.trajectories[0])
        results: dict[str, list] = {"vectors": [], "shares": [], "parts": [], "norms": [], "skips": []}
        per_update = s.prompts_per_rollout // o.updates_per_rollout
        for epoch in range(o.inner_epochs):
            order = list(range(s.prompts_per_rollout))
            random.Random(derive_seed(seed, self.iteration, "order", epoch)).shuffle(order)
            for first in range(0, len(order), per_update):
                groups = order[first : first + per_update]
                rows = [group * s.group_size + member for group in groups for member in range(s.group_size)]
                for key, values in self.update(rollout, rows, number=len(results["norms"])).items():
                    results[key] += values
        self.iteration += 1
        metrics = self._read(rollout, results)
        metrics["seconds_sampling"], metrics["seconds_updates"] = sampled - started, time.perf_counter() - sampled
        return metrics

    def _verify(self, trajectory: Trajectory) -> None:
        """The replay must give the recorded velocities before anything is trained on it."""
        rows = range(min(self.config.optimizer.micro_batch_size, len(trajectory)))
        with self.accelerator.autocast():
            self.replay_check = check = self.recorder.verify(trajectory, rows)
        logger.info("replay reproduces the rollout: %s", check)

    def _micro_batch(self, trajectory: Trajectory, rows: Sequence[int], advantages: Tensor, share: float) -> LossOutput:
        """Forward, loss and backward of some rows with all their steps."""
        objective = self.config.objective
        reference = None
        with self.accelerator.autocast():
            if objective.kl_weight > 0:
                with torch.no_grad(), without_adapters(self.modules):
                    reference = self.recorder.replay(trajectory, rows)
            velocity = self.recorder.replay(trajectory, rows)
        old, noise = trajectory.select(rows)
        out = fused_velocity_policy_loss(
            self.objective,
            velocity,
            old,
            noise,
            trajectory.step,
            advantages[:, None].expand(-1, len(trajectory.steps)),
            reference_velocity=reference,
            advantage_clip=self.config.advantage.clip,
            kl_weight=objective.kl_weight,
            reference_kl=objective.reference_kl,
            single_pass=True,
        )
        assert out.grad is not None
        # on a GPU knowing that all rows were dropped would cost a sync, so there the backward always runs
        if not (self._free_reads and not out.grad.any()):
            velocity.backward(out.grad * share)
        return out

    def _read(self, rollout: Rollout, results: dict[str, list]) -> dict[str, float]:
        """Metrics of one iteration as floats: everything is stacked on the device and read once."""
        s = self.config.sampling
        values = reduce_micro(results["vectors"], results["shares"], self._metric_names)
        total = weighted_reward(rollout.rewards, self.config.advantage.reward_weights)
        grouped = total.view(-1, s.group_size)
        values |= {
            "reward": total.mean(),
            "reward_std": grouped.std(1, correction=0).mean(),
            "zero_std_fraction": (grouped.amax(1) == grouped.amin(1)).float().mean(),
            "grad_norm": torch.stack(results["norms"]).mean(),
            "skipped_updates": torch.stack(results["skips"]).sum(),
        }
        if len(rollout.rewards) > 1:
            values |= {f"reward/{name}": value.mean() for name, value in rollout.rewards.items()}
        parts = results["parts"] if self.config.run.row_log else []
        scalars = torch.stack([value.float() for value in values.values()])
        read = torch.cat([scalars, rollout.advantages, *(part.numbers.flatten() for part in parts)]).tolist()
        floats = dict(zip(values, read))
        advantages, numbers = read[len(values) :][: len(total)], read[len(values) + len(total) :]
        self.skipped_updates += int(floats["skipped_updates"])
        first = rollout.trajectories[0]
        elements = first.velocity.shape[2:].numel()
        if parts:
            with open(self.output / "rows.jsonl", "a") as log:
                log.writelines(line + "\n" for line in row_lines(self.iteration, elements, parts, numbers, advantages))
        return {
            "iteration": self.iteration,
            **floats,
            "skipped_updates": self.skipped_updates,
            # the paper's KL is a sum over the latent: nats per denoising step
            "kl_new_old_nats": floats["kl_new_old_mean"] * elements,
            "rows": len(total) * len(first.steps) * self.config.optimizer.inner_epochs,
        }

    def _start(self, resume: bool) -> list[dict[str, float]]:
        """Prepares the output folder or restores the newest checkpoint; returns the metrics so far."""
        saved = checkpoint.checkpoints(self.output / "checkpoints")
        path = self.output / "metrics.jsonl"
        if not resume and self.iteration == 0 and (saved or path.exists()):
            raise ValueError(
                f"run.output_dir: {self.output} holds a run already, expected a new folder; pass resume=True to "
                "continue it"
            )
        if resume and saved:
            self._restore(saved[-1])
        self.output.mkdir(parents=True, exist_ok=True)
        self.config.save(self.output / "config.yaml")
        # what was logged after the checkpoint will be done, and logged, again; so will a line that was cut off
        lines = path.read_text().splitlines()[: self.iteration] if path.exists() else []
        path.write_text("".join(line + "\n" for line in lines))
        drop_later_lines(self.output / "rows.jsonl", self.iteration)
        return [json.loads(line) for line in lines]

    def _restore(self, path: Path) -> None:
        tensors, state = checkpoint.load_checkpoint(path)
        differing = [
            f"{section}.{key}"
            for section, entries in self.config.to_dict().items()
            for key, value in entries.items()
            if not (section == "run" and key in _FREE_SETTINGS) and state["config"].get(section, {}).get(key) != value
        ]
        if differing:
            raise ValueError(f"config: {path} has other settings of {', '.join(differing)}, expected the same")
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters):
                parameter.copy_(tensors["weights"][name])
            for name, average in zip(self.names, self.ema.averages if self.ema is not None else ()):
                average.copy_(tensors["ema"][name])
        checkpoint.load_optimizer(self.optimizer, self.names, tensors["optimizer"])
        checkpoint.load_random_state(tensors["random"], state["random"])
        self.iteration, self.skipped_updates = state["iteration"], state["skipped_updates"]
        logger.info("continuing from %s", path)
