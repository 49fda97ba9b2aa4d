"""Settings: files, overrides, round trips, and a table of what is refused."""

from __future__ import annotations

import typing

import pytest

from flowdppo_fast import DPPO, SAMPLERS, GRPOGuard, RatioClip, Unclipped
from flowdppo_fast.trainer import FlowDPPOConfig
from flowdppo_fast.trainer.config import ObjectiveConfig, SamplingConfig


def test_every_sampler_with_noise_can_be_configured():
    choices = typing.get_args(typing.get_type_hints(SamplingConfig)["sampler"])
    assert {*choices, "ode"} == set(SAMPLERS)


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("sampling:\n  eta: 0.5\n  sde_steps: [0, 2]\nmodel:\n  train: full\n  mixed_precision: no\n")
    config = FlowDPPOConfig.from_yaml(
        path,
        ["sampling.eta=1", "optimizer.learning_rate=1e-5", "objective.name=ratio_clip", "sampling.batch_size=null"],
    )
    assert (config.sampling.eta, config.sampling.sde_steps) == (1.0, (0, 2))
    assert config.model.mixed_precision == "no"
    # YAML 1.1 reads 1e-5 as text
    assert config.optimizer.learning_rate == 1e-5
    config.save(path)
    assert FlowDPPOConfig.from_yaml(path) == config


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (ObjectiveConfig(), DPPO(1e-5)),
        (ObjectiveConfig("dppo", threshold=2e-6), DPPO(2e-6)),
        (ObjectiveConfig("dppo_symmetric"), DPPO(1e-5, symmetric=True)),
        (ObjectiveConfig("ratio_clip", clip_high=2e-4), RatioClip(1e-4, 2e-4)),
        (ObjectiveConfig("grpo_guard"), GRPOGuard(2e-6, 2e-6)),
        (ObjectiveConfig("unclipped"), Unclipped()),
    ],
)
def test_objectives_by_name(section, expected):
    assert section.build() == expected


REFUSED = [
    ({"sampler": {}}, ValueError, "section: got unknown 'sampler'"),
    ({"sampling": {"steps": 3}}, ValueError, "sampling: got unknown 'steps'"),
    ({"sampling": [1]}, TypeError, "sampling: got list"),
    ({"sampling": {"num_steps": "ten"}}, TypeError, "sampling.num_steps: got 'ten', expected int"),
    ({"sampling": {"num_steps": True}}, TypeError, "sampling.num_steps: got True"),
    ({"optimizer": {"learning_rate": "fast"}}, TypeError, "optimizer.learning_rate: got 'fast', expected a number"),
    ({"optimizer": {"betas": [0.9]}}, ValueError, "optimizer.betas"),
    ({"optimizer": {"betas": [0.9, 1.0]}}, ValueError, "optimizer.betas"),
    ({"optimizer": {"learning_rate": 0}}, ValueError, "learning_rate: got 0.0, expected a number > 0"),
    ({"optimizer": {"updates_per_rollout": 3}}, ValueError, "a divisor of sampling.prompts_per_rollout=8"),
    ({"optimizer": {"micro_batch_size": 0}}, ValueError, "micro_batch_size: got 0"),
    ({"model": {"train": "qlora"}}, ValueError, "model.train: got 'qlora'"),
    ({"model": {"ema_decay": 1.0}}, ValueError, "ema_decay"),
    ({"model": {"train": "full", "lora_rank": 8}}, ValueError, "model.lora_rank: got 8, expected none"),
    ({"objective": {"drift_budget": 0}}, ValueError, "objective.drift_budget: got 0.0, expected a number > 0"),
    ({"sampling": {"sde_fraction": 1.5}}, ValueError, "sampling.sde_fraction: got 1.5"),
    ({"sampling": {"sde_fraction": 0.5, "sde_steps": [0]}}, ValueError, "sde_fraction: got 0.5, expected none where"),
    ({"sampling": {"step_choice": "window"}}, ValueError, "step_choice: got 'window', expected sampling.sde_steps_per"),
    ({"sampling": {"per_group_steps": True}}, ValueError, "per_group_steps: got True"),
    ({"evaluation": {"pipeline_kwargs": {"generator": 1}}}, ValueError, r"evaluation.pipeline_kwargs: got \['gen"),
    ({"optimizer": {"target_kl": -1.0}}, ValueError, "optimizer.target_kl: got -1.0"),
    ({"advantage": {"history": 0}}, ValueError, "advantage.history: got 0"),
    ({"sampling": {"sampler": "ode"}}, ValueError, "sampling.sampler: got 'ode'"),
    ({"sampling": {"eta": 0}}, ValueError, "sampling.eta: got 0.0"),
    ({"sampling": {"sampler": "cps", "eta": 1.2}}, ValueError, "at most 1 for 'cps'"),
    ({"sampling": {"sde_steps": [9]}}, ValueError, "step 9 is the last one of 10"),
    ({"sampling": {"sde_steps": [0, 0]}}, ValueError, "different step indices"),
    ({"sampling": {"sde_steps": []}}, ValueError, "sampling.sde_steps"),
    ({"sampling": {"sde_steps_per_rollout": 6}}, ValueError, "sde_steps_per_rollout: got 6, expected at most 5"),
    ({"sampling": {"num_steps": 1}}, ValueError, "num_steps: got 1"),
    ({"sampling": {"group_size": 1}}, ValueError, "all advantages are 0"),
    ({"sampling": {"batch_size": 12}}, ValueError, "a multiple or a divisor of sampling.group_size=8"),
    ({"sampling": {"pipeline_kwargs": {"latents": None}}}, ValueError, "pipeline_kwargs: got \\['latents'\\]"),
    ({"objective": {"name": "ppo"}}, ValueError, "objective.name: got 'ppo'"),
    ({"objective": {"name": "ratio_clip", "threshold": 1e-5}}, ValueError, "'ratio_clip' has no KL mask"),
    ({"objective": {"name": "dppo", "clip_low": 1e-4}}, ValueError, "'dppo' does not clip"),
    ({"objective": {"threshold": 0.0}}, ValueError, "objective.threshold: got 0.0"),
    ({"objective": {"name": "ratio_clip", "clip_low": 1.5}}, ValueError, "objective.low: got 1.5"),
    ({"objective": {"kl_weight": -1}}, ValueError, "kl_weight: got -1.0"),
    ({"run": {"iterations": 0}}, ValueError, "run.iterations: got 0"),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_settings(values, error, message):
    with pytest.raises(error, match=message):
        FlowDPPOConfig.from_dict(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eta=0.5", "expected section.key=value"),
        ("sampling.eta", "expected section.key=value"),
        ("sample.eta=1", "unknown 'sample'"),
        ("sampling.etta=1", "unknown 'etta'"),
    ],
)
def test_refused_overrides(tmp_path, override, message):
    path = tmp_path / "config.yaml"
    path.write_text("")
    with pytest.raises(ValueError, match=message):
        FlowDPPOConfig.from_yaml(path, [override])
