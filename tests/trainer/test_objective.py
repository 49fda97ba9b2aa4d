"""What of the objective changes from step to step and from iteration to iteration in a run."""

from __future__ import annotations

import math

import pytest
import torch
from digits_example import PROMPTS, ink

import flowdppo_fast as fast
from flowdppo_fast.runs.row_log import read_rows
from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.objective import ObjectiveConfig, adapted

SIGMAS = torch.linspace(1, 0, 11).tolist()
STEPS = fast.sde_schedule("flow_sde", SIGMAS)[1:4]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("inverse_scale", lambda step: 1.0 / abs(step.velocity_coef / step.std)),
        ("std", lambda step: step.std),
        ("inverse_dt", lambda step: -1.0 / step.dt),
    ],
)
def test_step_weights_are_those_of_the_papers(kind, of):
    given = ObjectiveConfig(step_weight=kind).of_loss(fast.SDEStep.stack(STEPS), (2, 3), 10, CPU)
    torch.testing.assert_close(given["row_weights"], torch.tensor([[of(step) for step in STEPS]] * 2))
    assert "threshold_weights" not in given


def test_flash_grpos_weight_is_the_inverse_scale():
    """``1/(sqrt(-dt)/s + s*sqrt(-dt)*(1-sigma)/(2*sigma))`` (arXiv 2605.15980) is ``1/|k|`` of the SDE samplers."""
    sigma, dt, s = 0.6, -0.1, 0.7 * math.sqrt(0.6 / 0.4)
    theirs = 1.0 / (math.sqrt(-dt) / s + s * math.sqrt(-dt) * (1.0 - sigma) / (2.0 * sigma))
    step = fast.SDEStep.from_sigmas("flow_sde", sigma, sigma + dt)
    given = ObjectiveConfig(step_weight="inverse_scale").of_loss(step, (1,), 10, CPU)
    assert float(given["row_weights"]) == pytest.approx(theirs, rel=1e-6)


def test_thresholds_per_noise_level_have_the_mean_that_is_set():
    """Uneven steps: a threshold in proportion to the noise that a step removes, on average the one of the settings."""
    steps = fast.SDEStep.stack(fast.sde_schedule("dance", [1.0, 0.95, 0.8, 0.5, 0.0]))
    given = ObjectiveConfig(threshold_per="noise_level").of_loss(steps, (4,), 4, CPU)
    weights = given["threshold_weights"]
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 3.0, 6.0, 10.0]))


def test_settings_that_ask_for_nothing_give_the_loss_nothing():
    given = ObjectiveConfig().of_loss(fast.SDEStep.stack(STEPS), (2, 3), 10, CPU)
    assert given == {"kl_weight": 0.0, "reference_kl": "gaussian"}


def iterations(*values: float) -> list[dict[str, float]]:
    return [{"kl_last_update": value} for value in values]


def test_a_penalty_adapts_as_ppos():
    penalty, target = fast.KLPenalty(3.0), 1e-4
    assert adapted(penalty, iterations(1.51e-4), target) == fast.KLPenalty(6.0)
    assert adapted(penalty, iterations(0.66e-4), target) == fast.KLPenalty(1.5)
    assert adapted(penalty, iterations(1.4e-4, 0.7e-4, math.nan), target) == penalty
    assert adapted(penalty, iterations(1.0), None) == penalty
    # one after the other as all at once: what a run that goes on does
    history = iterations(1.0, 1.0, 1e-9, 1.0)
    one_by_one = penalty
    for metrics in history:
        one_by_one = adapted(one_by_one, [metrics], target)
    assert one_by_one == adapted(penalty, history, target) == fast.KLPenalty(12.0)
    # a smaller threshold is a stronger penalty
    assert adapted(fast.DRPO(0.2), iterations(1.0), target) == fast.DRPO(0.1)
    assert adapted(fast.DRPO(threshold_nats=8.0), iterations(1.0), target) == fast.DRPO(threshold_nats=4.0)
    assert adapted(fast.DPPO(0.2), iterations(1.0), target) == fast.DPPO(0.2)


def test_a_run_adapts_its_penalty_and_goes_on_with_it(pipes, small_config, tmp_path):
    """Towards a tiny target the penalty doubles after each iteration, and a run that goes on has the same one."""

    def run(folder, count, resume=False):
        config = small_config(
            objective={"name": "kl_penalty", "penalty": 1.0, "kl_target": 1e-12}, optimizer={"learning_rate": 0.01},
            run={"iterations": count, "output_dir": str(tmp_path / folder)},
        )  # fmt: skip
        trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
        return trainer, trainer.train(resume=resume)

    straight, history = run("straight", 3)
    assert straight.objective == fast.KLPenalty(8.0)
    assert all(m["kl_last_update"] > 0 for m in history)
    run("parts", 2)
    resumed, again = run("parts", 3, resume=True)
    assert resumed.objective == straight.objective
    assert again[-1]["policy_loss"] == history[-1]["policy_loss"]


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_reference_that_moves(pipes, small_config, train, decay):
    config = small_config(
        model={"train": train}, optimizer={"learning_rate": 0.01}, run={"iterations": 2},
        objective={"kl_weight": 0.1, "reference_every": 2, "reference_decay": decay},
    )  # fmt: skip
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)
    start = [p.detach().clone() for p in trainer.weights.parameters]
    history = trainer.train()
    assert history[1]["kl_ref_mean"] > 0.0
    now = [p.detach().clone() for p in trainer.weights.parameters]
    with trainer.weights.reference():
        reference = [p.detach().clone() for p in trainer.weights.parameters]
    for old, new, moved in zip(start, now, reference):
        torch.testing.assert_close(moved, decay * old + (1.0 - decay) * new)
    assert any(not torch.equal(old, moved) for old, moved in zip(start, reference))
    assert all(torch.equal(new, p) for new, p in zip(now, trainer.weights.parameters))


def test_steps_with_advantages_of_their_own(pipes, small_config, tmp_path):
    """Advantages of the middle step alone: only its rows have a loss, and the row log has what each row had."""

    def middle(advantages, rewards, steps):
        assert set(rewards) == {"reward"}
        assert len(advantages) == len(rewards["reward"])
        return advantages[:, None] * torch.tensor([float(place == 1) for place in range(len(steps))])

    config = small_config(
        optimizer={"learning_rate": 0.01, "steps_per_micro_batch": 2},
        run={"iterations": 1, "output_dir": str(tmp_path / "own")},
    )  # fmt: skip
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config, step_advantages=middle)
    rollout = trainer.sample(0)
    steps = [step.index for step in rollout.trajectories[0].steps]
    assert rollout.advantages.shape == (len(rollout.rewards["reward"]), len(steps))
    trainer.train()
    rows = read_rows(tmp_path / "own" / "rows.jsonl")
    assert set(rows.step[rows.advantage != 0]) == {steps[1]}
    logged = {(step, round(value, 6)) for step, value in zip(rows.step, rows.advantage)}
    assert {value for step, value in logged if step == steps[1]} >= {
        round(float(x), 6) for x in rollout.advantages[:4, 1]
    }


def test_advantages_of_another_shape_are_refused(pipes, small_config):
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(), step_advantages=lambda a, *_: a)
    with pytest.raises(
        ValueError, match=r"step_advantages: returned \[16\], expected a tensor \[images, trained steps\]"
    ):
        trainer.sample(0)
