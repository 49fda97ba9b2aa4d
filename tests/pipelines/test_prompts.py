"""Prompts given to real pipelines as a user gives them: one image's arguments each, of any kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowdppo_fast.trainer import TrajectoryRecorder
from flowdppo_fast.trainer.prompts import PromptSource

from .cases import generators
from .families import FAMILIES
from .tiny import photo

# of the schedulers' own, on numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CPU = torch.device("cpu")
GROUP = 2


def one_by_one(family: str, image: str = "") -> tuple[list[dict], dict]:
    """Three prompts of a family, each what a call for one image takes; sizes apart."""
    entry = FAMILIES[family]
    sizes = entry.tiny
    prompts = []
    for number in range(3):
        torch.manual_seed(number)
        given = entry.inputs(sizes, 1)
        given = {k: v[0] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        if image == "pil":
            given["image"] = photo(sizes, number)
        elif image == "list":
            given["image"] = [photo(sizes, number)]
        prompts.append(given)
    video = family in ("Wan", "WanImageToVideo", "LTXImageToVideo")
    return prompts, sizes.video if video else sizes.image


WAYS = {
    # family, how the image is given, rows of the calls
    "embeddings": ("StableDiffusion3", "", [6]),
    "embeddings with a mask": ("QwenImage", "", [6]),
    "lists of embeddings": ("ZImage", "", [6]),
    "video": ("Wan", "", [6]),
    "a tensor per image": ("FluxImg2Img", "", [6]),
    "a list of one image": ("LTXImageToVideo", "list", [6]),
    "an image for the call": ("FluxKontext", "pil", [2, 2, 2]),
    "an image for the call, video": ("WanImageToVideo", "pil", [2, 2, 2]),
}


@pytest.mark.parametrize("way", WAYS)
def test_prompts_reach_the_pipeline_whatever_they_are(way):
    family, image, lengths = WAYS[way]
    prompts, sizes = one_by_one(family, image)
    pipeline = FAMILIES[family].pipeline()
    recorder = TrajectoryRecorder(pipeline)
    source = PromptSource(prompts, pipeline, [*sizes, "return_dict"])
    entries = [entry for entry in source.entries for _ in range(GROUP)]

    def sample(rows: range) -> torch.Tensor:
        given = source.arguments([entries[row] for row in rows], GROUP, CPU)
        with torch.no_grad(), recorder.recording([1, 2], seed=5, first_row=rows.start) as trajectory:
            pipeline(
                **given, **sizes, num_inference_steps=4, output_type="latent",
                generator=[generators(6)[row] for row in rows],
            )  # fmt: skip
        recorder.verify(trajectory, range(len(rows)))
        return trajectory.velocity

    calls = list(source.calls(entries))
    assert [len(rows) for rows in calls] == lengths
    together = torch.cat([sample(rows) for rows in calls])
    apart = torch.cat([sample(range(row, row + 1)) for row in range(6)])
    # rows in one batch or alone: matrix products round otherwise, and guidance enlarges that
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-4 * float(apart.abs().max()))
    # different prompts do make a difference
    assert float((apart[0] - apart[2]).abs().max()) > 1e-3


class Taker:
    """Takes what diffusers' pipelines take."""

    def __call__(
        self, prompt=None, negative_prompt=None, height=None, image=None, prompt_embeds=None, num_inference_steps=1,
        generator=None, output_type="pt", num_images_per_prompt=1,
    ):  # fmt: skip
        raise NotImplementedError


def source(prompts, options=()):
    return PromptSource(prompts, Taker(), options)


def rows_of(given: PromptSource, *prompts: int, group: int = 2) -> list[dict]:
    return [given.entries[prompt] for prompt in prompts for _ in range(group)]


def test_texts_are_encoded_once_per_group_and_reward_keys_stay_away():
    made = source(
        [
            {"prompt": "a", "negative_prompt": "b", "metadata": {"x": 1}},
            {"prompt": "c", "negative_prompt": "d", "metadata": {}},
        ]
    )
    assert made.arguments(rows_of(made, 0, 1), 2, CPU) == {
        "prompt": ["a", "c"], "negative_prompt": ["b", "d"], "num_images_per_prompt": 2,
    }  # fmt: skip
    # a part of a group, and rows that are no whole groups
    assert made.arguments(rows_of(made, 0)[:1], 2, CPU) == {
        "prompt": ["a"], "negative_prompt": ["b"], "num_images_per_prompt": 1,
    }  # fmt: skip
    mixed = [made.entries[0], made.entries[1], made.entries[1], made.entries[1]]
    assert made.arguments(mixed, 2, CPU)["prompt"] == ["a", "c", "c", "c"]


def test_ready_made_values_are_repeated_for_every_image():
    embeddings = [torch.full((2, 3), float(i)) for i in range(2)]
    made = source([{"prompt_embeds": x, "height": 8} for x in embeddings])
    given = made.arguments(rows_of(made, 0, 1), 2, CPU)
    assert given["height"] == 8
    assert "num_images_per_prompt" not in given
    assert torch.equal(given["prompt_embeds"][:, 0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_sizes_and_images_that_differ_split_the_call():
    picture = np.zeros((2, 2, 3))
    made = source([{"prompt": "abc"[i], "height": (8, 8, 16)[i], "image": picture.copy()} for i in range(3)])
    entries = rows_of(made, 0, 1, 2, 0)
    assert [(rows.start, rows.stop) for rows in made.calls(entries)] == [(0, 4), (4, 6), (6, 8)]
    assert [len(rows) for rows in made.calls(entries, batch_size=3)] == [3, 1, 2, 2]
    with pytest.raises(ValueError, match="height of row 4 is not that of row 0, expected one value per call"):
        made.arguments(entries, 2, CPU)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ({"prompt": "a"}, (), ValueError, "expected a non-empty sequence"),
        ([3], (), TypeError, "entry 0 is int, expected a text or a mapping"),
        (["a", {"prompt_embeds": torch.zeros(1)}], (), ValueError, "entry 1 has the keys"),
        ([{"prompt": "a"}, {"prompt": ["b"]}], (), ValueError, "prompt of entry 1 is a list, expected a str"),
        ([{"prompt": "a", "height": 8}], ("height",), ValueError, "height is also among the arguments of every call"),
        ([{"prompt": "a", "depth": 8}], (), ValueError, "Taker takes no argument 'depth'"),
    ],
)
def test_prompts_that_cannot_be_put_together_are_errors(prompts, options, error, message):
    with pytest.raises(error, match=message):
        source(prompts, options)


def test_embeddings_of_different_lengths_are_an_error_that_says_what_to_do():
    made = source([{"prompt_embeds": torch.zeros(n, 4)} for n in (2, 3)])
    with pytest.raises(
        ValueError, match=r"prompt_embeds has the shapes \[\(2, 4\), \(3, 4\)\], expected one; pad them"
    ):
        made.arguments(rows_of(made, 0, 1), 2, CPU)


def test_a_pipeline_with_free_arguments_takes_any():
    class Free:
        def __call__(self, **arguments):
            raise NotImplementedError

    assert PromptSource([{"anything": 1}], Free(), ["more"]).entries == [{"anything": 1}]
