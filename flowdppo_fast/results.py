"""What a loss call returns: the loss, per-row results and metrics, all on the device until somebody asks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objectives import SUMMARY, RowField


class LossMetrics(dict):
    """Named 0-d device tensors. Reading them costs no sync; :meth:`to_floats` is one sync for all of them."""

    def to_floats(self) -> dict[str, float]:
        """All metrics as python floats (one device-to-host copy)."""
        return dict(zip(self, torch.stack(list(self.values())).tolist())) if self else {}


class RowResults(NamedTuple):
    """Per-row results, detached, shaped like ``advantages``; float32 (float64 for float64 latents).

    Attributes:
        log_ratio: ``L``, nats, mean-reduced unless ``latent_reduction="sum"``.
        ratio: of the objective: ``exp(L)``; for GRPO-Guard the normalised ratio.
        kl: the divergence compared with the threshold, reduced like ``log_ratio``; the KL unless ``trust_region`` says
            otherwise.
        kept: bool, False where the bound removes the policy gradient.
        loss: with row weight and reference KL.
    """

    log_ratio: Tensor
    ratio: Tensor
    kl: Tensor
    kept: Tensor
    loss: Tensor


class LossOutput(NamedTuple):
    """Result of a fused loss.

    Attributes:
        loss: scalar (``reduction="none"``: shaped like ``advantages``), differentiable in the first argument only.
        row_results: ``[8, R]`` raw lines (:class:`~flowdppo_fast.objectives.RowField`); use :attr:`rows`.
        summary: raw metrics vector (:data:`~flowdppo_fast.objectives.SUMMARY`); use :meth:`metrics`.
        row_shape: shape of ``advantages``.
        metric_names: the metrics that mean something for the objective.
        backend: which backend ran.
        grad: ``single_pass=True`` only: gradient of ``loss`` in the first argument, in its dtype and layout, for
            ``velocity.backward(out.grad)``. ``out.loss.backward()`` uses the same one.
    """

    loss: Tensor
    row_results: Tensor
    summary: Tensor
    row_shape: tuple[int, ...]
    metric_names: tuple[str, ...]
    backend: str
    grad: Tensor | None = None

    @property
    def rows(self) -> RowResults:
        """Per-row results; see :class:`RowResults`."""
        lines = self.row_results[: RowField.GRAD_P].reshape(int(RowField.GRAD_P), *self.row_shape)
        return RowResults(
            lines[RowField.LOG_RATIO],
            lines[RowField.RATIO],
            lines[RowField.KL],
            lines[RowField.KEPT] != 0,
            lines[RowField.LOSS],
        )

    def metrics(self) -> LossMetrics:
        """Metrics under the peers' names, 0-d device tensors; no sync."""
        return LossMetrics((name, self.summary[SUMMARY.index(name)]) for name in self.metric_names)
