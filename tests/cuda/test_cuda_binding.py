"""The binding as it is compiled for a GPU: memory, streams, graphs, no rows, what it refuses."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import BF16, F32, F64, MIXTURES, SEED, check_stats, coefficients_of, epilogue, sampler_step, source

from flowdppo_fast.objectives import DPPO, SUMMARY, RowField

KEPT_BYTES = 4096 * 4 + 8192 * 32


def calls(cuda, rows=2, dtypes=(F32,) * 4):
    """Every operator that streams latents, with arguments."""
    arguments = source((1, rows, 2048), dtypes)
    return [
        (cuda.row_stats, (*arguments, True)),
        (cuda.policy_loss, (*arguments, *epilogue(DPPO(), rows))),
        (cuda.policy_loss_and_grad, (*arguments, *epilogue(DPPO(), rows), 1.0)),
        (cuda.row_grad, (*arguments, coefficients_of(arguments), torch.ones(1), 1.0)),
        (cuda.sde_step, sampler_step((1, rows, 2048), dtypes[:3])),
    ]


def test_the_forward_process_is_refused(cuda):
    arguments = (*source((1, 2, 64))[:9], 2)
    with pytest.raises(RuntimeError, match="the cuda backend has no kernel for it; use backend='triton'"):
        cuda.row_stats(*arguments, True)
    with pytest.raises(RuntimeError, match="the cuda backend has no kernel for it"):
        cuda.policy_loss(*arguments, *epilogue(DPPO(), 2))


def test_torch_is_asked_for_results_alone(cuda):
    """Nothing of torch's allocator outlives a call: pools of graphs and of ``use_mem_pool`` must be left empty."""
    cuda.stream(0x1000, 100)
    for op, arguments in calls(cuda):
        found = op(*arguments)
        results = {x.data_ptr() for x in ([found] if isinstance(found, torch.Tensor) else found)}
        asked = {address for what, address, _ in cuda.allocated if what != "cudaMalloc"}
        assert asked == results


def test_a_stream_keeps_its_memory_and_shares_it_with_nobody(cuda):
    made = []
    for handle, number in ((0x2000, 200), (0x2000, 200), (0x3000, 300), (0x2000, 201), (0x2000, 200)):
        cuda.stream(handle, number)
        for op, arguments in calls(cuda)[:2]:
            op(*arguments)
            made += [(number, size) for what, _, size in cuda.allocated if what == "cudaMalloc"]
    # the handle of a stream that has ended comes back as another's: its number does not
    assert made == [(200, KEPT_BYTES), (300, KEPT_BYTES), (201, KEPT_BYTES)]


def own_memory(cuda) -> list[int]:
    """Bytes of torch's that the last call asked for before its result."""
    assert not [what for what, *_ in cuda.allocated if what == "cudaMalloc"]
    return [size for what, _, size in cuda.allocated if what == "aten::new_empty"][1:]


def scratch_of(blocks: int, rows: int) -> int:
    # tickets in whole 16 bytes, sums of blocks and rows
    return -(-(rows + 1) * 4 // 16) * 16 + 32 * (blocks + rows)


def test_a_captured_call_has_memory_of_its_own(cuda):
    arguments = source((1, 4, 3072))
    cuda.stream(0x4000, 400)
    want = cuda.row_stats(*arguments, True)
    cuda.stream(0x5000, 500, captures=True)
    assert torch.equal(cuda.row_stats(*arguments, True), want)
    assert own_memory(cuda) == [scratch_of(12, 4)]


def test_a_large_call_has_memory_of_its_own(cuda):
    # watching all of it takes its time
    cuda.races = False
    check_stats(cuda, source((1, 4096, 1), with_reference=False))
    assert own_memory(cuda) == [scratch_of(4096, 4096)]


def test_mixtures_cost_a_copy_of_what_is_not_float32(cuda):
    arguments = source((1, 4, 3072), MIXTURES[0])
    cuda.stream(0x6000, 600)
    cuda.row_stats(*arguments, True)
    copies = [size for what, _, size in cuda.allocated if what == "aten::new_empty"][1:]
    assert copies == [4 * 4 * 3072 for x in arguments[:4] if x.dtype != F32]


def test_no_rows_are_no_launch(cuda):
    for op, arguments in calls(cuda, rows=0):
        found = op(*arguments)
        if op.args[0].startswith("policy_loss"):
            assert found[0] == 0.0
            assert found[2][SUMMARY.index("nonfinite_rows")] == 0.0
            assert found[2][SUMMARY.index("ratio_mean")].isnan()
            assert found[1].shape == (len(RowField), 0)
    assert cuda.launches == 0


def test_float64_is_refused_with_the_backends_that_take_it(cuda):
    for op, arguments in calls(cuda, dtypes=(F64,) * 4):
        with pytest.raises(RuntimeError, match="got dtype Double, but the cuda backend computes in float32"):
            op(*arguments)


def test_what_a_launch_cannot_do_is_said(cuda):
    """A failed launch is an error that names the operator and what CUDA has to say."""
    # a block for each, and more than there may be
    rows = torch.zeros(1, 1, 1).expand(2**16, 2**15, 1)
    step = (None, None, [1.0, 1.0, 1.0], SEED, 0, F32, False, False, False)
    with pytest.raises(RuntimeError, match=r"the launch of sde_step failed: .*`flowdppo doctor` says"):
        cuda.sde_step(rows, rows, None, rows, *step)


def test_the_dtype_of_the_next_state_is_its_own(cuda):
    got = cuda.sde_step(*sampler_step((1, 2, 3072), (BF16,) * 3, out=F32))[0]
    assert got.dtype == F32
    rounded = cuda.sde_step(*sampler_step((1, 2, 3072), (F32,) * 3, out=BF16))[0]
    assert rounded.dtype == BF16
