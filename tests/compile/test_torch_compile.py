"""``torch.compile(fullgraph=True)``, forward and backward: same numbers, one graph, no recompilation by batch size."""

from __future__ import annotations

import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from support.backends import CPU, REFERENCE, require
from support.problems import make_problem
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import flowdppo_fast as fast
from flowdppo_fast import backend as backends
from flowdppo_fast import ops, reference
from flowdppo_fast.integrations._rows import log_prob_policy_loss, squared_drift

PROBLEM = make_problem((4, 2), (3, 8, 8), index=[3, 5])
STEP = PROBLEM.step
SCALAR_STEP = make_problem().step


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[REFERENCE, CPU], ids=["reference", "cpu"])
def backend(request):
    return require(request.param).name


def inputs(batch=4, dtype=torch.bfloat16, layout=torch.contiguous_format):
    """``(velocity, old_velocity, noise, reference, advantages, std)`` for rows ``[batch, 2]``."""
    g = torch.Generator().manual_seed(batch)
    velocity, old, noise, reference = (torch.randn(batch, 2, 3, 8, 8, generator=g).to(dtype) for _ in range(4))
    velocity = old + 0.1 * velocity
    if layout == torch.channels_last:
        velocity = velocity.movedim(2, -1).contiguous().movedim(-1, 2)
    velocity.requires_grad_()
    return velocity, old, noise, reference, torch.randn(batch, 2, generator=g), torch.rand(batch, 1, generator=g) + 0.5


def dppo_velocity(velocity, old, noise, reference, advantages, std, backend):
    out = fast.fused_dppo_velocity_loss(
        velocity, old, noise, STEP, advantages, threshold=0.01, reference_velocity=reference, kl_weight=0.1,
        backend=backend,
    )  # fmt: skip
    return out.loss, out.rows.kl, out.metrics()["ratio_mean"]


def scalar_step(velocity, old, noise, reference, advantages, std, backend):
    out = fast.fused_policy_velocity_loss(
        velocity, old, noise, SCALAR_STEP, advantages, objective=fast.RatioClip(0.05), reduction="none", backend=backend
    )
    return out.loss.sum(), out.rows.ratio


def guard_means(velocity, old, noise, reference, advantages, std, backend):
    out = fast.fused_policy_loss(
        velocity, old, noise, std, advantages, objective=fast.GRPOGuard(0.05, bias="batch"), dt=-0.1 * std,
        row_weights=advantages.abs(), backend=backend,
    )  # fmt: skip
    return out.loss, out.rows.ratio


def seeded(velocity, old, noise, reference, advantages, std, backend):
    out = fast.fused_dppo_velocity_loss(
        velocity, old, fast.PhiloxNoise(3, 5), SCALAR_STEP, advantages, threshold=0.01, backend=backend
    )
    return out.loss, out.rows.log_ratio


def own_objective(velocity, old, noise, reference, advantages, std, backend):
    p, q = fast.row_statistics(velocity, old, noise, STEP, row_dims=2, backend=backend)
    return (-advantages * torch.exp(p - 0.5 * q) + q).mean(), q


def sampler_step(velocity, old, noise, reference, advantages, std, backend):
    result = fast.sde_step(
        reference, velocity, STEP, noise=noise, return_mean=True, log_prob="gaussian", row_dims=2, backend=backend
    )
    return result.log_prob.sum() + result.mean.square().mean(), result.prev_sample


def sampler_replay(velocity, old, noise, reference, advantages, std, backend):
    result = fast.sde_step(
        reference, velocity, STEP, prev_sample=noise, log_prob="unnormalized", row_dims=2, backend=backend
    )
    return result.log_prob.sum(), result.log_prob


def own_log_probs(velocity, old, noise, reference, advantages, std, backend):
    log_prob = -0.5 * (velocity.float() - noise.float()).square().mean((2, 3, 4))
    out = log_prob_policy_loss(
        fast.GRPOGuard(0.05, 0.05), log_prob, log_prob.detach() - 0.02 * advantages, advantages, std, dt=-0.1 * std,
        drift=squared_drift(velocity, old, row_dims=2, backend=backend), backend=backend,
    )  # fmt: skip
    return out.loss, out.rows.ratio


FUNCTIONS = [
    dppo_velocity,
    scalar_step,
    guard_means,
    seeded,
    own_objective,
    sampler_step,
    sampler_replay,
    own_log_probs,
]


def check(function, compiled, arguments, backend):
    """Compiled and eager: outputs and gradient."""

    def run(call):
        outputs = call(*arguments, backend)
        (grad,) = torch.autograd.grad(outputs[0], arguments[0])
        return [x.detach() for x in (*outputs, grad)]

    for got, expected in zip(run(compiled), run(function)):
        assert got.dtype == expected.dtype
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(got, expected, rtol=16 * eps, atol=16 * eps * float(expected.abs().max()))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_one_graph_with_the_same_numbers(function, backend):
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    check(function, compiled, inputs(), backend)


@pytest.fixture
def cuda_operators(monkeypatch):
    """The operators of ``flowdppo_cuda`` on CPU tensors, with the reference behind them."""
    stand_in = torch.library.Library("flowdppo_cuda", "IMPL")
    for op in ops.SCHEMAS:
        stand_in.impl(op, getattr(reference, op), "CPU")
    monkeypatch.setattr(backends, "problem", lambda name, device_type: None)
    yield
    stand_in._destroy()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_cuda_by_name_is_one_graph_of_its_own_operators(function, cuda_operators):
    """What the compiler sees of the CUDA backend, its schemas and fakes, is there without a GPU.

    Shapes are symbols here, as in no test before. Traced op by op, the reference would take minutes that way.
    """
    called = []

    def keep(graph, arguments):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))
    check(function, compiled, inputs(), "cuda")
    used = {target.split(".")[0] for target in called if target.startswith("flowdppo")}
    assert used == {"flowdppo_cuda"}


def test_channels_last_and_float64(backend):
    arguments = [x.detach() for x in inputs(dtype=torch.float64, layout=torch.channels_last)]
    arguments[4:] = [x.double() for x in arguments[4:]]
    arguments[0].requires_grad_()
    assert not arguments[0].is_contiguous()
    compiled = torch.compile(dppo_velocity, fullgraph=True, backend="aot_eager")
    check(dppo_velocity, compiled, arguments, backend)


@pytest.mark.parametrize("function", [dppo_velocity, guard_means], ids=lambda f: f.__name__)
def test_no_recompilation_between_batch_sizes(function, backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    check(function, compiled, inputs(4), backend)
    graphs = counter.frame_count
    check(function, compiled, inputs(6), backend)
    assert counter.frame_count == graphs


def test_stacked_steps_may_change_without_recompilation(backend):
    """A scalar step is four constants of the graph; a stacked one is tensors, so a schedule needs one graph."""

    def function(velocity, old, noise, advantages, step):
        return fast.fused_dppo_velocity_loss(
            velocity, old, noise, step, advantages, threshold=0.01, backend=backend
        ).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    velocity, old, noise, _, advantages, _ = inputs()
    graphs = []
    for index in (2, 3, 4):
        step = fast.SDEStep.stack([make_problem(index=index).step])
        arguments = (velocity, old, noise, advantages, step)
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-5, atol=1e-7)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


def test_streams_may_change_without_recompilation():
    backend = require(CPU).name

    def function(velocity, old, advantages, seed, streams):
        noise = fast.PhiloxNoise(seed, streams)
        return fast.fused_dppo_velocity_loss(velocity, old, noise, SCALAR_STEP, advantages, backend=backend).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    velocity, old, _, _, advantages, _ = inputs()
    graphs = []
    for first in (0, 8, 16):
        arguments = (velocity, old, advantages, 3, torch.arange(first, first + 8).reshape(4, 2))
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-5, atol=1e-7)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


def test_single_pass(backend):
    def function(velocity, old, noise, advantages):
        out = fast.fused_dppo_velocity_loss(
            velocity, old, noise, STEP, advantages, threshold=0.01, single_pass=True, backend=backend
        )
        return out.loss, out.grad

    velocity, old, noise, _, advantages, _ = inputs()
    arguments = (velocity.detach(), old, noise, advantages)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*arguments), function(*arguments)):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-8)


def test_in_the_middle_of_a_model(backend):
    """A loss after a layer: the gradient reaches the weights through the graph."""
    _, old, noise, _, advantages, _ = inputs(dtype=torch.float32)
    layer = torch.nn.Linear(8, 8)

    def function(x):
        return fast.fused_dppo_velocity_loss(layer(x), old, noise, STEP, advantages, backend=backend).loss

    function(old).backward()
    expected, layer.weight.grad = layer.weight.grad, None
    torch.compile(function, fullgraph=True, backend="aot_eager")(old).backward()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU and there is no g++")
@pytest.mark.parametrize(
    ("function", "backend"), [(own_objective, REFERENCE), (dppo_velocity, CPU)], ids=["reference", "cpu"]
)
def test_inductor(function, backend):
    name = require(backend).name
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="inductor")
    for batch in (4, 6):
        check(function, compiled, inputs(batch), name)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_inductor_on_the_device(gpu_backend, function):
    arguments = [x.detach().cuda() for x in inputs()]
    arguments[0].requires_grad_()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="inductor")
    check(function, compiled, arguments, gpu_backend.name)
