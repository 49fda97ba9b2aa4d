"""Trainers whose classes the integrations extend: verl-omni, UniRL, Flow-Factory; all with their Flow-DPPO."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..inputs import ETA, LEVELS, THRESHOLD, Inputs, Rollout
from .common import (
    ADVANTAGE_CLIP,
    INDEX,
    SIGMAS,
    Call,
    StepOutput,
    difference,
    eager,
    installed,
    look_up,
    of_tests,
    read,
    scheduler_of,
    taken_grad,
)

# ---- verl-omni: every metric a float; timesteps are looked up on the device


def verl_omni_before(rollout: Rollout) -> Call:
    convention = of_tests("conventions").verl_omni_flow_dppo
    scheduler, timestep = scheduler_of(rollout)

    def call(i: Inputs) -> StepOutput:
        new = eager(i, *look_up(scheduler, timestep))
        loss, metrics = convention(
            new.log_prob, i.old_log_prob, new.mean, i.old_mean, new.std_dev_t, new.sqrt_dt.flatten(), i.advantages,
            kl_mask_threshold=THRESHOLD,
        )  # fmt: skip
        floats = read(metrics)
        log_ratio = difference(new.log_prob, i.old_log_prob)
        return StepOutput(loss, log_ratio, floats["actor/kl_new_old_mean"], floats)

    return call


def verl_omni_after(rollout: Rollout) -> Call:
    scheduler, timestep = scheduler_of(rollout)
    standin = of_tests("standins.verl_omni")
    config = standin.ActorConfig(
        diffusion_loss=standin.DiffusionLossConfig(loss_mode="flow_dppo", kl_mask_threshold=THRESHOLD)
    )
    with installed("verl_omni") as integration:
        integration.register()
        theirs = importlib.import_module("verl_omni.trainer.diffusion.diffusion_algos")
        loss_function = theirs.DIFFUSION_LOSS_REGISTRY["flow_dppo"]

    def call(i: Inputs) -> StepOutput:
        _, log_prob, mean, std_dev_t, sqrt_dt = integration.sample_previous_step(
            scheduler, i.sample, i.velocity, timestep, noise_level=ETA, prev_sample=i.prev_sample, return_sqrt_dt=True
        )
        result = loss_function(
            config=config,
            model_output={
                "log_probs": log_prob,
                "prev_sample_mean": mean,
                "std_dev_t": std_dev_t,
                "sqrt_dt": sqrt_dt,
            },
            data={
                "old_log_probs": i.old_log_prob,
                "advantages": i.advantages,
                "old_prev_sample_mean": i.old_mean,
            },
        )
        log_ratio = difference(log_prob, i.old_log_prob)
        return StepOutput(result.loss, log_ratio, result.metrics["actor/kl_new_old_mean"], result.metrics)

    return call


# ---- UniRL: the algorithm runs the backward; every metric a float


@dataclass
class _Segment:
    """One recorded step as UniRL's segment holds it, without copies of the states."""

    inputs: Inputs
    sigmas: Tensor
    sde_indices: Tensor

    @property
    def sde_logp(self) -> Tensor:
        return self.inputs.old_log_prob[:, None]

    @property
    def sde_means(self) -> Tensor:
        return self.inputs.old_mean[:, None]

    def latents_at(self, step: int) -> Tensor:
        return self.inputs.sample if step == INDEX else self.inputs.prev_sample


class _EagerStrategy:
    canonical_name = "flow"

    def denoise(self, noise_pred: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor, **options: Any) -> Any:
        after = options["prev_sample"]
        conventions = of_tests("conventions")
        new = conventions.replay(
            "flow_sde", sample.float(), noise_pred.float(), after.float(), sigma, sigma_next, options["eta"],
            list(SIGMAS),
        )  # fmt: skip
        return after, new.log_prob, new.mean


@dataclass
class _Stage:
    """A diffusion stage whose model has run; it keeps what it returned last."""

    strategy: Any
    result: Any = None

    def replay(self, conditions: Any, *, segment: _Segment, params: Any, step_indices: list[int]) -> Any:
        steps = [
            self.strategy.denoise(
                noise_pred=segment.inputs.velocity, sample=segment.latents_at(s), sigma=segment.sigmas[s],
                sigma_next=segment.sigmas[s + 1], eta=params.eta, prev_sample=segment.latents_at(s + 1),
                sigma_max=segment.sigmas[1], step_index=s,
            )
            for s in step_indices
        ]  # fmt: skip
        log_probs, means = (torch.stack([step[k] for step in steps], 1) for k in (1, 2))
        self.result = of_tests("standins.unirl").ReplayResult(log_probs, means)
        return self.result


def _segments(rollout: Rollout) -> Callable[[Inputs], _Segment]:
    device = rollout.inputs.velocity.device
    sigmas, indices = torch.tensor(SIGMAS, device=device), torch.tensor([INDEX])
    return lambda i: _Segment(i, sigmas, indices)


def unirl_before(rollout: Rollout) -> Call:
    convention = of_tests("conventions").unirl_flow_dppo
    params, stage, segment_of = SimpleNamespace(eta=ETA), _Stage(_EagerStrategy()), _segments(rollout)
    with installed("unirl", "september"):
        gather = importlib.import_module("unirl.algorithms.base").gather_sde_field
    sigma, sigma_next = LEVELS[0]
    std = ETA * math.sqrt(sigma / (1.0 - sigma)) * math.sqrt(sigma - sigma_next)
    stds = torch.full((1, 1), std, device=rollout.inputs.velocity.device)

    def call(i: Inputs) -> StepOutput:
        segment = segment_of(i)
        steps = segment.sde_indices.tolist()
        new = stage.replay({}, segment=segment, params=params, step_indices=steps)
        old_log_prob, old_mean = (
            gather(column, segment.sde_indices, steps) for column in (segment.sde_logp, segment.sde_means)
        )
        loss, metrics = convention(
            new.log_probs, old_log_prob, new.prev_sample_means, old_mean, stds, i.advantages, threshold=THRESHOLD
        )
        loss.backward()
        value, floats = loss.item(), read(metrics)
        return _of_unirl(value, stage, i, floats)

    return call


def unirl_after(rollout: Rollout) -> Call:
    params, segment_of = SimpleNamespace(eta=ETA), _segments(rollout)
    with installed("unirl", "september") as integration:
        stage = _Stage(integration.FlowSDEStrategy())
        algorithm = integration.FlowDPPO(params=params, stage=stage, kl_mask_threshold=THRESHOLD)

    def call(i: Inputs) -> StepOutput:
        result = algorithm.compute_loss_and_backward(
            conditions={}, segment=segment_of(i), advantages=i.advantages, training_progress=0.0, loss_scale=1.0
        )
        return _of_unirl(result.loss, stage, i, dict(result.metrics))

    return call


def _of_unirl(loss: float, stage: _Stage, i: Inputs, metrics: dict[str, float]) -> StepOutput:
    log_ratio = difference(stage.result.log_probs, i.old_log_prob[:, None])
    # the graph is not kept, its results are not either
    stage.result = None
    return StepOutput(loss, log_ratio, metrics["kl_new_old_mean"], metrics, taken_grad(i))


# ---- Flow-Factory: the trainer runs the backward; metrics stay on the device until the optimizer step


class _States:
    """``all_latents`` of a batch, ``[:, slot]``, without copies."""

    def __init__(self, *states: Tensor) -> None:
        self.states = states

    def __getitem__(self, key: tuple[slice, int]) -> Tensor:
        return self.states[int(key[1])]


class _Adapter:
    """Flow-Factory's adapter and scheduler after the model has run: an eager step, in both contenders."""

    def __init__(self, rollout: Rollout) -> None:
        device = rollout.inputs.velocity.device
        self.sigmas = torch.tensor(SIGMAS, device=device)
        self.scheduler = SimpleNamespace(
            train_timesteps=torch.tensor([INDEX], device=device), dynamics_type="Flow-SDE", noise_level=ETA
        )
        self.velocity: Tensor | None = None

    def train(self) -> None:
        """Nothing to switch."""

    def forward(
        self,
        t: Tensor,
        t_next: Tensor,
        latents: Tensor,
        next_latents: Tensor,
        noise_level: float,
        compute_log_prob: bool = True,
        return_kwargs: tuple[str, ...] = (),
    ) -> Any:
        conventions = of_tests("conventions")
        assert self.velocity is not None
        state, velocity = latents.float(), self.velocity.float()
        sigma, sigma_next = (conventions.lift(level.float() / 1000.0, state) for level in (t, t_next))
        mean, diffusion, std = conventions.flow_sde(
            state, velocity, sigma, sigma_next, noise_level, self.sigmas[1].item()
        )
        log_prob = conventions.gaussian_log_prob(next_latents.float(), mean, std) if compute_log_prob else None
        return SimpleNamespace(
            next_latents_mean=mean, std_dev_t=diffusion, dt=sigma_next - sigma, log_prob=log_prob, noise_pred=velocity
        )


def _flow_factory_batches(rollout: Rollout) -> Callable[[Inputs], dict[str, Any]]:
    device, rows = rollout.inputs.velocity.device, rollout.workload.row_count
    slots = torch.tensor([-1, 0, 1, -1], device=device)
    columns = torch.tensor([-1, 0, -1], device=device)
    timesteps = (torch.tensor(SIGMAS[:-1], device=device) * 1000.0).expand(rows, -1)

    def batch_of(i: Inputs) -> dict[str, Any]:
        return {
            "latent_index_map": slots,
            "log_prob_index_map": columns,
            "callback_index_map": columns.expand(rows, -1),
            "timesteps": timesteps,
            "all_latents": _States(i.sample, i.prev_sample),
            "log_probs": i.old_log_prob[:, None],
            "next_latents_mean": i.old_mean[:, None],
            "advantage": i.advantages,
        }

    return batch_of


def flow_factory_before(rollout: Rollout) -> Call:
    convention = of_tests("conventions").flow_factory_dppo
    adapter, batch_of = _Adapter(rollout), _flow_factory_batches(rollout)

    def steps(batch: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        # indexed by numbers on the device, a sync each
        slots, columns = batch["latent_index_map"], batch["callback_index_map"][0]
        for index in adapter.scheduler.train_timesteps:
            old_log_prob = batch["log_probs"][:, batch["log_prob_index_map"][index]]
            old_mean = batch["next_latents_mean"][:, columns[index]]
            t = batch["timesteps"][:, index]
            t_next = batch["timesteps"][:, index + 1] if index + 1 < batch["timesteps"].shape[1] else t * 0.0
            states = {
                "latents": batch["all_latents"][:, slots[index]],
                "next_latents": batch["all_latents"][:, slots[index + 1]],
            }
            yield {"t": t, "t_next": t_next, **states}, old_log_prob, old_mean

    def call(i: Inputs) -> StepOutput:
        adapter.velocity = i.velocity
        batch = batch_of(i)
        ((arguments, old_log_prob, old_mean),) = steps(batch)
        new = adapter.forward(**arguments, noise_level=ETA)
        std = new.std_dev_t * torch.sqrt(-new.dt)
        loss, info = convention(
            new.log_prob, old_log_prob, new.next_latents_mean, old_mean, std, batch["advantage"],
            threshold=THRESHOLD, adv_clip_range=(-ADVANTAGE_CLIP, ADVANTAGE_CLIP),
        )  # fmt: skip
        loss.backward()
        log_ratio = difference(new.log_prob, old_log_prob)
        return StepOutput(loss.detach(), log_ratio, info["kl_new_old"], info, taken_grad(i))

    return call


class _Accelerator:
    """Accelerate's part while gradients are accumulated: the backward alone."""

    sync_gradients = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def flow_factory_after(rollout: Rollout) -> Call:
    adapter, batch_of = _Adapter(rollout), _flow_factory_batches(rollout)
    arguments = of_tests("standins.flow_factory").DPPOTrainingArguments(
        per_device_batch_size=rollout.workload.row_count,
        adv_clip_range=(-ADVANTAGE_CLIP, ADVANTAGE_CLIP),
        kl_mask_threshold=THRESHOLD,
    )
    kept: list[dict[str, list[Tensor]]] = []
    with installed("flow_factory") as integration:

        class Trainer(integration.DPPOTrainer):
            def __init__(self) -> None:
                # the stand-in's would make an optimizer, which has no part in a step
                self.adapter, self.training_args = adapter, arguments
                self.accelerator, self.autocast = _Accelerator(adapter.sigmas.device), contextlib.nullcontext
                self.epoch = 0

            def _update(self, loss_info: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
                kept.append(loss_info)
                return type(loss_info)(list)

        trainer = Trainer()

    def call(i: Inputs) -> StepOutput:
        adapter.velocity = i.velocity
        trainer.optimize([batch_of(i)])
        info = {name: values[0] for name, values in kept.pop().items()}
        return StepOutput(info["loss"], lambda: torch.log(info["ratio"]), info["kl_new_old"], info, taken_grad(i))

    return call
