"""How launches are cut: pure functions, asked for every benchmark workload and for shapes nobody would think of."""

from __future__ import annotations

import ctypes
import functools
import itertools

import pytest
import torch
from host_kernels import DTYPES, I64, KINDS, SMALL, HostBackend, Limits, Plan, Work, kernels
from host_layer import HostError
from hypothesis import given, settings
from hypothesis import strategies as st

# section 1 of the benchmark's page: rows and elements of a row
WORKLOADS = {
    "sd3-512": ((8, 16), 16 * 64 * 64),
    "sd3-1024": ((8,), 16 * 128 * 128),
    "flux-1024": ((16,), 4096 * 64),
    "flux2-1024": ((8,), 4096 * 128),
    "wan-480p": ((4, 8), 16 * 21 * 60 * 104),
    "hunyuan-720p": ((4, 16), 16 * 33 * 90 * 160),
    "stacked replay": ((8 * 3,), 16 * 64 * 64),
}
SIZES = [(name, rows, numel) for name, (counts, numel) in WORKLOADS.items() for rows in counts]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# processors, shared memory that a block may ask for, blocks of a portable cluster
DEVICES = {
    "sm_80": Limits(108, 166_912, 1),
    "sm_86": Limits(84, 101_376, 1),
    "sm_90": Limits(132, 232_448, 8),
    "sm_100": Limits(148, 232_448, 8),
}
STREAMING = KINDS[:4]
MOST_BLOCKS = 2**31 - 1
# what a block has without asking for more
PLAIN_SHARED = 48 * 1024


def work_of(rows, numel, dtypes=(BF16,) * 4, *, seeded=False, reference=False, aligned=True, coupled=False) -> Work:
    numbers = (I64 * 4)(*(DTYPES[dtype] for dtype in dtypes))
    return Work(rows, numel, numbers, not seeded, reference, aligned, coupled)


WORKS = [
    {"dtypes": (dtype, dtype, noise, dtype), "seeded": seeded, "reference": reference}
    for dtype, noise in ((BF16, BF16), (BF16, F32), (F32, F32), (F16, F16), (F32, BF16))
    for seeded, reference in itertools.product((False, True), repeat=2)
]
works = st.builds(
    work_of,
    rows=st.one_of(st.integers(1, 600), st.integers(1, 2**30)),
    numel=st.one_of(st.integers(1, 10_000), st.integers(1, 2**40)),
    dtypes=st.tuples(*[st.sampled_from([F32, BF16, F16])] * 4),
    seeded=st.booleans(),
    reference=st.booleans(),
    aligned=st.booleans(),
    coupled=st.booleans(),
    # more than the memory of any device
).filter(lambda work: work.rows * work.numel <= 2**41)
devices = st.one_of(
    st.sampled_from(list(DEVICES.values())),
    st.builds(Limits, st.integers(1, 300), st.integers(PLAIN_SHARED, 300_000), st.sampled_from([1, 2, 4, 8])),
)


@functools.cache
def constants():
    return kernels().library.api_constants()


def fields(plan: Plan) -> tuple:
    return tuple(vars(plan).values())


def check_shape(plan: Plan, most_threads: int, limits: Limits) -> None:
    assert 1 <= plan.blocks <= MOST_BLOCKS
    assert plan.threads % 32 == 0
    assert 32 <= plan.threads <= most_threads <= 1024
    assert plan.blocks % plan.cluster == 0
    assert 1 <= plan.cluster <= limits.max_cluster
    assert plan.shared_bytes <= limits.shared_per_block


def check_finish(plan: Plan) -> None:
    """Slots are merged pairwise by threads of one block."""
    assert 1 <= plan.slots <= plan.threads
    assert plan.slots & (plan.slots - 1) == 0
    assert plan.shared_bytes >= constants().reduce_bytes + plan.slots * constants().slot_bytes


def check_streaming(work: Work, kind: str) -> Plan:
    plan = kernels().plan(work, kind)
    check_shape(plan, constants().stream_threads, Limits(1, PLAIN_SHARED, 1))
    assert plan.shared_bytes >= constants().reduce_bytes
    # block row*splits + split takes elements split*elements and so on: every element is in exactly one
    assert plan.blocks == work.rows * plan.splits
    assert (plan.splits - 1) * plan.elements < work.numel <= plan.splits * plan.elements
    # every split starts at a vector of the widest and of the narrowest dtype, and at a Philox block
    assert plan.elements % (plan.threads * kernels().group(work)) == 0
    assert plan.elements % 8 == 0
    assert plan.elements < 2**31
    # memory: four doubles per split and row
    assert plan.scratch_bytes == 32 * work.rows * (plan.splits + 1)
    if kind == "objective":
        check_finish(plan)
    else:
        assert plan.slots == 0
    return plan


def check_holding(work: Work, limits: Limits) -> Plan:
    plan = kernels().plan(work, "single_pass", limits)
    if not plan.possible:
        return plan
    assert work.aligned
    assert not work.couples_rows
    check_shape(plan, constants().holding_threads, limits)
    check_finish(plan)
    assert plan.blocks == work.rows * plan.cluster
    # block number rank takes groups rank*groups and so on, its threads up to per_thread each; the tail is one block's
    groups = work.numel // kernels().group(work)
    assert plan.cluster * plan.groups >= groups
    assert plan.cluster * (plan.groups - 1) < max(groups, 1)
    assert plan.per_thread * plan.threads >= plan.groups > (plan.per_thread - 1) * plan.threads
    held = plan.per_thread * plan.threads * 16 * kernels().library.api_pieces(ctypes.byref(work), I64(plan.holds_noise))
    assert plan.shared_bytes >= constants().reduce_bytes + held
    # sums of rows only: nothing grows with their length
    assert plan.scratch_bytes == 32 * work.rows
    return plan


@pytest.mark.parametrize(("name", "rows", "numel"), SIZES, ids=lambda value: str(value))
@pytest.mark.parametrize("kind", STREAMING)
def test_workloads_are_streamed_whole(name, rows, numel, kind):
    for options in WORKS:
        plan = check_streaming(work_of(rows, numel, **options), kind)
        assert plan.scratch_bytes + 4 * (rows + 1) <= 2**20, "more than 1 MB besides the gradient"
        # work for every processor of the largest device, unless the latents are too small to cut
        assert plan.blocks >= min(2 * 148, rows * -(-numel // plan.elements))


@pytest.mark.parametrize(("name", "rows", "numel"), SIZES, ids=lambda value: str(value))
@pytest.mark.parametrize("device", DEVICES)
def test_workloads_are_held_where_they_fit(name, rows, numel, device):
    for options in WORKS:
        plan = check_holding(work_of(rows, numel, **options), DEVICES[device])
        if DEVICES[device].max_cluster == 1:
            assert not plan.possible


@pytest.mark.parametrize("dtypes", [(BF16,) * 4, (F16,) * 4, (F32,) * 4])
def test_images_take_a_single_pass_on_new_devices(dtypes):
    """sd3-512 without a reference: what the single pass is for."""
    for device in ("sm_90", "sm_100"):
        for seeded in (False, True):
            assert kernels().plan(work_of(8, 65_536, dtypes, seeded=seeded), "single_pass", DEVICES[device]).possible


@pytest.mark.parametrize(
    "options",
    [
        {"aligned": False},
        {"coupled": True},
        {"dtypes": (BF16, F32, BF16, BF16)},
        {"dtypes": (BF16, BF16, F32, BF16)},
        {"dtypes": (F32, F32, F32, F16), "reference": True},
    ],
    ids=str,
)
def test_what_a_single_pass_cannot_do(options):
    assert kernels().plan(work_of(8, 65_536), "single_pass", DEVICES["sm_90"]).possible
    assert not kernels().plan(work_of(8, 65_536, **options), "single_pass", DEVICES["sm_90"]).possible
    assert not kernels().plan(work_of(8, 2**24), "single_pass", DEVICES["sm_90"]).possible


@settings(max_examples=300, deadline=None, derandomize=True)
@given(work=works, kind=st.sampled_from(STREAMING))
def test_any_shape_is_streamed_whole(work, kind):
    plan = check_streaming(work, kind)
    # of the shape and the dtypes alone: the same sums on every device and from wherever in memory
    for limits, aligned in ((DEVICES["sm_80"], False), (DEVICES["sm_100"], True)):
        other = Work(work.rows, work.numel, work.dtypes, work.has_noise, work.has_reference, aligned, work.couples_rows)
        assert fields(kernels().plan(other, kind, limits)) == fields(plan)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(work=works, limits=devices)
def test_any_shape_is_held_within_limits(work, limits):
    plan = check_holding(work, limits)
    assert fields(kernels().plan(work, "single_pass", limits)) == fields(plan)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_small_plans_of_the_tests_are_plans(data):
    """What the kernels' tests ask for instead of the library's plan covers rows just as well."""
    numel = data.draw(st.integers(1, 20_000))
    work = work_of(data.draw(st.integers(1, 9)), numel, data.draw(st.sampled_from([(F32,) * 4, (BF16,) * 4])))
    for kind in STREAMING:
        plan = kernels().plan(work, kind, wish=SMALL)
        assert (plan.splits - 1) * plan.elements < numel <= plan.splits * plan.elements
    plan = kernels().plan(work, "single_pass", wish=SMALL)
    assert plan.possible
    assert plan.cluster * plan.groups >= numel // kernels().group(work)


def test_no_rows_are_no_launch():
    """Whoever calls with no rows has to notice: the launch refuses."""
    work = work_of(0, 100)
    for kind in STREAMING:
        assert kernels().plan(work, kind).blocks == 0
    nothing = torch.zeros(0, 1, 100)
    with pytest.raises(HostError, match="got blocks = 0"):
        HostBackend().row_stats(
            nothing, nothing, nothing, None, None, None, [1.0, 1.0, 1.0], 0, 0, 0, False
        )  # fmt: skip
