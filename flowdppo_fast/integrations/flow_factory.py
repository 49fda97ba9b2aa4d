"""Flow-Factory (X-GenGroup/Flow-Factory): its ``dppo`` trainer with the fused loss, for x-based and v-based masks.

``python -m flowdppo_fast.integrations.flow_factory recipe.yaml`` is ``ff-train recipe.yaml`` with :class:`DPPOTrainer`
in the place of ``trainer_type: dppo``, so a recipe stays as it is. (A dotted path as ``trainer_type`` selects the
training arguments as well as the trainer in the trees from May to July 2026, and a trainer is no class of arguments.)

Two interfaces are served. The trees of June and July 2026 replay with ``adapter.forward`` on flat batches, later ones
with ``get_replay_step`` on states of one or several latents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backend import BackendName
from ..losses import fused_policy_loss, fused_policy_velocity_loss
from ..objectives import DPPO
from ..results import LossOutput
from ..rows import stats_dtype
from ..samplers import SDEStep, on_host
from ._rows import log_prob_policy_loss, squared_drift
from ._trainer import module_of

_TRAINER, _SOURCE = "Flow-Factory", "https://github.com/X-GenGroup/Flow-Factory"


def _dppo_module() -> Any:
    """``dppo`` moved to ``trainers.rl`` in September 2026."""
    try:
        return module_of("flow_factory.trainers.rl.dppo", _TRAINER, _SOURCE)
    except ModuleNotFoundError:
        raise
    except ImportError:
        return module_of("flow_factory.trainers.dppo", _TRAINER, _SOURCE)


def _if_there(name: str) -> Any:
    """A module that one of the layouts has; None in the other."""
    try:
        return module_of(name, _TRAINER, _SOURCE)
    except ModuleNotFoundError:
        raise
    except ImportError:
        return None


_DPPOTrainer: Any = _dppo_module().DPPOTrainer
_utils, _dist = _if_there("flow_factory.utils.base"), _if_there("flow_factory.utils.dist")
_registry = module_of("flow_factory.trainers.registry", _TRAINER, _SOURCE)

__all__ = ["DPPOTrainer", "launch", "register"]

# dynamics_type -> sampler here; std_dev_t is the standard deviation of the step for CPS alone
_SAMPLERS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance", "CPS": "cps"}
# a space of the mask or the penalty -> its field, the same in a request, an output and what the rollout stored
_FLAT_FIELDS = {"x-based": "next_latents_mean", "v-based": "noise_pred"}
# later: (name in a request and in what the rollout stored, name in an output)
_STATE_FIELDS = {"x-based": ("next_latents_mean", "next_state_mean"), "v-based": ("velocity", "velocity")}


class _Latent(NamedTuple):
    """One latent of a replayed step; tensors ``[B, *latent]``, numbers ``[B, 1, ...]`` or ``[B]``.

    ``new`` and ``old`` are what the mask compares: means, or velocities where it is v-based.
    """

    sampler: str
    new: Tensor
    old: Tensor
    state: Tensor
    next_state: Tensor
    timestep: Tensor
    std_dev_t: Tensor
    dt: Tensor

    @property
    def std(self) -> Tensor:
        std = self.std_dev_t if self.sampler == "cps" else self.std_dev_t * torch.sqrt(-self.dt)
        return std.detach().reshape(-1)


class _Replayed(NamedTuple):
    """A stored step under the current policy.

    ``log_probs`` and ``divergence`` are there where a row is not the plain mean over one latent: new and old log-prob,
    and the divergence that the mask reads. ``reference_drift`` makes the penalty's mean squared difference.
    """

    latents: list[_Latent]
    log_probs: tuple[Tensor, Tensor] | None
    divergence: Tensor | None
    reference_drift: Callable[[], Tensor]


class DPPOTrainer(_DPPOTrainer):
    """Flow-Factory's ``DPPOTrainer`` with the fused loss in ``optimize``; sampling, rewards and config are inherited.

    The log-ratio comes from what the mask needs anyway (means for ``kl_mask_type="x-based"``, velocities for
    ``"v-based"``), so ``batch["log_probs"]`` is not read, and an adapter of June and July computes no log-prob. Samples
    of several latents, or of a latent with inactive elements, keep the adapter's joint log-prob, and their divergences
    are weighted by elements. Rows that the mask drops have a loss of exactly 0 even where their ratio overflows
    (Flow-Factory multiplies by the mask, which leaves NaN).

    Attributes:
        loss_backend: as for the losses; set it on the class before training.
    """

    loss_backend: BackendName = "auto"

    def optimize(self, samples: list[Any]) -> None:
        """All inner epochs over one rollout: a loss and a backward per (micro-batch, train timestep)."""
        size = self.training_args.per_device_batch_size
        replayed = self._replayed_states if hasattr(self.adapter, "get_replay_step") else self._replayed_batch
        update = getattr(self, "_apply_optimizer_step", self._update)
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
                for replay in replayed(batch):
                    with self.accumulate_gradients():
                        loss = self._step_loss(batch, replay(), loss_info)
                        self.accelerator.backward(loss)
                        if self.accelerator.sync_gradients:
                            loss_info = update(loss_info)

    # ---- June and July 2026: flat batches

    def _replayed_batch(self, batch: Any) -> Iterator[Callable[[], _Replayed]]:
        """A replay for every train timestep of ``batch``."""
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
            inputs = _utils.filter_kwargs(self.adapter.forward, **inputs)
            yield partial(self._replay_batch, batch, inputs, columns[index])

    def _replay_batch(self, batch: Any, inputs: dict[str, Any], column: int) -> _Replayed:
        args, sampler = self.training_args, _sampler(self.adapter.scheduler)
        mask, penalty = _FLAT_FIELDS[args.kl_mask_type], _FLAT_FIELDS[args.kl_type]
        wanted = {mask, "std_dev_t", "dt"} | ({penalty} if self.enable_kl_loss else set())
        with self.autocast():
            output = self.adapter.forward(**inputs, return_kwargs=sorted(wanted))
        latent = _Latent(
            sampler, getattr(output, mask), batch[mask][:, column].detach(), inputs["latents"], inputs["next_latents"],
            inputs["t"], output.std_dev_t, output.dt,
        )  # fmt: skip

        def reference_drift() -> Tensor:
            guided = {} if args.kl_guidance_scale is None else {"guidance_scale": args.kl_guidance_scale}
            with self.autocast(), torch.no_grad(), self.adapter.use_ref_parameters():
                reference = self.adapter.forward(**{**inputs, **guided, "return_kwargs": [penalty]})
            return self._drift(getattr(output, penalty), getattr(reference, penalty)).mean()

        return _Replayed([latent], None, None, reference_drift)

    # ---- later: states of one or several latents

    def _replayed_states(self, batch: Any) -> Iterator[Callable[[], _Replayed]]:
        """A replay for every train timestep of ``batch``."""
        plain = None
        for step in self.adapter.get_train_step_indices():
            replay = self.adapter.get_replay_step(batch, int(step))
            plain = self._has_plain_means(replay.state) if plain is None else plain
            yield partial(self._replay_state, batch, replay, int(step), plain)

    def _has_plain_means(self, state: Any) -> bool:
        """Whether the adapter's reduction is the mean over all elements; where latents are padded it is not."""
        values = {name: x.detach().float().square() for name, x in state.components.items()}
        theirs = self.adapter.reduce_latent_values(values, state=state)
        ours = torch.cat([x.flatten(1) for x in values.values()], dim=1).mean(1)
        return torch.allclose(theirs.float(), ours, rtol=1e-5)

    def _replay_state(self, batch: Any, replay: Any, step: int, plain: bool) -> _Replayed:
        args, schedulers = self.training_args, self.adapter.scheduler_group
        samplers = {name: _sampler(schedulers[name]) for name in self.adapter.trajectory_component_order}
        request, field = _STATE_FIELDS[args.kl_mask_type]
        wanted = {request, "log_prob", "std_dev_t", "dt"}
        if self.enable_kl_loss:
            wanted.add(_STATE_FIELDS[args.kl_type][0])
        with self.autocast():
            output = self._replay_forward(batch, replay, self._canonical_return_fields(wanted))
        old = self.adapter.get_replay_callback(batch, step, request)
        new = self._require_output_state(output, field, "policy")
        latents = [
            _Latent(
                sampler, new.components[name], old.components[name].detach(),
                replay.state.components[name], replay.next_state.components[name], replay.times.timestep[name],
                output.std_dev_t[name], output.dt[name],
            )
            for name, sampler in samplers.items()
        ]  # fmt: skip
        log_probs = divergence = None
        if len(latents) > 1 or not plain:
            log_probs = (output.log_prob, self._require_replay_log_prob(replay, step))
            divergence = self._divergence(latents) if plain else self._trust_region_kl(output, replay, old).detach()

        def reference_drift() -> Tensor:
            guided = {} if args.kl_guidance_scale is None else {"guidance_scale": args.kl_guidance_scale}
            asked, penalty = _STATE_FIELDS[args.kl_type]
            with self.autocast():
                reference = self._reference_forward(batch, replay, (asked,), **guided)
            if not plain:
                return self._reference_kl_divergence(output, reference, replay)
            pairs = [getattr(x, penalty).components for x in (output, reference)]
            drifts = [self._drift(pairs[0][name], pairs[1][name]) for name in pairs[0]]
            return _by_elements(drifts, list(pairs[0].values())).mean()

        return _Replayed(latents, log_probs, divergence, reference_drift)

    def _divergence(self, latents: list[_Latent]) -> Tensor:
        """What the mask reads, of all latents together: each element counts once."""
        by_velocity = self.training_args.kl_mask_type == "v-based"
        drifts = [self._drift(x.new.detach(), x.old) for x in latents]
        parts = drifts if by_velocity else [drift / (2.0 * x.std**2) for drift, x in zip(drifts, latents)]
        return _by_elements(parts, [x.new for x in latents])

    # ---- either

    def _step_loss(self, batch: Any, replayed: _Replayed, loss_info: dict[str, list[Tensor]]) -> Tensor:
        args = self.training_args
        low, high = args.adv_clip_range
        advantages = batch["advantage"].clamp(low, high)
        advantages = advantages.to(stats_dtype(replayed.latents[0].old))
        if replayed.log_probs is not None:
            assert replayed.divergence is not None
            # the divergence is made: under a unit standard deviation it is half the drift
            out = log_prob_policy_loss(
                DPPO(args.kl_mask_threshold), *replayed.log_probs, advantages, 1.0, drift=2.0 * replayed.divergence,
                backend=self.loss_backend,
            )  # fmt: skip
        elif args.kl_mask_type == "v-based":
            out = self._velocity_loss(replayed.latents[0], advantages)
        else:
            out = self._mean_loss(replayed.latents[0], advantages)
        loss = out.loss
        if self.enable_kl_loss:
            drift = replayed.reference_drift()
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

    def _drift(self, new: Tensor, other: Tensor) -> Tensor:
        return squared_drift(new, other, backend=self.loss_backend)

    def _mean_loss(self, latent: _Latent, advantages: Tensor) -> LossOutput:
        return fused_policy_loss(
            latent.new,
            latent.old,
            latent.next_state.detach(),
            latent.std,
            advantages,
            objective=DPPO(self.training_args.kl_mask_threshold),
            log_prob="unnormalized" if latent.sampler == "cps" else "gaussian",
            backend=self.loss_backend,
        )

    def _velocity_loss(self, latent: _Latent, advantages: Tensor) -> LossOutput:
        rows = advantages.shape[0]
        std_dev_t, dt = (x.detach().reshape(-1).expand(rows) for x in (latent.std_dev_t, latent.dt))
        # Flow-Factory's timesteps are levels times 1000; its dt is already the difference of the two levels
        sigma = (latent.timestep.double() / 1000.0).reshape(-1).expand(rows)
        step = SDEStep.from_levels(latent.sampler, std_dev_t, sigma, sigma + dt)
        shape, wide = (-1,) + (1,) * (latent.old.ndim - 1), stats_dtype(latent.old)
        a, b, s = (on_host(x).to(wide).reshape(shape) for x in (step.sample_coef, step.velocity_coef, step.std))
        with torch.no_grad():
            noise = (latent.next_state - a * latent.state - b * latent.old) / s
        return fused_policy_velocity_loss(
            latent.new,
            latent.old,
            noise,
            step,
            advantages,
            objective=DPPO(self.training_args.kl_mask_threshold, trust_region="velocity_drift"),
            log_prob="unnormalized" if latent.sampler == "cps" else "gaussian",
            backend=self.loss_backend,
        )

    def _update(self, loss_info: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Clips, steps, logs what was gathered since the last update and starts anew; later trees have their own."""
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


def _sampler(scheduler: Any) -> str:
    dynamics = scheduler.dynamics_type
    if dynamics not in _SAMPLERS:
        raise ValueError(
            f"dynamics_type: got {dynamics!r}, expected one of {', '.join(map(repr, _SAMPLERS))}; a step without "
            "noise has no density to train on"
        )
    return _SAMPLERS[dynamics]


def _by_elements(parts: list[Tensor], latents: list[Tensor]) -> Tensor:
    """Rows of several latents as one mean over all their elements, from the means over each."""
    counts = [x[0].numel() for x in latents]
    return torch.stack([part * (count / sum(counts)) for part, count in zip(parts, counts)]).sum(0)


def register(name: str = "dppo") -> None:
    """Makes ``trainer_type: <name>`` this module's trainer; call it before the config is loaded.

    ``name`` has to be one that Flow-Factory has training arguments for with ``kl_mask_threshold``: ``"dppo"``.
    """
    _registry.register_trainer(name)(DPPOTrainer)


def launch() -> None:
    """``ff-train`` with the arguments of the command line, whose processes run ``flow_factory_train`` of this package.

    Raises:
        RuntimeError: the command that ``ff-train`` made runs no ``flow_factory.train`` that could be replaced.
    """
    cli = module_of("flow_factory.cli", _TRAINER, _SOURCE)
    theirs, ours = "flow_factory.train", f"{__package__}.flow_factory_train"
    processes = cli.subprocess

    def run(command: list[str], **options: Any) -> Any:
        if theirs not in command:
            raise RuntimeError(
                f"ff-train: got the command {' '.join(command)}, expected one that runs -m {theirs}; start {ours} with "
                "your launcher instead"
            )
        return processes.run([ours if part == theirs else part for part in command], **options)

    # its module alone sees another subprocess.run
    cli.subprocess = SimpleNamespace(**{**vars(processes), "run": run})
    cli.train_cli()


if __name__ == "__main__":
    launch()
