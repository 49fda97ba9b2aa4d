"""verl-omni, August 2026: the loss registry and base class, actor config, loss dispatch and SDE scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from . import module

LOSS_MODES = ("flow_grpo", "flow_dppo", "grpo_guard", "diffusion_nft", "dpo", "dance_grpo", "distill_kl")


@dataclass
class DiffusionLossConfig:
    loss_mode: str = "flow_grpo"
    clip_ratio: float = 0.0001
    adv_clip_max: float = 5.0
    kl_mask_threshold: float = 1e-5
    add_kl_coefficient: bool = True

    def __post_init__(self):
        if self.loss_mode not in LOSS_MODES:
            raise ValueError(f"Invalid diffusion loss_mode: {self.loss_mode}")


@dataclass
class AlgoConfig:
    sde_type: str = "sde"
    noise_level: float = 0.7


@dataclass
class ModelConfig:
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    external_lib: str | None = None


@dataclass
class ActorConfig:
    diffusion_loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    model_config: ModelConfig = field(default_factory=ModelConfig)
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001


def build() -> list[ModuleType]:
    """The packages; ``call(config, model_output, data)`` in the losses module stands for the worker's dispatch."""
    registry: dict[str, Any] = {}

    @dataclass
    class DiffusionLossResult:
        loss: torch.Tensor
        metrics: dict[str, Any]
        add_loss_metric: bool = False

    class DiffusionLossFn(ABC):
        required_model_output_keys: tuple[str, ...] = ()
        required_data_keys: tuple[str, ...] = ()

        def validate_inputs(self, *, loss_name, model_output, data):
            missing = [k for k in self.required_model_output_keys if k not in model_output]
            missing += [k for k in self.required_data_keys if k not in data]
            if missing:
                raise KeyError(f"{loss_name}: {missing}")

        @classmethod
        @abstractmethod
        def compute_loss(cls, **kwargs): ...

        @abstractmethod
        def __call__(self, *, config, model_output, data): ...

    def register_diffusion_loss(name):
        def decorator(cls):
            registry[name] = cls()
            return cls

        return decorator

    @register_diffusion_loss("flow_grpo")
    @register_diffusion_loss("dance_grpo")
    class FlowGRPOLoss(DiffusionLossFn):
        required_model_output_keys = ("log_probs",)
        required_data_keys = ("old_log_probs", "advantages")

        @classmethod
        def compute_loss(cls, **kwargs):
            raise AssertionError("the trainer's own loss ran")

        def __call__(self, *, config, model_output, data):
            loss, metrics = self.compute_loss(
                old_log_prob=data["old_log_probs"],
                log_prob=model_output["log_probs"],
                advantages=data["advantages"],
                config=config,
                rollout_is_weights=data.get("rollout_is_weights", None),
            )
            return DiffusionLossResult(loss=loss, metrics=metrics)

    class MeanLoss(FlowGRPOLoss):
        required_model_output_keys = ("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt")
        required_data_keys = ("old_log_probs", "advantages", "old_prev_sample_mean")

        def __call__(self, *, config, model_output, data):
            loss, metrics = self.compute_loss(
                old_log_prob=data["old_log_probs"],
                log_prob=model_output["log_probs"],
                advantages=data["advantages"],
                old_prev_sample_mean=data["old_prev_sample_mean"],
                prev_sample_mean=model_output["prev_sample_mean"],
                std_dev_t=model_output["std_dev_t"],
                sqrt_dt=model_output["sqrt_dt"],
                config=config,
                rollout_is_weights=data.get("rollout_is_weights", None),
            )
            return DiffusionLossResult(loss=loss, metrics=metrics)

    @register_diffusion_loss("flow_dppo")
    class FlowDPPOLoss(MeanLoss):
        pass

    @register_diffusion_loss("grpo_guard")
    class GRPOGuardLoss(MeanLoss):
        pass

    @register_diffusion_loss("kl")
    class KLLoss(DiffusionLossFn):
        required_model_output_keys = ("prev_sample_mean", "std_dev_t")
        required_data_keys = ("ref_prev_sample_mean",)

        @classmethod
        def compute_loss(cls, **kwargs):
            raise AssertionError("the trainer's own loss ran")

        def __call__(self, *, config, model_output, data):
            raise AssertionError("the trainer's own loss ran")

    def call(config, model_output, data, gradient_accumulation_steps=1):
        metrics = {}
        names = [config.diffusion_loss.loss_mode] + (["kl"] if config.use_kl_loss else [])
        total = 0.0
        for name in names:
            function = registry[name]
            function.validate_inputs(loss_name=name, model_output=model_output, data=data)
            result = function(config=config, model_output=model_output, data=data)
            assert isinstance(result, DiffusionLossResult)
            for key, value in result.metrics.items():
                assert type(value) is float, (key, type(value))
            metrics.update(result.metrics)
            total = total + result.loss * (config.kl_loss_coef if name == "kl" else 1.0)
        return total / gradient_accumulation_steps, metrics

    class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, **options):
            if self.step_index is None:
                self._init_step_index(timestep)
            options = {k: v for k, v in options.items() if k not in ("s_churn", "return_dict")}
            results = self.sample_previous_step(
                sample=sample.to(torch.float32), model_output=model_output, per_token_timesteps=None, **options
            )
            self._step_index += 1
            return results

        def sample_previous_step(self, *args, **kwargs):
            raise AssertionError("the trainer's own step ran")

    return [
        module(
            "verl_omni.trainer.diffusion.diffusion_algos",
            DiffusionLossResult=DiffusionLossResult,
            DiffusionLossFn=DiffusionLossFn,
            DIFFUSION_LOSS_REGISTRY=registry,
            register_diffusion_loss=register_diffusion_loss,
            FlowGRPOLoss=FlowGRPOLoss,
            FlowDPPOLoss=FlowDPPOLoss,
            GRPOGuardLoss=GRPOGuardLoss,
            KLLoss=KLLoss,
        ),
        module("verl_omni.workers.utils.losses", call=call),
        module(
            "verl_omni.pipelines.schedulers.flow_match_sde",
            FlowMatchSDEDiscreteScheduler=FlowMatchSDEDiscreteScheduler,
        ),
    ]
