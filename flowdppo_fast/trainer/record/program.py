"""A program: from the outputs of a step's calls to its velocity, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from .arguments import Call, PerRow, Ref
from .functions import tensors_in, title
from .offload import fetch


class Live:
    """A trained parameter that the pipeline itself computes with."""

    def __init__(self, parameter: Tensor):
        self.parameter = parameter


@dataclass(eq=False)
class Const:
    """A tensor that does not descend from a module's output, as it was: a tensor or :class:`PerRow`."""

    value: Any

    def on(self, device: torch.device | None) -> Tensor:
        value = self.value.whole() if isinstance(self.value, PerRow) else self.value
        return fetch(value, device)


@dataclass
class Op:
    """A torch function with flat arguments: names, :class:`Const`, :class:`Live` and plain data.

    Attributes:
        results: names of the tensors in its result, in order; None for other leaves.
        writes: names among the arguments whose memory it writes to.
        expected: the answer, where it is no tensor but a truth value that the pipeline went on with.
        rows: those that the answer depends on; None: not known.
        followed: what comes of either answer was recorded.
        branch: of a choice between two sides, the op with the answer.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    results: list[Ref | None]
    writes: tuple[Ref, ...] = ()
    expected: bool | None = None
    rows: frozenset[int] | None = None
    followed: bool = False
    branch: Op | None = None

    @property
    def stays(self) -> bool:
        """Whether only the recorded side of the branch can be replayed: nobody knows the other one, or what a row
        does would depend on others."""
        return not self.followed or len(self.rows or ()) > 1


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in memory that is written to."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.size, self.stride, self.offset)

    def into(self, flat: Tensor, value: Tensor) -> Tensor:
        """``flat`` with ``value`` in this place."""
        _check_size(value, self.size)
        return flat.as_strided_scatter(value, self.size, self.stride, self.offset)

    def memory_of(self, value: Tensor) -> Tensor:
        """Flat memory with ``value`` in this place."""
        length = self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride))
        return self.into(value.new_zeros(length), value)


@dataclass
class Program:
    """From the outputs of a step's calls to its velocity.

    Attributes:
        ops: torch functions and module calls, in order.
        result: name of the velocity.
        negated: the scheduler took its negative (timesteps per token).
        places: names whose memory is written to.
        memories: what such memory held before, where it did not come from a module.
        sizes: of tensors whose size the pipeline asked for, where that follows from their numbers.
    """

    ops: list[Op | Call]
    result: Ref
    negated: bool = False
    places: dict[Ref, Place] = field(default_factory=dict)
    memories: dict[int, Const] = field(default_factory=dict)
    sizes: dict[Ref, tuple[int, ...]] = field(default_factory=dict)

    @property
    def calls(self) -> list[Call]:
        return [op for op in self.ops if isinstance(op, Call)]

    @property
    def guards(self) -> list[Op]:
        """Ops whose answers the pipeline branched on."""
        return [op for op in self.ops if isinstance(op, Op) and op.expected is not None]

    @property
    def signature(self) -> tuple:
        """Equal for programs that apply the same functions to the same calls; numbers may differ."""
        names = (
            (type(op.module).__name__, len(op.leaves), tuple(op.outputs))
            if isinstance(op, Call)
            else title(op.function)
            for op in self.ops
        )
        return (*names, self.negated)

    def run(
        self,
        device: torch.device | None = None,
        rows: Collection[int] | None = None,
        watch: dict[int, list[Tensor]] | None = None,
    ) -> Generator[dict[int, Tensor], Mapping[tuple[int, int], Tensor], Tensor]:
        """A generator that gives the named arguments of each call and takes its used outputs; returns the velocity.

        Args:
            rows: those whose numbers are true; branches that depend on others are not looked at. None: all.
            watch: is given the numbers behind each branch, which is then not checked.

        Raises:
            ValueError: the pipeline branched on numbers, and these would take another branch.
        """
        values: dict[Ref, Tensor] = {}
        memories = {key: held.on(device) for key, held in self.memories.items()}
        behind: dict[Ref, list[Tensor]] = {}

        def get(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                place = self.places.get(leaf)
                return values[leaf] if place is None else place.of(memories[place.memory])
            if isinstance(leaf, Const):
                return leaf.on(device)
            return leaf.parameter if isinstance(leaf, Live) else leaf

        def put(ref: Ref, value: Tensor) -> None:
            place = self.places.get(ref)
            if place is None:
                values[ref] = value
            elif place.memory not in memories:
                memories[place.memory] = place.memory_of(value)

        for number, op in enumerate(self.ops):
            if isinstance(op, Call):
                outputs = yield {i: get(leaf) for i, leaf in enumerate(op.leaves) if isinstance(leaf, Ref)}
                for key, ref in op.outputs.items():
                    put(ref, outputs[key])
                continue
            elsewhere = rows is not None and not (op.rows or set()) <= set(rows)
            if op.expected is not None and watch is None and (elsewhere or not op.stays):
                continue
            # written to are copies: gradients need what was there before
            own = {ref: get(ref).clone() for ref in op.writes}
            leaves = [own[leaf] if isinstance(leaf, Ref) and leaf in own else get(leaf) for leaf in op.leaves]
            if op.expected is not None and watch is not None:
                watch[number] = [
                    x for leaf in op.leaves if isinstance(leaf, Ref) for x in behind.get(leaf, [get(leaf)])
                ]
                continue
            args, kwargs = tree_unflatten(leaves, op.spec)
            if op.branch is not None and watch is None and op.branch.stays:
                made = leaves[1 if op.branch.expected else 2]
            else:
                made = op.function(*args, **kwargs)
            if op.expected is not None and bool(made) is not op.expected:
                raise ValueError(
                    f"pipeline: it branched on the transformer's output ({title(op.function)} was {op.expected}), and "
                    "the present weights take the other branch, which was not recorded; turn that option off"
                )
            for ref, value in own.items():
                place = self.places[ref]
                memories[place.memory] = place.into(memories[place.memory], value)
            results = tensors_in(made)
            if len(results) != len(op.results):
                raise _other_size(len(results), len(op.results))
            for name, value in zip(op.results, results):
                if name in self.sizes:
                    _check_size(value, self.sizes[name])
                if name is not None and name not in own:
                    put(name, value)
                    if watch is not None and value.dtype is torch.bool:
                        behind[name] = [x for x in leaves if isinstance(x, Tensor)]
        velocity = get(self.result)
        return -velocity if self.negated else velocity


def _check_size(value: Tensor, size: tuple[int, ...]) -> None:
    if tuple(value.shape) != size:
        raise _other_size(list(value.shape), list(size))


def _other_size(got: Any, expected: Any) -> ValueError:
    return ValueError(
        f"pipeline: what it chose by numbers of the transformer's output has size {got}, expected {expected} as "
        "recorded, which it went on with: other rows or weights choose more or fewer; turn that option off"
    )


def drive(runs: Sequence[Generator[Any, Any, Tensor]], answer: Callable[[int, list[Any]], list[Any]]) -> list[Tensor]:
    """Runs programs of equal calls side by side.

    Args:
        answer: gives the used outputs of call ``number`` for the named arguments of each program.
    """

    def proceed(run: Generator[Any, Any, Tensor], reply: Any) -> Any:
        try:
            return run.send(reply)
        except StopIteration as end:
            return end.value

    asked, number = [proceed(run, None) for run in runs], 0
    while not isinstance(asked[0], Tensor):
        asked = [proceed(run, reply) for run, reply in zip(runs, answer(number, asked))]
        number += 1
    return asked
