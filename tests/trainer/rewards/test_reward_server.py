"""The reference server: what it refuses, and that its command line works."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import pickle
import re
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from flowdppo_fast.trainer.rewards import HTTPReward, JPEGIncompressibility
from flowdppo_fast.trainer.rewards.serve import RewardServer, main
from flowdppo_fast.trainer.rewards.wire import decode_request, encode_request

ROOT = Path(__file__).parents[3]


def brightness(images, prompts, metadata):
    return images.mean(dim=tuple(range(1, images.ndim)))


def ask(server, body: bytes, method="POST", path="/", headers=None) -> tuple[int, dict]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def request(**changes) -> bytes:
    content = json.loads(encode_request(torch.zeros(2, 1, 3, 4, 4), ["a", "b"], [{}, {}], "png", 95))
    return json.dumps({**content, **changes}).encode()


def npy(array, **options) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return base64.b64encode(buffer.getvalue()).decode()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


FILES = json.loads(request())["images"]
CLAIM = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }".ljust(117) + "\n"
TOO_LARGE = b"\x93NUMPY\x01\x00" + len(CLAIM).to_bytes(2, "little") + CLAIM.encode()
BAD = {
    "no json": (b"\x80\x04", "expected JSON"),
    "no object": (b"[]", 'expected an object with "version": 1'),
    "another version": (request(version=2), 'expected an object with "version": 1'),
    "no prompts": (json.dumps({"version": 1, "format": "png"}).encode(), "got no prompts, metadata, images"),
    "another format": (request(format="gif"), "got format 'gif', expected png, jpeg or npy"),
    "other lengths": (request(prompts=["a"]), "lists of the same length"),
    "empty": (request(prompts=[], metadata=[], images=[]), "at least 1"),
    "metadata": (request(metadata=[1, 2]), "expected metadata as a list of objects"),
    "no text": (request(images=[1, 2]), "got int as an image"),
    "no base64": (request(images=["*", "*"]), "an image is no base64"),
    "no png": (request(images=["AAAA", "AAAA"]), "an image is no png file"),
    "png as jpeg": (request(format="jpeg"), "an image is no jpeg file"),
    "mixed": (request(images=[FILES[0], FILES]), "got list as an image"),
    "uneven videos": (request(images=[["AAAA"], ["AAAA", "AAAA"]]), "lists of texts of the same length"),
    "pickle": (request(format="npy", images=[npy(np.array([Trap()]), allow_pickle=True)] * 2), "no npy file"),
    "bare pickle": (
        request(format="npy", images=[base64.b64encode(pickle.dumps(Trap())).decode()] * 2),
        "an image is no npy file",
    ),
    "header that claims too much": (
        request(format="npy", images=[base64.b64encode(TOO_LARGE).decode()] * 2),
        "expected .H, W, C. of float32 or uint8 in C order, with all its bytes",
    ),
    "doubles": (request(format="npy", images=[npy(np.zeros((4, 4, 3)))] * 2), "expected .H, W, C. of float32"),
    "sizes": (
        request(format="npy", images=[npy(np.zeros((4, w, 3), np.float32)) for w in (4, 5)]),
        "got images of shapes",
    ),
    "out of range": (
        request(format="npy", images=[npy(np.full((4, 4, 3), 2, np.float32))] * 2),
        "pixels that are outside",
    ),
}


@pytest.mark.parametrize(("body", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_answered_and_run_nothing(body, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RewardServer(brightness) as server:
        status, answer = ask(server, body)
        assert status == 400
        assert re.search(message, answer["error"]), answer
        # the next one is served
        assert ask(server, request()) == (200, {"rewards": [0.0, 0.0]})
    assert not list(tmp_path.iterdir())


def test_what_is_sent_is_what_arrives():
    pixels = torch.rand(2, 3, 1, 4, 5)
    images, prompts, metadata = decode_request(encode_request(pixels, ["a", 1], [{"b": [2]}, {}], "npy", 95))
    assert torch.equal(images, pixels)
    assert (prompts, metadata) == (["a", 1], [{"b": [2]}, {}])
    images, _, _ = decode_request(encode_request(pixels[:, :1], ["a", "b"], [{}, {}], "npy", 95))
    assert torch.equal(images, pixels[:, 0])


def test_size_token_path_and_length():
    with RewardServer(brightness, token="secret", max_request_bytes=10_000) as server:
        allowed = {"Authorization": "Bearer secret"}
        assert ask(server, request(), headers=allowed)[0] == 200
        assert ask(server, request())[0] == 401
        assert ask(server, request(), headers={"Authorization": "Bearer secre"})[0] == 401
        assert ask(server, request(), headers={"Authorization": "Bearer sécret".encode("latin-1")})[0] == 401
        assert ask(server, b" " * 10_001, headers=allowed) == (
            413,
            {"error": "got 10001 bytes, expected at most 10000"},
        )
        assert ask(server, request(), path="/other", headers=allowed)[0] == 404
        assert ask(server, b"", method="GET", path="/health") == (200, {"status": "ok"})
        assert ask(server, b"", method="GET")[0] == 404
        for length in ("-1", "1e3", "²"):
            headers = {**allowed, "Content-Length": length.encode("latin-1")}
            assert ask(server, b"", headers=headers)[0] == 411


def test_a_client_that_stops_sending_is_left():
    with RewardServer(brightness, timeout=0.2) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.0 408 ")


def test_the_reward_is_called_once_at_a_time():
    running, most = [], []

    def reward(images, prompts, metadata):
        running.append(None)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return torch.zeros(len(prompts))

    with RewardServer(reward) as server:
        clients = [threading.Thread(target=ask, args=(server, request())) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert most == [1] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments callable --rewards is required"),
        (["os:getcwd", "--rewards", "{}"], "not allowed with"),
    ],
)
def test_command_lines_that_say_nothing_or_too_much(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_command_line(pictures, tmp_path, monkeypatch):
    """As a user starts it, in another process: built-in rewards, a token, a free port."""
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    command = [
        sys.executable,
        "-m",
        "flowdppo_fast.trainer.rewards.serve",
        "--port",
        "0",
        "--token-env",
        "REWARD_TOKEN",
    ]
    command += ["--rewards", '[{"name": "jpeg_incompressibility", "quality": 50, "label": "size"}]', "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    try:
        assert select.select([process.stdout], [], [], 120)[0]
        url = process.stdout.readline().split()[-1]
        named = HTTPReward(url, token_env="REWARD_TOKEN", timeout=10)(pictures, [""] * 6, [{}] * 6)
        assert torch.equal(named["size"], JPEGIncompressibility(50)(pictures, [""] * 6))
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
