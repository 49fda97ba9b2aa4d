"""Compiled kernels with one instruction broken: a number, a race or an address must tell.

A change that nobody notices fails the test: what it broke is either not needed or not tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_checks import (
    SAMPLER_STEP,
    check_grad,
    check_stats,
    check_step,
    epilogue,
    in_double,
    sampler_step,
    some,
    source,
)
from ptx.machine import Program
from ptx.parse import Address, Fault, Immediate, Instruction, bits_of
from support import given_rows

from flowdppo_fast import reference
from flowdppo_fast.objectives import GRPOGuard

# rows in vectors and by single elements; more splits of a row, and more rows, than a warp has threads
SHAPES = ((1, 1, 1024 * 34 + 8), (1, 3, 1291))
MANY_ROWS = (1, 40, 5)


def losses(cuda: Any) -> None:
    """The forward kernel's two endings; the objective couples rows whose old log-probs and steps are given."""
    for shape in (*SHAPES, MANY_ROWS):
        arguments = source(shape, table=3)
        check_stats(cuda, arguments)
        rows = shape[1]
        row = list(epilogue(GRPOGuard(0.05, 0.05, "batch"), rows))
        # as the old policy's would be, of the noise alone
        moments = reference.row_stats(*in_double(arguments), True)[2]
        row[2] = (-0.5 * moments - arguments[5][:, 0].double().log() - 0.5 * math.log(2 * math.pi)).float()
        got, want = cuda.policy_loss(*arguments, *row), reference.policy_loss(*in_double(arguments), *in_double(row))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-5, equal_nan=True)


def gradients(cuda: Any) -> None:
    for shape in SHAPES:
        check_grad(cuda, source(shape, table=3), upstream=torch.randn(shape[1]))


def steps(cuda: Any) -> None:
    for shape in SHAPES:
        table = torch.tensor([SAMPLER_STEP]) * torch.linspace(0.5, 1.5, shape[1])[:, None]
        check_step(cuda, sampler_step(shape, step=table.contiguous()))


def given(cuda: Any) -> None:
    """More rows than threads, and a number of each that nobody else has."""
    options = {"with_reference": True, "kl_weight": 0.3}
    given_rows.check(cuda.log_prob_loss, given_rows.draw("grpo_guard_batch", 150, columns=3, **options))


SCENARIOS: dict[str, Callable[[Any], None]] = {
    "forward": losses,
    "given": given,
    "gradient": gradients,
    "step": steps,
}


def relaxed(one: Instruction) -> Instruction:
    return replace(one, modifiers=tuple("relaxed" if x == "acq_rel" else x for x in one.modifiers))


def own_value(one: Instruction) -> Instruction:
    result, value, _, *rest = one.operands
    return replace(one, operands=(result, value, Immediate(0, "int"), *rest))


def one_further(one: Instruction) -> Instruction:
    """Off by what the access takes."""
    at = next(i for i, operand in enumerate(one.operands) if isinstance(operand, Address))
    vector = next((int(x[1]) for x in one.modifiers if x in ("v2", "v4")), 1)
    width = vector * bits_of(one.modifiers[-1]) // 8
    address = one.operands[at]
    assert isinstance(address, Address)
    further = replace(address, offset=address.offset + width)
    return replace(one, operands=(*one.operands[:at], further, *one.operands[at + 1 :]))


# what is broken, and what becomes of it; None: it is gone
FAULTS: dict[str, tuple[Callable[[Instruction], bool], Callable[[Instruction], Instruction] | None]] = {
    "barrier": (lambda one: one.opcode in ("bar", "barrier") and "sync" in one.modifiers, None),
    "ticket": (lambda one: one.opcode == "atom", relaxed),
    "shuffle": (lambda one: one.opcode == "shfl", own_value),
    "load": (lambda one: one.opcode == "ld" and "global" in one.modifiers, one_further),
    "store": (lambda one: one.opcode == "st" and "global" in one.modifiers, one_further),
}
CASES = [
    (kernel, fault)
    for kernel in SCENARIOS
    for fault in FAULTS
    # rows alone take no tickets; a gradient is not added up
    if fault not in {"given": ("ticket",), "gradient": ("barrier", "ticket", "shuffle")}.get(kernel, ())
]
# one of each kind
SOME = [("forward", "barrier"), ("forward", "ticket"), ("given", "shuffle"), ("gradient", "load"), ("step", "store")]


def broken(program: Program, at: int, change: Callable[[Instruction], Instruction] | None) -> Program:
    """The program with another instruction, or none, at one place."""
    other = object.__new__(Program)
    other.kernel, other.steps = program.kernel, list(program.steps)
    if change is None:
        other.steps[at] = program.steps[at]._replace(flow=None, action=lambda machine, lanes: None)
    else:
        for place in (at, at + 1) if program.kernel.code[at].opcode == "shfl" else (at,):
            other.steps[place] = program._step(change(program.kernel.code[place]))
    return other


def visits(program: Program, places: list[int], seen: set[int]) -> Program:
    """The program, which notes which of some places are executed; barriers count as if they were."""
    other = object.__new__(Program)
    other.kernel, other.steps = program.kernel, list(program.steps)
    for at in places:
        step = program.steps[at]
        if step.action is None:
            seen.add(at)
            continue

        def note(machine: Any, lanes: Any, at: int = at, action: Any = step.action) -> None:
            seen.add(at)
            action(machine, lanes)

        other.steps[at] = step._replace(action=note)
    return other


@pytest.mark.parametrize(
    ("kernel", "fault", "most"),
    some([(*case, 2) for case in SOME], [(*case, None) for case in CASES]),
)
def test_it_is_noticed(cuda, monkeypatch, kernel, fault, most):
    is_place, change = FAULTS[fault]
    scenario = SCENARIOS[kernel]
    seen: set[int] = set()
    name = f"{kernel}_kernel"

    kernels: set[Program] = set()

    def watch(program: Program) -> Program:
        if name not in program.kernel.name:
            return program
        kernels.add(program)
        return visits(program, [at for at, one in enumerate(program.kernel.code) if is_place(one)], seen)

    def run(alter: Callable[[Program], Program]) -> None:
        torch.manual_seed(0)
        monkeypatch.setattr(cuda, "alter", alter)
        scenario(cuda)

    run(watch)
    places = sorted(seen)
    assert places
    if fault == "shuffle":
        # the halves of a float64: the lower ones alone are below a float32's ulp
        assert [upper - lower for lower, upper in zip(places[::2], places[1::2])] == [1] * (len(places) // 2)
        places = places[::2]
    # of many the first and the last, which lie in different parts of the kernel
    unnoticed = []
    for at in places if most is None else dict.fromkeys((places[0], places[-1])):
        try:
            run(lambda program, at=at: broken(program, at, change) if name in program.kernel.name else program)
        except (Fault, AssertionError):
            continue
        unnoticed.append(at)
    program = next(iter(kernels))
    assert [program.kernel.code[at].text for at in unnoticed] == []
