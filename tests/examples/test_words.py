"""The words example: its splits, its pipeline, its pages, and the demo from beginning to end in short."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "words"
NAMES = ("pipeline", "vocabulary", "render", "pretrain", "evaluate", "readers", "demo")


@pytest.fixture
def words(monkeypatch):
    """The example's modules by name; the digits example has some of the same names."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def test_splits_have_nothing_in_common_and_prompts_are_those_of_the_recipe(words):
    vocabulary, pretrain = words("vocabulary"), words("pretrain")
    splits = [vocabulary.HELD_OUT, vocabulary.TUNING, vocabulary.TRAIN]
    assert [len(split) for split in splits] == [60, 40, 654]
    assert len(set().union(*splits)) == 754
    prompts = vocabulary.train_prompts()
    withheld = {vocabulary.prompt(*entry) for entry in vocabulary.WITHHELD.items()}
    assert len(withheld) == 60
    assert not set(prompts) & withheld
    assert len(prompts) == 3 * 654 - 60
    assert (ROOT / "examples" / "configs" / "prompts" / "words.txt").read_text().splitlines() == prompts
    drawn = {vocabulary.prompt(*entry) for entry in pretrain.draw_words(random.Random(0), 3000)}
    assert not drawn & (withheld | set(vocabulary.prompts_of(vocabulary.HELD_OUT + vocabulary.TUNING)))
    assert len(drawn & set(prompts)) > 500


def test_words_fit_the_page_and_leave_the_paper_rows_clean(words):
    vocabulary, render, evaluate = words("vocabulary"), words("render"), words("evaluate")
    rng = random.Random(0)
    pages = np.stack([render.render(word, face, rng) for word in vocabulary.WORDS for face in render.TYPEFACES])
    assert pages.shape[1:] == (24, 72)
    assert not pages[:, : evaluate._PAPER_ROWS].any()
    assert not pages[:, :, -1].any()
    assert pages.max(axis=(1, 2)).min() > 200


def test_the_pipeline_draws_what_a_prompt_asks_and_refuses_others(words):
    pipeline = words("pipeline").WordsPipeline.from_pretrained(EXAMPLE / "checkpoint")
    pipeline.set_progress_bar_config(disable=True)
    size = sum(path.stat().st_size for path in (EXAMPLE / "checkpoint").rglob("*") if path.is_file())
    assert size <= 4_000_000
    assert 1e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 2e6
    prompts = ['"river" in serif', '"cow" in sans']

    def draw(**options):
        return pipeline(prompts, 4, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images

    both = draw(num_images_per_prompt=2)
    assert both.shape == (4, 1, 24, 72)
    assert 0 <= both.min() < 0.2 < 0.9 < both.mean() < 1, "some dark ink on much white paper"
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(guidance_scale=2.0))
    assert [image.size for image in pipeline(prompts, 1).images] == [(72, 24)] * 2
    # a texture of nine grey levels is paper, one of eleven can be seen, and ink stays ink
    levels = torch.tensor([9.0, 11.0, 255.0]) / 255
    page = words("pipeline").to_images((2 * levels - 1).reshape(1, 1, 1, 3), "pt").flatten().tolist()
    assert page[0] == 1 > page[1] > 0.99
    assert page[2] == 0
    for wrong in ("river", '"river" in gothic', '"ox" in sans', '"rivers and" in sans', '"extraordinary" in sans'):
        with pytest.raises(ValueError, match=r'prompt: got .*, expected "word" in typeface'):
            pipeline(wrong)
    with pytest.raises(ValueError, match=r"latents: got shape \[1, 1, 24, 24\], expected \[2, 1, 24, 72\]"):
        draw(latents=torch.zeros(1, 1, 24, 24))


def test_pretraining_learns_saves_and_continues(words, tmp_path, monkeypatch, capsys):
    pretrain = words("pretrain")
    arguments = ["pretrain", "--batch-size", "8", "--save-every", "2", "--output", str(tmp_path / "model")]
    arguments += ["--state", str(tmp_path / "state.pt")]
    monkeypatch.setattr(pretrain, "make_transformer", lambda make=pretrain.make_transformer: make(24, 2, 1))
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "4"])
    pretrain.main()
    first = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line.split("  ")[0] for line in first] == ["step 2", "step 4"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "6", "--curve", str(tmp_path / "curve.jsonl")])
    pretrain.main()
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "loss" in line] == ["step 6"]
    (record,) = map(json.loads, (tmp_path / "curve.jsonl").read_text().splitlines())
    assert record["step"] == 6
    assert 0 < record["loss"] < 3
    # by the clock: over after it, whatever the steps, and at a rate of nothing
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "1e-4", "--steps", "1"])
    pretrain.main()
    last = [line for line in capsys.readouterr().out.splitlines() if "loss" in line][-1]
    assert int(last.split("  ")[0].split()[1]) > 6
    assert "rate 0.00e+00" in last
    loaded = words("pipeline").WordsPipeline.from_pretrained(tmp_path / "model")
    assert loaded.transformer.dtype == torch.float32
    assert pretrain.rate(0, 0.0) == 0.01
    assert pretrain.rate(500, 0.3) == 1
    assert pretrain.rate(500, 0.8) == pytest.approx(0.3)
    assert pretrain.rate(500, 1.0) == 0


def test_intervals_are_those_of_paired_differences(words):
    paired = words("evaluate").paired
    rng = np.random.default_rng(0)
    before = rng.random(600)
    # prompts change by 0.1 with a standard deviation of 0.2, both images of one alike
    after = before + np.repeat(0.1 + 0.2 * rng.normal(size=300), 2)
    change, low, high = paired(before.tolist(), after.tolist(), 2)
    assert low < change < high
    assert change == pytest.approx(float(np.mean(after - before)))
    # 1.96 standard errors of 300 independent changes on either side
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 300**0.5, rel=0.15)


# two prompts that it sometimes gets right: a few updates on them can be seen, held-out words need the whole run
SHORT_PROMPTS = ['"planet" in serif', '"winter" in mono']
SHORT = [
    "run.iterations=12", "run.progress=false", "sampling.num_steps=4", "sampling.sde_steps=[0,1]",
    "sampling.sde_steps_per_rollout=2", "sampling.prompts_per_rollout=2", "sampling.group_size=32",
    "sampling.batch_size=64", "optimizer.updates_per_rollout=1", "optimizer.inner_epochs=2",
    "optimizer.micro_batch_size=64", "optimizer.learning_rate=3e-4", "objective.threshold=4e-6",
    "objective.kl_weight=0",
]  # fmt: skip


@pytest.mark.slow
def test_the_demo_in_short_raises_the_first_readers_reward_and_leaves_what_it_says(
    words, monkeypatch, tmp_path, capsys, learning
):
    demo, folder = words("demo"), tmp_path / "demo"
    assert set(SHORT_PROMPTS) <= set(demo.train_prompts())
    monkeypatch.setattr(demo, "train_prompts", lambda: SHORT_PROMPTS)
    monkeypatch.setitem(demo.SPLITS, "tuning", SHORT_PROMPTS)
    monkeypatch.setattr(demo, "SEEDS", 24)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    demo.main(["--output", str(folder), "--words", "tuning", *SHORT, f"run.seed={learning.seed}"])
    said = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    change, low, high = result["change"]["PP-OCRv6 likelihood"]
    # over four seeds (FLOWDPPO_LEARNING_SEEDS=4), before the pipeline had a white point: 0.154, sd 0.029
    learning.check(change, 0.04)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 12
    assert all(0 < m["reward/ocr/likelihood"] == m["reward"] < m["reward/ocr/edit"] < 1 for m in history)
    assert all(m["ratio_moved_fraction"] >= 0.4 for m in history)
    assert result["rows"] == 12 * 64 * 2 * 2
    assert 0 < result["masked_fraction"] < 0.8
    assert result["after"]["PP-OCRv6 likelihood"] == pytest.approx(result["before"]["PP-OCRv6 likelihood"] + change)
    assert low <= change <= high
    for name in ("sheet.png", "metrics.png", "metrics.jsonl", "config.yaml", "final"):
        assert (folder / name).exists()
        assert str(folder / name) in said
    assert "PP-OCRv4 had no part in training" in said
    assert "48 images, tuning words" in said
