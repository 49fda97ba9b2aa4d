"""Servers that sample for the tests of ``test_engines.py``, each in a process of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from processes import builders, start
from safetensors.torch import save_file

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer
from flowdppo_fast.trainer.engines.serve import EngineServer


def serve(
    kind: str, folder: str, name: str, port: int, dies_at: int | None, slow_at: int | None, seconds: float
) -> None:
    """Serves until it is killed, or dies in the middle of request ``dies_at``."""
    asked = 0

    class Server(EngineServer):
        def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
            nonlocal asked
            asked += 1
            (Path(folder) / f"{name}.asked").write_text(str(asked))
            if asked == dies_at:
                os._exit(9)
            if slow_at is not None and asked >= slow_at:
                time.sleep(seconds)
            return super().generate(request)

    server = Server(getattr(builders(), f"make_{kind}")(), port=port)
    half = Path(folder) / f"{name}.half"
    half.write_text(server.url)
    half.rename(Path(folder) / f"{name}.url")
    server.serve_forever()


def train(sections: dict[str, dict], file: str) -> None:
    """One process of a run on servers; the main one writes the weights."""
    from digits_example import PROMPTS, ink

    trainer = FlowDPPOTrainer(builders().make_digits(), ink, PROMPTS, FlowDPPOConfig.from_dict(sections))
    trainer.train()
    if trainer.workers.is_main:
        save_file({f"{place}": p.detach() for place, p in enumerate(trainer.weights.parameters)}, file)


class Engine:
    """A server in a process of its own, of the pipeline ``kind`` of this folder's ``conftest.py``."""

    def __init__(
        self, folder: Path, name: str = "engine", *, kind: str = "digits", port: int = 0, dies_at: int | None = None,
        slow_at: int | None = None, seconds: float = 0.0,
    ):  # fmt: skip
        self.folder, self.name = folder, name
        place = folder / f"{name}.url"
        place.unlink(missing_ok=True)
        self.process = start(serve, kind, str(folder), name, port, dies_at, slow_at, seconds)
        end = time.monotonic() + 60
        while not place.exists():
            assert self.process.is_alive(), "the server did not start; see what it printed"
            assert time.monotonic() < end, "the server did not start within a minute"
            time.sleep(0.02)
        self.url = place.read_text()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def asked(self) -> int:
        """Requests that it began."""
        place = self.folder / f"{self.name}.asked"
        return int(place.read_text()) if place.exists() else 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
