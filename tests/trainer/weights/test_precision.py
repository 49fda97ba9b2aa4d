"""What a run computes in: half-precision copies of float32 adapters, autocast around the transformer alone, and CUDA's
autocast without a GPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from digits_example import PROMPTS, ink
from support.fake_cuda import COMPILER, observe

from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.recipe.export import SavedRun, apply_weights, drawing
from flowdppo_fast.trainer.weights.precision import autocast, computes_in, own_dtype

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_run(pipes, small_config, precision="bf16", **sections):
    """A trainer of adapters on a pipeline that was loaded in half precision."""
    pipeline = pipes.digits()
    pipeline.transformer.to(HALF[precision])
    model = {"train": "lora", "lora_rank": 4, "mixed_precision": precision, **sections.pop("model", {})}
    return FlowDPPOTrainer(pipeline, ink, PROMPTS, small_config(model=model, **sections))


def copies_of(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.pipeline.transformer.named_parameters() if p.requires_grad}


def follow(trainer) -> bool:
    """Whether the transformer's adapters are the trained weights, rounded."""
    pairs = zip(trainer.weights.parameters, copies_of(trainer).values())
    return all(torch.equal(master.detach().to(copy.dtype), copy) for master, copy in pairs)


@pytest.mark.parametrize("precision", HALF)
def test_a_half_precision_transformer_computes_without_autocast(pipes, small_config, precision):
    trainer = half_run(pipes, small_config, precision, model={"ema_decay": 0.5}, objective={"kl_weight": 0.1})
    inside = []
    trainer.pipeline.transformer.transformer_blocks[0].register_forward_hook(
        lambda *_: inside.append(torch.is_autocast_enabled("cpu"))
    )
    history = trainer.train()
    assert inside
    assert not any(inside)
    assert {p.dtype for p in copies_of(trainer).values()} == {HALF[precision]}
    assert {p.dtype for p in trainer.weights.parameters} == {torch.float32}
    assert trainer.sample(3).trajectories[0].velocity.dtype == HALF[precision]
    assert all(m["grad_norm"] > 0 and m["skipped_updates"] == 0 for m in history)
    assert follow(trainer)
    with trainer.weights.averaged():
        assert follow(trainer)
        held = copies_of(trainer)["transformer_blocks.0.attn.to_q.lora_B.default.weight"].clone()
    assert follow(trainer)
    assert not torch.equal(held, copies_of(trainer)["transformer_blocks.0.attn.to_q.lora_B.default.weight"])


def test_steps_below_half_precision_add_up(pipes, small_config):
    """A bfloat16 weight of size 1 does not see steps of 1e-4, its float32 one does."""
    trainer = half_run(pipes, small_config, optimizer={"learning_rate": 1e-6, "weight_decay": 0.0})
    before = [p.detach().clone() for p in trainer.weights.parameters]
    trainer.train()
    moved = [(p - b).abs().max().item() for p, b in zip(trainer.weights.parameters, before)]
    assert all(0 < most < 1e-4 for most in moved)


def test_gradients_of_micro_batches_add_up_in_float32(pipes, small_config):
    def gradient(size):
        trainer = half_run(pipes, small_config, optimizer={"micro_batch_size": size, "max_grad_norm": None})
        found = []
        own = trainer.optimizer.adamw.step
        trainer.optimizer.adamw.step = lambda: (
            found.append(torch.cat([p.grad.flatten() for p in trainer.weights.parameters]).clone()),
            own(),
        )
        rollout = trainer.sample(0)
        trainer.update(rollout, trainer.updates[0], number=0)
        return found[0]

    whole, parts = gradient(8), gradient(1)
    assert whole.dtype == torch.float32
    # a sum in bfloat16 would have eight bits
    assert not torch.equal(parts, parts.to(torch.bfloat16).float())
    # of eight gradients, each rounded to eight bits once
    assert (whole - parts).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize("seed", [0, 1])
def test_training_is_that_of_float32_adapters_to_rounding(pipes, small_config, tmp_path, seed):
    def moved(precision):
        trainer = half_run(
            pipes,
            small_config,
            model={"mixed_precision": precision},
            run={"seed": seed, "output_dir": str(tmp_path / precision)},
        )
        before = [p.detach().clone() for p in trainer.weights.parameters]
        history = trainer.train()
        after = torch.cat([(p - b).detach().flatten() for p, b in zip(trainer.weights.parameters, before)])
        return after, [m["reward"] for m in history], trainer

    (copies, rewards, half), (whole, expected, full) = moved("bf16"), moved("no")
    assert {p.dtype for p in copies_of(half).values()} == {torch.bfloat16}
    assert {p.dtype for p in copies_of(full).values()} == {torch.float32}
    together = torch.nn.functional.cosine_similarity(copies, whole, dim=0)
    # measured 1e-5 off; adapters that follow by steps of bfloat16 are 0.1 off
    assert together > 0.999, together
    assert copies.norm() == pytest.approx(whole.norm().item(), rel=0.01)
    assert rewards == pytest.approx(expected, rel=1e-3)


def test_what_is_saved_and_continued_are_the_float32_weights(pipes, small_config, tmp_path):
    trainer = half_run(pipes, small_config)
    trainer.train()
    trainer.save_pretrained(tmp_path / "final")
    saved = SavedRun.open(trainer.output).tensors()["transformer"]
    for name, parameter in zip(trainer.weights.names, trainer.weights.parameters):
        assert torch.equal(saved[name.removeprefix("transformer.")], parameter.detach())
    from safetensors.torch import load_file

    (file,) = (tmp_path / "final" / "transformer").glob("*.safetensors")
    written = {key.replace("transformer.", "", 1): value for key, value in load_file(file).items()}
    assert written
    for name, parameter in zip(trainer.weights.names, trainer.weights.parameters):
        key = name.removeprefix("transformer.").replace(".default.", ".")
        assert torch.equal(written[key], parameter.detach()), key
    again = half_run(pipes, small_config, run={"iterations": 4})
    again.train(resume=True)
    assert again.iteration == 4
    assert follow(again)


@pytest.mark.parametrize("half", [True, False])
def test_images_of_a_saved_run_are_drawn_as_in_its_rollouts(pipes, small_config, half):
    pipeline = pipes.digits()
    if half:
        pipeline.transformer.to(torch.bfloat16)
    config = small_config(model={"train": "lora", "lora_rank": 4, "mixed_precision": "bf16"})
    trainer = FlowDPPOTrainer(pipeline, ink, PROMPTS, config)
    trainer.train()
    fresh = pipes.digits()
    if half:
        fresh.transformer.to(torch.bfloat16)
    saved = SavedRun.open(trainer.output)
    apply_weights(saved, fresh)

    def draw(pipeline):
        torch.manual_seed(3)
        given = {"prompt": PROMPTS[:2], "num_inference_steps": 4, "output_type": "latent", "return_dict": False}
        with torch.no_grad():
            return pipeline(**given, generator=[torch.Generator().manual_seed(n) for n in (1, 2)])[0]

    expected = trainer.calls.run(lambda: draw(trainer.pipeline))
    with drawing(saved, fresh, torch.device("cpu")):
        assert torch.equal(draw(fresh), expected)


def test_autocast_is_around_the_transformer_alone(pipes, small_config):
    """A float32 VAE decodes in float32, and latents keep the dtype that they have without autocast."""
    pipeline = pipes.sd3()
    seen: dict[str, set] = {"vae": set(), "transformer": set(), "latents": set()}
    pipeline.vae.decoder.conv_out.register_forward_hook(lambda m, i, o: seen["vae"].add(o.dtype))
    pipeline.transformer.proj_out.register_forward_hook(lambda m, i, o: seen["transformer"].add(o.dtype))
    pipeline.transformer.register_forward_pre_hook(
        lambda m, a, k: seen["latents"].add(k["hidden_states"].dtype), with_kwargs=True
    )
    prompts = [{key: value[row] for key, value in pipes.text_inputs(2).items()} for row in range(2)]
    settings = small_config(
        model={"train": "full", "mixed_precision": "bf16"},
        sampling={"prompts_per_rollout": 2, "pipeline_kwargs": {"guidance_scale": 0.0}},
        optimizer={"updates_per_rollout": 2, "micro_batch_size": 4},
        run={"iterations": 1},
    )
    trainer = FlowDPPOTrainer(pipeline, lambda images, *_: images.flatten(1).mean(1), prompts, settings)
    trainer.train()
    half, whole = {torch.bfloat16}, {torch.float32}
    assert seen == {"vae": whole, "transformer": half, "latents": whole}


def test_latents_in_another_dtype_than_the_transformer_are_still_taken(pipes, small_config):
    """As SD3 has them whose prompts are float32 embeddings: without autocast the model would refuse them."""
    prompts = [{key: value[row] for key, value in pipes.text_inputs(2).items()} for row in range(2)]
    pipeline = pipes.sd3()
    pipeline.transformer.to(torch.bfloat16)
    settings = small_config(
        model={"train": "lora", "lora_rank": 2, "mixed_precision": "bf16"},
        sampling={"prompts_per_rollout": 2, "pipeline_kwargs": {"guidance_scale": 0.0}},
        optimizer={"updates_per_rollout": 2, "micro_batch_size": 4},
        run={"iterations": 1},
    )
    trainer = FlowDPPOTrainer(pipeline, lambda images, *_: images.flatten(1).mean(1), prompts, settings)
    (metrics,) = trainer.train()
    assert metrics["grad_norm"] > 0
    assert trainer.sample(1).trajectories[0].velocity.dtype == torch.float32
    assert follow(trainer)


def test_an_error_within_a_module_leaves_no_autocast_behind():
    linear = torch.nn.Linear(4, 4)
    with autocast("cpu", torch.bfloat16, [linear]), pytest.raises(RuntimeError, match="shapes"):
        linear(torch.ones(3))
    with autocast("cpu", torch.bfloat16, [linear]):
        assert not torch.is_autocast_enabled("cpu")
        assert linear(torch.ones(4)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert not linear._forward_hooks
    assert not linear._forward_pre_hooks


def test_most_weights_say_what_a_module_computes_in():
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).requires_grad_(False)
    module[0].to(torch.bfloat16)
    assert own_dtype(module) == torch.bfloat16
    assert computes_in([module], torch.bfloat16)
    assert not computes_in([module], torch.float16)
    assert not computes_in([module, torch.nn.Linear(2, 2).requires_grad_(False)], torch.bfloat16)
    assert not computes_in([module], None)


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"{COMPILER[0]} is not there to compile the stand-in")
def test_cuda_autocast_without_a_gpu(tmp_path):
    """CUDA's autocast gives float32 out of normalisations and norms, the CPU's does not: no test on a CPU sees."""
    seen = observe(tmp_path)
    before, now = seen["autocast"], seen["copies"]
    half, whole = ["torch.bfloat16"], ["torch.float32"]
    assert before["kinds"]["LayerNorm"] == whole
    assert now["kinds"]["LayerNorm"] == half
    # sinusoids of the timesteps are float32 in any case
    assert {kind for kind, dtypes in now["kinds"].items() if dtypes != half} == {"Timesteps"}
    assert now["velocity"] == before["velocity"] == "torch.bfloat16"
    # counted: 4761 and 3660 launches, 4.36 and 3.18 GB
    assert now["launches"] < 0.8 * before["launches"]
    assert now["bytes"] < 0.8 * before["bytes"]
    assert now["casts"] < 0.05 * before["casts"]
    assert seen["vae inside"] == half
    assert seen["vae outside"] == whole
