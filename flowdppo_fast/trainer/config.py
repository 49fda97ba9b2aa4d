"""Settings of the trainer: sectioned dataclasses, from YAML and ``section.key=value`` overrides, checked as a whole."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BeforeValidator, Field, Strict, StrictBool, StrictInt

from ..samplers import SAMPLERS
from .engine_settings import EnginesConfig, check_engines
from .objective import ObjectiveConfig
from .settings import (
    NUMBER,
    OF_MODULE,
    SECTION,
    BetweenZeroAndOne,
    Count,
    Decay,
    NotNegative,
    Number,
    Positive,
    build,
    check,
    check_known,
    plain,
    read_yaml,
    require,
)

# sections of a recipe beside those of the trainer
RECIPE_SECTIONS = ("pipeline", "prompts", "rewards")

# arguments of the pipeline's call that the trainer sets itself
_RESERVED_ARGUMENTS = (
    "generator", "latents", "num_inference_steps", "output_type", "prompt", "prompt_embeds", "return_dict",
)  # fmt: skip

_SAMPLERS = tuple(name for name in SAMPLERS if name != "ode")
# YAML reads a bare no as False
_Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass
class ModelConfig:
    """> Parameters that control what is trained.

    Args:
        train: ``"lora"`` or ``"full"`` weights of the transformer(s).
        lora_rank, lora_alpha: of the LoRA adapters; None means 32 and twice the rank.
        lora_targets: names of the layers that get an adapter or their ends, one pattern that whole names match, or
            ``all-linear``; None means the attention projections.
        gradient_checkpointing: recompute activations in the backward.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (with a loss scale). Under LoRA a transformer that was
            loaded in it computes in it, with half-precision copies of adapters; another one computes in autocast.
            Trained weights are kept in float32.
        compile: ``torch.compile`` the transformer(s), block by block where diffusers knows the blocks.
        ema_decay: keep a moving average of the trained weights with this decay per update, in (0, 1).
        offload_idle: text encoders, VAE and other components are on the host while the transformer(s) are trained.
    """

    __pydantic_config__ = SECTION

    train: Literal["lora", "full"] = "lora"
    lora_rank: Count | None = None
    lora_alpha: Positive | None = None
    lora_targets: tuple[str, ...] | str | None = None
    gradient_checkpointing: StrictBool = False
    mixed_precision: _Precision = "no"
    compile: StrictBool = False
    ema_decay: BetweenZeroAndOne | None = None
    offload_idle: StrictBool = False

    @property
    def rank(self) -> int:
        """Of the LoRA adapters."""
        return self.lora_rank or 32

    @property
    def alpha(self) -> float:
        """Of the LoRA adapters."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What transformers compute in, None without autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)


@dataclass
class SamplingConfig:
    """> Parameters that control the rollout.

    Args:
        num_steps: denoising steps T, of which the last is never trained.
        sampler: stochastic sampler: ``"flow_sde"``, ``"dance"``, ``"wan"``, ``"flash"``, ``"cps"``, ``"precise"``,
            ``"dance_precise"``, or one of your own as ``package.module:attribute``, a ``Sampler`` or the diffusion of a
            reverse-time SDE.
        eta: noise level of the sampler, > 0.
        sde_steps: indices of the steps that may draw noise and be trained, in 0..T-2; None means the first
            ``sde_fraction`` of all steps.
        sde_fraction: in (0, 1]; None means half.
        sde_steps_per_rollout: that many of them are chosen anew for each rollout; None means all of them.
        step_choice: how they are chosen: ``"random"``, ``"window"`` (neighbours, moving from noise to data) or
            ``"random_window"``; see :func:`flowdppo_fast.trainer.row_plan.choose_steps`.
        window_every: iterations between two moves of the window.
        per_group_steps: each prompt's group has a choice of its own, instead of one for the rollout.
        noise: ``"seeded"`` keeps a seed, ``"stored"`` the tensor.
        prompts_per_rollout: groups per rollout.
        group_size: images per prompt, the group that shares a baseline.
        same_latents: all images of a group begin with the same latents, as flow_grpo's ``same_latent``: what differs in
            a group is then the noise of the trained steps alone.
        measure_noise_share: before the first rollout, sample it twice more, with and without the same latents in a
            group, and log the share of the reward's variance within groups that the noise of the trained steps explains
            (``noise_share``).
        batch_size: images per call of the pipeline, a multiple or a divisor of ``group_size``; None means as many as
            possible.
        repeat_texts: give a call the text of each image, in place of ``num_images_per_prompt``, which some pipelines
            take and do not handle.
        output_type: what the pipeline returns and the reward gets.
        pipeline_kwargs: further arguments of the pipeline's call (guidance scale, height, width).
        background_rewards: score the images of one call of the pipeline while the next call runs; a reward must then
            be safe to call from another thread.
        offload_trajectories: keep recorded tensors on the host.
    """

    __pydantic_config__ = SECTION

    num_steps: Annotated[int, Field(ge=2), Strict()] = 10
    sampler: str = "flow_sde"
    eta: Positive = 0.7
    sde_steps: tuple[StrictInt, ...] | None = None
    sde_fraction: Annotated[float, Field(gt=0, le=1), NUMBER] | None = None
    sde_steps_per_rollout: Count | None = None
    step_choice: Literal["random", "window", "random_window"] = "random"
    window_every: Count = 1
    per_group_steps: StrictBool = False
    noise: Literal["seeded", "stored"] = "seeded"
    prompts_per_rollout: Count = 8
    group_size: Count = 8
    same_latents: StrictBool = False
    measure_noise_share: StrictBool = False
    batch_size: Count | None = None
    repeat_texts: StrictBool = False
    output_type: str = "pt"
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    background_rewards: StrictBool = True
    offload_trajectories: StrictBool = False

    @property
    def candidate_steps(self) -> tuple[int, ...]:
        if self.sde_steps is not None:
            return tuple(sorted(self.sde_steps))
        first = int(self.num_steps * (0.5 if self.sde_fraction is None else self.sde_fraction))
        # the last step of a schedule is never trained
        return tuple(range(min(max(first, 1), self.num_steps - 1)))


@dataclass
class AdvantageConfig:
    """> Parameters that control how rewards become advantages.

    Args:
        std: divide by the standard deviation of the prompt's group (``"group"``), of all groups (``"global"``) or
            not at all (``"none"``).
        eps: added to the standard deviation, > 0.
        clip: advantages are clamped to ``[-clip, clip]``; None leaves them.
        reward_weights: weight per reward name; rewards that are not named have weight 1.
        per_reward: normalise each reward on its own before they are weighted, instead of their weighted sum.
        history: that many past rewards of a prompt join its group's mean and standard deviation; None means none.
    """

    __pydantic_config__ = SECTION

    std: Literal["group", "global", "none"] = "group"
    eps: Positive = 1e-4
    clip: Positive | None = 5.0
    reward_weights: dict[str, Number] = field(default_factory=dict)
    per_reward: StrictBool = False
    history: Count | None = None


@dataclass
class OptimizerConfig:
    """> Parameters that control the updates.

    Args:
        learning_rate, betas, eps, weight_decay: of AdamW.
        warmup_updates: the learning rate rises to its value over that many updates.
        schedule: ``"constant"`` after that, or falling to 0 at the end of the run, ``"linear"`` or ``"cosine"``.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        updates_per_rollout: optimizer steps per pass over a rollout; its groups are split between them.
        inner_epochs: passes over a rollout.
        micro_batch_size: samples per backward.
        steps_per_micro_batch: denoising steps per backward; None means all that were recorded.
        target_kl: the rest of a rollout's updates is left out once the mean KL from its policy (mean-reduced) exceeds
            this; None means never.
        skip_dropped_backward: look whether all rows of a micro-batch were dropped and save its backward; on a GPU
            looking costs a synchronisation, on a CPU it is free and always done.
        max_skipped_updates: the run stops once more updates than this had a loss or gradient that is not finite.
    """

    __pydantic_config__ = SECTION

    learning_rate: Positive = 3e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 1e-4
    warmup_updates: Annotated[int, Field(ge=0), Strict()] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: Positive | None = 1.0
    updates_per_rollout: Count = 2
    inner_epochs: Count = 1
    micro_batch_size: Count = 8
    steps_per_micro_batch: Count | None = None
    target_kl: Positive | None = None
    skip_dropped_backward: StrictBool = False
    max_skipped_updates: Annotated[int, Field(ge=0), Strict()] = 3


@dataclass
class EvaluationConfig:
    """> Parameters that control the evaluation on held-out prompts, with the averaged weights if there are some.

    Args:
        every: iterations between evaluations, the first before training; None means never.
        num_steps: denoising steps, without noise; None means as many as in training.
        images_per_prompt: with seeds that are the same in every evaluation.
        pipeline_kwargs: arguments of the pipeline's call that differ from ``sampling.pipeline_kwargs``.
    """

    __pydantic_config__ = SECTION

    every: Count | None = None
    num_steps: Count | None = None
    images_per_prompt: Count = 1
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunConfig:
    """> Parameters that control the run.

    Args:
        iterations: rollouts to train on.
        seed: everything random follows from it.
        output_dir: folder for metrics, the copy of this config, checkpoints and the trained weights.
        checkpoint_every: iterations between checkpoints; the last iteration always leaves one.
        keep_checkpoints: older checkpoints are removed.
        device: ``"auto"`` or ``"cpu"``.
        progress: show a progress bar.
        trackers: where metrics go besides the output folder: ``"tensorboard"``, ``"wandb"``, ``"trackio"``,
            ``"swanlab"`` or others of accelerate.
        project: name under which trackers file the run.
        plot_every: iterations between plots and pages of rollouts in the output folder; None means one plot at the
            end, 0 none. Evaluations leave their pages in any case.
        strict_replay: the replay of a step in the batch it was recorded in must give the recorded velocities bitwise;
            False accepts, with a warning, what kernels that are not deterministic round otherwise.
        check_replay: once per run, before its first update, the trained weights are moved a little and put back: the
            replay has to follow them like a new recording does. A row's gradient under gradient checkpointing has to be
            that without. Of weights that are whole on each process; costs a part of a call and a copy of what is
            trained.
        stop_on_mismatch: the run ends before its weights are moved where rollout and training differ by more than the
            bound at unchanged weights; False warns from a tenth of the bound on.
        row_log: write log-ratio, KL and mask of every row of every update to ``rows.jsonl`` in the output folder.
    """

    __pydantic_config__ = SECTION

    iterations: Count = 100
    seed: StrictInt = 0
    output_dir: str = "runs/flowdppo"
    checkpoint_every: Count = 10
    keep_checkpoints: Count = 2
    device: Literal["auto", "cpu"] = "auto"
    progress: StrictBool = True
    trackers: tuple[str, ...] = ()
    project: str = "flowdppo"
    plot_every: Annotated[int, Field(ge=0), Strict()] | None = 10
    strict_replay: StrictBool = True
    check_replay: StrictBool = True
    stop_on_mismatch: StrictBool = False
    row_log: StrictBool = True


@dataclass
class FlowDPPOConfig:
    """All settings of :class:`FlowDPPOTrainer`, by section; see the sections' own documentation.

    Args:
        model: what is trained.
        sampling: the rollout.
        engines: servers that sample it.
        advantage: how rewards become advantages.
        objective: the bound on each update.
        optimizer: the updates.
        evaluation: held-out prompts.
        run: length, seed, output folder, logs.

    Raises:
        ValueError: an unknown key, a value out of range, or settings that contradict each other.
        TypeError: a value of the wrong type.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engines: EnginesConfig = field(default_factory=EnginesConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlowDPPOConfig:
        """Sections as nested mappings; unknown sections and keys are errors."""
        sections = typing.get_type_hints(cls)
        recipe = [name for name in RECIPE_SECTIONS if name in values]
        if recipe:
            raise ValueError(
                f"section: got {', '.join(recipe)} of a recipe, expected {', '.join(sections)}; Recipe.from_yaml and "
                "Recipe.from_dict of flowdppo_fast.trainer.recipe read it, and flowdppo train runs it"
            )
        check_known("section", values, sections)
        return cls(**{name: build(sections[name], name, entries or {}) for name, entries in values.items()})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> FlowDPPOConfig:
        """A YAML file with ``section.key=value`` overrides on top, at any depth; values are read as YAML."""
        return cls.from_dict(read_yaml(path, overrides))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values; :meth:`from_dict` is the inverse."""
        return plain(self)

    def save(self, path: str | Path) -> None:
        """Writes the settings as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def validate(self) -> None:
        """Checks types, ranges and contradictions; called at construction and by the trainer.

        Raises:
            ValueError, TypeError: see the class.
        """
        for section in dataclasses.fields(self):
            check(getattr(self, section.name), section.name)
        self._check_sampling()
        self.objective.check(self.optimizer.updates_per_rollout, self.optimizer.inner_epochs)
        self._check_model()
        check_engines(self)

    def _check_sampling(self) -> None:
        s, o = self.sampling, self.optimizer
        require(
            s.sampler in _SAMPLERS or OF_MODULE.fullmatch(s.sampler) is not None, "sampling.sampler", s.sampler,
            f"{', '.join(map(repr, _SAMPLERS))}, or package.module:attribute",
        )  # fmt: skip
        require(s.sampler != "cps" or s.eta < 2, "sampling.eta", s.eta, "less than 2 for 'cps'")
        require(
            s.sde_fraction is None or s.sde_steps is None, "sampling.sde_fraction", s.sde_fraction,
            "none where sampling.sde_steps names the steps",
        )  # fmt: skip
        if s.sde_steps_per_rollout is None:
            require(s.step_choice == "random", "sampling.step_choice", s.step_choice, "sampling.sde_steps_per_rollout")
        require(
            not s.per_group_steps or (s.sde_steps_per_rollout is not None and s.step_choice != "window"),
            "sampling.per_group_steps",
            s.per_group_steps,
            "sampling.sde_steps_per_rollout and a random choice with it: all groups would have the same steps",
        )
        steps = s.candidate_steps
        last = s.num_steps - 1
        require(
            len(steps) > 0 and len(set(steps)) == len(steps) and all(0 <= step < last for step in steps),
            "sampling.sde_steps",
            s.sde_steps,
            f"different step indices from 0 to {last - 1}; step {last} is the last one of {s.num_steps}, its noise is "
            "too small to train on (none at all for 'cps')",
        )
        count = s.sde_steps_per_rollout
        require(count is None or count <= len(steps), "sampling.sde_steps_per_rollout", count, f"at most {len(steps)}")
        batch = s.batch_size
        require(
            batch is None or batch % s.group_size == 0 or s.group_size % batch == 0,
            "sampling.batch_size",
            batch,
            f"a multiple or a divisor of sampling.group_size={s.group_size}",
        )
        for section, given in (("sampling", s), ("evaluation", self.evaluation)):
            reserved = sorted(set(given.pipeline_kwargs) & set(_RESERVED_ARGUMENTS))
            require(not reserved, f"{section}.pipeline_kwargs", reserved, "no argument that the trainer sets itself")
        require(
            s.prompts_per_rollout % o.updates_per_rollout == 0,
            "optimizer.updates_per_rollout",
            o.updates_per_rollout,
            f"a divisor of sampling.prompts_per_rollout={s.prompts_per_rollout}: updates split the groups",
        )
        if self.advantage.std == "group" or s.group_size == 1:
            require(s.group_size > 1, "sampling.group_size", s.group_size, "at least 2, or all advantages are 0")

    def _check_model(self) -> None:
        targets = self.model.lora_targets
        require(
            not isinstance(targets, str) or _compiles(targets), "model.lora_targets", targets, "a regular expression"
        )
        if self.model.train == "full":
            for name in ("lora_rank", "lora_alpha", "lora_targets"):
                value = getattr(self.model, name)
                require(value is None, f"model.{name}", value, "none with model.train='full'")
