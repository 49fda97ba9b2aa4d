"""The HTTP client against real servers on this machine: one that works, and every way to fail."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
import torch

from flowdppo_fast.trainer.rewards import HTTPReward, RewardServerError, score
from flowdppo_fast.trainer.rewards.serve import RewardServer

CPU = torch.device("cpu")
QUICK = {"timeout": 0.4, "deadline": 2.0, "retries": 0, "backoff": 0.01}


def brightness(images, prompts, metadata):
    """Mean pixel plus the length of the prompt plus a number in the metadata."""
    extra = torch.tensor([float(len(prompt) + entry.get("bonus", 0)) for prompt, entry in zip(prompts, metadata)])
    return images.mean(dim=tuple(range(1, images.ndim))) + extra


class RawServer:
    """Accepts connections and gives each to ``behave(connection, number)``; closes it afterwards."""

    def __init__(self, behave):
        self.behave, self.requests, self.stopped = behave, [], threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.threads = [threading.Thread(target=self._accept, daemon=True)]

    def _accept(self):
        while not self.stopped.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self.threads[-1].start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            self.requests.append(None)
            self.behave(self, connection, len(self.requests))

    def read(self, connection) -> tuple[bytes, bytes]:
        """Head and body of the request."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, body = data.split(b"\r\n\r\n", 1)
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l"))
        while len(body) < length:
            body += connection.recv(65536)
        self.requests[-1] = (head, body)
        return head, body

    def __enter__(self):
        self.threads[0].start()
        return self

    def __exit__(self, *exception):
        self.stopped.set()
        # wakes accept()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()


def response(body: bytes | str, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


def answering(data: bytes):
    def behave(server, connection, number):
        server.read(connection)
        connection.sendall(data)

    return behave


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


def hang(server, connection, number):
    server.read(connection)
    server.stopped.wait(5)


def hang_before_reading(server, connection, number):
    server.stopped.wait(5)


def trickle_head(server, connection, number):
    server.read(connection)
    for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
        connection.sendall(bytes([letter]))
        if server.stopped.wait(0.05):
            return


def trickle_body(server, connection, number):
    server.read(connection)
    connection.sendall(response(b"", length=1000))
    while not server.stopped.wait(0.05):
        connection.sendall(b" ")


def trickle_chunks(server, connection, number):
    server.read(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not server.stopped.wait(0.05):
        connection.sendall(b"1\r\n \r\n")


@pytest.mark.parametrize("behave", [hang, hang_before_reading, trickle_head, trickle_body, trickle_chunks])
def test_time_of_a_try_is_bounded(pictures, behave):
    with RawServer(behave) as server:
        started = time.monotonic()
        with pytest.raises(RewardServerError, match=r"no rewards after 1 try: no complete answer within 0\.4 s"):
            HTTPReward(server.url, **QUICK)(pictures, [""] * 6)
        assert 0.35 < time.monotonic() - started < 3


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


OK = '{"rewards": %s}'
LIES = {
    "NaN": (OK % "[1.0, NaN]", r"NaN is no JSON number"),
    "infinity": (OK % "[1.0, -Infinity]", r"-Infinity is no JSON number"),
    "overflow": (OK % "[1.0, 1e999]", r"got inf for rewards of sample 1, expected a finite float32"),
    "beyond float32": (OK % "[1.0, 3.5e38]", r"got 3.5e\+38 for rewards of sample 1"),
    "huge integer": (OK % ("[1.0, 1" + "0" * 400 + "]"), r"got 10+ for rewards of sample 1"),
    "too many digits": (OK % ("[1.0, 1" + "0" * 6000 + "]"), r"expected JSON"),
    "null": (OK % "[1.0, null]", r"got None for rewards of sample 1, expected a number"),
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
    "no answer": (b"", "the server closed the connection without an answer"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", "the server closed the connection without an answer"),
    "half a body": (response('{"rewards": [1', length=50), "ended in the middle of the answer, after 14 bytes"),
    "half a chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{",
        "ended in the middle of the answer",
    ),
    "no http": (b"SSH-2.0-OpenSSH_9.6\r\n", "BadStatusLine: 'SSH-2.0"),
    "endless head": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "LineTooLong"),
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
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flowdppo-http")]


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
