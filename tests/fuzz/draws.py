"""A random loss call, from a stream of choices: shapes, layouts, dtypes, samplers, objectives, options and scalars."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from support.cases import OBJECTIVES, bounded_call
from support.layouts import DENSE, LAYOUTS
from support.problems import MEAN_NAMES, STOCHASTIC, VELOCITY_NAMES, Call, library, make_problem, textbook

import flowdppo_fast as fast

T = TypeVar("T")


class Chooser(Protocol):
    """Where choices come from: ``random.Random``, or hypothesis."""

    def choice(self, options: Sequence[T]) -> T: ...

    def randint(self, low: int, high: int) -> int: ...

    def uniform(self, low: float, high: float) -> float: ...


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
    (2, 2, 3, 5),
    (129,),
    (1025,),
    (4, 17, 31),
)


def draw_call(choose: Chooser, device: str, *, float64: bool) -> tuple[Call, str]:
    """A call, and what was drawn in words."""
    rows, latent = choose.choice(ROWS), choose.choice(LATENTS)
    form = choose.choice(("velocity", "means"))
    objective = choose.choice(
        [name for name, case in OBJECTIVES.items() if form == "velocity" or not case.velocity_only]
    )
    sampler = choose.choice(STOCHASTIC)
    # the last step of cps has no density
    index: Any = choose.randint(0, 8)
    if choose.choice((False, True)):
        index = [choose.randint(0, 8) for _ in range(rows[-1])]
    reduce = choose.choice(("mean", "mean", "sum"))
    # policies so close that sums over latents stay in range
    drift = 10.0 ** choose.uniform(-4.0, -1.0 if reduce == "sum" else 0.0)
    problem = make_problem(rows, latent, sampler=sampler, index=index, drift=drift, seed=choose.randint(0, 2**31))

    double = float64 and choose.randint(0, 9) == 0
    dtypes = (torch.float64,) * 4 if double else tuple(choose.choice(DTYPES) for _ in range(4))
    if reduce == "sum" and dtypes[0] == torch.float16:
        # gradients of sums over thousands of elements leave its range
        dtypes = (torch.bfloat16, *dtypes[1:])
    options: dict[str, Any] = {"reduce": reduce}
    if form == "means":
        # a difference of means in sixteen bits is mostly rounding: documented, and not what is tested here
        dtypes = dtypes if double else (torch.float32,) * 4
        options["std_shape"] = choose.choice(("rows", "singleton"))
    names = VELOCITY_NAMES if form == "velocity" else MEAN_NAMES
    possible = list(LAYOUTS) if len(latent) > 1 else [name for name in DENSE if "channel" not in name]
    if len(rows) == 1:
        possible = [name for name in possible if name != "steps_first"]
    layout = {name: LAYOUTS[choose.choice(possible)] for name in names}
    if choose.choice((False, True)):
        options |= {"with_reference": True, "kl_weight": 10.0 ** choose.uniform(-3.0, 0.5)}
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
    kind = choose.choice(("mean", "mean", "sum", "none"))
    couples = objective == "grpo_guard_batch"
    options["reduction"] = "mean" if couples and kind == "none" else kind
    if options["reduction"] != "none" and choose.choice((False, True)):
        options["single_pass"] = True
    if form == "velocity" and choose.choice((False, False, True)):
        stream: Any = choose.randint(0, 2**40)
        if choose.choice((False, True)):
            stream = torch.tensor([choose.randint(0, 2**40) for _ in range(problem.advantages.numel())]).reshape(rows)
            stream = stream.to(device)
        options["noise"] = fast.PhiloxNoise(choose.randint(-(2**63), 2**63 - 1), stream)
    words = f"{form} {objective} {sampler} rows={rows} latent={latent} index={index} drift={drift:.2e} " + " ".join(
        f"{key}={value}" for key, value in options.items()
    )
    words += f" dtypes={[str(dtype)[6:] for dtype in dtypes]} layout={[lay.__name__ for lay in layout.values()]}"
    return bounded_call(problem, form, objective, dtypes=dtypes, layout=layout, device=device, **options), words


def in_range(call: Call) -> bool:
    """Whether float32 has room for the ratios: exp(88) is its largest number."""
    exact = library(call.upcast(), "reference").rows["log_ratio"].abs()
    return bool((exact < 80.0).all())


def decidable(call: Call) -> bool:
    """Whether no row is so close to a bound that the textbook in float32 puts it on the other side."""
    eager, exact = (textbook(call, dtype) for dtype in (torch.float32, torch.float64))
    counts = [name for name in exact.metrics if name.startswith("clipfrac") or name.endswith("fraction")]
    same = all(abs(float(eager.metrics[name]) - float(exact.metrics[name])) < 1e-6 for name in counts)
    return same and torch.equal(eager.rows["kept"], exact.rows["kept"])


def seeded(seed: int) -> random.Random:
    """Choices that a number repeats."""
    return random.Random(seed)
