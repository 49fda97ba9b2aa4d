"""From run files to tables, verdicts, figures and the page: synthetic runs whose answers are known."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from support.figures import watched

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from bench.learning import analyses, document, mask_and_clip, paths, plan, requests, statistics, tables
from bench.learning.figures import TASKS
from bench.learning.methods import METHODS
from bench.learning.requests import Cell
from bench.learning.results import Run, find
from flowdppo_fast.runs import figures


@pytest.fixture(scope="module")
def settings():
    return requests.load_settings()


def make(
    cell: Cell, *, rewards=(1.0, 1.5, 2.0), drifts=(0.0, 50.0, 100.0), frechet=(1.0, 2.0, 3.0), history=None
) -> Run:
    """A run with an evaluation per entry."""
    names = requests.REWARDS[cell.task][cell.rewards]

    def place(number: int) -> dict:
        scores = dict.fromkeys(names, rewards[number])
        quality = {"accuracy": 1.0, "frechet": frechet[number], "diversity": 3.0}
        part = {"rewards": scores, "reward_std": dict.fromkeys(names, 0.5), **quality}
        return {"iteration": number + 1, "trained": part, "held_out": part, "drift_nats": drifts[number]}

    noise = {"rows": 5000, "kl": 0.1, "log_ratio_mean": -0.1, "log_ratio_std": 0.45, "z_mean": 0.0, "z_std": 1.0}
    decision = {"clip": 0.36, "dropped": 0.2, "threshold": 0.05, "spurious": 0.3, "kl_of_clipped_median": 0.1,
                "kl_of_masked_median": 0.2}  # fmt: skip
    result = {
        "request": {"cell": asdict(cell), "trainer": {"run": {"iterations": 99}}},
        "history": {"reward": list(history or np.linspace(1, 2, 12)), "masked_fraction": [0.25] * 12},
        "evaluations": [place(number) for number in range(len(rewards))],
        "rows": {"noise": [noise], "decisions": [decision]},
    }
    return Run(result)


def sweep_runs(settings, final, seeds=range(8), task="digits", drift=lambda cell: 100.0):
    """The whole sweep; ``final(cell)`` is the last reward, ``drift(cell)`` the last drift."""
    runs = []
    for cell in {cell.group: cell for cells in plan.studies(task, settings).values() for cell in cells}.values():
        for seed in seeds:
            own = Cell(**{**asdict(cell), "seed": seed})
            runs.append(make(own, rewards=(1.0, 1.5, final(own) + 0.01 * seed), drifts=(0.0, 50.0, drift(own))))
    return runs


def test_median_and_interval():
    assert statistics.estimate([1.0, 2.0]).count == 2
    assert np.isnan(statistics.estimate([1.0, 2.0]).low)
    assert statistics.estimate([3.0] * 8) == (3.0, 3.0, 3.0, 8)
    spread = statistics.estimate([float(x) for x in range(9)])
    assert spread.median == 4
    # the 95 % interval of a median of nine: between the second and the eighth, to bootstrap's accuracy
    assert 1 <= spread.low < 4 < spread.high <= 7
    assert spread == statistics.estimate([float(x) for x in range(9)])
    # coverage: the true median 0 of normal samples lies inside about 95 times in 100, hardly below 85
    generator = np.random.default_rng(0)
    found = [statistics.estimate(generator.normal(size=12)) for _ in range(200)]
    assert np.mean([e.low <= 0 <= e.high for e in found]) > 0.85
    with pytest.raises(ValueError, match="expected at least one"):
        statistics.estimate([])


def test_verdicts_need_an_interval_beside_zero():
    seeds = dict.fromkeys(range(8), 1.0)
    more = {seed: 1.0 + 0.1 * seed + 0.1 for seed in range(8)}
    mixed = {seed: 1.0 + 0.1 * (-1) ** seed for seed in range(8)}
    assert statistics.verdict(statistics.paired(more, seeds)) == "shown"
    assert statistics.verdict(statistics.paired(seeds, more)) == "opposite"
    assert statistics.verdict(statistics.paired(mixed, seeds)) == "not shown"
    assert statistics.verdict(statistics.paired(more, {0: 1.0})) == "too few seeds"
    few = dict.fromkeys(range(5), 1.0)
    assert statistics.verdict(statistics.paired(more, few)) == "too few seeds"
    assert statistics.verdict(statistics.paired({1: 1.0}, {2: 1.0})) == "not measured"
    # seeds that only one has do not count
    assert statistics.paired({0: 5.0, 1: 2.0}, {1: 1.0}).median == 1.0


def test_a_level_is_crossed_between_evaluations():
    along, measured = np.array([0.0, 50.0, 100.0]), np.array([1.0, 2.0, 6.0])
    assert analyses.crossing(along, measured, 75.0) == 4.0
    assert analyses.crossing(along, measured, 0.0) == 1.0
    assert analyses.crossing(along, measured, 101.0) is None


def test_best_at_equal_drift_takes_as_many_runs_from_each_method():
    runs = [
        make(Cell("digits", "flow_dppo", bound), rewards=(1.0, 1.5, final)) for bound, final in ((0.1, 2.0), (0.2, 3.0))
    ]
    assert analyses.best_at_drift(runs, 75.0, 2) == {"flow_dppo": {0: 2.25}}
    # a run that never gets so far counts with what it had
    assert analyses.best_at_drift(runs, 1000.0, 2) == {"flow_dppo": {0: 3.0}}
    # half a sweep is nobody's
    assert analyses.best_at_drift(runs[:1], 75.0, 2) == {}
    assert analyses.at_reward(runs, 1.75, analyses.held_out("frechet"), 2)["flow_dppo"][0] == pytest.approx(2 + 1 / 6)
    ended = make(Cell("digits", "flow_dppo", 0.1))
    ended.result["request"]["trainer"]["run"]["iterations"] = 2
    # the evaluations of the start and the end draw other numbers of pages
    assert [place["iteration"] for place in analyses.alike(ended)] == [1, 3]
    assert analyses.at_reward(runs, 9.0, analyses.held_out("frechet"), 2) == {}


def test_the_largest_fall_is_from_the_runs_own_best():
    run = make(Cell("digits", "flow_dppo", 0.1), history=[1, 1, 1, 4, 4, 4, 2, 2, 2, 3, 3, 3])
    assert analyses.fall(run) == pytest.approx(2.0)
    assert analyses.fall(make(Cell("digits", "flow_dppo", 0.1))) == 0.0


def test_gains_are_in_deviations_of_the_pretrained_pages():
    run = make(Cell("digits", "flow_dppo", 0.1, rewards=2))
    assert run.gains() == {"judge": 2.0, "bold": 2.0}
    assert analyses.smallest_gain(run) == 2.0


def test_noise_of_runs_is_pooled_by_rows():
    runs = [make(Cell("digits", "flow_dppo", 0.1, seed=seed)) for seed in range(3)]
    (entry,) = analyses.pooled_noise(runs)
    assert entry["rows"] == 15_000
    assert entry["log_ratio_std"] == pytest.approx(0.45)


def test_claims_follow_the_runs(settings):
    better = {"flow_dppo": 2.5, "flow_dppo_cps": 2.6}
    runs = sweep_runs(settings, lambda cell: better.get(cell.method, 2.0))
    found = {(one.claim, one.text): statistics.verdict(one.difference) for _, one in tables.contrasts(runs, settings)}
    assert found["higher reward", "final reward: Flow-DPPO - Flow-GRPO"] == "shown"
    assert found["less drift", "nats less at the end: Flow-DPPO - Flow-GRPO"] == "not shown"
    assert {verdict for (claim, _), verdict in found.items() if claim == "balanced objectives"} == {"shown"}
    assert {verdict for (claim, _), verdict in found.items() if claim == "asymmetry matters"} == {"shown"}
    nearer = sweep_runs(settings, lambda cell: 2.0, drift=lambda cell: 90.0 if cell.method == "flow_dppo" else 100.0)
    found = {one.text: statistics.verdict(one.difference) for _, one in tables.contrasts(nearer, settings)}
    assert found["nats less at the end: Flow-DPPO - Flow-GRPO"] == "shown"
    assert found["final reward: Flow-DPPO - Flow-GRPO"] == "not shown"
    worse = sweep_runs(settings, lambda cell: -better.get(cell.method, 2.0))
    found = {one.text: statistics.verdict(one.difference) for _, one in tables.contrasts(worse, settings)}
    assert found["final reward: Flow-DPPO - Flow-GRPO"] == "opposite"


def test_every_table_and_figure_is_made_from_whole_and_from_empty_sweeps(settings, tmp_path, monkeypatch):
    overlapping = watched(monkeypatch)
    for number, runs in enumerate(([], sweep_runs(settings, lambda cell: 2.0, seeds=range(2)))):
        for table in tables.TABLES.values():
            lines = table(runs, settings).splitlines()
            assert len({line.count("|") for line in lines}) == 1, lines
        made = document.draw(runs, settings, tmp_path / str(number))
        assert all(path.stat().st_size > 5000 for path in made)
        assert len(made) == (0 if not runs else 7)
    assert overlapping == {path.name: [] for path in made}


def test_an_unfinished_sweep_is_said(settings):
    runs = sweep_runs(settings, lambda cell: 2.0, seeds=range(3))
    said = tables.progress(runs, settings)
    assert "| digits frontier | 28 | 3 of 8 |" in said
    assert "| shapes tuned | 7 | 0 of 8 |" in said


def test_no_table_of_the_page_is_left_over_from_one_that_is_no_more():
    # that they are those of the run files is checked by make check-tables
    assert set(re.findall("<!-- learning:(.*) -->", paths.PAGE.read_text())) == set(tables.TABLES)


def test_a_page_that_lacks_a_table_or_has_another_is_refused(settings, tmp_path, capsys, monkeypatch):
    # made once: they are the same for both pages
    blocks = document.blocks(document.load(paths.RESULTS), settings)
    monkeypatch.setattr(document, "blocks", lambda *_: blocks)
    page, text = tmp_path / "learning.md", paths.PAGE.read_text()
    for changed, said in (
        (text.replace("<!-- learning:claims -->", ""), "expected one line <!-- learning:claims -->"),
        (text.replace("| claim | task |", "| claim | taks |"), "-| claim | taks |"),
    ):
        page.write_text(changed)
        assert document.update(paths.RESULTS, settings, page, tmp_path, check=True) == 1
        assert said in capsys.readouterr().err
    assert page.read_text() == changed


def test_every_method_has_a_look_and_every_task():
    assert set(figures.METHODS) == set(METHODS)
    assert set(TASKS) == set(requests.REWARDS)
    assert not {look.colour for look in TASKS.values()} & {look.colour for look in figures.METHODS.values()}


def test_runs_without_numbers_are_counted_and_not_averaged(settings):
    runs = sweep_runs(settings, lambda cell: 2.0, seeds=range(3))
    lost = Run({**runs[0].result, "failed": "4 updates were skipped"})
    with_it = document.blocks([lost, *runs[1:]], settings)
    assert "| stopped without finite numbers | - | 1 |" in with_it.pop("learning:progress")
    without = document.blocks(runs[1:], settings)
    del without["learning:progress"]
    assert with_it == without


def test_the_figure_of_the_readme_is_drawn_from_rows_of_its_run_file(tmp_path):
    held = json.loads(paths.ROWS.read_text())
    recorded = find(paths.RESULTS, held["run"]).result
    (decision,) = [entry for entry in recorded["rows"]["decisions"] if entry["clip"] == recorded["request"]["bound"]]
    assert {key: held[key] for key in decision} == decision, "run `python -m bench.learning rows` on that file"
    assert held["moved_rows"] == recorded["rows"]["moved_rows"]
    # the rows that are shown say what all of them do: as many are far and kept as near and dropped
    kl, clipped = np.array(held["kl"]), np.abs(held["log_ratio"]) > held["clip"]
    near = kl < held["threshold"]
    assert (clipped & near).sum() / clipped.sum() == pytest.approx(held["spurious"], abs=0.05)
    assert (~clipped & ~near).sum() / clipped.sum() == pytest.approx(held["spurious"], abs=0.05)
    first, again = (mask_and_clip.draw(held, tmp_path / name) for name in ("first.png", "again.png"))
    assert first.read_bytes() == again.read_bytes()


def test_only_a_clipped_run_is_asked_for_its_rows():
    name = "digits-flow_dppo-b0.066-s0"
    with pytest.raises(ValueError, match="got method 'flow_dppo', expected one that clips"):
        mask_and_clip.record(find(paths.RESULTS, name).result, name)
