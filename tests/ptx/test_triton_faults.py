"""Faults planted in the compiled code of Triton kernels, and in how it is launched: each is found."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import given_rows

import flowdppo_fast as fast
from flowdppo_fast.kernels import log_prob_loss, statistics

from .parse import Fault

STEP = fast.SDEStep.from_sigmas("flow_sde", 0.7, 0.6)
BARRIER = re.compile(r"bar\.sync\s+0;|bar\.warp\.sync\s+-?\w+;")


class Edit:
    """Replaces the ``number``-th match of a pattern (None: all) in one kernel, and counts the matches."""

    def __init__(self, kernel: str, pattern: str | re.Pattern[str], replacement: str = "", number: int | None = None):
        self.kernel, self.pattern, self.replacement, self.number = kernel, re.compile(pattern), replacement, number
        self.found = 0

    def __call__(self, name: str, text: str) -> str:
        if name != self.kernel:
            return text
        self.found = 0

        def replace(match: re.Match[str]) -> str:
            self.found += 1
            return match.expand(self.replacement) if self.number in (None, self.found - 1) else match[0]

        return self.pattern.sub(replace, text)


def latents(rows: int, numel: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, numel).to(dtype) for _ in range(3)]


def epilogue(objective: str, rows: int) -> None:
    """The epilogue alone. A batch-wide bias makes it read its own results again."""
    log_prob_loss(*given_rows.draw(objective, rows).args())


@pytest.mark.parametrize(
    ("kernel", "call", "arch"),
    [
        *(("partials_kernel", lambda: fast.row_statistics(*latents(2, 3000), STEP, backend="triton"), arch)
          for arch in (80, 90, 100)),
        ("epilogue_kernel", lambda: epilogue("dppo", 1300), 90),
        ("epilogue_kernel", lambda: epilogue("grpo_guard_batch", 12), 90),
    ],
    ids=["sm_80", "sm_90", "sm_100", "eight warps", "one warp"],
)  # fmt: skip
def test_a_missing_barrier(emulated_gpu, kernel, call, arch):
    """Warps hand numbers on through shared memory, and the epilogue through global memory too."""
    settings = emulated_gpu.settings
    settings.arch, settings.edit = arch, Edit(kernel, BARRIER, r"\g<0>")
    call()
    assert emulated_gpu.races == []
    unseen = []
    for number in range(settings.edit.found):
        settings.edit = Edit(kernel, BARRIER, number=number)
        call()
        if not emulated_gpu.races:
            unseen.append(number)
        emulated_gpu.races.clear()
    assert settings.edit.found >= 1
    assert unseen == []


def test_an_off_by_one_mask(emulated_gpu):
    """``at < remaining`` as ``at <= remaining`` reads the element behind a tensor."""
    new, old, noise = latents(1, 4099, torch.bfloat16)
    emulated_gpu.settings.edit = Edit("partials_kernel", r"setp\.lt\.(s32|s64)", r"setp.le.\1")
    with pytest.raises(Fault, match="lies in no allocation"):
        fast.row_statistics(new, old, noise, STEP, backend="triton")
    assert emulated_gpu.settings.edit.found


def test_code_for_aligned_rows_launched_on_others(emulated_gpu):
    """What a launch handle kept under too short a key would do."""
    kernel, arguments = launched_with(latents(2, 4096))
    kernel.run(4, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
    store = torch.randn(2 * 4096 + 1)
    arguments[0] = store[1:].view(2, 4096)
    with pytest.raises(Fault, match=r"misaligned address .* for 16 bytes"):
        kernel.run(4, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None, *arguments)


def launched_with(tensors: list[torch.Tensor]) -> tuple[Any, list[Any]]:
    """The compiled streaming kernel for these latents, and the arguments of its launch."""
    rows, numel = tensors[0].shape
    given = dict(zip(("new", "old", "noise"), tensors)) | dict.fromkeys(
        ("new_inner", "old_inner", "noise_inner"), numel
    )
    given |= {"partials": torch.empty(2 * rows * 2), "numel": numel, "splits": 2, "seed": 0, "first_stream": 0}
    given |= {"MEAN_FORM": False, "SECOND_MOMENT": False, "BLOCKS": 1, "BLOCK": 2048, "OVERLAPS": False}
    arguments = [given.get(param.name) for param in statistics.partials_kernel.params]
    return statistics.partials_kernel[(2 * rows,)](*arguments, num_warps=8), arguments


def policy_loss() -> torch.Tensor:
    new, old, noise = latents(4, 3000)
    return fast.fused_dppo_velocity_loss(new, old, noise, STEP, torch.randn(4), backend="triton").loss


STATISTICS = ("statistics_kernel", lambda: fast.row_statistics(*latents(2, 3000), STEP, backend="triton"))


@pytest.mark.parametrize(
    ("kernel", "call"), [("epilogue_kernel", policy_loss), STATISTICS], ids=["epilogue", "statistics"]
)
def test_a_launch_that_overlaps_and_does_not_wait(emulated_gpu, kernel, call):
    """From sm_90 on a launch may begin before the one ahead of it has ended: what that one writes is not there yet."""
    settings, log = emulated_gpu.settings, emulated_gpu.log
    for settings.arch, overlaps in ((80, False), (90, True), (100, True)):
        call()
        assert [launched.programmatic for launched in log[-2:]] == [False, overlaps]
    wait = re.compile(r"griddepcontrol\.wait;[^\n]*\n")
    settings.edit = Edit(kernel, wait)
    with pytest.raises(Fault, match=r"reads what the launch ahead writes, without griddepcontrol\.wait"):
        call()
    # one that waits for nothing and touches nothing ends too early for whoever comes next
    settings.edit = Edit(kernel, r"(?s)\{\n.*\n\}", "{\n\tret;\n}\n")
    with pytest.raises(Fault, match=r"ended without griddepcontrol\.wait"):
        call()
    settings.edit = Edit(kernel, wait, r"\g<0>")
    call()
    assert settings.edit.found == 1
