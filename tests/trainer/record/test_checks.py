"""The checks of a run before its first update: once, with a switch, and without a trace in its numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from digits_example import PROMPTS, ink

from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.record import watch


def run(pipes, config):
    pipeline = pipes.digits()
    calls, own = [], type(pipeline).__call__

    class Counted(type(pipeline)):
        def __call__(self, *args, **kwargs):
            calls.append(0)
            return own(self, *args, **kwargs)

    pipeline.__class__ = Counted
    trainer = FlowDPPOTrainer(pipeline, ink, PROMPTS, config)
    history = trainer.train()
    weights = {name: p.detach().clone() for name, p in pipeline.transformer.named_parameters()}
    return len(calls), weights, [m["loss"] for m in history]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_check_at_moved_weights_is_made_once_and_changes_no_number(pipes, small_config, tmp_path, train):
    made = {}
    for check in (True, False):
        changes = {"iterations": 2, "check_replay": check, "output_dir": str(tmp_path / f"{check}")}
        made[check] = run(pipes, small_config(model={"train": train}, run=changes))
    (with_check, weights, losses), (without, plain, expected) = made[True], made[False]
    assert with_check == without + 1
    assert losses == expected
    assert weights.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in weights.items())


def test_a_run_whose_replay_would_not_follow_the_weights_stops_before_an_update(pipes, small_config, monkeypatch):
    kept = watch.Watch._record

    def stale(self, transition):
        # a copy has the weights of the recording for good
        step = kept(self, transition)
        for call in step.program.calls:
            call.module, call.surroundings = copy.deepcopy(call.module), None
        return step

    monkeypatch.setattr(watch.Watch, "_record", stale)
    pipeline = pipes.digits()
    trainer = FlowDPPOTrainer(pipeline, ink, PROMPTS, small_config(run={"iterations": 1}))
    before = {name: p.detach().clone() for name, p in pipeline.transformer.named_parameters()}
    with pytest.raises(ValueError, match=r"with the trained weights moved a little, the replay of step \d of Digits"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in pipeline.transformer.named_parameters())
