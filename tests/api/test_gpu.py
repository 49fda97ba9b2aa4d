"""What only a GPU can show, on each of its backends: graphs, streams, latents beyond 2^31 elements, and rows of every
size that a launch is planned for differently."""

from __future__ import annotations

import pytest
import torch
from support.cases import OBJECTIVES, bounded_call
from support.compare import check_backend
from support.problems import make_problem
from torch import Tensor

import flowdppo_fast as fast

BF16, F32 = torch.bfloat16, torch.float32
STEP = make_problem().step


def latents(rows, numel, dtype=BF16, count=3):
    """Velocity near the old one, old velocity and noise, on the device."""
    old, noise, away = (torch.randn(rows, numel, device="cuda") for _ in range(count))
    return (old + 0.05 * away).to(dtype), old.to(dtype), noise.to(dtype)


def loss_and_gradient(backend, velocity, old, noise, advantages, single_pass=False, objective=None, **options):
    """Loss, summary, row results and gradient of one call."""
    objective = objective or fast.DPPO(1e-3)
    leaf = velocity if single_pass else velocity.detach().requires_grad_()
    out = fast.fused_velocity_policy_loss(
        objective, leaf, old, noise, STEP, advantages, single_pass=single_pass, backend=backend.name, **options
    )
    grad = out.grad if single_pass else torch.autograd.grad(out.loss, leaf)[0]
    return out.loss.detach(), out.summary, out.row_results, grad


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Bit for bit, NaN included."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second))


# one block, several splits, rows that are not aligned, blocks of several tiles
@pytest.mark.parametrize("latent", [(8, 8, 8), (16, 64, 64), (4, 33, 35), (16, 128, 128), (16, 11, 104, 60)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])
def test_rows_of_every_size(gpu_backend, latent, dtype, single_pass):
    problem = make_problem((5,), latent)
    call = bounded_call(problem, "velocity", "dppo", dtypes=dtype, device="cuda", with_reference=True, kl_weight=0.2)
    call.options["single_pass"] = single_pass
    check_backend(call, gpu_backend.name)


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_any_number_of_rows(gpu_backend, rows, single_pass, objective):
    problem = make_problem((rows,), (4, 8, 16))
    call = bounded_call(problem, "velocity", objective, dtypes=F32, device="cuda")
    call.options["single_pass"] = single_pass
    check_backend(call, gpu_backend.name)


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])
def test_the_same_bits_from_call_to_call(gpu_backend, single_pass, seeded):
    for rows, numel in ((8, 65_536), (3, 262_144), (2, 1_000_003)):
        velocity, old, noise = latents(rows, numel)
        noise = fast.PhiloxNoise(3, 5) if seeded else noise
        advantages = torch.randn(rows, device="cuda")
        first = loss_and_gradient(gpu_backend, velocity, old, noise, advantages, single_pass)
        for _ in range(20):
            assert same(first, loss_and_gradient(gpu_backend, velocity, old, noise, advantages, single_pass))


@pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])
def test_streams_do_not_disturb_each_other(gpu_backend, single_pass):
    calls = [(*latents(8, 65_536), torch.randn(8, device="cuda")) for _ in range(4)]
    alone = [loss_and_gradient(gpu_backend, *call, single_pass) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(10):
        together = []
        for stream, call in zip(streams, calls):
            with torch.cuda.stream(stream):
                together.append(loss_and_gradient(gpu_backend, *call, single_pass))
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(alone, together))


def captured(run):
    """A graph of the call after a warm-up, and the tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])
def test_in_a_cuda_graph(gpu_backend, objective, single_pass):
    velocity, old, noise = latents(4, 16_384)
    advantages = torch.randn(4, device="cuda")
    rule, _ = OBJECTIVES[objective].bounded(0.01)

    def run():
        return loss_and_gradient(gpu_backend, velocity, old, noise, advantages, single_pass, rule)

    graph, results = captured(run)
    for _ in range(3):
        velocity.add_(0.25)
        graph.replay()
        assert same(results, run())


def test_graphs_replayed_side_by_side(gpu_backend):
    """Captured one after the other on one stream, replayed at once on two."""
    calls = [(*latents(8, 262_144), torch.randn(8, device="cuda")) for _ in range(2)]
    alone = [loss_and_gradient(gpu_backend, *call) for call in calls]
    graphs = [captured(lambda call=call: loss_and_gradient(gpu_backend, *call)) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(10):
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(same(a, results) for a, (_, results) in zip(alone, graphs))


def test_a_sampler_step_in_a_cuda_graph(gpu_backend):
    sample, velocity, noise = latents(4, 70_000)

    def run():
        out = fast.sde_step(sample, velocity, STEP, noise=noise, log_prob="gaussian", backend=gpu_backend.name)
        return out.prev_sample, out.log_prob

    graph, results = captured(run)
    for _ in range(3):
        sample.mul_(0.9)
        graph.replay()
        assert same(results, run())


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


@pytest.mark.slow
def test_rows_far_apart(gpu_backend):
    """Rows more than 2^31 elements apart in memory, as those of one big trajectory."""
    numel, apart = 4096, 2**31 + 4096
    if free_bytes() < 3 * 2 * apart:
        pytest.skip(f"needs {3 * 2 * apart >> 30} GiB of GPU memory")
    memory = torch.empty(apart + 3 * numel, dtype=BF16, device="cuda")
    near = latents(2, numel)
    far = [memory.as_strided((2, numel), (apart, 1), at * numel) for at in range(3)]
    for x, y in zip(far, near):
        x.copy_(y)
    advantages = torch.randn(2, device="cuda")
    assert same(
        loss_and_gradient(gpu_backend, *far, advantages), loss_and_gradient(gpu_backend, *near, advantages)
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])
def test_a_row_of_more_than_two_to_the_31_elements(gpu_backend, single_pass):
    """Old and new differ in the last elements alone: their sums and their gradient have to be found there."""
    numel, marked = 2**31 + 72, 64
    if free_bytes() < 5 * 2 * numel:
        pytest.skip(f"needs {5 * 2 * numel >> 30} GiB of GPU memory")
    velocity, old, noise = (torch.zeros(1, numel, dtype=BF16, device="cuda") for _ in range(3))
    velocity[:, -marked:] = 0.125
    noise[:, -marked:] = 2.0
    advantages = torch.ones(1, device="cuda")
    _, _, rows, grad = loss_and_gradient(
        gpu_backend, velocity, old, noise, advantages, single_pass, fast.Unclipped(), reduce="sum"
    )
    k = STEP.velocity_coef / STEP.std
    u = k * 0.125
    log_ratio = marked * (2.0 * u - 0.5 * u * u)
    assert rows[0].item() == pytest.approx(log_ratio, rel=1e-5)
    assert grad[:, :-marked].count_nonzero() == 0
    expected = -torch.tensor(log_ratio).exp().item() * k * (2.0 - u)
    torch.testing.assert_close(grad[:, -marked:].float(), torch.full((1, marked), expected).cuda(), rtol=0.01, atol=0)


def test_memory_beside_the_gradient(gpu_backend):
    """At most 1 MB, at any size."""
    velocity, old, noise = latents(4, 2**23)
    advantages = torch.randn(4, device="cuda")
    loss_and_gradient(gpu_backend, velocity, old, noise, advantages)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_and_gradient(gpu_backend, velocity, old, noise, advantages)
    assert torch.cuda.max_memory_allocated() - before - velocity.nbytes <= 1e6


def test_launches(gpu_backend):
    """Two launches forward, of the CUDA kernels one; one more where the same call makes the gradient."""
    from torch.profiler import ProfilerActivity, profile

    velocity, old, noise = latents(8, 65_536)
    advantages = torch.randn(8, device="cuda")

    def launches(run) -> int:
        # poison is written by a launch of its own
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            run()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                run()
                torch.cuda.synchronize()
        finally:
            torch.use_deterministic_algorithms(deterministic)
        return sum(event.count for event in profiled.key_averages() if "_kernel" in event.key)

    def forward(single_pass):
        return fast.fused_velocity_policy_loss(
            fast.DPPO(), velocity, old, noise, STEP, advantages, single_pass=single_pass, backend=gpu_backend.name
        )

    own = 1 if gpu_backend.name == "cuda" else 2
    assert launches(lambda: forward(False)) == own
    assert launches(lambda: forward(True)) == own + 1
