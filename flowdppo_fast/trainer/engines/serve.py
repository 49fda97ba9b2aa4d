"""A small server that samples with any diffusers flow pipeline, for ``engines.urls``:
``python -m flowdppo_fast.trainer.engines.serve package.module:make_pipeline --port 30000``.

It answers ``POST /rollout/generate`` with the fields of SGLang's rollout API. It is meant for machines that trust each
other and listens on this machine only unless told otherwise. It reads JSON and
safetensors, and runs nothing it is sent.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from ..callables import load_callable, search_working_directory
from ..record.sampling import FlowMatchSDEScheduler
from ..record.watch import denoisers
from .client import OTHER_WEIGHTS
from .readers import TrajectoryCollector
from .wire import decode, encode

logger = logging.getLogger(__name__)

_SAMPLERS = {"sde": "flow_sde"}
_NAMED = ("prompt", "negative_prompt", "width", "height", "guidance_scale", "true_cfg_scale", "num_frames", "fps")
_LONGEST = 1 << 30


class OtherWeightsError(ValueError):
    """A request for weights that the server does not have."""


class EngineServer:
    """Samples rollouts over HTTP, one request at a time: ``POST /rollout/generate``, ``POST /v1/set_lora`` (a path),
    ``POST /lora/<transformer>?name=<name>`` (a safetensors file), ``GET /health``.

    Args:
        pipeline: with the weights that the adapters belong to.
        host, port: where to listen; port 0 takes a free one (see ``url``).
    """

    def __init__(self, pipeline: Any, host: str = "127.0.0.1", port: int = 0):
        self.pipeline, self.lock = pipeline, threading.Lock()
        self.modules = denoisers(pipeline)
        self.active: dict[str, str] = {}
        self._server = ThreadingHTTPServer((host, port), type("Handler", (_Handler,), {"engine": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def serve_forever(self) -> None:
        """Serves until interrupted."""
        try:
            self._server.serve_forever()
        finally:
            self._server.server_close()

    def set_lora(self, name: str, target: str, path: Path) -> None:
        """Puts the adapter of a file in the place of the one before.

        Raises:
            ValueError: no such transformer or file.
        """
        if target not in self.modules:
            raise ValueError(f"target: got {target!r}, expected one of {', '.join(self.modules)}")
        path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
        if path.suffix != ".safetensors" or not path.is_file():
            raise ValueError(f"lora_path: got {path}, expected a safetensors file that this machine sees")
        module = self.modules[target]
        if target in self.active:
            module.delete_adapters("default")  # type: ignore[operator]
        module.load_lora_adapter(str(path.parent), weight_name=path.name, adapter_name="default")  # type: ignore[operator]
        self.active[target] = name

    @torch.no_grad()
    def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to one request, one per image.

        Raises:
            ValueError: a request that cannot be sampled. OtherWeightsError: it is for other adapters.
        """
        extra = dict(request.get("extra_sampling_params") or {})
        own = extra.pop("flowdppo", {})
        if own and (set(self.active.values()) != {own["weights"]} or self.active.keys() != self.modules.keys()):
            raise OtherWeightsError(f"weights: got a request for {own['weights']}, this server has {self.active}")
        count, steps = int(request.get("num_outputs_per_prompt") or 1), request.get("rollout_sde_step_indices")
        if not steps:
            raise ValueError("rollout_sde_step_indices: got none, expected the steps that draw noise")
        if own:
            arguments, seeds = decode(own["arguments"]), own["seeds"]
        else:
            arguments = {name: request[name] for name in _NAMED if request.get(name) is not None} | decode(extra)
            arguments["num_images_per_prompt"] = count
            seeds = [int(request.get("seed", 1024)) + place for place in range(count)]
        kind = request.get("rollout_sde_type", "sde")
        source = self.pipeline.scheduler
        scheduler = FlowMatchSDEScheduler.from_config(
            source, sampler=_SAMPLERS.get(kind, kind), eta=float(request.get("rollout_noise_level", 0.7)),
            sde_steps=steps, noise="stored", seed=own.get("noise_seed", seeds[0]), first_row=own.get("first_row", 0),
        )  # fmt: skip
        collector = TrajectoryCollector(scheduler, request.get("rollout_return_step_indices"))
        self.pipeline.scheduler = scheduler
        try:
            self.pipeline(
                **{
                    **arguments,
                    "num_inference_steps": request["num_inference_steps"],
                    "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
                    # the images are the trainer's matter
                    "output_type": "latent",
                    "return_dict": False,
                }
            )
        finally:
            self.pipeline.scheduler = source
        rollout = collector.get_trajectory()
        assert isinstance(rollout.noise, torch.Tensor)
        shared = {
            "sigmas": rollout.sigmas, "timesteps": scheduler.timesteps,
            "latent_step_indices": torch.tensor(rollout.state_steps),
        }  # fmt: skip
        return [
            encode(
                {
                    "prompt": str(request.get("prompt", "")),
                    "seed": seeds[row],
                    "dit_trajectory": {"latents": rollout.states[row], **shared},
                    "rollout_debug_tensors": {
                        "rollout_model_outputs": rollout.velocity[row],
                        "rollout_variance_noises": rollout.noise[row],
                    },
                }
            )
            for row in range(len(rollout))
        ]


class _Handler(BaseHTTPRequestHandler):
    engine: EngineServer

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {"status": "ok", "weights": self.engine.active})

    def do_POST(self) -> None:
        place = urlsplit(self.path)
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= _LONGEST:
                raise ValueError(f"Content-Length: got {length}, expected at most {_LONGEST}")
            body = self.rfile.read(length)
            with self.engine.lock:
                self._answer(200, self._do(place.path, parse_qs(place.query), body))
        except OtherWeightsError as error:
            self._answer(OTHER_WEIGHTS, {"error": str(error)})
        except (KeyError, TypeError, ValueError) as error:
            self._answer(400, {"error": f"{type(error).__name__}: {error}"})
        except Exception as error:
            logger.exception("a request failed")
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _do(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        if path == "/rollout/generate":
            return self.engine.generate(json.loads(body))
        if path == "/v1/set_lora":
            given = json.loads(body)
            self.engine.set_lora(given["lora_nickname"], given["target"], Path(given["lora_path"]))
        elif path.startswith("/lora/"):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "sent.safetensors"
                file.write_bytes(body)
                self.engine.set_lora(query["name"][0], path.removeprefix("/lora/"), file)
        else:
            raise ValueError(f"path: got {path}, expected /rollout/generate, /v1/set_lora or /lora/<transformer>")
        return {"status": "ok"}

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError as error:
            logger.info("%s hung up before the answer (%s)", self.address_string(), error)

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.address_string(), format % args)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowdppo_fast.trainer.engines.serve", description="Sample rollouts for a trainer."
    )
    parser.add_argument("callable", help="package.module:attribute; called without arguments it gives the pipeline")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--device", help="where to move the pipeline, for example cuda:1")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    search_working_directory()
    pipeline = load_callable(options.callable)()
    pipeline.set_progress_bar_config(disable=True)
    if options.device is not None:
        pipeline.to(options.device)
    server = EngineServer(pipeline, options.host, options.port)
    print(f"serving on {server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
