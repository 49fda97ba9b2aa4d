"""The HTTP client against a server that works: what travels, and its settings."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from reward_servers import CPU, RawServer, answering, brightness, response

from flowdppo_fast.trainer.rewards import HTTPReward, RewardServerError, score
from flowdppo_fast.trainer.rewards.serve import RewardServer


@pytest.mark.parametrize("format", ["png", "npy"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_same_numbers_as_here(pictures, format, batch_size):
    prompts = ["a", "bb", "", "ä ö", "e" * 50, "f"]
    metadata = [{"bonus": n} for n in range(6)]
    with RewardServer(brightness) as server:
        reward = HTTPReward(server.url, format=format, batch_size=batch_size)
        assert torch.equal(reward(pictures, prompts, metadata), brightness(pictures, prompts, metadata))


def test_bits_beyond_bytes_travel_as_npy_and_not_as_png():
    images = torch.rand(2, 3, 5, 7)
    with RewardServer(brightness) as server:
        expected = brightness(images, ["", ""], [{}, {}])
        assert torch.equal(HTTPReward(server.url, format="npy")(images, ["", ""]), expected)
        as_bytes = HTTPReward(server.url, format="png")(images, ["", ""])
        assert torch.equal(as_bytes, brightness(images.mul(255).round() / 255, ["", ""], [{}, {}]))
        assert not torch.equal(as_bytes, expected)


def test_jpeg_is_close_and_grey_images_and_videos_arrive(pictures):
    smooth = pictures[:1]
    with RewardServer(brightness) as server:
        # quantisation at quality 95 leaves the mean of a smooth picture within a level
        near = HTTPReward(server.url, format="jpeg")(smooth, [""])
        assert 0 < (near - smooth.mean()).abs() < 1 / 255
        grey = pictures[:, :1]
        assert torch.equal(HTTPReward(server.url)(grey, [""] * 6), brightness(grey, [""] * 6, [{}] * 6))
        video = pictures.unflatten(0, (2, 3))
        assert torch.equal(HTTPReward(server.url)(video, [""] * 2), brightness(video, [""] * 2, [{}] * 2))
        middle = HTTPReward(server.url, frames=1)(video, [""] * 2)
        assert torch.equal(middle, brightness(pictures[[1, 4]], [""] * 2, [{}] * 2))


def test_several_names(pictures):
    def two(images, prompts, metadata):
        return {"mean": images.mean(dim=(1, 2, 3)), "max": images.amax(dim=(1, 2, 3))}

    with RewardServer(two) as server:
        named = HTTPReward(server.url, batch_size=2)(pictures, [""] * 6)
        assert set(named) == {"mean", "max"}
        assert torch.equal(named["max"], pictures.amax(dim=(1, 2, 3)))


def test_requests_run_at_the_same_time_and_results_keep_their_order(pictures):
    together = threading.Barrier(3, timeout=5)

    def behave(server, connection, number):
        _, body = server.read(connection)
        prompts = json.loads(body)["prompts"]
        # no request is answered before three are there
        together.wait()
        connection.sendall(response(json.dumps({"rewards": [float(prompt) for prompt in prompts]})))

    with RawServer(behave) as server:
        reward = HTTPReward(server.url, batch_size=2, parallel=3, timeout=5)
        assert reward(pictures, [str(n) for n in range(6)]).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_request_is_as_documented(pictures):
    with RawServer(answering(response('{"rewards": [1, 2.5]}'))) as server:
        reward = HTTPReward(f"{server.url}score?key=1")
        assert reward(pictures[:2], ["a", "b"], [{"seed": 3}, {}]).tolist() == [1.0, 2.5]
        head, body = server.requests[0]
    assert head.startswith(b"POST /score?key=1 HTTP/1.1\r\n")
    assert b"Authorization" not in head
    content = json.loads(body)
    assert set(content) == {"version", "format", "prompts", "metadata", "images"}
    assert (content["version"], content["format"], content["prompts"]) == (1, "png", ["a", "b"])
    assert content["metadata"] == [{"seed": 3}, {}]


def test_metadata_can_be_kept_back_and_must_be_json_otherwise(pictures):
    with RewardServer(brightness) as server:
        metadata = [{"tensor": torch.zeros(1)}]
        with pytest.raises(TypeError, match="metadata: cannot be sent to a reward server as JSON"):
            HTTPReward(server.url)(pictures[:1], [""], metadata)
        with pytest.raises(TypeError, match="cannot be sent"):
            HTTPReward(server.url)(pictures[:1], [""], [{"value": float("nan")}])
        assert HTTPReward(server.url, send_metadata=False)(pictures[:1], [""], metadata).shape == (1,)


def test_token(pictures, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "secret-1")
    with RewardServer(brightness, token="secret-1") as server:
        assert HTTPReward(server.url, token_env="REWARD_TOKEN")(pictures[:1], [""]).shape == (1,)
        with pytest.raises(RewardServerError, match=r"answered 401 Unauthorized.*expected the server's bearer token"):
            HTTPReward(server.url)(pictures[:1], [""])
        monkeypatch.setenv("REWARD_TOKEN", "secret-2")
        with pytest.raises(RewardServerError, match="401") as caught:
            HTTPReward(server.url, token_env="REWARD_TOKEN")(pictures[:1], [""])
    assert "secret" not in str(caught.value)
    for value in ("", "two words", "line\nbreak"):
        monkeypatch.setenv("REWARD_TOKEN", value)
        with pytest.raises(ValueError, match="REWARD_TOKEN holds no token") as refused:
            HTTPReward(server.url, token_env="REWARD_TOKEN")
        assert not value or value not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://host/"}, "url: expected"),
        ({"url": "http:///path"}, "url: expected"),
        ({"url": "http://user:word@host/"}, "url: expected .* without a password"),
        ({"url": "http://host/a b"}, "url: expected"),
        ({"url": "http://host/\r\nX: y"}, "url: expected"),
        ({"format": "gif"}, "format: got 'gif'"),
        ({"timeout": 0}, "timeout: got 0"),
        ({"deadline": -1}, "deadline: got -1"),
        ({"retries": -1}, "retries: got -1"),
        ({"max_response_bytes": 0}, "max_response_bytes: got 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        HTTPReward(**{"url": "http://host/", **settings})
    assert "word" not in str(caught.value).replace("password", "")


def test_as_the_trainer_scores(pictures):
    with RewardServer(brightness) as server:
        named = score(HTTPReward(server.url), pictures, ["a"] * 6, [{}] * 6, CPU)
        assert torch.equal(named["reward"], brightness(pictures, ["a"] * 6, [{}] * 6))
