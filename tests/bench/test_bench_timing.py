"""The harness sees what is slow, turns its inputs over, and times everybody in turn."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from bench_support import altered, contender

from bench.ops import timing
from bench.ops.devices import CpuDevice, RehearsalDevice, open_device
from bench.ops.profiling import _device_events, compiled_kernels, profile_calls
from bench.ops.results import Stat
from bench.ops.timing import Runner, Samples, device_times, rotate, wall_times


def runner(oracle, name, **changes):
    one = contender(name)
    return Runner(one, one.prepare(oracle.rollout))


def slowed(oracle, name, seconds):
    def wait(output, inputs):
        time.sleep(seconds)
        return output

    one = altered(contender(name), f"slow {name}", wait)
    return Runner(one, one.prepare(oracle.rollout))


class Clock(RehearsalDevice):
    """A GPU whose every replay takes as long as it is told; counts what is captured."""

    def __init__(self, nanoseconds):
        self.nanoseconds, self.replays = nanoseconds, []

    def capture(self, run):
        index = len(self.nanoseconds) - len(self.remaining) if hasattr(self, "remaining") else 0
        self.remaining = self.nanoseconds[index + 1 :]
        run()

        def replay():
            self.replays.append(index)
            return self.nanoseconds[index]

        return replay


def test_a_slow_contender_is_seen_as_slow(oracle):
    pause = 0.03
    runners = {"fast": runner(oracle, "reference/velocity"), "slow": slowed(oracle, "reference/velocity", pause)}
    samples = wall_times(runners, rotate(oracle.rollout.inputs, 1 << 20, CpuDevice()), CpuDevice(), quick=True)
    fast, slow = (Stat.of(samples[name].wall_forward) for name in ("fast", "slow"))
    assert min(samples["slow"].wall_forward) >= 1e9 * pause
    assert fast.median < slow.low
    assert all(total >= forward for total, forward in zip(samples["slow"].wall_total, samples["slow"].wall_forward))


def test_same_inputs_twice_give_the_same_ranking(oracle):
    # far apart, because neighbours on the machine can take a core for tens of milliseconds
    names = {"a": 0.0, "b": 0.02, "c": 0.05}
    rotation = rotate(oracle.rollout.inputs, 1 << 20, CpuDevice())
    runners = {name: slowed(oracle, "reference/velocity", pause) for name, pause in names.items()}
    rankings = []
    for seed in (0, 1):
        samples = wall_times(runners, rotation, CpuDevice(), quick=True, seed=seed)
        rankings.append(sorted(names, key=lambda name: Stat.of(samples[name].wall_total).median))
    assert rankings == [["a", "b", "c"]] * 2


def test_rounds_take_everybody_once_on_the_next_inputs(oracle):
    calls = []

    def note(name):
        def remember(output, inputs):
            calls.append((name, inputs.velocity.data_ptr()))
            return output

        one = altered(contender("reference/velocity"), name, remember)
        return Runner(one, one.prepare(oracle.rollout))

    rotation = rotate(oracle.rollout.inputs, 1 << 24, CpuDevice())
    sets = len(rotation.sets)
    assert sets == len({inputs.velocity.data_ptr() for inputs in rotation.sets}) > 2
    wall_times({name: note(name) for name in "abc"}, rotation, CpuDevice(), quick=True)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all({name for name, _ in one} == set("abc") for one in rounds)
    assert len({tuple(name for name, _ in one) for one in rounds}) > 1, "the order never changes"
    pointers = [pointer for _, pointer in calls]
    assert all(pointers[i] != pointers[i + 1] for i in range(len(pointers) - 1))
    # after every set, the first one comes again: nothing is reused before all have been read
    assert pointers[:sets] == pointers[sets : 2 * sets]


def test_rotation_outgrows_the_cache_three_times(oracle):
    device = CpuDevice()
    rotation = rotate(oracle.rollout.inputs, 1 << 22, device)
    assert rotation.cold
    assert len(rotation.sets) * (1 << 22) >= 3 * device.cache_bytes()
    for inputs in rotation.sets[1:]:
        assert torch.equal(inputs.velocity, oracle.rollout.inputs.velocity)
        assert inputs.velocity.requires_grad
        assert not inputs.noise.requires_grad


def test_rotation_says_when_memory_is_short(oracle, monkeypatch):
    device = CpuDevice()
    monkeypatch.setattr(device, "free_bytes", lambda: 0)
    rotation = rotate(oracle.rollout.inputs, 1 << 20, device)
    assert len(rotation.sets) == 1
    assert not rotation.cold


@pytest.mark.parametrize(("round_ns", "quick", "expected"), [(1e12, False, 30), (1.0, False, 200), (1e12, True, 10)])
def test_sample_counts(round_ns, quick, expected):
    assert timing.sample_count(round_ns, quick) == expected


def test_device_time_is_per_call_and_interleaved(oracle):
    """The GPU path with a clock that is known: forward and total graphs of two contenders, one without a forward."""
    runners = {"a": runner(oracle, "reference/velocity"), "b": runner(oracle, "reference/single-pass")}
    device = Clock([800.0, 1600.0, 2400.0])
    rotation = rotate(oracle.rollout.inputs, 1 << 12, device)
    results = {name: Samples() for name in runners}
    without = device_times(runners, rotation, device, results, quick=True)
    sets = len(rotation.sets)
    assert without == {}
    assert results["a"].device_forward == [round(800.0 / sets)] * 10
    assert results["a"].device_total == [round(1600.0 / sets)] * 10
    assert results["b"].device_forward == []
    assert results["b"].device_total == [round(2400.0 / sets)] * 10
    rounds = [device.replays[i : i + 3] for i in range(3, 33, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_a_call_that_syncs_has_no_device_time(oracle):
    device = RehearsalDevice()
    runners = {"reads": runner(oracle, "peer-eager")}
    results = {"reads": Samples()}
    without = device_times(runners, rotate(oracle.rollout.inputs, 1 << 12, device), device, results, quick=True)
    assert "host" in without["reads"]
    assert results["reads"] == Samples()


def test_gpu_wall_times_have_a_forward_call_of_their_own(oracle):
    device = RehearsalDevice()
    runners = {"a": runner(oracle, "reference/velocity"), "b": runner(oracle, "reference/single-pass")}
    samples = wall_times(runners, rotate(oracle.rollout.inputs, 1 << 12, device), device, quick=True)
    assert [len(samples["a"].host_forward), len(samples["a"].wall_forward), len(samples["a"].wall_total)] == [10] * 3
    assert samples["b"].wall_forward == []
    assert len(samples["b"].host_total) == 10


def test_copy_bandwidth_counts_bytes_both_ways(monkeypatch):
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 1 << 22)
    nbytes, samples = timing.copy_bandwidth(CpuDevice(), quick=True)
    assert nbytes == 2 << 22
    assert len(samples) == 10
    assert min(samples) > 0


def test_profile_counts_operators_syncs_and_memory(oracle):
    """A contender of known make: two extra full-size operators, one of them kept, and three reads."""

    def add_work(output, inputs):
        kept = inputs.sample * 2.0
        (kept + 1.0).view(-1)
        for _ in range(3):
            output.loss.item()
        return SimpleNamespace(**output._asdict(), held=kept)

    more = altered(contender("reference/velocity"), "more", add_work)
    runners = {"plain": runner(oracle, "reference/velocity"), "more": Runner(more, more.prepare(oracle.rollout))}
    for one in runners.values():
        one.total(oracle.rollout.inputs)
    profiles = profile_calls(runners, oracle.rollout.inputs, CpuDevice(), {})
    plain, more_profile = profiles["plain"], profiles["more"]
    assert more_profile.launches_forward == plain.launches_forward + 2
    assert more_profile.launches_total == plain.launches_total + 2
    assert (plain.syncs, more_profile.syncs) == (0, 3)
    size = oracle.rollout.inputs.sample.nbytes
    # the kept tensor lives through the backward; the other one is gone before the forward's own peak is reached again
    assert more_profile.extra_total >= plain.extra_total + size
    assert plain.extra_forward >= 2 * size, "the reference keeps full-size tensors"


def test_profile_does_not_count_the_gradient(oracle):
    """Doubling the gradient's size in the forward would be seen; the gradient itself is not."""
    one = runner(oracle, "peer-eager, no syncs")
    one.total(oracle.rollout.inputs)
    profile = profile_calls({"peer": one}, oracle.rollout.inputs, CpuDevice(), {})["peer"]
    assert profile.extra_total >= profile.extra_forward
    size = oracle.rollout.inputs.velocity.nbytes
    small = runner(oracle, "cpu/velocity")
    if small.contender.missing("cpu") is None:
        small.total(oracle.rollout.inputs)
        mine = profile_calls({"cpu": small}, oracle.rollout.inputs, CpuDevice(), {})["cpu"]
        assert mine.extra_total < size / 16


def test_kernels_of_a_profile_are_told_from_copies():
    kinds = torch.autograd.DeviceType

    def event(name, device, start):
        return SimpleNamespace(name=lambda: name, device_type=lambda: device, start_ns=lambda: start)

    events = [
        event("partials_kernel", kinds.CUDA, 5),
        event("Memcpy DtoH (Device -> Pinned)", kinds.CUDA, 6),
        event("Memset (Device)", kinds.CUDA, 7),
        event("bench forward x", kinds.CUDA, 4),
        event("aten::mul", kinds.CPU, 5),
        event("epilogue_kernel", kinds.CUDA, 8),
    ]
    assert _device_events(SimpleNamespace(events=lambda: events)) == ([5, 8], [6])


def test_compiled_kernels_are_counted_apart(oracle):
    torch._dynamo.reset()
    one = contender("peer-compiled")
    compiled = Runner(one, one.prepare(oracle.rollout))
    with torch._functorch.config.patch(enable_autograd_cache=False):
        forward, total = compiled_kernels(compiled, oracle.rollout.inputs)
    assert 0 < forward < total


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match="expected one of 'cpu', 'cuda', 'rehearsal'"):
        open_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="sees no GPU"):
            open_device("cuda")
