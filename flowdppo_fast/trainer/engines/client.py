"""Asks servers for rollouts and gives them the trainer's adapters; a dead server's work goes to the others."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from torch import nn

from ..engine_settings import EnginesConfig
from ..weights.adapters import save_lora

logger = logging.getLogger(__name__)

# a server that has other adapters than the request names
OTHER_WEIGHTS = 409
_RETRIED = (408, 429, 500, 502, 503, 504)
# before the second try, doubled before each further one
_PAUSE = 0.2
_SHOWN = 300


class EngineError(RuntimeError):
    """No server could do what was asked, or one gave an answer that cannot be trained on."""


class _Failed(Exception):
    """A try that may go otherwise on another server, or later."""


class Engines:
    """The servers of a run.

    Args:
        settings: their addresses, and how long and how often they are asked.
    """

    def __init__(self, settings: EnginesConfig):
        self.settings = settings
        self.urls = [url.rstrip("/") for url in settings.urls]
        self.name = ""
        self._files: dict[str, Path] = {}
        # why each server is not asked again before the next adapters
        self._down: dict[str, str] = {}
        self._lock = threading.Lock()

    def write(self, modules: Mapping[str, nn.Module], folder: Path) -> tuple[str, dict[str, Path]]:
        """Writes the adapters of ``modules`` below ``folder`` under a name that follows from their numbers; those that
        were there before are removed."""
        fresh = folder / "new"
        shutil.rmtree(fresh, ignore_errors=True)
        paths = {target: save_lora(module, fresh / target) for target, module in modules.items()}
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths.values())).hexdigest()
        name = f"flowdppo-{digest[:16]}"
        if not (folder / name).exists():
            for old in folder.glob("flowdppo-*"):
                shutil.rmtree(old)
            fresh.rename(folder / name)
        return name, {target: folder / name / path.relative_to(fresh) for target, path in paths.items()}

    def use(self, name: str, files: Mapping[str, Path], *, send: bool) -> None:
        """From here on servers sample with the adapters ``name``.

        Args:
            files: by transformer.
            send: give them to all servers now; else another process does.

        Raises:
            EngineError: no server took them.
        """
        self.name, self._files, self._down = name, dict(files), {}
        if not send:
            return
        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(self._give, self.urls))
        if len(self._down) == len(self.urls):
            raise self._none_left("the adapters")

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
        """The server and its answer of ``POST /rollout/generate`` to each request, in their order.

        Raises:
            EngineError: no server is left, or a server refused a request.
        """
        answers: dict[int, tuple[str, Any]] = {}
        waiting = deque(range(len(requests)))
        refused: list[EngineError] = []

        def serve(url: str) -> None:
            while not refused and len(answers) < len(requests):
                with self._lock:
                    place = waiting.popleft() if waiting else None
                if place is None:
                    # another server may fail and give its work back
                    time.sleep(0.01)
                    continue
                try:
                    answers[place] = url, self._answer(url, requests[place])
                except _Failed as error:
                    with self._lock:
                        waiting.appendleft(place)
                    self._drop(url, str(error))
                    return
                except EngineError as error:
                    refused.append(error)
                    return

        alive = [url for url in self.urls if url not in self._down]
        if alive:
            with ThreadPoolExecutor(len(alive)) as pool:
                list(pool.map(serve, alive))
        if refused:
            raise refused[0]
        if len(answers) < len(requests):
            raise self._none_left(f"{len(requests) - len(answers)} of {len(requests)} requests")
        return [answers[place] for place in range(len(requests))]

    def _answer(self, url: str, request: Mapping[str, Any]) -> Any:
        problem = ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                status, body = self._post(f"{url}/rollout/generate", json.dumps(request).encode())
            except _Failed as error:
                problem = str(error)
                continue
            if status == 200:
                try:
                    return json.loads(body)
                except ValueError as error:
                    raise EngineError(
                        f"{url}: got an answer that is no JSON ({error}), expected one per image"
                    ) from None
            problem = f"the server answered {status}: {body[:_SHOWN].decode(errors='replace')}"
            if status == OTHER_WEIGHTS:
                # it was started again since
                self._give(url)
                if url in self._down:
                    break
            elif status not in _RETRIED:
                raise EngineError(f"{url}: {problem}; the request is not one that this server takes")
        raise _Failed(problem)

    def _give(self, url: str) -> None:
        """Sends the adapters; a server that does not take them is dropped."""
        try:
            for target, path in self._files.items():
                if self.settings.weights == "http":
                    where, body = f"{url}/lora/{target}?name={self.name}", path.read_bytes()
                else:
                    given = {"lora_nickname": self.name, "lora_path": str(path.resolve()), "target": target}
                    where, body = f"{url}/v1/set_lora", json.dumps(given).encode()
                status, answer = self._post(where, body)
                if status != 200:
                    raise _Failed(f"the adapters were answered {status}: {answer[:_SHOWN].decode(errors='replace')}")
        except _Failed as error:
            self._drop(url, str(error))

    def _post(self, where: str, body: bytes) -> tuple[int, bytes]:
        seconds = self.settings.timeout
        end = time.monotonic() + seconds
        try:
            with (
                httpx2.Client(trust_env=False, timeout=httpx2.Timeout(seconds, connect=min(10.0, seconds))) as client,
                client.stream("POST", where, content=body, headers={"Content-Type": "application/json"}) as response,
            ):
                pieces = []
                for piece in response.iter_raw():
                    pieces.append(piece)
                    if time.monotonic() > end:
                        raise _Failed(f"no complete answer within engines.timeout={seconds:g} s")
                return response.status_code, b"".join(pieces)
        except httpx2.TimeoutException:
            raise _Failed(f"no complete answer within engines.timeout={seconds:g} s") from None
        except (httpx2.TransportError, OSError) as error:
            raise _Failed(f"{type(error).__name__}: {error}") from None

    def _drop(self, url: str, problem: str) -> None:
        with self._lock:
            self._down[url] = problem
        logger.warning("engine %s is not asked again before the next update: %s", url, problem)

    def _none_left(self, what: str) -> EngineError:
        told = "; ".join(f"{url}: {problem}" for url, problem in self._down.items())
        return EngineError(
            f"engines: no server is left for {what}: {told}. Start one of them again, or raise engines.timeout, and "
            "continue the run with resume: it goes on from its last checkpoint"
        )
