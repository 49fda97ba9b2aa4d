"""docs/rewards.md: its blocks run, its tables are complete, its links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import yaml

from flowdppo_fast.trainer.rewards import HTTPReward, registry, serve
from flowdppo_fast.trainer.rewards.http import _RETRIED
from flowdppo_fast.trainer.rewards.wire import VERSION, encode_request, parse_rewards

GUIDE = Path(__file__).parents[3] / "docs" / "rewards.md"
TEXT = GUIDE.read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCKS if name == language]


def test_python_blocks_run_in_order(capsys):
    namespace: dict = {"__name__": "rewards_guide"}
    for number, body in enumerate(blocks("python")):
        exec(compile(body, f"rewards.md[{number}]", "exec"), namespace)
    printed = capsys.readouterr().out.strip()
    assert printed
    assert printed in TEXT
    assert {name for name, _ in BLOCKS} == {"python", "yaml", "bash", "json"}


def test_the_table_names_all_built_in_rewards_with_their_classes():
    rows = re.findall(r"^\| (`[\w`, ]+`) \| `(\w+)` \|", TEXT, re.MULTILINE)
    named = {name: kind for names, kind in rows for name in re.findall(r"\w+", names)}
    assert named == {name: kind.__name__ for name, kind in registry.BUILT_IN.items()}


def test_settings_build(monkeypatch):
    (settings,) = (yaml.safe_load(body) for body in blocks("yaml"))
    monkeypatch.setattr(registry, "load_callable", lambda path: lambda **options: lambda *_: None)
    _, weights = registry.build_rewards(settings["rewards"])
    assert weights == {"clip": 1.0, "judge/text": 1.0, "judge/style": 0.5, "bright": 0.1, "MyReward": 1.0}


def test_the_schema_is_what_is_sent_and_read():
    import torch

    request, plain, named = (json.loads(body) for body in blocks("json"))
    sent = json.loads(encode_request(torch.zeros(2, 1, 3, 2, 2), request["prompts"], request["metadata"], "png", 95))
    assert list(sent) == list(request)
    assert request["version"] == VERSION
    assert parse_rewards(json.dumps(plain).encode(), 2).tolist() == plain["rewards"]
    assert set(parse_rewards(json.dumps(named).encode(), 2)) == set(named["rewards"])


def test_statuses_and_arguments_exist():
    assert ", ".join(map(str, _RETRIED)) in TEXT
    arguments = inspect.signature(HTTPReward).parameters
    for name in ("timeout", "deadline", "retries", "backoff", "max_response_bytes", "token_env"):
        assert name in arguments
        assert f"`{name}`" in TEXT
    for option in re.findall(r"(--[a-z-]+)", "\n".join(blocks("bash")) + " ".join(re.findall(r"`(--[a-z-]+)`", TEXT))):
        assert f'"{option}"' in inspect.getsource(serve.main), option


def test_links_lead_to_headings():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= headings
