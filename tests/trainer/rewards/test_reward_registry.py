"""Rewards by name and weight, from what a YAML file holds."""

from __future__ import annotations

import pytest
import torch
import yaml

from flowdppo_fast.trainer.advantages import weighted_reward
from flowdppo_fast.trainer.rewards import (
    AestheticScore,
    CLIPScore,
    HTTPReward,
    JPEGCompressibility,
    JPEGIncompressibility,
    build_rewards,
    score,
)

CPU = torch.device("cpu")
PROMPTS = ["a"] * 6


def own_reward(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def several(images, prompts, metadata):
    return {"low": images.amin(dim=(1, 2, 3)), "high": images.amax(dim=(1, 2, 3))}


class OwnReward:
    def __init__(self, power: float = 1.0):
        self.power, self.place = power, None

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) ** self.power

    def to(self, device):
        self.place = device


NO_CALLABLE = 3


def test_names_with_weights(pictures, clip_folder):
    reward, weights = build_rewards({"jpeg": 0.5, "jpeg_incompressibility": -1})
    assert weights == {"jpeg": 0.5, "jpeg_incompressibility": -1.0}
    named = score(reward, pictures, PROMPTS, [{}] * 6, CPU)
    assert torch.equal(named["jpeg"], JPEGCompressibility()(pictures, PROMPTS))
    assert torch.equal(named["jpeg_incompressibility"], JPEGIncompressibility()(pictures, PROMPTS))
    torch.testing.assert_close(weighted_reward(named, weights), 1.5 * named["jpeg"])


def test_mappings_from_yaml(pictures, clip_folder):
    specs = yaml.safe_load(f"""
      - {{name: clip, path: {clip_folder}, weight: 2, batch_size: 3, scale: 2.5}}
      - {{name: jpeg, quality: 50, label: small, weight: 0.1}}
      - jpeg_incompressibility
      - {{callable: "test_reward_registry:own_reward"}}
      - {{callable: "test_reward_registry:OwnReward", label: squared, arguments: {{power: 2}}, weight: 0}}
      - {{callable: "test_reward_registry:OwnReward"}}
    """)
    reward, weights = build_rewards(specs)
    assert weights == {
        "clip": 2, "small": 0.1, "jpeg_incompressibility": 1, "own_reward": 1, "squared": 0, "OwnReward": 1,
    }  # fmt: skip
    named = score(reward, pictures, PROMPTS, [{}] * 6, CPU)
    assert list(named) == list(weights)
    mean = own_reward(pictures, None, None)
    assert torch.equal(named["own_reward"], mean)
    assert torch.equal(named["OwnReward"], mean)
    assert torch.equal(named["squared"], mean**2)
    assert torch.equal(named["clip"], CLIPScore(clip_folder, scale=2.5, batch_size=3)(pictures, PROMPTS))
    assert torch.equal(named["small"], JPEGCompressibility(50)(pictures, PROMPTS))


def test_a_reward_of_several_names_has_a_weight_for_each(pictures):
    spec = {"callable": "test_reward_registry:several", "label": "pixels"}
    reward, weights = build_rewards([{**spec, "weight": {"low": 1, "high": 0}}])
    assert weights == {"pixels/low": 1.0, "pixels/high": 0.0}
    named = score(reward, pictures, PROMPTS, [{}] * 6, CPU)
    assert torch.equal(weighted_reward(named, weights), pictures.amin(dim=(1, 2, 3)))
    wrong = [
        ({**spec, "weight": 1}, r"'pixels' returns the names \['high', 'low'\], expected what its weight 1.0 says"),
        ({**spec, "weight": {"low": 1}}, r"returns the names \['high', 'low'\], expected \['low'\] as in its weight"),
        ({"name": "jpeg", "weight": {"low": 1}}, r"'jpeg' returns one tensor, expected what its weight"),
    ]
    for entry, message in wrong:
        with pytest.raises(ValueError, match=message):
            build_rewards([entry])[0](pictures, PROMPTS, [{}] * 6)


def test_a_reward_that_is_not_finite_is_named(pictures):
    reward, _ = build_rewards(["jpeg", {"callable": "test_reward_registry:OwnReward", "arguments": {"power": -1}}])
    pictures[4] = 0
    with pytest.raises(ValueError, match="got inf for 'OwnReward' of sample 4 out of 6"):
        score(reward, pictures, PROMPTS, [{}] * 6, CPU)


def test_moving_reaches_all_of_them(clip_folder):
    reward, _ = build_rewards(
        [{"name": "clip", "path": str(clip_folder)}, "jpeg", {"callable": "test_reward_registry:OwnReward"}]
    )
    assert reward.to("meta") is reward
    assert reward.rewards["clip"].device == torch.device("meta")
    assert reward.rewards["OwnReward"].place == "meta"


def test_nothing_is_loaded_and_every_argument_can_be_given(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"")
    reward, _ = build_rewards(
        [
            {"name": "aesthetic", "head": str(tmp_path / "head.safetensors"), "dtype": "bfloat16"},
            {"name": "http", "url": "http://127.0.0.1:9/", "timeout": 1, "label": "judge"},
            {"name": "pickscore", "frames": 2},
            {"name": "classifier", "classifier": "folder", "output": "prob"},
        ]
    )
    assert isinstance(reward.rewards["aesthetic"], AestheticScore)
    assert reward.rewards["aesthetic"].dtype == torch.bfloat16
    assert isinstance(reward.rewards["judge"], HTTPReward)
    assert reward.rewards["pickscore"].frames == 2


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({}, ValueError, "rewards: got none"),
        ([], ValueError, "rewards: got none"),
        ("clip", TypeError, "rewards: got str, expected a mapping"),
        (3, TypeError, "rewards: got int"),
        ([3], TypeError, r"rewards\[0\]: got int"),
        (
            {"clipscore": 1},
            ValueError,
            "got unknown name 'clipscore', expected one of aesthetic, classifier, clip, hpsv2, http",
        ),
        (["jpeg", "python:os:system"], ValueError, r"rewards\[1\]: got unknown name 'python:os:system'.*'callable'"),
        ([{"name": "os:getcwd"}], ValueError, "got unknown name 'os:getcwd'"),
        ([{"weight": 1}], ValueError, r"got the keys \['weight'\], expected either 'name' or 'callable'"),
        ([{"name": "jpeg", "callable": "a:b"}], ValueError, "expected either 'name' or 'callable'"),
        (
            [{"name": "jpeg", "qualty": 5}],
            ValueError,
            "got unknown qualty for 'jpeg', expected some of quality, threads, frames, or weight, label",
        ),
        (
            [{"name": "pickscore", "sclae": 1}],
            ValueError,
            "got unknown sclae.*path, processor, scale, revision, dtype, batch_size, frames, preprocess",
        ),
        ([{"name": "jpeg", "quality": 500}], ValueError, r"rewards\[0\] \(jpeg\): quality: got 500"),
        ([{"name": "http"}], TypeError, r"rewards\[0\] \(http\): .*missing 1 required positional argument: 'url'"),
        ([{"name": "jpeg", "arguments": {}}], ValueError, "got 'arguments' with 'name'"),
        ({"jpeg": "1"}, ValueError, r"rewards\[0\] weight: got '1', expected a finite number"),
        ({"jpeg": True}, ValueError, "weight: got True"),
        ({"jpeg": float("nan")}, ValueError, "weight: got nan"),
        ([{"name": "jpeg", "weight": {}}], ValueError, "got an empty weight"),
        ([{"name": "jpeg", "weight": {"a": None}}], ValueError, "weight of 'a': got None"),
        (["jpeg", "jpeg"], ValueError, "got 'jpeg' more than once, expected a different 'label' each"),
        ([{"name": "jpeg", "label": "a/b"}], ValueError, "got label 'a/b', expected a text without '/'"),
        ([{"callable": "os.path"}], ValueError, "callable: got 'os.path', expected package.module:attribute"),
        (
            [{"callable": "os:no_such"}],
            ValueError,
            "rewards\\[0\\].callable: got 'os:no_such', which cannot be imported",
        ),
        ([{"callable": "no_such_package:x"}], ValueError, "cannot be imported"),
        ([{"callable": "test_reward_registry:NO_CALLABLE"}], TypeError, "gives int, expected something that can be"),
        ([{"callable": "os:getcwd", "power": 2}], ValueError, "got unknown power, expected name, callable, arguments"),
        ([{"callable": "os:getcwd", "arguments": [1]}], TypeError, "got list for 'arguments'"),
    ],
)
def test_wrong_settings(specs, error, message):
    with pytest.raises(error, match=message):
        build_rewards(specs)
