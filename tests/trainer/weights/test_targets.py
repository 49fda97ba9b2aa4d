"""Which layers get adapters: names, a pattern, all linear ones, and what a run says of them at its start."""

from __future__ import annotations

import re

import pytest
import torch
from digits_example import PROMPTS, ink
from peft import LoraConfig, inject_adapter_in_model

from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.row_plan import summary
from flowdppo_fast.trainer.weights.adapters import ATTENTION_TARGETS, add_lora, as_targets, blocks_of, is_target

CASES = {
    "default": (None, r"attn\d?\.(to_q|to_k|to_v|to_out\.0)$"),
    "names": (["to_q", "ff.net.2"], r"(\.to_q|ff\.net\.2)$"),
    "one name": ("to_out.0", r"\.to_out\.0$"),
    "pattern": (r"transformer_blocks\.0\..*\.to_[qk]", r"^transformer_blocks\.0\..*\.to_[qk]$"),
    "all": ("all-linear", ""),
}


def adapted(transformer) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("case", CASES)
def test_the_layers_that_are_meant_get_an_adapter_and_the_plan_knows_them(pipes, case):
    targets, pattern = CASES[case]
    transformer = pipes.digits().transformer
    linear = {path for path, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    expected = {path for path in linear if re.search(pattern, path)}
    assert expected
    assert (expected < linear) == (case != "all")
    assert {path for path in linear if is_target(path, targets)} == expected
    add_lora(transformer, 2, 4.0, targets, 0)
    assert adapted(transformer) == expected


def test_what_names_are_given_as_one_text_reach_peft_as_a_list():
    assert as_targets(None) == list(ATTENTION_TARGETS)
    assert as_targets("to_out.0") == ["to_out.0"]
    assert as_targets("all-linear") == "all-linear"
    assert as_targets(".*to_q") == ".*to_q"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (None, r"LoRA on \d+ layers in (\d+) of \1 blocks of"),
        (r"transformer_blocks\.0\..*to_q", r"LoRA on 1 layers in 1 of \d+ blocks of"),
        ("proj_out", r"LoRA on 1 layers in 0 of \d+ blocks; transformer_blocks of transformer has none "),
    ],
)
def test_the_start_of_a_run_says_how_many_blocks_have_adapters(pipes, small_config, targets, said):
    config = small_config(model={"train": "lora", "lora_rank": 2, "lora_targets": targets})
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    text = summary(config, trainer.workers, trainer.weights, trainer.device)
    assert re.search(said, text), text


def test_blocks_are_those_of_the_model_and_not_those_within_its_layers(pipes):
    transformer = pipes.digits().transformer
    assert blocks_of(transformer) == {"transformer_blocks": len(transformer.transformer_blocks)}
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), transformer, "own")
    assert list(blocks_of(transformer)) == ["transformer_blocks"]
