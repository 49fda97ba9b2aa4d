"""The emulator itself, on PTX written by hand: arithmetic to the bit, and every fault that it is there to find."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from .contract import contract
from .machine import Machine, Program
from .memory import GlobalMemory
from .numbers import Approximation, bf16_bits, fma32
from .parse import Fault, parse
from .races import RaceChecker

HEAD = ".version 8.7\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 dynamic[];\n"


def kernel(body: str, *, head: str = "") -> str:
    """An entry of two pointers, ``%rd1`` and ``%rd2``, and a count ``%r1``; thread and block are ``%r2``, ``%r3``."""
    return f"""{HEAD}{head}
.visible .entry k(.param .u64 .ptr .global .align 1 k_0, .param .u64 k_1, .param .u32 k_2)
.maxntid 128
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>; .reg .f32 %f<20>;
    ld.param.b64 %rd1, [k_0];
    ld.param.b64 %rd2, [k_1];
    ld.param.b32 %r1, [k_2];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
{body}
    ret;
}}"""


def run(text, source, result, count=0, *, grid=1, threads=64, shared=0, contracted=False, **options) -> list[str]:
    """Runs a kernel on two arrays; returns the races."""
    parsed = parse(text)["k"]
    memory = GlobalMemory((x.ctypes.data, x.nbytes) for x in (source, result))
    races = RaceChecker()
    machine = Machine(Program(contract(parsed) if contracted else parsed), memory, races=races, **options)
    machine.launch(grid, threads, shared, struct.pack("QQI", source.ctypes.data, result.ctypes.data, count))
    return races.reports


def on_each(operations: str, x: np.ndarray, **options) -> np.ndarray:
    """``operations`` from the bits in ``%r4`` to those in ``%r5``, on every element of ``x`` (64 of 32 bits)."""
    out = np.zeros_like(x)
    run(kernel(f"ld.global.b32 %r4, [%rd4];\n{operations}\nst.global.b32 [%rd5], %r5;"), x, out, **options)
    return out


def floats(count=64) -> np.ndarray:
    return np.random.standard_normal(count).astype(np.float32)


# ---------------------------------------------------------------- arithmetic


def test_fma_rounds_once():
    a, b = floats(2000), floats(2000)
    c = (-a.astype(np.float64) * b).astype(np.float32) * (1 + np.float32(2**-20) * floats(2000))
    for x, y, z, got in zip(a, b, c, fma32(a, b, c)):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(got)) - exact)
        neighbours = [np.nextafter(got, np.float32(limit)) for limit in (-np.inf, np.inf)]
        assert all(error <= abs(Fraction(float(other)) - exact) for other in neighbours)


def test_bf16_is_rounded_as_torch_does():
    bits = np.random.randint(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(2000, dtype=np.uint32) * 0x8000 + 0x3F800000
    x = np.concatenate((bits, halves)).view(np.float32)
    x = x[~np.isnan(x)]
    expected = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bf16_bits(x), expected)


@pytest.mark.parametrize("approximation", list(Approximation), ids=lambda one: one.value)
def test_an_approximation_errs_by_what_is_allowed(approximation):
    x = np.abs(floats()) + 0.1
    x[:2] = 0, np.inf
    got = on_each("sqrt.approx.f32 %r5, %r4;", x, approximation=approximation)
    error = got.view(np.int32).astype(np.int64) - np.sqrt(x).view(np.int32)
    assert (error[:2] == 0).all()
    expected = {"exact": {0}, "low": {-1}, "high": {1}, "varied": {-1, 0, 1}}[approximation.value]
    assert set(error[2:].tolist()) == expected


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ("mul.f32 %r6, %r4, %r4; add.f32 %r5, %r6, %r4;", lambda x: fma32(x, x, x)),
        ("mul.f32 %r6, %r4, %r4; sub.f32 %r5, %r6, %r4;", lambda x: fma32(x, x, -x)),
        ("mul.f32 %r6, %r4, %r4; sub.f32 %r5, %r4, %r6;", lambda x: fma32(-x, x, x)),
        # a rounding modifier forbids it
        ("mul.rn.f32 %r6, %r4, %r4; add.f32 %r5, %r6, %r4;", lambda x: x * x + x),
    ],
)
def test_products_are_contracted_into_sums(operations, expected):
    x = floats()
    assert np.array_equal(on_each(operations, x, contracted=True), expected(x))
    separate = {"add": x * x + x, "sub": x * x - x}["add" if "add" in operations else "sub"]
    if "sub.f32 %r5, %r4" in operations:
        separate = -separate
    assert np.array_equal(on_each(operations, x), separate)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ("shr.s32 %r5, %r4, 3;", lambda x: (x.view(np.int32) >> 3).view(np.uint32)),
        ("shl.b32 %r5, %r4, 40;", lambda x: x * 0),
        ("bfe.u32 %r5, %r4, 5, 7;", lambda x: (x >> 5) & 127),
        ("bfe.s32 %r5, %r4, 2, 1;", lambda x: (0 - ((x >> 2) & 1)).astype(np.uint32)),
        ("mul.hi.u32 %r5, %r4, 0xD2511F53;", lambda x: (x.astype(np.uint64) * 0xD2511F53 >> 32).astype(np.uint32)),
        ("lop3.b32 %r5, %r4, 0xFF00FF00, 0x0F0F0F0F, 0x96;", lambda x: x ^ 0xFF00FF00 ^ 0x0F0F0F0F),
        ("prmt.b32 %r5, %r4, 0, 0x0123;", lambda x: x.byteswap()),
        ("shf.l.wrap.b32 %r5, %r4, %r4, 7;", lambda x: (x << 7) | (x >> 25)),
        ("div.s32 %r5, %r4, -7;", lambda x: np.trunc(x.view(np.int32) / -7.0).astype(np.int32).view(np.uint32)),
        ("{ .reg .b32 t; mov.b32 t, %r4; add.s32 %r5, t, -1; }", lambda x: x - 1),
        ("setp.lt.s32 %p1, %r4, 0; selp.b32 %r5, 1, 2, %p1;", lambda x: np.where(x >> 31, 1, 2).astype(np.uint32)),
        ("setp.ge.u32 %p1, %r2, 32; @%p1 bra L; mov.b32 %r4, 7; L: mov.b32 %r5, %r4;",
         lambda x: np.r_[x[:32] * 0 + 7, x[32:]]),
    ],
)  # fmt: skip
def test_integers(operations, expected):
    x = np.random.randint(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    with np.errstate(over="ignore"):
        assert np.array_equal(on_each(operations, x), expected(x))


def test_shuffles_exchange_within_a_warp():
    x = np.arange(64, dtype=np.uint32)
    got = on_each("shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1;", x)
    assert np.array_equal(got, x ^ 16)


# ---------------------------------------------------------------- faults


def test_what_is_not_known_is_a_fault():
    x = np.zeros(64, np.float32)
    with pytest.raises(Fault, match=r"tanh\.approx\.f32 %f1, %f2: unknown instruction"):
        # met when the kernel is decoded, though nothing executes it
        run(kernel("bra L; tanh.approx.f32 %f1, %f2; L:"), x, x)
    with pytest.raises(Fault, match=r"\.local"):
        run(kernel(".local .align 4 .b8 stack[16];"), x, x)
    with pytest.raises(Fault, match=r"unknown modifiers \['sat'\]"):
        on_each("add.sat.f32 %r5, %r4, %r4;", x)


@pytest.mark.parametrize(("compare", "fault"), [("lt", False), ("le", True)])
def test_an_off_by_one_mask_leaves_its_tensor(compare, fault):
    x, out = floats(50), np.zeros(50, np.float32)
    text = kernel(f"setp.{compare}.u32 %p1, %r2, %r1; @%p1 ld.global.b32 %r4, [%rd4]; @%p1 st.global.b32 [%rd5], %r4;")
    if fault:
        with pytest.raises(Fault, match="lies in no allocation"):
            run(text, x, out, 50)
    else:
        run(text, x, out, 50)
        assert np.array_equal(x, out)


def test_a_wrong_alignment_hint_is_a_fault():
    store = np.zeros(300, np.float32)
    text = kernel(
        "mul.wide.u32 %rd6, %r2, 16; add.s64 %rd6, %rd1, %rd6; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd6];"
    )
    start = -store.ctypes.data // 4 % 4
    run(text, store[start : start + 256], store)
    with pytest.raises(Fault, match="misaligned address"):
        run(text, store[start + 1 : start + 257], store)


def test_shared_memory_is_poisoned_and_bounded():
    x, out = floats(), np.zeros(64, np.uint32)
    place = "mov.b32 %r6, dynamic; mad.lo.s32 %r6, %r2, 4, %r6;"
    run(kernel(f"{place} ld.shared.b32 %r5, [%r6]; st.global.b32 [%rd5], %r5;"), x, out, shared=256)
    assert (out == 0xFFFFFFFF).all()
    with pytest.raises(Fault, match="beyond the 252 bytes"):
        run(kernel(f"{place} ld.shared.b32 %r5, [%r6];"), x, out, shared=252)


def test_barriers_without_all_threads_of_a_warp_and_endless_loops_are_faults():
    x = floats()
    barrier_in_a_branch = "setp.lt.u32 %p1, %r2, {}; @%p1 bra L; bar.sync 0; L:"
    run(kernel(barrier_in_a_branch.format(32)), x, x)
    with pytest.raises(Fault, match=r"bar\.sync 0: executed by part of a warp"):
        run(kernel(barrier_in_a_branch.format(40)), x, x)
    with pytest.raises(Fault, match="more than"):
        run(kernel("M: bra M;"), x, x)


# ---------------------------------------------------------------- races


EXCHANGE = """
    mov.b32 %r6, dynamic; mad.lo.s32 %r7, %r2, 4, %r6;
    ld.global.b32 %r4, [%rd4];
    st.shared.b32 [%r7], %r4;
    BARRIER
    xor.b32 %r8, %r2, DISTANCE; mad.lo.s32 %r8, %r8, 4, %r6;
    ld.shared.b32 %r5, [%r8];
    st.global.b32 [%rd5], %r5;
"""


@pytest.mark.parametrize(
    ("barrier", "distance", "raced"),
    [
        ("bar.sync 0;", 32, False),
        ("bar.warp.sync -1;", 1, False),
        ("bar.warp.sync -1;", 32, True),
        ("", 1, True),
        ("", 0, False),
        ("membar.gl;", 1, True),
    ],
)
def test_a_missing_barrier_is_a_race(barrier, distance, raced):
    x, out = floats(), np.zeros(64, np.float32)
    text = EXCHANGE.replace("BARRIER", barrier).replace("DISTANCE", str(distance))
    assert bool(run(kernel(text), x, out, shared=256)) == raced


def test_reading_and_then_writing_needs_a_barrier_too():
    text = EXCHANGE.replace("BARRIER", "bar.sync 0;").replace("DISTANCE", "32") + "AGAIN st.shared.b32 [%r7], %r5;"
    x, out = floats(), np.zeros(64, np.float32)
    assert run(kernel(text.replace("AGAIN", "")), x, out, shared=256)
    assert not run(kernel(text.replace("AGAIN", "bar.sync 0;")), x, out, shared=256)


def test_lanes_that_store_different_values_at_one_place_race():
    x, out = floats(), np.zeros(64, np.float32)
    assert run(kernel("st.global.b32 [%rd2], %r2;"), x, out)
    # layouts that hold one value in several lanes do this
    assert not run(kernel("mov.b32 %r4, 7; st.global.b32 [%rd2], %r4;"), x, out)


# each block stores its part; who takes the last ticket adds the parts up
LAST_BLOCK = """
    setp.ne.u32 %p1, %r2, 0;
    mul.wide.u32 %rd6, %r3, 4; add.s64 %rd6, %rd2, %rd6;
    @!%p1 st.global.b32 [%rd6+4], %r3;
    BARRIER
    @%p1 bra DONE;
    ATOMIC.u32 %r5, [%rd2], %r1;
    setp.ne.u32 %p2, %r5, 3; @%p2 bra DONE;
    ld.global.b32 %r6, [%rd2+4]; ld.global.b32 %r7, [%rd2+8];
    ld.global.b32 %r8, [%rd2+12]; ld.global.b32 %r9, [%rd2+16];
    add.s32 %r6, %r6, %r7; add.s32 %r6, %r6, %r8; add.s32 %r6, %r6, %r9;
    st.global.b32 [%rd2+20], %r6;
    DONE:
"""


@pytest.mark.parametrize("resident", [None, 1])
@pytest.mark.parametrize(
    ("atomic", "raced"), [("atom.acq_rel.gpu.global.inc", False), ("atom.relaxed.gpu.global.inc", True)]
)
def test_a_relaxed_atomic_orders_nothing(atomic, raced, resident):
    x, out = floats(), np.zeros(8, np.uint32)
    text = LAST_BLOCK.replace("BARRIER", "bar.sync 0;").replace("ATOMIC", atomic)
    order = np.random.default_rng(1)
    assert bool(run(kernel(text), x, out, 99, grid=4, order=order, resident=resident)) == raced
    # the right sum either way: only the race tells
    assert out[5] == 6


def test_another_thread_needs_a_barrier_before_the_ticket():
    text = LAST_BLOCK.replace("setp.ne.u32 %p1, %r2, 0;", "setp.ne.u32 %p1, %r2, 0; setp.ne.u32 %p3, %r2, 40;", 1)
    text = text.replace("@!%p1 st.global", "@!%p3 st.global").replace("ATOMIC", "atom.acq_rel.gpu.global.inc")
    x, out = floats(), np.zeros(8, np.uint32)
    assert not run(kernel(text.replace("BARRIER", "bar.sync 0;")), x, out, 99, grid=4)
    out[:] = 0
    assert run(kernel(text.replace("BARRIER", "")), x, out, 99, grid=4)
