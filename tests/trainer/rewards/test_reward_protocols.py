"""Other trainers' reward servers: what they are sent, what they may answer, and pickles that run nothing."""

from __future__ import annotations

import base64
import io
import json
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from reward_servers import RawServer, answering, response

from flowdppo_fast.trainer.rewards import HTTPReward, RewardServerError, VLMJudge, score
from flowdppo_fast.trainer.rewards.protocols import read_pickle

CPU = torch.device("cpu")


def pixels_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data))).copy()).permute(2, 0, 1)


def ask(answer: bytes | str, pictures, reward=HTTPReward, **settings):
    with RawServer(answering(response(answer))) as server:
        settings = {"retries": 0, "timeout": 5, **settings}
        result = reward(f"{server.url}score", **settings)(pictures[:2], ["a", "b"], [{"tag": 1}, {}])
        return result, server.requests


def test_unirl_gets_its_schema_and_names_rewards_and_metrics(pictures):
    results = [{"clip": {"clip": 0.5}, "wise": {"a": 1, "b": 2}}, {"clip": {"clip": 1}, "wise": {"a": 3, "b": 4}}]
    answer = {"results": results, "errors": [{}, {}]}
    named, ((_, body),) = ask(json.dumps(answer), pictures, protocol="unirl", rewards=["clip", "wise"])
    assert {name: value.tolist() for name, value in named.items()} == {
        "clip": [0.5, 1.0], "wise.a": [1.0, 3.0], "wise.b": [2.0, 4.0],
    }  # fmt: skip
    first, second = json.loads(body)["requests"]
    assert first["required_rewards"] == second["required_rewards"] == ["clip", "wise"]
    assert (first["history"][0]["text"], first["metadata"]) == ("a", {"tag": 1})
    sent = pixels_of(base64.b64decode(first["history"][0]["image_b64"]))
    assert torch.equal(sent, (pictures[0] * 255).round().byte())
    one, _ = ask(
        '{"results": [{"ocr": {"ocr": 1}}, {"ocr": {"ocr": null}}]}', pictures, protocol="unirl", rewards=["ocr"]
    )
    assert one[0] == 1
    assert one[1].isnan(), "null is an abstention"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            {"results": [{"clip": {"clip": 1}}, {}], "errors": [{}, {"clip": "OOM"}]},
            "'clip' failed for sample 1: 'OOM'",
        ),
        ({"results": [{"clip": {"clip": 1}}, {}], "errors": [{}, {}]}, r"got the rewards \[\] for sample 1"),
        ({"results": [{"clip": {"clip": 1}}], "errors": [{}]}, "with 2 each"),
        ({"results": [{"clip": {"clip": 1}}, {"clip": {"other": 1}}]}, None),
        ({"results": [{"clip": {"clip": "1"}}, {"clip": {"clip": 1}}]}, "got '1' for 'clip' of sample 0"),
        ({"results": [{"clip": {"a": 1, "b": 1}}, {"clip": {"a": 1}}]}, r"got the metrics \['clip'\] for sample 1"),
        ([], "expected"),
    ],
)
def test_what_unirl_reports_as_failed_is_an_error_and_never_a_0(pictures, answer, message):
    if message is None:
        # one metric counts as the reward, whatever its name
        assert ask(json.dumps(answer), pictures, protocol="unirl", rewards=["clip"])[0].tolist() == [1, 1]
        return
    with pytest.raises(RewardServerError, match=f"wrong answer: .*{message}"):
        ask(json.dumps(answer), pictures, protocol="unirl", rewards=["clip"])


@pytest.mark.parametrize("protocol", range(6))
def test_flow_grpo_gets_a_pickle_and_its_plain_answer_is_read(pictures, protocol):
    answer = {
        "scores": [0.25, 1],
        "rewards": [[1.0], (None, True)],
        "group": {"a": [2**70, -3]},
        "name": "ü",
        "b": b"x",
    }
    if protocol < 3:
        # bytes are made by a call in these
        answer.pop("b")
    data = pickle.dumps(answer, protocol=protocol)
    assert read_pickle(data) == answer
    scores, ((_, body),) = ask(data, pictures, protocol="flow_grpo")
    assert scores.tolist() == [0.25, 1.0]
    sent = pickle.loads(body)
    assert sent["prompts"] == ["a", "b"]
    assert sent["meta_datas"] == [{"tag": 1}, {}]
    assert sent["only_strict"] is False
    assert (pixels_of(sent["images"][0]).float() - pictures[0] * 255).abs().mean() < 20, "JPEG files of the images"


class Evil:
    ran: ClassVar[list[str]] = []

    def __reduce__(self):
        return (explode, ())


def explode() -> None:
    Evil.ran.append("it ran")


def test_no_pickle_runs_code():
    hostile = [
        pickle.dumps({"scores": Evil()}, protocol=4),
        pickle.dumps(np.float32(1)),
        pickle.dumps(torch.zeros(2)),
        pickle.dumps(Evil),
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x82\x01.",
        b"\x80\x04N0N.",
        b"(i__builtin__\neval\n.",
        b"P1\n.",
    ]
    for data in hostile:
        with pytest.raises(ValueError, match=r"expected a pickle of plain numbers and texts: .* was not run"):
            read_pickle(data)
    assert Evil.ran == []
    assert pickle.loads(hostile[0]) == {"scores": None}, "the test's own pickle does run"
    assert Evil.ran == ["it ran"]


DAMAGED = [b"", b"garbage", b"\x80\x04", b"e.", b".", b"h\x05.", b"}K\x01s.", b"NN.", b"\x86.", b"N]a.", b"a."]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_pickles_are_errors(data):
    with pytest.raises(ValueError, match="expected a pickle of plain numbers and texts"):
        read_pickle(data)


def chat(text: str | None, **message) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text, **message}}]})


def judged(pictures, answer, **settings):
    return ask(answer, pictures, VLMJudge, model="judge", parallel=1, **settings)


def test_the_judge_gets_image_and_question_and_its_last_score_counts(pictures):
    template = "Does it show {prompt}? tag {tag}"
    reward, requests = None, None
    with RawServer(answering(response(chat("at first Score: 1, but then\nScore: 4.5")))) as server:
        reward = VLMJudge(server.url, "judge", template=template, retries=0, parallel=1, request={"seed": 7})
        scores = reward(pictures[:2], ["a", "b"], [{"tag": 1}, {"tag": 2}])
        requests = [json.loads(body) for _, body in server.requests]
    assert scores.tolist() == [0.875, 0.875]
    assert {entry["messages"][0]["content"][1]["text"] for entry in requests} == {
        "Does it show a? tag 1", "Does it show b? tag 2",
    }  # fmt: skip
    assert all((entry["model"], entry["temperature"], entry["seed"]) == ("judge", 0, 7) for entry in requests)
    url = next(e for e in requests if "show a" in e["messages"][0]["content"][1]["text"])["messages"][0]["content"][0]
    assert url["image_url"]["url"].startswith("data:image/png;base64,")
    sent = pixels_of(base64.b64decode(url["image_url"]["url"].split(",")[1]))
    assert torch.equal(sent, (pictures[0] * 255).round().byte())
    with pytest.raises(ValueError, match=r"template: needs 'tag', expected 'prompt' or a key of the metadata"):
        VLMJudge("http://127.0.0.1:9/", "judge", template=template)(pictures[:1], ["a"], [{}])


def test_the_judge_by_probabilities(pictures):
    tokens = [{"token": " Yes", "logprob": -0.5}, {"token": "No", "logprob": -1.0}, {"token": "Well", "logprob": -3.0}]
    content = json.loads(chat("Yes"))
    content["choices"][0]["logprobs"] = {"content": [{"top_logprobs": tokens}]}
    scores, ((_, body), _) = judged(pictures, json.dumps(content), answers={"Yes": 1, "No": 0})
    yes, no = torch.tensor([-0.5, -1.0]).exp()
    torch.testing.assert_close(scores, (yes / (yes + no)).expand(2))
    assert json.loads(body)["max_tokens"] == 1
    assert json.loads(body)["logprobs"] is True
    with pytest.raises(RewardServerError, match="the server must support top_logprobs"):
        judged(pictures, chat("Yes"), answers={"Yes": 1})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chat("I cannot help with that."), "no score from the range in 'I cannot help with that.'"),
        (chat("Score: 9"), "no score from the range"),
        (chat(None, refusal="no images of people"), "a refusal in 'no images of people'"),
        (chat(""), "no score"),
        ('{"choices": []}', "expected a chat completion"),
        ('{"error": "x"}', "expected a chat completion"),
    ],
)
def test_an_answer_without_a_score_is_an_error_or_an_abstention_and_never_a_0(pictures, answer, message):
    with pytest.raises(RewardServerError, match=f"wrong answer: {message}"):
        judged(pictures, answer)
    if "choice" not in answer or "[]" in answer:
        with pytest.raises(RewardServerError, match=message):
            judged(pictures, answer, unparsable="abstain")
        return
    with RawServer(answering(response(answer))) as server:
        reward = VLMJudge(server.url, "judge", unparsable="abstain", retries=0)
        assert score(reward, pictures[:2], ["a", "b"], [{}, {}], CPU)["reward"].isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "soap"}, "protocol: got 'soap'"),
        ({"protocol": "unirl"}, "rewards: got None, expected names"),
        ({"protocol": "unirl", "rewards": "clip"}, "rewards: got 'clip', expected a list"),
        ({"rewards": ["clip"]}, "rewards: got .*none with others"),
        ({"protocol": "flow_grpo", "format": "npy"}, "format: got 'npy'"),
    ],
)
def test_settings_of_protocols_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        HTTPReward("http://host/", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unparsable": "zero"}, "unparsable: got 'zero'"),
        ({"low": 5, "high": 1}, "low, high"),
        ({"pattern": "score"}, "expected a group"),
    ],
)
def test_settings_of_the_judge_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        VLMJudge("http://host/", "judge", **settings)
