"""The HTTP client against servers that answer wrongly, refuse or go away: each is an error that says so."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
import torch
from reward_servers import QUICK, RawServer, answering, brightness, response, trickle_body

from flowdppo_fast.trainer.rewards import HTTPReward, RewardServerError
from flowdppo_fast.trainer.rewards.serve import RewardServer

OK = '{"rewards": %s}'
LIES = {
    "NaN": (OK % "[1.0, NaN]", r"NaN is no JSON number"),
    "infinity": (OK % "[1.0, -Infinity]", r"-Infinity is no JSON number"),
    "overflow": (OK % "[1.0, 1e999]", r"got inf for rewards of sample 1, expected a finite float32"),
    "beyond float32": (OK % "[1.0, 3.5e38]", r"got 3.5e\+38 for rewards of sample 1"),
    "huge integer": (OK % ("[1.0, 1" + "0" * 400 + "]"), r"got 10+ for rewards of sample 1"),
    "too many digits": (OK % ("[1.0, 1" + "0" * 6000 + "]"), r"expected JSON"),
    "text": (OK % '[1.0, "2.0"]', r"got '2.0' for rewards of sample 1, expected a number"),
    "boolean": (OK % "[1.0, true]", r"got True for rewards of sample 1"),
    "nested": (OK % "[[1.0, 2.0]]", r"got 1 numbers for rewards, expected a list of 2"),
    "too short": (OK % "[1.0]", r"got 1 numbers for rewards, expected a list of 2, one per image"),
    "too long": (OK % "[1.0, 2.0, 3.0]", r"got 3 numbers for rewards"),
    "scalar": (OK % "1.0", r"expected \{\"rewards\": \[\.\.\.\]\}"),
    "name too short": (OK % '{"a": [1.0, 2.0], "b": [1.0]}', r"got 1 numbers for 'b'"),
    "no names": (OK % "{}", r"got no rewards"),
    "no key": ('{"scores": [1.0, 2.0]}', r"expected .* got '\{\"scores\""),
    "a list": ("[1.0, 2.0]", r"expected \{\"rewards\""),
    "html": ("<html>\x1b[31m</html>", r"expected JSON, got '<html> \[31m</html>'"),
    "no utf-8": (b"\xff\xfe\x00", r"expected JSON, got"),
    "empty": ("", r"expected JSON, got ''"),
    "deep": ("[" * 100_000, r"expected JSON, got '\[+\.\.\.' "),
}


@pytest.mark.parametrize(("answer", "message"), LIES.values(), ids=LIES)
def test_wrong_answers_are_errors_at_once(pictures, answer, message):
    with RawServer(answering(response(answer))) as server:
        with pytest.raises(RewardServerError, match=f"wrong answer: .*{message}"):
            HTTPReward(server.url, timeout=5, retries=5)(pictures[:2], ["", ""])
        assert len(server.requests) == 1


def test_parts_of_a_batch_with_other_names(pictures):
    def behave(server, connection, number):
        _, body = server.read(connection)
        name = "a" if json.loads(body)["prompts"] == ["0"] else "b"
        connection.sendall(response(json.dumps({"rewards": {name: [1.0]}})))

    with (
        RawServer(behave) as server,
        pytest.raises(RewardServerError, match=r"other names .*: \[\['a'\], \['b'\]\]"),
    ):
        HTTPReward(server.url, batch_size=1)(pictures[:2], ["0", "1"])


@pytest.mark.parametrize("declared", [True, False])
def test_size_of_an_answer_is_bounded(pictures, declared):
    sent = []

    def behave(server, connection, number):
        server.read(connection)
        length = f"Content-Length: {1 << 40}\r\n" if declared else ""
        connection.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
        while not server.stopped.is_set():
            sent.append(connection.send(b" " * 65536))

    with (
        RawServer(behave) as server,
        pytest.raises(RewardServerError, match="longer than max_response_bytes=100000, it was not read further"),
    ):
        HTTPReward(server.url, timeout=5, max_response_bytes=100_000)(pictures, [""] * 6)
    # what lies in the buffers of the two sockets, and no more
    assert sum(sent) < 1 << 26


def test_an_answer_of_just_the_allowed_size_is_read(pictures):
    answer = '{"rewards": [1.0]}'.ljust(200)
    with RawServer(answering(response(answer))) as server:
        assert HTTPReward(server.url, max_response_bytes=200)(pictures[:1], [""]).tolist() == [1.0]
        with pytest.raises(RewardServerError, match="longer than max_response_bytes=199"):
            HTTPReward(server.url, max_response_bytes=199)(pictures[:1], [""])


ENDINGS = {
    "no answer": (b"", "Server disconnected without sending a response"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", "Server disconnected without sending a response"),
    "half a body": (response('{"rewards": [1', length=50), r"received 14 bytes, expected 50"),
    "half a chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{",
        "peer closed connection without sending complete message body",
    ),
    "no http": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "illegal status line.*SSH-2.0"),
    "endless head": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "Receive buffer too long"),
}


@pytest.mark.parametrize(("data", "message"), ENDINGS.values(), ids=ENDINGS)
def test_connections_that_end_early(pictures, data, message):
    with RawServer(answering(data)) as server, pytest.raises(RewardServerError, match=message):
        HTTPReward(server.url, timeout=2, retries=1, backoff=0.01)(pictures[:1], [""])


@pytest.mark.parametrize(
    ("status", "tries"),
    [("400 Bad Request", 1), ("403 Forbidden", 1), ("404 Not Found", 1), ("204 No Content", 1)]
    + [(f"{status} Busy", 3) for status in (429, 500, 502, 503, 504)],
)
def test_http_errors(pictures, status, tries):
    answer = response('{"error": "no more memory"}' if status[0] != "2" else "", status)
    with RawServer(answering(answer)) as server:
        times = f"{tries} {'try' if tries == 1 else 'tries'}"
        with pytest.raises(RewardServerError, match=f"after {times}: the server answered {status}: ") as caught:
            HTTPReward(server.url, timeout=2, retries=2, backoff=0.01)(pictures[:1], [""])
        assert len(server.requests) == tries
        assert ("no more memory" in str(caught.value)) == (status[0] != "2")


def test_redirects_are_not_followed_and_the_token_stays_here(pictures, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    with RawServer(answering(response('{"rewards": [1.0]}'))) as elsewhere:
        redirect = response("", "307 Temporary Redirect", f"Location: {elsewhere.url}\r\n")
        with RawServer(answering(redirect)) as server:
            with pytest.raises(RewardServerError, match=f"redirects to '{elsewhere.url}', which is not followed"):
                HTTPReward(server.url, token_env="REWARD_TOKEN", timeout=2)(pictures[:1], [""])
            assert b"Authorization: Bearer secret" in server.requests[0][0]
        assert not elsewhere.requests


def test_refused_connections(pictures):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RewardServerError, match="after 2 tries: the connection was refused; is the server running"):
        HTTPReward(f"http://127.0.0.1:{port}/", timeout=2, retries=1, backoff=0.01)(pictures[:1], [""])


def test_names_that_cannot_be_resolved(pictures, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(RewardServerError, match=r"no rewards after 1 try: gaierror"):
        HTTPReward("http://no-such-host.invalid/", timeout=5, retries=0)(pictures[:1], [""])


def test_a_server_that_refuses_before_reading_is_heard():
    def behave(server, connection, number):
        connection.recv(1000)
        connection.sendall(response('{"error": "too large"}', "413 Content Too Large"))
        connection.shutdown(socket.SHUT_WR)
        # reading on keeps the answer from being lost to a reset
        while connection.recv(65536):
            pass

    images = torch.rand(4, 3, 256, 256)
    with RawServer(behave) as server, pytest.raises(RewardServerError, match=r"answered 413 .*too large"):
        HTTPReward(server.url, format="npy", timeout=5)(images, [""] * 4)


def test_one_failure_ends_the_others(pictures):
    """The first request is refused for good; the rest neither starts nor tries again."""
    before = set(threading.enumerate())

    def behave(server, connection, number):
        _, body = server.read(connection)
        first = json.loads(body)["prompts"] == ["0"]
        connection.sendall(response("no", "403 Forbidden") if first else response("busy", "503 Busy"))

    with RawServer(behave) as server:
        started = time.monotonic()
        reward = HTTPReward(server.url, batch_size=1, parallel=2, timeout=2, retries=50, backoff=3)
        with pytest.raises(RewardServerError, match="403 Forbidden"):
            reward(pictures, [str(n) for n in range(6)])
        assert time.monotonic() - started < 2
        assert len(server.requests) <= 3
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), thread.name


def test_what_the_reward_of_the_server_raises_is_told(pictures, caplog):
    def broken(images, prompts, metadata):
        raise KeyError("weights")

    with RewardServer(broken) as server, pytest.raises(RewardServerError, match=r"500 .*KeyError: 'weights'"):
        HTTPReward(server.url, retries=0)(pictures, [""] * 6)
    with (
        RewardServer(lambda images, *_: images.mean(dim=(1, 2, 3)) / 0) as server,
        pytest.raises(RewardServerError, match=r"500 .*got inf for 'reward' of sample 0"),
    ):
        HTTPReward(server.url, retries=0)(pictures, [""] * 6)


def test_proxies_of_the_environment_are_not_used(pictures, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with RewardServer(brightness) as server:
        assert HTTPReward(server.url, retries=0)(pictures[:1], [""]).shape == (1,)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl, which is not installed")
    folder = tmp_path_factory.mktemp("tls")
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    options += ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", "req", *options, *files], check=True, capture_output=True)
    return folder


def test_tls_is_checked_and_bounded_too(pictures, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")

    def behave(server, connection, number):
        with context.wrap_socket(connection, server_side=True) as secure:
            if number < 3:
                server.read(secure)
                secure.sendall(response('{"rewards": [7.0]}'))
            else:
                trickle_body(server, secure, number)

    with RawServer(behave) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(RewardServerError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            HTTPReward(url, timeout=2, retries=0)(pictures[:1], [""])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        assert HTTPReward(url, timeout=2, retries=0)(pictures[:1], [""]).tolist() == [7.0]
        with pytest.raises(RewardServerError, match=r"no complete answer within 0\.4 s"):
            HTTPReward(url, **QUICK)(pictures[:1], [""])
