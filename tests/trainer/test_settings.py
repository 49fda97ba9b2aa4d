"""What settings of the trainer change in a run, and what they must not change."""

from __future__ import annotations

import json

import pytest
import torch
from digits_example import PROMPTS, ink

from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.metrics import METRICS


@pytest.fixture
def run(pipes, small_config, tmp_path):
    """Trains with some settings and returns trainer and history."""
    count = iter(range(100))

    def go(eval_prompts=None, layers=2, **sections):
        run = {"output_dir": str(tmp_path / f"run-{next(count)}"), **sections.pop("run", {})}
        trainer = FlowDPPOTrainer(
            pipes.digits(layers), ink, PROMPTS, small_config(run=run, **sections), eval_prompts=eval_prompts
        )
        return trainer, trainer.train()

    return go


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.weights.parameters])


def rows_of(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output / "rows.jsonl").read_text().splitlines()]


def test_fewer_steps_at_a_time_give_the_same_update(run):
    optimizer = {"learning_rate": 1e-2, "micro_batch_size": 16}
    whole, history = run(optimizer=optimizer, run={"iterations": 1})
    parts, split = run(optimizer={**optimizer, "steps_per_micro_batch": 2}, run={"iterations": 1})
    # the same sums in another order, through four steps of AdamW
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-3, atol=1e-5)
    for name in ("loss", "kl_new_old_mean", "grad_norm", "ratio_mean"):
        assert split[0][name] == pytest.approx(history[0][name], rel=1e-3, abs=1e-6), name
    assert [line["steps"] for line in rows_of(parts)] == [[0, 1], [2]] * 4


def test_advantages_are_clipped_where_they_meet_the_loss(pipes, small_config):
    trainer = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(advantage={"clip": 0.8}))
    rollout, rows = trainer.sample(0), trainer.updates[0]
    result = trainer.update(rollout, rows, number=0)
    loss = sum(share * float(v[METRICS.index("loss")]) for share, v in zip(result["shares"], result["vectors"]))
    given = rollout.advantages[rows.start : rows.stop]
    # every ratio is 1 but for rounding; without a clip the mean over whole groups is 0
    assert loss == pytest.approx(-float(given.clamp(-0.8, 0.8).mean()), abs=1e-5)
    assert abs(loss) > 1e-3


def test_every_group_can_have_steps_of_its_own(run):
    sampling = {"sde_steps_per_rollout": 2, "step_choice": "random_window", "sde_fraction": 1.0, "sde_steps": None}
    shared, _ = run(sampling=sampling, optimizer={"inner_epochs": 1})
    own, _ = run(sampling={**sampling, "per_group_steps": True}, optimizer={"inner_epochs": 1})
    for trainer, several in ((shared, False), (own, True)):
        chosen = {}
        for line in rows_of(trainer):
            assert line["steps"][1] == line["steps"][0] + 1
            for row in line["rows"]:
                chosen.setdefault(line["iteration"], {})[row] = tuple(line["steps"])
        for rows in chosen.values():
            assert sorted(rows) == list(range(16))
            # rows of a group, four of them, agree
            assert all(rows[row] == rows[row - row % 4] for row in rows)
        assert any(len(set(rows.values())) > 1 for rows in chosen.values()) == several


def test_a_window_slides_with_the_iterations(run):
    trainer, _ = run(
        sampling={"sde_steps_per_rollout": 1, "step_choice": "window", "window_every": 2}, run={"iterations": 5}
    )
    chosen = [line["steps"] for line in rows_of(trainer) if line["update"] == 0]
    assert chosen == [[0], [0], [1], [1], [2]]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_is_the_model_at_the_start(run, train):
    trainer, history = run(
        model={"train": train}, objective={"kl_weight": 0.01}, optimizer={"learning_rate": 1e-2, "inner_epochs": 1}
    )
    # nothing has moved before the first update; afterwards the drift is measured in every update
    assert 0 < history[0]["kl_ref_mean"] < history[-1]["kl_ref_mean"]
    assert history[0]["kl_ref_nats"] == pytest.approx(64 * history[0]["kl_ref_mean"])
    rollout = trainer.sample(9)
    trajectory = rollout.trajectories[0]
    trained = weights_of(trainer)
    fresh, _ = run(model={"train": train}, run={"iterations": 1}, optimizer={"learning_rate": 1e-12})
    with torch.no_grad(), trainer.weights.reference():
        reference = trainer.recorder.replay(trajectory, [0, 1])
        for record in trajectory.steps:
            for call in record.calls:
                call.module = fresh.pipeline.transformer
        expected = trainer.recorder.replay(trajectory, [0, 1])
    # a step of 1e-12 moves no weight by more than an ulp
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights_of(trainer), trained)


def test_the_drift_budget_ends_the_run_and_a_resume_does_not_begin_again(run, pipes, small_config):
    trainer, history = run(
        objective={"drift_budget": 1e-3, "threshold": 1.0}, optimizer={"learning_rate": 1e-2}, run={"iterations": 20}
    )
    assert len(history) < 20
    assert all(m["kl_ref_nats"] <= 1e-3 for m in history[:-1])
    assert history[-1]["kl_ref_nats"] > 1e-3
    again = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, trainer.config)
    assert again.train(resume=True) == history


def test_updates_beyond_the_target_are_left_out(run):
    settings = {"learning_rate": 1e-2, "inner_epochs": 4, "updates_per_rollout": 1}
    free, without = run(optimizer=settings, objective={"threshold": 1.0}, run={"iterations": 1})
    target = rows_mean(free, 2)
    bound, history = run(
        optimizer={**settings, "target_kl": target * 0.999}, objective={"threshold": 1.0}, run={"iterations": 1}
    )
    assert (without[0]["stopped_updates"], history[0]["stopped_updates"]) == (0, 2)
    # two steps were taken: the last two updates see the same weights
    assert rows_mean(bound, 3) == rows_mean(bound, 2) == pytest.approx(target, rel=1e-5)
    assert rows_mean(free, 3) > target


def rows_mean(trainer, update: int) -> float:
    values = [torch.tensor(line["kl"]).mean() for line in rows_of(trainer) if line["update"] == update]
    return float(torch.stack(values).mean())


def test_held_out_prompts_are_evaluated_with_the_same_seeds_and_the_average(run, learning):
    sections = {
        "model": {"ema_decay": 0.5}, "optimizer": {"learning_rate": 2e-3}, "sampling": {"batch_size": 4},
        "evaluation": {"every": 2, "images_per_prompt": 3, "num_steps": 4}, "run": {"iterations": 4},
    }  # fmt: skip
    trainer, history = run(eval_prompts=["3", "8"], **sections)
    assert ["eval/reward" in m for m in history] == [True, False, True, False]
    assert [name for name in history[-1] if name.startswith("eval")] == ["eval_final/reward"]
    # the reward is one that these updates raise
    # over eight seeds (FLOWDPPO_LEARNING_SEEDS=8): 0.0253, sd 0.0049
    learning.check(history[-1]["eval_final/reward"] - history[0]["eval/reward"], 0)
    metrics, images, captions = trainer.evaluate()
    assert metrics["reward"] == history[-1]["eval_final/reward"]
    assert [text.partition("\nreward ")[0] for text in captions] == ["3"] * 3 + ["8"] * 3
    assert len(images) == 6
    own = weights_of(trainer)
    with trainer.weights.averaged():
        assert not torch.equal(weights_of(trainer), own)
    # evaluating changes nothing that is trained on
    plain, unevaluated = run(**{**sections, "evaluation": {}})
    assert torch.equal(weights_of(plain), own)
    assert [m["reward"] for m in unevaluated] == [m["reward"] for m in history]


def test_evaluation_needs_prompts_and_prompts_need_evaluation(run):
    with pytest.raises(ValueError, match=r"eval_prompts: got none with evaluation\.every=2"):
        run(evaluation={"every": 2})
    with pytest.raises(ValueError, match=r"eval_prompts: got some with evaluation\.every=None"):
        run(eval_prompts=["1"])


def test_compiled_blocks_train_like_eager_ones(run):
    # a block more is ten seconds of compilation more
    settings = {"layers": 1, "run": {"iterations": 1}}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, expected = run(**settings)
    assert not torch._dynamo.utils.counters["stats"]
    compiled, history = run(model={"compile": True}, **settings)
    # one graph for the rollout and one with gradients, at least
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert history[0]["reward"] == pytest.approx(expected[0]["reward"], rel=1e-4)
    torch.testing.assert_close(weights_of(compiled), weights_of(eager), rtol=1e-2, atol=1e-4)


def test_idle_components_are_on_the_host_while_the_transformer_is_trained(pipes, small_config, monkeypatch):
    pipeline = pipes.sd3()
    moves: list[str] = []

    def noticing(device, move=pipeline.vae.to):
        moves.append(str(device))
        return move(device)

    prompts = [{name: value[0] for name, value in pipes.text_inputs(1).items()}]
    config = small_config(
        model={"train": "lora", "offload_idle": True}, sampling={"pipeline_kwargs": {"height": 8, "width": 8}},
        run={"iterations": 2},
    )  # fmt: skip
    trainer = FlowDPPOTrainer(pipeline, ink, prompts, config)
    monkeypatch.setattr(pipeline.vae, "to", noticing)
    update = trainer.update

    def updating(*args, **kwargs):
        moves.append("update")
        return update(*args, **kwargs)

    monkeypatch.setattr(trainer, "update", updating)
    trainer.train()
    # the device of the run is the host here: to the device, back, then four updates
    assert moves == (["cpu"] * 2 + ["update"] * 4) * 2


@pytest.mark.bits(across="process")
def test_reward_history_survives_a_resume(pipes, small_config, tmp_path):
    def make(folder, iterations):
        config = small_config(
            advantage={"history": 6}, run={"iterations": iterations, "output_dir": str(tmp_path / folder)}
        )
        return FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config)

    whole = make("whole", 4)
    whole.train()
    make("parts", 2).train()
    resumed = make("parts", 4)
    resumed.train(resume=True)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    tables = whole.history.tables["reward"], resumed.history.tables["reward"]
    assert torch.equal(tables[0].nan_to_num(-1), tables[1].nan_to_num(-1))
    assert (~tables[0].isnan()).sum() >= 4 * 6


@pytest.mark.bits(across="again")
def test_rewards_in_the_background_are_those_of_the_foreground(run, monkeypatch):
    import threading

    from flowdppo_fast.trainer import pipeline_calls as module

    threads = set()

    def noticing(*args, score=module.score):
        threads.add(threading.current_thread().name)
        return score(*args)

    monkeypatch.setattr(module, "score", noticing)
    foreground, expected = run(sampling={"batch_size": 4, "background_rewards": False})
    assert threads == {threading.main_thread().name}
    threads.clear()
    background, history = run(sampling={"batch_size": 4})
    assert not threads, "scored by the trainer itself"
    assert torch.equal(weights_of(background), weights_of(foreground))
    assert [m["reward"] for m in history] == [m["reward"] for m in expected]


@pytest.mark.bits(across="process")
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_failing_reward_saves_what_was_trained(pipes, small_config, tmp_path, batch_size):
    def make(folder, reward):
        config = small_config(
            sampling={"batch_size": batch_size},
            run={"iterations": 4, "output_dir": str(tmp_path / folder), "checkpoint_every": 10},
        )
        return FlowDPPOTrainer(pipes.digits(), reward, PROMPTS, config)

    whole = make("whole", ink)
    whole.train()
    calls = []

    def fails_in_the_third_iteration(images, prompts, metadata):
        calls.append(1)
        if len(calls) == (3 if batch_size is None else 11):
            raise ConnectionError("the server is gone")
        return ink(images, prompts, metadata)

    with pytest.raises(ConnectionError, match="the server is gone"):
        make("broken", fails_in_the_third_iteration).train()
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["iteration-000002"]
    resumed = make("broken", ink)
    assert len(resumed.train(resume=True)) == 4
    assert torch.equal(weights_of(resumed), weights_of(whole))
