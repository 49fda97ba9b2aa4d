"""What transformers compute in: the half precision they were loaded in, or autocast around them and nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


def own_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most of a module's floating-point weights, the trained ones left aside."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def computes_in(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> bool:
    """Whether ``modules`` compute in the half precision ``dtype`` without autocast once their adapters do."""
    return dtype is not None and all(own_dtype(module) == dtype for module in modules)


class HalfCopies:
    """Adapters in half precision for a transformer to compute with, of float32 weights for an optimizer to step.

    A backward gives its gradients to the float32 weights, each as it comes, so that those of many micro-batches add up
    in float32.

    Args:
        copies: parameters in float32 with gradients; they are in ``dtype`` and have none from now on.

    Attributes:
        masters: the float32 weights with the gradients.
    """

    def __init__(self, copies: Sequence[nn.Parameter], dtype: torch.dtype | None):
        self.copies = list(copies)
        self.masters = [nn.Parameter(copy.detach().clone()) for copy in copies]
        for copy, master in zip(self.copies, self.masters):
            master.grad, copy.grad = copy.grad, None
            copy.data = copy.data.to(dtype)
            copy.register_post_accumulate_grad_hook(functools.partial(_hand_over, master))

    @torch.no_grad()
    def refresh(self) -> None:
        """The copies are what the masters are now, rounded."""
        torch._foreach_copy_(list[Tensor](self.copies), list[Tensor](self.masters))


def _hand_over(master: nn.Parameter, copy: Tensor) -> None:
    assert master.grad is not None
    assert copy.grad is not None
    master.grad.add_(copy.grad)
    copy.grad = None


@contextlib.contextmanager
def autocast(
    device_type: str, dtype: torch.dtype | None, modules: Sequence[nn.Module], *, own: bool = False
) -> Iterator[None]:
    """Within this context ``modules`` compute in autocast to ``dtype``, None for none; what is around them does not.

    What comes out of a module is in the dtype of what went in, so that a pipeline's latents are in the dtype that they
    have without autocast. Half-precision copies of weights are kept between calls and end with the context: torch would
    keep them until the outermost autocast of all ends, the caller's, and by then the weights have moved.

    Args:
        own: the modules compute in ``dtype`` themselves, and autocast is for calls with latents or embeddings in
            another one, which they would refuse.
    """
    if dtype is None:
        yield
        return
    inside: list[torch.autocast] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        needed = not own or any(x.dtype != dtype for x in _states(args, kwargs))
        inside.append(torch.autocast(device_type, dtype, enabled=needed))
        inside[-1].__enter__()

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # a hook that refused the call before autocast began comes here as well
        if inside:
            inside.pop().__exit__(None, None, None)
        given = next((x.dtype for x in _states(args, kwargs)), torch.float32)
        return tree_map_only(Tensor, lambda x: x.to(given) if x.is_floating_point() else x, output)

    hooks = []
    torch.clear_autocast_cache()
    try:
        # off, but torch counts it: the copies outlive a call
        with torch.autocast(device_type, dtype, enabled=False):
            for module in modules:
                # before the recorder's, which look at what a module computes in and keep what the pipeline gets
                hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
                leaving = module.register_forward_hook(leave, with_kwargs=True, prepend=True, always_call=True)
                hooks.append(leaving)
            yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.clear_autocast_cache()


def _states(args: Any, kwargs: Any) -> list[Tensor]:
    """Latents and embeddings of a call, latents first."""
    named = [kwargs[name] for name in ("hidden_states", "encoder_hidden_states") if name in kwargs]
    return [x for x in tree_leaves((args[:1], named)) if isinstance(x, Tensor) and x.is_floating_point()]
