"""The edits for DanceGRPO, MixGRPO and miles_diffusion run: on stand-ins, and on the real scripts of checkouts."""

from __future__ import annotations

import ast
import time
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import flowdppo_fast as fast
from flowdppo_fast.integrations import dance_grpo, flow_grpo, mix_grpo

from . import conventions, edits
from .page_scripts import (
    FOLDER,
    PAGES,
    ROWS,
    SCRIPTS,
    STEPS,
    Tiny,
    checkout,
    has_text,
    ours,
    registered,
    run_statements,
    sources,
    stand_in,
    statements,
)
from .recorded import SIGMAS

# ---- DanceGRPO and MixGRPO: both step calls and train_one_step


FASTVIDEO = [pair for pair in SCRIPTS if pair[0] in ("dance_grpo.md", "mix_grpo.md")]


def run_fastvideo(page, file, seen):
    mix = page == "mix_grpo.md"
    text = edits.apply(stand_in(page, file), edits.block_of(page, file)).text
    utilities = {name: ModuleType(f"fastvideo.utils.{name}") for name in ("logging_", "sampling_utils")}
    utilities["logging_"].main_print = print
    names = ("flow_grpo_step", "dance_grpo_step", "run_sample_step", "dpm_step")
    vars(utilities["sampling_utils"]).update(dict.fromkeys(names, lambda: None))
    packages = [ModuleType("fastvideo"), ModuleType("fastvideo.utils")]
    script = ModuleType("fastvideo.train")
    # their own steps: the replacement is not in them, and a plain function is what is looked for
    scope = vars(script)

    def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
        return dance_grpo.flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)

    def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None, determistic=False):
        return mix_grpo.flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator, determistic)

    with registered(*packages, *utilities.values(), script):
        exec(compile(text, file, "exec"), scope)
        scope.update({"flow_grpo_step": flow_grpo_step} if mix else {"flux_step": flux_step})
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        start = torch.randn(ROWS, 6, 4)
        args = SimpleNamespace(eta=0.3, sampling_steps=STEPS, gradient_accumulation_steps=1, start=start)
        sigmas = torch.tensor(SIGMAS)[-STEPS - 1 :]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        rewards = [torch.tensor([1.0, -0.5, 0.3])] * (2 if "hunyuan" in file else 1)
        scope["train_one_step"](args, model, sigmas, *rewards, seen, optimizer, lambda r: r - r.mean())
    return model


@pytest.mark.parametrize(("page", "file"), FASTVIDEO)
def test_a_fastvideo_script_makes_an_update(page, file):
    """The first sample's columns are on-policy, whatever their permutation; the next ones are a step away."""
    kls = []

    def seen(module, local):
        new, sample, j = module["new"], local["sample"], local["_"]
        old = sample["prev_sample_mean"][:, j]
        kl = conventions.per_row_mean((new.mean - old) ** 2) / (2.0 * float(new.std) ** 2)
        kls.append((local["i"], float(kl.max()), float(local["loss"].detach())))
        if "ratio" in local and page == "dance_grpo.md" and "hunyuan" not in file:
            torch.testing.assert_close(local["ratio"], local["out"].rows.ratio)

    model = run_fastvideo(page, file, seen)
    assert len(kls) == 3 * ROWS
    assert all(kl < 1e-12 for i, kl, _ in kls if i == 0)
    assert all(kl > 1e-8 for i, kl, _ in kls if i > 0)
    assert model.weight.grad is None or not model.weight.grad.any()
    # at ratio 1 the first sample's loss is minus its advantage, once for each reward, over the timesteps
    advantage = float((torch.tensor([1.0, -0.5, 0.3]) - torch.tensor([1.0, -0.5, 0.3]).mean())[0])
    count = 2 if "hunyuan" in file else 1
    assert kls[0][2] == pytest.approx(-count * advantage / 3, rel=1e-4)


# the others of DanceGRPO differ in what their train_one_step is given, and are edited and compiled alone
RUN = ("train_grpo_flux.py", "train_grpo_flux_lora.py", "train_grpo_hunyuan.py")
REAL = [(page, file, False, "null") for page, file in FASTVIDEO if file.endswith(RUN)]
REAL += [(page, file, True, dpm) for page, file, *_ in REAL if page == "mix_grpo.md" for dpm in ("null", "dpmsolver++")]


@pytest.mark.skipif(not FOLDER, reason="FLOWDPPO_PEER_REPOS is not set; it names a folder of checkouts of the trainers")
@pytest.mark.parametrize(("page", "file", "flow", "dpm"), REAL)
def test_a_real_fastvideo_script_makes_an_update(page, file, flow, dpm, monkeypatch):
    """Its own step, sampling loop, replay and ``train_one_step``, edited; around them a tiny model and rewards."""
    mix, root = page == "mix_grpo.md", checkout(page)
    tree = ast.parse(edits.apply((root / file).read_text(), edits.block_of(page, file)).text)
    wanted = {"flux_step", "run_sample_step", "grpo_one_step", "train_one_step", "gather_tensor", "sd3_time_shift"}
    body = [n for n in tree.body if getattr(n, "name", None) in wanted]
    records = [n for n in tree.body if isinstance(n, ast.Assign) and has_text(n, ".record()")]
    train = next(n for n in body if n.name == "train_one_step")
    assigned = {ast.unparse(n.value).split("(")[0]: n.targets[0] for n in ast.walk(train) if isinstance(n, ast.Assign)}
    taken = [e.id for e in assigned["next"].elts] if "next" in assigned else []
    returned = [e.id for e in assigned["sample_reference_model"].elts]
    replay = next(n for n in body if n.name == "grpo_one_step")
    assert [ast.unparse(d) for d in replay.decorator_list] == ["new"]

    torch.manual_seed(0)
    model = Tiny(4)
    model.clip_grad_norm_ = lambda max_norm: torch.zeros(())
    args = MagicMock(
        eta=0.3, sampling_steps=STEPS, gradient_accumulation_steps=1, use_group="hunyuan" in file, num_generations=ROWS,
        bestofn=ROWS, timestep_fraction=0.8, clip_range=1e-4, adv_clip_max=5.0, vq_coef=1.0, mq_coef=1.0, shift=3.0,
        multi_reward_mix="reward_aggr", training_strategy="all", frozen_init_timesteps=0, dpm_algorithm_type=dpm,
        dpm_apply_strategy="post", dpm_post_compress_ratio=1.0, dpm_solver_order=2, dpm_solver_type="midpoint",
        sample_strategy="progressive", flow_grpo_sampling=flow, kl_coeff=0.0, init_same_noise=False,
    )  # fmt: skip
    windowed = mix and dpm != "null"
    if windowed:
        args.training_strategy, args.advantage_rerange_strategy = "part", "null"
    determistic = [i > 2 for i in range(STEPS)] if windowed else [False] * STEPS
    sigmas = torch.tensor([3.0 * t / (1.0 + 2.0 * t) for t in torch.linspace(1.0, 0.0, STEPS + 1).tolist()])
    given = {
        "args": args, "transformer": model, "sigma_schedule": sigmas, "progress_bar": range(STEPS), "grpo_sample": True,
        "determistic": determistic, "encoder_hidden_states": torch.zeros(1, 2, 4), "text_ids": torch.zeros(1, 3),
        "pooled_prompt_embeds": torch.zeros(1, 4), "image_ids": torch.zeros(6, 3), "caption": ["a"] * ROWS,
        "encoder_attention_mask": torch.ones(1, 2), "timesteps_train": [0, 1, 2], "global_step": 0, "step": 0,
        "max_grad_norm": 1.0, "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
    }  # fmt: skip

    def called(function):
        code = function.__wrapped__.__code__ if hasattr(function, "__wrapped__") else function.__code__
        parameters = code.co_varnames[: code.co_argcount]
        return {name: given.get(name, MagicMock(name=name)) for name in parameters}

    def sample_reference_model(*arguments):
        runs = []
        for _ in range(ROWS):
            given["z"] = torch.randn(1, *shape)
            with torch.no_grad():
                runs.append(scope["run_sample_step"](**called(scope["run_sample_step"])))
        found = {"all_latents": torch.cat([r[2] for r in runs]), "all_log_probs": torch.cat([r[3] for r in runs])}
        found |= {"sigma_schedule": sigmas, "all_image_ids": torch.zeros(ROWS, 6, 3), "all_txt_seq_lens": [1] * ROWS}
        reward = torch.tensor([1.0, -0.5, 0.3])
        return tuple(found.get(name, reward) for name in returned)

    shape = (2, 1, 6, 4) if "hunyuan" in file or "wan" in file else (6, 4)
    dist = MagicMock(get_rank=lambda: 1, is_initialized=lambda: False)
    scope = {"torch": torch, "math": __import__("math"), "dist": dist, "tqdm": lambda x, **_: x, "time": time}
    modules = [ModuleType("fastvideo"), ModuleType("fastvideo.utils"), ModuleType("fastvideo.utils.sampling_utils")]
    script = ModuleType("fastvideo.script")
    if mix:
        with registered(*modules):
            exec(compile((root / PAGES[page]).read_text(), PAGES[page], "exec"), vars(modules[-1]))
        vars(modules[-1])["dist"] = dist
        scope |= {n: v for n, v in vars(modules[-1]).items() if not n.startswith("__")}
    vars(script).update(scope)
    scope = vars(script)
    outs = []
    module = mix_grpo if mix else dance_grpo
    real_loss = module.dppo_loss_from_sample
    monkeypatch.setattr(module, "dppo_loss_from_sample", lambda *a, **k: outs.append(real_loss(*a, **k)) or outs[-1])
    with registered(*modules, script):
        run_statements([*ours(tree), *records, *body], scope)
        scope["sample_reference_model"] = scope["old"](sample_reference_model)
        batch = {"encoder_hidden_states": torch.zeros(ROWS, 2, 4), "caption": ["a"] * ROWS}
        batch |= {"pooled_prompt_embeds": torch.zeros(ROWS, 4), "text_ids": torch.zeros(ROWS, 3)}
        given["loader"] = iter([tuple(batch.get(name, torch.ones(ROWS, 2)) for name in taken)])
        given.update({} if taken else batch)
        before = model.linear.weight.detach().clone()
        scope["train_one_step"](**called(scope["train_one_step"]))
    per_sample = len(outs) // ROWS
    assert per_sample == (6 if "hunyuan" in file else 3)
    kls = torch.stack([out.rows.kl.max() for out in outs])
    assert float(kls[:per_sample].max()) < 1e-9
    assert float(kls[per_sample:].min()) > 1e-8
    assert not torch.equal(before, model.linear.weight)


# ---- miles_diffusion: the lines of a tile's loss


def test_a_tile_of_miles_diffusion():
    """The rollout's model outputs are the old policy: on-policy nothing is far; then the loss is the library's."""
    page, file = "miles_diffusion.md", "miles/backends/fsdp_utils/actor.py"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    g = torch.Generator().manual_seed(0)
    old, latents, noise = torch.randn(3, ROWS * 2, 6, 4, generator=g)
    timesteps = scheduler.timesteps[[1, 2] * ROWS]
    step = flow_grpo.sampler_step(scheduler, timesteps)
    mean = flow_grpo.sde_step_with_logprob(scheduler, old, timesteps, latents, prev_sample=latents)[2]
    after = mean + step.std.float().reshape(-1, 1, 1) * noise
    for text in sources(page, file):
        tree = ast.parse(edits.apply(text, edits.block_of(page, file)).text)
        lines, at = next(
            statements(tree, lambda s: isinstance(s, ast.Assign) and "sde_step_with_logprob(" in ast.unparse(s))
        )
        end = next(k for k, s in enumerate(lines) if ast.unparse(s).startswith("loss = "))
        for change in (0.0, 0.05):
            velocity = (old + change * torch.randn(old.shape, generator=g)).requires_grad_()
            namespace = {
                "torch": torch, "self": SimpleNamespace(scheduler=scheduler), "noise_pred_flat": velocity,
                "timesteps_flat": timesteps, "latents_flat": latents, "next_latents_tile": after.reshape(ROWS, 2, 6, 4),
                "tile_sample_count": ROWS, "tile_tstep_count": 2, "noise_level": 0.7, "clip_range": 1e-4,
                "grids": {"rollout_model_outputs": old.reshape(ROWS, 2, 6, 4)},
                "log_prob_old_tile": torch.zeros(ROWS, 2),
                "sample_indices": torch.arange(ROWS), "tstep_indices": torch.arange(2),
                "advantage_tile": torch.tensor([1.0, -0.8, 0.6]).reshape(-1, 1).repeat(1, 2),
                "sde_step_with_logprob": flow_grpo.sde_step_with_logprob,
            }  # fmt: skip
            run_statements([*ours(tree), *lines[at : end + 1]], namespace)
            out, loss = namespace["out"], namespace["loss"]
            loss.backward()
            if change == 0.0:
                assert float(out.rows.kl.max()) == 0.0
                continue
            leaf = velocity.detach().clone().requires_grad_()
            advantages = namespace["advantage_tile"].reshape(-1)
            expected = fast.fused_dppo_velocity_loss(leaf, old, noise, step, advantages, threshold=1e-5)
            expected.loss.backward()
            assert 0.0 < float(out.rows.kept.float().mean()) < 1.0
            torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(velocity.grad, leaf.grad, rtol=1e-3, atol=1e-5)
