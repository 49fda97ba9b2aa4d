"""What a loss call returns, and how it behaves in a training loop."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.cases import FORM_OBJECTIVES, OBJECTIVES, bounded_call
from support.problems import library, make_problem
from support.tolerance import sum_bound
from torch._subclasses.fake_tensor import FakeTensorMode

import flowdppo_fast as fast

PUBLIC = {
    "BACKENDS", "DPPO", "DRPO", "FlowDPPOLoss", "GRPOGuard", "KLPenalty", "LogHinge", "LossMetrics", "LossOutput",
    "PhiloxNoise", "RatioClip", "RowResults", "SAMPLERS", "SDEStep", "ScheduleLevels", "Unclipped", "build_info",
    "fused_dppo_loss", "fused_dppo_velocity_loss", "fused_policy_loss", "fused_policy_velocity_loss", "matching_loss",
    "matching_statistics", "resolve_backend", "row_statistics", "sde_schedule", "sde_step", "sde_step_with_logprob",
}  # fmt: skip
COMMON = {
    "policy_loss", "ratio_mean", "ratio_std", "ratio_min", "ratio_max", "approx_kl", "kl_new_old_mean",
    "kl_new_old_max", "masked_fraction", "unmasked_fraction", "drift_mean", "nonfinite_rows",
}  # fmt: skip
MASK = {"kl_mask_fraction", "pos_rm_fraction", "neg_rm_fraction"}
CLIP = {"clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"}
OWN = {
    "dppo": MASK, "dppo_symmetric": MASK, "ratio_clip": CLIP, "grpo_guard": CLIP, "unclipped": set(),
    "dppo_clipped": MASK | CLIP, "dppo_pulled": MASK, "kl_penalty": set(), "drpo": {"kl_mask_fraction"},
    "drpo_ratio": {"kl_mask_fraction"}, "log_hinge": set(),
}  # fmt: skip


def velocity_loss(backend, problem, objective, dtype=torch.float32, **options):
    """The loss, its velocity leaf, and the stored tensors."""
    velocity, old, noise = (
        x.to(device=backend.device, dtype=dtype) for x in (problem.velocity, problem.old_velocity, problem.noise)
    )
    velocity.requires_grad_()
    advantages = problem.advantages.float().to(backend.device)
    out = fast.fused_policy_velocity_loss(
        velocity, old, noise, problem.step, advantages, objective=objective, backend=backend.name, **options
    )
    return out, velocity


def test_public_names():
    assert set(fast.__all__) == PUBLIC
    for name in PUBLIC:
        thing = getattr(fast, name)
        assert not callable(thing) or inspect.getdoc(thing), f"{name} has no docstring"


def test_signatures_that_others_rely_on():
    """The first arguments are positional and in this order; everything else goes by keyword."""

    def positional(function):
        kinds = inspect.signature(function).parameters.values()
        return [p.name for p in kinds if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    means = ["prev_sample_mean", "old_prev_sample_mean", "prev_sample", "std", "advantages"]
    velocities = ["velocity", "old_velocity", "noise", "step", "advantages"]
    for name in ("dppo", "policy"):
        assert positional(getattr(fast, f"fused_{name}_loss")) == means
        assert positional(getattr(fast, f"fused_{name}_velocity_loss")) == velocities
    assert inspect.signature(fast.fused_dppo_loss).parameters["threshold"].default == 1e-5


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("with_reference", [False, True])
def test_metric_names_are_the_peers(form, objective, with_reference):
    call = bounded_call(make_problem(), form, objective, with_reference=with_reference)
    expected = COMMON | OWN[OBJECTIVES[objective].rule] | ({"kl_ref_mean"} if with_reference else set())
    assert set(library(call, "reference").metrics) == expected


@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
def test_shapes_and_dtypes(backend, rows):
    out, _ = velocity_loss(backend, make_problem(rows), fast.DPPO(0.01), torch.bfloat16)
    assert out.loss.shape == ()
    assert out.loss.dtype == torch.float32
    assert out.backend == backend.name
    assert out.grad is None
    for name, value in out.rows._asdict().items():
        assert value.shape == rows
        assert value.dtype == (torch.bool if name == "kept" else torch.float32)
        assert not value.requires_grad
    for value in out.metrics().values():
        assert value.shape == ()
        assert value.device.type == backend.device
        assert not value.requires_grad
    floats = out.metrics().to_floats()
    assert floats == {name: value.item() for name, value in out.metrics().items()}
    assert all(type(value) is float for value in floats.values())
    assert fast.LossMetrics().to_floats() == {}


@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
@pytest.mark.parametrize("objective", [fast.DPPO(0.01), fast.GRPOGuard(0.02, 0.02)], ids=["dppo", "guard"])
def test_reductions_belong_together(backend, rows, objective):
    """Sum and mean of ``none``, and their gradients; ``.sum()`` sends ``none`` an expanded scalar."""
    losses, grads = {}, {}
    for reduction in ("mean", "sum", "none"):
        out, velocity = velocity_loss(backend, make_problem(rows), objective, reduction=reduction)
        losses[reduction] = out.loss.detach()
        out.loss.sum().backward()
        grads[reduction] = velocity.grad
        assert out.loss.shape == (rows if reduction == "none" else ())
        assert reduction != "none" or torch.equal(out.loss, out.rows.loss)
    # rows of both signs cancel: their sums are as good as their sizes allow
    terms = losses["none"].double().flatten()
    allowed = float(sum_bound(terms, torch.float32))
    assert abs(float(losses["mean"]) - float(terms.mean())) <= allowed
    assert abs(float(losses["sum"]) - float(terms.sum())) <= 8 * allowed
    tolerance = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(grads["sum"], grads["none"], **tolerance)
    torch.testing.assert_close(grads["mean"] * 8, grads["none"], **tolerance)


def test_upstream_of_row_losses_in_any_memory(backend):
    """Transposed, strided and expanded upstream gradients of ``reduction="none"``."""
    problem = make_problem((4, 2))
    weights = torch.randn(4, 2, device=backend.device)
    grads = []
    for form in (
        lambda loss: (loss * weights).sum(),
        lambda loss: (loss.T * weights.T.contiguous()).sum(),
        lambda loss: torch.stack((loss, loss), -1)[..., 1].mul(weights).sum(),
        lambda loss: loss.flatten() @ weights.flatten(),
    ):
        out, velocity = velocity_loss(backend, problem, fast.Unclipped(), reduction="none")
        form(out.loss).backward()
        grads.append(velocity.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_single_pass_equals_backward(backend, objective, reduction):
    options = {"dtypes": torch.bfloat16, "device": backend.device, "reduction": reduction}
    problem = make_problem((4, 2))
    call = bounded_call(problem, "velocity", objective, **options)
    two_passes = library(call, backend.name)
    call.options["single_pass"] = True
    one_pass = library(call, backend.name)
    torch.testing.assert_close(one_pass.loss, two_passes.loss, rtol=1e-6, atol=1e-7)
    # 1/R meets the coefficients in another order
    torch.testing.assert_close(one_pass.grad, two_passes.grad, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-9)
    for name, value in two_passes.rows.items():
        assert torch.equal(one_pass.rows[name], value)


def test_single_pass_feeds_a_backward(backend):
    problem = make_problem()
    weight = torch.ones((), device=backend.device, requires_grad=True)
    base = problem.velocity.float().to(backend.device)
    old, noise, advantages = (
        x.float().to(backend.device) for x in (problem.old_velocity, problem.noise, problem.advantages)
    )
    velocity = base * weight
    out = fast.fused_dppo_velocity_loss(
        velocity, old, noise, problem.step, advantages, single_pass=True, backend=backend.name
    )
    assert not out.grad.requires_grad
    velocity.backward(out.grad)
    through_model = weight.grad.clone()
    weight.grad = None
    fast.fused_dppo_velocity_loss(
        base * weight, old, noise, problem.step, advantages, backend=backend.name
    ).loss.backward()
    torch.testing.assert_close(through_model, weight.grad, rtol=1e-5, atol=1e-8)


def test_loss_may_be_scaled_in_place(backend):
    """It is a tensor of its own: metrics and rows keep their values."""
    out, _ = velocity_loss(backend, make_problem(), fast.Unclipped())
    before = out.metrics()["policy_loss"].clone()
    with torch.no_grad():
        out.loss.mul_(128.0)
    assert torch.equal(out.metrics()["policy_loss"], before)
    out, _ = velocity_loss(backend, make_problem(), fast.Unclipped(), reduction="none")
    rows = out.rows.loss.clone()
    with torch.no_grad():
        out.loss.zero_()
    assert torch.equal(out.rows.loss, rows)


def test_upstream_gradient_scales_the_gradient(backend):
    """Accumulation and loss scaling: powers of two pass exactly."""
    out, velocity = velocity_loss(backend, make_problem(), fast.DPPO(0.01))
    (plain,) = torch.autograd.grad(out.loss, velocity, retain_graph=True)
    (scaled,) = torch.autograd.grad(out.loss / 4, velocity, retain_graph=True)
    assert torch.equal(scaled, plain / 4)
    (zero,) = torch.autograd.grad(out.loss * 0, velocity, retain_graph=True)
    assert zero.count_nonzero() == 0
    (twice,) = torch.autograd.grad(out.loss, velocity)
    assert torch.equal(twice, plain)
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


def test_gradients_accumulate_over_micro_batches(backend):
    problem = make_problem()
    velocity, old, noise = (
        x.float().to(backend.device) for x in (problem.velocity, problem.old_velocity, problem.noise)
    )
    advantages = problem.advantages.float().to(backend.device)
    velocity.requires_grad_()

    def backward(part, scale):
        loss = fast.fused_dppo_velocity_loss(
            velocity[part], old[part], noise[part], problem.step, advantages[part], threshold=0.01, backend=backend.name
        ).loss
        (loss * scale).backward()

    backward(slice(None), 1.0)
    whole, velocity.grad = velocity.grad, None
    for start in range(0, 8, 2):
        backward(slice(start, start + 2), 0.25)
    torch.testing.assert_close(velocity.grad, whole, rtol=1e-6, atol=1e-9)


def test_nothing_is_recorded_without_a_reason(backend):
    with torch.no_grad():
        out, _ = velocity_loss(backend, make_problem(), fast.DPPO())
    assert out.loss.grad_fn is None
    problem = make_problem()
    tensors = [x.float().to(backend.device) for x in (problem.velocity, problem.old_velocity, problem.noise)]
    out = fast.fused_dppo_velocity_loss(
        *tensors, problem.step, problem.advantages.float().to(backend.device), backend=backend.name
    )
    assert not out.loss.requires_grad
    with torch.inference_mode():
        assert torch.isfinite(velocity_loss(backend, make_problem(), fast.DPPO())[0].loss)


def test_no_copy_of_the_latents_is_kept_for_the_backward(backend):
    """Saved for the backward: the user's own memory, and numbers of the size of the rows."""
    problem = make_problem((8,), (3, 16, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, velocity = velocity_loss(backend, problem, fast.DPPO(), single_pass=False)
    pointers = [x.data_ptr() for x in saved if x.numel() >= velocity.numel()]
    assert len(pointers) == 3
    assert velocity.data_ptr() in pointers
    assert sum(x.numel() for x in saved if x.numel() < velocity.numel()) <= 8 * 8 + 8 * 3
    out.loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_leaves_statistics_alone(backend, dtype):
    plain, plain_velocity = velocity_loss(backend, make_problem(), fast.DPPO(0.01), dtype)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out, velocity = velocity_loss(backend, make_problem(), fast.DPPO(0.01), dtype)
        old = velocity.detach()
        p, q = fast.row_statistics(velocity, old, old, make_problem().step, backend=backend.name)
    out.loss.backward()
    plain.loss.backward()
    assert out.loss.dtype == p.dtype == q.dtype == torch.float32
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(out.row_results, plain.row_results)
    assert torch.equal(velocity.grad, plain_velocity.grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("single_pass", [False, True])
def test_no_value_is_read_on_the_way(objective, single_pass):
    """Fake tensors have no values: an ``.item()``, a truth test or a data-dependent shape would raise."""
    case = OBJECTIVES[objective]
    # the numbers of a step are the host's own
    step = fast.SDEStep.stack([make_problem().step] * 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        velocity, old, noise = (torch.empty(4, 2, 3, 5, 7, dtype=torch.bfloat16) for _ in range(3))
        velocity.requires_grad_()
        rows = torch.empty(4, 2)
        out = fast.fused_policy_velocity_loss(
            velocity, old, noise, step, rows, objective=case.bounded(0.1)[0], row_weights=rows, reference_velocity=old,
            kl_weight=0.1, single_pass=single_pass, backend="reference",
        )  # fmt: skip
        if not single_pass:
            out.loss.backward()
        assert (out.grad if single_pass else velocity.grad).shape == velocity.shape
        assert set(out.metrics()) >= COMMON
        assert out.rows.kept.shape == (4, 2)
        if not case.velocity_only:
            std = torch.empty(4, 1)
            mean = fast.fused_policy_loss(
                velocity, old, noise, std, rows, objective=case.bounded(0.1)[0], dt=-std, backend="reference"
            )
            mean.loss.backward()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_host_sync_on_the_device(gpu_backend, objective):
    """Forward, backward, metrics and rows without one synchronisation; reading the metrics is the only one."""
    call = bounded_call(make_problem(), "velocity", objective, dtypes=torch.bfloat16, device="cuda")
    velocity, old, noise, _ = call.tensors.values()
    velocity.requires_grad_()

    def run():
        out = fast.fused_policy_velocity_loss(
            velocity, old, noise, call.step, call.advantages, objective=call.objective, backend=gpu_backend.name
        )
        out.loss.backward()
        return out.metrics(), out.rows

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_module_is_the_function_with_its_settings(backend):
    problem = make_problem((4,), (3, 5))
    device = backend.device
    velocity, old, noise = (x.float().to(device) for x in (problem.velocity, problem.old_velocity, problem.noise))
    rows = problem.advantages.float().to(device)
    settings = {
        "threshold": 1e-3, "symmetric": True, "trust_region": "velocity_drift", "kl_weight": 0.3,
        "reference_kl": "without_dt", "advantage_clip": 0.5, "reduction": "sum", "latent_reduction": "sum",
        "log_prob": "unnormalized", "single_pass": True, "backend": backend.name,
    }  # fmt: skip
    tensors = {"reference_velocity": old, "row_weights": rows.abs()}
    module = fast.FlowDPPOLoss(**settings)
    assert list(module.parameters()) == []
    assert "threshold=0.001" in repr(module)
    assert set(inspect.signature(fast.FlowDPPOLoss).parameters) == set(settings)
    out = module(velocity, old, noise, problem.step, rows, **tensors)
    expected = fast.fused_dppo_velocity_loss(velocity, old, noise, problem.step, rows, **settings, **tensors)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.row_results, expected.row_results)
    assert torch.equal(out.grad, expected.grad)
