"""A small server for any reward: ``python -m flowdppo_fast.trainer.rewards.serve package.module:function --port 8000``.

It speaks the protocol that :class:`~.http.HTTPReward` asks in. It is meant for machines that trust each other; it
listens on this machine only unless told otherwise, and with ``--token-env`` answers those who know the token.
"""

from __future__ import annotations

import argparse
import hmac
import inspect
import json
import logging
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from ..callables import load_callable
from .http import read_token
from .protocol import Reward, move_reward, score
from .registry import build_rewards
from .wire import decode_request

logger = logging.getLogger(__name__)


class RewardServer:
    """Serves a reward over HTTP: ``POST /`` scores, ``GET /health`` says that it is up.

    Calls of the reward are made one at a time. As a context manager it serves in a thread.

    Args:
        reward: see :class:`~.protocol.Reward`; images come as ``[B, C, H, W]`` or videos ``[B, F, C, H, W]``, float32
            on the CPU. What it raises is answered with status 500 and its message, and goes to the log.
        host, port: where to listen; port 0 takes a free one (see ``url``).
        token: bearer token that requests must bring, or None.
        max_request_bytes: longest request that is read.
        timeout: seconds that the server waits for a client that stops sending.
    """

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str | None = None,
        max_request_bytes: int = 256 << 20,
        timeout: float = 60.0,
    ):
        settings = {
            "reward": staticmethod(reward), "token": token, "max_request_bytes": max_request_bytes, "timeout": timeout,
            "lock": threading.Lock(),
        }  # fmt: skip
        self._server = ThreadingHTTPServer((host, port), type("Handler", (_Handler,), settings))
        self._server.daemon_threads = True
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/"

    def serve_forever(self) -> None:
        """Serves until interrupted."""
        try:
            self._server.serve_forever()
        finally:
            self._server.server_close()

    def __enter__(self) -> RewardServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        assert self._thread is not None
        self._thread.join()


class _Refused(Exception):
    """A request that is answered with a status and a text."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    reward: Reward
    token: str | None
    max_request_bytes: int
    lock: threading.Lock

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok"})
        else:
            self._answer(404, {"error": "expected POST / or GET /health"})

    def do_POST(self) -> None:
        try:
            self._answer(200, {"rewards": self._score(self._body())})
        except _Refused as refused:
            self._answer(refused.status, {"error": str(refused)})
        except Exception as error:
            logger.exception("the reward failed")
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _body(self) -> bytes:
        given = self.headers.get("Authorization", "")
        if self.token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise _Refused(401, "expected the server's bearer token")
        if self.path != "/":
            raise _Refused(404, "expected POST / or GET /health")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise _Refused(411, "expected a Content-Length")
        if int(length) > self.max_request_bytes:
            raise _Refused(413, f"got {length} bytes, expected at most {self.max_request_bytes}")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise _Refused(408, f"the request did not arrive within {self.timeout:g} s") from None
        if len(body) != int(length):
            raise _Refused(400, f"got {len(body)} bytes, expected {length}")
        return body

    def _score(self, body: bytes) -> Any:
        try:
            images, prompts, metadata = decode_request(body)
        except (TypeError, ValueError) as error:
            raise _Refused(400, str(error)) from error
        with self.lock:
            named = score(self.reward, images, prompts, metadata, torch.device("cpu"))
        lists = {
            name: [None if math.isnan(value) else value for value in values.tolist()] for name, values in named.items()
        }
        return lists["reward"] if list(lists) == ["reward"] else lists

    def _answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        # a request that was refused may not have been read
        self.close_connection = True
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError as error:
            logger.info("%s hung up before the answer (%s)", self.address_string(), error)

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.address_string(), format % args)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowdppo_fast.trainer.rewards.serve", description="Serve a reward."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("callable", nargs="?", help="package.module:attribute; a class is called without arguments")
    what.add_argument("--rewards", help="built-in rewards as JSON, for example '{\"clip\": 1.0}' or a list of mappings")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="where to move the reward, for example cuda:1")
    parser.add_argument("--token-env", help="environment variable with the bearer token that clients must send")
    parser.add_argument("--max-request-mb", type=int, default=256, help="longest request in MiB (default: 256)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    reward: Reward
    if options.rewards is not None:
        # weights are the client's matter
        reward, _ = build_rewards(json.loads(options.rewards))
    else:
        reward = load_callable(options.callable)
        reward = reward() if inspect.isclass(reward) else reward
    if options.device is not None:
        move_reward(reward, options.device)
    token = None if options.token_env is None else read_token(options.token_env)
    server = RewardServer(
        reward, options.host, options.port, token=token, max_request_bytes=options.max_request_mb << 20
    )
    print(f"serving on {server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
