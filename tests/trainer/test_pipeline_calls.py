"""How a run calls its pipeline."""

from __future__ import annotations

from digits_example import PROMPTS, ink

from flowdppo_fast.trainer import FlowDPPOTrainer


def test_texts_are_repeated_where_a_pipeline_does_not_repeat_them(pipes, small_config):
    for repeat in (True, False):
        trainer = FlowDPPOTrainer(
            pipes.digits(), ink, PROMPTS, small_config(run={"iterations": 1}, sampling={"repeat_texts": repeat})
        )
        given, own = [], trainer.pipeline.__class__.__call__

        class Told(trainer.pipeline.__class__):
            def __call__(self, *args, given=given, own=own, **kwargs):
                given.append(kwargs)
                return own(self, *args, **kwargs)

        trainer.pipeline.__class__ = Told
        trainer.sample(0)
        texts = given[0]["prompt"]
        rows = len(texts) * given[0].get("num_images_per_prompt", 1)
        assert rows == len(given[0]["generator"])
        assert (len(texts) == rows) == repeat
