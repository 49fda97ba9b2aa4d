"""Whatever memory the latents come in: same numbers, no copy where a row lies in one run, gradient laid out alike."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import FORMS, bounded_call
from support.compare import check_backend
from support.layouts import DENSE, EXPANDED, LAYOUTS, channels_last, trajectory_slice
from support.problems import MEAN_NAMES, VELOCITY_NAMES, library, make_problem

import flowdppo_fast as fast
from flowdppo_fast import autograd, losses

LATENTS = {"packed": (6, 5), "image": (3, 4, 5), "video": (2, 3, 4, 5)}
ROWS = [(4,), (1,), (2, 3), (1, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_same_numbers_in_every_layout(backend, form, rows, latent, layout):
    call = bounded_call(
        make_problem(rows, LATENTS[latent]), form, "dppo", dtypes=torch.float32, device=backend.device,
        layout=LAYOUTS[layout], with_reference=True, kl_weight=0.3,
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("single_pass", [False, True], ids=["backward", "single_pass"])
def test_same_numbers_in_bfloat16(backend, layout, single_pass):
    call = bounded_call(
        make_problem((2, 3), (3, 4, 5)), "velocity", "ratio_clip", dtypes=torch.bfloat16, device=backend.device,
        layout=LAYOUTS[layout], single_pass=single_pass,
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_layouts_may_differ_between_arguments(backend, form, layout):
    """The new policy's output channels-last, as convolutions make it; the stored rest in some other layout."""
    names = VELOCITY_NAMES if form == "velocity" else MEAN_NAMES
    layouts = {names[0]: channels_last, names[1]: LAYOUTS[layout], names[2]: trajectory_slice}
    call = bounded_call(
        make_problem((2, 3), (3, 4, 5)), form, "dppo", dtypes=torch.float32, device=backend.device, layout=layouts,
        with_reference=True, kl_weight=0.3,
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.parametrize("layout", EXPANDED)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_expanded_stored_tensors(backend, form, rows, layout):
    names = VELOCITY_NAMES if form == "velocity" else MEAN_NAMES
    lay = dict.fromkeys(names[1:], EXPANDED[layout])
    call = bounded_call(
        make_problem(rows, (3, 4, 5)), form, "unclipped", dtypes=torch.float32, device=backend.device, layout=lay,
        with_reference=True, kl_weight=0.3,
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.parametrize("layout", EXPANDED)
def test_gradient_of_an_expanded_velocity_is_the_sum(backend, layout):
    problem = make_problem((4,), (3, 4, 5))
    call = bounded_call(problem, "velocity", "unclipped", dtypes=torch.float32, device=backend.device)
    velocity, old, noise, _ = call.tensors.values()
    index = (slice(0, 1), ...) if layout == "expanded_rows" else (slice(None), *[slice(0, 1)] * 3)

    def gradient(expand):
        leaf = velocity[index].detach().clone().requires_grad_()
        x = expand(leaf)
        out = fast.fused_velocity_policy_loss(
            fast.Unclipped(), x, old, noise, problem.step, call.advantages, backend=backend.name
        )
        out.loss.backward()
        return leaf.grad

    torch.testing.assert_close(
        gradient(lambda leaf: leaf.expand(velocity.shape)),
        gradient(lambda leaf: leaf * torch.ones_like(velocity)),
        rtol=1e-5,
        atol=1e-9,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("single_pass", [False, True], ids=["backward", "single_pass"])
def test_gradient_has_dtype_shape_and_layout_of_the_input(backend, rows, dtype, layout, single_pass):
    call = bounded_call(
        make_problem(rows, (3, 4, 5)), "velocity", "dppo", dtypes=dtype, device=backend.device,
        layout=LAYOUTS[layout], single_pass=single_pass,
    )  # fmt: skip
    grad = library(call, backend.name).grad
    assert grad.dtype == dtype
    assert grad.shape == call.first.shape
    first_row = (0,) * len(rows)
    # empty_like keeps the order of dims in memory and packs them
    assert grad[first_row].stride() == torch.empty_like(call.first[first_row]).stride()


class Spy:
    """Stands between the front door and the operators, and keeps every tensor that goes through."""

    def __init__(self, monkeypatch):
        self.calls: dict[str, list[tuple]] = {}
        for module in (autograd, losses):
            monkeypatch.setattr(module, "operator", self._wrapped(module.operator))

    def _wrapped(self, operator):
        def lookup(op, backend, device_type):
            function = operator(op, backend, device_type)

            def spied(*args):
                self.calls.setdefault(op, []).append(args)
                return function(*args)

            return spied

        return lookup


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS | EXPANDED)
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("rows", [*ROWS, (4, 1)], ids=str)
@pytest.mark.parametrize("single_pass", [False, True], ids=["backward", "single_pass"])
def test_operators_see_rows_of_stride_one(spy, rows, latent, layout, single_pass):
    """The backends' contract: ``[R0, R1, N]`` with unit stride, and the user's own memory where it allows that."""
    lay = (LAYOUTS | EXPANDED)[layout]
    call = bounded_call(
        make_problem(rows, LATENTS[latent]), "velocity", "unclipped", dtypes=torch.float32, layout=lay,
        with_reference=True, kl_weight=0.3, single_pass=single_pass,
    )  # fmt: skip
    library(call, "reference")
    ops = {"policy_loss_and_grad"} if single_pass else {"policy_loss", "row_grad"}
    assert spy.calls.keys() == ops
    for op in ops:
        (args,) = spy.calls[op]
        for given, seen in zip(call.tensors.values(), args[:4], strict=True):
            assert seen.shape == (math.prod(rows[:-1]) if len(rows) > 1 else rows[0], *seen.shape[1:])
            assert seen.shape[0] * seen.shape[1] == math.prod(rows)
            assert seen.stride(2) == 1
            if layout in DENSE:
                assert seen.data_ptr() == given.data_ptr(), "a dense layout was copied"


def test_seeded_noise_keeps_logical_order(backend):
    """Element i of a stream is element i of the logical order, whatever memory the velocity lies in."""
    problem = make_problem((4,), (3, 4, 5))
    noise = fast.PhiloxNoise(11, 3)
    call = bounded_call(
        problem, "velocity", "dppo", dtypes=torch.float32, device=backend.device, layout=channels_last, noise=noise
    )
    check_backend(call, backend.name)


@pytest.mark.parametrize("shape", [(4, 1, 1, 7), (4, 1, 6, 1), (4, 3, 1, 1), (1, 1, 1, 1), (1, 3, 4, 5)], ids=str)
def test_dims_of_size_one(backend, shape):
    """Strides of such dims mean nothing; torch leaves any number there."""
    call = bounded_call(
        make_problem(shape[:1], shape[1:]), "velocity", "unclipped", dtypes=torch.float32, device=backend.device,
        layout=channels_last,
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.bits(across="layout")
def test_seeded_noise_keeps_the_layout_of_the_gradient(backend):
    """Draws belong to logical positions, so channels-last velocities are read through a copy; the gradient is not."""
    device = backend.device
    velocity = torch.randn(4, 3, 4, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
    old, noise = velocity.detach() + 0.01, fast.PhiloxNoise(5, 2)
    step, advantages = fast.SDEStep.from_sigmas("dance", 0.7, 0.6), torch.ones(4, device=device)
    out = fast.fused_dppo_velocity_loss(velocity, old, noise, step, advantages, backend=backend.name)
    (grad,) = torch.autograd.grad(out.loss, velocity)
    single = fast.fused_dppo_velocity_loss(
        velocity, old, noise, step, advantages, single_pass=True, backend=backend.name
    )
    dense = velocity.detach().contiguous().requires_grad_()
    out = fast.fused_dppo_velocity_loss(dense, old.contiguous(), noise, step, advantages, backend=backend.name)
    (expected,) = torch.autograd.grad(out.loss, dense)
    for got in (grad, single.grad):
        assert got.stride() == velocity.stride()
        assert torch.equal(got, expected)
