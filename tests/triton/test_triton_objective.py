"""``policy_loss`` and ``policy_loss_and_grad`` against the objectives' epilogue in float64.

The statistics come from ``row_stats``, which has its own tests; here they are the common ground of kernel and oracle.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems_for_kernels import DEVICE, FORMS, MARKS, SEED, Source, source
from support.cases import COUNTED, NEVER_DROP, middle_gap
from support.tolerance import check_within, largest_finite

from flowdppo_fast import reference
from flowdppo_fast.epilogue import LOG_SQRT_2PI, epilogue
from flowdppo_fast.kernels import launch, policy_loss, policy_loss_and_grad, row_grad, row_stats
from flowdppo_fast.objectives import (
    DPPO,
    DRPO,
    SUMMARY,
    EpilogueOptions,
    GRPOGuard,
    KLPenalty,
    LogHinge,
    OwnRule,
    RatioClip,
    RowField,
    Rule,
    Unclipped,
)
from flowdppo_fast.rows import Form

pytestmark = MARKS
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def half(row):
    """A rule of one's own: far rows of positive advantage count what they would at a ratio of 1, others half."""
    surrogate = -0.5 * row.advantage * row.ratio
    return row.far & (row.advantage > 0), -row.advantage, surrogate, surrogate


def pull(row):
    """Towards the old policy, in proportion to how far a row is."""
    return row.threshold * row.kl, row.threshold


OBJECTIVES = {
    "dppo": lambda bound: DPPO(bound),
    "dppo_mean_drift": lambda bound: DPPO(bound, trust_region="mean_drift"),
    "dppo_velocity_drift": lambda bound: DPPO(bound, trust_region="velocity_drift"),
    "dppo_symmetric": lambda bound: DPPO(bound, symmetric=True),
    "ratio_clip": lambda bound: RatioClip(bound, 1.25 * bound),
    "grpo_guard": lambda bound: GRPOGuard(bound, 1.25 * bound),
    "grpo_guard_batch": lambda bound: GRPOGuard(bound, 1.25 * bound, bias="batch"),
    "unclipped": lambda bound: Unclipped(),
    "dppo_clipped": lambda bound: DPPO(bound, low=bound, high=1.25 * bound),
    "dppo_pulled": lambda bound: DPPO(bound, trust_region="mean_drift", pull=0.6),
    "kl_penalty": lambda bound: KLPenalty(1.0 / bound),
    "drpo": lambda bound: DRPO(bound),
    "drpo_ratio": lambda bound: DRPO(bound, "ratio"),
    "log_hinge": lambda bound: LogHinge(bound),
    "own": lambda bound: OwnRule(half, pull, threshold=bound),
}
OPTIONS = {
    "plain": {},
    "sum": {"latent_reduction": "sum", "drift": 0.01},
    "unnormalized": {"log_prob": "unnormalized"},
    "old_log_prob": {"with_old": True},
    "old_log_prob_unnormalized": {"with_old": True, "log_prob": "unnormalized"},
    "old_log_prob_sum": {"with_old": True, "latent_reduction": "sum", "drift": 0.01},
    "reference": {"with_reference": True, "kl_weight": 0.3},
    "reference_without_dt": {"with_reference": True, "kl_weight": 0.3, "reference_kl": "without_dt"},
    "reference_metric_only": {"with_reference": True},
    "kl_weight_without_reference": {"kl_weight": 0.3},
    "advantage_clip": {"advantage_clip": 0.7},
    "row_weights": {"with_weights": True},
    "bounds_per_row": {"with_row_bounds": True, "with_reference": True, "kl_weight": 1.0},
    "everything": {
        "with_reference": True, "kl_weight": 0.2, "with_weights": True, "with_old": True,
        "advantage_clip": 0.9, "latent_reduction": "sum", "drift": 0.01,
    },
}  # fmt: skip


class Loss:
    """One call of ``policy_loss``, and what it is judged by."""

    def __init__(
        self, problem: Source, name: str, *, with_old=False, with_weights=False, with_row_bounds=False,
        advantages=None, bound=None, **options,
    ):  # fmt: skip
        self.problem, self.numel = problem, problem["new"].shape[2]
        self.advantages = torch.randn(problem.rows, dtype=F64) if advantages is None else advantages.double()
        lines = (4, problem.rows) if with_row_bounds else (problem.rows,)
        self.weights = torch.rand(lines, dtype=F64) + 0.5 if with_weights or with_row_bounds else None
        self.stats = row_stats(*problem.args(), with_old).cpu()
        step = problem.exact()["step"]
        # numbers as the kernels see them, in the accumulation dtype
        values = [float(torch.tensor(value, dtype=problem.compute)) for value in problem["step_values"]]
        self.step = reference.row_numbers(step, values, problem["form"], problem.rows, self.stats.double())
        self.old = None
        if with_old:
            self.old = self._rollout_log_prob(options.get("log_prob") == "unnormalized")
        self.advantages, self.weights, self.old = (
            x if x is None else x.to(problem.compute) for x in (self.advantages, self.weights, self.old)
        )
        if bound is None:
            # a bound in the widest gap of what the rows reach, which no rounding bridges
            self.options = EpilogueOptions.make(OBJECTIVES[name](0.5), **options)
            rows, _ = self.exact()
            clips = self.options.rule in (Rule.RATIO_CLIP, Rule.GRPO_GUARD)
            of_threshold = self.weights[1] if with_row_bounds else 1.0
            reached = rows[RowField.RATIO] - 1.0 if clips else rows[RowField.KL] / of_threshold
            if self.options.rule == Rule.LOG_HINGE:
                # rows that move the other way are beyond nothing
                reached = (rows[RowField.LOG_RATIO] * self.advantages.sign()).clamp_min(0.0)
            bound = min(middle_gap(reached), 0.9)
        self.options = EpilogueOptions.make(OBJECTIVES[name](bound), **options)

    def _rollout_log_prob(self, unnormalized: bool) -> torch.Tensor:
        """What a rollout would have stored: its own density of the noise, blurred by its rounding."""
        std, moment = self.step[0], self.stats[2].double()
        exact = -(std**2) * moment if unnormalized else -0.5 * moment - torch.log(std) - LOG_SQRT_2PI
        return exact + 1e-3 * torch.randn(self.problem.rows, dtype=F64)

    def epilogue(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The oracle on the kernels' own statistics, computed in ``dtype``."""
        std, scale, neg_dt = (x.to(dtype) for x in self.step)
        wide = (x if x is None else x.to(dtype) for x in (self.advantages, self.weights, self.old))
        return epilogue(self.stats.to(dtype), std, scale, neg_dt, *wide, self.numel, self.options)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.epilogue(F64)

    def arguments(self) -> list:
        tensors = (x if x is None else x.to(DEVICE) for x in (self.advantages, self.weights, self.old))
        return [*self.problem.args(), *tensors, self.options.ints, self.options.floats]

    def condition(self) -> torch.Tensor:
        """``[R]`` sizes of the terms that add up to each row's log-ratio: what its rounding errors are relative to."""
        std = self.step[0]
        slope = 2.0 * std**2 if self.options.unnormalized_log_prob else torch.ones_like(std)
        q, e = self.stats[1].double(), self.stats[2].double()
        # |P| <= sqrt(Q*E), and E is about 1
        size = slope * (2.0 * q.sqrt() + q + 0.5 * e)
        if self.old is not None:
            normalizer = 0.0 if self.options.unnormalized_log_prob else torch.log(std).abs() + LOG_SQRT_2PI
            size = size + normalizer + self.old.abs()
        return size * (self.numel if self.options.sum_reduce else 1)


def check_close(name: str, actual: torch.Tensor, exact: torch.Tensor, allowed: float) -> None:
    """Off by no more than ``allowed`` where finite; the same kind of number elsewhere."""
    check_within(name, actual, exact, allowed, actual.dtype)


def check(call: Loss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, rows, summary = (x.cpu() for x in policy_loss(*call.arguments()))
    exact_rows, exact_summary = call.exact()
    compute = call.problem.compute
    assert loss.shape == ()
    assert rows.shape == (len(RowField), call.problem.rows)
    assert summary.shape == (len(SUMMARY),)
    assert loss.dtype == rows.dtype == summary.dtype == compute
    assert torch.equal(loss, summary[0]) or bool(torch.isnan(loss))
    ulps = 16 * torch.finfo(compute).eps
    condition = largest_finite(call.condition())
    allowed = {field: ulps * (1.0 + condition) * largest_finite(exact_rows[field]) for field in RowField}
    allowed[RowField.LOG_RATIO] = ulps * condition
    allowed[RowField.KEPT] = 0.0
    for field in RowField:
        check_close(field.name, rows[field], exact_rows[field], allowed[field])

    ratio = largest_finite(exact_rows[RowField.RATIO])
    by_name = {
        "loss": allowed[RowField.LOSS],
        "policy_loss": allowed[RowField.LOSS],
        "ratio_mean": allowed[RowField.RATIO],
        # the spread is that of r - 1, which has no 1 to be rounded against
        "ratio_std": ulps * condition * ratio,
        "ratio_min": allowed[RowField.RATIO],
        "ratio_max": allowed[RowField.RATIO],
        "approx_kl": 2.0 * allowed[RowField.LOG_RATIO] * (largest_finite(exact_rows[RowField.LOG_RATIO]) + ulps),
        "kl_new_old_mean": allowed[RowField.KL],
        "kl_new_old_max": allowed[RowField.KL],
        "drift_mean": ulps * largest_finite(exact_summary[SUMMARY.index("drift_mean")]),
        "kl_ref_mean": ulps * largest_finite(exact_summary[SUMMARY.index("kl_ref_mean")]),
    }
    for index, name in enumerate(SUMMARY):
        # a count is exact, its division by the number of rows rounds
        bound = torch.finfo(compute).eps if name in COUNTED else by_name[name]
        check_close(name, summary[index], exact_summary[index], bound)
    return loss, rows, summary


# every option with velocities or means, and with one step or a table, in turn
CASES = [
    (name, option, *FORMS[index % 3 if "velocity" in name else index % len(FORMS)])
    for index, (name, option) in enumerate(itertools.product(OBJECTIVES, OPTIONS))
]


def needs_dt(name: str, option: str) -> bool:
    return name.startswith("grpo_guard") or option == "reference_without_dt"


@pytest.mark.parametrize(("name", "option", "form", "table"), CASES, ids=lambda value: str(value))
def test_objectives_and_options(name, option, form, table):
    options = dict(OPTIONS[option])
    if "velocity" in name:
        form, table = Form.VELOCITY, table and 3
    if table == 1 and needs_dt(name, option):
        table = 3
    drift = options.pop("drift", 0.05)
    with_reference = options.pop("with_reference", False)
    problem = source((3, 4, 300), form=form, drift=drift, with_reference=with_reference, table=table)
    call = Loss(problem, name, **options)
    _, rows, _ = check(call)
    if name not in NEVER_DROP and option == "plain":
        assert 0 < int(rows[RowField.KEPT].sum()) < 12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float64(name):
    check(Loss(source((3, 4, 300), dtypes=F64, with_reference=True), name, kl_weight=0.3, with_weights=True))
    check(Loss(source((3, 4, 300), dtypes=F64, table=3), name, with_old=True))


@pytest.mark.parametrize("dtypes", [BF16, torch.float16, (BF16, F32, BF16, F32)], ids=str)
def test_half_precision_latents(dtypes):
    for seeded in (False, True):
        check(Loss(source((2, 3, 3000), dtypes=dtypes, seeded=seeded), "dppo", with_old=seeded))


@pytest.mark.parametrize(
    ("name", "shape"),
    [*itertools.product(["dppo", "grpo_guard", "grpo_guard_batch"], [(1, 1, 50), (70, 1, 20)]),
     ("ratio_clip", (17, 2, 2500)), ("grpo_guard_batch", (11, 100, 3))],
    ids=str,
)  # fmt: skip
def test_one_row_and_many(name, shape):
    call = Loss(source(shape), name)
    _, _, summary = check(call)
    if call.problem.rows == 1:
        assert summary[SUMMARY.index("ratio_std")] == 0.0
    tiles = launch.epilogue_tiles(call.problem.rows, launch.cut(call.problem.rows, shape[2]).splits)
    assert (tiles.row_blocks > 1) == (call.problem.rows > 1)


def test_more_partials_than_a_tile_holds():
    shape = (40, 1, 2 * launch.BLOCK + 1)
    tiles = launch.epilogue_tiles(40, 3).partials
    assert tiles.row_blocks * tiles.split_blocks == 1
    long = (1, 1, 131 * launch.BLOCK)
    assert launch.epilogue_tiles(1, 131).partials.split_blocks == 2
    for size in (shape, long):
        check(Loss(source(size), "dppo"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_rows(name):
    for shape in ((0, 3, 10), (4, 0, 10)):
        problem = source(shape)
        options = EpilogueOptions.make(OBJECTIVES[name](0.1))
        none = torch.zeros(0, device=DEVICE)
        arguments = (*problem.args(), none, None, None, options.ints, options.floats)
        loss, rows, summary, grad = (x.cpu() for x in policy_loss_and_grad(*arguments, 1.0))
        assert loss == 0.0
        assert rows.shape == (8, 0)
        assert grad.shape == shape
        for value, entry in zip(summary, SUMMARY):
            # no loss and nothing to count, and no statistics to report
            assert value == 0.0 if entry in ("loss", "policy_loss", "nonfinite_rows") else torch.isnan(value)


def exact_rows(distances: list[float], noises: list[float]) -> Source:
    """Rows whose statistics are exact in float32: ``Q = distance**2``, ``P = distance*noise``, ``k = S = 1``."""
    distance = torch.tensor(distances)[:, None, None].expand(-1, 1, 8)
    noise = torch.tensor(noises)[:, None, None].expand(-1, 1, 8)
    return Source(
        new=distance.contiguous().to(DEVICE), old=torch.zeros_like(distance).to(DEVICE).contiguous(),
        noise=noise.contiguous().to(DEVICE), reference=None, streams=None, step=None,
        step_values=[1.0, 1.0, 0.5], seed=SEED, first_stream=0, form=int(Form.VELOCITY),
    )  # fmt: skip


def test_a_divergence_equal_to_the_threshold_is_far():
    # Q = 2**-6, so D = 2**-7 exactly; P - Q/2 > 0 in the first two rows, < 0 in the others
    problem = exact_rows([2**-3] * 4, [1.0, 1.0, -1.0, -1.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    kept = policy_loss(*Loss(problem, "dppo", advantages=advantages, bound=2.0**-7).arguments())[1][RowField.KEPT]
    assert kept.tolist() == [0.0, 1.0, 1.0, 0.0]
    above = math.nextafter(2.0**-7 * (1 + 2.0**-24), 1.0)
    kept = policy_loss(*Loss(problem, "dppo", advantages=advantages, bound=above).arguments())[1][RowField.KEPT]
    assert kept.tolist() == [1.0] * 4
    kept = policy_loss(*Loss(problem, "dppo_symmetric", advantages=advantages, bound=2.0**-7).arguments())[1]
    assert kept[RowField.KEPT].tolist() == [0.0] * 4


def test_a_ratio_of_one_is_never_dropped():
    # P = Q/2 exactly: log-ratio 0 at any distance
    problem = exact_rows([0.5, 0.5], [0.25, 0.25])
    call = Loss(problem, "dppo", advantages=torch.tensor([3.0, -3.0]), bound=1e-6)
    rows = policy_loss(*call.arguments())[1].cpu()
    assert rows[RowField.LOG_RATIO].tolist() == [0.0, 0.0]
    assert rows[RowField.RATIO].tolist() == [1.0, 1.0]
    assert rows[RowField.KEPT].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("size", [2.0**-27, 2.0**-40, 2.0**-14])
def test_ratios_next_to_one_are_told_apart(size):
    # log-ratios of about +size and -size; the ratio itself rounds to 1 for the smaller ones
    problem = exact_rows([size, size], [1.0, -1.0])
    advantages = torch.tensor([1.0, -1.0])
    # the upper clip is 1.25 times the lower one
    for bound, kept in ((0.7 * size, 0.0), (1.1 * size, 1.0)):
        call = Loss(problem, "ratio_clip", advantages=advantages, bound=bound)
        assert policy_loss(*call.arguments())[1][RowField.KEPT].tolist() == [kept, kept]
    call = Loss(problem, "dppo", advantages=advantages, bound=0.25 * size**2)
    assert policy_loss(*call.arguments())[1][RowField.KEPT].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["dppo", "dppo_symmetric", "ratio_clip", "grpo_guard"])
def test_an_overflowed_ratio_in_a_dropped_row_leaves_no_trace(name):
    problem = exact_rows([30.0, 0.01], [40.0, 0.3])
    call = Loss(problem, name, advantages=torch.tensor([1.0, 1.0]), bound=0.5)
    loss, rows, summary, grad = (x.cpu() for x in policy_loss_and_grad(*call.arguments(), 0.5))
    assert rows[RowField.RATIO, 0] == float("inf")
    assert rows[RowField.KEPT, 0] == 0.0
    assert torch.isfinite(rows[RowField.LOSS]).all()
    assert torch.equal(rows[RowField.GRAD_P :, 0], torch.zeros(3))
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))
    assert torch.isfinite(loss)
    assert summary[SUMMARY.index("nonfinite_rows")] == 1.0
    expected_rows, expected_summary = call.epilogue(F32)
    if name.startswith("dppo"):
        assert rows[RowField.LOSS, 0] == 0.0
    for actual, expected in ((rows, expected_rows), (summary, expected_summary)):
        assert torch.equal(torch.isfinite(actual), torch.isfinite(expected))
        assert torch.equal(torch.isnan(actual), torch.isnan(expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_broken_weight_of_a_dropped_row_does_not_reach_its_gradient(bad):
    problem = exact_rows([0.5, 0.01], [1.0, 0.3])
    call = Loss(problem, "dppo", advantages=torch.tensor([1.0, 1.0]), bound=0.05)
    call.weights = torch.tensor([bad, 1.0])
    _, rows, _, grad = (x.cpu() for x in policy_loss_and_grad(*call.arguments(), 0.5))
    assert rows[RowField.KEPT].tolist() == [0.0, 1.0]
    assert torch.equal(rows[RowField.GRAD_P :, 0], torch.zeros(3))
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))
    assert torch.equal(torch.isnan(rows), torch.isnan(call.epilogue(F32)[0]))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("field", ["new", "old", "noise", "advantages"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_non_finite_numbers_reach_the_loss(name, field, bad):
    problem = source((1, 4, 100))
    advantages = torch.randn(4)
    if field == "advantages":
        advantages[2] = bad
    else:
        problem[field][0, 2, 7] = bad
    call = Loss(problem, name, advantages=advantages, bound=1e-3)
    _, rows, summary = check(call)
    assert int(summary[SUMMARY.index("nonfinite_rows")]) == int((~torch.isfinite(rows[:5])).any(0).sum())


def test_zero_kl_weight_keeps_a_broken_reference_out_of_the_loss():
    problem = source((1, 4, 100), with_reference=True)
    problem["reference"][0, 1, 3] = float("nan")
    loss, rows, summary = check(Loss(problem, "dppo"))
    assert torch.isfinite(loss)
    assert torch.isfinite(rows).all()
    assert torch.isnan(summary[SUMMARY.index("kl_ref_mean")])


def test_everything_agrees_from_end_to_end():
    """Against the float64 reference on the latents themselves, several programs per row."""
    problem = source((2, 2, 3 * launch.BLOCK + 7), dtypes=BF16, with_reference=True)
    call = Loss(problem, "dppo", kl_weight=0.2)
    outcome = policy_loss_and_grad(*call.arguments(), 0.25)
    advantages = call.advantages.double()
    exact = reference.policy_loss_and_grad(
        *problem.exact().args(), advantages, None, None, call.options.ints, call.options.floats, 0.25
    )
    for name, actual, expected in zip(("loss", "rows", "summary"), outcome, exact):
        # float32 sums of 6,151 products: blocked, so a random walk of a few steps (support.tolerance)
        allowed = (
            (8 + 2 * math.log2(6151)) * 2.0**-23 * (1.0 + largest_finite(call.condition())) * largest_finite(expected)
        )
        check_close(name, actual.cpu(), expected, allowed)
    grad, expected = outcome[3].cpu().double(), exact[3]
    rounding = 2.0**-7 * expected.abs() + 64 * 2.0**-23 * largest_finite(expected)
    assert bool(((grad - expected).abs() <= rounding).all())


def test_the_gradient_is_that_of_row_grad():
    problem = source((2, 3, 200), dtypes=BF16, with_reference=True)
    call = Loss(problem, "ratio_clip", kl_weight=0.1)
    loss, rows, summary, grad = policy_loss_and_grad(*call.arguments(), 1.0 / 6.0)
    alone = policy_loss(*call.arguments())
    for left, right in zip((loss, rows, summary), alone):
        assert torch.equal(left, right)
    expected = row_grad(*problem.args(), rows[RowField.GRAD_P :], rows.new_ones(1), 1.0 / 6.0)
    assert torch.equal(grad, expected)


def test_repeats_bit_by_bit():
    for name in ("dppo", "grpo_guard_batch"):
        call = Loss(source((2, 3, 3000), dtypes=BF16, seeded=True, with_reference=True), name, kl_weight=0.1)
        first = policy_loss_and_grad(*call.arguments(), 0.1)
        second = policy_loss_and_grad(*call.arguments(), 0.1)
        assert all(torch.equal(left, right) for left, right in zip(first, second))
