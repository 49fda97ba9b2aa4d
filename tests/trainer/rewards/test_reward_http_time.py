"""The HTTP client against servers that are slow or come back: time is bounded, tries are repeated."""

from __future__ import annotations

import itertools
import socket
import threading
import time

import pytest
import torch
from reward_servers import (
    QUICK,
    RawServer,
    hang,
    hang_before_reading,
    response,
    trickle_body,
    trickle_chunks,
    trickle_head,
)

from flowdppo_fast.trainer.rewards import HTTPReward, RewardServerError


@pytest.mark.parametrize("behave", [hang, hang_before_reading, trickle_head, trickle_body, trickle_chunks])
def test_time_of_a_try_is_bounded(pictures, behave):
    with RawServer(behave) as server:
        started = time.monotonic()
        with pytest.raises(RewardServerError, match=r"no rewards after 1 try: no complete answer within 0\.4 s"):
            HTTPReward(server.url, **QUICK)(pictures, [""] * 6)
        assert 0.35 < time.monotonic() - started < 3


def test_time_to_look_the_host_up_counts(pictures, monkeypatch):
    known = threading.Event()

    def slow(*arguments, **options):
        known.wait(5)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    started = time.monotonic()
    with pytest.raises(RewardServerError, match=r"no complete answer within 0\.4 s"):
        HTTPReward("http://slowly-named.invalid/", **QUICK)(pictures, [""] * 6)
    assert time.monotonic() - started < 3
    known.set()


def test_a_late_sign_of_life_does_not_extend_a_try(pictures):
    def behave(server, connection, number):
        server.read(connection)
        if not server.stopped.wait(1.8):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            server.stopped.wait(5)

    with RawServer(behave) as server:
        started = time.monotonic()
        with pytest.raises(RewardServerError, match="no complete answer within 2 s"):
            HTTPReward(server.url, timeout=2.0, retries=0)(pictures, [""] * 6)
        # a timeout for each operation would end at 3.8
        assert time.monotonic() - started < 3.2


def test_a_server_that_does_not_read_a_large_request_is_left():
    images = torch.rand(4, 3, 512, 512)
    with RawServer(hang_before_reading) as server:
        reward = HTTPReward(server.url, format="npy", timeout=0.4, retries=0)
        with pytest.raises(RewardServerError, match="no complete answer within"):
            reward(images, [""] * 4)


def test_time_of_a_batch_is_bounded_whatever_the_retries(pictures):
    with RawServer(hang) as server:
        started = time.monotonic()
        with pytest.raises(RewardServerError, match=r"no rewards after [23] tries: no complete answer"):
            HTTPReward(server.url, timeout=0.4, deadline=1.0, retries=100, backoff=0.01)(pictures, [""] * 6)
        assert time.monotonic() - started < 4


def test_tries_again_until_the_server_is_well(pictures):
    def behave(server, connection, number):
        server.read(connection)
        if number == 1:
            # the connection is dropped
            return
        bad = response("busy", "503 Service Unavailable")
        connection.sendall(bad if number == 2 else response('{"rewards": [4.0]}'))

    with RawServer(behave) as server:
        reward = HTTPReward(server.url, timeout=2, retries=2, backoff=0.01)
        assert reward(pictures[:1], [""]).tolist() == [4.0]
        assert len(server.requests) == 3


def test_backoff_doubles(pictures):
    times = []

    def behave(server, connection, number):
        server.read(connection)
        times.append(time.monotonic())

    with RawServer(behave) as server, pytest.raises(RewardServerError, match="no rewards after 4 tries"):
        HTTPReward(server.url, timeout=2, retries=3, backoff=0.1)(pictures[:1], [""])
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    # a busy machine makes pauses longer, never shorter
    assert all(planned <= pause < planned + 2 for planned, pause in zip([0.1, 0.2, 0.4], pauses))
    assert len(pauses) == 3
