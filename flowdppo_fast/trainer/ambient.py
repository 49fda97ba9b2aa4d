"""What a caller has set for torch as a whole, kept away from a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Within this context (or a function that it decorates) torch is what a run expects.

    Gradients are on, inference mode and autocast off, and new tensors are float32 on the CPU, whatever the caller has
    set around it.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if device.type != "cpu":
            # a mode that every call of torch goes through, so only where it is needed
            stack.enter_context(torch.device("cpu"))
        if _autocast_depth():
            for kind in {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield


def _autocast_depth() -> int:
    """How many autocast contexts the caller is in, those that are switched off included."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
