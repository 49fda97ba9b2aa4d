"""What a run needs of a device's memory, computed from tensor sizes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import FlowDPPOConfig
from ..weights.adapters import add_lora
from ..weights.precision import computes_in

# entries of float32 per trained weight: the weight, its gradient and AdamW's two moments
_TRAINED_COPIES = 4


def estimate_memory(
    config: FlowDPPOConfig,
    module: nn.Module,
    arguments: Callable[[int], Mapping[str, Any]],
    *,
    weights: int,
    entries: int | None = None,
    trajectory: float = 0.0,
    idle: int = 0,
    calls: int = 1,
    copies: int = 1,
    activations: int | None = None,
) -> dict[str, int]:
    """Bytes that a run needs on one device, computed from tensor sizes; nothing is calculated and nothing loaded.

    The replay of one micro-batch, forward and backward, is walked through on the meta device and everything is counted
    that is alive at the same time. Attention counts as a fused kernel does: inputs, output and a number per query, no
    scores; autocast, where weights are float32, as if they were in its dtype. Not in it: the allocator's rounding,
    kernels' workspace, the CUDA context (about half a gigabyte), reward models, and what an image's decoding takes.

    Args:
        config: settings; of ``model`` and ``optimizer``, and the number of trained steps.
        module: the transformer on the meta device, in its own dtype, without adapters; it is changed. Of several
            transformers, the largest.
        arguments: from a number of rows to the arguments of a transformer call, tensors on the meta device.
        weights: bytes of all frozen weights that stay on the device while it is trained: those of the transformers, as
            they are loaded (quantised, sharded); 0 where full weights are trained.
        entries: trained weights of all transformers; None takes those of ``module``.
        trajectory: bytes kept per sample, :func:`~flowdppo_fast.trainer.record.trajectory.trajectory_bytes`.
        idle: bytes of the weights of text encoders, VAE and other components.
        calls: transformer calls per velocity, 2 for guidance that calls twice.
        copies: of the batch in a call, 2 for guidance that doubles it.
        activations: :func:`replay_bytes` of a micro-batch where it is known already; walking through a large model
            takes seconds.

    Returns:
        ``weights``; ``trained`` float32 weights, gradients and AdamW's moments, with the half-precision copies of
        adapters; ``ema``; ``reference``, the copy that
        full weights need; ``activations`` of a micro-batch at the peak of its backward; ``trajectories`` on the
        device, ``host`` on the host; ``idle`` on the device in an update; ``update``, the sum; ``rollout``, what is
        there when a rollout ends, without the activations of sampling.
    """
    m, s, o = config.model, config.sampling, config.optimizer
    module.requires_grad_(m.train == "full")
    half = m.autocast_dtype if m.train == "lora" and computes_in([module], m.autocast_dtype) else None
    if m.train == "lora":
        add_lora(module, m.rank, m.alpha, m.lora_targets, 0)
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        # adapters in float32 keep a float32 copy of what goes into them
        parameter.data = parameter.data.to(m.autocast_dtype or torch.float32)
    if m.autocast_dtype is not None:
        module.to(m.autocast_dtype)
    size = 4 * (sum(p.numel() for p in trained) if entries is None else entries)
    steps = s.sde_steps_per_rollout or len(s.candidate_steps)
    width = min(o.steps_per_micro_batch or steps, steps)
    if activations is None:
        rows = o.micro_batch_size * width * copies
        activations = replay_bytes(module, arguments(rows), checkpointing=m.gradient_checkpointing, calls=calls)
    kept = round(trajectory * s.prompts_per_rollout * s.group_size)
    # of adapters a reference that stays is the model without them
    copied = config.objective.needs_reference and (m.train == "full" or config.objective.reference_every is not None)
    sizes = {
        "weights": weights,
        "trained": _TRAINED_COPIES * size + (0 if half is None else size // 4 * half.itemsize),
        "ema": size if m.ema_decay is not None else 0,
        "reference": size if copied else 0,
        "activations": activations,
        "trajectories": 0 if s.offload_trajectories else kept,
        "idle": 0 if m.offload_idle else idle,
    }
    held = sum(sizes[name] for name in ("weights", "trained", "ema", "reference", "trajectories"))
    return {
        **sizes,
        "host": (kept if s.offload_trajectories else 0) + (idle if m.offload_idle else 0),
        "update": held + sizes["activations"] + sizes["idle"],
        "rollout": held + idle,
    }


def replay_bytes(
    module: nn.Module, arguments: Mapping[str, Any], *, checkpointing: bool = False, calls: int = 1
) -> int:
    """Most bytes that ``calls`` forwards and the backward through all of them hold at a time.

    Weights, arguments and the gradients of weights do not count; the latter are :func:`estimate_memory`'s.

    Args:
        module: a transformer on the meta device with what is trained of it requiring gradients.
        arguments: of its call, tensors on the meta device.
        checkpointing: its blocks are computed again in the backward.
    """
    if checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
        # checkpoints are for modules in training only where a model looks
        module.train()
    given = [*module.parameters(), *module.buffers(), *tree_leaves(dict(arguments))]
    live = LiveBytes(x for x in given if isinstance(x, Tensor))
    gradients = [p.register_post_accumulate_grad_hook(_forget) for p in module.parameters() if p.requires_grad]
    with torch.enable_grad(), fused_attention(), live:
        outputs = [tree_leaves(module(**arguments, return_dict=False)) for _ in range(calls)]
        first = [output[0] for output in outputs]
        torch.autograd.backward(first, [torch.empty_like(x) for x in first])
    for handle in gradients:
        handle.remove()
    return live.peak


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that exist at the same time within this context.

    Args:
        known: tensors that do not count.

    Attributes:
        live, peak: bytes at present, and the most so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, Any] = {x.untyped_storage()._cdata: x for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Within this context attention has shapes only, and no matrix of scores, like the kernels for GPUs."""
    own = torch.nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _AttentionShapes.apply(query, key, value)  # type: ignore[return-value]

    # a torch function mode would not reach what checkpointing computes again in the backward
    torch.nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


class _AttentionShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
