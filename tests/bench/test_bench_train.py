"""bench/train: habits change the cost and not the update, wrong contenders are refused, pages come from files."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from bench_support import ROOT
from support.figures import watched
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from bench.ops.devices import CpuDevice
from bench.train import published, results, run, table
from bench.train.__main__ import main
from bench.train.names import CONTENDERS, EAGER, ITEMS, MEANS, OURS, THEIRS
from bench.train.workloads import FLUX1_DEV, TINY, WORKLOADS, select

UPDATES, STEPS, ROLLOUT_CALLS, ROWS = 2, 3, 10, 4
LATENT = 16 * 8 * 8


class Count(TorchDispatchMode):
    """How often a number is read on the host."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    made = run.make_trainer(TINY, torch.device("cpu"), str(tmp_path_factory.mktemp("run")))
    made.pipeline.set_progress_bar_config(disable=True)
    # the check of the first replay is over
    made._iterate()
    return made


@pytest.fixture(scope="module")
def measured():
    """Two rounds of everything on a model of no size."""
    return run.measure(TINY, CpuDevice(), lambda line: None, rounds=2)


@pytest.fixture
def result(measured):
    """A result around ``measured``, as a run writes it."""
    environment = {
        "cpu": "a CPU",
        "cpus": 2,
        "git_sha": "0" * 10,
        "git_dirty": False,
        "torch": "2",
        "date": "2026-01-01",
    }
    return copy.deepcopy(
        {
            "schema": results.SCHEMA,
            "kind": results.KIND,
            "device": "cpu",
            "command": "python -m bench.train run",
            "quick": False,
            "threads": 1,
            "environment": {**environment, "date": "2026-01-01", "load_average": 1.0},
            "workloads": [measured],
            "left_out": [{"workload": "other", "reason": "too large"}],
        }
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_each_habit_costs_what_its_name_says_and_updates_alike(trainer, name):
    habits = CONTENDERS[name]
    calls, backwards = [], []
    transformer, micro = trainer.pipeline.transformer, trainer._micro_batch
    handle = transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    try:
        trainer.begin(CONTENDERS[OURS])
        expected = run.first_gradient(trainer)
        # what is kept from call to call is there
        trainer.begin(habits)
        run.first_gradient(trainer)
        calls.clear()
        trainer._micro_batch = lambda *a: backwards.append(1) or micro(*a)
        trainer.begin(habits)
        with Count() as counted:
            gradient = run.first_gradient(trainer)
    finally:
        handle.remove()
        trainer._micro_batch = micro
    assert (gradient - expected).norm() <= torch.finfo(torch.float32).eps ** 0.5 * expected.norm()
    width = STEPS if "per-step" in habits else 1
    # two rows per update, one micro-batch each
    assert calls.count(True) == len(backwards) == UPDATES * width
    assert calls.count(False) == ROLLOUT_CALLS + (UPDATES * width if "recompute" in habits else 0)
    trainer.begin(habits - {ITEMS})
    with Count() as silent:
        run.first_gradient(trainer)
    reads = counted.reads - silent.reads
    assert reads == (13 * UPDATES * width if ITEMS in habits else 0)


@pytest.mark.parametrize("name", CONTENDERS)
def test_stored_bytes_are_those_of_the_storage_habit(trainer, name):
    def stored(habits):
        trainer.begin(habits)
        return trainer._iterate()["trajectory_bytes"]

    ours, other = stored(CONTENDERS[OURS]), stored(CONTENDERS[name])
    # next latents, means and a log-prob in float32, for a velocity in the model's dtype, here float32
    more = STEPS * (4 * LATENT + 4) if {EAGER, MEANS} & CONTENDERS[name] else 0
    # one number stands for the velocities that are gone
    assert other - ours == pytest.approx(more, abs=4)


@pytest.mark.bits(across="again")
def test_every_iteration_begins_with_the_same_weights_and_rollout(trainer):
    found = []
    for _ in range(2):
        trainer.begin(CONTENDERS[OURS])
        metrics = trainer._iterate()
        found.append(
            (
                {k: v for k, v in metrics.items() if not k.startswith(("seconds", "samples_per"))},
                [*trainer.weights.parameters],
            )
        )
        found[-1][1][:] = [p.detach().clone() for p in found[-1][1]]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_all_contenders_are_timed_in_every_round(measured):
    assert [entry["name"] for entry in measured["contenders"]] == list(CONTENDERS)
    for entry in measured["contenders"]:
        assert entry["status"] == "ok"
        assert len(entry["rounds"]) == 2
        for sample in entry["rounds"]:
            assert 0 < sample["loss"] < sample["cpu_seconds"]
            assert 0 < sample["sampling"] + sample["updates"] <= sample["seconds"]


@pytest.mark.parametrize("pipeline", ["sd3", "flux"])
def test_in_bfloat16_half_of_the_bytes_are_kept_and_nobody_is_refused(pipeline):
    # as on a GPU: bfloat16 weights under autocast, FLUX with checkpointing
    small = {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    changes = {"dtype": torch.bfloat16}
    if pipeline == "flux":
        options = {"guidance_scale": 3.5}
        changes |= {
            "pipeline": "flux",
            "transformer": {**FLUX1_DEV, **small},
            "options": options,
            "checkpointing": True,
        }
    measured = run.measure(dataclasses.replace(TINY, **changes), CpuDevice(), lambda line: None, rounds=1)
    entries = {entry["name"]: entry for entry in measured["contenders"]}
    assert {entry["status"] for entry in entries.values()} == {"ok"}
    assert entries[OURS]["trajectory_bytes"] <= results.BYTES_GOAL * entries[THEIRS]["trajectory_bytes"]


def test_a_contender_with_another_gradient_is_refused(monkeypatch):
    from bench.train import habits

    right = habits.peers.dppo
    wrong = lambda *arguments: right(*arguments)._replace(loss=1.001 * right(*arguments).loss)  # noqa: E731
    monkeypatch.setattr(habits.peers, "dppo", wrong)
    said = []
    measured = run.measure(TINY, CpuDevice(), said.append, rounds=1)
    refused = {entry["name"]: entry for entry in measured["contenders"] if entry["status"] == "refused"}
    assert set(refused) == {"eager loss", THEIRS}
    assert not any(entry["rounds"] for entry in refused.values())
    assert any("eager loss: refused" in line for line in said)


@pytest.mark.parametrize(("factor", "share", "verdicts"), [(1.3, 0.4, ["met"] * 2), (1.2, 0.6, ["missed"] * 2)])
def test_goals_are_judged_by_paired_rounds_and_stored_bytes(result, factor, share, verdicts):
    entries = {entry["name"]: entry for entry in result["workloads"][0]["contenders"]}
    # the machine is slower in the second round, for everybody
    for name, times in ((OURS, (1.0, 3.0)), (THEIRS, (factor, 3 * factor))):
        for sample, seconds in zip(entries[name]["rounds"], times):
            sample["seconds"] = sample["cpu_seconds"] = seconds
    entries[OURS]["trajectory_bytes"], entries[THEIRS]["trajectory_bytes"] = share, 1.0
    goals = results.goals(result)
    assert [goal.verdict for goal in goals] == verdicts
    assert goals[0].measured.startswith(f"{factor:.2f} [{factor:.2f}, {factor:.2f}]x")
    for sample in entries[THEIRS]["rounds"]:
        # slow by the neighbours only: the CPU was as busy as before
        sample["seconds"] *= 2
    assert results.goals(result)[0].verdict == verdicts[0]
    entries[THEIRS]["rounds"] = []
    assert {goal.verdict for goal in results.goals(result)} == {"not yet measured"}


def test_tables_plots_and_pages_are_made_from_the_files_alone(result, tmp_path, quiet, monkeypatch):
    overlapping = watched(monkeypatch)
    folder = tmp_path / "result"
    results.write(result, folder)
    assert results.load(folder) == json.loads(json.dumps(result))
    text = table.full(results.load(folder))
    assert all(f"| {name} " in text for name in CONTENDERS)
    assert "left out: other: too large" in text
    assert main(["plot", str(folder)]) == 0
    assert (folder / "plots" / "tiny.png").stat().st_size > 10_000
    assert overlapping == {"tiny.png": []}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:train:cpu -->\n<!-- /bench:train:cpu -->\nafter\n")
    arguments = ["page", str(folder), "--page", str(page)]
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    page.write_text(page.read_text().replace("| this library", "| another one"))
    assert main([*arguments, "--check"]) == 1
    result["quick"] = True
    results.write(result, folder)
    assert main(arguments) == 2


def test_the_command_writes_a_result_folder(tmp_path, quiet, capsys):
    assert main(["run", "--device", "cpu", "--quick", "--rounds", "1", "--output", str(tmp_path)]) == 0
    result = results.load(tmp_path)
    assert result["quick"]
    assert result["command"] == "python -m bench.train run --device cpu --quick --rounds 1"
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "plots" / "tiny.png").exists()
    assert str(tmp_path) not in (tmp_path / results.FILE).read_text()


def test_calls_that_make_no_sense_are_refused(tmp_path, quiet, capsys):
    assert main(["run", "--device", "cpu", "--workloads", "sd35-medium", "--output", str(tmp_path)]) == 2
    assert "expected some of 'sd3-small', 'tiny' on 'cpu'" in capsys.readouterr().err
    assert main(["table", str(tmp_path)]) == 2
    if not torch.cuda.is_available():
        assert main(["run", "--device", "cuda"]) == 2


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(monkeypatch, quiet):
    found = run.resident_peak(TINY, THEIRS)
    assert 0 < found["resident_before"] <= found["resident_peak"]


# published numbers of weights
PARAMETERS = {"sd35-medium": 2_243_171_520, "flux1-dev": 11_901_408_320}


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.device == "cuda"], ids=lambda w: w.name)
def test_gpu_workloads_have_the_published_dimensions(workload):
    transformer = workload.build_transformer("meta")
    assert sum(p.numel() for p in transformer.parameters()) == PARAMETERS[workload.name]
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    rows = 2
    side = workload.side // 8
    latent = (16, side, side) if workload.pipeline == "sd3" else (side * side // 4, 64)
    prompts = {name: value for name, value in workload.prompt_list()[0].items() if name != "text"}
    arguments = {
        "hidden_states": torch.empty(rows, *latent),
        "encoder_hidden_states": prompts["prompt_embeds"].expand(rows, -1, -1),
        "pooled_projections": prompts["pooled_prompt_embeds"].expand(rows, -1),
        "timestep": torch.empty(rows),
    }
    if workload.pipeline == "flux":
        arguments["guidance"] = torch.empty(rows)
        arguments |= {"img_ids": torch.empty(latent[0], 3), "txt_ids": torch.empty(workload.tokens, 3)}
    moved = {name: value.to("meta", torch.bfloat16) for name, value in arguments.items()}
    assert transformer(**moved, return_dict=False)[0].shape == (rows, *latent)
    assert workload.config("unused").sampling.candidate_steps == (1, 2, 3)


def test_workloads_are_chosen_by_device():
    assert [w.name for w in select(["default"], "cpu")] == ["sd3-small"]
    assert [w.name for w in select(["default"], "cuda")] == ["sd35-medium", "flux1-dev"]


def test_the_page_on_memory_has_the_computed_trajectories(quiet, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["memory", "--check", "--tables", "trajectories"]) == 0


@pytest.mark.slow
def test_the_page_on_memory_has_the_computed_peaks():
    # one model here; `python -m bench.train memory --check` walks through all of them
    page = (ROOT / "docs" / "memory.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    lines = published.peak_table(published.MODELS[:1]).splitlines()
    assert len(lines) == 2 + len(published.settings())
    for line in lines[2:]:
        assert [cell.strip() for cell in line.split("|")] in cells
