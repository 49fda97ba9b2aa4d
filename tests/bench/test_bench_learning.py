"""The learning benchmark in short: mechanics of every method, and repetition of a run bit for bit."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from bench.learning import plan, quick, requests, results, runs, sweep
from bench.learning.__main__ import main
from bench.learning.methods import METHODS, objective_settings
from bench.learning.requests import Cell
from bench.learning.results import Run


@pytest.fixture(scope="module")
def settings():
    return quick.shortened(requests.load_settings())


@pytest.fixture(scope="module")
def short_run(settings):
    return runs.run(requests.request(Cell("digits", "flow_dppo", 0.01), settings))


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_gives_finite_numbers(method, settings):
    cell = plan.tuned("digits", method, settings)
    quick.check_result(runs.run(requests.request(cell, settings)))


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("entries", [{"kl_weight": 0.1}, {"guidance": 2.0}, {"rewards": 3, "inner_epochs": 1}])
def test_every_study_runs(entries, settings):
    result = runs.run(requests.request(Cell("digits", "flow_dppo", 0.01, **entries), settings))
    quick.check_result(result)
    if entries.get("kl_weight"):
        assert result["history"]["kl_ref_mean"][-1] > 0


@pytest.mark.bits(across="again")
def test_the_larger_task_runs(settings):
    result = runs.run(requests.request(Cell("shapes", "flow_grpo", 0.1), settings))
    quick.check_result(result)


@pytest.mark.parametrize("task", ["digits", "shapes"])
def test_kernel_gives_the_references_kl(task):
    quick.kernel_difference(task)


@pytest.mark.bits(across="again")
def test_a_run_is_repeated_bit_for_bit_from_its_file_alone(short_run, tmp_path, capsys):
    path = tmp_path / "run.json"
    results.write(short_run, path)
    assert main(["repeat", str(path)]) == 0
    assert "bit for bit the same" in capsys.readouterr().out
    # and a file that says something else is found out
    changed = copy.deepcopy(short_run)
    changed["history"]["reward"][-1] += 1e-6
    results.write(changed, path)
    assert main(["repeat", str(path)]) == 1
    assert "history.reward[1]" in capsys.readouterr().out


@pytest.mark.bits(across="again")
def test_another_seed_is_another_run(short_run, settings):
    other = runs.run(requests.request(Cell("digits", "flow_dppo", 0.01, seed=1), settings))
    assert short_run["history"]["reward"] != other["history"]["reward"]
    # the pretrained model and its measuring are the same
    assert short_run["evaluations"][0] == other["evaluations"][0]


def test_run_files_are_small_and_load_again(short_run, tmp_path):
    path = tmp_path / "run.json"
    results.write(short_run, path)
    assert path.stat().st_size < 12_000
    loaded = results.load(tmp_path)[0]
    assert loaded.result == json.loads(json.dumps(short_run))
    assert loaded.cell == Cell("digits", "flow_dppo", 0.01)
    assert loaded.drift > 0
    assert set(loaded.gains()) == {"judge"}
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"expected kind 'bench\.learning'"):
        results.load_file(path)


def test_runs_are_folded_into_a_table_while_others_end(short_run, tmp_path, monkeypatch):
    folder = tmp_path / "results"

    def leave(seed):
        result = copy.deepcopy(short_run)
        result["request"]["cell"]["seed"] = seed
        results.write(result, results.file_of(Run(result).cell.name, folder))
        return Run(result).cell.name

    names = [leave(seed) for seed in (3, 12, 1)]
    before = [run.result for run in results.load(folder)]
    # one ends while the table is being written: it is read by the next fold
    late, replace = [], results._replace

    def slow(path, content):
        late.append(leave(2))
        replace(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(results, "_replace", slow)
        # a run file is written by the same function
        patch.setattr(results, "write", lambda result, path: path.write_text(json.dumps(result)))
        assert main(["fold", "--results", str(folder)]) == 0
    assert [path.stem for path in folder.glob("*.json")] == late
    assert [name for name in names + late if not results.exists(name, folder)] == []
    assert [run.cell.seed for run in results.load(folder)] == [1, 12, 2, 3]
    assert [run.result for run in results.load(folder) if run.cell.seed != 2] == before
    assert results.fold(folder) == 1
    assert results.fold(folder) == 0
    assert not list(folder.glob("*.json"))
    assert results.find(folder, late[0]).cell.seed == 2
    # the same runs are the same bytes, in whatever order they came
    content = results.table_of(folder).read_bytes()
    for run in reversed(results.load(folder)):
        results.write(run.result, results.file_of(run.cell.name, tmp_path / "again"))
    results.fold(tmp_path / "again")
    assert results.table_of(tmp_path / "again").read_bytes() == content
    # killed before its files were removed, it is repeated; another result of that name is an error
    leave(1)
    assert len(results.load(folder)) == 4
    results.fold(folder)
    assert results.table_of(folder).read_bytes() == content
    path = results.file_of(leave(1), folder)
    path.write_text(path.read_text().replace('"failed": null', '"failed": "lost"'))
    with pytest.raises(ValueError, match="is there already, with other results"):
        results.fold(folder)
    assert path.exists()
    with pytest.raises(ValueError, match="no such run"):
        results.find(tmp_path / "nowhere", "digits")


def test_a_bound_in_nats_is_the_same_sum_in_both_tasks():
    for elements in (256, 12_288):
        assert objective_settings(METHODS["flow_dppo"], 0.66, elements)["threshold"] * elements == pytest.approx(0.66)
        clip = objective_settings(METHODS["flow_grpo"], 0.66, elements)
        assert clip["clip_low"] * elements == clip["clip_high"] * elements == pytest.approx(0.66)
    with pytest.raises(ValueError, match="expected threshold"):
        objective_settings(METHODS["flow_dppo"], None, 256)
    with pytest.raises(ValueError, match="expected None"):
        objective_settings(METHODS["unclipped"], 0.1, 256)


@pytest.mark.bits(across="again")
def test_the_drift_is_the_kl_of_the_path(settings):
    """Against a closed form: a constant change of the velocity is a known Gaussian shift on each step."""
    from bench.learning.evaluate import Pretrained, drift_nats
    from bench.learning.tasks import load_task
    from flowdppo_fast import sde_schedule

    task = load_task("digits")
    pipeline = task.pipeline()
    pretrained = Pretrained(pipeline.transformer)
    shift = 0.03
    with torch.no_grad():
        pipeline.transformer.proj_out.bias += shift
    found = drift_nats(pipeline, pretrained, task.trained, 4, num_steps=5, guidance=1.0)
    steps = sde_schedule("flow_sde", [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], eta=0.7)[:-1]
    expected = sum((step.kl_scale * shift) ** 2 / 2 * task.elements for step in steps)
    assert found == pytest.approx(expected, rel=1e-4)
    with pretrained.restored():
        assert drift_nats(pipeline, pretrained, task.trained, 4, num_steps=5, guidance=1.0) == 0
    # and afterwards the present weights are back
    assert drift_nats(pipeline, pretrained, task.trained, 4, num_steps=5, guidance=1.0) == found


def test_every_method_is_tuned_and_swept_over_as_many_values():
    settings = requests.load_settings()
    assert len({len(plan.values(method, settings)) for method in METHODS}) == 1
    tuning, full = plan.tuning(settings), plan.sweep(settings)
    assert not {cell.seed for cell in tuning} & {cell.seed for cell in full}
    assert len({cell.name for cell in full}) == len(full)
    counts = {method: sum(cell.method == method for cell in tuning) for method in METHODS}
    assert len(set(counts.values())) == 1
    for study, cells in plan.by_study(settings).items():
        groups = {}
        for cell in cells:
            groups.setdefault(cell.group, set()).add(cell.seed)
        assert all(len(seeds) == 8 for seeds in groups.values()), study


def test_the_frozen_choice_is_what_the_tuning_runs_say():
    from bench.learning.paths import TUNING

    settings = requests.load_settings()
    found = results.load(TUNING)
    assert {run.cell.name for run in found} == {cell.name for cell in plan.tuning(settings)}
    assert plan.choose(found) == {
        method: {"bound": entry["bound"], "rate": entry.get("rate", 1.0)} for method, entry in settings["tuned"].items()
    }


def test_the_sweep_skips_what_is_there_and_says_what_is_missing(settings, tmp_path, monkeypatch):
    done = []

    def pretend(request):
        done.append(request["cell"]["seed"])
        return {"seconds": {"wall": 0.0}}

    monkeypatch.setattr(sweep, "run", pretend)
    cells = [Cell("digits", "flow_dppo", 0.01, seed=seed) for seed in range(5)]
    results.file_of(cells[1].name, tmp_path).write_text("{}")
    # claimed by a process that is there, and by one that is gone
    results.file_of(cells[2].name, tmp_path).with_suffix(".lock").write_text("1")
    results.file_of(cells[3].name, tmp_path).with_suffix(".lock").write_text("999999999")
    assert sweep.run_all(cells, settings, tmp_path) == 3
    assert done == [0, 3, 4]
    assert "4 of    5 runs" in sweep.status({"digits frontier": cells}, tmp_path)
    assert [path.name for path in Path(tmp_path).glob("*.lock")] == ["digits-flow_dppo-b0.01-s2.lock"]
    done.clear()
    assert sweep.run_all(cells, settings, tmp_path / "other", shard=1, shards=2) == 2
    assert done == [1, 3]
    assert sweep.run_all(cells, settings, tmp_path / "late", until=0.0) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_no_number_that_is_not_finite_reaches_lapack(value, monkeypatch):
    """There it is a crash on some processors; 1e200 is finite, its square is not."""
    from bench.learning import judges, measures

    def refuse(matrix, **options):
        assert matrix.isfinite().all(), "LAPACK was given a number that is not finite"
        raise AssertionError("LAPACK was called")

    monkeypatch.setattr(torch.linalg, "eigvals", refuse)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    features = torch.randn(12, 3, dtype=torch.float64)
    centre, covariance = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    spoilt = features.clone()
    spoilt[4, 1] = value
    assert math.isnan(measures.frechet(spoilt, centre, covariance))
    with pytest.raises(AssertionError, match="LAPACK was called"):
        measures.frechet(features, centre, covariance)
    if not math.isfinite(value):
        monkeypatch.setattr(judges, "_hidden", lambda judge, ink: spoilt)
        with pytest.raises(ValueError, match="features of these pages are not finite"):
            judges.FeatureSpace.fit(None, None)


def test_a_run_that_lost_its_numbers_is_a_result_and_other_errors_are_not(settings, monkeypatch):
    request = requests.request(Cell("digits", "flow_dppo", 0.01), settings)
    request["trainer"]["optimizer"] |= {"learning_rate": 1e30, "max_grad_norm": None}
    result = runs.run(request)
    assert result["failed"]
    assert "not finite" in result["failed"]
    assert [place["iteration"] for place in result["evaluations"]] == [0]
    json.dumps(result, allow_nan=False)

    def broken(trainer, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(runs.FlowDPPOTrainer, "train", broken)
    with pytest.raises(RuntimeError, match="something else"):
        runs.run(requests.request(Cell("digits", "flow_dppo", 0.01), settings))
