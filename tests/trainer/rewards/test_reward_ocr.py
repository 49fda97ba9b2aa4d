"""Reading: what counts as read, the likelihood against a count of all alignments, several lines, what is missing."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from flowdppo_fast.trainer.rewards import OCRReward, build_rewards
from flowdppo_fast.trainer.rewards import ocr as module

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"


def page(*lines: str, size: int = 18, width: int = 96, height: int = 32) -> torch.Tensor:
    """Dark text on light paper ``[3, H, W]``, the lines below each other."""
    image = Image.new("RGB", (width, height * len(lines)), (235, 235, 245))
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((6, height * number + 5), line, fill=(20, 20, 60), font=ImageFont.truetype(str(FONT), size))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def edit() -> OCRReward:
    return OCRReward(lines="one", threads=1)


@pytest.fixture(scope="module")
def likelihood() -> OCRReward:
    return OCRReward("likelihood", lines="one", threads=1)


def test_what_is_asked_comes_from_metadata_or_quotes_and_case_and_space_do_not_count(edit):
    images = torch.stack([page("River")] * 5)
    prompts = ['a sign that says "RI VER"', "a “river” in ink", "a sign", 'the word "rover"', 'the word "rovers"']
    metadata = [{}, {}, {"text": ["ri", "ver"]}, {}, {}]
    assert edit.read(images) == ["river"] * 5
    assert edit(images, prompts, metadata).tolist() == pytest.approx([1, 1, 1, 1 - 1 / 5, 1 - 2 / 6])
    with pytest.raises(ValueError, match=r"sample 1 asks for no text, expected it under 'text' in its metadata"):
        edit(images[:2], ['"river"', "a sign"], [{}, {}])


@pytest.mark.parametrize(
    ("read", "asked", "anywhere", "expected"),
    [
        ("theriverside", "river", True, 1.0),
        ("theriverside", "river", False, 0.0),
        ("rivers", "river", False, 0.8),
        ("", "river", True, 0.0),
        ("xxxxxxxxxxxx", "river", True, 0.0),
        ("rver", "river", True, 0.8),
    ],
)
def test_similarity_is_that_of_flow_grpo_and_never_below_0(edit, read, asked, anywhere, expected):
    edit.anywhere = anywhere
    try:
        assert edit._similarity(read, asked) == pytest.approx(expected)
    finally:
        edit.anywhere = True


def test_edit_distance_against_its_recursion():
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 5))) for _ in range(2))
        assert module.edit_distance(a, b) == slow(a, b), (a, b)


def test_likelihood_sums_all_alignments_and_both_cases(likelihood):
    reader, generator = likelihood._reader, torch.Generator().manual_seed(0)
    places = [0, *(reader.characters.index(letter) for letter in "oOk ")]
    frames = np.zeros((4, len(reader.characters)), np.float32)
    frames[:, places] = torch.rand(4, 5, generator=generator).softmax(-1).numpy()

    def reads(alignment: tuple[int, ...]) -> str:
        kept = [n for i, n in enumerate(alignment) if i == 0 or n != alignment[i - 1]]
        return "".join(reader.characters[n] for n in kept).replace(" ", "").lower()

    for text in ("ok", "oo", "k"):
        # a small and a capital letter are one, so their repetition is one letter
        merged = frames[:, places][:, [0, 1, 3]] + frames[:, places][:, [4, 2, 3]] * np.array([1, 1, 0])
        total = sum(
            np.prod(merged[range(4), list(alignment)])
            for alignment in itertools.product(range(3), repeat=4)
            if reads(tuple([0, places[1], places[3]][n] for n in alignment)) == text
        )
        found = reader.likelihood([frames], [text])
        torch.testing.assert_close(found, torch.tensor([float(total) ** (1 / len(text))]), rtol=1e-4, atol=1e-6)
    assert reader.likelihood([frames[:1]], ["ok"]).item() == 0, "a frame cannot hold two letters"


def test_likelihood_grades_damage_and_does_not_depend_on_the_batch(likelihood):
    clean = page("river").float() / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    images = torch.stack([(clean + strength * noise).clamp(0, 1) for strength in (0, 0.3, 0.6)])
    scores = likelihood(images, ['"river"'] * 3)
    assert scores[0] > 0.99
    assert scores[0] > scores[1] > scores[2] >= 0
    torch.testing.assert_close(scores[1:2], likelihood(images[1:2], ['"river"']), rtol=1e-4, atol=1e-5)
    video = likelihood(images[None], ['"river"'])
    torch.testing.assert_close(video, scores.mean()[None])
    with pytest.raises(ValueError, match="the reader has no "):
        likelihood(images[:1], [f'"{chr(0x13A0)}"'])


def test_lines_are_found_and_read_in_order():
    image = page("north", "south", size=30, width=256, height=96)
    reward, blank = OCRReward(threads=1), torch.full_like(image, 240)
    images = torch.stack([image, blank])
    assert reward.read(images) == ["northsouth", ""]
    metadata = [{"text": ["north", "south"]}] * 2
    assert reward(images, ["", ""], metadata).tolist() == [1, 0]
    reward.output = "likelihood"
    scores = reward(images, ["", ""], metadata)
    assert scores[0] > 0.9
    assert scores[1] == 0


def test_by_name_with_arguments():
    reward, weights = build_rewards([{"name": "ocr", "output": "likelihood", "lines": "one"}])
    assert weights == {"ocr": 1.0}
    assert reward(page("stone")[None], ['"stone"'], [{}])["ocr"] > 0.99
    with pytest.raises(ValueError, match=r"rewards\[0\] \(ocr\): lines: got 'two', expected one of detect, one"):
        build_rewards([{"name": "ocr", "lines": "two"}])


def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidocr" else find(name))
    with pytest.raises(RuntimeError, match=r"^ocr: rapidocr is not installed.*pip install 'flowdppo_fast\[ocr\]'$"):
        OCRReward()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"^ocr: onnxruntime is not installed"):
        OCRReward(lines="one")
    with pytest.raises(ValueError, match=r"recogniser: got .*nothing.onnx', which is no file"):
        OCRReward(recogniser=tmp_path / "nothing.onnx")
