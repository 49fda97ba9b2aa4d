"""Scoring in the background: the foreground's numbers, in order, and no way to fail quietly or to hang."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref

import pytest
import torch

from flowdppo_fast.trainer.rewards import BackgroundScorer, CLIPScore, score

CPU = torch.device("cpu")


def mean(images, prompts, metadata):
    return {"mean": images.mean(dim=(1, 2, 3)), "length": torch.tensor([len(prompt) for prompt in prompts])}


class Gate:
    """A reward that waits until it is opened, and counts its calls."""

    def __init__(self):
        self.open, self.entered, self.calls = threading.Event(), threading.Event(), 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        self.entered.set()
        assert self.open.wait(5)
        return torch.full((len(prompts),), float(self.calls))


@pytest.fixture(autouse=True)
def no_threads_left():
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "flowdppo-rewards"]
    for thread in left:
        thread.join(5)
    assert not any(thread.is_alive() for thread in left)


def batch(seed: int = 0, rows: int = 3):
    images = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return images, [f"{'x' * seed} {row}" for row in range(rows)], [{} for _ in range(rows)]


@pytest.mark.parametrize("max_pending", [1, 4])
def test_the_numbers_of_the_foreground_in_order(max_pending):
    expected = [score(mean, *batch(seed), CPU) for seed in range(8)]
    with BackgroundScorer(mean, CPU, max_pending=max_pending) as scorer:
        handles = [scorer.submit(*batch(seed)) for seed in range(8)]
        # asked in another order, and twice
        actual = {seed: handles[seed].result() for seed in (7, 0, 3, 3, 1, 2, 6, 5, 4)}
    for seed in range(8):
        assert list(actual[seed]) == list(expected[seed])
        assert all(torch.equal(actual[seed][name], expected[seed][name]) for name in expected[seed])


@pytest.mark.bits(across="again")
def test_networks_give_bitwise_the_foregrounds_numbers(clip_folder, pictures):
    reward = CLIPScore(clip_folder)
    prompts = ["a", "b", "c", "d", "e", "f"]
    expected = [score(reward, pictures.flip(0) if n else pictures, prompts, [{}] * 6, CPU) for n in range(2)]
    with BackgroundScorer(CLIPScore(clip_folder), CPU) as scorer:
        handles = [scorer.submit(pictures.flip(0) if n else pictures, prompts, [{}] * 6) for n in range(2)]
        assert all(torch.equal(handle.result()["reward"], e["reward"]) for handle, e in zip(handles, expected))


def test_the_caller_goes_on_while_the_reward_runs():
    gate = Gate()
    with BackgroundScorer(gate, CPU) as scorer:
        first, second = scorer.submit(*batch()), scorer.submit(*batch())
        assert gate.entered.wait(5)
        with pytest.raises(TimeoutError, match=r"not there after 0\.01 s"):
            first.result(timeout=0.01)
        gate.open.set()
        assert [first.result()["reward"][0], second.result()["reward"][0]] == [1, 2]


def test_the_thread_has_no_gradients_and_as_many_threads_as_the_caller():
    seen = []

    def reward(images, prompts, metadata):
        thread = threading.current_thread()
        # a thread that is no daemon, such as those of concurrent.futures, would be waited for at the end of the program
        seen.append((torch.is_grad_enabled(), torch.get_num_threads(), thread.name, thread.daemon))
        return torch.zeros(len(prompts))

    with BackgroundScorer(reward, CPU) as scorer:
        scorer.submit(*batch()).result()
    assert seen == [(False, torch.get_num_threads(), "flowdppo-rewards", True)]


def test_submit_waits_while_enough_is_pending():
    gate = Gate()
    with BackgroundScorer(gate, CPU, max_pending=2) as scorer:
        for _ in range(2):
            scorer.submit(*batch())
        done = threading.Event()
        third = threading.Thread(target=lambda: (scorer.submit(*batch()), done.set()))
        third.start()
        assert not done.wait(0.05)
        gate.open.set()
        assert done.wait(5)
        third.join()


def test_images_are_let_go_when_they_are_scored():
    with BackgroundScorer(mean, CPU) as scorer:
        images, prompts, metadata = batch()
        kept = weakref.ref(images)
        handle = scorer.submit(images, prompts, metadata)
        del images
        handle.result()
        # the worker clears its own name right after the result is there
        for _ in range(100):
            gc.collect()
            if kept() is None:
                break
            time.sleep(0.01)
        assert kept() is None


class Broken(RuntimeError):
    pass


def raise_on_second():
    """A reward whose second call raises, once the gate is open."""
    gate = Gate()

    def raising(images, prompts, metadata):
        values = gate(images, prompts, metadata)
        if gate.calls == 2:
            raise Broken("no more memory")
        return values

    return gate, raising


def test_an_exception_surfaces_with_its_traceback_and_cancels_the_rest():
    gate, raising = raise_on_second()
    with BackgroundScorer(raising, CPU, max_pending=8) as scorer:
        handles = [scorer.submit(*batch()) for _ in range(4)]
        gate.open.set()
        assert handles[0].result()["reward"].tolist() == [1, 1, 1]
        with pytest.raises(Broken, match="no more memory") as caught:
            handles[1].result()
        assert "raising" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        for handle in handles[2:]:
            with pytest.raises(Broken, match="no more memory"):
                handle.result()
        with pytest.raises(Broken, match="no more memory"):
            scorer.submit(*batch())
        # it stays so, and does not fill up
        for _ in range(20):
            with pytest.raises(Broken):
                scorer.submit(*batch())
    assert gate.calls == 2


def test_a_waiting_submit_is_woken_by_the_failure():
    gate, raising = raise_on_second()
    errors = []

    def submit_all():
        try:
            for _ in range(10):
                scorer.submit(*batch())
        except Broken as error:
            errors.append(error)

    with BackgroundScorer(raising, CPU, max_pending=1) as scorer:
        thread = threading.Thread(target=submit_all)
        thread.start()
        gate.open.set()
        thread.join(5)
        assert not thread.is_alive()
    assert len(errors) == 1


def test_what_breaks_the_protocol_is_an_error_too():
    with BackgroundScorer(lambda *_: torch.full((3,), float("nan")), CPU) as scorer:
        handle = scorer.submit(*batch())
        with pytest.raises(ValueError, match="got nan for 'reward' of sample 0"):
            handle.result()


def test_a_timeout_that_the_reward_raises_is_the_rewards():
    def slow(images, prompts, metadata):
        raise TimeoutError("the judge slept")

    with (
        BackgroundScorer(slow, CPU) as scorer,
        pytest.raises(TimeoutError, match="the judge slept"),
    ):
        scorer.submit(*batch()).result(timeout=5)


def test_close_cancels_what_is_queued_and_waits_for_what_runs():
    gate = Gate()
    scorer = BackgroundScorer(gate, CPU)
    handles = [scorer.submit(*batch()) for _ in range(3)]
    assert gate.entered.wait(5)
    with pytest.raises(RuntimeError, match=r"still runs 0\.05 s after close"):
        scorer.close(timeout=0.05)
    gate.open.set()
    scorer.close(timeout=5)
    scorer.close()
    assert handles[0].result()["reward"].tolist() == [1, 1, 1]
    for handle in handles[1:]:
        with pytest.raises(RuntimeError, match="closed before these were computed"):
            handle.result()
    with pytest.raises(RuntimeError, match="the scorer is closed, expected no further calls"):
        scorer.submit(*batch())
    assert gate.calls == 1


def test_an_error_of_the_sampler_ends_the_thread():
    gate = Gate()
    gate.open.set()

    def sample():
        with BackgroundScorer(gate, CPU) as scorer:
            scorer.submit(*batch())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample()


def test_max_pending_is_checked():
    with pytest.raises(ValueError, match="max_pending: got 0"):
        BackgroundScorer(mean, CPU, max_pending=0)


@pytest.mark.gpu
def test_the_worker_waits_for_the_images_and_not_for_later_work():
    """Images are still being computed when they are submitted, and the caller's stream is busy for long afterwards."""
    device = torch.device("cuda")
    seen = []

    def reward(images, prompts, metadata):
        seen.append(torch.cuda.current_stream())
        return images.mean(dim=(1, 2, 3))

    with BackgroundScorer(reward, device) as scorer:
        for value in range(5):
            torch.cuda._sleep(50_000_000)
            images = torch.full((3, 3, 64, 64), float(value), device=device)
            handle = scorer.submit(images, [""] * 3, [{}] * 3)
            del images
            later = torch.cuda.Event()
            torch.cuda._sleep(1_000_000_000)
            later.record()
            # the handle's copy is on the caller's stream, so the numbers are looked at in the worker
            values = handle._future.result(30)["reward"]
            assert not later.query()
            assert values.tolist() == [value] * 3
            assert handle.result()["reward"].device.type == "cuda"
    assert all(stream != torch.cuda.current_stream() for stream in seen)
