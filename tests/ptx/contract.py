"""What ptxas may do to PTX: fuse a multiplication into the addition that takes its product.

The PTX manual lets ``mul`` and ``add`` without a rounding modifier become one fused multiply-add (ptxas does so unless
it is told ``--fmad=false``). Where a product goes into several additions each takes its own copy.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from ptx.parse import Instruction, Kernel, Operand, Register, Vector

_KINDS = (("f32",), ("f32x2",))


def contract(kernel: Kernel) -> Kernel:
    """The kernel with all such pairs fused whose registers are written once: nothing changes between the two."""
    written = Counter(name for one in kernel.code for name in _results(one))
    once = {name for name, count in written.items() if count == 1}

    def stays(operand: Operand) -> bool:
        return not isinstance(operand, Register) or operand.name in once

    products = {
        one.operands[0].name: one
        for one in kernel.code
        if one.opcode == "mul"
        and one.modifiers in _KINDS
        and one.guard is None
        and isinstance(one.operands[0], Register)
        and all(stays(operand) for operand in one.operands)
    }
    return dataclasses.replace(kernel, code=[_fused(one, products) for one in kernel.code])


def _results(one: Instruction) -> list[str]:
    """Registers that an instruction may write: its first operand."""
    first = one.operands[0] if one.operands else None
    items = first.items if isinstance(first, Vector) else (first,)
    return [item.name for item in items if isinstance(item, Register)]


def _fused(one: Instruction, products: dict[str, Instruction]) -> Instruction:
    if one.opcode not in ("add", "sub") or one.modifiers not in _KINDS:
        return one
    result, left, right = one.operands
    subtracts = one.opcode == "sub"
    for product, other, signs in (
        (left, right, ("plus", "minus" if subtracts else "plus")),
        (right, left, ("minus" if subtracts else "plus", "plus")),
    ):
        factors = products.get(product.name) if isinstance(product, Register) else None
        if factors is not None and factors.modifiers == one.modifiers:
            return dataclasses.replace(
                one,
                opcode="contracted",
                modifiers=(*signs, *one.modifiers),
                operands=(result, *factors.operands[1:], other),
                text=f"{factors.text}; {one.text}",
            )
    return one
