"""The forward process: losses on noised samples whose residual is formed in the kernels, against their definition."""

from __future__ import annotations

import pytest
import torch
from support.layouts import LAYOUTS
from support.tolerance import check_float64, check_within, sum_bound

import flowdppo_fast as fast

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
OBJECTIVES = {
    "ratio_clip": lambda bound: fast.RatioClip(bound),
    "dppo": lambda bound: fast.DPPO(bound),
    "dppo_pulled": lambda bound: fast.DPPO(bound, trust_region="mean_drift", pull=0.5),
    "drpo": lambda bound: fast.DRPO(bound),
    "unclipped": lambda bound: fast.Unclipped(),
}


def tensors(rows, latent, dtype=F64, device="cpu", drift=0.2):
    g = torch.Generator().manual_seed(0)
    x0, noise, off, change = (torch.randn(*rows, *latent, generator=g, dtype=F64) for _ in range(4))
    old = noise - x0 + 0.5 * off
    velocity = old + drift * change
    advantages = torch.randn(rows, generator=g, dtype=F64).to(F64 if dtype == F64 else F32)
    return (*(x.to(device=device, dtype=dtype) for x in (velocity, old, x0, noise)), advantages.to(device))


def definition(velocity, old, x0, noise, row_dims):
    """Matching losses of both velocities, and half of their squared distance."""
    dims = tuple(range(row_dims, velocity.ndim))
    target = noise - x0
    new_loss, old_loss = (((v - target) ** 2).mean(dims) for v in (velocity, old))
    return new_loss, old_loss, ((velocity - old) ** 2).mean(dims) / 2.0


@pytest.fixture
def backend(backend):
    if backend.name == "cuda":
        pytest.skip("the cuda backend has no kernel for the forward process")
    return backend


def test_cuda_says_that_it_has_no_kernel_for_it(monkeypatch):
    monkeypatch.setattr("flowdppo_fast.backend.problem", lambda name, device: None)
    velocity, old, x0, noise, advantages = tensors((4,), (6,), F32)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: it has no kernel for the forward process"):
        fast.matching_loss(velocity, old, x0, noise, advantages, objective=fast.DPPO(), backend="cuda")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: it has no kernel for the forward process"):
        fast.matching_statistics(velocity, old, x0, noise, backend="cuda")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_those_of_the_definition(objective, rows, weighted):
    velocity, old, x0, noise, advantages = tensors(rows, (3, 5, 7))
    weight = 0.2 + torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=F64) if weighted else 1.0
    velocity.requires_grad_()
    new_loss, old_loss, kl = definition(velocity, old, x0, noise, len(rows))
    log_ratio = weight * (old_loss - new_loss)
    ratio, bound = torch.exp(log_ratio), 0.02
    divergence = weight * kl if objective == "dppo_pulled" else kl
    gone = (divergence >= bound) & (advantages * log_ratio > 0)
    row_loss = {
        "ratio_clip": torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - bound, 1.0 + bound)),
        "dppo": torch.where(gone, 0.0, -advantages * ratio),
        "dppo_pulled": torch.where(gone, 0.0, -advantages * ratio)
        + 0.5 * advantages.abs() * (divergence / bound - 1.0).clamp_min(0.0),
        "drpo": -advantages * ratio + advantages.abs() * kl / bound,
        "unclipped": -advantages * ratio,
    }[objective]
    if objective == "dppo":
        assert 0 < int(gone.sum()) < gone.numel()
    (wanted,) = torch.autograd.grad(row_loss.mean(), velocity)
    out = fast.matching_loss(
        velocity, old, x0, noise, advantages, objective=OBJECTIVES[objective](bound), weight=weight, backend="reference"
    )
    (grad,) = torch.autograd.grad(out.loss, velocity)
    check_float64("loss", out.loss.detach(), row_loss.mean().detach(), 4.0)
    check_float64("log-ratio", out.rows.log_ratio, log_ratio.detach(), 8.0)
    check_float64("kl", out.rows.kl, divergence.detach(), 4.0)
    check_float64("gradient", grad, wanted, 8.0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("numel", [1, 105, 16_387])
@pytest.mark.parametrize("seeded", [False, True])
def test_statistics(backend, dtype, numel, seeded):
    """As exact as sums of float32 products are; the residual is that of the stored numbers."""
    velocity, old, x0, noise, _ = tensors((5,), (numel,), dtype, backend.device)
    given = noise
    if seeded:
        given = fast.PhiloxNoise(3, 11)
        noise = given.materialize(velocity.shape, device=velocity.device, dtype=F32)
    found = fast.matching_statistics(velocity, old, x0, given, backend=backend.name)
    new, before, sample, drawn = (x.cpu().double() for x in (velocity, old, x0, noise))
    # the residual is rounded once more than its terms
    e, u = (drawn - sample) - before, new - before
    for name, value, terms in zip("PQE", found, (e * u, u * u, e * e)):
        allowed = sum_bound(terms, F32) + 8 * torch.finfo(F32).eps * terms.abs().mean(-1)
        # of a difference of numbers of a few
        allowed += 16 * torch.finfo(F32).eps * (u.abs() + 2.0 * e.abs() * (name == "E")).mean(-1)
        if seeded and backend.device != "cpu":
            allowed += 1e-4 * (u.abs() + 2.0 * e.abs()).mean(-1)
        assert bool(((value.cpu().double() - terms.mean(-1)).abs() <= allowed).all()), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("seeded", [False, True])
def test_backends_against_the_reference(backend, objective, dtype, single_pass, seeded):
    velocity, old, x0, noise, advantages = tensors((6,), (3, 41, 7), dtype, backend.device)
    given = fast.PhiloxNoise(3, 11) if seeded else noise
    weight = torch.linspace(0.2, 1.0, 6)

    def answer(name, *latents, given, advantages, weight):
        new = latents[0].clone().requires_grad_()
        out = fast.matching_loss(
            new, *latents[1:], given, advantages, objective=OBJECTIVES[objective](0.013), weight=weight,
            single_pass=single_pass, backend=name,
        )  # fmt: skip
        out.loss.backward()
        return out, new.grad

    out, grad = answer(
        backend.name, velocity, old, x0, given=given, advantages=advantages, weight=weight.to(backend.device)
    )
    wide = [x.cpu().double() for x in (velocity, old, x0)]
    exact, wanted = answer(
        "reference", *wide, given=given if seeded else noise.cpu().double(), advantages=advantages.cpu().double(),
        weight=weight.double(),
    )  # fmt: skip
    assert out.backend == backend.name
    assert torch.equal(out.rows.kept.cpu(), exact.rows.kept)
    slack = 64 * torch.finfo(F32).eps + (1e-4 if seeded and backend.device != "cpu" else 0.0)
    for name in ("log_ratio", "ratio", "kl", "loss"):
        value, want = getattr(out.rows, name).cpu(), getattr(exact.rows, name)
        check_within(name, value, want, slack * (1.0 + float(want.abs().max())), F32)
    check_within("gradient", grad.cpu(), wanted, slack * float(wanted.abs().max()), F32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, layout):
    plain = tensors((2, 3), (3, 4, 5), F32, backend.device)
    *laid, advantages = (LAYOUTS[layout](x, 2) if x.ndim > 2 else x for x in plain)
    results = []
    for latents in (plain[:4], laid):
        new = latents[0].detach().requires_grad_()
        out = fast.matching_loss(new, *latents[1:], advantages, objective=fast.DPPO(0.02), backend=backend.name)
        results.append((out, torch.autograd.grad(out.loss, new)[0]))
    (one, gradient), (other, same) = results
    torch.testing.assert_close(other.row_results, one.row_results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, gradient, rtol=1e-5, atol=1e-7)


def test_dropped_rows_have_no_gradient_whatever_they_hold(backend):
    velocity, old, x0, noise, advantages = tensors((4,), (37,), F32, backend.device)
    velocity[1] = 1e30
    advantages[1] = -1.0
    out = fast.matching_loss(
        velocity, old, x0, noise, advantages, objective=fast.DPPO(0.02), backend=backend.name, single_pass=True
    )
    assert not out.rows.kept[1]
    assert out.grad[1].count_nonzero() == 0
    assert torch.isfinite(out.grad).all()


@pytest.mark.parametrize("where", ["velocity", "old_velocity", "x0", "noise"])
def test_nan_reaches_the_loss(backend, where):
    given = dict(zip(("velocity", "old_velocity", "x0", "noise"), tensors((4,), (37,), F32, backend.device)))
    advantages = torch.ones(4, device=backend.device)
    given[where][2, 3] = torch.nan
    out = fast.matching_loss(**given, advantages=advantages, objective=fast.DPPO(10.0), backend=backend.name)
    assert out.loss.isnan()
    assert out.metrics()["nonfinite_rows"] == 1.0


def test_gradients_of_the_statistics(backend):
    if not backend.float64:
        pytest.skip(f"{backend.name} makes no promise for float64")
    velocity, old, x0, noise, _ = tensors((2, 2), (3,))

    def statistics(new):
        return fast.matching_statistics(new, old, x0, noise, row_dims=2, backend=backend.name)[:2]

    assert torch.autograd.gradcheck(statistics, velocity.clone().requires_grad_())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objective": fast.GRPOGuard()}, ValueError, "objective: got GRPOGuard"),
        ({"weight": 0.0}, ValueError, "weight: got 0.0, expected a number > 0"),
        ({"weight": torch.ones(3)}, ValueError, r"weight: got shape \[3\], expected something that broadcasts"),
        ({"x0": torch.zeros(4, 5)}, ValueError, r"x0: got shape \[4, 5\]"),
        ({"x0": torch.zeros(4, 6, requires_grad=True)}, ValueError, "x0: got a tensor that requires grad"),
        ({"noise": 3}, TypeError, "noise: got int"),
        ({"objective": 3}, TypeError, "objective: got int"),
        ({"reduction": "max"}, ValueError, "reduction: got 'max'"),
    ],
)
def test_wrong_calls(change, error, message):
    velocity, old, x0, noise, advantages = tensors((4,), (6,), F32)
    given = {"velocity": velocity, "old_velocity": old, "x0": x0, "noise": noise, "advantages": advantages}
    with pytest.raises(error, match=message):
        fast.matching_loss(**{"objective": fast.DPPO(), **given, **change})
