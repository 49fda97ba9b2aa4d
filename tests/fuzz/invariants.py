"""What must hold whatever is called: equal policies, permuted rows, scaled differences, bounds, dropped rows.

Each is a function of a backend and of numbers that hypothesis draws; :func:`hold` runs one of them by name, so that
every backend is held to all of them, wherever its tests run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.cases import OBJECTIVES

import flowdppo_fast as fast

ulp = torch.finfo(torch.float32).eps
rows = st.integers(1, 9)
elements = st.sampled_from([1, 3, 16, 50, 257, 1030])
# rows that are all aligned to 16 elements, wherever a batch is cut
aligned = st.sampled_from([16, 48, 256, 1040])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31)
objectives = st.sampled_from(list(OBJECTIVES))
uncoupled = st.sampled_from([name for name in OBJECTIVES if name != "grpo_guard_batch"])
# a batch-wide bias is not the same in two calls whose rows clip differently
monotone = st.sampled_from([name for name in OBJECTIVES if name not in ("grpo_guard_batch", "unclipped")])
STEP = fast.SDEStep.from_sigmas("dance", 0.7, 0.6, eta=0.6)

INVARIANTS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {}


def invariant(**strategies: Any) -> Callable:
    """Enters a function of ``backend`` (a name) and what ``strategies`` draw into :data:`INVARIANTS`."""

    def enter(check: Callable[..., None]) -> Callable[..., None]:
        INVARIANTS[check.__name__] = (check, strategies)
        return check

    return enter


def hold(name: str, backend: str, examples: int, *, shrink: bool = True) -> None:
    """Asserts that an invariant holds on so many draws, the same ones every time."""
    check, strategies = INVARIANTS[name]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )  # fmt: skip
    @given(**strategies)
    def drawn(**values: Any) -> None:
        check(backend, **values)

    drawn()


def recorded(count: int, numel: int, dtype: torch.dtype, seed: int, drift: float = 0.1):
    g = torch.Generator().manual_seed(seed)
    old, away, noise = (torch.randn(count, numel, generator=g) for _ in range(3))
    advantages = torch.randn(count, generator=g)
    old = old.to(dtype)
    return (old.float() + drift * away).to(dtype), old, noise, advantages


def loss(backend: str, objective, new, old, noise, advantages, **options) -> fast.LossOutput:
    return fast.fused_velocity_policy_loss(
        objective, new, old, noise, STEP, advantages, backend=backend, single_pass=True, **options
    )


@invariant(count=rows, numel=elements, dtype=dtypes, seed=seeds, name=objectives)
def equal_policies_give_kl_0_ratio_1_and_the_plain_policy_gradient(backend, count, numel, dtype, seed, name):
    _, old, noise, advantages = recorded(count, numel, dtype, seed)
    objective, _ = OBJECTIVES[name].bounded(0.1)
    out = loss(backend, objective, old.clone(), old, noise, advantages)
    assert (out.rows.kl == 0).all()
    assert (out.rows.ratio == 1).all()
    assert out.rows.kept.all()
    # d/dv of -A*exp(L) at v == old: -A * k/N * e, and for GRPO-Guard times S over -dt
    guard = STEP.std / -STEP.dt if name.startswith("grpo_guard") else 1.0
    k = STEP.velocity_coef / STEP.std
    expected = (-advantages * guard * k / numel / count)[:, None].double() * noise.double()
    allowed = (4 * ulp + torch.finfo(dtype).eps) * expected.abs() + torch.finfo(dtype).tiny
    assert ((out.grad.double() - expected).abs() <= allowed).all()


@invariant(
    count=rows, numel=elements, dtype=dtypes, seed=seeds, name=objectives, order=st.randoms(use_true_random=False)
)
def permuting_rows_permutes_results(backend, count, numel, dtype, seed, name, order):
    tensors = recorded(count, numel, dtype, seed)
    objective, _ = OBJECTIVES[name].bounded(0.02)
    index = list(range(count))
    order.shuffle(index)
    straight = loss(backend, objective, *tensors)
    shuffled = loss(backend, objective, *(x[index] for x in tensors))
    for field in ("log_ratio", "kl"):
        assert torch.equal(getattr(shuffled.rows, field), getattr(straight.rows, field)[index]), field
    if name == "grpo_guard_batch":
        # the bias is a mean over rows, taken in their order
        torch.testing.assert_close(shuffled.grad, straight.grad[index], rtol=0.02, atol=1e-5)
    else:
        assert torch.equal(shuffled.rows.kept, straight.rows.kept[index])
        assert torch.equal(shuffled.grad, straight.grad[index])


@invariant(count=rows, numel=elements, seed=seeds, power=st.integers(-6, 4))
def scaling_the_difference_scales_q_by_its_square(backend, count, numel, seed, power):
    new, _, noise, _ = recorded(count, numel, torch.float32, seed)
    zero = torch.zeros_like(new)
    p, q = fast.row_statistics(new, zero, noise, STEP, backend=backend)
    scaled_p, scaled_q = fast.row_statistics(new * 2.0**power, zero, noise, STEP, backend=backend)
    # powers of two are exact
    assert torch.equal(scaled_q, q * 4.0**power)
    assert torch.equal(scaled_p, p * 2.0**power)


@invariant(count=rows, numel=elements, dtype=dtypes, seed=seeds, name=objectives)
def the_mirrored_step_is_the_same_step(backend, count, numel, dtype, seed, name):
    """All signs of ``u`` and ``e`` turned: the same rows, and the gradient with its sign turned."""
    new, old, noise, advantages = recorded(count, numel, dtype, seed)
    objective, _ = OBJECTIVES[name].bounded(0.02)
    one, other = (loss(backend, objective, s * new, s * old, s * noise, advantages) for s in (1.0, -1.0))
    assert torch.equal(other.row_results, one.row_results)
    assert torch.equal(other.grad, -one.grad)


@invariant(
    count=rows, numel=elements, dtype=dtypes, seed=seeds, name=monotone,
    powers=st.lists(st.floats(-7, -0.1), min_size=2, max_size=5),
)  # fmt: skip
def the_mask_only_loosens_as_the_bound_grows(backend, count, numel, dtype, seed, name, powers):
    tensors = recorded(count, numel, dtype, seed)
    bounds = [10.0**power for power in sorted(powers)]
    kept = [loss(backend, OBJECTIVES[name].bounded(bound)[0], *tensors).rows.kept for bound in bounds]
    for tight, loose in itertools.pairwise(kept):
        assert (loose | ~tight).all()


@invariant(count=rows, numel=elements, dtype=dtypes, seed=seeds, name=uncoupled)
def dropped_rows_have_gradients_of_exactly_zero(backend, count, numel, dtype, seed, name):
    new, old, noise, advantages = recorded(count, numel, dtype, seed)
    objective, _ = OBJECTIVES[name].bounded(1e-4)
    out = loss(backend, objective, new, old, noise, advantages)
    dropped = ~out.rows.kept
    assert (out.grad[dropped] == 0).all()
    # and the others have one, unless sixteen bits have no room for it
    if dtype == torch.float32 and numel > 1:
        assert (out.grad[~dropped].abs().amax(1) > 0).all()


@invariant(numel=aligned, dtype=dtypes, seed=seeds, name=uncoupled, cut=st.integers(1, 7))
def splitting_a_batch_adds_up(backend, numel, dtype, seed, name, cut):
    tensors = recorded(8, numel, dtype, seed)
    objective, _ = OBJECTIVES[name].bounded(0.02)
    whole = loss(backend, objective, *tensors, reduction="sum")
    parts = [
        loss(backend, objective, *(x[part] for x in tensors), reduction="sum") for part in (slice(cut), slice(cut, 8))
    ]
    assert torch.equal(torch.cat([part.grad for part in parts]), whole.grad)
    for field in ("log_ratio", "ratio", "kl", "kept", "loss"):
        assert torch.equal(torch.cat([getattr(part.rows, field) for part in parts]), getattr(whole.rows, field)), field
    size = float(whole.rows.loss.abs().sum())
    assert abs(float(parts[0].loss + parts[1].loss) - float(whole.loss)) <= 8 * ulp * size


@invariant(count=rows, numel=elements, seed=seeds, name=objectives, factor=st.floats(0.1, 10))
def advantages_scale_loss_and_gradient(backend, count, numel, seed, name, factor):
    new, old, noise, advantages = recorded(count, numel, torch.float32, seed)
    objective, _ = OBJECTIVES[name].bounded(0.02)
    factor = float(torch.tensor(factor))
    one = loss(backend, objective, new, old, noise, advantages)
    other = loss(backend, objective, new, old, noise, advantages * factor)
    assert torch.equal(one.rows.kept, other.rows.kept)
    # an element is a difference of two terms: ulps of the largest one
    atol = 8 * ulp * float(other.grad.abs().max())
    torch.testing.assert_close(other.grad, one.grad * factor, rtol=0, atol=atol)
    torch.testing.assert_close(other.rows.loss, one.rows.loss * factor, rtol=8 * ulp, atol=1e-30)
