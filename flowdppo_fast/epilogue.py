"""The epilogue: from the row statistics (P, Q) to the loss, with its hand-written gradients.

A *row* is one sample at one denoising step. With ``u = k*(new-old)`` and the drawn noise ``e``, the kernels deliver per
row ``P = mean(e*u)``, ``Q = mean(u*u)`` and, where asked, ``E = mean(e*e)`` and ``R = mean((k*(new-ref))**2)``.
Everything below is O(rows): log-ratio, divergence, which rows are kept, the loss, and ``dl/dP, dl/dQ, dl/dR`` for the
backward kernel. This file is the oracle; ``csrc/objective.h`` and ``kernels/triton/epilogue.py`` are its twins. What
an objective does with a row is in ``rules.py``, for torch and Triton alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .objectives import SUMMARY, EpilogueOptions, TrustRegion
from .rules import RULES, RowRule, RowValues

LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


def epilogue(
    stats: Tensor,
    std: Tensor,
    scale: Tensor,
    neg_dt: Tensor,
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    numel: int,
    options: EpilogueOptions,
    log_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row results and summary of one objective, in plain torch.

    Args:
        stats: ``[4, R]`` rows of ``P, Q, E, R``.
        std, scale, neg_dt: ``[R]`` ``S``, ``k`` and ``-dt``.
        advantages, old_log_prob: ``[R]``.
        row_weights: ``[R]``, or ``[4, R]``: what a row's loss, its threshold, its penalty and its KL to the reference
            are multiplied by.
        numel: N, latent elements per row.
        log_ratio: ``[R]`` where the trainer has computed it: ``P``, ``E`` and ``old_log_prob`` are not looked at.

    Returns:
        ``[8, R]`` lines of :class:`RowField` and the :data:`SUMMARY` vector, both in ``stats``' dtype. The gradient
        lines are of each row's own loss; the mean's 1/R is applied by the backward. With a given ``log_ratio`` line
        ``GRAD_P`` is ``dl/dL`` and ``GRAD_Q`` is at fixed ``L``.
    """
    o = options
    p, q, e, r = stats.unbind(0)
    count = float(numel) if o.sum_reduce else 1.0
    one = torch.ones_like(p)
    weight, kl_weight = one if row_weights is None else row_weights, o.kl_weight
    threshold, strength = o.threshold, o.strength
    if weight.ndim == 2:
        weight, of_threshold, of_penalty, of_reference = weight
        threshold, strength, kl_weight = threshold * of_threshold, strength * of_penalty, kl_weight * of_reference
    adv = advantages.clamp(-o.advantage_clip, o.advantage_clip)

    # log-ratio L and its slopes against P and Q
    slope = count * 2.0 * std**2 if o.unnormalized_log_prob else torch.full_like(p, count)
    slope_p, slope_q = slope, -0.5 * slope
    if log_ratio is not None:
        slope_p, slope_q = torch.ones_like(p), torch.zeros_like(p)
    elif old_log_prob is None:
        log_ratio = slope * (p - 0.5 * q)
    else:
        normalizer = 0.0 if o.unnormalized_log_prob else count * (torch.log(std) + LOG_SQRT_2PI)
        log_ratio = -0.5 * slope * (e - 2.0 * p + q) - normalizer - count * old_log_prob
    half_kl = 0.5 * count
    if o.trust_region == TrustRegion.MEAN_DRIFT:
        kl, slope_kl = half_kl * std**2 * q, half_kl * std**2
    elif o.trust_region == TrustRegion.VELOCITY_DRIFT:
        kl, slope_kl = count * q / scale**2, count / scale**2
    else:
        kl, slope_kl = half_kl * q, torch.full_like(q, half_kl)

    # exponent X of the ratio, its slopes, and the divisor of the loss
    rule: RowRule = RULES[o.rule]
    exponent, gain = log_ratio, torch.ones_like(p)
    if rule.normalized:
        divergence = half_kl * q
        bias = divergence.mean().expand_as(q) if o.batch_bias else divergence
        exponent, slope_p = (log_ratio + bias) * std, slope_p * std
        slope_q = (slope_q + (0.0 if o.batch_bias else half_kl)) * std
        gain = 1.0 / neg_dt

    ratio = torch.exp(exponent)
    # decisions use r - 1 and the sign of the exponent: exp() rounds what differs from 1 by less than an ulp to 1
    excess = torch.expm1(exponent)
    far = kl >= threshold
    above, below = excess > o.clip_high, -excess > o.clip_low
    limit = torch.where(adv > 0, p.new_full(p.shape, 1.0 + o.clip_high), 1.0 - o.clip_low)
    row = RowValues(
        p,
        q,
        std,
        adv,
        exponent,
        ratio,
        kl,
        far,
        above,
        below,
        limit,
        threshold,
        adv.abs(),
        excess,
        o.clip_high,
        strength,
    )
    dropped, bound, surrogate, slope = rule.decide(row)
    policy = weight * gain * torch.where(dropped, bound, surrogate)
    # where() keeps an overflowed ratio out of dropped rows
    slope_x = weight * gain * torch.where(dropped, 0.0, slope)
    grad_p = torch.where(dropped, 0.0, slope_x * slope_p)
    grad_q = torch.where(dropped, 0.0, slope_x * slope_q)
    if rule.penalty is not None:
        penalty, slope_penalty = rule.penalty(row)
        policy = policy + weight * gain * penalty
        grad_q = grad_q + weight * gain * slope_penalty * slope_kl
    if rule.normalized and o.batch_bias:
        # the shared bias moves with every row's Q
        grad_q = grad_q + half_kl * (slope_x * std).sum() / max(p.numel(), 1)

    reference = count * 0.5 * r * (neg_dt if o.reference_without_dt else 1.0)
    loss, grad_r = policy, torch.zeros_like(p)
    if o.kl_weight > 0.0:
        loss = policy + weight * kl_weight * reference
        grad_r = weight * kl_weight * count * 0.5 * (neg_dt if o.reference_without_dt else one)

    rows = torch.stack((log_ratio, ratio, kl, (~dropped).to(p.dtype), loss, grad_p, grad_q, grad_r))
    nonfinite = ~(torch.isfinite(log_ratio) & torch.isfinite(ratio) & torch.isfinite(kl) & torch.isfinite(loss))
    if p.numel() == 0:
        # no rows: no loss, nothing to count, and no statistics to report
        summary = p.new_full((len(SUMMARY),), math.nan)
        for name in ("loss", "policy_loss", "nonfinite_rows"):
            summary[SUMMARY.index(name)] = 0.0
        return rows, summary

    def fraction(flags: Tensor) -> Tensor:
        return flags.to(p.dtype).mean()

    values = (
        loss.mean(),
        policy.mean(),
        1.0 + excess.mean(),
        excess.std() if p.numel() > 1 else torch.zeros_like(p[0]),
        ratio.min(),
        ratio.max(),
        0.5 * log_ratio.square().mean(),
        kl.mean(),
        kl.max(),
        fraction(far),
        fraction(dropped & (adv > 0)),
        fraction(dropped & (adv < 0)),
        fraction(dropped),
        fraction(~dropped),
        (std**2 * q).mean(),
        nonfinite.to(p.dtype).sum(),
        fraction(above | below),
        fraction(above),
        fraction(below),
        reference.mean(),
    )
    return rows, torch.stack(values)
