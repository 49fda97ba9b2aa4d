"""UniRL: strategies and algorithm through a stand-in of its interface (two versions), against its formulas."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch

import flowdppo_fast as fast

from . import conventions
from .recorded import ETA, LATENTS, SIGMAS, check, outcome, record
from .standins import installed
from .standins import unirl as standin

STRATEGIES = {"flow_sde": "FlowSDEStrategy", "cps": "CPSSDEStrategy", "dance": "DanceSDEStrategy"}
NAME = "flowdppo_fast.integrations.unirl"
# the first one starts at sigma == 1
STEPS = [0, 2, 4]
ROWS = 4
THRESHOLD = 1e-3


@pytest.fixture(params=["june", "september"])
def version(request):
    return request.param


@pytest.fixture
def unirl(version):
    with installed(standin.build(version), NAME) as integration:
        yield integration


def make_stage(unirl, sampler, *, shape=(3, 5), dtype=torch.float64, trajectory=None, means=None, batched=False):
    trajectory = trajectory or dtype
    return standin.Stage(
        model=standin.Model(shape[-1], dtype),
        strategy=getattr(unirl, STRATEGIES[sampler])(config=None),
        sigmas=torch.tensor(SIGMAS),
        sde_indices=STEPS,
        trajectory_dtype=trajectory,
        mean_dtype=means or dtype,
        batch_replay_steps=batched,
    )


def rollout(stage, shape=(3, 5), seed=0):
    x = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed)).to(stage.trajectory_dtype)
    torch.manual_seed(seed)
    return stage.diffuse(x, standin.Params(ETA))


def update(stage, size=0.5):
    """An optimizer step's worth of change."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        stage.model.lora_a += size * torch.randn(stage.model.lora_a.shape, generator=g).to(stage.model.lora_a)


def algorithm(unirl, stage, **options):
    return unirl.FlowDPPO(
        **{"params": standin.Params(ETA), "stage": stage, "kl_mask_threshold": THRESHOLD, "loss_backend": "reference"}
        | options
    )


ADVANTAGES = torch.tensor([1.0, -0.7, 0.4, -1.3], dtype=torch.float64)


def run(algo, segment, advantages=ADVANTAGES, loss_scale=0.5):
    algo.stage.model.lora_a.grad = None
    result = algo.compute_loss_and_backward(
        conditions={}, segment=segment, advantages=advantages, training_progress=0.0, loss_scale=loss_scale
    )
    return result, algo.stage.model.lora_a.grad


def theirs(stage, segment, sampler, *, add_kl_coefficient=True, beta=0.0, threshold=THRESHOLD, advantages=ADVANTAGES):
    """UniRL's formula on an independent replay of the segment: loss, gradient in the weights, metrics."""
    model, columns = stage.model, []
    for j, i in enumerate(STEPS):
        x, levels = segment.latents_at(i), torch.tensor(SIGMAS, dtype=torch.float64)
        arguments = (x.double(), segment.latents_at(i + 1).double(), levels[i].expand(ROWS), levels[i + 1].expand(ROWS))

        def replay(velocity, arguments=arguments):
            state, after, sigma, sigma_next = arguments
            return conventions.replay(sampler, state, velocity.double(), after, sigma, sigma_next, ETA, SIGMAS)

        new = replay(model(x, stage.sigmas[i]))
        model.enabled = False
        reference = replay(model(x, stage.sigmas[i])).mean.detach()
        model.enabled = True
        columns.append(
            (new.log_prob, new.mean, segment.sde_logp[:, j], segment.sde_means[:, j], new.std.flatten(), reference)
        )
    log_prob, mean, old_log_prob, old_mean, std, reference = (torch.stack(c, 1) for c in zip(*columns))
    loss, metrics = conventions.unirl_flow_dppo(
        log_prob, old_log_prob.double(), mean, old_mean.double(), std, advantages,
        threshold=threshold, add_kl_coefficient=add_kl_coefficient,
    )  # fmt: skip
    if beta > 0.0:
        kl = conventions.unirl_reference_kl(mean, reference, std)
        loss = loss + beta * kl
        metrics["kl_ref_mean"] = kl.detach()
    (grad,) = torch.autograd.grad(loss, model.lora_a)
    return loss.detach(), grad, metrics


def assert_same(result, grad, expected, rtol=1e-9):
    loss, expected_grad, metrics = expected
    assert result.loss == pytest.approx(float(loss), rel=rtol, abs=1e-12)
    torch.testing.assert_close(grad, 0.5 * expected_grad, rtol=rtol, atol=1e-9 * float(expected_grad.abs().max()))
    for name, value in metrics.items():
        assert result.metrics[name] == pytest.approx(float(value), rel=rtol, abs=1e-12), name


# ---- the algorithm


@pytest.mark.parametrize("log_ratio", ["log_probs", "means"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 5), (2, 3, 2, 5)], ids=LATENTS)
@pytest.mark.parametrize("sampler", STRATEGIES)
def test_loss_gradient_and_metrics(unirl, sampler, shape, log_ratio):
    """Float64, all stochastic steps of a micro-batch at once, image, packed and video latents."""
    stage = make_stage(unirl, sampler, shape=shape)
    segment = rollout(stage, shape)
    algo = algorithm(unirl, stage, log_ratio=log_ratio)
    algo.prepare_segment(conditions={}, segment=segment)
    update(stage)
    result, grad = run(algo, segment)
    expected = theirs(stage, segment, sampler)
    assert 0.0 < expected[2]["masked_fraction"] < 1.0
    assert_same(result, grad, expected)
    assert result.num_steps_or_tokens == len(STEPS)
    assert result.has_backward
    theirs_metrics = {*expected[2], "kl_mask_threshold"}
    assert result.metrics.keys() == theirs_metrics
    assert all(type(value) is float for value in result.metrics.values())


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("log_ratio", ["log_probs", "means"])
def test_on_policy_is_exact(unirl, log_ratio):
    """Nothing moved: every ratio is 1 and every KL 0, bit for bit, in float32 with bfloat16 trajectories."""
    stage = make_stage(unirl, "flow_sde", dtype=torch.float32, trajectory=torch.bfloat16)
    segment = rollout(stage)
    algo = algorithm(unirl, stage, log_ratio=log_ratio, old_logp_source="replay", loss_backend="auto")
    algo.prepare_segment(conditions={}, segment=segment)
    result, _ = run(algo, segment)
    assert result.metrics["ratio_min"] == result.metrics["ratio_max"] == 1.0
    assert result.metrics["kl_new_old_max"] == 0.0
    # the log-probs of the rollout were taken of the rounded state, so they are the replay's to the last digits
    fresh = rollout(stage)
    replayed = stage.replay({}, segment=fresh, params=standin.Params(ETA), step_indices=STEPS)
    torch.testing.assert_close(fresh.sde_logp, replayed.log_probs.detach(), rtol=0.0, atol=1e-6)


def test_anchor_from_the_rollout(unirl):
    """No replay before the update, the same result as with one, and the train stack is told so."""
    results = []
    for anchor in ("replay", "rollout"):
        stage = make_stage(unirl, "flow_sde")
        algo = algorithm(unirl, stage, anchor=anchor)
        segment = rollout(stage)
        algo.prepare_segment(conditions={}, segment=segment)
        assert len(stage.replays) == (anchor == "replay")
        assert standin.recomputes_anchor(algo) == (anchor == "replay")
        update(stage)
        results.append(run(algo, segment))
    assert results[0][0].loss == pytest.approx(results[1][0].loss, rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-9)


def test_rollout_velocities_are_kept_in_the_models_dtype(unirl):
    stage = make_stage(unirl, "cps", dtype=torch.float32, trajectory=torch.bfloat16)
    stage.model.to(torch.bfloat16)
    algo = algorithm(unirl, stage, anchor="rollout")
    segment = rollout(stage)
    assert segment.sde_means.dtype == torch.bfloat16
    assert segment.sde_means.shape == (ROWS, len(STEPS), 3, 5)
    algo.prepare_segment(conditions={}, segment=segment)
    assert segment.sde_means.dtype == torch.float32
    replayed = stage.replay({}, segment=segment, params=standin.Params(ETA), step_indices=STEPS).prev_sample_means
    torch.testing.assert_close(segment.sde_means, replayed.detach(), rtol=1e-5, atol=1e-5)
    unirl.record_rollout_velocities(stage)
    assert rollout(stage).sde_means.shape == segment.sde_means.shape


def test_anchor_options_are_checked(unirl):
    stage = make_stage(unirl, "flow_sde")
    with pytest.raises(ValueError, match="anchor: got 'none'"):
        algorithm(unirl, stage, anchor="none")
    with pytest.raises(ValueError, match="log_ratio: got 'none'"):
        algorithm(unirl, stage, log_ratio="none")
    with pytest.raises(ValueError, match="backward: got 'none', expected 'segment' or 'step'"):
        algorithm(unirl, stage, backward="none")
    with pytest.raises(ValueError, match="old_logp_source: got 'replay' with anchor='rollout'"):
        algorithm(unirl, stage, anchor="rollout", old_logp_source="replay")
    theirs = sys.modules["unirl.sde.kernels"].FlowSDEStrategy()
    with pytest.raises(TypeError, match=r"pipeline\.strategy: got FlowSDEStrategy"):
        algorithm(
            unirl,
            standin.Stage(stage.model, theirs, stage.sigmas, STEPS, torch.float32, torch.float32),
            anchor="rollout",
        )
    algo = algorithm(unirl, stage, anchor="rollout")
    segment = rollout(stage)
    segment.sde_means = None
    with pytest.raises(RuntimeError, match="left no velocities or log-probs"):
        algo.prepare_segment(conditions={}, segment=segment)
    stage.sde_indices = [*STEPS, 7]
    stage.diffuse.stage.strategy.recorded = None
    rollout(stage)
    stage.diffuse.inner = lambda *args: standin.LatentSegment(sde_indices=torch.tensor([0]))
    with pytest.raises(RuntimeError, match="recorded 0 stochastic steps of a rollout that lists 1"):
        stage.diffuse(None)
    assert stage.strategy.recorded is None


def test_bfloat16_means_cannot_give_the_log_ratio(unirl):
    """UniRL's June tree casts replayed means to the trajectory dtype."""
    stage = make_stage(unirl, "flow_sde", dtype=torch.float32, means=torch.bfloat16)
    segment = rollout(stage)
    algo = algorithm(unirl, stage, log_ratio="means")
    algo.prepare_segment(conditions={}, segment=segment)
    with pytest.raises(ValueError, match=r"log_ratio: got 'means' with torch\.bfloat16"):
        run(algo, segment)
    result, _ = run(algorithm(unirl, stage), segment)
    assert result.metrics["kl_new_old_max"] == 0.0


def test_unscaled_mask_and_empty_segments(unirl):
    stage = make_stage(unirl, "flow_sde")
    segment = rollout(stage)
    algo = algorithm(unirl, stage, add_kl_coefficient=False, kl_mask_threshold=1e-3)
    algo.prepare_segment(conditions={}, segment=segment)
    update(stage)
    expected = theirs(stage, segment, "flow_sde", add_kl_coefficient=False, threshold=1e-3)
    assert 0.0 < expected[2]["masked_fraction"] < 1.0
    assert_same(*run(algo, segment), expected)
    segment.sde_indices = None
    result, grad = run(algo, segment)
    assert (result.loss, result.has_backward, grad) == (0.0, False, None)


def test_missing_means_are_an_error(unirl):
    stage = make_stage(unirl, "flow_sde")
    segment, algo = rollout(stage), algorithm(unirl, stage)
    stage.replay = lambda *args, **kwargs: standin.ReplayResult(torch.zeros(ROWS, 3))
    with pytest.raises(RuntimeError, match="prev_sample_means: the stage's replay returned None"):
        run(algo, segment)


def test_stage_from_the_pipeline_and_pickling(unirl, version):
    """Hydra hands over the pipeline; Ray pickles classes by name."""
    stage = make_stage(unirl, "flow_sde")
    pipeline = type("Pipeline", (), {"diffusion": stage})()
    algo = unirl.FlowDPPO(params=standin.Params(ETA), pipeline=pipeline, anchor="rollout")
    assert algo.stage is stage
    assert algo.anchor_fields == ("sde_logp", "sde_means")
    assert pickle.loads(pickle.dumps(unirl.FlowDPPO)) is unirl.FlowDPPO
    assert standin.recomputes_anchor(algo) is False


@pytest.mark.parametrize("kind", ["method", "class attribute", "instance attribute", "property", "none"])
def test_whichever_way_the_train_stack_asks_for_the_anchor(kind):
    """UniRL's trees ask in several ways; a rollout anchor is never replayed, and a replayed one is as UniRL says."""
    modules = standin.build("september")
    theirs = next(m for m in modules if m.__name__ == "unirl.algorithms.flowdppo").FlowDPPO
    del theirs.recomputes_anchor
    before = theirs.__init__

    def init(self, **options):
        before(self, **options)
        self.recomputes_anchor = True

    ways = {"method": lambda self: True, "class attribute": True, "property": property(lambda self: True)}
    if kind in ways:
        theirs.recomputes_anchor = ways[kind]
    elif kind == "instance attribute":
        theirs.__init__ = init
    with installed(modules, NAME) as unirl:
        for anchor in ("replay", "rollout"):
            algo = algorithm(unirl, make_stage(unirl, "flow_sde"), anchor=anchor)
            assert callable(algo.recomputes_anchor) == (kind == "method")
            assert standin.recomputes_anchor(algo) is (anchor == "replay")


class FlashSDEStrategy:
    """A strategy that this module has no formula of, under a name of its own."""

    canonical_name = "flash"

    def transition_std(self, *, sigma, sigma_next, eta, sigma_max):
        return eta * (0.1 + 0.9 * sigma) * torch.sqrt(sigma - sigma_next)

    def denoise(self, noise_pred, sample, sigma, sigma_next, *, eta, prev_sample, sigma_max, step_index=0):
        dt = sigma_next - sigma
        std = self.transition_std(sigma=sigma, sigma_next=sigma_next, eta=eta, sigma_max=sigma_max)
        mean = sample + dt * noise_pred
        if eta == 0.0:
            return mean, None, mean
        drawn = mean + std * torch.randn_like(mean) if prev_sample is None else prev_sample
        return drawn, conventions.gaussian_log_prob(drawn, mean, std), mean


@pytest.mark.parametrize("log_ratio", ["log_probs", "means"])
def test_a_strategy_of_another_name_brings_its_own_std(unirl, version, log_ratio):
    stage = make_stage(unirl, "flow_sde")
    stage.strategy = FlashSDEStrategy()
    segment = rollout(stage)
    algo = algorithm(unirl, stage, log_ratio=log_ratio)
    algo.prepare_segment(conditions={}, segment=segment)
    update(stage)
    replayed = stage.replay({}, segment=segment, params=standin.Params(ETA), step_indices=STEPS)
    levels = torch.tensor(SIGMAS, dtype=torch.float64)
    now, after = levels[STEPS], levels[[i + 1 for i in STEPS]]
    std = stage.strategy.transition_std(sigma=now, sigma_next=after, eta=ETA, sigma_max=None)
    loss, metrics = conventions.unirl_flow_dppo(
        replayed.log_probs, segment.sde_logp, replayed.prev_sample_means, segment.sde_means,
        std.expand(ROWS, -1), ADVANTAGES, threshold=THRESHOLD,
    )  # fmt: skip
    assert 0.0 < metrics["masked_fraction"] < 1.0
    (grad,) = torch.autograd.grad(loss, stage.model.lora_a)
    # the log-probs of the stand-in are at its own float32 levels
    assert_same(*run(algo, segment), (loss.detach(), grad, metrics), rtol=1e-5)
    stage.strategy = type("Mine", (), {"canonical_name": "mine", "denoise": stage.strategy.denoise})()
    with pytest.raises(
        ValueError, match=r"pipeline\.strategy: got Mine \(canonical_name 'mine'\), expected one with a tr"
    ):
        run(algo, segment)


@pytest.mark.parametrize("log_ratio", ["log_probs", "means"])
@pytest.mark.parametrize("sampler", STRATEGIES)
def test_backward_per_step(unirl, version, sampler, log_ratio):
    """One step's graph at a time: a replay per step, and loss, gradient and metrics of the whole segment."""
    options = {"beta": 0.2} if version == "september" else {}
    stage = make_stage(unirl, sampler)
    if options:
        options["backend"] = standin.backend(stage.model)
    algo = algorithm(unirl, stage, backward="step", log_ratio=log_ratio, **options)
    segment = rollout(stage)
    algo.prepare_segment(conditions={}, segment=segment)
    update(stage)
    expected = theirs(stage, segment, sampler, beta=options.get("beta", 0.0))
    assert 0.0 < expected[2]["masked_fraction"] < 1.0
    stage.replays.clear()
    result, grad = run(algo, segment)
    assert set(map(tuple, stage.replays)) == {(step,) for step in STEPS}
    assert_same(result, grad, expected)
    assert result.num_steps_or_tokens == len(STEPS)
    algo.backward = "segment"
    whole, _ = run(algo, segment)
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-12, abs=1e-15)


def test_a_rollout_anchor_beside_rounded_means(unirl):
    """Replayed means in bfloat16 beside float32 ones of the rollout: their rounding is refused where it is a KL."""
    stage = make_stage(unirl, "dance", dtype=torch.float32, trajectory=torch.bfloat16, means=torch.bfloat16)
    algo = algorithm(unirl, stage, anchor="rollout", kl_mask_threshold=1e-5)
    segment = rollout(stage)
    algo.prepare_segment(conditions={}, segment=segment)
    with pytest.raises(
        ValueError, match=r"anchor: got 'rollout' with torch\.bfloat16 replayed means.*is a KL of [1-9]"
    ):
        run(algo, segment)
    algo.kl_mask_threshold = 1.0
    result, _ = run(algo, segment)
    assert 0.0 < result.metrics["kl_new_old_max"] < 0.1
    replayed = algorithm(unirl, stage, kl_mask_threshold=1e-5)
    segment = rollout(stage)
    replayed.prepare_segment(conditions={}, segment=segment)
    assert run(replayed, segment)[0].metrics["kl_new_old_max"] == 0.0


@pytest.mark.parametrize("version", ["september"], indirect=True)
def test_reference_kl_and_batched_replay(unirl):
    """``beta`` with the adapter disabled, and the step-major replay: the same numbers as step by step."""
    results = []
    for batched in (False, True):
        stage = make_stage(unirl, "dance", batched=batched)
        segment = rollout(stage)
        algo = algorithm(unirl, stage, beta=0.2, backend=standin.backend(stage.model), old_logp_source="replay")
        algo.prepare_segment(conditions={}, segment=segment)
        update(stage)
        results.append(run(algo, segment))
        expected = theirs(stage, segment, "dance", beta=0.2)
        assert float(expected[2]["kl_ref_mean"]) > 0.0
        assert_same(*results[-1], expected)
        assert results[-1][0].metrics["beta"] == 0.2
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=0.0)
    with pytest.raises(ValueError, match="requires old_logp_source='replay'"):
        algorithm(unirl, make_stage(unirl, "dance", batched=True), anchor="rollout")


# ---- strategies


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("sampler", STRATEGIES)
def test_replayed_transition(unirl, sampler, shape):
    """float32 from float32 levels: mean, log-prob and gradients, ``sigma == 1`` among the steps, levels per row."""
    index = [0, 1, 2, 3, 4, 5, 6, 7]
    r = record(sampler, shape, index=index).to(torch.float32)
    strategy = getattr(unirl, STRATEGIES[sampler])()
    assert isinstance(strategy, sys.modules["unirl.sde.kernels"].SDEStrategy)

    def convention(dtype):
        cast = r.to(dtype)
        v = cast.leaf()
        out = cast.replay(v)
        return outcome(out.log_prob.sum() + out.mean.sum(), v, {"mean": out.mean, "log_prob": out.log_prob})

    v = r.leaf()
    prev_sample, log_prob, mean = strategy.denoise(
        noise_pred=v, sample=r.state, sigma=r.levels[0], sigma_next=r.levels[1], eta=ETA,
        prev_sample=r.next_state, sigma_max=torch.tensor(SIGMAS[1]), step_index=0,
    )  # fmt: skip
    assert torch.equal(prev_sample, r.next_state)
    actual = outcome(log_prob.sum() + mean.sum(), v, {"mean": mean, "log_prob": log_prob})
    check(actual, convention(torch.float64), convention(torch.float32))


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("sampler", STRATEGIES)
def test_drawn_transition_is_scored_as_it_is_stored(unirl, sampler):
    """A bfloat16 trajectory: the state is rounded before its log-prob; deterministic steps have none."""
    strategy = getattr(unirl, STRATEGIES[sampler])()
    r = record(sampler, LATENTS["image"]).to(torch.float32)
    x, v = r.state.bfloat16(), r.velocity.bfloat16()
    levels = {"sigma": torch.tensor(SIGMAS[2]), "sigma_next": torch.tensor(SIGMAS[3]), "sigma_max": SIGMAS[1]}
    torch.manual_seed(4)
    noise = torch.randn(x.shape)
    torch.manual_seed(4)
    drawn, log_prob, mean = strategy.denoise(v, x, eta=ETA, **levels)
    assert drawn.dtype == mean.dtype == torch.float32
    assert torch.equal(drawn, drawn.bfloat16().float())
    step = fast.sde_schedule(sampler, SIGMAS, eta=ETA)[2]
    torch.testing.assert_close(drawn, (mean + step.std * noise).bfloat16().float(), rtol=2**-7, atol=1e-6)
    again = strategy.denoise(v, x, eta=ETA, prev_sample=drawn.bfloat16(), **levels)
    assert torch.equal(log_prob, again[1])
    rounded = strategy.denoise(v, x, eta=ETA, prev_sample=r.next_state, **levels)
    assert torch.equal(rounded[0], r.next_state.bfloat16().float())
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(*(strategy.denoise(v, x, eta=ETA, generator=g, **levels)[0] for g in generators))
    state, log_prob, mean = strategy.denoise(v, x, eta=0.0, **levels)
    assert log_prob is None
    torch.testing.assert_close(state, x.float() + (SIGMAS[3] - SIGMAS[2]) * v.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(state, mean)
    state, log_prob, _ = strategy.denoise(v, x, eta=0.0, prev_sample=drawn, **levels)
    assert torch.equal(state, drawn)
    assert log_prob is None
