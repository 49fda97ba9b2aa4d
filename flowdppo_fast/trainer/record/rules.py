"""What a program does, in a line for people: ``b1 + 4.5*(b0 - b1)`` of the outputs ``b0``, ``b1``, ..."""

from __future__ import annotations

from numbers import Number
from typing import Any

from .arguments import Ref
from .functions import title
from .program import Op, Program

# longer ones are told by their number of functions
_LONGEST = 120
_SIGNS = {
    "add": "+", "__add__": "+", "__radd__": "+", "__iadd__": "+", "add_": "+", "sub": "-", "__sub__": "-",
    "__rsub__": "-", "__isub__": "-", "sub_": "-", "rsub": "-", "subtract": "-", "mul": "*", "__mul__": "*",
    "__rmul__": "*", "__imul__": "*", "mul_": "*", "multiply": "*", "div": "/", "__truediv__": "/", "__rtruediv__": "/",
    "__itruediv__": "/", "div_": "/", "true_divide": "/",
}  # fmt: skip
_REVERSED = ("__rsub__", "__rtruediv__", "rsub", "__radd__", "__rmul__")
# the same numbers in another dtype, shape or order
_SAME = frozenset(
    [
        "to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "detach", "data", "view",
        "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "permute", "transpose", "movedim", "expand",
        "view_as", "reshape_as", "cpu", "cuda", "__getitem__", "narrow", "select", "unbind", "chunk", "split", "stack",
        "expand_as", "t", "T", "mT", "swapaxes", "tensor_split", "__deepcopy__",
    ]
)  # fmt: skip


def rule_of(program: Program) -> str:
    """The velocity as a formula where it is short, else how many functions it takes."""
    names: dict[Ref, tuple[str, int]] = {}
    count = 0
    for op in program.ops:
        if not isinstance(op, Op):
            for key, ref in op.outputs.items():
                layout = op.slots.get(key)
                copies = layout.copies if layout is not None else 1
                # the copies of a doubled batch are outputs of their own
                first, many = (count + key[1] // op.batch, 1) if layout and layout.listed else (count, copies)
                names[ref] = (f"b{first}" if many == 1 else f"b{first}:{first + many}", 9)
            count += max([1, *(layout.copies for layout in op.slots.values() if layout is not None)])
            continue
        made = _told(op, names)
        for number, name in enumerate(op.results):
            if name is not None:
                names[name] = made[number] if isinstance(made, list) else made
        for ref in op.writes:
            names[ref] = made if not isinstance(made, list) else made[0]
    text, strength = names[program.result]
    if program.negated:
        text, _ = _negative(text, strength)
    if len(text) > _LONGEST:
        return f"{sum(isinstance(op, Op) for op in program.ops)} functions of {count} outputs"
    return text


def _told(op: Op, names: dict[Ref, tuple[str, int]]) -> Any:
    """Text and binding strength of an op's result (1 sum, 2 product, 9 a word), or a list of those of its parts."""

    def word(leaf: Any) -> tuple[str, int]:
        if isinstance(leaf, Ref):
            return names.get(leaf, ("?", 9))
        return (f"{leaf:g}" if isinstance(leaf, Number) and not isinstance(leaf, complex) else "c", 9)

    name, found = title(op.function), [word(leaf) for leaf in op.leaves if isinstance(leaf, Ref) or _matters(leaf)]
    refs = [names.get(leaf, ("?", 9)) for leaf in op.leaves if isinstance(leaf, Ref)]
    if op.branch is not None:
        # of a branch, the side that was taken
        return word(op.leaves[1 if op.branch.expected else 2])
    if name in _SAME or name == "_alias":
        if name in ("stack",) and len(set(refs)) > 1:
            return "stack(" + ", ".join(text for text, _ in refs) + ")", 9
        return _parts(refs[0], op, name) if refs else ("c", 9)
    if name in ("neg", "__neg__", "negative"):
        return _negative(*refs[0])
    if name in _SIGNS and len(found) >= 2:
        sign = _SIGNS[name]
        left, right = found[:2][::-1] if name in _REVERSED else found[:2]
        # a scale comes first
        if sign == "*" and right[0].replace(".", "").isdigit():
            left, right = right, left
        own = 1 if sign in "+-" else 2
        first = f"({left[0]})" if left[1] < own else left[0]
        second = f"({right[0]})" if right[1] < own or (sign in "-/" and right[1] == own) else right[0]
        return (f"{first} {sign} {second}" if own == 1 else f"{first}{sign}{second}"), own
    return f"{name.removeprefix('linalg_').removeprefix('vector_')}({', '.join(text for text, _ in refs)})", 9


def _negative(text: str, strength: int) -> tuple[str, int]:
    if strength == 3:
        return (text[2:-1], 1) if text.startswith("-(") else (text[1:], 9)
    return (f"-{text}" if strength == 9 else f"-({text})"), 3


def _parts(source: tuple[str, int], op: Op, name: str) -> Any:
    text, strength = source
    if ":" in text and text[1:].replace(":", "").isdigit():
        first, last = (int(number) for number in text[1:].split(":"))
        if len(op.results) == last - first and name in ("chunk", "split", "unbind", "tensor_split"):
            return [(f"b{first + number}", 9) for number in range(last - first)]
    return (text, strength)


def _matters(leaf: Any) -> bool:
    return not isinstance(leaf, (str, bool, type(None))) and (isinstance(leaf, Number) or hasattr(leaf, "value"))
