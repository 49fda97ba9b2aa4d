"""Settings: files, overrides, round trips, and a table of what is refused."""

from __future__ import annotations

import pytest
import yaml

from flowdppo_fast import DPPO, DRPO, SAMPLERS, GRPOGuard, KLPenalty, LogHinge, RatioClip, Unclipped
from flowdppo_fast.trainer import FlowDPPOConfig
from flowdppo_fast.trainer.config import ModelConfig, ObjectiveConfig, SamplingConfig
from flowdppo_fast.trainer.recipe import Recipe


def test_every_sampler_with_noise_can_be_configured():
    for name in set(SAMPLERS) - {"ode"}:
        FlowDPPOConfig(sampling=SamplingConfig(sampler=name)).validate()
        # the docstring is the reference page
        assert f'``"{name}"``' in SamplingConfig.__doc__
    for wrong in ("ode", "flow_ode", "module:", ":attribute"):
        with pytest.raises(
            ValueError, match=r"sampling.sampler: got .*, expected 'flow_sde', .*package.module:attribute"
        ):
            FlowDPPOConfig(sampling=SamplingConfig(sampler=wrong)).validate()


def test_an_objective_of_ones_own_is_named_alone():
    for settings, message in (
        ({"callable": "module"}, r"objective.callable: got 'module', expected package.module:attribute"),
        ({"callable": "a:b", "name": "unclipped"}, r"objective.name: got 'unclipped', expected none beside"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowDPPOConfig(objective=ObjectiveConfig(**settings)).validate()
    with pytest.raises(ValueError, match=r"objective.callable: got 'nowhere:rule', which cannot be imported"):
        ObjectiveConfig(callable="nowhere:rule").build()
    assert ObjectiveConfig(callable="flowdppo_fast.rules:dppo", threshold=0.5).build().threshold == 0.5


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
        (ObjectiveConfig(clip_low=1e-4), DPPO(1e-5, low=1e-4)),
        (ObjectiveConfig(penalty=0.5, threshold_nats=3.0), DPPO(1e-5, threshold_nats=3.0, pull=0.5)),
        (ObjectiveConfig("kl_penalty", penalty=2.0), KLPenalty(2.0)),
        (ObjectiveConfig("drpo"), DRPO(0.2)),
        (ObjectiveConfig("drpo_ratio", threshold=0.1), DRPO(0.1, "ratio")),
        (ObjectiveConfig("log_hinge", clip_high=1e-3), LogHinge(1e-3)),
    ],
)
def test_objectives_by_name(section, expected):
    assert section.build() == expected


REFUSED = [
    ({"sampler": {}}, ValueError, "section: got unknown 'sampler', expected some of .*; did you mean 'sampling'"),
    (
        {"sampling": {"steps": 3}},
        ValueError,
        "sampling: got unknown 'steps', .* did you mean 'sde_steps'",
    ),
    ({"sampling": [1]}, TypeError, "sampling: got list"),
    ({"sampling": {"num_steps": "ten"}}, TypeError, "sampling.num_steps: got 'ten', expected an integer >= 2"),
    ({"sampling": {"num_steps": True}}, TypeError, "sampling.num_steps: got True"),
    ({"optimizer": {"learning_rate": "fast"}}, TypeError, "optimizer.learning_rate: got 'fast', expected a number"),
    ({"optimizer": {"learning_rate": True}}, TypeError, "optimizer.learning_rate: got True, expected a number > 0"),
    ({"optimizer": {"betas": [0.9]}}, ValueError, r"optimizer.betas: got \[0.9\], expected 2 numbers in \[0, 1\)"),
    ({"optimizer": {"betas": [0.9, 1.0]}}, ValueError, r"optimizer.betas\[1\]: got 1.0, expected a number in \[0, 1\)"),
    ({"optimizer": {"weight_decay": float("nan")}}, ValueError, "weight_decay: got nan, expected a number >= 0"),
    (
        {"advantage": {"reward_weights": {"a": "b"}}},
        TypeError,
        "reward_weights.a: got 'b', expected a number",
    ),
    ({"model": {"compile": 1}}, TypeError, "model.compile: got 1, expected true or false"),
    ({"model": {"lora_targets": "attn.(to_q"}}, ValueError, r"got 'attn.\(to_q', expected a regular expression"),
    ({"optimizer": {"learning_rate": 0}}, ValueError, "learning_rate: got 0, expected a number > 0"),
    ({"optimizer": {"updates_per_rollout": 3}}, ValueError, "a divisor of sampling.prompts_per_rollout=8"),
    ({"optimizer": {"micro_batch_size": "4"}}, TypeError, "micro_batch_size: got '4', expected an integer >= 1"),
    ({"optimizer": {"inner_epochs": True}}, TypeError, "optimizer.inner_epochs: got True, expected an integer >= 1"),
    ({"optimizer": {"micro_batch_size": 0}}, ValueError, "micro_batch_size: got 0"),
    ({"model": {"train": "qlora"}}, ValueError, "model.train: got 'qlora'"),
    ({"model": {"ema_decay": 1.0}}, ValueError, "ema_decay"),
    ({"model": {"train": "full", "lora_rank": 8}}, ValueError, "model.lora_rank: got 8, expected none"),
    ({"objective": {"drift_budget": 0}}, ValueError, "objective.drift_budget: got 0, expected a number > 0"),
    ({"sampling": {"sde_fraction": 1.5}}, ValueError, "sampling.sde_fraction: got 1.5"),
    ({"sampling": {"sde_fraction": 0.5, "sde_steps": [0]}}, ValueError, "sde_fraction: got 0.5, expected none where"),
    ({"sampling": {"step_choice": "window"}}, ValueError, "step_choice: got 'window', expected sampling.sde_steps_per"),
    ({"sampling": {"per_group_steps": True}}, ValueError, "per_group_steps: got True"),
    ({"evaluation": {"pipeline_kwargs": {"generator": 1}}}, ValueError, r"evaluation.pipeline_kwargs: got \['gen"),
    ({"optimizer": {"target_kl": -1.0}}, ValueError, "optimizer.target_kl: got -1.0"),
    ({"advantage": {"history": 0}}, ValueError, "advantage.history: got 0"),
    ({"sampling": {"sampler": "ode"}}, ValueError, "sampling.sampler: got 'ode'"),
    ({"sampling": {"eta": 0}}, ValueError, "sampling.eta: got 0, expected a number > 0"),
    ({"sampling": {"sampler": "cps", "eta": 2.2}}, ValueError, "less than 2 for 'cps'"),
    ({"sampling": {"sde_steps": [9]}}, ValueError, "step 9 is the last one of 10"),
    ({"sampling": {"sde_steps": [0, 0]}}, ValueError, "different step indices"),
    ({"sampling": {"sde_steps": []}}, ValueError, "sampling.sde_steps"),
    ({"sampling": {"sde_steps_per_rollout": 6}}, ValueError, "sde_steps_per_rollout: got 6, expected at most 5"),
    ({"sampling": {"num_steps": 1}}, ValueError, "num_steps: got 1, expected an integer >= 2"),
    ({"sampling": {"group_size": 1}}, ValueError, "all advantages are 0"),
    ({"sampling": {"batch_size": 12}}, ValueError, "a multiple or a divisor of sampling.group_size=8"),
    ({"sampling": {"pipeline_kwargs": {"latents": None}}}, ValueError, "pipeline_kwargs: got \\['latents'\\]"),
    ({"objective": {"name": "ppo"}}, ValueError, "objective.name: got 'ppo'"),
    ({"objective": {"name": "ratio_clip", "threshold": 1e-5}}, ValueError, "'ratio_clip' takes clip_low, clip_high"),
    ({"objective": {"name": "unclipped", "clip_low": 1e-4}}, ValueError, "'unclipped' takes no number"),
    ({"objective": {"name": "kl_penalty"}}, ValueError, "objective.penalty: got None, expected a number > 0"),
    ({"objective": {"clip_high": 1e-4}}, ValueError, "objective.clip_low: got None"),
    ({"objective": {"clip_low": 1e-4, "penalty": 1.0}}, ValueError, "objective.penalty: got 1.0, expected none beside"),
    ({"objective": {"threshold": 1e-5, "threshold_nats": 1.0}}, ValueError, "objective.threshold_nats: got 1.0"),
    ({"objective": {"kl_target": 1e-5}}, ValueError, "objective.kl_target: got 1e-05, expected none: 'dppo' takes"),
    ({"objective": {"reference_every": 2}}, ValueError, "objective.reference_every: got 2, expected none without"),
    ({"objective": {"threshold": 0.0}}, ValueError, "objective.threshold: got 0.0"),
    (
        {"objective": {"name": "ratio_clip", "clip_low": 1.5}},
        ValueError,
        r"objective.clip_low: got 1.5, expected a number in \(0, 1\)",
    ),
    ({"objective": {"kl_weight": -1}}, ValueError, "kl_weight: got -1, expected a number >= 0"),
    ({"run": {"iterations": 0}}, ValueError, "run.iterations: got 0"),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_settings(values, error, message):
    with pytest.raises(error, match=message):
        FlowDPPOConfig.from_dict(values)


def test_all_that_is_wrong_with_a_section_is_said_at_once():
    with pytest.raises(ValueError, match="nums_steps") as caught:
        FlowDPPOConfig.from_dict({"sampling": {"eta": 0, "nums_steps": 3, "sde_steps": [0, "a"]}})
    lines = str(caught.value).splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "sampling.eta: got 0", "sampling.sde_steps[1]: got 'a'", "sampling: got unknown 'nums_steps'"
    ]  # fmt: skip
    assert "did you mean 'num_steps'?" in lines[2]


def test_what_is_changed_by_hand_is_checked_too():
    config = FlowDPPOConfig()
    config.sampling.eta, config.sampling.sde_steps = 1, [0, 1]
    config.validate()
    assert (type(config.sampling.eta), config.sampling.sde_steps) == (float, (0, 1))
    config.sampling.eta = -1.0
    with pytest.raises(ValueError, match=r"sampling.eta: got -1.0, expected a number > 0"):
        config.validate()
    with pytest.raises(TypeError, match=r"model\.gradient_checkpointing: got 'yes', expected true or false"):
        FlowDPPOConfig(model=ModelConfig(gradient_checkpointing="yes"))


# one reader: what follows is the same for the trainer's sections and for a recipe

NEEDED = {FlowDPPOConfig: {}, Recipe: {"pipeline": {"pretrained": "owner/name"}, "prompts": {"train": ["a cat"]}}}
READERS = pytest.mark.parametrize("reader", [FlowDPPOConfig, Recipe])


def written(reader, folder, text: str) -> str:
    path = folder / "config.yaml"
    needed = yaml.safe_dump({**NEEDED[reader], **({"rewards": [{"name": "jpeg"}]} if NEEDED[reader] else {})})
    path.write_text((needed if NEEDED[reader] else "") + text)
    return str(path)


@READERS
def test_overrides_reach_any_depth(reader, tmp_path):
    path = written(reader, tmp_path, "sampling:\n  pipeline_kwargs: {height: 512}\n")
    read = reader.from_yaml(path, ["sampling.pipeline_kwargs.guidance_scale=4", "optimizer.learning_rate=1e-5"])
    config = getattr(read, "config", read)
    assert config.sampling.pipeline_kwargs == {"height": 512, "guidance_scale": 4}
    # YAML 1.1 reads 1e-5 as text
    assert config.optimizer.learning_rate == 1e-5


@READERS
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eta=0.5", "expected section.key=value"),
        ("sampling.eta", "expected section.key=value"),
        ("sampling..eta=1", "expected section.key=value"),
        ("sampling.eta=[1", "no valid YAML"),
        ("sampling.eta.low=1", "sampling.eta has no keys: 0.5"),
        ("sampling.pipeline_kwargs={a: 1, a: 2}", "no valid YAML"),
        ("sampling.etta=1", "unknown 'etta', expected some of .*; did you mean 'eta'"),
        ("sample.eta=1", "unknown 'sample', expected some of .*; did you mean 'sampling'"),
    ],
)
def test_refused_overrides(reader, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        reader.from_yaml(written(reader, tmp_path, "sampling: {eta: 0.5}\n"), [override])


@READERS
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling: {eta: 1, eta: 2}", "no valid YAML: .*'eta' is given twice"),
        ("run: {seed: 1}\nrun: {seed: 2}", "no valid YAML: .*'run' is given twice"),
        ("sampling: [1", "no valid YAML"),
        # the tag that the unsafe loader would run
        ("run: {output_dir: !!python/object/apply:os.getcwd []}", "no valid YAML: could not determine a constructor"),
    ],
)
def test_refused_files(reader, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        reader.from_yaml(written(reader, tmp_path, text))


@READERS
def test_files_that_hold_no_settings(reader, tmp_path):
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ValueError, match="got list, expected sections"):
        reader.from_yaml(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match=r"nothing\.yaml does not exist"):
        reader.from_yaml(tmp_path / "nothing.yaml")


def test_each_reader_knows_the_others_files(tmp_path):
    with pytest.raises(ValueError, match=r"got pipeline, prompts, rewards of a recipe.* Recipe.from_yaml"):
        FlowDPPOConfig.from_yaml(written(Recipe, tmp_path, ""))
    with pytest.raises(ValueError, match=r"got sampling, run, expected pipeline, .* FlowDPPOConfig.from_yaml"):
        Recipe.from_yaml(written(FlowDPPOConfig, tmp_path, "sampling: {eta: 1}\nrun: {seed: 1}"))
