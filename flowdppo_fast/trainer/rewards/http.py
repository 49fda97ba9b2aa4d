"""Rewards from a server: bounded in time and size, and every way to fail is one clear error."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, get_args
from urllib.parse import urlsplit

import torch
from torch import Tensor

from .images import DEFAULT_FRAMES, check_all_positive, scored_pixels
from .protocols import FlowDPPOProtocol, FlowGRPOProtocol, UniRLProtocol, WireProtocol
from .wire import Format, excerpt

# answers that may be others when asked again
_RETRIED = (429, 500, 502, 503, 504)
_PIECE = 1 << 16


class RewardServerError(RuntimeError):
    """A reward server could not be reached, took too long, or gave an answer that cannot be trained on."""


class HTTPReward:
    """Rewards from a server, in one of the protocols that are in use (``docs/rewards.md`` has them).

    A batch is sent in requests of ``batch_size`` images, ``parallel`` at a time. A request is tried again when the
    connection fails, when it takes longer than ``timeout``, or when the server answers 429, 500, 502, 503 or 504.
    Every other answer than rewards for exactly these images is an error at once. Redirects are not followed and
    proxies of the environment are not used, so images and token go to no other host.

    Args:
        url: ``http://`` or ``https://`` (certificates are checked), with the path.
        protocol: ``"flowdppo"`` (ours), ``"unirl"`` (UniRL's ``/score``) or ``"flow_grpo"`` (its pickles, read
            without running code).
        rewards: for ``"unirl"``: names of what its service is to compute.
        answer: for ``"flow_grpo"``: name of the list in the answer.
        format: ``"png"`` (exact for 8 bits), ``"jpeg"`` (small, lossy) or ``"npy"`` (float32, exact, large; of our
            protocol alone); flow_grpo's takes JPEG whatever it is.
        quality: of JPEG files.
        batch_size, parallel: images per request, and requests at the same time.
        timeout: seconds for one try, from the first byte sent to the last one received; connecting may take as long
            again for each address that the host has.
        deadline: seconds for a whole batch with all tries; no try starts later or runs longer.
        retries: tries after the first one.
        backoff: seconds before the second try, doubled before each further one.
        max_response_bytes: longest answer that is read.
        token_env: environment variable with a bearer token; None sends none. Read once, here.
        send_metadata: send the metadata, which must then be JSON.
        frames: frames of a video that are sent (:func:`~.images.select_frames`).

    Returns (when called):
        float32 ``[B]`` on the CPU, or a mapping of them if the server names its rewards.

    Raises:
        ValueError: settings out of range. RewardServerError: no rewards, when called.
    """

    # null in an answer; NaN is no JSON
    may_abstain = True

    def __init__(
        self,
        url: str,
        *,
        protocol: str = "flowdppo",
        rewards: Sequence[str] | None = None,
        answer: str = "scores",
        format: Format = "png",
        quality: int = 95,
        batch_size: int = 16,
        parallel: int = 4,
        timeout: float = 60.0,
        deadline: float = 300.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_response_bytes: int = 1 << 20,
        token_env: str | None = None,
        send_metadata: bool = True,
        frames: int = DEFAULT_FRAMES,
    ):
        check_all_positive(
            batch_size=batch_size, parallel=parallel, timeout=timeout, deadline=deadline, backoff=backoff,
            max_response_bytes=max_response_bytes, frames=frames,
        )  # fmt: skip
        if format not in get_args(Format):
            raise ValueError(f"format: got {format!r}, expected one of {', '.join(get_args(Format))}")
        if (rewards is None) != (protocol != "unirl"):
            raise ValueError(f"rewards: got {rewards!r}, expected names with protocol='unirl' and none with others")
        if protocol != "flowdppo" and format == "npy":
            raise ValueError(f"format: got 'npy', expected png or jpeg with protocol={protocol!r}")
        if protocol == "flowdppo":
            self.protocol: WireProtocol = FlowDPPOProtocol(format, quality)
        elif protocol == "unirl":
            self.protocol = UniRLProtocol(rewards or (), None if format == "png" else quality)
        elif protocol == "flow_grpo":
            self.protocol = FlowGRPOProtocol(answer, quality)
        else:
            raise ValueError(f"protocol: got {protocol!r}, expected flowdppo, unirl or flow_grpo")
        if retries < 0:
            raise ValueError(f"retries: got {retries}, expected an integer >= 0")
        parts = urlsplit(url)
        clean = url.isascii() and url.isprintable() and " " not in url and "@" not in parts.netloc
        if parts.scheme not in ("http", "https") or not parts.hostname or not clean:
            raise ValueError("url: expected http://host:port/path or https://..., printable and without a password")
        # a query may hold a secret, so it is never shown
        self.url, self._parts = f"{parts.scheme}://{parts.netloc}{parts.path}", parts
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._port = parts.port
        self.format: Format = format
        self.quality, self.batch_size, self.parallel, self.frames = quality, batch_size, parallel, frames
        self.timeout, self.deadline, self.retries, self.backoff = timeout, deadline, retries, backoff
        self.max_response_bytes, self.send_metadata = max_response_bytes, send_metadata
        kind = self.protocol.content_type
        self._headers = {"Content-Type": kind, "Accept": kind, "Connection": "close"}
        if token_env is not None:
            self._headers["Authorization"] = f"Bearer {read_token(token_env)}"

    def __call__(
        self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict] | None = None
    ) -> Tensor | Mapping[str, Tensor]:
        pixels = scored_pixels(images, prompts, self.frames)
        entries = list(metadata) if metadata is not None and self.send_metadata else [{}] * len(prompts)
        end = time.monotonic() + self.deadline
        stop = threading.Event()

        def ask(start: int) -> Tensor | Mapping[str, Tensor]:
            part = slice(start, start + self.batch_size)
            body = self.encode(pixels[part], prompts[part], entries[part])
            return self._ask(body, len(prompts[part]), end, stop)

        starts = range(0, len(prompts), self.batch_size)
        with ThreadPoolExecutor(min(self.parallel, len(starts)), "flowdppo-http") as pool:
            requests = [pool.submit(ask, start) for start in starts]
            try:
                wait(requests, return_when=FIRST_EXCEPTION)
            finally:
                # after a failure nothing is asked again, and what has not begun never does
                stop.set()
                for request in requests:
                    request.cancel()
            failed = next((r for r in requests if not r.cancelled() and r.done() and r.exception()), None)
            if failed is not None:
                failed.result()
            answers = [request.result() for request in requests]
        return self._join(answers)

    def encode(self, pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping]) -> bytes:
        """The body of one request."""
        return self.protocol.encode(pixels, prompts, metadata)

    def parse(self, answer: bytes, count: int) -> Tensor | Mapping[str, Tensor]:
        """The rewards in the answer to one request; ValueError for another answer."""
        return self.protocol.parse(answer, count)

    def _ask(self, body: bytes, count: int, end: float, stop: threading.Event) -> Tensor | Mapping[str, Tensor]:
        """Rewards of one request, after as many tries as it needs and may have."""
        problem, tries = "no time was left", 0
        for attempt in range(self.retries + 1):
            if attempt and stop.wait(min(self.backoff * 2 ** (attempt - 1), max(end - time.monotonic(), 0))):
                break
            left = end - time.monotonic()
            if left <= 0:
                break
            tries += 1
            try:
                status, reason, answer = self._post(body, time.monotonic() + min(self.timeout, left))
            except (OSError, http.client.HTTPException) as error:
                problem = _describe(error, min(self.timeout, left))
                continue
            if status == 200:
                try:
                    return self.parse(answer, count)
                except ValueError as error:
                    raise RewardServerError(f"{self.url}: wrong answer: {error}") from error
            problem = f"the server answered {status} {reason}: {excerpt(answer)}"
            if status not in _RETRIED:
                break
        times = f"{tries} {'try' if tries == 1 else 'tries'}"
        raise RewardServerError(f"{self.url}: no rewards after {times}: {problem}")

    def _post(self, body: bytes, end: float) -> tuple[int, str, bytes]:
        """Status, its text and the answer of one try, which ends by ``end`` however slow the other side is."""
        connection = _connection(self._parts.scheme, str(self._parts.hostname), self._port, end)
        try:
            # a server that refuses early may close while the body is still being sent; its answer says why
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", self._target, body=body, headers=self._headers)
            response = connection.getresponse()
            if 300 <= response.status < 400:
                place = excerpt((response.getheader("Location") or "nowhere").encode())
                raise RewardServerError(
                    f"{self.url}: the server redirects to {place}, which is not followed; give the final url"
                )
            limit, declared = self.max_response_bytes, response.length or 0
            answer = b"" if declared > limit else response.read(limit + 1)
            if declared > limit or len(answer) > limit:
                raise RewardServerError(
                    f"{self.url}: the answer is longer than max_response_bytes={limit}, it was not read further"
                )
            if not answer and not response.chunked and response.getheader("Content-Length") is None:
                # the head was cut off, or there is no body; both look like this
                raise http.client.RemoteDisconnected("empty answer")
            if response.length:
                raise http.client.IncompleteRead(answer, response.length)
            return response.status, excerpt(response.reason.encode())[1:-1], answer
        finally:
            connection.hang_up()

    def _join(self, answers: Sequence[Tensor | Mapping[str, Tensor]]) -> Tensor | Mapping[str, Tensor]:
        """Answers of several requests one after the other; all must have the same names."""
        names = [sorted(answer) if isinstance(answer, Mapping) else None for answer in answers]
        if any(other != names[0] for other in names):
            raise RewardServerError(
                f"{self.url}: wrong answer: got other names of rewards for parts of one batch: {names}"
            )
        if names[0] is None:
            return torch.cat(list(answers))  # type: ignore[arg-type]
        return {name: torch.cat([answer[name] for answer in answers]) for name in names[0]}  # type: ignore[call-overload,index]


def read_token(variable: str) -> str:
    """The token in an environment variable.

    Raises:
        ValueError: it is not set, or holds something else; its value is not shown.
    """
    token = os.environ.get(variable, "")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"token_env: the environment variable {variable} holds no token, expected printable ASCII")
    return token


def _describe(error: Exception, seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no complete answer within {seconds:.3g} s"
    if isinstance(error, http.client.IncompleteRead):
        return f"the connection ended in the middle of the answer, after {len(error.partial)} bytes"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused; is the server running?"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed the connection without an answer"
    return f"{type(error).__name__}: {excerpt(str(error).encode())}"


class _BoundedSocket:
    """What ``http.client`` needs of a socket, with one end for all operations instead of a timeout for each."""

    def __init__(self, raw: socket.socket, end: float):
        self._raw, self._end = raw, end

    def arm(self) -> socket.socket:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._raw.settimeout(left)
        return self._raw

    def sendall(self, data: bytes) -> None:
        # over TLS a timeout counts for each part that is sent, so parts are small
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            self.arm().sendall(view[start : start + _PIECE])

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_BoundedReader(self))

    def close(self) -> None:
        """Called by ``http.client`` when the response is still to be read; hang_up() closes."""


class _BoundedReader(io.RawIOBase):
    def __init__(self, bounded: _BoundedSocket):
        self._bounded = bounded

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._bounded.arm().recv_into(buffer)


class _BoundedConnection(http.client.HTTPConnection):
    """A connection whose every operation ends by ``end``."""

    end: float
    _raw: socket.socket | None = None

    def connect(self) -> None:
        self.timeout = max(self.end - time.monotonic(), 1e-3)
        super().connect()
        self._raw = self.sock
        self.sock = _BoundedSocket(self._raw, self.end)  # type: ignore[assignment]

    def hang_up(self) -> None:
        self.close()
        if self._raw is not None:
            self._raw.close()


class _BoundedTLSConnection(_BoundedConnection, http.client.HTTPSConnection):
    pass


def _connection(scheme: str, host: str, port: int | None, end: float) -> _BoundedConnection:
    connection: _BoundedConnection
    if scheme == "https":
        connection = _BoundedTLSConnection(host, port, context=ssl.create_default_context())
    else:
        connection = _BoundedConnection(host, port)
    connection.end = end
    return connection
