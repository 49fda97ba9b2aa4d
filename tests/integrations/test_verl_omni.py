"""verl-omni: the registered losses and the scheduler step through a stand-in of its interface, against its formulas."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from support.backends import CPU, require
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import conventions
from .recorded import ADVANTAGE_CLIP, CLIP, ETA, LATENTS, THRESHOLD, check, outcome, record
from .standins import installed
from .standins import verl_omni as standin

SAMPLERS = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance"}
GUARD_CLIP = 0.004
STEPS = [1, 1, 1, 1, 3, 3, 3, 3]


@pytest.fixture
def verl_omni():
    with installed(standin.build(), "flowdppo_fast.integrations.verl_omni") as integration:
        yield integration


@pytest.fixture
def call():
    """The worker's dispatch."""
    return lambda *args: sys.modules["verl_omni.workers.utils.losses"].call(*args)


def config(mode, sde_type="sde", **kwargs):
    options = {"kl_mask_threshold": THRESHOLD, "clip_ratio": GUARD_CLIP if mode == "grpo_guard" else CLIP}
    options["adv_clip_max"] = ADVANTAGE_CLIP
    return standin.ActorConfig(
        diffusion_loss=standin.DiffusionLossConfig(loss_mode=mode, **{**options, **kwargs.pop("loss", {})}),
        model_config=standin.ModelConfig(algo=standin.AlgoConfig(sde_type=sde_type)),
        **kwargs,
    )


def their_std_dev_t(sde_type, replayed):
    """verl-omni's step returns the standard deviation itself for CPS and Dance."""
    return replayed.std_dev_t if sde_type == "sde" else replayed.std


def batch(r, sde_type, new, *, weights=False, reference=False):
    model_output = {
        "log_probs": new.log_prob,
        "prev_sample_mean": new.mean,
        "std_dev_t": their_std_dev_t(sde_type, new),
        "sqrt_dt": new.sqrt_dt.flatten(),
    }
    data = {"old_log_probs": r.old.log_prob, "advantages": r.advantages, "old_prev_sample_mean": r.old.mean}
    if weights:
        data["rollout_is_weights"] = r.weights
    if reference:
        data["ref_prev_sample_mean"] = r.reference.mean
    return model_output, data


def theirs(r, mode, sde_type, *, exact=True, weights=False, add_kl_coefficient=True):
    """verl-omni's formula; ``exact`` corrects the sigma that it gets wrong for CPS and Dance."""
    v = r.leaf()
    new, old = r.replay(v), r.old
    std_dev_t, sqrt_dt = their_std_dev_t(sde_type, new), new.sqrt_dt.flatten()
    w = r.weights if weights else None
    if mode in ("flow_grpo", "dance_grpo"):
        result = conventions.verl_omni_flow_grpo(
            new.log_prob, old.log_prob, r.advantages, clip_ratio=CLIP, adv_clip_max=ADVANTAGE_CLIP, weights=w
        )
    elif mode == "flow_dppo":
        if exact and sde_type != "sde":
            std_dev_t = std_dev_t / new.sqrt_dt
        result = conventions.verl_omni_flow_dppo(
            new.log_prob, old.log_prob, new.mean, old.mean, std_dev_t, sqrt_dt, r.advantages,
            kl_mask_threshold=THRESHOLD, add_kl_coefficient=add_kl_coefficient, weights=w,
        )  # fmt: skip
    else:
        result = conventions.verl_omni_grpo_guard(
            new.log_prob, old.log_prob, new.mean, old.mean, std_dev_t, sqrt_dt, r.advantages,
            clip_ratio=GUARD_CLIP, adv_clip_max=ADVANTAGE_CLIP, weights=w,
        )  # fmt: skip
    return outcome(result[0], v, result[1])


def ours(r, mode, sde_type, call, *, weights=False, loss=None):
    v = r.leaf()
    loss, metrics = call(config(mode, sde_type, loss=loss or {}), *batch(r, sde_type, r.replay(v), weights=weights))
    return outcome(loss, v, metrics)


MODES = ["flow_dppo", "flow_grpo", "dance_grpo", "grpo_guard"]


@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_losses_in_float64(verl_omni, call, sde_type, mode, weights):
    """Same loss, gradient and ``actor/`` metrics; where verl-omni's sigma is wrong, the flag gives it back."""
    r = record(SAMPLERS[sde_type], LATENTS["packed"], index=STEPS if mode != "grpo_guard" else 2)
    verl_omni.register(backend="reference", fused_step=False)
    exact = theirs(r, mode, sde_type, weights=weights)
    if mode == "grpo_guard" and sde_type != "sde":
        check_guard(r, sde_type, call, weights)
    else:
        check(ours(r, mode, sde_type, call, weights=weights), exact, scale=8.0)
    verl_omni.register(backend="reference", fused_step=False, sigma="verl-omni", guard_scale="batch")
    as_is = theirs(r, mode, sde_type, exact=False, weights=weights)
    check(ours(r, mode, sde_type, call, weights=weights), as_is, scale=8.0)


def check_guard(r, sde_type, call, weights):
    """GRPO-Guard as published, ``exp(S * mean(e*u))`` over ``-dt``, with a Gaussian log-ratio under every sampler."""
    v = r.leaf()
    new, old = r.replay(v), r.old
    density = [conventions.gaussian_log_prob(r.next_state, x.mean, x.std) for x in (new, old)]
    loss, _ = conventions.flow_grpo_guard(
        *density, new.mean, old.mean, new.std / new.sqrt_dt, new.sqrt_dt,
        r.advantages, clip_range=GUARD_CLIP, adv_clip_max=ADVANTAGE_CLIP, bias="row",
    )  # fmt: skip
    if not weights:
        check(ours(r, "grpo_guard", sde_type, call), outcome(loss, v, {}), scale=8.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
def test_losses_in_float32(verl_omni, call, shape, mode):
    r = record("flow_sde", shape).to(torch.float32)
    verl_omni.register(fused_step=False)
    exact, eager = theirs(r.to(torch.float64), mode, "sde"), theirs(r, mode, "sde")
    check(ours(r, mode, "sde", call), exact, eager)


def test_the_sigma_flag_matters(verl_omni, call):
    """verl-omni's KL under CPS is larger by 1/|dt|, and masks more."""
    r = record("cps", LATENTS["image"])
    verl_omni.register(fused_step=False)
    right = ours(r, "flow_dppo", "cps", call).metrics["actor/kl_new_old_mean"]
    verl_omni.register(fused_step=False, sigma="verl-omni")
    wrong = ours(r, "flow_dppo", "cps", call).metrics["actor/kl_new_old_mean"]
    dt = float(r.levels[0][0] - r.levels[1][0])
    assert float(wrong / right) == pytest.approx(1.0 / dt, rel=1e-6)


def test_unscaled_mask(verl_omni, call):
    r = record("flow_sde", LATENTS["image"])
    verl_omni.register(backend="reference", fused_step=False)
    loss = {"add_kl_coefficient": False, "kl_mask_threshold": 1e-3}
    v = r.leaf()
    new, old = r.replay(v), r.old
    expected = conventions.verl_omni_flow_dppo(
        new.log_prob, old.log_prob, new.mean, old.mean, new.std_dev_t, new.sqrt_dt.flatten(), r.advantages,
        kl_mask_threshold=1e-3, add_kl_coefficient=False,
    )  # fmt: skip
    assert 0.0 < expected[1]["actor/masked_fraction"] < 0.5
    check(ours(r, "flow_dppo", "sde", call, loss=loss), outcome(expected[0], v, expected[1]), scale=8.0)


def test_guard_with_rows_of_one_step_or_batch_means(verl_omni, call):
    """``guard_scale`` only matters where rows of a call are at different steps."""
    mixed, same = record("flow_sde", LATENTS["image"], index=STEPS), record("flow_sde", LATENTS["image"])
    verl_omni.register(backend="reference", fused_step=False)
    row = [ours(r, "grpo_guard", "sde", call).loss for r in (mixed, same)]
    verl_omni.register(backend="reference", fused_step=False, guard_scale="batch")
    whole = [ours(r, "grpo_guard", "sde", call).loss for r in (mixed, same)]
    torch.testing.assert_close(row[1], whole[1], rtol=1e-11, atol=0.0)
    assert abs(float(row[0] - whole[0])) > 1e-4


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_reference_kl(verl_omni, call, sde_type, shape):
    """Beside the policy loss, with its own coefficient; exact on request."""
    r = record(SAMPLERS[sde_type], shape)
    settings = config("flow_grpo", sde_type, use_kl_loss=True, kl_loss_coef=0.3)
    for with_dt in (False, True):
        verl_omni.register(backend="reference", fused_step=False, kl_with_dt=with_dt)
        v = r.leaf()
        new, old = r.replay(v), r.old
        policy, metrics = conventions.verl_omni_flow_grpo(
            new.log_prob, old.log_prob, r.advantages, clip_ratio=CLIP, adv_clip_max=ADVANTAGE_CLIP
        )
        std = new.std if with_dt else their_std_dev_t(sde_type, new)
        kl, kl_metrics = conventions.verl_omni_kl(new.mean, r.reference.mean, std)
        exact = outcome(policy + 0.3 * kl, v, {**metrics, **kl_metrics})
        v = r.leaf()
        loss, metrics = call(settings, *batch(r, sde_type, r.replay(v), reference=True))
        check(outcome(loss, v, metrics), exact, scale=8.0)


@pytest.mark.parametrize("mode", ["flow_dppo", "grpo_guard"])
@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_log_ratio_from_the_means(verl_omni, call, sde_type, mode):
    """The scheduler step leaves the state beside the mean; loss and gradient in the velocity are those from
    log-probs."""
    r = record(SAMPLERS[sde_type], LATENTS["packed"], index=STEPS).to(torch.float32)
    scheduler = sys.modules["verl_omni.pipelines.schedulers.flow_match_sde"].FlowMatchSDEDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)

    def replay(velocity):
        _, log_prob, mean, std_dev_t, sqrt_dt = verl_omni.sample_previous_step(
            scheduler, r.state, velocity, scheduler.timesteps[r.index], noise_level=ETA,
            prev_sample=r.next_state, sde_type=sde_type, return_sqrt_dt=True,
        )  # fmt: skip
        return {"log_probs": log_prob, "prev_sample_mean": mean, "std_dev_t": std_dev_t, "sqrt_dt": sqrt_dt}

    old = replay(r.old_velocity)
    data = {
        "old_log_probs": old["log_probs"],
        "old_prev_sample_mean": old["prev_sample_mean"],
        "advantages": r.advantages,
        "rollout_is_weights": r.weights,
    }
    results = []
    for log_ratio in ("log_probs", "means"):
        verl_omni.register(log_ratio=log_ratio)
        v = r.leaf()
        results.append(outcome(*_swap(call(config(mode, sde_type), replay(v), data), v)))
    assert results[0].metrics.keys() == results[1].metrics.keys()
    size = float(results[0].grad.abs().max())
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1].grad, results[0].grad, rtol=1e-3, atol=1e-4 * size)
    # without an update it is exact, which differences of log-probs are only by luck
    on_policy = call(config(mode, sde_type), replay(r.old_velocity.clone().requires_grad_()), data)[1]
    assert (on_policy["actor/ratio_mean"], on_policy["actor/ratio_std"]) == (1.0, 0.0)
    detour = {**replay(r.velocity), "prev_sample_mean": old["prev_sample_mean"] + 0.0}
    with pytest.raises(ValueError, match="did not make, expected one of it"):
        call(config(mode, sde_type), detour, data)


def _swap(result, v):
    loss, metrics = result
    return loss, v, metrics


def test_numbers_of_the_step_may_be_scalars(verl_omni, call):
    """0-d ``std_dev_t`` and ``sqrt_dt``, as the sequential loop returns them."""
    verl_omni.register(fused_step=False)
    r = record("flow_sde", LATENTS["packed"])
    for mode in ("flow_dppo", "grpo_guard"):
        model_output, data = batch(r, "sde", r.replay(r.velocity))
        full, _ = call(config(mode), model_output, data)
        model_output["std_dev_t"], model_output["sqrt_dt"] = r.old.std_dev_t.flatten()[0], r.old.sqrt_dt.flatten()[0]
        scalar, _ = call(config(mode), model_output, data)
        torch.testing.assert_close(scalar, full)


def test_metric_names_and_required_keys_are_theirs(verl_omni, call):
    verl_omni.register(fused_step=False)
    r = record("flow_sde", LATENTS["packed"])
    for mode in MODES:
        names = theirs(r, mode, "sde").metrics.keys()
        assert ours(r, mode, "sde", call).metrics.keys() == names
    model_output, data = batch(r, "sde", r.replay(r.velocity))
    for key in ("prev_sample_mean", "sqrt_dt"):
        with pytest.raises(KeyError, match=key):
            call(config("flow_dppo"), {k: v for k, v in model_output.items() if k != key}, data)
    data.pop("old_prev_sample_mean")
    with pytest.raises(KeyError, match="old_prev_sample_mean"):
        call(config("flow_dppo"), model_output, data)


@pytest.mark.parametrize("mode", MODES)
def test_a_backend_that_is_named_runs_or_is_an_error(verl_omni, call, mode):
    verl_omni.register(backend="triton", fused_step=False)
    r = record("flow_sde", LATENTS["packed"])
    with pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        call(config(mode), *batch(r, "sde", r.replay(r.velocity)))


def test_register_replaces_and_unregister_restores(verl_omni):
    registry = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DIFFUSION_LOSS_REGISTRY
    scheduler = sys.modules["verl_omni.pipelines.schedulers.flow_match_sde"].FlowMatchSDEDiscreteScheduler
    before, step = dict(registry), scheduler.sample_previous_step
    verl_omni.register(losses=("flow_dppo",), sde_type="sde")
    verl_omni.register(losses=("flow_dppo",), sde_type="cps")
    assert type(registry["flow_dppo"]).options.sde_type == "cps"
    assert registry["grpo_guard"] is before["grpo_guard"]
    assert isinstance(registry["flow_dppo"], type(before["flow_dppo"]))
    assert scheduler.sample_previous_step is verl_omni.sample_previous_step
    verl_omni.unregister()
    assert registry == before
    assert scheduler.sample_previous_step is step
    registry["flow_dppo"] = before["grpo_guard"]
    verl_omni.unregister()
    assert registry["flow_dppo"] is before["grpo_guard"]


def test_the_plugin_registers_on_import(verl_omni, monkeypatch):
    """All five losses, with the flags that the environment has."""
    name = "flowdppo_fast.integrations.verl_omni_plugin"
    monkeypatch.setenv("FLOWDPPO_VERL_OMNI", "log_ratio=means, kl_with_dt=true")
    monkeypatch.delitem(sys.modules, name, raising=False)
    plugin = importlib.import_module(name)
    del sys.modules[name]
    registry = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DIFFUSION_LOSS_REGISTRY
    assert set(registry) == {"flow_dppo", "flow_grpo", "dance_grpo", "grpo_guard", "kl"}
    for loss, replaced in registry.items():
        assert isinstance(replaced, verl_omni._LOSSES[loss])
        assert replaced.options == verl_omni.Options(log_ratio="means", kl_with_dt=True)
    assert plugin.options_of("") == verl_omni.Options()
    for wrong in ("log_ratio", "ratio=means"):
        with pytest.raises(
            ValueError, match=f"FLOWDPPO_VERL_OMNI: got '{wrong}', expected name=value with one of backend"
        ):
            plugin.options_of(wrong)
    with pytest.raises(ValueError, match="kl_with_dt: got 'yes', expected one of False, True"):
        plugin.options_of("kl_with_dt=yes")


def test_wrong_flags_are_named(verl_omni, call):
    with pytest.raises(ValueError, match="losses: got 'dpo', expected some of 'flow_dppo'"):
        verl_omni.register(losses=("dpo",))
    with pytest.raises(ValueError, match="sigma: got 'right', expected one of 'exact', 'verl-omni'"):
        verl_omni.register(sigma="right")
    for flag in ({"guard_scale": "batch"}, {"sigma": "verl-omni"}):
        with pytest.raises(ValueError, match="log_ratio: got 'means' with sigma="):
            verl_omni.register(log_ratio="means", **flag)
    verl_omni.register(fused_step=False)
    r = record("flow_sde", LATENTS["packed"])
    settings = config("flow_dppo", "ode")
    with pytest.raises(ValueError, match=r"sde_type: got 'ode' from config.*register\(sde_type=...\)"):
        call(settings, *batch(r, "sde", r.replay(r.velocity)))


@pytest.mark.parametrize("model_config", [None, {}, standin.ModelConfig(algo=None), standin.ModelConfig(algo={})])
@pytest.mark.parametrize("mode", ["flow_dppo", "grpo_guard"])
def test_a_config_without_sde_type_is_sde(verl_omni, call, mode, model_config):
    """verl-omni's default for the key; a worker of one's own, or a loss called alone, may not have it at all."""
    verl_omni.register(backend="reference", fused_step=False)
    r = record("flow_sde", LATENTS["packed"])
    v = r.leaf()
    settings = config(mode)
    settings.model_config = model_config
    loss, metrics = call(settings, *batch(r, "sde", r.replay(v)))
    check(outcome(loss, v, metrics), theirs(r, mode, "sde"), scale=8.0)


# ---- the scheduler step


@pytest.fixture
def scheduler(verl_omni):
    verl_omni.register()
    made = sys.modules["verl_omni.pipelines.schedulers.flow_match_sde"].FlowMatchSDEDiscreteScheduler(shift=3.0)
    made.set_timesteps(10)
    return made


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_replayed_step(scheduler, sde_type, shape):
    """The adapters' call: per-row timesteps, all five results, gradients through mean and log-prob."""
    index = [0, 1, 2, 3, 4, 5, 6, 7]
    r = record(SAMPLERS[sde_type], shape, index=index).to(torch.float32)
    sigmas = scheduler.sigmas.tolist()

    def convention(dtype):
        v = r.velocity.to(dtype).requires_grad_()
        levels = torch.tensor(sigmas, dtype=dtype)
        out = conventions.replay(
            SAMPLERS[sde_type], r.state.to(dtype), v, r.next_state.to(dtype),
            levels[index], levels[[i + 1 for i in index]], ETA, sigmas,
        )  # fmt: skip
        values = {
            "mean": out.mean,
            "log_prob": out.log_prob,
            "std_dev_t": their_std_dev_t(sde_type, out),
            "sqrt_dt": out.sqrt_dt.flatten(),
        }
        return outcome(out.log_prob.sum() + out.mean.sum(), v, values)

    v = r.leaf()
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = scheduler.sample_previous_step(
        sample=r.state, model_output=v, timestep=scheduler.timesteps[index], noise_level=ETA,
        prev_sample=r.next_state, sde_type=sde_type, return_logprobs=True, return_sqrt_dt=True,
        generator=torch.Generator(),
    )  # fmt: skip
    assert torch.equal(prev_sample, r.next_state)
    values = {"mean": mean, "log_prob": log_prob, "std_dev_t": std_dev_t, "sqrt_dt": sqrt_dt}
    assert std_dev_t.shape == (8, *(1,) * len(shape))
    check(outcome(log_prob.sum() + mean.sum(), v, values), convention(torch.float64), convention(torch.float32))


@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_sequential_loop(scheduler, sde_type):
    """``step`` without timesteps in the call: 0-d numbers, ``sqrt_dt [B]``, noise of the generator, log-prob on
    request."""
    r = record(SAMPLERS[sde_type], LATENTS["packed"]).to(torch.float32)
    options = {"noise_level": ETA, "sde_type": sde_type}
    scheduler.step(r.velocity, scheduler.timesteps[0], r.state, noise_level=0.0, sde_type=sde_type)
    drawn, _, mean, std_dev_t, sqrt_dt = scheduler.step(
        r.velocity, scheduler.timesteps[1], r.state, generator=torch.Generator().manual_seed(3),
        return_sqrt_dt=True, **options,
    )  # fmt: skip
    assert scheduler.step_index == 2
    assert std_dev_t.shape == ()
    assert sqrt_dt.shape == (8,)
    noise = torch.randn(r.state.shape, generator=torch.Generator().manual_seed(3))
    std = std_dev_t * sqrt_dt[0] if sde_type == "sde" else std_dev_t
    torch.testing.assert_close(drawn, mean + std * noise)
    without = scheduler.step(r.velocity, None, r.state, return_logprobs=False, **options)
    assert without[1] is None
    if sde_type != "cps":
        arguments = {"sample": r.state, "model_output": r.velocity, "prev_sample": r.next_state, **options}
        bare = scheduler.sample_previous_step(include_logprob_normalizer=False, **arguments)
        full = scheduler.sample_previous_step(**arguments)
        std = full[3] if sde_type == "dance_sde" else full[3] * torch.sqrt(-(scheduler.sigmas[4] - scheduler.sigmas[3]))
        constant = torch.log(std) + torch.log(torch.sqrt(torch.tensor(2.0 * torch.pi)))
        torch.testing.assert_close(bare[1], full[1] + constant, rtol=1e-5, atol=1e-6)


def test_noise_levels_may_differ_by_row(scheduler):
    """A window per sample: rows outside it take the ODE step."""
    r = record("flow_sde", LATENTS["packed"], rows=2).to(torch.float32)
    drawn, _, _, std_dev_t = scheduler.sample_previous_step(
        r.state, r.velocity, timestep=scheduler.timesteps[[2, 2]], noise_level=torch.tensor([ETA, 0.0])
    )
    dt = scheduler.sigmas[3] - scheduler.sigmas[2]
    torch.testing.assert_close(drawn[1], (r.state + dt * r.velocity)[1])
    assert std_dev_t.flatten()[1] == 0.0
    assert std_dev_t.flatten()[0] > 0.0


def test_step_refuses_what_verl_omni_refuses(scheduler):
    x = torch.zeros(1, 4)
    with pytest.raises(NotImplementedError, match="per_token_timesteps"):
        scheduler.sample_previous_step(x, x, per_token_timesteps=x)
    with pytest.raises(ValueError, match="sde_type: got 'ode'"):
        scheduler.sample_previous_step(x, x, sde_type="ode")


# ---- how much runs


class Operations(TorchDispatchMode):
    """Counts what computes: no views, no bare allocations; apart where a tensor of ``latents`` elements takes part."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents, self.on_latents, self.on_rows = latents, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not views and "empty" not in op.__name__:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            if any(x.numel() >= self.latents for x in tensors):
                self.on_latents += 1
            else:
                self.on_rows += 1
        return result


def test_operations_of_their_formula():
    """What docs/integrations/verl_omni.md says of verl-omni's ``flow_dppo`` under ``sde``, four samples."""
    r = record("flow_sde", LATENTS["packed"], rows=4, index=[1, 1, 3, 3]).to(torch.float32)
    v, old = r.leaf(), r.old
    new = r.replay(v)
    with Operations(v.numel()) as ran:
        loss, _ = conventions.verl_omni_flow_dppo(
            new.log_prob, old.log_prob, new.mean, old.mean, new.std_dev_t, new.sqrt_dt.flatten(), r.advantages,
            kl_mask_threshold=THRESHOLD, add_kl_coefficient=True,
        )  # fmt: skip
    assert (ran.on_latents, ran.on_rows) == (4, 43)
    with Operations(v.numel()) as ran:
        loss.backward()
    assert (ran.on_latents, ran.on_rows) == (11, 6)


@pytest.mark.parametrize(
    ("log_ratio", "forward", "backward"), [("log_probs", (1, 10), (1, 12)), ("means", (1, 9), (2, 3))]
)
def test_operations_of_a_loss(verl_omni, call, log_ratio, forward, backward):
    """What the page says of this code; backward through the step, too."""
    require(CPU)
    verl_omni.register(log_ratio=log_ratio)
    scheduler = sys.modules["verl_omni.pipelines.schedulers.flow_match_sde"].FlowMatchSDEDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    index = [1, 1, 3, 3]
    r = record("flow_sde", LATENTS["packed"], rows=4, index=index).to(torch.float32)
    v = r.leaf()
    _, log_prob, mean, std_dev_t, sqrt_dt = scheduler.sample_previous_step(
        sample=r.state, model_output=v, timestep=scheduler.timesteps[index], noise_level=ETA,
        prev_sample=r.next_state, sde_type="sde", return_logprobs=True, return_sqrt_dt=True,
    )  # fmt: skip
    output = {"log_probs": log_prob, "prev_sample_mean": mean, "std_dev_t": std_dev_t, "sqrt_dt": sqrt_dt}
    data = {"old_log_probs": r.old.log_prob, "advantages": r.advantages, "old_prev_sample_mean": r.old.mean}
    with Operations(v.numel()) as ran:
        loss, _ = call(config("flow_dppo"), output, data)
    assert (ran.on_latents, ran.on_rows) == forward
    with Operations(v.numel()) as ran:
        loss.backward()
    assert (ran.on_latents, ran.on_rows) == backward
