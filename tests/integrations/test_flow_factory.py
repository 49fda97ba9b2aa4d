"""Flow-Factory: the trainer's ``optimize`` through a stand-in of what it reaches, against its formulas."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from . import conventions
from .recorded import ETA, LATENTS, SIGMAS
from .standins import flow_factory as standin
from .standins import installed

ROWS, TRAINED = 4, [1, 3]
THRESHOLD = 1e-3
ADVANTAGES = torch.tensor([1.0, -0.7, 2.0, -1.3], dtype=torch.float64)


@pytest.fixture
def flow_factory():
    with installed(standin.build(), "flowdppo_fast.integrations.flow_factory") as integration:
        yield integration


def make(flow_factory, dynamics, *, shape=(3, 5), dtype=torch.float64, accumulate=2, **arguments):
    sigmas = torch.tensor(SIGMAS)
    scheduler = standin.Scheduler(sigmas, sigmas[:-1] * 1000.0, torch.tensor(TRAINED), dynamics, ETA)
    adapter = standin.Adapter(shape[-1], scheduler, dtype)
    args = standin.DPPOTrainingArguments(**{"kl_mask_threshold": THRESHOLD, **arguments})
    trainer = flow_factory.DPPOTrainer(adapter, args, standin.Accelerator(accumulate))
    trainer.loss_backend = "reference" if dtype == torch.float64 else "auto"
    return trainer


def rollout(trainer, shape=(3, 5), dtype=torch.float64):
    """One stacked micro-batch as Flow-Factory keeps it: the train steps of a trajectory, sparse behind index maps."""
    adapter, scheduler = trainer.adapter, trainer.adapter.scheduler
    g = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, *shape, generator=g, dtype=torch.float64).to(dtype)
    # levels as the adapter makes them of timesteps, so that the replay is at exactly these
    sampler, table = standin.SAMPLERS[scheduler.dynamics_type], scheduler.timesteps.to(dtype) / 1000.0
    kept, log_probs, callbacks = [], [], {"noise_pred": [], "next_latents_mean": []}
    latent_map, call_map = torch.full((11,), -1), torch.full((10,), -1)
    for i in range(5):
        t = scheduler.timesteps[i].expand(ROWS)
        with torch.no_grad():
            v = adapter.velocity(x, t, trainer.training_args.guidance_scale)
        sigma, after = table[i].expand(ROWS), table[i + 1].expand(ROWS)
        zero = conventions.replay(sampler, x, v, x, sigma, after, ETA, SIGMAS)
        x_next = zero.mean + zero.std * torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype)
        if i in TRAINED:
            latent_map[i], latent_map[i + 1] = len(kept), len(kept) + 1
            kept += [x, x_next]
            call_map[i] = len(log_probs)
            log_probs.append(conventions.replay(sampler, x, v, x_next, sigma, after, ETA, SIGMAS).log_prob)
            callbacks["noise_pred"].append(v)
            callbacks["next_latents_mean"].append(zero.mean)
        x = x_next
    field = "noise_pred" if trainer.training_args.kl_mask_type == "v-based" else "next_latents_mean"
    return {
        "latent_index_map": latent_map,
        "log_prob_index_map": call_map,
        "callback_index_map": call_map.expand(ROWS, -1),
        "timesteps": scheduler.timesteps.expand(ROWS, -1),
        "all_latents": torch.stack(kept, 1),
        "log_probs": torch.stack(log_probs, 1),
        field: torch.stack(callbacks[field], 1),
        "advantage": ADVANTAGES.to(dtype),
    }


def update(trainer, size=0.5):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = trainer.adapter.weight
        weight += size * torch.randn(weight.shape, generator=g).to(weight)


def theirs(trainer, batch):
    """Flow-Factory's formula on the same adapter: mean loss over train steps, gradient, and logged values."""
    adapter, args, scheduler = trainer.adapter, trainer.training_args, trainer.adapter.scheduler
    losses, logged = [], []
    for column, i in enumerate(TRAINED):
        inputs = {
            "t": batch["timesteps"][:, i],
            "t_next": batch["timesteps"][:, i + 1],
            "latents": batch["all_latents"][:, 2 * column],
            "next_latents": batch["all_latents"][:, 2 * column + 1],
            "noise_level": scheduler.noise_level,
            "return_kwargs": ["log_prob", "noise_pred", "next_latents_mean", "std_dev_t", "dt"],
        }
        out = adapter.forward(guidance_scale=args.guidance_scale, **inputs)
        velocity = args.kl_mask_type == "v-based"
        key = "noise_pred" if velocity else "next_latents_mean"
        std = out.std_dev_t if scheduler.dynamics_type == "CPS" else out.std_dev_t * torch.sqrt(-out.dt)
        loss, info = conventions.flow_factory_dppo(
            out.log_prob, batch["log_probs"][:, column], getattr(out, key), batch[key][:, column], std,
            batch["advantage"], threshold=args.kl_mask_threshold, mask=args.kl_mask_type,
            adv_clip_range=args.adv_clip_range,
        )  # fmt: skip
        if args.kl_beta > 0.0:
            scale = args.guidance_scale if args.kl_guidance_scale is None else args.kl_guidance_scale
            with torch.no_grad(), adapter.use_ref_parameters():
                reference = adapter.forward(guidance_scale=scale, **inputs)
            name = "noise_pred" if args.kl_type == "v-based" else "next_latents_mean"
            kl = conventions.flow_factory_reference(getattr(out, name), getattr(reference, name))
            loss = loss + args.kl_beta * kl
            info |= {"kl_div": kl.detach(), "kl_loss": args.kl_beta * kl.detach()}
        losses.append(loss)
        logged.append({**info, "loss": loss.detach()})
    total = torch.stack(losses).mean()
    (grad,) = torch.autograd.grad(total, adapter.weight)
    values = {}
    for name in logged[0]:
        stacked = torch.stack([one[name] for one in logged])
        if stacked.ndim > 1:
            values |= {f"{name}_mean": stacked.mean(), f"{name}_max": stacked.max(), f"{name}_min": stacked.min()}
        else:
            values[name] = stacked.mean()
    return total.detach(), grad, values


def run(trainer, batch):
    """One ``optimize``; the gradient is read off the optimizer step of size 1."""
    before = trainer.adapter.weight.detach().clone()
    trainer.adapter.calls.clear()
    trainer.optimize([batch])
    return before - trainer.adapter.weight.detach(), trainer.logged[-1]


@pytest.mark.parametrize("mask", ["x-based", "v-based"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 5), (2, 3, 2, 5)], ids=LATENTS)
@pytest.mark.parametrize("dynamics", standin.SAMPLERS)
def test_loss_gradient_and_log(flow_factory, dynamics, shape, mask):
    """Float64, every dynamics, mask space and latent layout; the adapter is not asked for log-probs."""
    trainer = make(flow_factory, dynamics, shape=shape, kl_mask_type=mask)
    batch = rollout(trainer, shape)
    update(trainer)
    trainer.training_args.kl_mask_threshold = float(_median_divergence(trainer, batch))
    _, grad, values = theirs(trainer, batch)
    assert 0.0 < values["masked_ratio"] < 1.0
    actual, logged = run(trainer, batch)
    torch.testing.assert_close(actual, grad, rtol=1e-9, atol=1e-9 * float(grad.abs().max()))
    for name, value in values.items():
        assert float(logged[f"train/{name}"]) == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
    assert {"train/grad_norm", "step"} <= logged.keys()
    assert trainer.step == 1
    assert all(not call["compute_log_prob"] for call in trainer.adapter.calls)


def _median_divergence(trainer, batch):
    """A threshold in the middle of what occurs, so that rows fall on both sides of it."""
    trainer.training_args.kl_mask_threshold = 1e9
    values = theirs(trainer, batch)[2]
    return 0.5 * (values["kl_new_old_min"] + values["kl_new_old_mean"])


@pytest.mark.parametrize("kl_type", ["x-based", "v-based"])
@pytest.mark.parametrize("mask", ["x-based", "v-based"])
def test_reference_penalty(flow_factory, mask, kl_type):
    """The unscaled squared error in its own space, the reference under its own guidance scale."""
    trainer = make(flow_factory, "Flow-SDE", kl_mask_type=mask, kl_type=kl_type, kl_beta=0.3, kl_guidance_scale=1.5)
    batch = rollout(trainer)
    update(trainer)
    _, grad, values = theirs(trainer, batch)
    actual, logged = run(trainer, batch)
    torch.testing.assert_close(actual, grad, rtol=1e-9, atol=1e-9 * float(grad.abs().max()))
    for name in ("kl_div", "kl_loss", "loss", "policy_loss"):
        assert float(logged[f"train/{name}"]) == pytest.approx(float(values[name]), rel=1e-9), name


@pytest.mark.parametrize("mask", ["x-based", "v-based"])
def test_float32_and_on_policy(flow_factory, mask):
    """Before an update every ratio is 1 and nothing is masked; after it float32 is close to the convention."""
    shape = LATENTS["packed"]
    trainer = make(flow_factory, "Flow-SDE", shape=shape, dtype=torch.float32, kl_mask_type=mask)
    batch = rollout(trainer, shape, torch.float32)
    _, logged = run(trainer, batch)
    tolerance = 0.0 if mask == "x-based" else 1e-6
    assert float(logged["train/ratio_max"]) == pytest.approx(1.0, abs=tolerance)
    assert float(logged["train/kl_new_old_max"]) == 0.0
    assert float(logged["train/masked_ratio"]) == 0.0
    update(trainer)
    _, grad, values = theirs(trainer, batch)
    actual, logged = run(trainer, batch)
    torch.testing.assert_close(actual, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
    assert float(logged["train/kl_new_old_mean"]) == pytest.approx(float(values["kl_new_old_mean"]), rel=1e-4)


def test_accumulation_epochs_and_logging(flow_factory):
    """An update per ``accumulate`` losses, over all micro-batches and inner epochs."""
    trainer = make(flow_factory, "Dance-SDE", accumulate=4, num_inner_epochs=2)
    batch = rollout(trainer)
    trainer.optimize([batch, batch])
    assert trainer.step == 2
    assert [entry["step"] for entry in trainer.logged] == [0, 1]


def test_an_overflowed_row_that_is_dropped_leaves_no_nan(flow_factory):
    """Flow-Factory multiplies by the mask, and infinity times zero is NaN."""
    trainer = make(flow_factory, "Flow-SDE")
    batch = rollout(trainer)
    batch["next_latents_mean"] = batch["next_latents_mean"] + 0.0
    batch["next_latents_mean"][0] += 1e4
    batch["all_latents"][0] -= 1e5
    update(trainer)
    _, logged = run(trainer, batch)
    assert float(logged["train/ratio_max"]) > 1e30 or float(logged["train/ratio_min"]) < 1e-30
    assert torch.isfinite(logged["train/policy_loss"])


def test_register_replaces_the_registered_trainer(flow_factory):
    registry = sys.modules["flow_factory.trainers.registry"]
    theirs = sys.modules["flow_factory.trainers.dppo"].DPPOTrainer
    assert registry.get_trainer_class("dppo") is theirs
    flow_factory.register()
    assert registry.get_trainer_class("dppo") is flow_factory.DPPOTrainer
    assert issubclass(flow_factory.DPPOTrainer, theirs)
    assert registry.get_trainer_class("flowdppo_fast.integrations.flow_factory.DPPOTrainer") is flow_factory.DPPOTrainer


def test_ode_dynamics_have_no_density(flow_factory):
    trainer = make(flow_factory, "Flow-SDE")
    batch = rollout(trainer)
    trainer.adapter.scheduler.dynamics_type = "ODE"
    with pytest.raises(ValueError, match="dynamics_type: got 'ODE', expected one of 'Flow-SDE', 'Dance-SDE', 'CPS'"):
        trainer.optimize([batch])


# ---- the later layout: states of one or several latents


SHAPES = {"latent": (3, 5), "audio": (7, 5)}


def make_states(integration, names, mask, *, padding=0, dtype=torch.float64, **arguments):
    sigmas = torch.tensor(SIGMAS)
    adapters = {}
    for name, dynamics in names.items():
        scheduler = standin.Scheduler(sigmas, sigmas[:-1] * 1000.0, torch.tensor(TRAINED), dynamics, ETA)
        adapters[name] = standin.Adapter(5, scheduler, dtype)
    args = standin.DPPOTrainingArguments(
        **{"kl_mask_threshold": THRESHOLD, "kl_mask_type": mask, "kl_type": mask, **arguments}
    )
    trainer = integration.DPPOTrainer(standin.StateAdapter(adapters, padding), args, standin.Accelerator(2))
    trainer.loss_backend = "reference" if dtype == torch.float64 else "auto"
    return trainer


def rollout_states(trainer, dtype=torch.float64):
    """A micro-batch of the trained steps: states, times, joint log-probs, and what the rollout stored beside them."""
    adapter = trainer.adapter
    g = torch.Generator().manual_seed(3)
    fields = ("next_latents_mean", "velocity", "log_prob")
    batch = {"steps": {}, "callbacks": {"next_latents_mean": {}, "velocity": {}}, "advantage": ADVANTAGES.to(dtype)}
    for i in TRAINED:
        x = {n: torch.randn(ROWS, *SHAPES[n], generator=g, dtype=torch.float64).to(dtype) for n in adapter.adapters}
        noise = {n: torch.randn(x[n].shape, generator=g, dtype=torch.float64).to(dtype) for n in x}
        times = [{n: s.timesteps[j].expand(ROWS) for n, s in adapter.scheduler_group.items()} for j in (i, i + 1)]
        replay = standin.namespace(
            state=standin.LatentState(x), next_state=standin.LatentState(dict(x)), log_prob=None,
            times=standin.namespace(timestep=times[0], next_timestep=times[1]),
        )  # fmt: skip
        with torch.no_grad():
            out = adapter.forward_state(replay, (*fields, "std_dev_t", "dt"), 1.0)
            for name, scheduler in adapter.scheduler_group.items():
                std = out.std_dev_t[name]
                std = std if scheduler.dynamics_type == "CPS" else std * torch.sqrt(-out.dt[name])
                replay.next_state.components[name] = out.next_state_mean.components[name] + std * noise[name]
            replay.log_prob = adapter.forward_state(replay, fields, 1.0).log_prob
        batch["steps"][i] = replay
        batch["callbacks"]["next_latents_mean"][i] = out.next_state_mean.components
        batch["callbacks"]["velocity"][i] = out.velocity.components
    return batch


def update_states(trainer, size=0.3):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainer.adapter.get_trainable_parameters():
            weight += size * torch.randn(weight.shape, generator=g).to(weight)


def their_states(trainer, batch):
    """Flow-Factory's formula, each element that counts once: loss over train steps, gradients, logged values."""
    adapter, args = trainer.adapter, trainer.training_args
    losses, logged = [], []
    for i in TRAINED:
        replay = batch["steps"][i]
        fields = ("next_latents_mean", "velocity", "std_dev_t", "dt", "log_prob")
        out = adapter.forward_state(replay, fields, args.guidance_scale)
        velocity = args.kl_mask_type == "v-based"
        new = (out.velocity if velocity else out.next_state_mean).components
        old = batch["callbacks"]["velocity" if velocity else "next_latents_mean"][i]
        gaps = {}
        for name, scheduler in adapter.scheduler_group.items():
            std = out.std_dev_t[name]
            std = std if scheduler.dynamics_type == "CPS" else std * torch.sqrt(-out.dt[name])
            gaps[name] = (new[name] - old[name]) ** 2 / (1.0 if velocity else 2.0 * std**2)
        divergence = adapter.reduce_latent_values(gaps)
        adv = batch["advantage"].clamp(*args.adv_clip_range)
        rows, metrics = conventions._masked(out.log_prob - replay.log_prob, divergence, adv, args.kl_mask_threshold)
        loss, info = rows.mean(), {"kl_new_old": divergence, "masked_ratio": metrics["masked_fraction"]}
        if args.kl_beta > 0.0:
            with torch.no_grad(), adapter.use_ref_parameters():
                reference = adapter.forward_state(replay, fields, args.guidance_scale)
            other = (reference.velocity if velocity else reference.next_state_mean).components
            kl = adapter.reduce_latent_values({n: (new[n] - other[n]) ** 2 for n in new}).mean()
            loss = loss + args.kl_beta * kl
            info["kl_div"] = kl
        losses.append(loss)
        logged.append({**info, "loss": loss})
    grads = torch.autograd.grad(torch.stack(losses).mean(), adapter.get_trainable_parameters())
    return grads, {name: torch.stack([one[name].detach() for one in logged]) for name in logged[0]}


@pytest.mark.parametrize("mask", ["x-based", "v-based"])
@pytest.mark.parametrize("padding", [0, 4], ids=["plain", "padded"])
@pytest.mark.parametrize(
    "names",
    [*({"latent": dynamics} for dynamics in standin.SAMPLERS), {"latent": "Flow-SDE", "audio": "CPS"}],
    ids=[*standin.SAMPLERS, "two latents"],
)
def test_states(names, padding, mask):
    """One latent, two of different size and sampler, and padding that does not count: loss, gradients, log, penalty."""
    with installed(standin.build("states"), "flowdppo_fast.integrations.flow_factory") as integration:
        trainer = make_states(integration, names, mask, padding=padding, kl_beta=0.2)
        batch = rollout_states(trainer)
        update_states(trainer)
        divergence = their_states(trainer, batch)[1]["kl_new_old"]
        trainer.training_args.kl_mask_threshold = float(divergence.flatten().sort().values[3:5].mean())
        grads, values = their_states(trainer, batch)
        assert 0.0 < float(values["masked_ratio"].mean()) < 1.0
        weights = trainer.adapter.get_trainable_parameters()
        before = [weight.detach().clone() for weight in weights]
        trainer.optimize([batch])
        # timesteps are levels times 1000 in float32, which a log-ratio made of velocities reads
        close = 1e-9 if mask == "x-based" else 1e-5
        for was, weight, grad in zip(before, weights, grads):
            torch.testing.assert_close(was - weight.detach(), grad, rtol=close, atol=close * float(grad.abs().max()))
        logged = trainer.logged[-1]
        assert float(logged["train/kl_new_old_max"]) == pytest.approx(float(values["kl_new_old"].max()), rel=1e-9)
        for name in ("loss", "masked_ratio", "kl_div"):
            assert float(logged[f"train/{name}"]) == pytest.approx(float(values[name].mean()), rel=close), name
        assert trainer.step == 1
        integration.register()
        registry = sys.modules["flow_factory.trainers.registry"]
        assert registry.get_trainer_class("dppo") is integration.DPPOTrainer


# ---- from the command line

TREE = {
    "cli.py": """
import subprocess, sys
def train_cli():
    subprocess.run([sys.executable, "-m", MODULE, *sys.argv[1:]], check=True)
""",
    "train.py": """
import sys
def main():
    from flow_factory.trainers.registry import TRAINERS
    print("trained", sys.argv[1:], TRAINERS["dppo"])
if __name__ == "__main__":
    main()
""",
    "trainers/__init__.py": "",
    "trainers/dppo.py": "class DPPOTrainer: ...\n",
    "trainers/registry.py": """
TRAINERS = {"dppo": "theirs"}
def register_trainer(name):
    def decorator(cls):
        TRAINERS[name] = f"{cls.__module__}.{cls.__name__}"
        return cls
    return decorator
""",
    "__init__.py": "",
}


def run_module(tmp_path, name, module="flow_factory.train"):
    for relative, text in TREE.items():
        file = tmp_path / "flow_factory" / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("MODULE", repr(module)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", f"flowdppo_fast.integrations.{name}", "recipe.yaml", "--seed", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["flow_factory", "flow_factory_train"])
def test_from_the_command_line(tmp_path, name):
    """``ff-train`` as it is, whose processes have this trainer; and one such process, for a launcher of one's own."""
    ran = run_module(tmp_path, name)
    assert ran.returncode == 0, ran.stderr
    expected = "trained ['recipe.yaml', '--seed', '1'] flowdppo_fast.integrations.flow_factory.DPPOTrainer"
    assert expected in ran.stdout


def test_a_launcher_that_starts_something_else_is_an_error(tmp_path):
    ran = run_module(tmp_path, "flow_factory", module="flow_factory.begin")
    assert ran.returncode != 0
    assert (
        "expected one that runs -m flow_factory.train; start flowdppo_fast.integrations.flow_factory_train"
        in ran.stderr
    )
