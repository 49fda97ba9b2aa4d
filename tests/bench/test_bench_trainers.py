"""Each trainer's step before and after: right against float64, refused when broken, its launches and syncs counted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from bench_support import SMALL, altered, contender, make_oracle

from bench.ops import contenders, table, trainers, workloads
from bench.ops.devices import CpuDevice
from bench.ops.inputs import LEVELS
from bench.ops.oracle import Start
from bench.ops.profiling import profile_calls
from bench.ops.run import run_case
from bench.ops.timing import Runner, rotate
from bench.ops.trainers import classes, common, scripts
from flowdppo_fast import SDEStep

CPU = CpuDevice()
ROWS = SMALL.row_count
# numbers that each trainer reads to the host in one step over 16 rows, before and after
SYNCS = {
    # a timestep per row and sigma_max; the timesteps at once
    "flow_grpo": (ROWS + 1, 1),
    # a timestep per row and 13 metrics; each at once
    "verl_omni": (ROWS + 13, 2),
    # the loss and 13 metrics; all at once
    "unirl": (14, 1),
    # indices of the step on the device, and the adapter's sigma_max; the three index maps, and sigma_max
    "flow_factory": (12, 4),
    # logged by the script itself, which the integration does not touch
    "dance_grpo": (1, 1),
    "mix_grpo": (4, 4),
}
NAMES = [f"{name}/{when}" for name in SYNCS for when in ("before", "after")]


def entries_of(oracle, *chosen, monkeypatch):
    monkeypatch.setattr(contenders, "_TRAINER_WORKLOADS", (SMALL.name,))
    rotation = rotate(oracle.rollout.inputs, 1 << 22, CPU)
    case = run_case(chosen, oracle.rollout, oracle, rotation, CPU, quick=True)
    return {entry["name"]: entry for entry in case["contenders"]}


def outcome(oracle, name):
    """Result, gradient and rows of one call."""
    one, inputs = contender(name), oracle.rollout.inputs
    output = one.prepare(oracle.rollout)(inputs)
    return output, one.gradient(output, inputs), one.read(output)


def test_every_trainer_has_its_pair():
    assert set(trainers.TRAINERS) == set(SYNCS)
    found = [one.name for one in contenders.select(contenders.registry("cpu"), ["trainers"])]
    assert sorted(found) == sorted(NAMES)
    assert [one.name for one in contenders.select(contenders.registry("cpu"), ["unirl"])] == NAMES[4:6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_right_against_float64(name, dtype):
    oracle = make_oracle(dtype=dtype)
    one = contender(name)
    for _ in range(2):
        # the second call must not find anything of the first
        output, grad, rows = outcome(oracle, name)
        errors = oracle.errors(one.start, one.objective, output.loss.detach(), rows.kl, rows.log_ratio, grad)
        assert not errors.over(oracle.bounds(Start.CHAIN))
        assert oracle.rollout.inputs.velocity.grad is None
    assert (errors.kl is None) == (one.objective == "ratio_clip")


def test_dance_grpo_takes_the_step_of_the_inputs():
    """A constant diffusion gives the Flow-SDE step at one level; it lets all trainers start from the same inputs."""
    theirs = SDEStep.from_sigmas("dance", *LEVELS[0], eta=scripts.DANCE_ETA)
    ours = SDEStep.from_sigmas("flow_sde", *LEVELS[0], eta=0.7)
    for field in ("sample_coef", "velocity_coef", "std"):
        assert getattr(theirs, field) == pytest.approx(getattr(ours, field), rel=1e-14)


def shifted(output, inputs):
    return replace(output, value=output.value + 1e-3)


def shifted_kl(output, inputs):
    return replace(output, kl=output.kl * 1.01)


def scaled_grad(output, inputs):
    return replace(output, grad=output.grad * 1.001)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [(name, shifted, "loss") for name in NAMES]
    + [("verl_omni/after", shifted_kl, "kl"), ("flow_factory/after", shifted_kl, "kl")]
    + [("unirl/after", scaled_grad, "gradient"), ("flow_factory/before", scaled_grad, "gradient")],
)
def test_a_broken_step_is_refused_and_reports_no_speed(oracle, monkeypatch, name, change, what):
    entry = entries_of(oracle, altered(contender(name), "broken", change), monkeypatch=monkeypatch)["broken"]
    assert entry["status"] == "refused"
    assert f"{what} error" in entry["reason"]
    assert not {"samples", "syncs", "launches_total"} & set(entry)


def test_a_mask_at_another_threshold_is_refused(oracle, monkeypatch):
    """A convention that is not the one promised: every row is near, so none is dropped."""
    monkeypatch.setattr(classes, "THRESHOLD", 1.0)
    entries = entries_of(oracle, *(contender(name) for name in NAMES), monkeypatch=monkeypatch)
    for name, entry in entries.items():
        expected = "refused" if entry["objective"] == "dppo" else "ok"
        assert entry["status"] == expected, name


@pytest.fixture(scope="module")
def profiles():
    oracle = make_oracle()
    runners = {name: Runner(contender(name), contender(name).prepare(oracle.rollout)) for name in NAMES}
    for one in runners.values():
        one.total(oracle.rollout.inputs)
    return profile_calls(runners, oracle.rollout.inputs, CPU, {})


@pytest.mark.parametrize("name", SYNCS)
def test_syncs(profiles, name):
    assert (profiles[f"{name}/before"].syncs, profiles[f"{name}/after"].syncs) == SYNCS[name]


@pytest.mark.parametrize("name", SYNCS)
def test_fewer_passes_over_the_latents_and_less_memory(profiles, name):
    before, after = profiles[f"{name}/before"], profiles[f"{name}/after"]
    assert 0 < after.launches_latents < before.launches_latents
    assert after.launches_latents <= after.launches_total
    assert after.extra_total < before.extra_total


def test_reads_are_counted_however_they_are_made(oracle):
    """``item``, ``float``, ``bool`` and ``tolist``, one each; none inside another is counted twice."""

    def read(output, inputs):
        loss = output.loss.detach()
        inputs.advantages.tolist(), loss.item(), float(loss), bool(loss > 0)
        return output

    one = altered(contender("reference/velocity"), "reads", read)
    runners = {"reads": Runner(one, one.prepare(oracle.rollout))}
    assert profile_calls(runners, oracle.rollout.inputs, CPU, {})["reads"].syncs == 4
    fewer = replace(one, host_reads=1)
    runners = {"reads": Runner(fewer, fewer.prepare(oracle.rollout))}
    assert profile_calls(runners, oracle.rollout.inputs, CPU, {})["reads"].syncs == 3


def test_left_out_where_they_would_only_cost_time():
    one = contender("unirl/after")
    timed = {w.key for w in workloads.WORKLOADS if one.left_out(w) is None}
    assert timed == {"sd3-512/8", "sd3-512/16"}


def test_missing_without_the_conventions(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_TESTS", tmp_path)
    assert "tests/integrations" in contender("flow_grpo/before").missing("cpu")
    assert contender("peer-eager").missing("cpu") is None


def test_missing_without_a_package_that_a_stand_in_imports(monkeypatch):
    pair = trainers.TRAINERS["verl_omni"]._replace(needs=("torch", "no_such_package"))
    monkeypatch.setitem(trainers.TRAINERS, "verl_omni", pair)
    for when in ("before", "after"):
        assert contender(f"verl_omni/{when}").missing("cpu") == "it needs no_such_package, not installed here"
    assert contender("unirl/after").missing("cpu") is None


def test_table_section(oracle, monkeypatch):
    chosen = [contender(name) for name in ("flow_grpo/before", "flow_grpo/after", "peer-eager, no syncs")]
    monkeypatch.setattr(contenders, "_TRAINER_WORKLOADS", (SMALL.name,))
    rotation = rotate(oracle.rollout.inputs, 1 << 22, CPU)
    case = run_case(chosen, oracle.rollout, oracle, rotation, CPU, quick=True)
    case["threads"] = 1
    for entry, value in zip(case["contenders"], (8_000_000, 2_000_000, 4_000_000)):
        entry["samples"]["wall_total"] = [value] * 10
    text = table.trainers_table({"device": "cpu", "cases": [case]})
    after = next(line for line in text.splitlines() if line.startswith("| flow_grpo") and "| after" in line)
    cells = [cell.strip() for cell in after.split("|")[1:-1]]
    entry = case["contenders"][1]
    assert cells[:5] == [
        "flow_grpo, ratio_clip", "small/16 float32, 1 thread", "after", "2.00 [2.00, 2.00]", "4.00",
    ]  # fmt: skip
    assert cells[5:7] == [f"{entry['launches_latents']} / {entry['launches_total']}", "1"]
    # in the section of their own, not among the contenders of the case
    result = {"device": "cpu", "cases": [case], "copy": [{"threads": 1, "bytes": 2, "samples": [1, 1]}]}
    rows = table._case(result, case)
    assert "peer-eager, no syncs" in rows
    assert "flow_grpo" not in rows
    without = copy.deepcopy(case)
    without["contenders"] = without["contenders"][2:]
    assert table.trainers_table({"device": "cpu", "cases": [without]}) is None
