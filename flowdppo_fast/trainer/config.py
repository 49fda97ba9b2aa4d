"""Settings of the trainer: sectioned dataclasses, from YAML and ``section.key=value`` overrides, checked as a whole."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..objectives import DPPO, GRPOGuard, Objective, RatioClip, Unclipped

# arguments of the pipeline's call that the trainer sets itself
_RESERVED_ARGUMENTS = (
    "generator",
    "latents",
    "num_inference_steps",
    "output_type",
    "prompt",
    "prompt_embeds",
    "return_dict",
)


@dataclass
class ModelConfig:
    """> Parameters that control what is trained.

    Args:
        train: ``"lora"`` or ``"full"`` weights of the transformer(s).
        lora_rank, lora_alpha: of the LoRA adapters; None means 32 and twice the rank.
        lora_targets: names of the layers that get an adapter; None means the attention projections.
        gradient_checkpointing: recompute activations in the backward.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` autocast (the last with a loss scale); trained weights are
            kept in float32.
        compile: ``torch.compile`` the transformer(s), block by block where diffusers knows the blocks.
        ema_decay: keep a moving average of the trained weights with this decay per update, in (0, 1).
        offload_idle: text encoders, VAE and other components are on the host while the transformer(s) are trained.
    """

    train: Literal["lora", "full"] = "lora"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    ema_decay: float | None = None
    offload_idle: bool = False


@dataclass
class SamplingConfig:
    """> Parameters that control the rollout.

    Args:
        num_steps: denoising steps T.
        sampler: stochastic sampler, an entry of :data:`flowdppo_fast.SAMPLERS` with noise.
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
        output_type: what the pipeline returns and the reward gets.
        pipeline_kwargs: further arguments of the pipeline's call (guidance scale, height, width).
        background_rewards: score the images of one call of the pipeline while the next call runs; a reward must then
            be safe to call from another thread.
        offload_trajectories: keep recorded tensors on the host.
    """

    num_steps: int = 10
    sampler: Literal["flow_sde", "dance", "wan", "cps"] = "flow_sde"
    eta: float = 0.7
    sde_steps: tuple[int, ...] | None = None
    sde_fraction: float | None = None
    sde_steps_per_rollout: int | None = None
    step_choice: Literal["random", "window", "random_window"] = "random"
    window_every: int = 1
    per_group_steps: bool = False
    noise: Literal["seeded", "stored"] = "seeded"
    prompts_per_rollout: int = 8
    group_size: int = 8
    same_latents: bool = False
    measure_noise_share: bool = False
    batch_size: int | None = None
    output_type: str = "pt"
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    background_rewards: bool = True
    offload_trajectories: bool = False

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

    std: Literal["group", "global", "none"] = "group"
    eps: float = 1e-4
    clip: float | None = 5.0
    reward_weights: dict[str, float] = field(default_factory=dict)
    per_reward: bool = False
    history: int | None = None


@dataclass
class ObjectiveConfig:
    """> Parameters that control the bound on each update.

    Args:
        name: ``"dppo"``, ``"dppo_symmetric"``, ``"ratio_clip"``, ``"grpo_guard"`` or ``"unclipped"``.
        threshold: bound of the mean-reduced KL for the two DPPO objectives; None means 1e-5.
        clip_low, clip_high: clip range for the two clipping objectives; None means theirs (1e-4; GRPO-Guard 2e-6).
        kl_weight: weight of the KL to the model as it was at the start, >= 0.
        reference_kl: ``"gaussian"``, or ``"without_dt"`` for flow_grpo's convention.
        drift_budget: the run ends once the KL to the model at the start, in nats per denoising step, exceeds this.
    """

    name: Literal["dppo", "dppo_symmetric", "ratio_clip", "grpo_guard", "unclipped"] = "dppo"
    threshold: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    kl_weight: float = 0.0
    reference_kl: Literal["gaussian", "without_dt"] = "gaussian"
    drift_budget: float | None = None

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0 or self.drift_budget is not None

    def build(self) -> Objective:
        """The objective of this section.

        Raises:
            ValueError: a number out of range.
        """
        if self.name.startswith("dppo"):
            threshold = DPPO().threshold if self.threshold is None else self.threshold
            return DPPO(threshold, symmetric=self.name == "dppo_symmetric")
        if self.name == "unclipped":
            return Unclipped()
        kind = RatioClip if self.name == "ratio_clip" else GRPOGuard
        low, high = self.clip_low, self.clip_high
        return kind(kind.low if low is None else low, kind.high if high is None else high)


@dataclass
class OptimizerConfig:
    """> Parameters that control the updates.

    Args:
        learning_rate, betas, eps, weight_decay: of AdamW.
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

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float | None = 1.0
    updates_per_rollout: int = 2
    inner_epochs: int = 1
    micro_batch_size: int = 8
    steps_per_micro_batch: int | None = None
    target_kl: float | None = None
    skip_dropped_backward: bool = False
    max_skipped_updates: int = 3


@dataclass
class EvaluationConfig:
    """> Parameters that control the evaluation on held-out prompts, with the averaged weights if there are some.

    Args:
        every: iterations between evaluations, the first before training; None means never.
        num_steps: denoising steps, without noise; None means as many as in training.
        images_per_prompt: with seeds that are the same in every evaluation.
        pipeline_kwargs: arguments of the pipeline's call that differ from ``sampling.pipeline_kwargs``.
    """

    every: int | None = None
    num_steps: int | None = None
    images_per_prompt: int = 1
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
        trackers: where metrics go besides the output folder: ``"tensorboard"``, ``"wandb"`` or others of accelerate.
        project: name under which trackers file the run.
        plot_every: iterations between plots and pages of rollouts in the output folder; None means one plot at the
            end, 0 none. Evaluations leave their pages in any case.
        row_log: write log-ratio, KL and mask of every row of every update to ``rows.jsonl`` in the output folder.
    """

    iterations: int = 100
    seed: int = 0
    output_dir: str = "runs/flowdppo"
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    device: Literal["auto", "cpu"] = "auto"
    progress: bool = True
    trackers: tuple[str, ...] = ()
    project: str = "flowdppo"
    plot_every: int | None = 10
    row_log: bool = True


@dataclass
class FlowDPPOConfig:
    """All settings of :class:`FlowDPPOTrainer`, by section; see the sections' own documentation.

    Args:
        model: what is trained.
        sampling: the rollout.
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
        check_known("section", values, sections)
        return cls(**{name: build_section(sections[name], name, entries or {}) for name, entries in values.items()})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> FlowDPPOConfig:
        """A YAML file with ``section.key=value`` overrides on top; values are read as YAML."""
        values = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: got {type(values).__name__}, expected sections with settings")
        for override in overrides:
            name, equals, text = override.partition("=")
            section, dot, key = name.strip().partition(".")
            if not (equals and dot and section and key):
                raise ValueError(f"override: got {override!r}, expected section.key=value, as in sampling.eta=0.5")
            check_known("section", [section], typing.get_type_hints(cls))
            values[section] = {**(values.get(section) or {}), key: yaml.safe_load(text)}
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values; :meth:`from_dict` is the inverse."""
        return plain(dataclasses.asdict(self))

    def save(self, path: str | Path) -> None:
        """Writes the settings as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def validate(self) -> None:
        """Checks types, ranges and contradictions; called at construction and by the trainer.

        Raises:
            ValueError, TypeError: see the class.
        """
        for section in dataclasses.fields(self):
            value = getattr(self, section.name)
            for name, hint in typing.get_type_hints(type(value)).items():
                setattr(value, name, convert(getattr(value, name), hint, f"{section.name}.{name}"))
        self._check_ranges()
        self._check_sampling()
        self._check_objective()

    def _check_ranges(self) -> None:
        s, o, r, e = self.sampling, self.optimizer, self.run, self.evaluation
        for name, value in (
            ("model.lora_rank", self.model.lora_rank),
            ("sampling.sde_steps_per_rollout", s.sde_steps_per_rollout),
            ("sampling.prompts_per_rollout", s.prompts_per_rollout),
            ("sampling.group_size", s.group_size),
            ("sampling.batch_size", s.batch_size),
            ("sampling.window_every", s.window_every),
            ("advantage.history", self.advantage.history),
            ("optimizer.updates_per_rollout", o.updates_per_rollout),
            ("optimizer.inner_epochs", o.inner_epochs),
            ("optimizer.micro_batch_size", o.micro_batch_size),
            ("optimizer.steps_per_micro_batch", o.steps_per_micro_batch),
            ("evaluation.every", e.every),
            ("evaluation.num_steps", e.num_steps),
            ("evaluation.images_per_prompt", e.images_per_prompt),
            ("run.iterations", r.iterations),
            ("run.checkpoint_every", r.checkpoint_every),
            ("run.keep_checkpoints", r.keep_checkpoints),
        ):
            require(value is None or value >= 1, name, value, "an integer >= 1")
        require(r.plot_every is None or r.plot_every >= 0, "run.plot_every", r.plot_every, "an integer >= 0")
        positive: tuple[tuple[str, float | None], ...] = (
            ("model.lora_alpha", self.model.lora_alpha),
            ("sampling.eta", s.eta),
            ("advantage.eps", self.advantage.eps),
            ("advantage.clip", self.advantage.clip),
            ("optimizer.learning_rate", o.learning_rate),
            ("optimizer.eps", o.eps),
            ("optimizer.max_grad_norm", o.max_grad_norm),
            ("optimizer.target_kl", o.target_kl),
            ("objective.drift_budget", self.objective.drift_budget),
        )
        for name, number in positive:
            require(number is None or number > 0, name, number, "a number > 0")
        require(o.weight_decay >= 0, "optimizer.weight_decay", o.weight_decay, "a number >= 0")
        require(o.max_skipped_updates >= 0, "optimizer.max_skipped_updates", o.max_skipped_updates, "an integer >= 0")
        require(all(0 <= beta < 1 for beta in o.betas), "optimizer.betas", o.betas, "two numbers in [0, 1)")
        decay = self.model.ema_decay
        require(decay is None or 0 < decay < 1, "model.ema_decay", decay, "a number in (0, 1)")

    def _check_sampling(self) -> None:
        s, o = self.sampling, self.optimizer
        require(s.num_steps >= 2, "sampling.num_steps", s.num_steps, "at least 2: the last step is not trained")
        require(s.sampler != "cps" or s.eta <= 1, "sampling.eta", s.eta, "at most 1 for 'cps'")
        require(
            s.sde_fraction is None or 0 < s.sde_fraction <= 1, "sampling.sde_fraction", s.sde_fraction,
            "a number in (0, 1]",
        )  # fmt: skip
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

    def _check_objective(self) -> None:
        o = self.objective
        if not o.name.startswith("dppo"):
            require(o.threshold is None, "objective.threshold", o.threshold, f"none: {o.name!r} has no KL mask")
        if o.name not in ("ratio_clip", "grpo_guard"):
            for name in ("clip_low", "clip_high"):
                value = getattr(o, name)
                require(value is None, f"objective.{name}", value, f"none: {o.name!r} does not clip")
        require(o.kl_weight >= 0, "objective.kl_weight", o.kl_weight, "a number >= 0")
        if self.model.train == "full":
            for name in ("lora_rank", "lora_alpha", "lora_targets"):
                value = getattr(self.model, name)
                require(value is None, f"model.{name}", value, "none with model.train='full'")
        try:
            o.build()
        except ValueError as error:
            raise ValueError(f"objective.{error}") from None


def build_section(section: type, name: str, entries: Any) -> Any:
    if not isinstance(entries, Mapping):
        raise TypeError(f"{name}: got {type(entries).__name__}, expected settings of that section")
    check_known(name, entries, typing.get_type_hints(section))
    return section(**entries)


def check_known(where: str, keys: Iterable[str], known: Iterable[str]) -> None:
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(f"{where}: got unknown {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotated type: ints become floats, lists tuples, and ``1e-5`` (text for YAML) a number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return convert(value, next(a for a in arguments if a is not type(None)), name)
    if origin is Literal:
        # YAML reads a bare no as False
        value = "no" if value is False and "no" in arguments else value
        require(value in arguments, name, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is not Ellipsis:
            require(len(value) == len(arguments), name, value, f"{len(arguments)} values")
        return tuple(convert(entry, arguments[0], name) for entry in value)
    if origin is dict and isinstance(value, Mapping):
        return {key: convert(entry, arguments[1], f"{name}.{key}") for key, entry in value.items()}
    if hint is Any:
        return value
    if hint is float:
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise TypeError(f"{name}: got {value!r}, expected a number") from None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise TypeError(f"{name}: got {value!r}, expected {expected}")


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
