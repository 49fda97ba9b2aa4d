"""Everything a caller can get wrong, and the sentence that says so: which argument, what was got, what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support.calls import (
    META,
    SHAPE,
    STEP,
    B,
    guard_loss,
    latents,
    mean_loss,
    silent_step,
    statistics,
    step,
    velocity_loss,
)

import flowdppo_fast as fast
from flowdppo_fast.backend import problem, triton_interpreted
from flowdppo_fast.integrations._rows import clip_pair


class Wrong(NamedTuple):
    """A wrong call, the error it has to raise, and what the message has to say (the argument first)."""

    call: Callable
    error: type[Exception] | tuple[type[Exception], ...]
    says: tuple[str, ...]


EITHER = (TypeError, ValueError)
GRAD = {"requires_grad": True}
TABLE: dict[str, Wrong] = {
    # latents
    "velocity no tensor": Wrong(lambda: velocity_loss(velocity=[1.0]), TypeError, ("velocity", "list", "tensor")),
    "velocity missing rows": Wrong(
        lambda: velocity_loss(velocity=latents(3, 3, 5)), ValueError, ("velocity", "[3, 3, 5]", "[4]", "advantages")
    ),
    "no latent dim": Wrong(
        lambda: velocity_loss(velocity=latents(4), old_velocity=latents(4), noise=latents(4)),
        ValueError,
        ("velocity", "[4]", "at least one latent dim"),
    ),
    "no latent element": Wrong(
        lambda: velocity_loss(velocity=latents(4, 0), old_velocity=latents(4, 0), noise=latents(4, 0)),
        ValueError,
        ("velocity", "[4, 0]", "at least one element"),
    ),
    "integer velocity": Wrong(
        lambda: velocity_loss(velocity=latents(dtype=torch.int64)), TypeError, ("velocity", "int64", "float32")
    ),
    "complex velocity": Wrong(
        lambda: velocity_loss(velocity=latents(dtype=torch.complex64)), TypeError, ("velocity", "complex64", "bfloat16")
    ),
    "old velocity shape": Wrong(
        lambda: velocity_loss(old_velocity=latents(4, 3, 4)), ValueError, ("old_velocity", "[4, 3, 4]", "[4, 3, 5]")
    ),
    "old velocity None": Wrong(lambda: velocity_loss(old_velocity=None), TypeError, ("old_velocity", "None")),
    "means None": Wrong(
        lambda: mean_loss(old_prev_sample_mean=None), TypeError, ("old_prev_sample_mean", "None", "tensor")
    ),
    "next state None": Wrong(lambda: mean_loss(prev_sample=None), TypeError, ("prev_sample", "None", "tensor")),
    "statistics old None": Wrong(lambda: statistics(old_velocity=None), TypeError, ("old_velocity", "None")),
    "statistics noise None": Wrong(lambda: statistics(noise=None), TypeError, ("noise", "None", "PhiloxNoise")),
    "step velocity None": Wrong(lambda: step(velocity=None), TypeError, ("velocity", "None", "tensor")),
    "old velocity dtype": Wrong(
        lambda: velocity_loss(old_velocity=latents(dtype=torch.int32)), TypeError, ("old_velocity", "int32", "float32")
    ),
    "old velocity device": Wrong(
        lambda: velocity_loss(old_velocity=latents(device=META)), ValueError, ("old_velocity", "meta", "cpu")
    ),
    "velocity device": Wrong(
        lambda: velocity_loss(velocity=latents(device=META)), ValueError, ("old_velocity", "cpu", "meta")
    ),
    "noise shape": Wrong(lambda: velocity_loss(noise=latents(4, 15)), ValueError, ("noise", "[4, 15]", "[4, 3, 5]")),
    "noise None": Wrong(lambda: velocity_loss(noise=None), TypeError, ("noise", "None", "PhiloxNoise")),
    "noise number": Wrong(lambda: velocity_loss(noise=3), TypeError, ("noise", "int", "tensor")),
    "reference device": Wrong(
        lambda: velocity_loss(reference_velocity=latents(device=META), kl_weight=0.1),
        ValueError,
        ("reference_velocity", "meta", "cpu"),
    ),
    "float64 beside float32": Wrong(
        lambda: velocity_loss(old_velocity=latents(dtype=torch.float64)),
        TypeError,
        ("old_velocity", "float64", "velocity", "float32", "convert"),
    ),
    "float32 beside float64": Wrong(
        lambda: velocity_loss(velocity=latents(dtype=torch.float64), old_velocity=latents(dtype=torch.float64)),
        TypeError,
        ("noise", "float32", "float64", "convert"),
    ),
    "means shape": Wrong(
        lambda: mean_loss(old_prev_sample_mean=latents(4, 15)), ValueError, ("old_prev_sample_mean", "[4, 15]")
    ),
    "next state is seeded noise": Wrong(
        lambda: mean_loss(prev_sample=fast.PhiloxNoise(1)), TypeError, ("prev_sample", "PhiloxNoise", "tensor")
    ),
    "next state dtype": Wrong(
        lambda: mean_loss(prev_sample=latents(dtype=torch.float64)), TypeError, ("prev_sample", "float64", "convert")
    ),
    # rows
    "advantages list": Wrong(lambda: velocity_loss(advantages=[0.0] * 4), TypeError, ("advantages", "list", "[B]")),
    "advantages 0-d": Wrong(
        lambda: velocity_loss(advantages=torch.tensor(1.0)), ValueError, ("advantages", "0-d", "[B] or [B, S]")
    ),
    "advantages too many dims": Wrong(
        lambda: velocity_loss(advantages=torch.zeros(SHAPE)), ValueError, ("velocity", "[4, 3, 5]", "latent dim")
    ),
    "advantages integer": Wrong(
        lambda: velocity_loss(advantages=torch.zeros(4, dtype=torch.int64)),
        TypeError,
        ("advantages", "int64", "floating-point"),
    ),
    "advantages device": Wrong(
        lambda: velocity_loss(advantages=torch.zeros(4, device=META)), ValueError, ("advantages", "meta", "cpu")
    ),
    **{
        f"{name} {what}": Wrong(lambda name=name, value=value: velocity_loss(**{name: value}), error, (name, *says))
        for name in ("row_weights", "old_log_prob")
        for what, value, error, says in [
            ("shape", torch.zeros(3), ValueError, ("[3]", "[4]")),
            ("latent shaped", latents(), ValueError, ("[4, 3, 5]", "[4]")),
            ("integer", torch.zeros(4, dtype=torch.int32), TypeError, ("int32", "floating-point")),
            ("device", torch.zeros(4, device=META), ValueError, ("meta", "cpu")),
            ("number", 1.0, TypeError, ("float", "tensor")),
        ]
    },
    # gradients flow into the first argument only
    **{
        f"{name} requires grad": Wrong(
            lambda name=name, value=value: velocity_loss(**{name: value}),
            ValueError,
            (name, "requires grad", "detach()"),
        )
        for name, value in [
            ("old_velocity", latents(**GRAD)),
            ("noise", latents(**GRAD)),
            ("reference_velocity", latents(**GRAD)),
            ("advantages", torch.zeros(4, **GRAD)),
            ("row_weights", torch.zeros(4, **GRAD)),
            ("old_log_prob", torch.zeros(4, **GRAD)),
        ]
    },
    **{
        f"{name} requires grad": Wrong(
            lambda name=name, value=value: guard_loss(**{"dt": -0.1, name: value}),
            ValueError,
            (name, "requires grad", "detach()"),
        )
        for name, value in [
            ("old_prev_sample_mean", latents(**GRAD)),
            ("prev_sample", latents(**GRAD)),
            ("reference_prev_sample_mean", latents(**GRAD)),
            ("std", torch.ones(4, **GRAD)),
            ("dt", torch.full((4,), -0.1, **GRAD)),
        ]
    },
    "statistics old velocity requires grad": Wrong(
        lambda: statistics(old_velocity=latents(**GRAD)), ValueError, ("old_velocity", "requires grad", "detach()")
    ),
    **{
        f"step {name} requires grad": Wrong(
            lambda name=name: step(**{name: latents(**GRAD)}), ValueError, (name, "requires grad", "detach()")
        )
        for name in ("sample", "noise", "prev_sample")
    },
    # std and dt of the means form
    "std zero": Wrong(lambda: mean_loss(std=0.0), ValueError, ("std", "0.0", "> 0")),
    "std negative": Wrong(lambda: mean_loss(std=-0.1), ValueError, ("std", "-0.1", "> 0")),
    "std nan": Wrong(lambda: mean_loss(std=math.nan), ValueError, ("std", "nan", "> 0")),
    "std None": Wrong(lambda: mean_loss(std=None), EITHER, ("std", "None", "expected")),
    "std list": Wrong(lambda: mean_loss(std=[0.1] * 4), EITHER, ("std", "list", "expected")),
    "std shape": Wrong(lambda: mean_loss(std=torch.ones(3)), ValueError, ("std", "[3]", "[4]", "broadcasts")),
    "std latent shaped": Wrong(lambda: mean_loss(std=torch.ones(SHAPE)), ValueError, ("std", "[4, 3, 5]", "[4]")),
    "std integer": Wrong(
        lambda: mean_loss(std=torch.ones(4, dtype=torch.int64)), TypeError, ("std", "int64", "floating-point")
    ),
    "std device": Wrong(lambda: mean_loss(std=torch.ones(4, device=META)), ValueError, ("std", "meta", "cpu")),
    "std negative beside a dt tensor": Wrong(
        lambda: guard_loss(std=-0.1, dt=torch.full((4,), -0.1)),
        ValueError,
        ("std", "-0.1", "> 0"),
    ),
    "dt positive": Wrong(
        lambda: guard_loss(dt=0.1), ValueError, ("dt", "0.1", "sigma_next - sigma", "< 0")
    ),
    "dt zero": Wrong(lambda: guard_loss(dt=0.0), ValueError, ("dt", "0.0", "< 0")),
    "dt positive beside a std tensor": Wrong(
        lambda: guard_loss(std=torch.ones(4), dt=0.1), ValueError, ("dt", "0.1", "< 0")
    ),
    "dt shape": Wrong(
        lambda: guard_loss(dt=torch.ones(5)), ValueError, ("dt", "[5]", "[4]")
    ),
    "dt device": Wrong(
        lambda: guard_loss(dt=torch.ones(4, device=META)), ValueError, ("dt", "meta", "cpu")
    ),
    "dt missing for the guard": Wrong(
        lambda: guard_loss(),
        ValueError,
        ("dt", "None", "GRPO-Guard", "sigma_next - sigma"),
    ),
    "dt missing for the reference": Wrong(
        lambda: mean_loss(reference_prev_sample_mean=latents(), kl_weight=0.1, reference_kl="without_dt"),
        ValueError,
        ("dt", "None", "without_dt", "sigma_next - sigma"),
    ),
    "dt missing for the reference metric": Wrong(
        lambda: mean_loss(reference_prev_sample_mean=latents(), reference_kl="without_dt"),
        ValueError,
        ("dt", "None", "without_dt", "sigma_next - sigma"),
    ),
    # the step of the velocity form
    "step a number": Wrong(lambda: velocity_loss(step=0.1), TypeError, ("step", "float", "SDEStep")),
    "step None": Wrong(lambda: velocity_loss(step=None), TypeError, ("step", "NoneType", "SDEStep")),
    "steps too many": Wrong(
        lambda: velocity_loss(step=fast.SDEStep.stack([STEP] * 3)), ValueError, ("step", "[3]", "[4]", "broadcasts")
    ),
    "step without noise (ode)": Wrong(
        lambda: velocity_loss(step=silent_step("ode", 0.6)), ValueError, ("step", "'ode'", "0.7", "0.6", "no noise")
    ),
    "step without noise (cps at 0)": Wrong(
        lambda: velocity_loss(step=silent_step("cps", 0.0)), ValueError, ("step", "'cps'", "0.7", "sigma_next=0")
    ),
    "step without noise (eta 0)": Wrong(
        lambda: velocity_loss(step=silent_step("flow_sde", 0.6, eta=0.0)), ValueError, ("step", "'flow_sde'", "eta")
    ),
    "one stacked step without noise": Wrong(
        lambda: velocity_loss(step=fast.SDEStep.stack([STEP, STEP, silent_step("dance", 0.5, eta=0.0), STEP])),
        ValueError,
        ("step 2", "'dance'", "0.7", "0.5"),
    ),
    "statistics without noise": Wrong(
        lambda: statistics(step=silent_step("ode", 0.6)), ValueError, ("step", "'ode'", "no density")
    ),
    # choices and numbers
    "objective by name": Wrong(
        lambda: velocity_loss(fast.fused_policy_velocity_loss, objective="dppo"),
        TypeError,
        ("objective", "str", "DPPO"),
    ),
    "objective class": Wrong(
        lambda: mean_loss(fast.fused_policy_loss, objective=fast.DPPO), TypeError, ("objective", "type", "DPPO")
    ),
    **{
        f"{name} unknown": Wrong(
            lambda name=name: velocity_loss(**{name: "avg"}), ValueError, (name, "'avg'", *choices)
        )
        for name, choices in {
            "reduction": ("'mean'", "'kept'", "'sum'", "'none'"),
            "latent_reduction": ("'mean'", "'sum'"),
            "log_prob": ("'gaussian'", "'unnormalized'"),
            "reference_kl": ("'gaussian'", "'without_dt'", "'velocity_mse'", "'mean_mse'"),
            "trust_region": ("'kl'", "'mean_drift'", "'velocity_drift'"),
            "backend": ("'auto'", "'reference'", "'cpu'", "'triton'", "'cuda'"),
        }.items()
    },
    "guard bias unknown": Wrong(lambda: fast.GRPOGuard(bias="all"), ValueError, ("bias", "'all'", "'row'", "'batch'")),
    "velocity drift on means": Wrong(
        lambda: mean_loss(trust_region="velocity_drift"), ValueError, ("trust_region", "velocities", "mean_drift")
    ),
    **{
        f"threshold {value}": Wrong(
            lambda value=value: velocity_loss(threshold=value), EITHER, ("threshold", repr(value), "> 0")
        )
        for value in (0.0, -1e-5, math.nan, "1e-5", None)
    },
    "threshold tensor": Wrong(
        lambda: velocity_loss(threshold=torch.tensor(1e-5)), EITHER, ("threshold", "tensor", "number > 0")
    ),
    **{
        f"advantage_clip {value}": Wrong(
            lambda value=value: velocity_loss(advantage_clip=value), EITHER, ("advantage_clip", repr(value), "> 0")
        )
        for value in (0.0, -5.0, math.nan, "5")
    },
    **{
        f"kl_weight {value}": Wrong(
            lambda value=value: velocity_loss(kl_weight=value), EITHER, ("kl_weight", repr(value), ">= 0")
        )
        for value in (-0.1, math.nan, "0.1")
    },
    **{
        f"{name} {value} where a number is equal": Wrong(
            lambda name=name, value=value: velocity_loss(reference_velocity=latents(), **{name: value}),
            ValueError,
            (name, repr(value), "expected"),
        )
        for name, value in [("kl_weight", False), ("kl_weight", True), ("advantage_clip", True), ("threshold", True)]
    },
    **{
        f"{name} {value!r} without a hash": Wrong(
            lambda name=name, value=value: velocity_loss(**{name: value}), ValueError, (name, repr(value), "expected")
        )
        for name, value in [("reduction", ["mean"]), ("log_prob", {}), ("kl_weight", [0.0]), ("trust_region", ["kl"])]
    },
    "kl_weight without a reference": Wrong(
        lambda: velocity_loss(kl_weight=0.1), ValueError, ("kl_weight", "without a reference")
    ),
    **{
        f"clip range {value}": Wrong(
            lambda value=value: clip_pair(value), EITHER, ("clip_range", str(value), "expected")
        )
        for value in (0.0, -1e-4, 1.5, (1e-4, -1.0), (1e-4,), (1e-4, 1e-4, 1e-4), "1e-4", None)
    },
    "low of a clip": Wrong(lambda: fast.RatioClip(low=1.0), ValueError, ("low", "1.0", "(0, 1)")),
    "high of a clip": Wrong(lambda: fast.RatioClip(high=0.0), ValueError, ("high", "0.0", "> 0")),
    "low of a guard": Wrong(lambda: fast.GRPOGuard(low=-1.0), ValueError, ("low", "-1.0", "(0, 1)")),
    "guard batch bias without reduction": Wrong(
        lambda: velocity_loss(
            fast.fused_policy_velocity_loss, objective=fast.GRPOGuard(bias="batch"), reduction="none"
        ),
        ValueError,
        ("reduction", "bias='batch'", "'none'", "'mean'"),
    ),
    "single pass without reduction": Wrong(
        lambda: velocity_loss(single_pass=True, reduction="none"), ValueError, ("reduction", "'none'", "single-pass")
    ),
    "objective missing": Wrong(lambda: velocity_loss(fast.fused_policy_velocity_loss), TypeError, ("objective",)),
    "single pass a word": Wrong(
        lambda: velocity_loss(single_pass="auto"), ValueError, ("single_pass", "'auto'", "True or False")
    ),
    "module with a wrong setting": Wrong(
        lambda: fast.FlowDPPOLoss(kl_weight=-1.0), ValueError, ("kl_weight", "-1.0", ">= 0")
    ),
    "unknown option": Wrong(lambda: velocity_loss(treshold=1e-5), TypeError, ("treshold",)),
    # the primitive and the sampler step
    "statistics rows": Wrong(lambda: statistics(row_dims=3), ValueError, ("row_dims", "3", "1 or 2")),
    "statistics velocity": Wrong(lambda: statistics(velocity=None), TypeError, ("velocity", "NoneType", "tensor")),
    "statistics old shape": Wrong(
        lambda: statistics(old_velocity=latents(4, 15)), ValueError, ("old_velocity", "[4, 15]", "[4, 3, 5]")
    ),
    "sample no tensor": Wrong(lambda: step(sample=1.0), TypeError, ("sample", "float", "tensor")),
    "sample rank": Wrong(lambda: step(sample=latents(4), velocity=latents(4)), ValueError, ("sample", "latent dim")),
    "step velocity shape": Wrong(lambda: step(velocity=latents(4, 15)), ValueError, ("velocity", "[4, 15]", "sample")),
    "step velocity device": Wrong(lambda: step(velocity=latents(device=META)), ValueError, ("velocity", "meta", "cpu")),
    "step velocity float64": Wrong(
        lambda: step(velocity=latents(dtype=torch.float64)), TypeError, ("velocity", "float64", "convert")
    ),
    "step no SDEStep": Wrong(lambda: step(step="flow_sde"), TypeError, ("step", "str", "SDEStep")),
    "step rows": Wrong(lambda: step(row_dims=0), ValueError, ("row_dims", "0", "1 or 2")),
    "step log_prob": Wrong(lambda: step(log_prob=True), ValueError, ("log_prob", "True", "'gaussian'")),
    "step noise and prev_sample": Wrong(
        lambda: step(noise=latents(), prev_sample=latents()), ValueError, ("prev_sample", "noise", "one source")
    ),
    "step generator and prev_sample": Wrong(
        lambda: step(generator=torch.Generator(), prev_sample=latents()), ValueError, ("prev_sample", "generator")
    ),
    "step noise and generator": Wrong(
        lambda: step(noise=latents(), generator=torch.Generator()), ValueError, ("generator", "noise")
    ),
    "step generators": Wrong(
        lambda: step(generator=[torch.Generator()] * 3), ValueError, ("generator", "3 generators", "4")
    ),
    "step generator a seed": Wrong(lambda: step(generator=42), TypeError, ("generator", "int", "torch.Generator")),
    "step dtype integer": Wrong(lambda: step(dtype=torch.int32), TypeError, ("dtype", "int32", "float32")),
    "step dtype float64": Wrong(lambda: step(dtype=torch.float64), TypeError, ("dtype", "float64", "float32")),
    "step noise device": Wrong(lambda: step(noise=latents(device=META)), ValueError, ("noise", "meta", "cpu")),
    # seeded noise
    "stream dtype": Wrong(
        lambda: fast.PhiloxNoise(1, torch.zeros(4, dtype=torch.int32)), TypeError, ("stream", "int32", "int64")
    ),
    "stream float": Wrong(lambda: fast.PhiloxNoise(1, 2.0), TypeError, ("stream", "float", "int")),
    "seed float": Wrong(lambda: fast.PhiloxNoise(1.0), TypeError, ("seed", "float", "int")),
    "stream shape": Wrong(
        lambda: velocity_loss(noise=fast.PhiloxNoise(1, torch.zeros(3, dtype=torch.int64))),
        ValueError,
        ("noise", "[3]", "[4]"),
    ),
    "stream device": Wrong(
        lambda: velocity_loss(noise=fast.PhiloxNoise(1, torch.zeros(4, dtype=torch.int64, device=META))),
        ValueError,
        ("noise", "meta", "cpu"),
    ),
    # steps
    "sampler": Wrong(
        lambda: fast.SDEStep.from_sigmas("euler", 0.7, 0.6), ValueError, ("sampler", "'euler'", "'flow_sde'", "'cps'")
    ),
    **{
        f"levels {a} -> {b}": Wrong(
            lambda a=a, b=b: fast.SDEStep.from_sigmas("dance", a, b), ValueError, ("sigma", f"{a:g} -> {b:g}", "<= 1")
        )
        for a, b in [(0.6, 0.7), (0.6, 0.6), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.5), (0.5, math.nan), (700.0, 600.0)]
    },
    **{
        f"eta {eta} of {sampler}": Wrong(
            lambda sampler=sampler, eta=eta: fast.SDEStep.from_sigmas(sampler, 0.7, 0.6, eta=eta),
            ValueError,
            ("eta", f"{eta:g}", ">= 0"),
        )
        for sampler, eta in [("dance", -0.1), ("cps", 2.0), ("flow_sde", math.nan), ("cps", math.nan)]
    },
    "schedule missing for wan": Wrong(
        lambda: fast.SDEStep.from_sigmas("wan", 0.7, 0.6),
        ValueError,
        ("schedule", "'wan'", "ScheduleLevels.from_sigmas")
    ),
    "schedule missing at 1": Wrong(
        lambda: fast.SDEStep.from_sigmas("flow_sde", 1.0, 0.9), ValueError, ("schedule", "'flow_sde'", "sigma=1")
    ),
    "schedule too short": Wrong(lambda: fast.ScheduleLevels.from_sigmas([1.0]), ValueError, ("sigmas", "1", "2")),
    "schedule of one level": Wrong(lambda: fast.sde_schedule("dance", [1.0]), ValueError, ("sigmas", "1", "2")),
    "schedule ascending": Wrong(
        lambda: fast.sde_schedule("dance", [0.0, 0.5, 1.0]), ValueError, ("sigma", "0 -> 0.5", "sigma_next < sigma")
    ),
    "stack of nothing": Wrong(lambda: fast.SDEStep.stack([]), ValueError, ("steps", "none", "at least one")),
    "stack of numbers": Wrong(lambda: fast.SDEStep.stack([0.1]), TypeError, ("steps", "float", "SDEStep")),
    "custom step with negative std": Wrong(lambda: fast.SDEStep(1.0, -0.1, -0.1, -0.1), ValueError, ("std", "-0.1")),
    "custom step that goes up": Wrong(lambda: fast.SDEStep(1.0, -0.1, 0.1, 0.1), ValueError, ("dt", "0.1", "< 0")),
    "sde_type": Wrong(
        lambda: fast.sde_step_with_logprob(None, latents(), torch.zeros(4), latents(), sde_type="ode"),
        ValueError,
        ("sde_type", "'ode'", "'sde'", "'cps'"),
    ),
    # backends by name
    "cpu backend elsewhere": Wrong(
        lambda: velocity_loss(
            velocity=latents(device=META), old_velocity=latents(device=META), noise=latents(device=META),
            advantages=torch.zeros(4, device=META), backend="cpu",
        ),
        RuntimeError,
        ("backend='cpu'", "cannot run", "CPU tensors", "'meta'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_wrong_call_is_refused_in_one_clear_sentence(name):
    call, error, says = TABLE[name]
    # what right calls have been found to be is kept, and must not let a wrong one through
    velocity_loss()
    mean_loss()
    guard_loss(dt=-0.1)
    statistics()
    step()
    with pytest.raises(error):
        call()
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    missing = [word for word in says if word not in message]
    assert not missing, f"{message!r} does not say {missing}"
    assert "\n" not in message
    assert len(message) < 360


@pytest.mark.skipif(triton_interpreted(), reason="TRITON_INTERPRET=1 lets Triton kernels run on CPU tensors")
def test_triton_by_name_on_cpu_tensors():
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*(GPU tensors|not installed)"):
        velocity_loss(backend="triton")


def test_missing_build_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("flowdppo_fast.backend._CPU_PROBLEM", "the C++ library is not built; install with ...")
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run: the C\+\+ library is not built; install"):
        velocity_loss(backend="cpu")
    assert problem("reference", "cpu") is None


@pytest.mark.parametrize("name", ["old_velocity", "noise", "reference_velocity"])
def test_gradients_do_not_matter_where_none_are_recorded(name):
    with torch.no_grad():
        out = velocity_loss(**{name: latents(**GRAD)})
    assert not out.loss.requires_grad


def test_a_checked_call_is_checked_again_when_gradients_are_recorded():
    """The same tensors are right where nothing is recorded and wrong where something is."""
    other = latents(**GRAD)
    with torch.no_grad():
        velocity_loss(old_velocity=other)
    with pytest.raises(ValueError, match="old_velocity: got a tensor that requires grad"):
        velocity_loss(old_velocity=other)


def test_settings_of_equal_numbers_are_told_apart():
    """What is kept for a number does not serve a bool that equals it, nor the other way round."""
    velocity_loss(reference_velocity=latents(), kl_weight=1.0, advantage_clip=1.0)
    for wrong in ({"kl_weight": True, "advantage_clip": 1.0}, {"advantage_clip": True, "kl_weight": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            velocity_loss(reference_velocity=latents(), **wrong)


def test_second_derivatives_are_refused():
    velocity = torch.randn(SHAPE, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    out = velocity_loss(velocity=velocity, advantages=torch.ones(B))
    (grad,) = torch.autograd.grad(out.loss * scale, velocity, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
