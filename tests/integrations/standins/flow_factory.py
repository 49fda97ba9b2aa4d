"""Flow-Factory, July 2026: trainer registry, ``DPPOTrainer`` and what its ``optimize`` reaches, an adapter."""

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


def build() -> list[ModuleType]:
    """Flow-Factory's packages; the trainer records what it logs in ``logged``."""
    registry: dict[str, str] = {"dppo": "flow_factory.trainers.dppo.DPPOTrainer"}

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
        module("flow_factory.trainers.dppo", DPPOTrainer=DPPOTrainer),
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
