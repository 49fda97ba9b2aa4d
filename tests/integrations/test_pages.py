"""The edits on the pages of flow_grpo, DanceGRPO and MixGRPO, made on scripts and run.

Without checkouts they are made on stand-ins with the same call sites. With ``FLOWDPPO_PEER_REPOS`` they are made on the
real scripts too, whose sampling and loss lines then run on a tiny model.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from pipelines.families import FAMILIES

from flowdppo_fast.integrations import flow_grpo

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


@pytest.mark.parametrize(("page", "file"), SCRIPTS)
def test_edits_are_made_and_compile(page, file):
    for text in sources(page, file):
        edited = edits.apply(text, edits.block_of(page, file))
        compile(edited.text, file, "exec")
        assert "flowdppo_fast" not in text
        assert "from flowdppo_fast.integrations import" in edited.text
        with pytest.raises(LookupError, match="no place for the hunk"):
            edits.apply(text.replace("import", "export"), edits.block_of(page, file))


def counted(page, files):
    """Lines added and removed in the real scripts, as the table says it."""
    root, numbers = checkout(page), []
    for file in files:
        edited = edits.apply((root / file).read_text(), edits.block_of(page, file))
        numbers.append((edited.added, edited.removed))
    added, removed = ({pair[k] for pair in numbers} for k in (0, 1))
    return " to ".join(map(str, sorted(added))), "/".join(map(str, sorted(removed)))


def test_the_table_counts_the_lines():
    """Added lines are counted on the page itself, removed ones in the real scripts."""
    table = (edits.PAGES / "index.md").read_text().partition("## How many lines")[2]
    for page in PAGES:
        for block in edits.blocks(page):
            row = next(line for line in table.splitlines() if f"`{Path(block.files[0]).name}`" in line and page in line)
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            added = sum(mark == "+" for hunk in block.hunks for mark, _ in hunk)
            assert cells[1] == str(added), (page, block.files, added)
            named = re.findall(r"`(\w+\.py)`", cells[0])
            assert named == [Path(file).name for file in block.files]
            if FOLDER:
                assert (cells[1], cells[2]) == counted(page, block.files), (page, block.files)


# ---- flow_grpo: the sampling lines, the dictionary and the loop over timesteps of a script, run on a tiny model


def step_module(page_step):
    """``flow_grpo.diffusers_patch.pipeline`` over a step function of the trainer's."""
    module = ModuleType("flow_grpo.diffusers_patch.pipeline")

    def pipeline_with_logprob(pipeline, *args, noise_level=0.7, **kwargs):
        x, wan = pipeline.start, pipeline.wan
        latents, log_probs, timesteps, means = [x], [], [], []
        for t in pipeline.scheduler.timesteps:
            v = pipeline.transformer(x)[0]
            options = {} if wan else {"noise_level": noise_level}
            x, log_prob, mean, _ = module.sde_step_with_logprob(pipeline.scheduler, v, t.unsqueeze(0), x, **options)
            latents.append(x)
            log_probs.append(log_prob)
            timesteps.append(t)
            means.append(mean)
        values = {"latents": latents, "log_probs": log_probs, "timesteps": timesteps, "prev_sample_mean": means}
        return pipeline.returned(values)

    module.sde_step_with_logprob = page_step
    module.pipeline_with_logprob = module.wan_pipeline_with_logprob = pipeline_with_logprob
    return module


def real_step(root, wan):
    """The step of a checkout, executed from its own file."""
    name = "wan_pipeline_with_logprob" if wan else "sd3_sde_with_logprob"
    text = (root / f"flow_grpo/diffusers_patch/{name}.py").read_text()
    (node,) = (n for n in ast.parse(text).body if getattr(n, "name", "") == "sde_step_with_logprob")
    for argument in ast.walk(node):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    scope = {"torch": torch, "math": __import__("math")}
    scope["randn_tensor"] = __import__("diffusers.utils.torch_utils", fromlist=["x"]).randn_tensor
    exec(compile(ast.Module([node], []), name, "exec"), scope)
    return scope["sde_step_with_logprob"]


def our_step(wan):
    ours = flow_grpo.wan_sde_step_with_logprob if wan else flow_grpo.sde_step_with_logprob

    if wan:

        def sde_step_with_logprob(scheduler, model_output, timestep, sample, prev_sample=None, determistic=False):
            return ours(scheduler, model_output, timestep, sample, prev_sample, determistic=determistic)

    else:

        def sde_step_with_logprob(scheduler, model_output, timestep, sample, noise_level=0.7, prev_sample=None):
            return ours(scheduler, model_output, timestep, sample, noise_level, prev_sample)

    return sde_step_with_logprob


class Script:
    """An edited flow_grpo script over a tiny model: ``sample()`` runs its rollout lines, ``train()`` its loss lines."""

    def __init__(self, file, text, step, *, beta=0.04):
        self.tree = ast.parse(edits.apply(text, edits.block_of("flow_grpo.md", file)).text)
        self.wan = "wan" in file
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        if self.wan:
            scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        scheduler.set_timesteps(STEPS)
        self.model = Tiny(4)
        self.reference = Tiny(4)
        shape = (2, 1, 3, 4) if self.wan else (6, 4) if "sd3" not in file else (3, 5, 4)
        start = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))
        self.pipeline = SimpleNamespace(
            scheduler=scheduler, transformer=self.model, start=start, wan=self.wan, returned=self.returned
        )
        self.logged = []
        config = MagicMock()
        for name, value in {"beta": beta, "adv_clip_max": 5.0, "clip_range": 1e-4, "cfg": False, "ema": False}.items():
            setattr(config.train, name, value)
        config.sample.noise_level, config.sample.train_batch_size, config.sample.get = (
            0.7,
            ROWS,
            lambda key, default: default,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        accelerator = MagicMock(sync_gradients=True, is_main_process=True)
        accelerator.backward = lambda loss: loss.backward()
        accelerator.reduce = lambda info, reduction: self.logged.append(dict(info)) or info
        self.namespace = {
            "torch": torch, "time": time, "config": config, "pipeline": self.pipeline, "samples": [],
            "autocast": contextlib.nullcontext, "transformer": self.model, "transformer_ref": self.reference,
            "compute_log_prob": self.compute_log_prob, "optimizer": self.optimizer, "accelerator": accelerator,
            "info": defaultdict(list), "defaultdict": defaultdict, "tqdm": lambda x, **_: x, "global_step": 0,
            "gradient_accumulation_steps": 1, "train_timesteps": list(range(STEPS)), "i": 0,
            "num_train_timesteps": STEPS,
            "is_distributed": False, "rank": 1, "prompts": [""] * ROWS, "epoch": 0, "inner_epoch": 0,
        }  # fmt: skip
        run_statements(ours(self.tree), self.namespace)
        self.module = step_module(step)
        for name in ("pipeline_with_logprob", "wan_pipeline_with_logprob"):
            self.namespace[name] = getattr(self.module, name)

    def returned(self, values):
        """What the script's call unpacks, by the names it gives them."""
        if isinstance(self.target, ast.Name):
            collected = {f"all_{name}": values[name] for name in ("latents", "log_probs", "timesteps")}
            return {**collected, "images": None, **self.embeds()}
        values["kls"] = [torch.zeros(ROWS)] * STEPS
        return tuple(values.get(name.id, torch.zeros(1)) for name in self.target.elts)

    @staticmethod
    def embeds():
        names = ("prompt_embeds", "negative_prompt_embeds")
        made = {f"{name}{mask}": torch.zeros(ROWS, 1) for name in names for mask in ("", "_mask")}
        return {**made, "image_latents": torch.zeros(ROWS, 1)}

    def compute_log_prob(self, *arguments, reference=False, **_):
        model = (
            self.reference if reference or self.reference in arguments or not torch.is_grad_enabled() else self.model
        )
        sample, j = next((a, b) for a, b in pairwise(arguments) if isinstance(a, dict))
        x = sample["latents"][:, j]
        step = flow_grpo.wan_sde_step_with_logprob if self.wan else flow_grpo.sde_step_with_logprob
        extra = {"return_dt_and_std_dev_t": True} if self.wan else {"return_sqrt_dt": self.with_root}
        return step(
            self.pipeline.scheduler,
            model(x)[0],
            sample["timesteps"][:, j],
            x,
            prev_sample=sample["next_latents"][:, j],
            **extra,
        )

    def sample(self):
        call = "pipeline_with_logprob("
        found = list(statements(self.tree, lambda s: isinstance(s, ast.Assign) and has_text(s, call)))
        targets = [body[at].targets[0] for body, at in found]
        # GRPO-Guard's has one call with means and one without
        self.target = max(reversed(targets), key=lambda t: has_text(t, "latents") + has_text(t, "prev_sample_mean"))
        (inside,) = (
            (body, at)
            for body, at in statements(self.tree, lambda s: isinstance(s, ast.Expr) and has_text(s, "samples.append("))
            if any(has_text(s, call) for s in body[:at])
        )
        lines, end = inside
        begin = max(k for k in range(end) if has_text(lines[k], call))
        torch.manual_seed(2)
        self.namespace["samples"] = []
        with registered(self.module):
            run_statements(lines[begin : end + 1], self.namespace)
        (sample,) = self.namespace["samples"]
        sample = {key: value for key, value in sample.items() if isinstance(value, torch.Tensor)}
        advantages = torch.tensor([1.0, -0.8, 0.6]).reshape(-1, 1)
        return {**sample, "advantages": advantages.repeat(1, STEPS)}

    def train(self, sample):
        found = lambda s: isinstance(s, ast.For) and has_text(s.target, "j") and has_text(s, "compute_log_prob(")  # noqa: E731
        (body, at), *_ = statements(self.tree, found)
        unpacked = re.search(r"(\w+, [\w, ]+) = compute_log_prob\(", ast.unparse(body[at]).replace("(prev", "prev"))
        self.with_root = unpacked is not None and "sqrt_dt" in unpacked.group(1)
        self.namespace["sample"], self.namespace["info"] = sample, defaultdict(list)
        self.logged.clear()
        kept = []
        spy = self.namespace["dppo"]
        watched = SimpleNamespace(**{name: getattr(spy, name) for name in spy.__all__})
        watched.training_info = lambda out: kept.append(out) or spy.training_info(out)
        self.namespace["dppo"] = watched
        run_statements([body[at]], self.namespace)
        self.namespace["dppo"] = spy
        return kept


FLOW_GRPO = [file for page, file in SCRIPTS if page == "flow_grpo.md"]


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("file", FLOW_GRPO)
def test_a_flow_grpo_script_makes_an_update(file, beta):
    """On-policy every KL is 0 in every column; after a change the loss is the formula's, and the weights move."""
    wan = "wan" in file
    runs = [(stand_in("flow_grpo.md", file), our_step(wan))]
    if FOLDER:
        root = checkout("flow_grpo.md")
        runs.append(((root / file).read_text(), real_step(root, wan)))
    for text, step in runs:
        script = Script(file, text, step, beta=beta)
        sample = script.sample()
        assert sample["prev_sample_mean"].shape == sample["latents"].shape
        assert script.module.sde_step_with_logprob is step
        outs = script.train(sample)
        assert len(outs) == STEPS
        for out in outs:
            assert float(out.rows.kl.max()) < 1e-10
            assert float(out.rows.log_ratio.abs().max()) < 1e-5
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            script.model.linear.weight += 0.5 * torch.randn(4, 4, generator=g)
        before = {name: value.clone() for name, value in script.model.state_dict().items()}
        script.optimizer.param_groups[0]["lr"] = 1e-3
        out = script.train(sample)[0]
        assert not torch.equal(before["linear.weight"], script.model.linear.weight)
        script.model.load_state_dict(before)
        script.with_root = True
        _, _, mean, std_dev_t, root_dt = script.compute_log_prob(sample, 0)
        old = sample["prev_sample_mean"][:, 0]
        std = std_dev_t * root_dt
        drift = conventions.per_row_mean((mean - old) ** 2)
        expected = drift / (2.0 * std.flatten() ** 2)
        torch.testing.assert_close(out.rows.kl, expected.detach(), rtol=1e-4, atol=1e-9)
        assert float(out.rows.kl.max()) > 1e-5
        if "Guard" not in file:
            log_ratio = conventions.gaussian_log_prob(sample["next_latents"][:, 0], mean, std)
            log_ratio = log_ratio - conventions.gaussian_log_prob(sample["next_latents"][:, 0], old, std)
            rows, _ = conventions._masked(log_ratio, expected, sample["advantages"][:, 0], 1e-5)
            loss = rows.mean()
            if beta > 0.0:
                reference = script.reference(sample["latents"][:, 0])[0]
                step_of = flow_grpo.wan_sde_step_with_logprob if wan else flow_grpo.sde_step_with_logprob
                mean_ref = step_of(
                    script.pipeline.scheduler, reference, sample["timesteps"][:, 0], sample["latents"][:, 0],
                    prev_sample=sample["next_latents"][:, 0],
                )[2]  # fmt: skip
                scale = std if wan else std_dev_t
                loss = (
                    loss + beta * (conventions.per_row_mean((mean - mean_ref) ** 2) / (2 * scale.flatten() ** 2)).mean()
                )
            torch.testing.assert_close(out.loss, loss, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not FOLDER, reason="FLOWDPPO_PEER_REPOS is not set; it names a folder of checkouts of the trainers")
@pytest.mark.parametrize("name", ["sd3_pipeline_with_logprob", "sd3_pipeline_with_logprob_fast"])
def test_the_real_pipeline_under_a_record(name, monkeypatch):
    """flow_grpo's own pipeline function on a tiny StableDiffusion 3: the mean that each log-prob is of."""
    monkeypatch.syspath_prepend(checkout("flow_grpo.md"))
    module = importlib.import_module(f"flow_grpo.diffusers_patch.{name}")
    step = module.sde_step_with_logprob
    pipeline, arguments = FAMILIES["StableDiffusion3"].pipeline(), FAMILIES["StableDiffusion3"].arguments(2, 1)
    pipeline.vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=1.0, shift_factor=0.0), dtype=torch.float32,
        decode=lambda latents, return_dict: (latents[:, :3],),
    )  # fmt: skip
    fast = {"sde_window_size": 2, "sde_window_range": (0, 4), "sde_type": "sde"} if "fast" in name else {}
    wanted = {"prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds"}
    arguments = {key: value for key, value in arguments.items() if key in {*wanted, "height", "width"}}
    torch.manual_seed(0)
    with torch.no_grad(), flow_grpo.record() as old:
        out = module.pipeline_with_logprob(
            pipeline, **arguments, num_inference_steps=5, guidance_scale=1.0, output_type="pt", noise_level=0.7, **fast
        )
    for loaded in [m for m in sys.modules if m.split(".")[0] == "flow_grpo"]:
        del sys.modules[loaded]
    assert module.sde_step_with_logprob is step
    latents, log_probs = torch.stack(out[1], dim=1), torch.stack(out[2], dim=1)
    means = old.means()
    assert means.shape == latents[:, 1:].shape
    timesteps = torch.stack(out[3]) if fast else pipeline.scheduler.timesteps
    assert means.shape[1] == log_probs.shape[1] == len(timesteps) == (2 if fast else 5)
    for j, t in enumerate(timesteps):
        drawn = flow_grpo.sampler_step(pipeline.scheduler, t.reshape(1))
        scored = conventions.gaussian_log_prob(latents[:, j + 1], means[:, j], torch.tensor(drawn.std))
        torch.testing.assert_close(scored, log_probs[:, j], rtol=1e-4, atol=1e-4)
