"""Rollout against training: how far apart they are at unchanged weights, beside the bound that acts on it.

At the first update of a rollout both policies have the same weights, so the exact KL between them is what precision,
batch geometry, dropout or another engine's kernels make of them: the *mismatch KL*. A bound cannot tell it from a
change of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..objectives import DRPO, Objective, RatioClip, threshold_of
from ..results import LossOutput
from .weights.distributed import Workers

logger = get_logger(__name__)

# of the bound: a mismatch KL above this share of it is worth a warning
_NEAR = 0.1
_MEND = "Give both the same precision, batch geometry and kernels, leave out dropout, or raise the bound"
# order of :func:`mismatch_vector`
MISMATCH_METRICS = ("mismatch_kl_mean", "mismatch_kl_max", "mismatch_near_fraction", "mismatch_far_fraction")


def kl_bound(objective: Objective, elements: int) -> float | None:
    """Mean-reduced KL at which ``objective`` begins to act on rows of ``elements`` numbers; None where no KL says it.

    A threshold is that KL. A clip range ``c`` begins to act where it is one standard deviation of the mean-reduced
    log-ratio, ``sqrt(2*D/N) = c`` (Flow-DPPO, arXiv 2606.11025, Sec. 3.2). GRPO-Guard's depends on the step.
    """
    if isinstance(objective, DRPO):
        # a length of step
        return None
    if isinstance(objective, RatioClip):
        return min(objective.low, objective.high) ** 2 * elements / 2
    threshold = threshold_of(objective, elements)
    named = getattr(objective, "trust_region", "kl") == "kl" and math.isfinite(threshold)
    return float(threshold) if named else None


def mismatch_vector(out: LossOutput, objective: Objective, elements: int, *, on_policy: bool) -> Tensor:
    """:data:`MISMATCH_METRICS` of one micro-batch, on its device; NaN where they say nothing.

    Args:
        on_policy: no update was made since the rollout.
    """
    kl, bound = out.rows.kl, kl_bound(objective, elements)
    nothing = kl.new_full((), math.nan)
    if not on_policy:
        return nothing.expand(len(MISMATCH_METRICS))
    beyond = [nothing if bound is None else (kl >= x * bound).to(kl.dtype).mean() for x in (_NEAR, 1.0)]
    return torch.stack([kl.mean(), kl.max(), *beyond])


class MismatchGate:
    """Warns once of a mismatch KL that the bound would act on, or stops the run at it.

    Args:
        stop: a row beyond the bound ends the run before its weights are moved; costs a read of the device per rollout.
    """

    def __init__(self, objective: Objective, workers: Workers, stop: bool):
        self._objective, self._workers, self._stop = objective, workers, stop
        self._warned = False

    def check(self, vectors: Sequence[Tensor]) -> None:
        """Looks at a rollout's first update before its optimizer step.

        Args:
            vectors: of its micro-batches; each ends with a :func:`mismatch_vector`.

        Raises:
            RuntimeError: ``stop``, and a row is beyond the bound, on whichever process.
        """
        if not self._stop:
            return
        table = self._workers.gather(torch.stack(list(vectors)))[:, -len(MISMATCH_METRICS) :]
        _, largest, _, far = table.amax(0).tolist()
        if far > 0:
            raise RuntimeError(
                f"rollout and training differ at unchanged weights: rows have a KL of up to {largest:.2g} per element, "
                f"expected less than the bound of {self._objective}. {_MEND}. run.stop_on_mismatch=false goes on"
            )

    def warn(self, metrics: Mapping[str, float]) -> None:
        """Looks at the metrics of an iteration."""
        near = metrics.get("mismatch_near_fraction", math.nan)
        if self._warned or not near > 0:
            return
        self._warned = True
        logger.warning(
            "rollout and training differ at unchanged weights: %.1f %% of the rows have a KL of a tenth of the bound "
            "of %s or more, up to %.2g per element. %s",
            100 * near, self._objective, metrics["mismatch_kl_max"], _MEND,
        )  # fmt: skip
