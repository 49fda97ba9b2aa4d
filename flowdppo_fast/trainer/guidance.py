"""What a pipeline does between its transformer and its scheduler, found from the numbers and not from class names.

A step's transformer outputs are cut into *branches* of ``B`` rows: one call with ``m*B`` rows gives m, and so do m
calls with ``B`` rows. A rule turns branches into the velocity that the scheduler saw. :func:`find_rule` solves for the
guidance scale in float64, rounds it to the shortest decimal that reproduces the recorded velocity bit for bit, and
refuses to return a rule that does not reproduce it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# norm rescaling after guidance, per vector along the last dim: |v| becomes |cond|, or at most |cond|
RESCALES = (None, "norm", "norm_capped")


@dataclass(frozen=True)
class GuidanceRule:
    """``v = sign * rescale(u + scale*(c - u))`` with ``c`` the branch ``cond`` and ``u`` the other one.

    Attributes:
        sign: 1 or -1.
        cond: index of the branch that is scaled up; None where there is one branch and ``v = sign * branch``.
        scale: guidance scale.
        rescale: an entry of :data:`RESCALES`.
        upcast: branches are converted to the velocity's dtype first.
    """

    sign: int = 1
    cond: int | None = None
    scale: float = 1.0
    rescale: str | None = None
    upcast: bool = False

    @property
    def branches(self) -> int:
        return 1 if self.cond is None else 2

    def __call__(self, branches: Sequence[Tensor], latent: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Velocity ``[B, *latent]`` in ``dtype`` from branches ``[B, ...]``, differentiable.

        Raises:
            ValueError: another number of branches than the rule is for, or outputs that cannot be cut to ``latent``.
        """
        if len(branches) != self.branches:
            raise ValueError(f"branches: got {len(branches)} transformer outputs, expected {self.branches}")
        cut = [_cut(branch, latent) for branch in branches]
        if self.upcast:
            cut = [branch.to(dtype) for branch in cut]
        if self.cond is None:
            velocity = cut[0]
        else:
            cond, uncond = cut[self.cond], cut[1 - self.cond]
            velocity = uncond + self.scale * (cond - uncond)
            if self.rescale is not None:
                cond_norm, norm = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (cond, velocity))
                capped = self.rescale == "norm_capped"
                velocity = velocity * ((cond_norm / (norm + 1e-8)).clamp(max=1.0) if capped else cond_norm / norm)
        return (-velocity if self.sign < 0 else velocity).to(dtype)


def find_rule(
    branches: Sequence[Tensor], velocity: Tensor, hint: GuidanceRule | None = None
) -> tuple[GuidanceRule, float]:
    """The rule that reproduces ``velocity`` ``[B, *latent]`` from the transformer's ``branches``.

    A rule that reproduces it bitwise is taken, ``hint`` before all others; else the closest one, if it is within
    ``8 * eps * (1 + 2*|scale|)`` of the largest value, which is what another order of roundings can do.

    Raises:
        ValueError: no rule fits; the message has the largest difference of the closest one.
    """
    best: tuple[float, GuidanceRule | None] = (float("inf"), None)
    known = [hint] if hint is not None and hint.branches == len(branches) else []
    for rule in itertools.chain(known, _candidates(branches, velocity)):
        guess = rule(branches, velocity.shape[1:], velocity.dtype)
        if torch.equal(guess, velocity):
            return rule, 0.0
        difference = float((guess - velocity).abs().max())
        if difference < best[0]:
            best = (difference, rule)
    difference, closest = best
    if closest is not None:
        eps = max(torch.finfo(x.dtype).eps for x in (*branches, velocity))
        largest = max(float(x.abs().max()) for x in branches)
        if difference <= 8 * eps * (1 + 2 * abs(closest.scale)) * largest:
            return closest, difference
    shapes = ", ".join(str(list(x.shape)) for x in branches)
    raise ValueError(
        f"no rule gives the velocity {list(velocity.shape)} from the transformer's outputs ({shapes}); the closest one "
        f"differs by up to {difference:.3g}; known are identity, sign flip, slicing, guidance from two outputs and its "
        "norm rescaling"
    )


def _candidates(branches: Sequence[Tensor], velocity: Tensor) -> Iterator[GuidanceRule]:
    latent = velocity.shape[1:]
    if not all(_fits(branch, latent) for branch in branches):
        return
    if len(branches) == 1:
        yield from (GuidanceRule(), GuidanceRule(sign=-1))
    if len(branches) != 2:
        return
    target = velocity.double()
    outputs = [_cut(branch, latent).double() for branch in branches]
    casts = (True, False) if any(branch.dtype != velocity.dtype for branch in branches) else (False,)
    found = [
        GuidanceRule(sign, cond, scale, rescale, upcast)
        for cond in (0, 1)
        for rescale in RESCALES
        for sign, exact in _solve_scale(outputs[1 - cond], outputs[cond], target, rescaled=rescale is not None)
        for scale in _decimals(exact)
        for upcast in casts
    ]
    # u + s*(c - u) = c + (1-s)*(u - c): where roundings do not tell, the reading with a positive scale
    yield from sorted(found, key=lambda rule: rule.scale < 0)


def _solve_scale(uncond: Tensor, cond: Tensor, target: Tensor, *, rescaled: bool) -> list[tuple[int, float]]:
    """``(sign, scale)`` for which ``sign * (uncond + scale*(cond - uncond))`` is closest to ``target``, up to a
    positive factor per last-dim vector if ``rescaled``; nothing where no scale comes near it."""
    direction = cond - uncond
    if not rescaled:
        pairs = [(sign, uncond, direction, sign * target - uncond) for sign in (1, -1)]
    else:
        # what is orthogonal to the target must vanish, whatever the factors are
        unit = target / torch.linalg.vector_norm(target, dim=-1, keepdim=True).clamp_min(1e-300)
        u, d = (x - unit * (x * unit).sum(-1, keepdim=True) for x in (uncond, direction))
        pairs = [(0, u, d, -u)]
    found = []
    for sign, u, d, rest in pairs:
        scale = float((rest * d).sum() / (d * d).sum())
        error = float(torch.linalg.vector_norm(rest - scale * d) / torch.linalg.vector_norm(u).clamp_min(1e-300))
        if error < 0.1:
            if sign == 0:
                sign = 1 if float(((uncond + scale * direction) * target).sum()) >= 0 else -1
            found.append((sign, scale))
    return found


def _decimals(value: float) -> Iterator[float]:
    """The numbers that somebody may have typed for ``value``, shortest first, then ``value`` itself."""
    for digits in range(1, 9):
        rounded = float(f"{value:.{digits}g}")
        if abs(rounded - value) <= 0.02 * max(abs(value), 1.0):
            yield rounded
    yield value


def _fits(branch: Tensor, latent: Sequence[int]) -> bool:
    shape = branch.shape[1:]
    if len(shape) == len(latent):
        return all(have >= want for have, want in zip(shape, latent))
    return branch[0].numel() == torch.Size(latent).numel()


def _cut(branch: Tensor, latent: Sequence[int]) -> Tensor:
    """The first entries along every dim (reference tokens and learned variances come after), or other unit dims."""
    if branch.shape[1:] == torch.Size(latent):
        return branch
    if branch.ndim == len(latent) + 1:
        return branch[(slice(None), *(slice(size) for size in latent))]
    return branch.reshape(len(branch), *latent)
