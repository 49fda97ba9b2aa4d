"""Sampling on servers: the run is that of one process, bit for bit, whatever happens to the servers on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import engine_runs
import pytest
import torch
from digits_example import EXAMPLE, PROMPTS, ink
from engine_runs import Engine
from processes import run
from safetensors.torch import load_file
from sd3_example import bright

from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.engine_settings import EnginesConfig
from flowdppo_fast.trainer.engines.client import EngineError, Engines
from flowdppo_fast.trainer.engines.serve import EngineServer
from flowdppo_fast.trainer.engines.wire import decode, encode

# files of a run that are the same, times apart
TIMED = ("seconds", "samples_per_second", "memory")


@pytest.fixture
def engine(tmp_path):
    """Starts servers, and ends those that are left."""
    started: list[Engine] = []

    def make(name: str = "engine", **how) -> Engine:
        started.append(Engine(tmp_path, name, **how))
        return started[-1]

    yield make
    for one in started:
        one.kill()


@pytest.fixture
def settings(small_config, tmp_path):
    """Settings of three iterations with LoRA, a pipeline call per group."""

    def make(name: str, *servers, **sections):
        engines = {"urls": [getattr(one, "url", one) for one in servers], **sections.pop("engines", {})}
        sampling = {"sde_steps": [1, 3], "batch_size": 4, "noise": "stored", **sections.pop("sampling", {})}
        return small_config(
            model={"train": "lora", "lora_rank": 4}, sampling=sampling, engines=engines,
            optimizer={"learning_rate": 1e-2}, run={"output_dir": str(tmp_path / name), **sections.pop("run", {})},
            **sections,
        )  # fmt: skip

    return make


def trained(pipeline, config, reward=ink, prompts=PROMPTS):
    """Weights, row log and metrics of a run."""
    trainer = FlowDPPOTrainer(pipeline, reward, prompts, config)
    history = [{k: v for k, v in one.items() if not k.startswith(TIMED)} for one in trainer.train()]
    rows = (trainer.output / "rows.jsonl").read_text()
    return [p.detach().clone() for p in trainer.weights.parameters], rows, history


def assert_same(one, other):
    (weights, rows, history), (weights2, rows2, history2) = one, other
    assert all(map(torch.equal, weights, weights2))
    assert rows == rows2
    assert json.dumps(history) == json.dumps(history2)


@pytest.fixture
def in_process(pipes, settings):
    """The run that every other one has to be."""
    return trained(pipes.digits(), settings("in_process"))


@pytest.mark.parametrize("weights", ["http", "file"])
def test_a_run_on_two_servers_is_that_of_one_process(pipes, settings, engine, in_process, weights):
    servers = [engine("first"), engine("second")]
    assert_same(in_process, trained(pipes.digits(), settings("run", *servers, engines={"weights": weights})))
    # a call is one group, so one of two servers may have had them all
    assert servers[0].asked + servers[1].asked == 12


@pytest.mark.parametrize("weights", ["http", "file"])
def test_two_processes_on_a_server_are_the_run_of_one(settings, engine, in_process, tmp_path, weights):
    server = engine()
    config = settings("run", server, engines={"weights": weights}, run={"device": "cpu"})
    run(engine_runs.train, config.to_dict(), str(tmp_path / "weights"), count=2)
    made = load_file(tmp_path / "weights")
    assert all(torch.equal(made[f"{place}"], value) for place, value in enumerate(in_process[0]))
    assert server.asked == 12


@pytest.mark.parametrize(
    ("kind", "options", "sampling"),
    [
        ("sd3", {"guidance_scale": 1.0}, {"sampler": "cps"}),
        ("sd3", {"guidance_scale": 3.0}, {"same_latents": True}),
        # packed latents and a schedule that depends on their size
        ("flux", {"guidance_scale": 3.5}, {"sde_steps_per_rollout": 1, "per_group_steps": True}),
    ],
)
def test_latents_schedule_and_guidance_of_other_pipelines(pipes, settings, engine, kind, options, sampling):
    options = {"height": 8, "width": 8, **options}
    torch.manual_seed(0)
    shapes = {"prompt_embeds": (5, 16), "pooled_prompt_embeds": (16,)}
    signs = ("", "negative_") if kind == "sd3" else ("",)
    prompts = [{f"{s}{name}": torch.randn(*shape) for s in signs for name, shape in shapes.items()} for _ in range(2)]
    how = {"sampling": {"pipeline_kwargs": options, "prompts_per_rollout": 2, **sampling}}
    pipeline = getattr(pipes, kind)
    alone = trained(pipeline(), settings("alone", **how), bright, prompts)
    served = trained(pipeline(), settings("served", engine(kind=kind), **how), bright, prompts)
    assert_same(alone, served)


def test_the_groups_of_a_call_go_to_all_servers(pipes, settings, engine):
    servers = [engine(name, slow_at=1, seconds=0.2) for name in ("first", "second")]
    config = settings("run", *servers, sampling={"batch_size": None}, run={"strict_replay": False, "iterations": 1})
    trained(pipes.digits(), config)
    assert [one.asked for one in servers] == [2, 2]


@pytest.mark.parametrize("fault", [{"dies_at": 3}, {"slow_at": 3, "seconds": 30.0}])
def test_the_work_of_a_server_that_fails_goes_to_another(pipes, settings, engine, in_process, caplog, fault):
    # the one that fails has a head start: the other answers after half a second
    failing, other = engine("failing", **fault), engine("other", slow_at=1, seconds=0.3)
    config = settings("run", failing, other, engines={"timeout": 5.0, "retries": 0})
    assert_same(in_process, trained(pipes.digits(), config))
    assert failing.asked == 3
    assert f"engine {failing.url} is not asked again" in caplog.text


def test_a_server_that_was_started_again_is_given_the_weights(pipes, settings, engine, in_process):
    servers = [engine("first")]

    def reward(images, prompts, metadata):
        if len(servers) == 1 and servers[0].asked == 6:
            servers[0].kill()
            servers.append(engine("again", port=servers[0].port))
        return ink(images, prompts, metadata)

    config = settings("run", servers[0], sampling={"background_rewards": False})
    weights, _, history = trained(pipes.digits(), config, reward)
    assert len(servers) == 2
    assert servers[1].asked >= 6
    assert all(map(torch.equal, weights, in_process[0]))
    assert [one["reward"] for one in history] == [one["reward"] for one in in_process[2]]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"dies_at": 2}, "Error"),
        ({"slow_at": 2, "seconds": 30.0}, "no complete answer within engines.timeout=1 s"),
    ],
)
def test_without_a_server_the_run_ends_with_their_names(pipes, settings, engine, fault, told):
    server = engine(**fault)
    config = settings("run", server, engines={"timeout": 1.0, "retries": 1})
    with pytest.raises(EngineError, match=f"(?s)1 of 1 requests: {re.escape(server.url)}: .*{told}.*resume"):
        trained(pipes.digits(), config)


def test_a_run_without_a_server_goes_on_with_another_one(pipes, settings, engine, in_process):
    # the ninth request is the first of the last iteration
    first = engine("first", dies_at=9)
    with pytest.raises(EngineError):
        trained(pipes.digits(), settings("run", first, engines={"retries": 0}))
    config = settings("run", engine("second"))
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    trainer.train(resume=True)
    assert all(map(torch.equal, trainer.weights.parameters, in_process[0]))
    assert (trainer.output / "rows.jsonl").read_text() == in_process[1]


def test_an_answer_that_trickles_in_is_bounded_by_the_timeout():
    class Trickle(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.1)

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Trickle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = EnginesConfig(urls=(f"http://127.0.0.1:{server.server_port}",), timeout=1.0, retries=0)
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"no complete answer within engines\.timeout=1 s"):
            Engines(settings).ask([{}])
        # on a busy machine a thread waits for its turn
        assert time.monotonic() - start < 8
        server.shutdown()


def test_nobody_listens(pipes, settings):
    config = settings("run", "http://127.0.0.1:9", engines={"retries": 0})
    with pytest.raises(EngineError, match=r"no server is left for the adapters: http://127\.0\.0\.1:9: "):
        trained(pipes.digits(), config)


def test_the_command_serves(pipes, settings, in_process):
    command = [sys.executable, "-m", "flowdppo_fast.trainer.engines.serve", "conftest:make_digits", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    here = Path(__file__).parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=here, env=environment) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().removeprefix("serving on ").strip()
            with urllib.request.urlopen(f"{url}/health") as answer:
                assert json.load(answer) == {"status": "ok", "weights": {}}
            assert_same(in_process, trained(pipes.digits(), settings("run", url)))
        finally:
            server.kill()


@pytest.fixture
def nearby():
    """A server in a thread of this process, whose parts a test can replace."""
    servers = []

    def make(pipeline) -> EngineServer:
        servers.append(EngineServer(pipeline))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield make
    for one in servers:
        one._server.shutdown()


def test_a_server_that_keeps_old_weights_stops_the_run(pipes, settings, nearby, monkeypatch):
    server = nearby(pipes.digits())
    own = server.set_lora

    def once(name, target, path):
        if not server.active:
            own(name, target, path)
        server.active[target] = name

    monkeypatch.setattr(server, "set_lora", once)
    config = settings("run", server, run={"stop_on_mismatch": True}, objective={"threshold": 1e-9})
    with pytest.raises(RuntimeError, match="rollout and training differ at unchanged weights"):
        trained(pipes.digits(), config)


def test_sglang_requests_train_what_the_server_drew(pipes, settings, nearby, monkeypatch):
    server = nearby(pipes.digits())
    asked: list[dict] = []
    own = server.generate
    monkeypatch.setattr(server, "generate", lambda request: asked.append(request) or own(request))
    how = {"protocol": "sglang", "weights": "file"}
    # the server draws images one by one, which rounds otherwise than a group at once
    config = settings("run", server, engines=how, run={"strict_replay": False, "iterations": 2})
    _, _, history = trained(pipes.digits(), config)
    assert len(asked) == 2 * 16
    assert all(one["num_outputs_per_prompt"] == 1 and one["rollout_sde_type"] == "sde" for one in asked)
    assert not any("flowdppo" in one.get("extra_sampling_params", {}) for one in asked)
    assert len({one["seed"] for one in asked}) == 32
    assert 0 < history[-1]["mismatch_kl_max"] < 1e-10


def test_the_update_takes_the_noise_and_velocities_of_the_server(pipes, settings, nearby, monkeypatch):
    server = nearby(pipes.digits())
    sent: list[dict] = []
    own = server.generate
    monkeypatch.setattr(server, "generate", lambda request: sent.extend(own(request)) or sent[-1:])
    config = settings("run", server, engines={"protocol": "sglang", "weights": "file"})
    rollout = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config).sample(0)
    for number, trajectory in enumerate(rollout.trajectories):
        old, noise, _ = trajectory.select(range(4))
        for row in range(4):
            debug = decode(sent[4 * number + row]["rollout_debug_tensors"])
            assert torch.equal(old[row], debug["rollout_model_outputs"])
            assert torch.equal(noise[row], debug["rollout_variance_noises"])
    assert len(sent) == 16


def test_a_server_with_another_schedule_is_refused(pipes, settings, nearby):
    server = nearby(pipes.digits())
    server.pipeline.scheduler.set_shift(3.0)
    with pytest.raises(ValueError, match=r"the engine's levels .* are not those of the pipeline"):
        trained(pipes.digits(), settings("run", server))


def test_a_server_that_takes_other_steps_is_refused(pipes, settings, nearby, monkeypatch):
    server = nearby(pipes.digits())
    own = server.generate
    monkeypatch.setattr(server, "generate", lambda request: own({**request, "rollout_noise_level": 0.5}))
    with pytest.raises(
        EngineError,
        match=r"wrong answer: rollout: step 1 is off by .* from the one that sampler='flow_sde' with eta=0.7",
    ):
        trained(pipes.digits(), settings("run", server))


def test_a_refusal_is_told_in_the_words_of_the_server_and_not_tried_again(pipes, settings, nearby, monkeypatch):
    server, asked = nearby(pipes.digits()), []

    def refuse(request):
        asked.append(request)
        raise ValueError("this size is too large")

    monkeypatch.setattr(server, "generate", refuse)
    with pytest.raises(
        EngineError, match=rf"{server.url}: .* 400: .*this size is too large.* not one that this server"
    ):
        trained(pipes.digits(), settings("run", server))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: {}, "got a dict, expected a list of 4"),
        (lambda made: made[:3], "got 3 images, expected a list of 4"),
        (lambda made: [None, *made[1:]], "answer 0: got no dit_trajectory.latents"),
        (lambda made: [{**made[0], "rollout_debug_tensors": None}, *made[1:]], "expected rollout_debug_mode=true"),
        (
            lambda made: [{**made[0], "dit_trajectory": {"latents": {"__tensor__": True}}}, *made[1:]],
            "a tensor: got Key",
        ),
        (
            lambda made: with_velocity(made, torch.full((2, 1, 8, 8), torch.nan)),
            "velocity: got numbers that are not fin",
        ),
        (lambda made: with_velocity(made, torch.zeros(2, 1, 8, 7)), "states: got shape"),
    ],
)
def test_a_wrong_answer_is_told_with_the_server(pipes, settings, nearby, monkeypatch, change, told):
    server = nearby(pipes.digits())
    own = server.generate
    monkeypatch.setattr(server, "generate", lambda request: change(own(request)))
    with pytest.raises(EngineError, match=rf"{server.url}: wrong answer: .*{told}"):
        trained(pipes.digits(), settings("run", server))


def with_velocity(made, velocity):
    debug = {**made[0]["rollout_debug_tensors"], "rollout_model_outputs": encode(velocity)}
    return [{**made[0], "rollout_debug_tensors": debug}, *made[1:]]


def test_an_evaluation_is_drawn_here(pipes, settings, nearby, monkeypatch):
    server, asked = nearby(pipes.digits()), []
    own = server.generate
    monkeypatch.setattr(server, "generate", lambda request: asked.append(request) or own(request))
    config = settings("run", server, run={"iterations": 1}, evaluation={"every": 1})
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config, eval_prompts=PROMPTS[:2])
    (metrics,) = trainer.train()
    assert len(asked) == 4
    assert metrics["eval/reward"] > 0


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"engines": {"urls": ["localhost:30000"]}}, "engines.urls: got 'localhost:30000', expected http://"),
        ({"engines": {"urls": ["http://a"]}, "model": {"train": "full"}}, "engines.urls: got .* model.train='full'"),
        ({"engines": {"urls": ["http://a"], "protocol": "sglang"}}, "engines.weights: got 'http', expected 'file'"),
        ({"engines": {"timeout": 0}}, "engines.timeout: got 0"),
    ],
)
def test_settings_that_do_not_go_together(small_config, sections, told):
    with pytest.raises(ValueError, match=told):
        small_config(**{"model": {"train": "lora"}, **sections})
