"""Flow-Factory (X-GenGroup/Flow-Factory): its ``dppo`` trainer with the fused loss, for x-based and v-based masks.

:func:`register` puts :class:`DPPOTrainer` in the place of ``trainer_type: dppo``, so a recipe stays as it is. (A dotted
path as ``trainer_type`` selects the training arguments as well as the trainer in the trees from May to July 2026, and a
trainer is no class of arguments.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backend import BackendName
from ..losses import fused_policy_loss, fused_policy_velocity_loss
from ..objectives import DPPO
from ..results import LossOutput
from ..rows import stats_dtype
from ..samplers import SDEStep, on_host
from ._rows import squared_drift
from ._trainer import module_of

_SOURCE = "https://github.com/X-GenGroup/Flow-Factory"
_dppo = module_of("flow_factory.trainers.dppo", "Flow-Factory", _SOURCE)
_registry = module_of("flow_factory.trainers.registry", "Flow-Factory", _SOURCE)
_utils = module_of("flow_factory.utils.base", "Flow-Factory", _SOURCE)
_dist = module_of("flow_factory.utils.dist", "Flow-Factory", _SOURCE)
_DPPOTrainer: Any = _dppo.DPPOTrainer

__all__ = ["DPPOTrainer", "register"]

# dynamics_type -> sampler here; std_dev_t is the standard deviation of the step for CPS alone
_SAMPLERS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance", "CPS": "cps"}


class DPPOTrainer(_DPPOTrainer):
    """Flow-Factory's ``DPPOTrainer`` with the fused loss in ``optimize``; sampling, rewards and config are inherited.

    The log-ratio comes from what the mask needs anyway (means for ``kl_mask_type="x-based"``, velocities for
    ``"v-based"``), so the adapter computes no log-prob and ``batch["log_probs"]`` is not read. Rows that the mask drops
    have a loss of exactly 0 even where their ratio overflows (Flow-Factory multiplies by the mask, which leaves NaN).

    Attributes:
        loss_backend: as for the losses; set it on the class before training.
    """

    loss_backend: BackendName = "auto"

    def optimize(self, samples: list[Any]) -> None:
        """All inner epochs over one rollout: a loss and a backward per (micro-batch, train timestep)."""
        size = self.training_args.per_device_batch_size
        for inner_epoch in range(self.training_args.num_inner_epochs):
            ordered = self._order_samples_for_optimize(samples, inner_epoch)
            self.adapter.train()
            loss_info: dict[str, list[Tensor]] = defaultdict(list)
            for batch in tqdm(
                self._iter_prefetched_batches(ordered, size),
                total=-(-len(samples) // size),
                desc=f"epoch {self.epoch}: training",
                disable=not self.show_progress_bar,
            ):
                for inputs, column in self._replayed_steps(batch):
                    with self.accumulate_gradients():
                        loss = self._step_loss(batch, inputs, column, loss_info)
                        self.accelerator.backward(loss)
                        if self.accelerator.sync_gradients:
                            loss_info = self._update(loss_info)

    def _replayed_steps(self, batch: Any) -> Iterator[tuple[dict[str, Any], int]]:
        """Arguments of ``adapter.forward`` for every train timestep of ``batch``, and its column in what was stored."""
        # read once per batch; indexing by device scalars would wait for the device at every step
        where = batch["latent_index_map"].tolist()
        columns = batch["callback_index_map"][0].tolist()
        timesteps = batch["timesteps"]
        for index in self.adapter.scheduler.train_timesteps.tolist():
            last = index + 1 >= timesteps.shape[1]
            inputs = {
                **self.training_args,
                "t": timesteps[:, index],
                "t_next": torch.tensor(0, device=self.accelerator.device) if last else timesteps[:, index + 1],
                "latents": batch["all_latents"][:, where[index]],
                "next_latents": batch["all_latents"][:, where[index + 1]],
                "compute_log_prob": False,
                "noise_level": self.adapter.scheduler.noise_level,
                **batch,
            }
            yield _utils.filter_kwargs(self.adapter.forward, **inputs), columns[index]

    def _step_loss(self, batch: Any, inputs: dict[str, Any], column: int, loss_info: dict[str, list[Tensor]]) -> Tensor:
        args = self.training_args
        by_velocity = args.kl_mask_type == "v-based"
        reference_key = "noise_pred" if args.kl_type == "v-based" else "next_latents_mean"
        mask_key = "noise_pred" if by_velocity else "next_latents_mean"
        wanted = {mask_key, "std_dev_t", "dt"} | ({reference_key} if self.enable_kl_loss else set())
        inputs["return_kwargs"] = sorted(wanted)
        with self.autocast():
            output = self.adapter.forward(**inputs)
        low, high = args.adv_clip_range
        advantages = batch["advantage"].clamp(low, high)
        old = batch[mask_key][:, column].detach()
        loss_of = self._velocity_loss if by_velocity else self._mean_loss
        out = loss_of(output, old, inputs, advantages.to(stats_dtype(old)))
        loss = out.loss
        if self.enable_kl_loss:
            drift = squared_drift(
                getattr(output, reference_key), self._reference(inputs, reference_key), backend=self.loss_backend
            ).mean()
            loss_info["kl_div"].append(drift.detach())
            loss_info["kl_loss"].append((args.kl_beta * drift).detach())
            loss = loss + args.kl_beta * drift
        rows, metrics = out.rows, out.metrics()
        loss_info["ratio"].append(rows.ratio)
        loss_info["kl_new_old"].append(rows.kl)
        loss_info["unclipped_loss"].append(-advantages * rows.ratio)
        loss_info["policy_loss"].append(metrics["policy_loss"])
        loss_info["loss"].append(loss.detach())
        loss_info["keep_ratio"].append(metrics["unmasked_fraction"])
        loss_info["masked_ratio"].append(metrics["masked_fraction"])
        return loss

    def _mean_loss(self, output: Any, old: Tensor, inputs: Mapping[str, Any], advantages: Tensor) -> LossOutput:
        sampler = self._sampler()
        std_dev_t, dt = output.std_dev_t, output.dt
        return fused_policy_loss(
            output.next_latents_mean,
            old,
            inputs["next_latents"].detach(),
            std_dev_t if sampler == "cps" else std_dev_t * torch.sqrt(-dt),
            advantages,
            objective=DPPO(self.training_args.kl_mask_threshold),
            log_prob="unnormalized" if sampler == "cps" else "gaussian",
            backend=self.loss_backend,
        )

    def _velocity_loss(self, output: Any, old: Tensor, inputs: Mapping[str, Any], advantages: Tensor) -> LossOutput:
        sampler = self._sampler()
        rows = advantages.shape[0]
        std_dev_t, dt = (x.detach().reshape(-1).expand(rows) for x in (output.std_dev_t, output.dt))
        # Flow-Factory's timesteps are levels times 1000; its dt is already the difference of the two levels
        sigma = (inputs["t"].double() / 1000.0).reshape(-1).expand(rows)
        step = SDEStep.from_levels(sampler, std_dev_t, sigma, sigma + dt)
        shape, wide = (-1,) + (1,) * (old.ndim - 1), stats_dtype(old)
        a, b, s = (on_host(x).to(wide).reshape(shape) for x in (step.sample_coef, step.velocity_coef, step.std))
        with torch.no_grad():
            noise = (inputs["next_latents"] - a * inputs["latents"] - b * old) / s
        return fused_policy_velocity_loss(
            output.noise_pred,
            old,
            noise,
            step,
            advantages,
            objective=DPPO(self.training_args.kl_mask_threshold, trust_region="velocity_drift"),
            log_prob="unnormalized" if sampler == "cps" else "gaussian",
            backend=self.loss_backend,
        )

    def _reference(self, inputs: Mapping[str, Any], key: str) -> Tensor:
        """The reference policy's ``key`` at the same states, under its own guidance scale."""
        scale = self.training_args.kl_guidance_scale
        guided = {} if scale is None else {"guidance_scale": scale}
        with self.autocast(), torch.no_grad(), self.adapter.use_ref_parameters():
            return getattr(self.adapter.forward(**{**inputs, **guided, "return_kwargs": [key]}), key)

    def _sampler(self) -> str:
        dynamics = self.adapter.scheduler.dynamics_type
        if dynamics not in _SAMPLERS:
            raise ValueError(
                f"dynamics_type: got {dynamics!r}, expected one of {', '.join(map(repr, _SAMPLERS))}; a step without "
                "noise has no density to train on"
            )
        return _SAMPLERS[dynamics]

    def _update(self, loss_info: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Clips, steps, logs what was gathered since the last update and starts anew."""
        grad_norm = self.accelerator.clip_grad_norm_(
            self.adapter.get_trainable_parameters(), self.training_args.max_grad_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        reduced = _dist.reduce_loss_info(self.accelerator, loss_info)
        reduced["grad_norm"] = grad_norm
        self.log_data({f"train/{name}": value for name, value in reduced.items()}, step=self.step)
        self.step += 1
        return defaultdict(list)


def register(name: str = "dppo") -> None:
    """Makes ``trainer_type: <name>`` this module's trainer; call it before the config is loaded.

    ``name`` has to be one that Flow-Factory has training arguments for with ``kl_mask_threshold``: ``"dppo"``.
    """
    _registry.register_trainer(name)(DPPOTrainer)
