"""UniRL: strategies, the algorithm contract, segments and a stage over a tiny model, in two versions.

``june`` is the tree of June 2026: ``recomputes_anchor`` is a method, ``denoise`` draws from the global generator,
replayed means are cast to the trajectory dtype. ``september`` has an attribute instead, a ``beta`` with a reference
model, strategies with a ``transition_std``, a ``generator`` argument and batched replay (all steps of a micro-batch
stacked step-major in one call), which it refuses beside a rollout anchor.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from .. import conventions
from . import module


@dataclass(slots=True)
class LatentSegment:
    """Fields of UniRL's segment and no others (slicing would lose them); ``latents_at`` maps a step to its slot."""

    latents: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    sde_logp: torch.Tensor | None = None
    sde_means: torch.Tensor | None = None
    sde_indices: torch.Tensor | None = None

    def latents_at(self, step: int) -> torch.Tensor:
        return self.latents[:, self.indices.tolist().index(int(step))]


@dataclass
class ReplayResult:
    log_probs: torch.Tensor
    prev_sample_means: torch.Tensor | None = None


@dataclass
class Params:
    eta: float = 0.7


class Model(nn.Module):
    """A velocity field: one matrix over the last latent dim, plus a LoRA-like second one that can be disabled."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.base = nn.Parameter(torch.randn(width, width, generator=g).to(dtype), requires_grad=False)
        self.lora_a = nn.Parameter(torch.zeros(width, width, dtype=dtype))
        self.enabled = True

    def forward(self, x, sigma):
        weight = self.base + self.lora_a if self.enabled else self.base
        level = sigma.reshape(-1, *(1,) * (x.ndim - 1)).to(weight.dtype)
        return torch.tanh(x.to(weight.dtype) @ weight) * (1.0 + level)


@dataclass
class Stage:
    """A diffusion stage: ``diffuse`` rolls out, ``replay`` scores recorded steps again."""

    model: Model
    strategy: Any
    sigmas: torch.Tensor
    sde_indices: list[int]
    trajectory_dtype: torch.dtype
    mean_dtype: torch.dtype
    batch_replay_steps: bool = False
    replays: list[list[int]] = field(default_factory=list)

    def diffuse(self, x: torch.Tensor, params: Params) -> LatentSegment:
        kept, log_probs = [x], []
        with torch.no_grad():
            for i in range(len(self.sigmas) - 1):
                stochastic = i in self.sde_indices
                x, log_prob, _ = self.strategy.denoise(
                    noise_pred=self.model(x, self.sigmas[i]), sample=x, sigma=self.sigmas[i],
                    sigma_next=self.sigmas[i + 1], eta=params.eta if stochastic else 0.0,
                    prev_sample=None, sigma_max=self.sigmas[1], step_index=i,
                )  # fmt: skip
                x = x.to(self.trajectory_dtype)
                kept.append(x)
                if log_prob is not None:
                    log_probs.append(log_prob)
        return LatentSegment(
            latents=torch.stack(kept, 1), sigmas=self.sigmas, indices=torch.arange(len(kept)),
            sde_logp=torch.stack(log_probs, 1), sde_indices=torch.tensor(self.sde_indices),
        )  # fmt: skip

    def replay(self, conditions, *, segment, params, step_indices):
        self.replays.append(step_indices)
        if self.batch_replay_steps:
            return self._replay_batched(segment, params, step_indices)
        log_probs, means = [], []
        for i in step_indices:
            _, log_prob, mean = self.strategy.denoise(
                noise_pred=self.model(segment.latents_at(i), self.sigmas[i]), sample=segment.latents_at(i),
                sigma=self.sigmas[i], sigma_next=self.sigmas[i + 1], eta=params.eta,
                prev_sample=segment.latents_at(i + 1), sigma_max=self.sigmas[1], step_index=i,
            )  # fmt: skip
            log_probs.append(log_prob)
            means.append(mean)
        return ReplayResult(torch.stack(log_probs, 1), torch.stack(means, 1).to(self.mean_dtype))

    def _replay_batched(self, segment, params, steps):
        rows = segment.latents.shape[0]
        states = torch.cat([segment.latents_at(i) for i in steps])
        sigma = torch.cat([self.sigmas[i].expand(rows) for i in steps])
        _, log_prob, mean = self.strategy.denoise(
            noise_pred=self.model(states, sigma), sample=states, sigma=sigma,
            sigma_next=torch.cat([self.sigmas[i + 1].expand(rows) for i in steps]), eta=params.eta,
            prev_sample=torch.cat([segment.latents_at(i + 1) for i in steps]), generator=None,
            sigma_max=self.sigmas[1], step_index=steps[0],
        )  # fmt: skip

        def by_sample(x):
            return x.reshape(len(steps), rows, *x.shape[1:]).transpose(0, 1).contiguous()

        return ReplayResult(by_sample(log_prob), by_sample(mean).to(self.mean_dtype))


def build(version: str) -> list[ModuleType]:
    """UniRL's packages in version ``"june"`` or ``"september"``."""
    later = version == "september"

    class StepStrategy(ABC):
        @abstractmethod
        def step(self, *args, **kwargs): ...

        def init_schedule(self, sigmas):
            self.schedule = sigmas

        def denoise(self, *args, **kwargs):
            raise AssertionError("the trainer's own denoise ran")

    class SDEStrategy(StepStrategy, ABC):
        def step(self, *args, **kwargs):
            raise AssertionError("the trainer's own step ran")

    class FlowSDEStrategy(SDEStrategy):
        canonical_name: ClassVar[str] = "flow"
        transition: ClassVar[Any] = staticmethod(conventions.flow_sde)

        def __init__(self, *, config=None):
            del config

        if later:

            def transition_std(self, *, sigma, sigma_next, eta, sigma_max):
                return type(self).transition(sigma, sigma, sigma, sigma_next, eta, sigma_max)[2]

    class CPSSDEStrategy(FlowSDEStrategy):
        canonical_name: ClassVar[str] = "cps"
        transition: ClassVar[Any] = staticmethod(conventions.cps)

    class DanceSDEStrategy(FlowSDEStrategy):
        canonical_name: ClassVar[str] = "dance"
        transition: ClassVar[Any] = staticmethod(conventions.dance)

    @dataclass(frozen=True)
    class AlgorithmStepResult:
        loss: float
        metrics: Mapping[str, Any]
        num_steps_or_tokens: int
        has_backward: bool

    class StageAlgorithm(ABC):
        supports_multi_update = False
        anchor_fields: tuple[str, ...] = ()

        @abstractmethod
        def compute_loss_and_backward(
            self, *, conditions, segment, advantages, training_progress, loss_scale
        ) -> AlgorithmStepResult: ...

    def typed_conditions(conditions, conditions_cls):
        return conditions if conditions_cls is None else conditions_cls.from_dict(dict(conditions))

    def gather_sde_field(tensor, sde_indices, target_steps, *, field_name="field"):
        if tensor is None:
            raise ValueError(f"gather_sde_field: {field_name} is None")
        return tensor[:, [sde_indices.tolist().index(i) for i in target_steps]]

    @contextlib.contextmanager
    def adapters_disabled(model):
        model.enabled = False
        yield
        model.enabled = True

    def reference_replay_means(stage, ref_model, *, conditions, segment, params, target_steps):
        with torch.no_grad(), adapters_disabled(ref_model):
            return stage.replay(
                conditions, segment=segment, params=params, step_indices=target_steps
            ).prev_sample_means.detach()

    class FlowDPPO(StageAlgorithm):
        supports_multi_update = True
        anchor_fields = ("sde_logp", "sde_means")

        def __init__(
            self, *, params, stage=None, pipeline=None, stage_attr="diffusion", kl_mask_threshold=1e-5,
            add_kl_coefficient=True, old_logp_source="rollout", conditions_cls=None, **later_options,
        ):  # fmt: skip
            self.stage = stage if stage is not None else getattr(pipeline, stage_attr)
            self.params = params
            self.kl_mask_threshold = float(kl_mask_threshold)
            self.add_kl_coefficient = bool(add_kl_coefficient)
            self.old_logp_source = old_logp_source
            self.conditions_cls = conditions_cls
            if later:
                self.beta = float(later_options.pop("beta", 0.0))
                self._ref_model = getattr(later_options.pop("backend", None), "model", None)
                if getattr(self.stage, "batch_replay_steps", False) and old_logp_source != "replay":
                    raise ValueError("batch_replay_steps=True requires old_logp_source='replay'")
            assert not later_options, later_options

        def prepare_segment(self, *, conditions, segment):
            steps = self._resolve_target_steps(segment)
            with torch.no_grad():
                result = self.stage.replay(conditions, segment=segment, params=self.params, step_indices=steps)
            if self.old_logp_source == "replay":
                segment.sde_logp = result.log_probs.detach().cpu()
            segment.sde_means = result.prev_sample_means.detach().cpu()

        def compute_loss_and_backward(self, **kwargs):
            raise AssertionError("the trainer's own loss ran")

        def _resolve_target_steps(self, segment):
            return [] if segment.sde_indices is None else [int(i) for i in segment.sde_indices.tolist()]

    if later:
        FlowDPPO.recomputes_anchor = True
        FlowDPPO.requires_backend = True
    else:
        FlowDPPO.recomputes_anchor = lambda self: True
    base = module(
        "unirl.algorithms.base",
        AlgorithmStepResult=AlgorithmStepResult,
        StageAlgorithm=StageAlgorithm,
        gather_sde_field=gather_sde_field,
        typed_conditions=typed_conditions,
    )
    if later:
        base._reference_replay_means = reference_replay_means
    return [
        module(
            "unirl.sde.kernels",
            StepStrategy=StepStrategy,
            SDEStrategy=SDEStrategy,
            FlowSDEStrategy=FlowSDEStrategy,
            CPSSDEStrategy=CPSSDEStrategy,
            DanceSDEStrategy=DanceSDEStrategy,
        ),
        base,
        module("unirl.algorithms.flowdppo", FlowDPPO=FlowDPPO),
    ]


def recomputes_anchor(algorithm) -> bool:
    """How the train stack of either version asks."""
    theirs = algorithm.recomputes_anchor
    return theirs() if callable(theirs) else theirs


def backend(model: Model) -> SimpleNamespace:
    """The injected training backend: only its ``model`` is read."""
    return SimpleNamespace(model=model)
