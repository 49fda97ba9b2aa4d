"""Both sides of a Python branch on a transformer's output, such as ``if norm > limit: x = x * (limit / norm)``.

Only one side runs while a pipeline is recorded, and other weights may take the other one. Where the source says what
the branch chooses, an ``if`` that assigns or returns one value or ``a if c else b``, the other side is known as well.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from .arguments import Call
from .program import Op

# functions of numbers; others are those of torch
_BUILTINS = ("float", "int", "abs", "len", "round")
_TORCH = (Tensor, torch, torch.linalg, torch.nn.functional, torch.fft)
_EXPRESSIONS = (
    ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple,
    ast.List, ast.Call, ast.keyword, ast.expr_context, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_VALUE = "__value"


@dataclass(frozen=True)
class Branch:
    """What a branch chooses, as code.

    Attributes:
        sides: what happens where the test is False, and where it is True, up to the value.
        held: the tensor that is given the value's numbers; None: the value is another tensor.
        extra: functions of tensors that a side has besides those of its value.
    """

    sides: tuple[CodeType, CodeType]
    held: CodeType | None = None
    extra: tuple[int, int] = (0, 0)

    @classmethod
    def at(cls, frame: FrameType) -> Branch | None:
        """The one whose test a frame is at, if it is the only one in its line and chooses a value."""
        found = _branches(frame.f_code.co_filename).get(frame.f_lineno, [])
        return found[0] if len(found) == 1 else None

    @staticmethod
    def run(code: CodeType, frame: FrameType) -> Any:
        """What the code gives at a frame, whose variables stay what they are."""
        scratch = dict(frame.f_locals)
        exec(code, frame.f_globals, scratch)
        return scratch[_VALUE]


def follow(tape: Any, frame: FrameType, answered: Op, test: Tensor) -> None:
    """Notes both sides of the branch that a frame is at, if its source is known, and the choice between them.

    The pipeline goes on with the side that it takes: its result has the name of the choice from then on.

    Args:
        tape: where the answer was noted.
        answered: the op with the answer to ``test``.
    """
    branch, taken, start = Branch.at(frame), answered.expected, len(tape.ops)
    if branch is None or taken is None:
        return
    try:
        with tape:
            held = None if branch.held is None else branch.run(branch.held, frame)
            other = branch.run(branch.sides[not taken], frame)
            before = len(tape.ops)
            own = branch.run(branch.sides[taken], frame)
            count = len(tape.ops) - before + branch.extra[taken]
            same = all(isinstance(x, Tensor) for x in (own, other)) and own.shape == other.shape
            known = same and own.dtype == other.dtype and isinstance(held, (Tensor, type(None)))
            if not known or any(isinstance(op, Call) or op.expected is not None for op in tape.ops[start:]):
                raise TypeError
            chosen = torch.where(test.detach().reshape(()).bool(), *((own, other) if taken else (other, own)))
    except Exception:
        # a side that cannot be run here: the branch has to stay as it is, and an error says when it does not
        del tape.ops[start:]
        return
    tape.ops[-1].branch = answered

    def settle(result: Any) -> None:
        if held is not None:
            answered.followed = True
            with tape:
                held.copy_(chosen)
        elif isinstance(result, Tensor) and result.shape == chosen.shape:
            answered.followed = True
            tape.rename(result, chosen)

    if count:
        tape.pending = count, settle
    elif held is not None or _names_of(own, frame) == 1:
        # under two names it would be the choice under one and what it was under the other
        settle(own)


def _names_of(value: Any, frame: FrameType | None) -> int:
    """How many variables are this very object, in a frame and those that called it."""
    count = 0
    while frame is not None:
        count += sum(x is value for x in frame.f_locals.values())
        frame = frame.f_back
    return count


@functools.cache
def _branches(filename: str) -> dict[int, list[Branch | None]]:
    """All branches of a file by the lines of their tests."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return {}
    found: dict[int, list[Branch | None]] = {}
    # each scope with the statements in it, and what follows them
    for scope in ast.walk(tree):
        own = isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module))
        for node, after in _inside(scope) if own else ():
            if isinstance(node, (ast.If, ast.IfExp)):
                branch = _read(node, after, scope)
                for line in range(node.test.lineno, (node.test.end_lineno or node.test.lineno) + 1):
                    found.setdefault(line, []).append(branch)
    return found


def _inside(scope: ast.AST) -> list[tuple[ast.AST, ast.AST | None]]:
    """Nodes of a scope without those of functions in it, each with the statement after it."""
    found: list[tuple[ast.AST, ast.AST | None]] = []
    for _, value in ast.iter_fields(scope):
        parts = [x for x in value if isinstance(x, ast.AST)] if isinstance(value, list) else [value]
        for part, after in zip(parts, [*parts[1:], None]):
            if isinstance(part, ast.AST):
                found.append((part, after))
                if not isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found += _inside(part)
    return found


def _read(node: ast.If | ast.IfExp, after: ast.AST | None, scope: ast.AST) -> Branch | None:
    # of `a and b` or `a < b < c` the answer of one part is not that of the test
    if isinstance(node.test, (ast.BoolOp, ast.UnaryOp)) or len(getattr(node.test, "ops", [0])) > 1:
        return None
    if isinstance(node, ast.IfExp):
        return _chosen([], node.orelse, [], node.body)
    ends: list[Any] = [node.body[-1], node.orelse[-1] if node.orelse else after]
    if all(isinstance(end, ast.Return) for end in ends):
        (then, otherwise) = (getattr(end, "value", None) for end in ends)
        return _chosen(node.orelse[:-1], otherwise, node.body[:-1], then)
    lasts = [side[-1] for side in (node.orelse, node.body) if side]
    targets = [x for one in lasts for x in getattr(one, "targets", [getattr(one, "target", None)])]
    (target, *others), kinds = targets, {type(one) for one in lasts}
    if len(kinds) > 1 or not kinds <= {ast.Assign, ast.AugAssign} or not isinstance(target, (ast.Name, ast.Subscript)):
        return None
    if any(ast.unparse(x) != ast.unparse(target) for x in others) or _escape(node, target, scope):
        return None
    values: list[Any] = []
    for side in (node.orelse, node.body):
        last: Any = side[-1] if side else None
        if isinstance(last, ast.AugAssign):
            values.append(ast.BinOp(target, last.op, last.value))
        else:
            values.append(getattr(last, "value", target))
    made = _chosen(node.orelse[:-1], values[0], node.body[:-1], values[1])
    setting = isinstance(target, ast.Subscript)
    if made is None or not (setting or ast.AugAssign in kinds):
        return made
    return Branch(made.sides, _compiled([], target), (int(setting and bool(node.orelse)), int(setting)))


def _escape(node: ast.If, target: ast.expr, scope: ast.AST) -> bool:
    """Whether something else that the branch assigns is used outside of it."""
    inside = list(ast.walk(node))
    assigned = {x.id for x in inside if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    assigned.discard(getattr(target, "id", ""))
    used = {x.id for x in ast.walk(scope) if isinstance(x, ast.Name) and not any(x is y for y in inside)}
    return bool(assigned & used)


def _chosen(before: Sequence[Any], value: Any, then: Sequence[Any], other: Any) -> Branch | None:
    """The branch between two sides, each some statements and a value, where running them changes nothing."""
    sides = []
    for statements, result in ((before, value), (then, other)):
        simple = all(isinstance(x, ast.Assign) and all(isinstance(y, ast.Name) for y in x.targets) for x in statements)
        if result is None or not simple or not all(_is_pure(x) for x in (*(y.value for y in statements), result)):
            return None
        sides.append(_compiled(statements, result))
    return Branch((sides[0], sides[1]))


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


def _compiled(statements: Sequence[ast.stmt], value: ast.expr) -> CodeType:
    lines = [*map(ast.unparse, statements), f"{_VALUE} = {ast.unparse(value)}"]
    return compile("\n".join(lines), "<branch>", "exec")
