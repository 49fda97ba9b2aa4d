"""``flowdppo diagnose`` on synthetic run folders: each trouble is named where it is, and not where it is not."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.figures import watched

from flowdppo_fast.runs import diagnose, row_log
from flowdppo_fast.samplers import sde_schedule

ELEMENTS = 4096
THRESHOLD = 1e-4  # 0.41 nats


def write_run(
    folder, *, objective=None, kl=0.2, updates=4, floor=0.0, iterations=12, reward=(0.5, 0.9), extra=None, weights=None,
    nonfinite=0, dropped=None, sizes=(ELEMENTS,),
):  # fmt: skip
    """A run whose rows have the statistics of Gaussian policies: log-ratios of noise that is independent of the change.

    ``kl``: median over rows after the first update, nats; ``floor``: KL before it; ``extra``: further metrics as
    (first, last); ``dropped``: share of rows that is dropped at random, None for what the objective drops; ``sizes``:
    elements of the rows, in turn by update; KL and log-ratio in nats are those of ELEMENTS, and the same per element.
    """
    folder.mkdir(parents=True)
    objective = objective or {"name": "dppo", "threshold": THRESHOLD}
    config = {
        "objective": objective,
        "sampling": {"num_steps": 10, "sampler": "flow_sde", "eta": 0.7},
        "optimizer": {"updates_per_rollout": updates},
        "advantage": {"reward_weights": weights or {}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    generator = np.random.default_rng(0)
    rows, metrics = [], []
    for iteration in range(1, iterations + 1):
        share = (iteration - 1) / (iterations - 1)
        line = {"iteration": iteration, "reward": reward[0] + share * (reward[1] - reward[0])}
        line["nonfinite_rows"] = nonfinite if iteration == 3 else 0
        for name, (first, last) in (extra or {}).items():
            line[name] = first + share * (last - first)
        # a little noise, or every change would be one of infinitely many standard errors
        metrics.append({k: v + 0.01 * generator.normal() if isinstance(v, float) else v for k, v in line.items()})
        for update in range(updates):
            shape = (16, 3)
            distance = kl * np.exp(generator.normal(size=shape)) if update else np.full(shape, floor)
            log_ratio = np.sqrt(2 * distance) * generator.normal(size=shape) - distance
            advantage = generator.normal(size=16)
            away = advantage[:, None] * log_ratio > 0
            if dropped is not None:
                gone = (generator.random(shape) < dropped) & (update > 0)
            elif objective["name"] == "ratio_clip":
                gone = away & (np.abs(log_ratio) > objective["clip_low"] * ELEMENTS)
            elif objective["name"] == "dppo":
                gone = away & (distance >= objective["threshold"] * ELEMENTS)
            else:
                gone = np.zeros(shape, bool)
            rows.append(
                {
                    "iteration": iteration, "update": update, "steps": [0, 2, 4],
                    "elements": sizes[(iteration * updates + update) % len(sizes)],
                    "rows": list(range(16)), "advantage": advantage.tolist(),
                    "log_ratio": (log_ratio / ELEMENTS).tolist(), "kl": (distance / ELEMENTS).tolist(),
                    "kept": (~gone).astype(int).tolist(),
                }
            )  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def named(folder, **options) -> dict[str, str]:
    found = diagnose.troubles(diagnose.RunFolder.load(folder, **options))
    return {trouble.name: trouble.text for trouble in found}


def clipping(nats: float) -> dict:
    return {"name": "ratio_clip", "clip_low": nats / ELEMENTS, "clip_high": nats / ELEMENTS}


def test_a_run_without_trouble_has_none(tmp_path):
    assert named(write_run(tmp_path / "run")) == {}


# name, settings of a run that has the trouble, settings of the nearest one that has not, and a number that is said
CASES = [
    ("numbers that are not finite", {"nonfinite": 2}, {"nonfinite": 0}, "2 rows"),
    ("one update per rollout", {"updates": 1}, {"updates": 2}, "updates_per_rollout"),
    ("rollout/train mismatch", {"floor": 0.1}, {"floor": 0.01}, "KL of 0.1 nats"),
    ("rollout/train mismatch", {"floor": 0.1, "objective": clipping(1.0)}, {"floor": 0.01, "objective": clipping(1.0)},
     "KL of 0.1 nats"),
    ("bound never fires", {"kl": 1e-3}, {"kl": 0.2}, "the largest KL was"),
    ("bound never fires", {"kl": 1e-3, "objective": clipping(1.5)}, {"kl": 0.5, "objective": clipping(1.5)},
     "the clip range is 1.5"),
    ("bound never fires", {"kl": 1e-3, "objective": {"name": "log_hinge", "clip_high": 1.5 / ELEMENTS}},
     {"kl": 1e-3, "objective": {"name": "drpo", "threshold": 0.2}}, "the clip range is 1.5"),
    ("bound never fires", {"kl": 1e-3, "dropped": 0.0, "objective": {"name": "dppo", "threshold_nats": 0.5}},
     {"kl": 1e-3, "objective": {"name": "kl_penalty", "penalty": 2.0}}, "of the threshold"),
    ("bound drops nearly everything", {"dropped": 0.9}, {"dropped": 0.5}, "91% of the rows"),
    ("clip decided by noise", {"kl": 0.2, "objective": clipping(2.0)}, {"kl": 0.2, "objective": clipping(0.05)},
     "objective.name=dppo"),
    ("reward hacking", {"extra": {"eval/quality": (0.8, 0.4)}}, {"extra": {"eval/quality": (0.8, 0.8)}},
     "eval/quality fell from 0.7"),
    ("reward hacking", {"extra": {"reward/clip": (0.8, 0.4)}, "weights": {"clip": 0.0}},
     {"extra": {"reward/clip": (0.8, 0.4)}, "weights": {"clip": 1.0}}, "reward/clip fell"),
    ("reward hacking", {"extra": {"eval/reward": (0.8, 0.4)}},
     {"extra": {"eval/reward": (0.8, 0.4)}, "reward": (0.5, 0.5)},
     "the reward rose"),
    ("reward falls", {"reward": (0.7, 0.5)}, {"reward": (0.7, 0.7)}, "reward fell from 0.6"),
    ("reward falls", {"extra": {"eval/reward": (0.8, 0.4)}}, {"extra": {"eval/reward": (0.4, 0.8)}}, "eval/reward fell"),  # noqa: E501
    ("reward decided by the first latents", {"extra": {"noise_share": (0.05, 0.03)}},
     {"extra": {"noise_share": (0.3, 0.3)}}, "of the reward's variance within groups"),
    ("threshold under the noise of bf16 means", {"objective": {"name": "dppo", "threshold": 1e-6}, "kl": 0.002},
     {"objective": {"name": "dppo", "threshold": 1e-4}}, "per element"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sick", "healthy", "said"), CASES, ids=[f"{c[0]} {i}" for i, c in enumerate(CASES)])
def test_a_trouble_is_named_where_it_is_and_not_where_it_is_not(tmp_path, name, sick, healthy, said):
    found = named(write_run(tmp_path / "sick", **sick))
    assert said in found[name]
    assert name not in named(write_run(tmp_path / "healthy", **healthy))


# a run of examples/words that had to be stopped, with a quarter of its rows and numbers of four digits
FELL = Path(__file__).parent / "logged" / "fell"


def test_a_run_that_had_to_be_stopped_is_named_halfway(tmp_path):
    """docs/troubleshooting.md tells its story, and says these numbers."""
    lines = {name: (FELL / name).read_text().splitlines(keepends=True) for name in ("metrics.jsonl", "rows.jsonl")}
    assert [len(lines[name]) for name in lines] == [24, 24 * 4]

    def after(iterations):
        folder = tmp_path / str(iterations)
        folder.mkdir()
        (folder / "config.yaml").write_text((FELL / "config.yaml").read_text())
        (folder / "metrics.jsonl").write_text("".join(lines["metrics.jsonl"][:iterations]))
        (folder / "rows.jsonl").write_text("".join(lines["rows.jsonl"][: 4 * iterations]))
        return named(folder)

    found = after(24)
    assert list(found) == ["reward falls"]
    assert "reward fell from 0.469 to 0.191" in found["reward falls"]
    assert after(11) == {}
    assert "reward falls" in after(12)


@pytest.mark.parametrize("objective", [None, clipping(1.0)])
def test_rows_of_several_sizes_are_bounded_per_element(tmp_path, monkeypatch, objective):
    """Whichever size comes last: its N once stood for all."""
    settings = {"floor": 0.2, "objective": objective, "updates": 3, "iterations": 6}
    one = diagnose.numbers(diagnose.RunFolder.load(write_run(tmp_path / "one", **settings)))
    sizes, overlapping = (ELEMENTS, 4 * ELEMENTS), watched(monkeypatch)
    texts = []
    for name, order in (("up", sizes), ("down", sizes[::-1])):
        folder = diagnose.RunFolder.load(write_run(tmp_path / name, **settings, sizes=order))
        numbers = diagnose.numbers(folder)
        key = "clip_nats" if objective else "threshold_nats"
        assert numbers["elements"] == list(sizes)
        assert numbers[key] == [one[key], 4 * one[key]]
        texts.append(named(tmp_path / name)["rollout/train mismatch"])
        diagnose.draw(folder, tmp_path / f"{name}.png")
        assert overlapping[f"{name}.png"] == []
    assert texts[0] == texts[1]
    if objective is None:
        # 0.2 nats of 4,096 elements, and the same per element of four times as many
        assert "KL of 0.2 to 0.8 nats or more (4.9e-05 per element), 48.8% of the threshold (0.41 to 1.6" in texts[0]
    else:
        assert (tmp_path / "up.png").stat().st_size > 10_000
        # of a clip range the KL at which it is one standard deviation grows with N squared
        assert "of the KL at which the clip range is one standard deviation (0.5 to 8 nats)" in texts[0]


def test_every_check_has_a_case():
    assert {case[0] for case in CASES} == set(diagnose.CHECKS)


def test_spurious_clips_are_counted_by_the_exact_kl():
    """Five rows that move away and one that comes back. Log-ratios pick the 2nd, 3rd and 5th, KLs the 3rd to 5th."""
    rows = row_log.LoggedRows(
        iteration=np.ones(6, int), update=np.ones(6, int), step=np.zeros(6, int),
        advantage=np.array([1.0, 1.0, -1.0, -1.0, 1.0, 1.0]), log_ratio=np.array([0.1, 2.0, -3.0, -0.2, 4.0, -9.0]),
        kl=np.array([0.1, 0.2, 2.0, 1.0, 5.0, 9.0]), kept=np.ones(6, bool), elements=np.full(6, ELEMENTS),
    )  # fmt: skip
    found = row_log.clip_against_mask(rows, 1.0)
    assert found == {
        "dropped": 3 / 6, "threshold": 1.0, "spurious": 1 / 3, "kl_of_clipped_median": 2.0, "kl_of_masked_median": 2.0,
    }  # fmt: skip
    assert row_log.clip_against_mask(rows, 5.0) is None


def test_the_noise_of_independent_rows_is_the_predicted_one(tmp_path):
    folder = diagnose.RunFolder.load(write_run(tmp_path / "run", iterations=100))
    for entry in diagnose.numbers(folder)["steps"].values():
        # 4,800 rows a step: a standard deviation is known to 1 / sqrt(2 * 4800) = 1 %, times 4
        assert entry["noise_over_predicted"] == pytest.approx(1.0, abs=0.04)


def test_the_rounding_of_bf16_is_measured():
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = (x.bfloat16().double() - x).square().mean().sqrt().item()
    assert measured == pytest.approx(diagnose.BF16_ROUNDING, rel=0.05)
    # the KL of a step whose means are rounded, per element
    step = sde_schedule("flow_sde", [1 - i / 10 for i in range(11)], eta=0.7)[4]
    assert (measured / step.std) ** 2 / 2 == pytest.approx(diagnose.BF16_ROUNDING**2 / (2 * step.std**2), rel=0.1)


def test_the_shift_of_the_schedule_counts(tmp_path):
    folder = write_run(tmp_path / "run", objective={"name": "dppo", "threshold": 1.4e-5}, kl=0.05)
    name = "threshold under the noise of bf16 means"
    assert (name in named(folder)) != (name in named(folder, shift=12.0))


def test_report_plots_and_status(tmp_path, capsys, monkeypatch):
    overlapping = watched(monkeypatch)
    parser = argparse.ArgumentParser()
    diagnose.add_arguments(parser)
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad", updates=1)
    assert diagnose.run(parser.parse_args([str(good)])) == 0
    said = capsys.readouterr().out
    assert "nothing stands out" in said
    assert "step 4: KL" in said
    assert (good / "diagnose.png").stat().st_size > 10_000
    assert diagnose.run(parser.parse_args([str(bad), "--json", "--plot", str(tmp_path / "here.png")])) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["moved_rows"] == 0
    floor = inspect.signature(write_run).parameters["floor"].default
    assert list(report["mismatch_kl_nats"]) == ["0", "2", "4"]
    for values in report["mismatch_kl_nats"].values():
        assert values == {"mean": pytest.approx(floor), "max": pytest.approx(floor)}
    assert [trouble["name"] for trouble in report["troubles"]] == ["one update per rollout"]
    assert (tmp_path / "here.png").exists()
    assert overlapping == {"diagnose.png": [], "here.png": []}


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "rows.jsonl"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, missing, capsys):
    folder = write_run(tmp_path / "run", iterations=2)
    (folder / missing).unlink()
    parser = argparse.ArgumentParser()
    diagnose.add_arguments(parser)
    assert diagnose.run(parser.parse_args([str(folder)])) == 2
    assert missing.split(".")[0] in capsys.readouterr().out


def test_a_torn_line_is_named(tmp_path):
    folder = write_run(tmp_path / "run", iterations=2)
    with open(folder / "rows.jsonl", "a") as log:
        log.write('{"iteration": 3, "upd\n')
    with pytest.raises(ValueError, match="line 9"):
        diagnose.RunFolder.load(folder)
