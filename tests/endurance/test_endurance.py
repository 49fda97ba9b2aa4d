"""The short form: the same assertions on fewer calls, and leaks that they notice."""

from __future__ import annotations

import threading

import pytest
import torch
from support.backends import CPU, REFERENCE, require

from .loads import LOSS_LIMITS, TRAINER_LIMITS, run_losses, run_trainer, unexpected_files
from .probe import PARTS, Limits, watched


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=lambda backend: backend.name)
def test_loss_calls_leave_nothing(backend):
    require(backend)
    assert run_losses(300, backend.name).faults(LOSS_LIMITS) == []


def test_iterations_leave_their_metrics_and_their_files_alone(tmp_path):
    # whole models allocate uninitialised memory for good reasons
    torch.use_deterministic_algorithms(False)
    run = tmp_path / "run"
    record = run_trainer(20, run, plots=False)
    # of two iterations each, one of which saves: no median of these says anything
    record.milliseconds = [1.0] * PARTS
    assert record.faults(TRAINER_LIMITS) == []
    assert unexpected_files(run, 20, plots=False) == []
    (run / "metrics.png").rename(run / "more.png")
    assert unexpected_files(run, 20, plots=False) == ["metrics.png", "more.png"]


class Leaks:
    """Calls that keep something each time."""

    def __init__(self, folder):
        self.kept, self.folder, self.until = [], folder, threading.Event()

    def objects(self, number):
        self.kept.append([number])

    def numbers(self, number):
        self.kept.append(float(number))

    def tensor(self, number):
        self.kept.append(torch.zeros(8))

    def heap(self, number):
        torch.set_num_threads(1)
        self.kept.append(torch.zeros(4096).numpy())

    def handle(self, number):
        self.kept.append(open(self.folder / "file", "a"))  # noqa: SIM115

    def thread(self, number):
        self.kept.append(threading.Thread(target=self.until.wait, daemon=True))
        self.kept[-1].start()

    def time(self, number):
        sum(range(20 * number))


@pytest.mark.parametrize(
    ("leak", "found"),
    [
        ("objects", "objects"), ("numbers", "blocks"), ("tensor", "tensors"), ("tensor", "tensor_bytes"),
        ("heap", "heap"), ("handle", "handles"), ("thread", "threads"), ("time", "time"),
    ],
)  # fmt: skip
def test_a_leak_is_noticed(tmp_path, leak, found):
    leaks = Leaks(tmp_path)
    faults = watched(getattr(leaks, leak), 1000 if leak == "numbers" else 200).faults(Limits())
    leaks.until.set()
    for kept in leaks.kept:
        if leak in ("handle", "thread"):
            kept.close() if leak == "handle" else kept.join()
    assert [fault.split(":")[0] for fault in faults if fault.startswith(f"{found}:")] == [found], faults


def test_calls_that_keep_nothing_have_no_faults():
    assert watched(lambda number: sum(range(1000)), 200).faults(Limits()) == []
