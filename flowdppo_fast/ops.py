"""Operator schemas, registered once. Backends fill them in: see ``backend.py`` for who serves which device.

In ``flowdppo`` the reference is the ``CompositeExplicitAutograd`` implementation (any device); the C++ library
overrides ``CPU`` when it is loaded, Triton overrides ``CUDA``. The CUDA library fills a namespace of its own,
``flowdppo_cuda``, with the same schemas, so that both GPU backends can be asked for by name in one process. A copy of
the package under another name has two namespaces of its own. Autograd sits outside (``autograd.py``).

Canonical tensors (made by ``layout.py``): latents ``[R0, R1, N]`` with last stride 1, any row strides, ``R = R0*R1``;
``step`` a contiguous ``[R, 3]`` table (``S, k, -dt`` for training rows, ``a, b, S`` for the sampler; ``[R, 1]``
holding ``S`` is enough for means and log-probs) in the accumulation dtype, or None with three ``step_values``;
``streams`` ``[R]`` int64 or None with ``first_stream``; row tensors ``[R]`` contiguous in the accumulation dtype
(float64 for float64 latents, else float32).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .objectives import SUMMARY, RowField
from .rows import stats_dtype

# A copy under another name, from a kernel hub, has operators of its own beside the installed package's.
NAMESPACE = "flowdppo" if __package__ == "flowdppo_fast" else "flowdppo_" + re.sub(r"\W", "_", str(__package__))
CUDA_NAMESPACE = f"{NAMESPACE}_cuda"

_SOURCE = (
    "Tensor new, Tensor old, Tensor? drawn, Tensor? reference, Tensor? streams, Tensor? step, "
    "float[] step_values, int seed, int first_stream, int form"
)
_EPILOGUE = "Tensor advantages, Tensor? row_weights, Tensor? old_log_prob, int[] ints, float[] floats"

SCHEMAS = {
    "row_stats": f"({_SOURCE}, bool second_moment) -> Tensor",
    "row_grad": f"({_SOURCE}, Tensor coefficients, Tensor upstream, float factor) -> Tensor",
    "policy_loss": f"({_SOURCE}, {_EPILOGUE}) -> (Tensor, Tensor, Tensor)",
    "policy_loss_and_grad": f"({_SOURCE}, {_EPILOGUE}, float factor) -> (Tensor, Tensor, Tensor, Tensor)",
    "log_prob_loss": (
        "(Tensor log_prob, Tensor old_log_prob, Tensor? drift, Tensor? reference_drift, Tensor? step, "
        "float[] step_values, Tensor advantages, Tensor? row_weights, int[] ints, float[] floats) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "sde_step": (
        "(Tensor sample, Tensor velocity, Tensor? noise, Tensor? prev_sample, Tensor? streams, Tensor? step, "
        "float[] step_values, int seed, int first_stream, ScalarType dtype, bool with_mean, bool with_log_prob, "
        "bool unnormalized) -> (Tensor, Tensor, Tensor)"
    ),
}


def _row_stats_fake(new: Tensor, *args) -> Tensor:
    return new.new_empty((4, new.shape[0] * new.shape[1]), dtype=stats_dtype(new))


def _row_grad_fake(new: Tensor, *args) -> Tensor:
    return new.new_empty(new.shape)


def _loss_results(like: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, row results and summary, in the accumulation dtype of ``like``."""
    dtype = stats_dtype(like)
    shapes = ((), (len(RowField), rows), (len(SUMMARY),))
    loss, row_results, summary = (like.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, row_results, summary


def _policy_loss_fake(new: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    return _loss_results(new, new.shape[0] * new.shape[1])


def _policy_loss_and_grad_fake(new: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_policy_loss_fake(new), _row_grad_fake(new)


def _log_prob_loss_fake(log_prob: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    return _loss_results(log_prob, log_prob.shape[0])


def _sde_step_fake(
    sample, velocity, noise, prev_sample, streams, step, step_values, seed, first_stream,
    dtype, with_mean, with_log_prob, unnormalized,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    compute = stats_dtype(sample)
    rows = sample.shape[0] * sample.shape[1]
    return (
        sample.new_empty(0 if prev_sample is not None else sample.shape, dtype=dtype),
        sample.new_empty(sample.shape if with_mean else 0, dtype=compute),
        sample.new_empty(rows if with_log_prob else 0, dtype=compute),
    )


_FAKES: dict[str, Callable] = {
    "row_stats": _row_stats_fake,
    "row_grad": _row_grad_fake,
    "policy_loss": _policy_loss_fake,
    "policy_loss_and_grad": _policy_loss_and_grad_fake,
    "log_prob_loss": _log_prob_loss_fake,
    "sde_step": _sde_step_fake,
}

library = torch.library.Library(NAMESPACE, "DEF")
cuda_library = torch.library.Library(CUDA_NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    for _library in (library, cuda_library):
        _library.define(_name + _schema)
        torch.library.register_fake(f"{_library.ns}::{_name}", _FAKES[_name], lib=_library)
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def registered(namespace: str = NAMESPACE) -> Any:
    """What is registered in :data:`NAMESPACE` or :data:`CUDA_NAMESPACE`, as ``torch.ops.<namespace>``."""
    return getattr(torch.ops, namespace)
