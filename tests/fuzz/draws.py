"""Random calls from a stream of choices: shapes, layouts, dtypes, samplers, schedules, objectives, options, scalars."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from support import given_rows
from support.cases import OBJECTIVES, Case, bounded_call
from support.compare import Yardstick, compute_dtype
from support.given_rows import GivenRows
from support.layouts import DENSE, EXPANDED, LAYOUTS, Layout
from support.problems import MEAN_NAMES, STOCHASTIC, VELOCITY_NAMES, Call, Outcome, Problem, make_problem, textbook
from support.steps import StatisticsCall, StepCall, eager_step
from support.tolerance import check_float64
from torch import Tensor

import flowdppo_fast as fast

T = TypeVar("T")


class Chooser(Protocol):
    """Where choices come from: ``random.Random``, or hypothesis."""

    def choice(self, options: Sequence[T]) -> T: ...

    def randint(self, low: int, high: int) -> int: ...

    def uniform(self, low: float, high: float) -> float: ...


@dataclass
class Drawn:
    """A call, and what was drawn, by name."""

    call: Any
    facts: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.facts.items())


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ((1,), (2,), (3,), (5,), (8,), (1, 1), (2, 3), (4, 2), (1, 4), (2, 1, 3))
LATENTS = (
    (1,),
    (2,),
    (7,),
    (16,),
    (33,),
    (3, 5),
    (4, 8),
    (2, 3, 5),
    (4, 4, 4),
    (1, 4, 1),
    (2, 2, 3, 5),
    (129,),
    (1025,),
    (4, 17, 31),
)
# beyond one chunk of the C++ library and one tile of the GPU kernels; more rows than an epilogue takes at a time
LARGE_LATENTS = ((16_387,), (3, 41, 137))
MANY_ROWS = ((37,), (11, 4))


def draw_problem(choose: Chooser, *, row_dims: int = 3, limit: float = 0.0, samplers: Sequence[str] = STOCHASTIC):
    """``(problem, facts)``: recorded steps on a random schedule; ``limit`` is the power of ten that drifts end at."""
    large = choose.randint(1, 40)
    rows = choose.choice([shape for shape in (MANY_ROWS if large == 39 else ROWS) if len(shape) <= row_dims])
    latent = choose.choice(LARGE_LATENTS if large == 40 else LATENTS)
    sampler = choose.choice(samplers)
    eta, shift, steps = 0.7, 3.0, 10
    if choose.choice((False, True)):
        # at eta = 1 what cps keeps is a rounding error
        eta, shift, steps = choose.uniform(0.05, 0.9), choose.uniform(0.5, 8.0), choose.randint(2, 50)
    ramp = [1.0 - i / steps for i in range(steps + 1)]
    sigmas = tuple(shift * t / (1.0 + (shift - 1.0) * t) for t in ramp)
    # their last step has no density
    last = steps - (2 if sampler in ("cps", "precise", "dance_precise") else 1)
    held = choose.choice(("one for all", "one for all", "per last dim", "per row", "per first dim"))
    column = (rows[0],) + (1,) * (len(rows) - 1)
    shape = {"one for all": (), "per last dim": rows[-1:], "per row": rows, "per first dim": column}[held]
    index = torch.tensor([choose.randint(0, last) for _ in range(math.prod(shape))]).reshape(shape).tolist()
    # equal policies now and then
    drift = 0.0 if choose.randint(1, 25) == 25 else 10.0 ** choose.uniform(-4.0, limit)
    seed = choose.randint(0, 2**31)
    problem = make_problem(
        rows, latent, sampler=sampler, index=index, drift=drift, seed=seed, eta=eta, sigmas=sigmas
    )  # fmt: skip
    facts = {
        "sampler": sampler, "rows": rows, "latent": latent, "steps": held, "index": index, "drift": f"{drift:.2e}",
        "eta": f"{eta:.3f}", "schedule": f"{steps} steps, shift {shift:.2f}",
    }  # fmt: skip
    return problem, facts


def draw_layout(choose: Chooser, problem: Problem, among: Sequence[str]) -> Layout:
    """One of the layouts ``among`` that the problem's shape can have."""
    possible = [name for name in among if len(problem.velocity.shape) > len(problem.rows) + 1 or name in _FOR_VECTORS]
    if len(problem.rows) == 1:
        possible = [name for name in possible if name != "steps_first"]
    return (LAYOUTS | EXPANDED)[choose.choice(possible)]


_FOR_VECTORS = {name for name in DENSE if "channel" not in name} | set(EXPANDED)
_STORED = (*LAYOUTS, *EXPANDED)


def draw_noise(choose: Chooser, rows: tuple[int, ...], device: str) -> fast.PhiloxNoise:
    """Seeded noise: any seed, and streams in a row (about corners of their counters too) or one of each row's own."""
    stream: Any = choose.choice((choose.randint(0, 2**40), 0, 2**32 - 2, -3))
    own = choose.choice(("in a row", "per row", "per last dim"))
    if own != "in a row":
        shape = rows if own == "per row" else rows[-1:]
        stream = torch.tensor([choose.randint(0, 2**40) for _ in range(math.prod(shape))]).reshape(shape).to(device)
    return fast.PhiloxNoise(choose.randint(-(2**63), 2**63 - 1), stream)


def _objective(choose: Chooser, form: str) -> tuple[str, Case]:
    """A name of :data:`OBJECTIVES` for the form, with a trust region and an asymmetry of its own."""
    name = choose.choice([name for name, case in OBJECTIVES.items() if form == "velocity" or not case.velocity_only])
    case = OBJECTIVES[name]
    if name == "dppo_symmetric":
        regions = ("kl", "mean_drift", "velocity_drift") if form == "velocity" else ("kl", "mean_drift")
        case = dataclasses.replace(case, region=choose.choice(regions))
    if case.rule in ("ratio_clip", "grpo_guard") and name != "ratio_clip":
        # 0.5 would be a tie where there is one row alone
        case = dataclasses.replace(case, skew=choose.uniform(0.6, 3.0))
    return name, case


def _row_numbers(choose: Chooser, call: Call) -> dict[str, Any]:
    """Advantages and weights as somebody might hold them: other dtypes, strided, broadcast, with zeros among them."""
    advantages, facts = call.advantages, {}
    kind = choose.choice(("both signs", "both signs", "one sign", "zeros", "large"))
    if kind == "one sign":
        advantages = advantages.abs()
    elif kind == "zeros":
        advantages = advantages.where(torch.arange(advantages.numel()).reshape(advantages.shape) % 3 != 0, 0.0)
    elif kind == "large":
        advantages = advantages * 1000.0
    facts["advantages"] = kind
    held = choose.choice(("as computed", "as computed", "bfloat16", "float64", "strided"))
    if held == "strided":
        advantages = torch.stack((advantages, advantages), -1)[..., 0]
    elif held != "as computed":
        advantages = advantages.to(getattr(torch, held))
    call.advantages = advantages
    facts["advantages held"] = held
    if (weights := call.options.get("row_weights")) is not None:
        kind = choose.choice(("per row", "per last dim", "with zeros"))
        if kind == "per last dim":
            weights = weights[(0,) * (weights.ndim - 1)]
        elif kind == "with zeros":
            weights = weights.where(torch.arange(weights.numel()).reshape(weights.shape) % 2 != 0, 0.0)
        call.options["row_weights"] = weights
        facts["row weights"] = kind
    return facts


def draw_call(choose: Chooser, device: str, *, float64: bool) -> Drawn:
    """A call of a loss."""
    form = choose.choice(("velocity", "means"))
    objective, case = _objective(choose, form)
    reduce = choose.choice(("mean", "mean", "sum"))
    # policies so close that sums over latents stay in range
    problem, facts = draw_problem(choose, limit=-1.0 if reduce == "sum" else 0.0)
    drift = float(facts["drift"])
    double = float64 and choose.randint(0, 9) == 0
    dtypes = (torch.float64,) * 4 if double else tuple(choose.choice(DTYPES) for _ in range(4))
    options: dict[str, Any] = {"latent_reduction": reduce}
    if form == "means":
        # most trainers hold them in float32; a difference of means in sixteen bits is mostly rounding, as documented
        if not double and choose.choice((True, True, False)):
            dtypes = (torch.float32,) * 4
        alike = facts["steps"] == "one for all"
        options["std_shape"] = choose.choice(("rows", "singleton", "float", "0-d") if alike else ("rows", "singleton"))
    names = VELOCITY_NAMES if form == "velocity" else MEAN_NAMES
    # one old mean for all rows has nothing to do with their next states: e is then hundreds, which is nobody's step
    stored = dict.fromkeys(names[1:] if form == "velocity" else names[3:], _STORED)
    layout = {name: draw_layout(choose, problem, stored.get(name, tuple(LAYOUTS))) for name in names}
    if choose.choice((False, True)):
        weight = choose.choice((0.0, 10.0 ** choose.uniform(-3.0, 0.5)))
        options |= {"with_reference": True, "kl_weight": weight}
        if choose.choice((False, False, True)):
            options["reference_kl"] = "without_dt"
    if drift > 0.02 and choose.choice((False, True)):
        # log-probs near -1 are rounded by 1e-7: smaller ratios than these drown in it, as documented
        options["with_old_log_prob"] = True
    if choose.choice((False, False, True)):
        options["with_weights"] = True
    if choose.choice((False, False, True)):
        options["log_prob"] = "unnormalized"
    if choose.choice((False, False, True)):
        options["advantage_clip"] = choose.uniform(0.1, 3.0)
    kind = choose.choice(("mean", "mean", "kept", "sum", "none"))
    couples = objective == "grpo_guard_batch"
    options["reduction"] = "mean" if couples and kind == "none" else kind
    if options["reduction"] != "none" and choose.choice((False, True)):
        options["single_pass"] = True
    if form == "velocity" and choose.choice((False, False, True)):
        options["noise"] = draw_noise(choose, problem.rows, device)
    # mostly in the widest gap between rows, sometimes where all are inside, or outside
    factor = choose.choice((1.0, 1.0, 10.0 ** choose.uniform(-3.0, 2.0)))
    facts = {"form": form, "objective": objective, "region": case.region, "skew": case.skew, **facts, **options}
    facts |= {"factor": f"{factor:.3g}"}
    facts |= {"dtypes": [str(dtype)[6:] for dtype in dtypes], "layouts": [lay.__name__ for lay in layout.values()]}
    call = bounded_call(problem, form, case, factor=factor, dtypes=dtypes, layout=layout, device=device, **options)
    facts |= _row_numbers(choose, call)
    if not call.options.get("single_pass") and choose.choice((False, False, True)):
        call.upstream = choose.choice((65536.0, -0.25))
    return Drawn(call, {**facts, "upstream": call.upstream})


def _tensors(choose: Chooser, problem: Problem, device: str, float64: bool, *values: Tensor) -> list[Tensor]:
    """The values in random dtypes and layouts; float64 for all of them or none."""
    double = float64 and choose.randint(0, 9) == 0
    drawn = []
    for position, value in enumerate(values):
        dtype = torch.float64 if double else choose.choice(DTYPES)
        lay = draw_layout(choose, problem, tuple(LAYOUTS) if position == 0 else _STORED)
        drawn.append(lay(value.to(device=device, dtype=dtype), len(problem.rows)))
    return drawn


def _described(tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {"dtypes": [str(x.dtype)[6:] for x in tensors], "strides": [x.stride() for x in tensors]}


def draw_step(choose: Chooser, device: str, *, float64: bool) -> Drawn:
    """A call of ``sde_step``."""
    problem, facts = draw_problem(choose, row_dims=2, samplers=list(fast.SAMPLERS))
    source = choose.choice(("noise", "seed", "prev_sample"))
    state = problem.noise
    if source == "prev_sample":
        state = eager_step(problem, problem.state, problem.old_velocity, problem.noise, torch.float64)[1]
    velocity, sample, third = _tensors(choose, problem, device, float64, problem.velocity, problem.state, state)
    # a step without noise has a next state, but no density
    kind = choose.choice(("gaussian", "unnormalized")) if problem.sampler != "ode" else None
    dtype = None
    if sample.dtype != torch.float64 and choose.choice((False, True)):
        dtype = choose.choice(DTYPES)
    call = StepCall(problem, sample, velocity, log_prob=kind, dtype=dtype)
    if source == "prev_sample":
        call.prev_sample = third
    else:
        call.noise = draw_noise(choose, problem.rows, device) if source == "seed" else third
    facts |= {"source": source, "log_prob": kind, "next state": dtype, **_described((velocity, sample, third))}
    return Drawn(call, facts)


def draw_statistics(choose: Chooser, device: str, *, float64: bool) -> Drawn:
    """A call of ``row_statistics``."""
    problem, facts = draw_problem(choose, row_dims=2)
    tensors = _tensors(choose, problem, device, float64, problem.velocity, problem.old_velocity, problem.noise)
    noise: Any = tensors[2]
    seeded = choose.choice((False, False, True))
    if seeded:
        noise = draw_noise(choose, problem.rows, device)
    facts |= {"source": "seed" if seeded else "noise", **_described(tensors)}
    return Drawn(StatisticsCall(problem, tensors[0], tensors[1], noise), facts)


def draw_given_rows(choose: Chooser, *, float64: bool) -> GivenRows:
    """A call of ``log_prob_loss``: log-ratios and drifts over many decades."""
    torch.manual_seed(choose.randint(0, 2**31))
    objective, option, columns = choose.choice(given_rows.CASES)
    return given_rows.draw(
        objective,
        choose.randint(1, 40),
        dtype=choose.choice((torch.float32, torch.float64) if float64 else (torch.float32,)),
        columns=columns,
        spread=10 ** choose.uniform(-7, 0.5),
        drift=10 ** choose.uniform(-9, -0.5),
        **given_rows.OPTIONS[option],
    )


def out_of_range(call: Call, exact: Outcome) -> str:
    """What there is no room for, if anything: exp(88) is float32's largest number, 65504 float16's."""
    # the exponent of GRPO-Guard is not the log-ratio
    if not bool((exact.rows["log_ratio"].abs() < 80.0).all() and (exact.rows["ratio"] < 1e34).all()):
        return "ratio beyond float32"
    if not float(exact.grad.abs().max()) < torch.finfo(call.first.dtype).max:
        return f"gradient beyond {str(call.first.dtype)[6:]}"
    return ""


def decidable(call: Call, eager: Outcome, exact: Outcome) -> bool:
    """Whether no row is so close to a bound that the textbook as trainers compute it puts it on the other side."""
    counts = [name for name in exact.metrics if name.startswith("clipfrac") or name.endswith("fraction")]
    same = all(abs(float(eager.metrics[name]) - float(exact.metrics[name])) < 1e-6 for name in counts)
    return same and torch.equal(eager.rows["kept"], exact.rows["kept"])


def check_reference(call: Call, reference: Outcome, exact: Outcome) -> None:
    """Asserts that the library's reference in float64, the oracle of the other backends, is the textbook in float64.

    Both are float64, so only their roundings differ: the textbook subtracts log-densities of next states, and loses
    what ``S`` is smaller than the states and the size of what it sums. That is still far below a float32.
    """
    problem, latent_dims = call.problem, call.first.ndim - len(call.problem.rows)
    numel = math.prod(call.first.shape[-latent_dims:]) if call.options.get("latent_reduction") == "sum" else 1
    std = problem.mean_of(torch.zeros_like(problem.state))[1]
    # what log-densities are made of: mean squares of (e - u)
    size = 1.0 + 2.0 * float(exact.size.max()) / numel
    scale = 64.0 * max(1.0, 1.0 / float(std.min())) * size * numel
    row_loss = float(exact.rows["loss"].abs().max())
    count = exact.rows["loss"].numel() if call.options.get("reduction") == "sum" else 1
    # rows cancel in their mean
    check_float64("loss", reference.loss, exact.loss, scale * max(1.0, 1e3 * row_loss * count))
    for name in ("log_ratio", "ratio", "kl", "loss"):
        check_float64(f"rows.{name}", reference.rows[name], exact.rows[name], scale)
    assert torch.equal(reference.rows["kept"], exact.rows["kept"])
    for name, value in reference.metrics.items():
        cancelled = max(1.0, 1e3 * row_loss) if name == "policy_loss" else 1.0
        check_float64(name, value, exact.metrics[name], scale * cancelled)
    check_float64("gradient", reference.grad, exact.grad, scale)


def yardstick_of(call: Call) -> tuple[Yardstick | None, str]:
    """What to hold answers to ``call`` against, or None and why the call is left out.

    Raises:
        AssertionError: the reference is not the textbook.
    """
    yardstick = Yardstick.of(call)
    if reason := out_of_range(call, yardstick.exact):
        return None, reason
    exact = yardstick.eager if compute_dtype(call) == torch.float64 else textbook(call)
    if not decidable(call, yardstick.eager, exact):
        return None, "too close to a bound for float32"
    check_reference(call, yardstick.exact, exact)
    return yardstick, ""


def seeded(seed: int) -> random.Random:
    """Choices that a number repeats."""
    return random.Random(seed)
