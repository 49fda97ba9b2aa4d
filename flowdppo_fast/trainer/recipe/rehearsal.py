"""What a recipe's run will need of a device's memory, from the configs alone: its pipeline is called without weights.

Every component is a shape on the meta device. Its forward takes and gives ordinary tensors, random ones in place of its
results, so that the pipeline's own code runs, tokenizers included, and the recorder sees what a transformer is given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..config import SamplingConfig
from ..prompts import PromptSource
from ..record.arguments import PerRow, join
from ..record.recorder import TrajectoryRecorder
from ..record.trajectory import Trajectory, trajectory_bytes
from .memory import estimate_memory
from .preflight import PipelinePlan, class_of, on_meta
from .recipe import QuantizationConfig, Recipe

_GIB = 2**30
_CPU = torch.device("cpu")
# images of one prompt that are drawn; a group shares what its prompt brings
_GROUP = 4


def describe(recipe: Recipe, plan: PipelinePlan) -> str:
    """Components with parameters and bytes, and what a run needs on its device, as text."""
    sizes = component_bytes(recipe, plan)
    lines = [f"{plan.kind.__name__} from {recipe.pipeline.pretrained}"]
    for name, component in plan.components.items():
        if component.parameters:
            note = "   trained" if _trained_whole(recipe, name) else f"{sizes[name] / _GIB:8.3f} GiB"
            lines.append(f"  {name:<16} {component.class_name:<32} {component.parameters / 1e6:10.2f} M  {note}")
    parts, missing = run_bytes(recipe, plan)
    what = {
        "weights": "frozen weights of transformers",
        "trained": f"{recipe.config.model.train} weights, gradients, optimizer",
        "ema": "moving average",
        "reference": "copy of the weights at the start",
        "activations": "activations of a micro-batch",
        "trajectories": "trajectories",
        "idle": "other components",
    }
    lines.append("memory of one process with whole weights, computed from the configs:")
    lines += [f"  {parts[name] / _GIB:10.3f} GiB  {words}" for name, words in what.items() if parts[name]]
    lines.append(f"  {parts['update'] / _GIB:10.3f} GiB  in an update")
    lines.append(f"  {parts['rollout'] / _GIB:10.3f} GiB  when a rollout ends")
    if parts["host"]:
        lines.append(f"  {parts['host'] / _GIB:10.3f} GiB  on the host")
    lines += [f"without activations and trajectories: {missing}"] * (missing is not None)
    lines.append("reward models, activations of sampling and the decoding of images come on top")
    return "\n".join(lines)


def run_bytes(recipe: Recipe, plan: PipelinePlan) -> tuple[dict[str, int], str | None]:
    """:func:`~flowdppo_fast.trainer.recipe.memory.estimate_memory` of a recipe.

    Returns:
        Bytes by part, and why activations and trajectories are 0, or None where they are known: a pipeline may look at
        the numbers that its components give, which are not there.
    """
    config, sizes = recipe.config, component_bytes(recipe, plan)
    names = [name for name in plan.components if name.startswith("transformer")]
    largest = max(names, key=lambda name: plan.components[name].parameters)
    trained = {name: _trained(recipe, plan, name) for name in names}
    call, missing = None, None
    try:
        call = rehearse(recipe, plan, largest)
    except Exception as error:
        # whatever somebody else's pipeline raises on shapes without numbers
        missing = f"{plan.kind.__name__} could not be called without weights ({type(error).__name__}: {error})"
    parts = estimate_memory(
        config,
        built(recipe, plan, largest),
        (lambda rows: {}) if call is None else call.arguments,
        weights=sum(sizes[name] for name in names),
        entries=sum(trained.values()),
        trajectory=0.0 if call is None else call.trajectory,
        idle=sum(size for name, size in sizes.items() if name not in names),
        calls=1 if call is None else call.calls,
        copies=1 if call is None else call.copies,
        activations=0 if call is None else None,
    )
    return parts, missing


@dataclass(frozen=True)
class Rehearsal:
    """How a pipeline calls its largest transformer.

    Attributes:
        trajectory: bytes kept per sample.
        calls, copies: transformer calls per velocity, and of the batch in a call.
        arguments: from a number of rows to those of a call, on the meta device.
    """

    trajectory: float
    calls: int
    copies: int
    arguments: Callable[[int], dict[str, Any]]


def rehearse(
    recipe: Recipe, plan: PipelinePlan, transformer: str, seen: dict[str, list[Any]] | None = None
) -> Rehearsal:
    """Records a call of the pipeline without weights on a few samples of the first prompt.

    Args:
        seen: gets positional and keyword arguments of the calls of each component, and then images are decoded too
            (``vae.decode``).

    Raises:
        Exception: whatever the pipeline raises.
    """
    settings, pipeline = recipe.config.sampling, hollow_pipeline(recipe, plan, seen)
    pipeline.set_progress_bar_config(disable=True)
    prompts, _ = recipe.load_prompts()
    source = PromptSource(prompts[:1], pipeline, [*settings.pipeline_kwargs, "return_dict"])
    rows = min(settings.group_size, _GROUP)
    recorder = TrajectoryRecorder(
        pipeline, sampler=settings.sampler, eta=settings.eta, noise=settings.noise, checks=False
    )
    steps = _steps(settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), recorder.recording(steps) as trajectory:
        pipeline(
            **source.arguments(source.entries * rows, rows, _CPU),
            **settings.pipeline_kwargs,
            num_inference_steps=settings.num_steps,
            generator=[torch.Generator().manual_seed(row) for row in range(rows)],
            output_type="latent" if seen is None else settings.output_type,
            return_dict=False,
        )
    return _rehearsal(trajectory, pipeline.components[transformer])


def _steps(settings: SamplingConfig) -> tuple[int, ...]:
    """As many as are trained; with the first ones both transformers of a pair may be called."""
    return settings.candidate_steps[: settings.sde_steps_per_rollout]


def _rehearsal(trajectory: Trajectory, module: nn.Module) -> Rehearsal:
    own = [[call for call in step.calls if call.module is module] for step in trajectory.steps]
    calls = next((calls for calls in own if calls), trajectory.steps[0].calls)
    (first, *_) = calls
    copies = max((len(leaf.places) for leaf in first.leaves if isinstance(leaf, PerRow)), default=1)

    def arguments(rows: int) -> dict[str, Any]:
        args, kwargs = join([first], [0] * (rows // copies), _CPU)
        bound = inspect.signature(first.module.forward).bind(*args, **kwargs).arguments
        named = {**{name: value for name, value in bound.items() if name != "kwargs"}, **bound.get("kwargs", {})}
        named.pop("return_dict", None)
        return tree_map_only(Tensor, lambda x: x.to("meta"), named)

    return Rehearsal(trajectory_bytes([trajectory]), len(calls), copies, arguments)


def hollow_pipeline(recipe: Recipe, plan: PipelinePlan, seen: dict[str, list[Any]] | None = None) -> Any:
    """The pipeline with components without weights, which computes on the CPU; ``seen`` as in :func:`rehearse`."""
    components: dict[str, Any] = dict.fromkeys((*plan.absent, *recipe.pipeline.without))
    for name, component in plan.components.items():
        if component.parameters:
            components[name] = _hollow(built(recipe, plan, name), name, seen)
        else:
            kind = class_of(component.library, component.class_name)
            if kind is None:
                raise ValueError(f"{name} is a {component.class_name} of {component.library}")
            where = recipe.pipeline.location
            components[name] = kind.from_pretrained(where, subfolder=name, **recipe.pipeline.source_options)
    # its components are nowhere, and what it is given is here
    kind = type(plan.kind.__name__, (plan.kind,), {"_execution_device": _CPU, "device": _CPU})
    return kind(**components)


def _hollow(module: nn.Module, name: str, seen: dict[str, list[Any]] | None) -> nn.Module:
    """``module``, whose forward, and decoding, takes and gives tensors on the CPU."""
    for method in ("forward", *["decode"] * (seen is not None and hasattr(module, "decode"))):
        place = name if method == "forward" else f"{name}.{method}"
        setattr(module, method, _shapes_only(getattr(module, method), None if seen is None else (seen, place)))
    return module


def _shapes_only(own: Callable[..., Any], seen: tuple[dict[str, list[Any]], str] | None) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        key = (spec, *((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves))
        # the steps of a schedule have the same shapes, and a large model takes a second
        if key not in known:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
            if seen is not None:
                seen[0].setdefault(seen[1], []).append((args, kwargs))
            known[key] = own(*args, **kwargs)
        return tree_map_only(Tensor, _numbers, known[key])

    return call


def _numbers(like: Tensor) -> Tensor:
    """Random ones, other ones each time: a pipeline's guidance is found from the numbers."""
    if like.is_floating_point():
        return torch.randn(like.shape, dtype=like.dtype)
    return torch.zeros(like.shape, dtype=like.dtype)


def built(recipe: Recipe, plan: PipelinePlan, name: str) -> nn.Module:
    """A component on the meta device in the dtype in which it is loaded."""
    component, settings = plan.components[name], recipe.pipeline
    kind = class_of(component.library, component.class_name)
    whole = _trained_whole(recipe, name)
    # diffusers' own method warns of weights that it would keep in float32
    return nn.Module.to(on_meta(kind, settings, name), torch.float32 if whole else _dtype(recipe, name)).eval()


def component_bytes(recipe: Recipe, plan: PipelinePlan) -> dict[str, int]:
    """Bytes of the frozen weights of each component as it is loaded; 0 where full weights are trained."""
    sizes = {}
    for name, component in plan.components.items():
        width, quantization = _dtype(recipe, name).itemsize, recipe.pipeline.quantization
        linear_width = width if quantization is None else _quantized_width(quantization, name, width)
        frozen = component.linear * linear_width + (component.parameters - component.linear) * width
        sizes[name] = 0 if _trained_whole(recipe, name) else round(frozen)
    return sizes


def _dtype(recipe: Recipe, name: str) -> torch.dtype:
    settings = recipe.pipeline
    return getattr(torch, settings.vae_dtype if name == "vae" and settings.vae_dtype else settings.dtype)


def _trained_whole(recipe: Recipe, name: str) -> bool:
    return recipe.config.model.train == "full" and name.startswith("transformer")


def _trained(recipe: Recipe, plan: PipelinePlan, name: str) -> int:
    component = plan.components[name]
    return component.parameters if _trained_whole(recipe, name) else component.adapted


def _quantized_width(quantization: QuantizationConfig, name: str, width: int) -> float:
    """Bytes per entry of a linear layer's weight."""
    if name not in quantization.components:
        return width
    if quantization.backend == "bitsandbytes_4bit":
        # half a byte and a float32 scale per block of 64
        return 0.5 + 4 / 64
    return 0.5 if "Int4" in quantization.options.get("type", "") else 1.0
