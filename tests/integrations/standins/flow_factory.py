"""Flow-Factory: trainer registry, ``DPPOTrainer`` and what its ``optimize`` reaches, an adapter, in two layouts.

``july`` is the tree of June and July 2026: flat batches and ``adapter.forward``. ``states`` is the later one under
``trainers.rl``: a replayed step of one or several latents, with a reduction that may leave padding out.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import conventions
from . import module

SAMPLERS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance", "CPS": "cps"}


class Arguments(Mapping):
    """Base of Flow-Factory's argument classes: a dataclass that can be ``**``-expanded."""

    def __getitem__(self, key):
        return getattr(self, key)

    def __iter__(self):
        return iter(f.name for f in fields(self))

    def __len__(self):
        return len(fields(self))


@dataclass(eq=False)
class DPPOTrainingArguments(Arguments):
    per_device_batch_size: int = 4
    num_inner_epochs: int = 1
    guidance_scale: float = 1.0
    adv_clip_range: tuple[float, float] = (-1.2, 1.2)
    kl_type: str = "x-based"
    kl_beta: float = 0.0
    kl_guidance_scale: float | None = None
    kl_mask_type: str = "x-based"
    kl_mask_threshold: float = 1e-6
    max_grad_norm: float = 1e9


@dataclass
class SDESchedulerOutput:
    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None


@dataclass
class Scheduler:
    sigmas: Tensor
    timesteps: Tensor
    train_timesteps: Tensor
    dynamics_type: str
    noise_level: float = 0.7


class Adapter:
    """A model adapter: one matrix as velocity field, steps by the scheduler's dynamics, ``return_kwargs``."""

    def __init__(self, width: int, scheduler: Scheduler, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        self.base = torch.randn(width, width, generator=g).to(dtype)
        self.weight = nn.Parameter(torch.zeros(width, width, dtype=dtype))
        self.scheduler = scheduler
        self.enabled = True
        self.calls: list[dict[str, Any]] = []

    def train(self): ...

    def get_trainable_parameters(self):
        return [self.weight]

    @contextlib.contextmanager
    def use_ref_parameters(self):
        self.enabled = False
        yield
        self.enabled = True

    def velocity(self, latents, t, guidance_scale):
        matrix = self.base + self.weight if self.enabled else self.base
        level = conventions.lift(t / 1000.0, latents.double()).to(matrix.dtype)
        return guidance_scale * torch.tanh(latents.to(matrix.dtype) @ matrix) * (1.0 + level)

    def forward(
        self, t, t_next, latents, next_latents=None, guidance_scale=1.0, compute_log_prob=True, noise_level=None,
        return_kwargs=("log_prob",),
    ):  # fmt: skip
        self.calls.append({"compute_log_prob": compute_log_prob, "return_kwargs": list(return_kwargs)})
        v = self.velocity(latents, t, guidance_scale)
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        sigma, sigma_next = (x.to(dtype) / 1000.0 for x in (t, t_next.expand_as(t)))
        r = conventions.replay(
            SAMPLERS[self.scheduler.dynamics_type], latents.to(dtype), v.to(dtype), next_latents.to(dtype),
            sigma, sigma_next, noise_level, self.scheduler.sigmas.tolist(),
        )  # fmt: skip
        shape = (-1,) + (1,) * (latents.ndim - 1)
        everything = {
            "next_latents_mean": r.mean,
            "std_dev_t": r.std_dev_t,
            "dt": (sigma_next - sigma).reshape(shape),
            "noise_pred": v.to(dtype),
        }
        if compute_log_prob:
            everything["log_prob"] = r.log_prob
        return SDESchedulerOutput(**{k: everything[k] for k in return_kwargs})


class Accelerator:
    """Accelerate's part in ``optimize``: accumulation over ``steps`` backward passes."""

    def __init__(self, steps: int):
        self.device = torch.device("cpu")
        self.steps, self.count = steps, 0

    @property
    def sync_gradients(self):
        return self.count % self.steps == 0

    @contextlib.contextmanager
    def accumulate(self):
        self.count += 1
        yield

    def backward(self, loss):
        (loss / self.steps).backward()

    def clip_grad_norm_(self, parameters, max_norm):
        return nn.utils.clip_grad_norm_(parameters, max_norm)


@dataclass
class LatentState:
    components: dict[str, Tensor]

    @property
    def component_names(self):
        return tuple(self.components)


@dataclass
class StepOutput:
    next_state_mean: LatentState | None = None
    velocity: LatentState | None = None
    std_dev_t: dict[str, Tensor] | None = None
    dt: dict[str, Tensor] | None = None
    log_prob: Tensor | None = None


@dataclass
class StateAdapter:
    """A model of several latents, one :class:`Adapter` each; the last ``padding`` elements of a row do not count."""

    adapters: dict[str, Adapter]
    padding: int = 0

    def __post_init__(self):
        self.trajectory_component_order = tuple(self.adapters)
        self.scheduler_group = {name: one.scheduler for name, one in self.adapters.items()}
        self.scheduler = next(iter(self.scheduler_group.values()))

    def train(self): ...

    def get_trainable_parameters(self):
        return [one.weight for one in self.adapters.values()]

    def get_train_step_indices(self):
        return self.scheduler.train_timesteps

    @contextlib.contextmanager
    def use_ref_parameters(self):
        with contextlib.ExitStack() as stack:
            for one in self.adapters.values():
                stack.enter_context(one.use_ref_parameters())
            yield

    def get_replay_step(self, batch, step):
        return batch["steps"][step]

    def get_replay_callback(self, batch, step, field):
        return LatentState(batch["callbacks"][field][step])

    def reduce_latent_values(self, values, *, active_numel=None, state=None):
        rows = torch.cat([x.flatten(1) for x in values.values()], dim=1)
        return rows[:, : rows.shape[1] - self.padding].mean(1)

    def forward_state(self, replay, fields, guidance_scale):
        """All latents at once; the joint log-prob is the mean over all elements that count."""
        names = {"next_latents_mean": "next_state_mean"}
        found: dict[str, dict[str, Tensor]] = {field: {} for field in fields if field != "log_prob"}
        density = {}
        for name, one in self.adapters.items():
            out = one.forward(
                replay.times.timestep[name], replay.times.next_timestep[name], replay.state.components[name],
                replay.next_state.components[name], guidance_scale, noise_level=self.scheduler.noise_level,
                return_kwargs=["next_latents_mean", "std_dev_t", "dt", "noise_pred"],
            )  # fmt: skip
            out.velocity = out.noise_pred
            for field in found:
                found[field][name] = getattr(out, field)
            cps = one.scheduler.dynamics_type == "CPS"
            gap = (replay.next_state.components[name].detach() - out.next_latents_mean) ** 2
            std = out.std_dev_t * torch.sqrt(-out.dt)
            density[name] = -gap if cps else -gap / (2.0 * std**2) - torch.log(std).expand_as(gap)
        values = {
            names.get(field, field): LatentState(parts) if field in ("next_latents_mean", "velocity") else parts
            for field, parts in found.items()
        }
        return StepOutput(**values, log_prob=self.reduce_latent_values(density) if "log_prob" in fields else None)


def build(layout: str = "july") -> list[ModuleType]:
    """Flow-Factory's packages; the trainer records what it logs in ``logged``."""
    trainers = "flow_factory.trainers.rl.dppo" if layout == "states" else "flow_factory.trainers.dppo"
    registry: dict[str, str] = {"dppo": f"{trainers}.DPPOTrainer"}

    def register_trainer(name):
        def decorator(cls):
            registry[name] = f"{cls.__module__}.{cls.__name__}"
            return cls

        return decorator

    def get_trainer_class(identifier):
        path = registry.get(identifier.lower(), identifier)
        module_path, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module_path), name)

    class GRPOTrainer:
        show_progress_bar = False

        def __init__(self, adapter, training_args, accelerator):
            self.adapter, self.training_args, self.accelerator = adapter, training_args, accelerator
            self.optimizer = torch.optim.SGD(adapter.get_trainable_parameters(), lr=1.0)
            self.epoch, self.step = 0, 0
            self.logged: list[dict[str, Any]] = []
            self.autocast = contextlib.nullcontext

        @property
        def enable_kl_loss(self):
            return self.training_args.kl_beta > 0.0

        def accumulate_gradients(self):
            return self.accelerator.accumulate()

        def _order_samples_for_optimize(self, samples, inner_epoch):
            return samples

        def _iter_prefetched_batches(self, samples, size) -> Iterator[Mapping[str, Any]]:
            yield from samples

        def log_data(self, data, step):
            self.logged.append({**data, "step": step})

        def optimize(self, samples):
            raise AssertionError("the trainer's own optimize ran")

    class DPPOTrainer(GRPOTrainer):
        pass

    class StateDPPOTrainer(GRPOTrainer):
        def _replay_forward(self, batch, replay, fields):
            return self.adapter.forward_state(replay, fields, self.training_args.guidance_scale)

        def _reference_forward(self, batch, replay, fields, guidance_scale=None):
            scale = self.training_args.guidance_scale if guidance_scale is None else guidance_scale
            with torch.no_grad(), self.adapter.use_ref_parameters():
                return self.adapter.forward_state(replay, fields, scale)

        def _canonical_return_fields(self, fields):
            return tuple(sorted(fields))

        def _require_output_state(self, output, field, source):
            state = getattr(output, field)
            assert state.component_names == self.adapter.trajectory_component_order
            return state

        def _require_replay_log_prob(self, replay, step):
            return replay.log_prob

        def _errors(self, new, other):
            return {name: (new.components[name] - other.components[name]) ** 2 for name in new.components}

        def _reference_kl_divergence(self, output, reference, replay):
            field = {"x-based": "next_state_mean", "v-based": "velocity"}[self.training_args.kl_type]
            errors = self._errors(getattr(output, field), getattr(reference, field))
            return self.adapter.reduce_latent_values(errors, state=replay.state).mean()

        def _trust_region_kl(self, output, replay, old):
            if self.training_args.kl_mask_type == "v-based":
                return self.adapter.reduce_latent_values(self._errors(output.velocity, old), state=replay.state)
            errors = self._errors(output.next_state_mean, old)
            for name, scheduler in self.adapter.scheduler_group.items():
                std = output.std_dev_t[name]
                std = std if scheduler.dynamics_type == "CPS" else std * torch.sqrt(-output.dt[name])
                errors[name] = errors[name] / (2.0 * std**2)
            return self.adapter.reduce_latent_values(errors, state=replay.state)

        def _apply_optimizer_step(self, loss_info):
            grad_norm = self.accelerator.clip_grad_norm_(self.adapter.get_trainable_parameters(), 1e9)
            self.optimizer.step()
            self.optimizer.zero_grad()
            reduced = {**reduce_loss_info(self.accelerator, loss_info), "grad_norm": grad_norm}
            self.log_data({f"train/{name}": value for name, value in reduced.items()}, step=self.step)
            self.step += 1
            return type(loss_info)(list)

    if layout == "states":
        DPPOTrainer = StateDPPOTrainer

    def filter_kwargs(func, **kwargs):
        return {k: v for k, v in kwargs.items() if k in inspect.signature(func).parameters}

    def reduce_loss_info(accelerator, loss_info):
        flat = {}
        for name, values in loss_info.items():
            if values[0].ndim > 0:
                stacked = torch.cat(values)
                flat |= {f"{name}_mean": stacked.mean(), f"{name}_max": stacked.max(), f"{name}_min": stacked.min()}
            else:
                flat[name] = torch.stack(values).mean()
        return flat

    return [
        module(trainers, DPPOTrainer=DPPOTrainer),
        module(
            "flow_factory.trainers.registry",
            register_trainer=register_trainer,
            get_trainer_class=get_trainer_class,
            _TRAINER_REGISTRY=registry,
        ),
        module("flow_factory.utils.base", filter_kwargs=filter_kwargs),
        module("flow_factory.utils.dist", reduce_loss_info=reduce_loss_info),
    ]


def namespace(**values) -> SimpleNamespace:
    return SimpleNamespace(**values)
