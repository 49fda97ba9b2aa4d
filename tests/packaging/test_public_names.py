"""No public name disappears and no signature changes unnoticed; the rules are in docs/releasing.md."""

from __future__ import annotations

import json

import public_names
import pytest
import torch

import flowdppo_fast
from flowdppo_fast.trainer import TrajectoryRecorder
from flowdppo_fast.trainer import config as settings


@pytest.fixture(autouse=True)
def ordinary_memory(poisoned_memory):
    """Importing the trainer's libraries allocates uninitialised memory for good reasons."""
    torch.use_deterministic_algorithms(False)


def changes() -> list[str]:
    return public_names.differences(json.loads(public_names.LIST.read_text()), public_names.public_names())


def test_public_names_are_those_of_the_list():
    told = changes()
    assert not told, "\n".join(["", *told])


def test_a_name_that_goes_and_a_signature_that_changes_are_told(monkeypatch):
    monkeypatch.setattr(flowdppo_fast, "__all__", [name for name in flowdppo_fast.__all__ if name != "sde_step"])
    monkeypatch.setattr(flowdppo_fast, "row_statistics", lambda velocity, old_velocity: None)
    monkeypatch.delattr(TrajectoryRecorder, "verify")
    fields = {**settings.SamplingConfig.__dataclass_fields__}
    del fields["eta"]
    monkeypatch.setattr(settings.SamplingConfig, "__dataclass_fields__", fields)
    *told, major, what_to_do = changes()
    gone = [
        "gone: config sampling.eta",
        "gone: flowdppo_fast.sde_step",
        "gone: flowdppo_fast.trainer.TrajectoryRecorder.verify",
    ]
    assert told[:3] == gone
    (changed,) = told[3:]
    assert changed.startswith(
        "changed: flowdppo_fast.row_statistics: was (velocity, old_velocity, noise, step, *, row_dims="
    )
    assert changed.endswith("is (velocity, old_velocity)")
    assert "major version as docs/releasing.md" in major
    assert "CHANGELOG.md" in what_to_do
    assert "public_names.py --write" in what_to_do


def test_a_new_name_asks_for_an_entry_only():
    told = public_names.differences({"a": "()"}, {"a": "()", "b": "(x)"})
    assert told[0] == "new: b: (x)"
    assert len(told) == 2
    assert "CHANGELOG.md" in told[1]
