"""What is watched while a run goes on: a learning rate that rises and falls, and the images of evaluations."""

from __future__ import annotations

import pytest
import torch
from digits_example import PROMPTS, ink

from flowdppo_fast.trainer import FlowDPPOTrainer


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.pipeline.transformer.named_parameters()}


def test_a_run_with_a_schedule_continues_as_if_it_had_not_stopped(pipes, small_config, tmp_path):
    def run(folder, stops, **kwargs):
        for iterations in stops:
            config = small_config(
                model={"train": "lora", "lora_rank": 2},
                optimizer={"warmup_updates": 6, **kwargs},
                run={"output_dir": str(tmp_path / folder), "iterations": iterations},
            )
            trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
            history = trainer.train(resume=True)
        return weights_of(trainer), [metrics["learning_rate"] for metrics in history]

    (whole, rates), (parts, again) = run("whole", [3]), run("parts", [1, 3])
    assert rates == again
    # four updates of the six, and one more, that it takes to rise
    assert rates == pytest.approx([1e-3 * 4 / 7, 1e-3, 1e-3])
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    _, falling = run("falling", [3], schedule="linear")
    assert falling == pytest.approx([1e-3 * 4 / 7, 1e-3 * 5 / 6, 1e-3 / 6])


def test_an_evaluation_keeps_what_it_shows(pipes, small_config):
    config = small_config(evaluation={"every": 1, "images_per_prompt": 20}, sampling={"batch_size": 4})
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config, eval_prompts=PROMPTS[:3])
    seen = []
    own = trainer.calls.scored
    trainer.calls.scored = lambda *given: (seen.append(len(given[1])), own(*given))[1]
    metrics, images, captions = trainer.evaluate()
    assert sum(seen) == 60
    assert len(images) == len(captions) == 32
    assert captions[-1].startswith(str(PROMPTS[1]))
    assert metrics["reward"] > 0
