"""What a run does with contenders that are wrong, missing, raising or left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from bench_support import SMALL, STACKED, altered, contender

import bench.ops.devices as devices
from bench.ops import contenders, results, timing, workloads
from bench.ops.__main__ import main
from bench.ops.oracle import Start
from bench.ops.run import Plan, execute, run_case, smoke
from bench.ops.timing import rotate

CPU = devices.CpuDevice()
GOOD = "reference/velocity"


def case_of(oracle, *chosen, **options):
    rotation = rotate(oracle.rollout.inputs, 1 << 22, CPU)
    case = run_case(chosen, oracle.rollout, oracle, rotation, CPU, quick=True, **options)
    return {entry["name"]: entry for entry in case["contenders"]}


def scaled_loss(output, inputs):
    return output._replace(loss=output.loss * 1.01)


def scaled_grad(output, inputs):
    return output._replace(grad=output.grad * 1.001)


def nan_grad(output, inputs):
    grad = output.grad.clone()
    grad.view(-1)[7] = torch.nan
    return output._replace(grad=grad)


def wrong_kl(output, inputs):
    rows = output.row_results.clone()
    rows[2] *= 1.01
    return output._replace(row_results=rows)


@pytest.mark.parametrize(
    ("base", "change", "what"),
    [
        (GOOD, scaled_loss, "loss"),
        ("reference/single-pass", scaled_grad, "gradient"),
        ("reference/single-pass", nan_grad, "gradient"),
        (GOOD, wrong_kl, "kl"),
    ],
    ids=["loss", "gradient", "nan", "kl"],
)
def test_a_wrong_contender_is_refused_and_reports_no_speed(oracle, base, change, what):
    entries = case_of(oracle, altered(contender(base), "wrong", change), contender(GOOD))
    wrong, good = entries["wrong"], entries[GOOD]
    assert wrong["status"] == "refused"
    assert f"{what} error" in wrong["reason"]
    assert not {"samples", "launches_total", "extra_bytes_total"} & set(wrong)
    assert good["status"] == "ok"
    assert len(good["samples"]["wall_total"]) == 10


def test_the_trainers_code_in_bf16_means_would_be_refused(oracle):
    """Means rounded to bf16 before the KL, the fault that the check must be sharp enough to see."""

    def round_mean(rollout):
        inner = contender("reference/means").prepare(rollout)
        return lambda i: inner(replace(i, old_mean=i.old_mean.bfloat16().float()))

    rounded = replace(contender("reference/means"), name="bf16 means", prepare=round_mean)
    entry = case_of(oracle, rounded)["bf16 means"]
    assert entry["status"] == "refused"
    assert "kl error" in entry["reason"]


def test_missing_backends_are_listed_with_the_reason(oracle, monkeypatch):
    monkeypatch.setattr(contenders.library, "_CPU_PROBLEM", "the C++ library is not built")
    entries = case_of(oracle, contender("cpu/velocity"), contender("cuda/velocity"), contender("triton/means"))
    assert entries["cpu/velocity"]["status"] == "missing"
    assert "not built" in entries["cpu/velocity"]["reason"]
    assert "serves NVIDIA GPU tensors" in entries["cuda/velocity"]["reason"]
    assert entries["triton/means"]["status"] == "missing"
    assert all("samples" not in entry for entry in entries.values())


def test_a_backend_that_this_version_lacks_is_missing(monkeypatch):
    monkeypatch.setattr(contenders.flowdppo_fast, "BACKENDS", ("reference", "cpu"))
    assert "has no backend 'cuda'" in contender("cuda/velocity").missing("cuda")


def test_a_contender_that_raises_is_an_error_and_spares_the_others(oracle, capfd):
    def fail(output, inputs):
        raise RuntimeError("out of luck\nsecond line")

    entries = case_of(oracle, altered(contender(GOOD), "fails", fail), contender(GOOD))
    assert entries["fails"]["status"] == "error"
    assert entries["fails"]["reason"] == "RuntimeError: out of luck"
    assert entries[GOOD]["status"] == "ok"
    assert "out of luck" in capfd.readouterr().err


def test_contenders_too_large_for_memory_are_left_out(oracle, monkeypatch):
    monkeypatch.setattr(devices.CpuDevice, "free_bytes", lambda self: 1 << 16)
    entry = case_of(oracle, contender("peer-eager"))["peer-eager"]
    assert entry["status"] == "left out"
    assert "are free" in entry["reason"]


def test_bytes_that_must_move(oracle):
    """Inputs once forward, inputs of kept rows once backward, the gradient once; 2 of 16 rows are dropped."""
    entries = case_of(oracle, contender("reference/velocity"), contender("reference/seeded"), contender("peer-eager"))
    latent = 4 * SMALL.elements
    assert entries["reference/velocity"]["bytes_forward"] == 3 * latent
    assert entries["reference/velocity"]["bytes_total"] == 3 * latent + 3 * latent * 14 // 16 + latent
    assert entries["reference/seeded"]["bytes_forward"] == 2 * latent
    assert entries["peer-eager"]["bytes_forward"] == 4 * latent


def test_every_contender_that_can_run_here_is_right():
    for name in ("bfloat16", "float32"):
        lines = []
        assert smoke(contenders.registry("cpu"), [name], CPU, lines.append), lines


def test_smoke_fails_on_a_wrong_result_and_on_nothing_to_check():
    lines = []
    assert not smoke([altered(contender(GOOD), "wrong", scaled_loss)], ["float32"], CPU, lines.append)
    assert "loss error" in lines[0]
    assert not smoke([contender("peer-eager")], ["float32"], CPU, lines.append)


def plan(**changes):
    plain = Plan(
        workloads=[SMALL, STACKED],
        contenders=[contender(GOOD), contender("cuda/velocity")],
        dtypes=["float32"],
        threads=(1,),
        quick=True,
        command="python -m bench.ops run",
    )
    return replace(plain, **changes)


@pytest.fixture
def small_copy(monkeypatch):
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 1 << 20)


def test_a_run_writes_what_it_has(tmp_path, small_copy):
    execute(plan(), CPU, tmp_path, lambda line: None)
    result = results.load(tmp_path)
    assert [case["workload"] for case in result["cases"]] == ["small/16", "small-stacked/4x3"]
    assert result["complete"]
    assert result["quick"]
    assert result["copy"][0]["threads"] == 1
    assert {entry["status"] for case in result["cases"] for entry in case["contenders"]} == {"ok", "missing"}
    assert {goal["key"] for goal in result["goals"]} >= {"cpu-eager", "gpu-eager"}
    text = (tmp_path / results.FILE).read_text()
    assert str(tmp_path) not in text
    # one line per list of samples
    assert text.count("\n") < 400


def test_a_spent_budget_leaves_cases_out_and_says_so(tmp_path, small_copy):
    result = execute(plan(budget=0.0), CPU, tmp_path, lambda line: None)
    assert not result["cases"]
    assert not result["complete"]
    assert [item["workload"] for item in result["left_out"]] == ["small/16", "small-stacked/4x3"]
    assert "budget of 0 s" in result["left_out"][0]["reason"]


def test_two_threads_are_two_cases(tmp_path, small_copy):
    result = execute(plan(workloads=[SMALL], threads=(1, 2)), CPU, None, lambda line: None)
    assert [case["threads"] for case in result["cases"]] == [1, 2]


def test_command_line_run(tmp_path, small_copy, quiet, capsys):
    arguments = ["run", "--quick", "--workloads", "overhead", "--contenders", "peer-eager, no syncs", "reference"]
    status = main([*arguments, "--dtypes", "float32", "--threads", "1", "--output", str(tmp_path)])
    assert status == 0
    out = capsys.readouterr().out
    assert "QUICK run" in out
    result = json.loads((tmp_path / results.FILE).read_text())
    assert "--output" not in result["command"]
    assert "--threads 1" in result["command"]
    assert (tmp_path / "table.md").read_text() in out
    assert main(["table", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--workloads", "sd9"], "workloads: got 'sd9'"),
        (["run", "--contenders", "nobody"], "contenders: got 'nobody'"),
        (["run", "--device", "rehearsal", "--threads", "2"], "threads: got"),
        (["table", "nowhere"], "no results.json there"),
    ],
)
def test_calls_that_make_no_sense(arguments, message, quiet, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_process_with_spinning_threads_is_not_timed(monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(RuntimeError, match="torch was imported before"):
        main(["run", "--quick"])


def test_registry_is_what_the_benchmark_promises():
    for device in ("cpu", "cuda"):
        found = contenders.registry(device)
        names = [one.name for one in found]
        assert len(set(names)) == len(names)
        assert {"peer-eager", "peer-eager, no syncs", "peer-compiled", "clip-eager", "clip-compiled"} <= set(names)
        assert ("peer-compiled, max-autotune" in names) == (device == "cuda")
        for backend in ("reference", "cpu", "triton", "cuda"):
            forms = {one.name.split("/")[1] for one in found if one.backend == backend}
            assert forms >= {"velocity", "seeded", "single-pass", "means", "clip", "step, then means"}
    assert {one.start for one in contenders.registry("cpu")} == set(Start)


def test_workloads_are_the_named_ones():
    sizes = {w.key: w.elements_per_row for w in workloads.WORKLOADS}
    assert sizes["sd3-512/8"] == sizes["sd3-512/16"] == sizes["stacked/8x3"] == 65_536
    assert sizes["sd3-1024/8"] == sizes["flux-1024/16"] == 262_144
    assert sizes["flux2-1024/8"] == 524_288
    assert sizes["wan-480p/4"] == sizes["wan-480p/8"] == 2_096_640
    assert sizes["hunyuan-720p/4"] == sizes["hunyuan-720p/16"] == 7_603_200
    assert [w.key for w in workloads.select(["sd3-512", "sd3-512/8"], "cpu", False)] == ["sd3-512/8", "sd3-512/16"]
    assert workloads.select(["all"], "cpu", False) == list(workloads.WORKLOADS)
    assert all(w.core for w in workloads.select(["default"], "cuda", True))
