"""CLIP, PickScore, the aesthetic head and classifiers against transformers called by hand."""

from __future__ import annotations

import os

import pytest
import torch
from reward_support import IMAGE_SIZE, WIDTH
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPModel, ViTConfig, ViTForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from flowdppo_fast.trainer.rewards import AestheticScore, ClassifierReward, CLIPScore, HPSv2Score, PickScore, score
from flowdppo_fast.trainer.rewards.aesthetic import AestheticHead

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog", "a cat", "zebra", "a very long text about things", "x"]
# sums of at most 48 products in a few layers, on numbers near 1: 2^-24 each
ROUNDING = {"rtol": 2**-24 * 512, "atol": 2**-24 * 512}


@pytest.fixture(scope="module")
def clip(clip_folder):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    return model, AutoTokenizer.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)


@torch.no_grad()
def logits_by_hand(clip, images, prompts) -> torch.Tensor:
    """transformers' own logits of each image with its prompt, the prompts padded to the longest."""
    model, tokenizer, processor = clip
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return model(**tokens, pixel_values=pixels).logits_per_image.diagonal()


def test_clip_score_is_the_cosine(clip, clip_folder, pictures, as_pil):
    expected = logits_by_hand(clip, as_pil(pictures), PROMPTS) / clip[0].logit_scale.detach().exp()
    reward = CLIPScore(str(clip_folder))
    actual = reward(pictures, PROMPTS)
    torch.testing.assert_close(actual, expected, **ROUNDING)
    assert expected.std() > 0.05
    torch.testing.assert_close(CLIPScore(clip_folder, scale=2.5)(pictures, PROMPTS), 2.5 * expected, **ROUNDING)
    # the image processor itself, on the same bytes
    torch.testing.assert_close(
        CLIPScore(clip_folder, preprocess="processor")(as_pil(pictures), PROMPTS), expected, **ROUNDING
    )


def test_pick_score_has_the_learned_factor(clip, clip_folder, pictures, as_pil):
    expected = logits_by_hand(clip, as_pil(pictures), PROMPTS)
    factor = {"rtol": ROUNDING["rtol"], "atol": ROUNDING["atol"] * float(clip[0].logit_scale.detach().exp())}
    torch.testing.assert_close(PickScore(str(clip_folder))(pictures, PROMPTS), expected, **factor)
    torch.testing.assert_close(PickScore(clip_folder, scale=1 / 26)(pictures, PROMPTS), expected / 26, **factor)


@pytest.mark.parametrize("width", [36, 24, 19])
def test_hpsv2_is_the_cosine_of_the_whole_image_on_a_black_square(clip, clip_folder, pictures, as_pil, width):
    images = pictures[..., :width]
    square = torch.zeros(6, 3, max(24, width), max(24, width))
    top, left = max(width - 24, 0) // 2, max(24 - width, 0) // 2
    square[..., top : top + 24, left : left + width] = images
    expected = logits_by_hand(clip, as_pil(square), PROMPTS) / clip[0].logit_scale.detach().exp()
    reward = HPSv2Score(str(clip_folder), scale=2.0)
    torch.testing.assert_close(reward(images, PROMPTS), 2 * expected, **ROUNDING)
    cropped = CLIPScore(clip_folder)(images, PROMPTS)
    assert torch.allclose(cropped, expected, atol=1e-3) == (width == 24)


def test_published_names():
    assert HPSv2Score().path == "adams-story/HPSv2-hf"
    assert HPSv2Score().processor_path == PickScore().processor_path
    assert CLIPScore().path == CLIPScore().processor_path == "openai/clip-vit-large-patch14"
    pick = PickScore()
    assert (pick.path, pick.processor_path) == ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    assert PickScore("elsewhere").processor_path == "elsewhere"


@pytest.mark.parametrize("kind", ["clip", "aesthetic", "classifier"])
def test_micro_batches_and_company_change_nothing(kind, clip_folder, head_file, vit_folder, pictures):
    make = {
        "clip": lambda size: CLIPScore(clip_folder, batch_size=size),
        "aesthetic": lambda size: AestheticScore(head_file, clip_folder, batch_size=size),
        "classifier": lambda size: ClassifierReward(str(vit_folder), batch_size=size),
    }[kind]
    metadata = [{"class": place % 3} for place in range(6)]
    whole = make(6)(pictures, PROMPTS, metadata)
    for size in (1, 4):
        torch.testing.assert_close(make(size)(pictures, PROMPTS, metadata), whole, **ROUNDING)
    alone = torch.cat([make(6)(pictures[n : n + 1], PROMPTS[n : n + 1], metadata[n : n + 1]) for n in range(6)])
    torch.testing.assert_close(alone, whole, **ROUNDING)


@pytest.mark.parametrize("kind", ["clip", "aesthetic", "classifier"])
def test_videos_are_the_mean_over_frames(kind, clip_folder, head_file, vit_folder, pictures):
    reward = {
        "clip": lambda: CLIPScore(clip_folder, frames=2),
        "aesthetic": lambda: AestheticScore(head_file, clip_folder, frames=2),
        "classifier": lambda: ClassifierReward(str(vit_folder), frames=2, output="prob"),
    }[kind]()
    each = reward(pictures[[1, 4]], ["a cat"] * 2, [{"class": 1}] * 2)
    assert each[0] != each[1]
    torch.testing.assert_close(reward(pictures[None], ["a cat"], [{"class": 1}]), each.mean()[None], **ROUNDING)


@pytest.mark.parametrize(("dtype", "eps"), [("bfloat16", 2**-8), (torch.float16, 2**-11)])
def test_reduced_precision(clip_folder, pictures, dtype, eps):
    exact = CLIPScore(clip_folder)(pictures, PROMPTS)
    reward = CLIPScore(clip_folder, dtype=dtype)
    actual = reward(pictures, PROMPTS)
    assert actual.dtype == torch.float32
    assert next(reward.load().parameters()).dtype == reward.dtype != torch.float32
    # both unit vectors are off by some roundings per layer in each direction; a cosine by their sum
    assert 0 < (actual - exact).abs().max() < 2 * 8 * eps
    # the learned factor is not rounded: its logarithm would be off by eps / 2 * 2.3
    assert PickScore(clip_folder, dtype=dtype)(pictures, PROMPTS) / actual == pytest.approx(
        torch.full((6,), 2.3456789, dtype=torch.float64).exp().tolist(), rel=1e-6
    )


@pytest.mark.bits(across="again")
def test_nothing_is_loaded_before_it_is_needed_and_to_moves_it(clip_folder, pictures):
    reward = CLIPScore(clip_folder).to("meta")
    assert reward._model is None
    assert next(reward.load().parameters()).device.type == "meta"
    other = CLIPScore(clip_folder)
    other(pictures, PROMPTS)
    assert other.device == pictures.device
    assert not any(parameter.requires_grad for parameter in other.load().parameters())
    assert not other.load().training
    # away and back it is the same network
    before = other(pictures, PROMPTS)
    assert torch.equal(other.to("cpu")(pictures, PROMPTS), before)


def test_equal_prompts_are_embedded_once(clip_folder, pictures, monkeypatch):
    reward = CLIPScore(clip_folder)
    rows = []
    embed = reward._embed_texts
    monkeypatch.setattr(reward, "_embed_texts", lambda model, tokens: rows.append(len(tokens)) or embed(model, tokens))
    reward(pictures, PROMPTS)
    assert rows == [len(set(PROMPTS))] == [5]


def test_prompts_must_be_texts(clip_folder, pictures):
    with pytest.raises(TypeError, match=r"got NoneType for sample 1, expected a text.*under 'text'"):
        CLIPScore(clip_folder)(pictures[:2], ["a", None])


def test_folders_without_a_model(tmp_path, pictures):
    with pytest.raises(ValueError, match=r"which gives no image processor .*expected a local folder or a name"):
        CLIPScore(str(tmp_path))(pictures, PROMPTS)


def test_pickled_weights_are_not_loaded(clip_folder, clip, tmp_path, pictures):
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    torch.save(clip[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"gives no CLIP model .*weights in safetensors"):
        CLIPScore(str(tmp_path))(pictures, PROMPTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"dtype": torch.int8}, "dtype: got torch.int8"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"preprocess": "fast"}, "preprocess: got 'fast'"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        CLIPScore(**settings)


@pytest.fixture(scope="module")
def head() -> AestheticHead:
    torch.manual_seed(21)
    return AestheticHead(WIDTH).eval()


@pytest.fixture(scope="module")
def head_file(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(head.state_dict(), path)
    return path


@pytest.mark.bits(across="again")
def test_aesthetic_score(clip, clip_folder, head, head_file, pictures, as_pil, tmp_path):
    with torch.no_grad():
        pixels = clip[2](as_pil(pictures), return_tensors="pt")["pixel_values"]
        embedding = clip[0].visual_projection(clip[0].vision_model(pixels).pooler_output)
        # the head is affine: five matrices one after the other
        expected = embedding / embedding.square().sum(-1, keepdim=True).sqrt()
        for number in (0, 2, 4, 6, 7):
            layer = head.layers[number]
            expected = expected @ layer.weight.T + layer.bias
    actual = AestheticScore(head_file, clip_folder)(pictures, PROMPTS)
    torch.testing.assert_close(actual, expected[:, 0], **ROUNDING)
    # a published head is a pickled state dict
    torch.save(head.state_dict(), tmp_path / "head.pth")
    assert torch.equal(AestheticScore(tmp_path / "head.pth", clip_folder)(pictures, PROMPTS), actual)


def test_the_published_head_has_this_shape():
    assert {name: list(value.shape) for name, value in AestheticHead().state_dict().items()} == {
        "layers.0.weight": [1024, 768], "layers.0.bias": [1024], "layers.2.weight": [128, 1024],
        "layers.2.bias": [128], "layers.4.weight": [64, 128], "layers.4.bias": [64], "layers.6.weight": [16, 64],
        "layers.6.bias": [16], "layers.7.weight": [1, 16], "layers.7.bias": [1],
    }  # fmt: skip


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_heads_that_are_refused(clip_folder, head, pictures, tmp_path):
    def load(name):
        AestheticScore(tmp_path / name, clip_folder)(pictures, PROMPTS)

    with pytest.raises(ValueError, match="which is no file"):
        load("absent.pth")
    torch.save({"layers": Trap(tmp_path / "ran")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load("trap.pth")
    assert not (tmp_path / "ran").exists()
    torch.save(head, tmp_path / "module.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load("module.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load("broken.safetensors")
    save_file(AestheticHead(WIDTH + 1).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=rf"expected .*for embeddings of width {WIDTH}"):
        load("wide.safetensors")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds no weights by name"):
        load("tensor.pth")
    (tmp_path / "head.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a file that ends in"):
        load("head.ckpt")


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(31)
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=4, id2label={0: "cat", 1: "dog", 2: "zebra"}, label2id={"cat": 0, "dog": 1, "zebra": 2},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder


def test_transformers_classifier(vit_folder, pictures, as_pil):
    model = ViTForImageClassification.from_pretrained(vit_folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(vit_folder)
    # one aspect ratio for both: then Pillow's order of directions does not matter
    square = pictures[..., :24, :24]
    with torch.no_grad():
        logits = model(processor(as_pil(square), return_tensors="pt")["pixel_values"]).logits
    asked = ["cat", 1, "2", "dog", 0, "zebra"]
    numbers = torch.tensor([0, 1, 2, 1, 0, 2])
    expected = (logits.exp() / logits.exp().sum(-1, keepdim=True))[torch.arange(6), numbers]
    metadata = [{"class": entry} for entry in asked]
    probability = ClassifierReward(str(vit_folder), output="prob")(square, PROMPTS, metadata)
    torch.testing.assert_close(probability, expected, **ROUNDING)
    torch.testing.assert_close(
        ClassifierReward(str(vit_folder))(square, PROMPTS, metadata), expected.log(), rtol=1e-4, atol=ROUNDING["atol"]
    )


class Brightness(nn.Module):
    """Log-odds of dark and bright, with dropout to notice training mode."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels):
        mean = self.dropout(pixels.mean(dim=(1, 2, 3)))
        return torch.stack([-self.gain * mean, self.gain * mean], dim=-1)


@pytest.mark.parametrize("log_softmax", [False, True])
def test_modules_and_functions(pictures, log_softmax):
    """Logits and log-probabilities give the same; the prompt can be the class."""
    module = Brightness()

    def function(pixels):
        logits = module(pixels)
        return logits.log_softmax(-1) if log_softmax else logits

    mean = pictures.mean(dim=(1, 2, 3))
    expected = torch.sigmoid(6 * mean)
    for classifier in (module, function):
        reward = ClassifierReward(classifier, key=None, output="prob", labels={"dark": 0, "bright": 1})
        actual = score(reward, pictures, ["bright", "1", "bright", "dark", "0", "dark"], [{}] * 6, CPU)["reward"]
        expected_here = torch.where(torch.arange(6) < 3, expected, 1 - expected)
        torch.testing.assert_close(actual, expected_here, **ROUNDING)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"label": 1}, r"got the keys \['label'\] for sample 0, expected the class under 'class'"),
        ({"class": 2}, "class: got 2 for sample 0, expected a number from 0 to 1"),
        ({"class": -1}, "class: got -1"),
        ({"class": "grey"}, "class: got 'grey' for sample 0, expected a number from 0 to 1 or one of bright, dark"),
        ({"class": True}, "class: got True"),
        ({"class": None}, "class: got None"),
    ],
)
def test_classes_that_do_not_exist(pictures, metadata, message):
    reward = ClassifierReward(Brightness(), labels={"dark": 0, "bright": 1})
    with pytest.raises(ValueError, match=message):
        reward(pictures[:1], ["x"], [metadata])


def test_classifiers_that_answer_with_another_shape(pictures):
    with pytest.raises(ValueError, match=r"classifier: got shape \[6\], expected \[images, classes\]"):
        ClassifierReward(lambda pixels: pixels.mean(dim=(1, 2, 3)))(pictures, PROMPTS, [{"class": 0}] * 6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["clip", "aesthetic"])
def test_on_the_accelerator(kind, clip_folder, head_file, pictures):
    make = {"clip": lambda: CLIPScore(clip_folder), "aesthetic": lambda: AestheticScore(head_file, clip_folder)}[kind]
    reward = make().to("cuda")
    # float32 products may use tensor cores: ten bits less
    tolerance = {"rtol": 2**-11 * 8, "atol": 2**-11 * 8}
    torch.testing.assert_close(reward(pictures.cuda(), PROMPTS).cpu(), make()(pictures, PROMPTS), **tolerance)
    assert reward.to("cpu")(pictures.cuda(), PROMPTS).device.type == "cpu"
