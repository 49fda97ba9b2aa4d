"""What the losses share: the checks that depend on settings, made once for each, and the call of the operators."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import layout
from .autograd import LossCall, policy_loss
from .backend import is_traced, launches_itself, resolve_backend, triton_kernels
from .noise import PhiloxNoise
from .objectives import DPPO, EpilogueOptions, GRPOGuard, Objective, TrustRegion, as_objective
from .reference import row_numbers
from .results import LossOutput
from .rows import Form, RowPlan, RowSource, plan_of
from .rules import BUILT_IN, RowValues

_T = TypeVar("_T")
_UNSCALED = ("mean_mse", "velocity_mse")
# looked up once: an enumeration's members are found by a call of Python
_MATCHING = int(Form.MATCHING)


def _kept(function: Callable[..., _T]) -> Callable[..., _T]:
    """``function`` of hashable arguments, computed once for each; what raises is not kept."""
    # typed: 1 and True are equal, and only one of them is a number
    looked_up = functools.lru_cache(maxsize=256, typed=True)(function)

    @functools.wraps(function)
    def kept(*arguments: Any) -> _T:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return looked_up(*arguments)
        except TypeError:
            # also where an argument has no hash
            return function(*arguments)

    return kept


dppo = _kept(DPPO)


def check_seeded(noise: Any) -> None:
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(
            f"noise: got {type(noise).__name__}, expected the drawn noise as a tensor, or PhiloxNoise(seed, stream)"
        )


def streams_of(noise: Tensor | PhiloxNoise, plan: RowPlan) -> tuple[Tensor | None, int, int]:
    """Streams, seed and first stream of seeded noise, as the operators take them."""
    assert isinstance(noise, PhiloxNoise)
    return noise.kernel_source(plan.rows, plan.device)


def check_call(objective: object, named: dict[str, Tensor], advantages: Tensor) -> RowPlan:
    """Objective, and shapes, dtypes and gradients of all latents; the first one gets the gradient."""
    if not isinstance(objective, Objective):
        as_objective(objective)
    if not isinstance(advantages, torch.Tensor):
        raise TypeError(f"advantages: got {type(advantages).__name__}, expected a tensor shaped [B] or [B, S]")
    return plan_of(named, advantages.shape, next(iter(named)))


# what users say of single rows: row_weights, threshold_weights, kl_weight, reference_kl
RowWeights = tuple[Tensor | None, Tensor | None, float | Tensor, str]


def shared_kl(kl_weight: float | Tensor) -> float:
    """What all rows' KL to the reference is multiplied by, where rows have weights of their own 1."""
    return 1.0 if isinstance(kl_weight, torch.Tensor) else kl_weight


def _lines(
    weights: RowWeights, source: RowSource, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Weights as the operators take them: ``[R]``, or ``[4, R]`` where there is more than ``row_weights``."""
    row_weights, threshold_weights, kl_weight, reference_kl = weights
    given = {
        "row_weights": row_weights,
        "threshold_weights": threshold_weights,
        "kl_weight": kl_weight if isinstance(kl_weight, torch.Tensor) else None,
    }
    of_loss, of_threshold, of_reference = (
        None if x is None else layout.row_vector(x, name, rows, device, dtype) for name, x in given.items()
    )
    unscaled = reference_kl in _UNSCALED and source.reference is not None
    if of_threshold is of_reference is None and not unscaled:
        return of_loss
    of_penalty = None if of_threshold is None else 1.0 / of_threshold
    one = torch.ones((math.prod(rows),), dtype=dtype, device=device)
    if unscaled:
        # mean((mu-mu_ref)**2) is 2*S**2 times the KL
        std, scale, _ = row_numbers(source.step, source.step_values, source.form, len(one), one)
        factor = 2.0 * std**2 if reference_kl == "mean_mse" else 2.0 / scale**2
        of_reference = factor if of_reference is None else factor * of_reference
    lines = (of_loss, of_threshold, of_penalty, of_reference)
    return torch.stack([one if line is None else line for line in lines])


class Settings(NamedTuple):
    """What an objective and the options come to."""

    ints: list[int]
    floats: list[float]
    metrics: tuple[str, ...]
    # whether the gradient of one loss can be made together with it
    one_pass: bool


@_kept
def settings_of(
    objective: Objective | Callable[[RowValues], tuple],
    numel: int,
    velocities: bool,
    with_reference: bool,
    with_dt: bool,
    single_pass: bool | None,
    reduction: str,
    latent_reduction: str,
    log_prob: str,
    advantage_clip: float | None,
    kl_weight: float,
    reference_kl: str,
) -> Settings:
    objective = as_objective(objective)
    options = EpilogueOptions.make(
        objective,
        numel=numel,
        latent_reduction=latent_reduction,
        log_prob=log_prob,
        advantage_clip=advantage_clip,
        kl_weight=kl_weight,
        reference_kl=reference_kl,
    )
    if not velocities and options.trust_region == TrustRegion.VELOCITY_DRIFT:
        raise ValueError(
            "objective: trust_region='velocity_drift' needs velocities; use the velocity form, or 'mean_drift' here"
        )
    if not with_dt and (isinstance(objective, GRPOGuard) or (reference_kl == "without_dt" and with_reference)):
        raise ValueError("dt: got None, expected sigma_next - sigma; GRPO-Guard and reference_kl='without_dt' need it")
    if not velocities and reference_kl == "velocity_mse":
        raise ValueError("reference_kl: 'velocity_mse' needs velocities; use the velocity form, or 'mean_mse' here")
    if reduction not in ("mean", "kept", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'kept', 'sum' or 'none'")
    if options.batch_bias and reduction == "none":
        raise ValueError("reduction: bias='batch' couples all rows, so 'none' has no per-row gradient; use 'mean'")
    if options.kl_weight > 0.0 and not with_reference:
        raise ValueError("kl_weight: got a positive weight without a reference, expected the reference policy's output")
    if single_pass not in (None, True, False):
        raise ValueError(f"single_pass: got {single_pass!r}, expected None, True or False")
    if single_pass and reduction == "none":
        raise ValueError(
            "reduction: got 'none', expected 'mean' or 'sum' in the single-pass form (one loss, one gradient)"
        )
    metrics = objective.metrics + (("kl_ref_mean",) if with_reference else ())
    one_pass = reduction != "none" and (single_pass is True or (single_pass is None and not options.batch_bias))
    return Settings(options.ints, options.floats, metrics, one_pass)


def run(
    new: Tensor,
    source: RowSource,
    plan: RowPlan,
    settings: Settings,
    advantages: Tensor,
    weights: RowWeights,
    old_log_prob: Tensor | None,
    reduction: str,
    single_pass: bool | None,
    backend: str,
) -> LossOutput:
    """What both forms share: row tensors, backend, autograd, which sees ``new``; the source has it detached."""
    ints, floats, metrics, one_pass = settings
    own_rule, matching = ints[0] >= BUILT_IN, source.form == _MATCHING
    name = resolve_backend(backend, plan.device.type, plan.dtype, own_rule=own_rule, matching=matching)
    kind = (plan.rows, plan.device, plan.dtype)
    if one_pass and single_pass is None:
        one_pass = _is_quicker_in_one_pass(new, name)
    # most calls have none of them, and on a GPU's host every call of Python counts
    of_rows = weights[0] is not None or weights[1] is not None or weights[2].__class__ is not float
    of_rows = of_rows or weights[3] in _UNSCALED
    geometry = _geometry(source, plan, name)
    call = LossCall(
        plan.in_rows(source) if geometry is None else source,
        plan,
        name,
        geometry,
        layout.row_vector(advantages, "advantages", *kind),
        _lines(weights, source, *kind) if of_rows else None,
        None if old_log_prob is None else layout.row_vector(old_log_prob, "old_log_prob", *kind),
        ints,
        floats,
        reduction,
        one_pass,
        single_pass is True,
    )
    loss, rows, summary, grad = policy_loss(new, call)
    if reduction == "none":
        loss = loss.reshape(plan.rows)
    return LossOutput(loss, rows, summary, plan.rows, metrics, name, grad)


def _geometry(source: RowSource, plan: RowPlan, backend: str) -> Any:
    """What Triton's kernels know of latents that they take as the caller has them.

    None where operators are called, or a tensor has to be permuted or copied first.
    """
    if plan.whole is None or not launches_itself(backend, plan.device.type):
        return None
    if not plan.kept:
        plan.kept.append(triton_kernels().geometry_of(plan.in_rows(source)))
    return plan.kept[0]


def _is_quicker_in_one_pass(new: Tensor, backend: str) -> bool:
    """Whether to make the gradient together with the loss where nobody says.

    On a CPU rows are still in the cache. A GPU would launch one kernel more, to scale the gradient by what comes from
    above. So would a compiled graph, which cannot look at it. In float16 gradients of a mean over a million numbers are
    lost unless they are scaled before they are rounded.
    """
    return (
        backend == "cpu"
        and new.requires_grad
        and torch.is_grad_enabled()
        and new.dtype != torch.float16
        and not is_traced()
    )
