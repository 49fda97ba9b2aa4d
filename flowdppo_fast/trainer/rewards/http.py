"""Rewards from a server: bounded in time and size, and every way to fail is one clear error."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, get_args
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx2
import torch
from torch import Tensor

from .images import DEFAULT_FRAMES, check_all_positive, scored_pixels
from .protocols import FlowDPPOProtocol, FlowGRPOProtocol, UniRLProtocol, WireProtocol
from .wire import Format, excerpt

# answers that may be others when asked again
_RETRIED = (429, 500, 502, 503, 504)


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
        timeout: seconds for one try, from looking the host up to the last byte received.
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
        self.url, self._whole_url = f"{parts.scheme}://{parts.netloc}{parts.path}", url
        self.format: Format = format
        self.quality, self.batch_size, self.parallel, self.frames = quality, batch_size, parallel, frames
        self.timeout, self.deadline, self.retries, self.backoff = timeout, deadline, retries, backoff
        self.max_response_bytes, self.send_metadata = max_response_bytes, send_metadata
        kind = self.protocol.content_type
        self._headers = {"Content-Type": kind, "Accept": kind}
        # an answer is bounded as it travels, not as it was before it was compressed
        self._headers["Accept-Encoding"] = "identity"
        if token_env is not None:
            self._headers["Authorization"] = f"Bearer {read_token(token_env)}"

    def __call__(
        self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict] | None = None
    ) -> Tensor | Mapping[str, Tensor]:
        pixels = scored_pixels(images, prompts, self.frames)
        entries = list(metadata) if metadata is not None and self.send_metadata else [{}] * len(prompts)
        parts = [slice(start, start + self.batch_size) for start in range(0, len(prompts), self.batch_size)]
        asked = [(pixels[part], prompts[part], entries[part]) for part in parts]
        answers: Future[list[Tensor | Mapping[str, Tensor]]] = Future()
        # a loop in a thread of its own: the caller may be in a notebook, which has one. It is not waited for: it ends
        # with the last lookup of a name, which nothing can interrupt
        asking = threading.Thread(target=anyio.run, args=(self._answer, asked, answers), daemon=True)
        asking.start()
        return self._join(answers.result())

    def encode(self, pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping]) -> bytes:
        """The body of one request."""
        return self.protocol.encode(pixels, prompts, metadata)

    def parse(self, answer: bytes, count: int) -> Tensor | Mapping[str, Tensor]:
        """The rewards in the answer to one request; ValueError for another answer."""
        return self.protocol.parse(answer, count)

    async def _answer(self, asked: Sequence[tuple], answers: Future) -> None:
        try:
            answers.set_result(await self._ask_all(asked))
        except BaseException as error:
            # whatever it is, the caller waits for it
            answers.set_exception(error)

    async def _ask_all(self, asked: Sequence[tuple]) -> list[Tensor | Mapping[str, Tensor]]:
        """Rewards of all requests; after the first that fails for good the others end."""
        end = anyio.current_time() + self.deadline
        answers: dict[int, Tensor | Mapping[str, Tensor]] = {}
        failed: list[Exception] = []
        limiter = anyio.CapacityLimiter(self.parallel)
        # without TLS nothing of it has to be loaded
        secure = self.url.startswith("https:")
        verify = ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        async with (
            httpx2.AsyncClient(verify=verify, trust_env=False, timeout=None) as client,
            anyio.create_task_group() as group,
        ):

            async def ask(place: int) -> None:
                async with limiter:
                    try:
                        # images are compressed beside the loop
                        body = await anyio.to_thread.run_sync(self.encode, *asked[place])
                        answers[place] = await self._ask(client, body, len(asked[place][1]), end)
                    except Exception as error:
                        failed.append(error)
                        group.cancel_scope.cancel()

            for place in range(len(asked)):
                group.start_soon(ask, place)
        if failed:
            raise failed[0]
        return [answers[place] for place in range(len(asked))]

    async def _ask(
        self, client: httpx2.AsyncClient, body: bytes, count: int, end: float
    ) -> Tensor | Mapping[str, Tensor]:
        """Rewards of one request, after as many tries as it needs and may have."""
        problem, tries = "no time was left", 0
        for attempt in range(self.retries + 1):
            if attempt:
                await anyio.sleep(min(self.backoff * 2 ** (attempt - 1), max(end - anyio.current_time(), 0)))
            left = min(self.timeout, end - anyio.current_time())
            if left <= 0:
                break
            tries += 1
            try:
                with anyio.fail_after(left):
                    status, reason, answer = await self._post(client, body)
            except (httpx2.TransportError, OSError) as error:
                problem = _describe(error, left)
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

    async def _post(self, client: httpx2.AsyncClient, body: bytes) -> tuple[int, str, bytes]:
        """Status, its text and the answer of one try."""
        async with client.stream("POST", self._whole_url, content=body, headers=self._headers) as response:
            if 300 <= response.status_code < 400:
                place = excerpt(response.headers.get("Location", "nowhere").encode())
                raise RewardServerError(
                    f"{self.url}: the server redirects to {place}, which is not followed; give the final url"
                )
            limit, answer = self.max_response_bytes, b""
            declared = response.headers.get("Content-Length", "0")
            if not declared.isdecimal() or int(declared) <= limit:
                async for piece in response.aiter_raw():
                    answer += piece
                    if len(answer) > limit:
                        break
                else:
                    return response.status_code, excerpt(response.reason_phrase.encode())[1:-1], answer
            raise RewardServerError(
                f"{self.url}: the answer is longer than max_response_bytes={limit}, it was not read further"
            )

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
    causes = list(_causes(error))
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return "the connection was refused; is the server running?"
    # the system's own words, where it said any
    told = next((cause for cause in reversed(causes) if isinstance(cause, OSError)), error)
    return f"{type(told).__name__}: {excerpt(str(told).encode())}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
