"""Rewards computed in a thread while the next group is sampled."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .protocol import Reward, score


class RewardHandle:
    """The rewards of one submitted call, there or still to come."""

    def __init__(self, future: Future, device: torch.device, scorer: BackgroundScorer):
        self._future, self._device, self._scorer = future, device, scorer

    def result(self, timeout: float | None = None) -> dict[str, Tensor]:
        """Waits for the rewards: what :func:`~.protocol.score` returns, on the scorer's device.

        Raises:
            TimeoutError: not there after ``timeout`` seconds.
            RuntimeError: the scorer was closed before they were computed.
            Exception: what the reward raised, for this call or an earlier one, with the traceback of the reward.
        """
        try:
            named = self._future.result(timeout)
        except FutureTimeoutError:
            # the reward may have raised one itself
            if self._future.done():
                raise
            raise TimeoutError(f"rewards: not there after {timeout:g} s") from None
        except CancelledError:
            self._scorer.check()
            raise RuntimeError("rewards: the scorer was closed before these were computed") from None
        # the numbers come by way of the host, so no memory of the worker's stream is used on another one
        return {name: value.to(self._device) for name, value in named.items()}


@dataclass
class _Job:
    future: Future
    images: Any
    prompts: Sequence[Any]
    metadata: Sequence[dict]
    ready: Any


class BackgroundScorer:
    """Computes rewards in one worker thread, in the order of the calls, so the results are those of the foreground.

    Use, in place of calling :func:`~.protocol.score` after each pipeline call::

        with BackgroundScorer(self.reward, self.device) as scorer:
            for ...:
                images = pipeline(...)
                handles.append(scorer.submit(images, texts, metadata))
            rewards = [handle.result() for handle in handles]

    When the reward raises, what is queued is cancelled, and that exception is raised by ``result()`` of the failed and
    all later calls and by the next ``submit``. Images must not be changed after they were submitted. The reward
    must not draw from global random states (see :class:`~.protocol.Reward`) and must not be moved or called elsewhere
    while something is pending. Closing waits for the running call: a reward that can hang needs a limit of its own, as
    :class:`~.http.HTTPReward` has.

    On CUDA the worker has a stream of its own, which waits for the images by an event and not for later sampling; each
    call is finished on that stream before its images are let go.

    Args:
        reward: see :class:`~.protocol.Reward`; it runs without gradients.
        device: where results go, the trainer's ``accelerator.device``.
        max_pending: calls that are queued or running before ``submit`` waits; it bounds the images that are held.

    Raises:
        ValueError: ``max_pending`` is not positive.
    """

    def __init__(self, reward: Reward, device: torch.device | str, *, max_pending: int = 4):
        if max_pending < 1:
            raise ValueError(f"max_pending: got {max_pending}, expected an integer >= 1")
        self.reward, self.device = reward, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # the worker's current device is another thread's matter
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = _stream(self.device) if self.device.type == "cuda" else None
        self._free = threading.Semaphore(max_pending)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        # a reward that never returns must not keep the interpreter from ending
        self._worker = threading.Thread(target=self._work, name="flowdppo-rewards", daemon=True)
        self._worker.start()

    def submit(self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict]) -> RewardHandle:
        """Queues one call of the reward; waits while ``max_pending`` calls are not done.

        Raises:
            RuntimeError: the scorer is closed. Exception: what the reward raised for an earlier call.
        """
        self._free.acquire()
        try:
            self.check()
            future: Future = Future()
            job = _Job(future, images, prompts, metadata, _record_event(self.device))
            with self._lock:
                if self._closed:
                    raise RuntimeError("rewards: the scorer is closed, expected no further calls")
                self._jobs.put(job)
        except BaseException:
            self._free.release()
            raise
        return RewardHandle(future, self.device, self)

    def check(self) -> None:
        """Raises what the reward raised, if it did."""
        if self._failure is not None:
            raise self._failure

    def close(self, timeout: float | None = None) -> None:
        """Cancels what is queued and waits for the running call.

        Raises:
            RuntimeError: the running call is not done after ``timeout`` seconds; its thread is left to itself.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._worker.join(timeout)
        if self._worker.is_alive():
            raise RuntimeError(f"rewards: the reward still runs {timeout:g} s after close(), expected it to return")

    def __enter__(self) -> BackgroundScorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        # entering a stream also makes its device this thread's current one
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            while (job := self._jobs.get()) is not None:
                self._run(job)
                # images are let go before the next wait, not after it
                del job

    def _run(self, job: _Job) -> None:
        try:
            if self._closed or self._failure is not None:
                job.future.cancel()
                return
            if self._stream is not None:
                self._stream.wait_event(job.ready)
            result = score(self.reward, job.images, job.prompts, job.metadata, torch.device("cpu"))
            if self._stream is not None:
                # work that the result does not depend on may still read the images
                self._stream.synchronize()
            job.future.set_result(result)
        except BaseException as error:
            self._failure = error
            job.future.set_exception(error)
        finally:
            self._free.release()


def _record_event(device: torch.device) -> Any:
    """An event behind everything queued on the caller's stream so far, or None without CUDA."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device for all scorers: each stream keeps the memory of its own work."""
    return torch.cuda.Stream(device)
