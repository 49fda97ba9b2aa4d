"""What a pipeline does between its transformer and its scheduler, found from the numbers and not from class names.

A step's transformer outputs are cut into *branches* of ``B`` rows, numbered in the order of the calls: one call with
``m*B`` rows gives m, and so do m calls with ``B`` rows. A rule turns branches into the velocity that the scheduler saw.
:func:`find_rule` solves for the guidance scales in float64, rounds them to the shortest decimals that reproduce the
recorded velocity bit for bit, and refuses to return a rule that does not reproduce it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (branch added, branch taken away, scale)
Term = tuple[int, int, float]

# more than these are refused: the ways to write guidance from n outputs grow like n**n
MAX_BRANCHES = 4
# how many of the candidates that fit the first row best are tried on all rows
_TRIALS = 16


@dataclass(frozen=True)
class GuidanceRule:
    """``v = sign * rescale(b[base] + scale*(b[plus] - b[minus]) + ...)``, cut to the latent.

    Attributes:
        sign: 1 or -1.
        base: index of the branch that the terms are added to; without terms it is the velocity.
        terms: ``(plus, minus, scale)`` in the order in which they are added.
        rescale: None or a name from :data:`RESCALES`: what is done to the sum, with ``like`` as the model.
        like: index of the branch whose size is given to the sum.
        amount: strength of the rescaling, see :data:`RESCALES`.
        upcast: branches are converted to the velocity's dtype first.
        branches: how many outputs there are; some may be unused.
    """

    sign: int = 1
    base: int = 0
    terms: tuple[Term, ...] = ()
    rescale: str | None = None
    like: int = 0
    amount: float = 1.0
    upcast: bool = False
    branches: int = 1

    def __call__(self, branches: Sequence[Tensor], latent: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Velocity ``[B, *latent]`` in ``dtype`` from branches ``[B, ...]``, differentiable.

        Raises:
            ValueError: another number of branches than the rule is for.
        """
        if len(branches) != self.branches:
            raise ValueError(f"branches: got {len(branches)} transformer outputs, expected {self.branches}")
        if self.upcast:
            branches = [branch.to(dtype) for branch in branches]
        velocity = branches[self.base]
        for plus, minus, scale in self.terms:
            velocity = velocity + scale * (branches[plus] - branches[minus])
        if self.rescale is not None:
            velocity = RESCALES[self.rescale](velocity, branches[self.like], self.amount)
        velocity = cut_to_latent(velocity, latent)
        return (-velocity if self.sign < 0 else velocity).to(dtype)

    @property
    def scale(self) -> float:
        """Scale of the first term; 1.0 without guidance."""
        return self.terms[0][2] if self.terms else 1.0

    @property
    def gain(self) -> float:
        """How much larger independent roundings of the branches are in the velocity: root of the sum of the squared
        weights."""
        weights = [float(index == self.base) for index in range(self.branches)]
        for plus, minus, scale in self.terms:
            weights[plus] += scale
            weights[minus] -= scale
        return sum(weight**2 for weight in weights) ** 0.5

    def __str__(self) -> str:
        terms = "".join(f" + {scale:g}*(b{plus} - b{minus})" for plus, minus, scale in self.terms)
        text = f"b{self.base}{terms}"
        if self.rescale is not None:
            amount = "" if self.amount == 1.0 else f", {self.amount:g}"
            text = f"{self.rescale}({text}, like b{self.like}{amount})"
        return text if self.sign > 0 else f"-({text})" if self.terms and self.rescale is None else f"-{text}"


def _vector_norm(mixed: Tensor, like: Tensor, amount: float) -> Tensor:
    norm, wanted = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (mixed, like))
    return mixed * (wanted / norm)


def _vector_norm_capped(mixed: Tensor, like: Tensor, amount: float) -> Tensor:
    norm, wanted = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (mixed, like))
    return mixed * (wanted / (norm + 1e-8)).clamp(max=1.0)


def _sample_norm_capped(mixed: Tensor, like: Tensor, amount: float) -> Tensor:
    # row by row as pipelines do it: a norm over several dims of a batch may round otherwise
    norm, wanted = (torch.stack([torch.linalg.vector_norm(row) for row in x]) for x in (mixed, like))
    wanted = wanted * amount
    factor = torch.where(norm > wanted, wanted / norm, torch.ones_like(norm))
    return mixed * factor.view(-1, *[1] * (mixed.ndim - 1))


def _sample_std(mixed: Tensor, like: Tensor, amount: float) -> Tensor:
    dims = list(range(1, mixed.ndim))
    rescaled = mixed * (like.std(dim=dims, keepdim=True) / mixed.std(dim=dims, keepdim=True))
    return amount * rescaled + (1 - amount) * mixed


# |v| is the norm of a vector along the last dim ("vector_...") or of a whole sample ("sample_...")
RESCALES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    # |v| becomes |like|
    "vector_norm": _vector_norm,
    # |v| becomes at most |like|
    "vector_norm_capped": _vector_norm_capped,
    # |v| becomes at most amount * |like|
    "sample_norm_capped": _sample_norm_capped,
    # a share `amount` of v gets the standard deviation of `like` (arXiv 2305.08891, 3.4)
    "sample_std": _sample_std,
}


def find_rule(
    branches: Sequence[Tensor], velocity: Tensor, known: Sequence[GuidanceRule] = ()
) -> tuple[GuidanceRule, float]:
    """The rule that reproduces ``velocity`` ``[B, *latent]`` from the transformer's ``branches``.

    A rule that reproduces it bitwise is taken, ``known`` ones before all others; else the closest one, if it is within
    ``8 * eps * (1 + 2*sum|scale|)`` of the largest value, which is what another order of roundings can do.

    Returns:
        The rule and the largest difference that it leaves, 0.0 where it is bitwise.

    Raises:
        ValueError: no rule fits; the message has the largest difference of the closest one. Or the velocity is not
            finite.
    """
    count, latent = len(branches), velocity.shape[1:]
    for first, second in itertools.combinations(range(count), 2):
        if torch.equal(branches[first], branches[second]):
            raise ValueError(
                f"the transformer's outputs {first} and {second} are equal, so the guidance scale between them cannot "
                "be told; give them different conditions or turn guidance off"
            )
    best: tuple[float, GuidanceRule | None] = (float("inf"), None)
    usable = (rule for rule in known if rule.branches == count)
    for family in itertools.chain([usable], _families(branches, velocity)):
        for rule in _closest_on_first_row(family, branches, velocity):
            guess = rule(branches, latent, velocity.dtype)
            if torch.equal(guess, velocity):
                return rule, 0.0
            difference = float((guess - velocity).abs().max())
            if difference < best[0]:
                best = (difference, rule)
    difference, closest = best
    if closest is not None:
        eps = max(torch.finfo(x.dtype).eps for x in (*branches, velocity))
        largest = max(float(x.abs().max()) for x in branches)
        scales = sum(abs(scale) for *_, scale in closest.terms)
        if difference <= 8 * eps * (1 + 2 * scales) * largest:
            return closest, difference
    if not velocity.isfinite().all():
        raise ValueError("the velocity has numbers that are not finite: the model has diverged")
    shapes = ", ".join(str(list(x.shape)) for x in branches)
    raise ValueError(
        f"no rule gives the velocity {list(velocity.shape)} from the transformer's outputs ({shapes}); the closest one "
        f"differs by up to {difference:.3g}; known are identity, sign flip, slicing, guidance from 2 to "
        f"{MAX_BRANCHES} outputs and its rescaling by norm or standard deviation"
    )


def _closest_on_first_row(
    rules: Iterator[GuidanceRule], branches: Sequence[Tensor], velocity: Tensor
) -> list[GuidanceRule]:
    """The rules of a family in the order of their difference on row 0; of equal ones the first stays first."""
    row = [branch[:1] for branch in branches]
    ranked = []
    for rule in rules:
        guess = rule(row, velocity.shape[1:], velocity.dtype)
        ranked.append((float((guess - velocity[:1]).abs().max()), rule))
    return [rule for _, rule in sorted(ranked, key=lambda pair: pair[0])[:_TRIALS]]


def _families(branches: Sequence[Tensor], velocity: Tensor) -> Iterator[Iterator[GuidanceRule]]:
    """Candidates, simple families first: one branch as it is, guidance, guidance with each rescaling."""
    count, latent = len(branches), velocity.shape[1:]
    if count > MAX_BRANCHES or any(branch.dtype.is_complex or not _fits(branch, latent) for branch in branches):
        return
    yield (GuidanceRule(sign, base, branches=count) for base in range(count) for sign in (1, -1))
    if count == 1:
        return
    casts = (True, False) if any(branch.dtype != velocity.dtype for branch in branches) else (False,)
    outputs, target = [branch.double() for branch in branches], velocity.double()
    yield (
        GuidanceRule(sign, base, terms, upcast=upcast, branches=count)
        for sign in (1, -1)
        for weights in _solve_weights(outputs, sign * target, None)
        for base, terms in _forms(weights)
        for upcast in casts
    )
    for name in RESCALES:
        yield (
            GuidanceRule(sign, base, terms, name, like, amount, upcast, count)
            for weights in _solve_weights(outputs, target, name.split("_")[0])
            for like in range(count)
            for sign, exact in _solve_amount(name, outputs, weights, like, target)
            for amount in _decimals(exact)
            for base, terms in _forms(weights)
            for upcast in casts
        )


def _solve_weights(outputs: list[Tensor], target: Tensor, factor_of: str | None) -> Iterator[list[float]]:
    """Weights of sum 1 for which the weighted sum of ``outputs`` is closest to ``target``; nothing where none is near.

    Args:
        factor_of: the sum may differ from the target by a factor per last-dim ``"vector"`` or per ``"sample"``.
    """
    outputs = [cut_to_latent(x, target.shape[1:]) for x in outputs]
    if factor_of is not None:
        # what is orthogonal to the target must vanish, whatever the factors are
        dims = [-1] if factor_of == "vector" else list(range(1, target.ndim))
        unit = target / torch.linalg.vector_norm(target, dim=dims, keepdim=True).clamp_min(1e-300)
        outputs = [x - unit * (x * unit).sum(dims, keepdim=True) for x in outputs]
        target = torch.zeros_like(target)
    directions = torch.stack([x - outputs[0] for x in outputs[1:]]).flatten(1)
    rest = (target - outputs[0]).flatten()
    # a matrix of a few numbers
    normal, right = (directions @ directions.T).cpu(), (directions @ rest).cpu()
    if not (normal.isfinite().all() and right.isfinite().all()):
        # LAPACK may crash on such a matrix, error or none; a model that lost its numbers has no rule
        return
    solution = torch.linalg.pinv(normal, hermitian=True) @ right
    left = torch.linalg.vector_norm(rest - solution.to(rest.device) @ directions)
    if float(left / torch.linalg.vector_norm(outputs[0]).clamp_min(1e-300)) < 0.1:
        yield [1.0 - float(solution.sum()), *solution.tolist()]


def _solve_amount(
    name: str, outputs: list[Tensor], weights: list[float], like: int, target: Tensor
) -> Iterator[tuple[int, float]]:
    """``(sign, amount)`` of a rescaling whose sum has these ``weights``; nothing where no number can be told."""
    mixed = sum(weight * output for weight, output in zip(weights, outputs))
    assert isinstance(mixed, Tensor)
    seen = cut_to_latent(mixed, target.shape[1:]).flatten(1)
    factor = (seen * target.flatten(1)).sum(1) / seen.square().sum(1)
    sign = 1 if float(factor.sum()) >= 0 else -1
    factor = factor.abs()
    if name == "sample_norm_capped":
        norm, wanted = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (mixed, outputs[like]))
        capped = factor < 1 - 1e-3
        if capped.any():
            yield sign, float((factor * norm / wanted)[capped].mean())
    elif name == "sample_std":
        ratio = outputs[like].flatten(1).std(1) / mixed.flatten(1).std(1) - 1
        if ratio.any():
            yield sign, float(((factor - 1) * ratio).sum() / ratio.square().sum())
    else:
        yield sign, 1.0


def _forms(weights: list[float]) -> Iterator[tuple[int, tuple[Term, ...]]]:
    """Ways to write a weighted sum as a branch plus scaled differences; they differ in their roundings.

    ``u + s*(c - u)`` comes before ``c + (s-1)*(c - u)``: a base that the terms do not add to comes first.
    """
    count = len(weights)
    forms = []
    for edges in itertools.combinations(itertools.combinations(range(count), 2), count - 1):
        # up to four branches, as many edges less one are a tree if and only if no branch is left out
        if len({i for edge in edges for i in edge}) < count:
            continue
        for base in range(count):
            terms = []
            for edge in edges:
                side = _reached(edge[1], [e for e in edges if e != edge])
                exact = sum(weights[i] for i in side) - (base in side)
                plus, minus = (edge[1], edge[0]) if exact >= 0 else edge
                terms.append([(plus, minus, scale) for scale in _decimals(abs(exact))])
            for chosen in itertools.product(*terms):
                used = [term for term in chosen if term[2] != 0.0]
                forms += [(base, order) for order in itertools.permutations(used)]
    yield from sorted(dict.fromkeys(forms), key=lambda form: sum(plus == form[0] for plus, *_ in form[1]))


def _reached(start: int, edges: list[tuple[int, int]]) -> set[int]:
    """The branches that are connected to ``start``."""
    found = {start}
    for _ in edges:
        found |= {i for edge in edges if found & set(edge) for i in edge}
    return found


def _decimals(value: float) -> list[float]:
    """The numbers that somebody may have typed for ``value``, shortest first, then ``value`` itself."""
    rounded = [float(f"{value:.{digits}g}") for digits in range(1, 9)]
    near = [number for number in [0.0, *rounded] if abs(number - value) <= 0.02 * max(abs(value), 1.0)]
    return list(dict.fromkeys([*near, value]))


def _fits(branch: Tensor, latent: Sequence[int]) -> bool:
    shape = branch.shape[1:]
    if len(shape) == len(latent):
        return all(have >= want for have, want in zip(shape, latent))
    return _is_tokens_of(shape, latent) or branch[0].numel() == torch.Size(latent).numel()


def _is_tokens_of(shape: Sequence[int], latent: Sequence[int]) -> bool:
    """Whether a branch ``[L, C]`` holds one token per place of a latent ``[C, *places]``, or more in front."""
    places = torch.Size(latent[2:]).numel()
    return len(shape) == 2 < len(latent) and shape[1] == latent[0] and shape[0] % places == 0


def cut_to_latent(branch: Tensor, latent: Sequence[int]) -> Tensor:
    """``[B, *latent]`` of a branch: its first entries along every dim, as reference tokens and learned variances come
    after them; tokens are put in their places, and there what is given, such as a first frame, comes before."""
    if branch.shape[1:] == torch.Size(latent):
        return branch
    if branch.ndim == len(latent) + 1:
        return branch[(slice(None), *(slice(size) for size in latent))]
    if _is_tokens_of(branch.shape[1:], latent):
        return branch.transpose(1, 2).unflatten(2, (-1, *latent[2:]))[:, :, -latent[1] :]
    return branch.reshape(len(branch), *latent)
