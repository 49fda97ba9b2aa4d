"""What a recipe will do and need, phase by phase, from its pipeline's configs alone: no weights, no device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from ..levers import PHASES, next_lever
from ..row_plan import adapted
from ..weights.adapters import add_lora
from .memory import LiveBytes, fused_attention
from .preflight import PipelinePlan
from .recipe import Recipe
from .rehearsal import built, component_bytes, rehearse, run_bytes

_GB = 10**9


@dataclass(frozen=True)
class RunPlan:
    """What ``flowdppo plan`` says; all of it is computed.

    Attributes:
        trained: what is trained, in words, and how many numbers.
        peaks: bytes on the device by phase (:data:`~flowdppo_fast.trainer.levers.PHASES`).
        calls: transformer calls per iteration on one process, in the rollout and in the updates.
        forwards: rows that go through a transformer per iteration: in the rollout, and in the updates counted in
            forwards (a backward is two, checkpointing one more).
        trajectory: bytes that are kept per image or video.
        missing: why activations and trajectories are not in it, None where they are.
    """

    trained: str
    peaks: dict[str, int]
    calls: tuple[int, int]
    forwards: tuple[int, int]
    trajectory: float
    missing: str | None
    parts: dict[str, int] = field(default_factory=dict)

    def too_large(self, card: float) -> list[str]:
        """Phases that need more than ``card`` bytes."""
        return [phase for phase, size in self.peaks.items() if size > card]


def plan_run(recipe: Recipe, plan: PipelinePlan) -> RunPlan:
    """Walks through an iteration of ``recipe`` on the meta device.

    Args:
        plan: of the same recipe, from :func:`~flowdppo_fast.trainer.recipe.preflight.inspect_pipeline`.
    """
    config = recipe.config
    s, o, m = config.sampling, config.optimizer, config.model
    parts, missing = run_bytes(recipe, plan)
    rows = s.prompts_per_rollout * s.group_size
    batch = min(s.batch_size or rows, rows)
    names = [name for name in plan.components if name.startswith("transformer")]
    largest = max(names, key=lambda name: plan.components[name].parameters)
    seen: dict[str, list[Any]] = {}
    call = rehearse(recipe, plan, largest, seen) if missing is None else None
    calls = 1 if call is None else call.calls
    copies = 1 if call is None else call.copies
    held = parts["rollout"]
    work = dict.fromkeys(PHASES, 0)
    if call is not None:
        module = built(recipe, plan, largest)
        work["denoising"] = live_bytes(module, call.arguments(batch * copies))
        prompts = max(batch // s.group_size, 1)
        encoders = [name for name in seen if name.startswith("text_encoder")]
        work["encoding"] = max(
            (prompts * live_bytes(built(recipe, plan, name), seen[name][-1]) for name in encoders), default=0
        )
        if "vae.decode" in seen:
            work["decoding"] = _decoding(recipe, plan, seen["vae.decode"][-1], batch)
    peaks = {phase: held + size for phase, size in work.items() if phase != "update"}
    peaks["update"] = parts["update"]
    steps, passes = s.sde_steps_per_rollout or len(s.candidate_steps), 3 + m.gradient_checkpointing
    width = min(o.steps_per_micro_batch or steps, steps)
    micro = -(-rows // o.updates_per_rollout // o.micro_batch_size) * o.updates_per_rollout * -(-steps // width)
    times = o.inner_epochs * calls
    reference = 1 + config.objective.needs_reference
    return RunPlan(
        trained=_trained(recipe, plan, names),
        peaks=peaks,
        calls=(-(-rows // batch) * s.num_steps * calls, micro * times * reference),
        forwards=(
            rows * s.num_steps * calls * copies,
            rows * steps * times * copies * (passes + reference - 1),
        ),
        trajectory=0.0 if call is None else call.trajectory,
        missing=missing,
        parts=parts,
    )


def live_bytes(module: nn.Module, arguments: Any, run: Callable[..., Any] | None = None) -> int:
    """Most bytes that a call without gradients holds at a time, its results included."""
    known = [*module.parameters(), *module.buffers(), *(x for x in tree_leaves(arguments) if isinstance(x, Tensor))]
    args, kwargs = ((), arguments) if isinstance(arguments, dict) else arguments
    live = LiveBytes(known)
    with torch.no_grad(), fused_attention(), live:
        (run or module)(*args, **kwargs)
    return live.peak


def _decoding(recipe: Recipe, plan: PipelinePlan, given: tuple[Any, Any], batch: int) -> int:
    vae: Any = built(recipe, plan, "vae")
    if recipe.pipeline.vae_tiling:
        vae.enable_tiling()
    if recipe.pipeline.vae_slicing:
        vae.enable_slicing()
    leaves, _ = tree_flatten(given)
    rows = next(len(x) for x in leaves if isinstance(x, Tensor))

    def whole(x: Tensor) -> Tensor:
        return x.new_empty((batch, *x.shape[1:])) if x.ndim and len(x) == rows else x

    return live_bytes(vae, tree_map_only(Tensor, whole, given), vae.decode)


def _trained(recipe: Recipe, plan: PipelinePlan, names: Iterable[str]) -> str:
    m = recipe.config.model
    modules = {name: built(recipe, plan, name).requires_grad_(m.train == "full") for name in names}
    if m.train == "lora":
        for module in modules.values():
            add_lora(module, m.rank, m.alpha, m.lora_targets, 0)
    weights = {f"{name}.{key}": p for name, x in modules.items() for key, p in x.named_parameters() if p.requires_grad}
    what = adapted(list(weights), modules) if m.train == "lora" else "all weights"
    return f"{what} of {', '.join(modules)}: {sum(p.numel() for p in weights.values()):,} numbers"


def describe_plan(recipe: Recipe, plan: PipelinePlan, found: RunPlan, cards: Iterable[float] = ()) -> str:
    """:class:`RunPlan` as text.

    Args:
        cards: memory of devices in GB, of each of which it is said whether the run fits.
    """
    sizes = component_bytes(recipe, plan)
    weights = ", ".join(f"{name} {size / _GB:.2f}" for name, size in sizes.items() if size)
    lines = [
        f"{plan.kind.__name__} from {recipe.pipeline.pretrained}; all numbers are computed from its configs",
        f"trained: {found.trained}",
        f"frozen weights, GB: {weights}",
        f"per iteration: {found.calls[0]:,} transformer calls in the rollout and {found.calls[1]:,} in updates, "
        f"{found.forwards[0]:,} and {found.forwards[1]:,} forwards of one row",
        f"kept per trajectory: {found.trajectory / 1e6:.2f} MB",
        "peak memory of one process with whole weights, GB:",
        *(f"  {size / _GB:8.2f}  {PHASES[phase]}" for phase, size in found.peaks.items()),
    ]
    if found.missing is not None:
        lines.append(f"without activations and trajectories: {found.missing}")
    lines.append("on top: networks of rewards, the allocator's rounding, workspaces, the CUDA context (half a GB)")
    for card in cards:
        large = found.too_large(card * _GB)
        lines.append(f"{card:g} GB: fits" if not large else f"{card:g} GB: too small")
        lines += [
            f"  {PHASES[phase]} needs {found.peaks[phase] / _GB:.2f} GB; next: "
            f"{next_lever(phase, recipe.config, recipe.pipeline)}"
            for phase in large
        ]
    return "\n".join(lines)
