"""ImageReward from a tiny file in the published names, against transformers' own BLIP called by hand."""

from __future__ import annotations

import json
import os

import pytest
import torch
from reward_support import IMAGE_SIZE
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowdppo_fast.trainer.rewards import ImageRewardScore, build_rewards
from flowdppo_fast.trainer.rewards.aesthetic import AestheticHead

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog", "a cat", "zebra", "a b c d e f g", "x"]
MEAN, STD = 0.16717362830052426, 1.0333394966054072
ROUNDING = {"rtol": 2**-24 * 512, "atol": 2**-24 * 512}
# transformers' name -> the published one; the reward has the way back
PUBLISHED = {
    "vision_model.embeddings.patch_embedding.": "blip.visual_encoder.patch_embed.proj.",
    "vision_model.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision_model.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision_model.post_layernorm.": "blip.visual_encoder.norm.",
    "vision_model.encoder.layers.": "blip.visual_encoder.blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.projection.": ".attn.proj.",
    ".self_attn.qkv.": ".attn.qkv.",
    "text_encoder.": "blip.text_encoder.",
}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", *letters, *(f"##{x}" for x in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(bert_folder):
    """A tiny BLIP of random weights whose answers differ clearly, and a head."""
    torch.manual_seed(17)
    words = len((bert_folder / "vocab.txt").read_text().split())
    text = {
        "vocab_size": words, "hidden_size": 16, "encoder_hidden_size": 24, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0,
        "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": IMAGE_SIZE, "patch_size": 4, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision)).eval()
    head = AestheticHead(16)
    with torch.no_grad():
        for parameter in [*model.parameters(), *head.parameters()]:
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model, head


@pytest.fixture(scope="module")
def folder(blip, bert_folder, tmp_path_factory):
    model, head = blip
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(("vision_model.", "text_encoder.")):
            for new, old in PUBLISHED.items():
                name = name.replace(new, old)
            weights[name] = value.clone()
    weights |= {f"mlp.{name}": value.clone() for name, value in head.state_dict().items()}
    # the published file holds more than is used
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    text = model.config.text_config.to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    settings = {key: text[key] for key in kept} | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 30524}
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def reward(folder, bert_folder):
    return lambda path=folder, **options: ImageRewardScore(path, tokenizer=str(bert_folder), vision_heads=3, **options)


@torch.no_grad()
def by_hand(blip, bert_folder, images, prompts):
    """transformers' image-text model as it is; the head as the chain of products that it is."""
    model, head = blip
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=dict.fromkeys(("height", "width"), IMAGE_SIZE))  # fmt: skip  # noqa: E501
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    tokens = BertTokenizer.from_pretrained(bert_folder)(list(prompts), padding=True, return_tensors="pt")
    read = model(tokens["input_ids"], pixels, attention_mask=tokens["attention_mask"]).question_embeds[:, 0]
    for number in (0, 2, 4, 6, 7):
        read = read @ head.layers[number].weight.T + head.layers[number].bias
    return (read[:, 0] - MEAN) / STD


def test_it_is_what_transformers_and_the_published_head_give(blip, bert_folder, reward, pictures, as_pil):
    expected = by_hand(blip, bert_folder, as_pil(pictures), PROMPTS)
    assert expected.std() > 0.01
    actual = reward()(pictures, PROMPTS)
    torch.testing.assert_close(actual, expected, **ROUNDING)
    # the prompt counts
    other = reward()(pictures, PROMPTS[::-1])
    assert not torch.allclose(other, actual, atol=1e-3)


def test_micro_batches_company_and_frames_change_nothing(reward, pictures):
    whole = reward()(pictures, PROMPTS)
    torch.testing.assert_close(reward(batch_size=4)(pictures, PROMPTS), whole, **ROUNDING)
    alone = torch.cat([reward()(pictures[n : n + 1], PROMPTS[n : n + 1]) for n in range(6)])
    torch.testing.assert_close(alone, whole, **ROUNDING)
    each = reward()(pictures[[1, 4]], ["zebra"] * 2)
    torch.testing.assert_close(reward(frames=2)(pictures[None, [1, 4]], ["zebra"]), each.mean()[None], **ROUNDING)


def test_safetensors_and_half_precision(folder, bert_folder, reward, pictures, tmp_path):
    weights = torch.load(folder / "ImageReward.pt", weights_only=True)
    save_file(weights, tmp_path / "ImageReward.safetensors")
    (tmp_path / "med_config.json").write_text((folder / "med_config.json").read_text())
    exact = reward()(pictures, PROMPTS)
    assert torch.equal(reward(tmp_path)(pictures, PROMPTS), exact)
    half = reward(dtype="bfloat16")
    actual = half(pictures, PROMPTS)
    assert actual.dtype == torch.float32
    assert next(half.load()["head"].parameters()).dtype == torch.float32
    assert next(half.load()["vision"].parameters()).dtype == torch.bfloat16
    # some roundings of 2^-9 in each of some twenty layers, on scores that spread over about one
    assert 0 < (actual - exact).abs().max() < 20 * 2**-8 * exact.abs().max()


def test_it_is_built_by_name_and_prompts_must_be_texts(folder, bert_folder, reward, pictures):
    built, weights = build_rewards(
        [{"name": "imagereward", "path": str(folder), "tokenizer": str(bert_folder), "vision_heads": 3, "weight": 0.5}]
    )
    assert weights == {"imagereward": 0.5}
    assert torch.equal(built(pictures, PROMPTS, [{}] * 6)["imagereward"], reward()(pictures, PROMPTS))
    with pytest.raises(TypeError, match="prompts: got NoneType for sample 1, expected a text"):
        reward()(pictures[:2], ["a", None])
    assert ImageRewardScore().path == "THUDM/ImageReward"


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_files_that_are_refused(folder, reward, pictures, tmp_path):
    def load():
        reward(tmp_path)(pictures, PROMPTS)

    with pytest.raises(ValueError, match=r"has no ImageReward.safetensors or ImageReward.pt"):
        load()
    (tmp_path / "med_config.json").write_text((folder / "med_config.json").read_text())
    torch.save({"mlp": Trap(tmp_path / "ran")}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load()
    assert not (tmp_path / "ran").exists()
    weights = torch.load(folder / "ImageReward.pt", weights_only=True)
    for name, value, said in (
        ("blip.visual_encoder.pos_embed", None, "holds no weight 'vision.embeddings.position_embedding'"),
        ("mlp.layers.0.weight", None, r"holds nothing for head.layers.0.weight \(and 0 more"),
        ("mlp.layers.7.bias", torch.zeros(2), r"holds \[2\] for head.layers.7.bias"),
        (
            "blip.text_encoder.embeddings.LayerNorm.bias",
            torch.zeros(3),
            r"holds \[3\] for text.embeddings.LayerNorm.bias",
        ),
        ("blip.text_encoder.embeddings.word_embeddings.weight", None, "holds no weight 'text.embeddings.word"),
    ):
        changed = {key: entry for key, entry in weights.items() if key != name}
        torch.save(changed if value is None else changed | {name: value}, tmp_path / "ImageReward.pt")
        with pytest.raises(ValueError, match=said):
            load()
    save_file({"x": torch.zeros(1)}, tmp_path / "ImageReward.safetensors")
    with pytest.raises(ValueError, match="holds no weight"):
        load()
    assert load_file(tmp_path / "ImageReward.safetensors").keys() == {"x"}
    (tmp_path / "ImageReward.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load()


def test_a_name_that_the_hub_does_not_have_is_said(pictures):
    with pytest.raises(ValueError, match="path: got 'nobody/nothing', which gives no"):
        ImageRewardScore("nobody/nothing")._file("ImageReward.pt")
