"""Both sides of a Python branch on a transformer's output, such as ``if norm > limit: x = x * (limit / norm)``.

Only one side runs while a pipeline is recorded, and other weights may take the other one. Where the source says what
the branch is, an ``if`` around one assignment or ``a if c else b``, the other side is known as well.
"""

from __future__ import annotations

import ast
import functools
import linecache
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

# functions of numbers; methods are those of torch
_BUILTINS = ("float", "int", "abs", "len", "round")
_TORCH = (Tensor, torch, torch.linalg, torch.nn.functional, torch.fft)
_EXPRESSIONS = (
    ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple,
    ast.List, ast.Call, ast.keyword, ast.expr_context, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """What a branch chooses, as code.

    Attributes:
        sides: the value where the test is False, and where it is True.
        held: the tensor that is given the value's numbers; None: the value is another tensor.
        extra: functions of tensors that a side has besides those of its value.
    """

    sides: tuple[CodeType, CodeType]
    held: CodeType | None
    extra: tuple[int, int]

    @classmethod
    def at(cls, frame: FrameType) -> Branch | None:
        """The one whose test a frame is at, if it is the only one in its line and chooses a value."""
        found = _branches(frame.f_code.co_filename).get(frame.f_lineno, [])
        return found[0] if len(found) == 1 else None

    @staticmethod
    def run(code: CodeType, frame: FrameType) -> Any:
        """What the code gives at a frame."""
        return eval(code, frame.f_globals, dict(frame.f_locals))


@functools.cache
def _branches(filename: str) -> dict[int, list[Branch | None]]:
    """All branches of a file by the lines of their tests."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return {}
    found: dict[int, list[Branch | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp)):
            for line in range(node.test.lineno, (node.test.end_lineno or node.test.lineno) + 1):
                found.setdefault(line, []).append(_read(node))
    return found


def _read(node: ast.If | ast.IfExp) -> Branch | None:
    # of `a and b` or `a < b < c` the answer of one part is not that of the test
    if isinstance(node.test, (ast.BoolOp, ast.UnaryOp)) or len(getattr(node.test, "ops", [0])) > 1:
        return None
    target: ast.expr | None = None
    in_place, extra = False, (0, 0)
    if isinstance(node, ast.IfExp):
        values: list[ast.expr | None] = [node.orelse, node.body]
    else:
        values = []
        statements = [one for side in (node.orelse, node.body) for one in side]
        kinds = {type(one) for one in statements}
        if max(len(node.orelse), len(node.body)) > 1 or len(kinds) > 1 or not kinds <= {ast.Assign, ast.AugAssign}:
            return None
        targets = [x for one in statements for x in getattr(one, "targets", [getattr(one, "target", None)])]
        target = targets[0]
        if not isinstance(target, (ast.Name, ast.Subscript)) or len({ast.unparse(x) for x in targets}) > 1:
            return None
        in_place = ast.AugAssign in kinds or isinstance(target, ast.Subscript)
        for side in (node.orelse, node.body):
            one = side[0] if side else None
            if isinstance(one, ast.AugAssign):
                values.append(ast.BinOp(target, one.op, one.value))
            else:
                values.append(getattr(one, "value", target))
        setting = isinstance(target, ast.Subscript)
        extra = (int(setting and bool(node.orelse)), int(setting))
    if not all(value is not None and _is_pure(value) for value in values):
        return None
    sides = [_compiled(value) for value in values if value is not None]
    return Branch((sides[0], sides[1]), _compiled(target) if target is not None and in_place else None, extra)


def _is_pure(value: ast.expr) -> bool:
    """Whether evaluating it changes nothing."""
    for node in ast.walk(value):
        if not isinstance(node, _EXPRESSIONS):
            return False
        if isinstance(node, ast.Call):
            name = node.func
            if isinstance(name, ast.Attribute):
                if name.attr.endswith("_") or not any(hasattr(one, name.attr) for one in _TORCH):
                    return False
            elif not (isinstance(name, ast.Name) and name.id in _BUILTINS):
                return False
    return True


def _compiled(value: ast.expr) -> CodeType:
    return compile(ast.unparse(value), "<branch>", "eval")
