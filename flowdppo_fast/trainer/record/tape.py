"""What a pipeline does between its modules and its scheduler, recorded as the torch functions it was.

Within a step every tensor that descends from the output of a replayed module has a name, a :class:`Ref`. A torch
function that is given one is noted with its arguments; other tensors among these are constants and kept as they were.
What leads to the velocity is a :class:`Program`: run again on the outputs of other weights it gives their velocity,
with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from .arguments import Call, Ref, Rows
from .offload import fetch

# what is asked of a tensor besides its numbers
_ASKED = frozenset(
    [
        "size", "dim", "stride", "numel", "nelement", "element_size", "ndimension", "storage_offset", "get_device",
        "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_pinned", "is_shared",
        "is_same_size", "is_set_to", "is_conj", "is_neg", "type", "has_names", "__len__", "__hash__", "__repr__",
        "__str__", "__format__", "__dir__", "result_type", "can_cast", "promote_types", "untyped_storage", "data_ptr",
    ]
)  # fmt: skip
# new tensors of the size of another one, whose numbers do not matter
_LIKE = frozenset(
    [
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
        "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided", "new",
    ]
)  # fmt: skip
# take no more of a further tensor than its shape or dtype
_AS = frozenset(
    [
        "to", "type_as", "expand_as", "view_as", "reshape_as", "broadcast_to",
    ]
)  # fmt: skip
# cut a tensor off its gradient, which here is the policy's
_CUT = frozenset(("detach", "detach_", "data", "requires_grad_"))


class Live:
    """A trained parameter that the pipeline itself computes with."""

    def __init__(self, parameter: Tensor):
        self.parameter = parameter


@dataclass(eq=False)
class Const:
    """A tensor that does not descend from a module's output, as it was: a tensor or :class:`Rows`."""

    value: Any

    def on(self, device: torch.device | None) -> Tensor:
        value = self.value.whole() if isinstance(self.value, Rows) else self.value
        return fetch(value, device)


@dataclass
class Op:
    """A torch function with flat arguments: names, :class:`Const`, :class:`Live` and plain data.

    Attributes:
        results: names of the tensors in its result, in order; None for other leaves.
        writes: names among the arguments whose memory it writes to.
        expected: the answer, where it is no tensor but a truth value that the pipeline went on with.
        rows: those that the answer depends on; None: not known.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    results: list[Ref | None]
    writes: tuple[Ref, ...] = ()
    expected: bool | None = None
    rows: frozenset[int] | None = None


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
    """

    ops: list[Op | Call]
    result: Ref
    negated: bool = False
    places: dict[Ref, Place] = field(default_factory=dict)
    memories: dict[int, Const] = field(default_factory=dict)

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
            if op.expected is not None and watch is None and rows is not None and not (op.rows or set()) <= set(rows):
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
            made = op.function(*args, **kwargs)
            if op.expected is not None and bool(made) is not op.expected:
                raise ValueError(
                    f"pipeline: it branched on the transformer's output ({title(op.function)} was {op.expected}), and "
                    "the present weights take the other branch, which was not recorded; turn that option off"
                )
            for ref, value in own.items():
                place = self.places[ref]
                memories[place.memory] = place.into(memories[place.memory], value)
            for name, value in zip(op.results, _tensors(made)):
                if name is not None and name not in own:
                    put(name, value)
                    if watch is not None and value.dtype is torch.bool:
                        behind[name] = [x for x in leaves if isinstance(x, Tensor)]
        velocity = get(self.result)
        return -velocity if self.negated else velocity


class _Flow(TorchDispatchMode):
    """Follows numbers below torch's functions, where scripted functions and extensions are not seen: memory that was
    computed from a named tensor."""

    def __init__(self) -> None:
        super().__init__()
        # a weak reference keeps the address of memory that is let go from being given away
        self.touched: dict[int, StorageWeakRef] = {}

    def mark(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        self.touched[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in _LIKE:
            return result
        given, _ = tree_flatten((args, kwargs))
        if any(isinstance(x, Tensor) and _memory(x) in self.touched for x in given):
            for made in _tensors(result):
                if isinstance(made, Tensor):
                    self.mark(made)
        return result


class Tape(TorchFunctionMode):
    """Notes torch functions while it is started; :meth:`begin` starts a step.

    Args:
        name: of the pipeline, for errors.
        live: ids of the parameters of replayed modules.
    """

    def __init__(self, name: str, live: Collection[int] = ()):
        super().__init__()
        self.name, self.live = name, live
        self._on, self._flow = False, _Flow()
        # what descends from calls before the first step, with the number of the first such call
        self._earlier: Any = None
        self.ops: list[Op | Call] = []
        self._refs: dict[int, tuple[Ref, Tensor]] = {}
        self.begin()

    def begin(self) -> None:
        """Forgets all names: what earlier steps computed is a constant from here on."""
        if self._earlier is None and self._refs:
            self._earlier = WeakTensorKeyDictionary()
            since = self._calls_behind()
            for ref, value in self._refs.values():
                self._earlier[value] = since.get(ref, 0)
        self._born: dict[int, int] = {}
        self._flow.touched.clear()
        self.ops, self._refs = [], {}
        self._places: dict[Ref, Place] = {}
        self._snapshots: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # memory of constants that a noted function wrote to, with what it held
        self._buffers: dict[int, tuple[Tensor, Const]] = {}
        self._written: set[int] = set()

    def start(self) -> None:
        """From here on functions are noted."""
        if not self._on:
            self._flow.__enter__()
            self.__enter__()
            self._on = True

    def stop(self) -> None:
        """Until :meth:`start`, functions are no longer noted."""
        if self._on:
            self._on = False
            self.__exit__(None, None, None)
            self._flow.__exit__(None, None, None)

    def ref(self, value: Any) -> Ref | None:
        """The name of a tensor, if it has one."""
        if not isinstance(value, Tensor):
            return None
        known = self._refs.get(id(value))
        if known is not None:
            return known[0]
        return self._give(value) if self._buffers and _memory(value) in self._buffers else None

    def snapshot(self, value: Tensor) -> Tensor:
        """A copy of the tensor's present numbers; one for all who ask before it is written to."""
        if _memory(value) in self._flow.touched:
            raise self._refusal("something outside of torch's functions (a scripted one?) computed with what")
        key = (id(value), -1) if value.is_inference() else (id(value), value._version)
        if key not in self._snapshots or key[1] < 0:
            self._snapshots[key] = value, value.detach().clone()
            if self._earlier and value in self._earlier:
                self._born[id(self._snapshots[key][1])] = self._earlier[value]
        return self._snapshots[key][1]

    def oldest(self, program: Program) -> int | None:
        """The first call before the first step that a constant of the program descends from, if one does."""
        leaves = [leaf.value if isinstance(leaf, Const) else leaf for op in program.ops for leaf in op.leaves]
        return min((self._born[id(leaf)] for leaf in leaves if id(leaf) in self._born), default=None)

    def called(self, call: Call, outputs: Mapping[tuple[int, int], Tensor]) -> None:
        """Notes a module's call and names its outputs."""
        call.outputs = {key: self._give(output) for key, output in outputs.items()}
        self.ops.append(call)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        kept = [self._leaf(leaf) for leaf in leaves]
        name = title(function)
        refs = [leaf for leaf in kept if isinstance(leaf, (Ref, Live))]
        only_asked = name in _ASKED or name == "requires_grad" or (name in _LIKE and refs == kept[:1])
        if only_asked or not refs or (name in _AS and not isinstance(kept[0], (Ref, Live))):
            result = function(*args, **kwargs)
            if self._earlier and not refs:
                self._pass_on([x for x in leaves if isinstance(x, Tensor)], result)
            return result
        if name == "__iter__":
            return iter(self.__torch_function__(Tensor.unbind, types, args, {}))
        if name == "__set__":
            raise self._refusal("an attribute was set of a tensor that")
        if kwargs.get("out") is not None:
            return self._out(function, types, args, kwargs)
        # before it happens: what a constant's memory holds that is written to
        for target in _targets(name, args, kwargs):
            if self.ref(target) is None:
                flat = torch.empty(0, dtype=target.dtype, device=target.device).set_(target.detach().untyped_storage())
                self._buffers[_memory(target)] = target, Const(flat.clone())
        kept = [self._leaf(leaf) for leaf in leaves]
        before = [(leaf, _state(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
        kept = [Const(self.snapshot(x)) if isinstance(x, Tensor) and x is leaf else x for x, leaf in zip(kept, leaves)]
        result = function(*args, **kwargs)
        writes = self._find_writes(name, before, _targets(name, args, kwargs))
        results = [(self.ref(x) or self._give(x)) if isinstance(x, Tensor) else None for x in _tensors(result)]
        answer = None
        if not writes and not any(results):
            if result is None or getattr(function, "__name__", "") == "__get__" or isinstance(result, torch.Size):
                return result
            if not isinstance(result, bool):
                raise self._refusal(f"{name} took numbers out of a tensor that")
            answer = result
        self.ops.append(Op(_alias if name in _CUT else function, kept, spec, results, tuple(writes), answer))
        return result

    def program(self, velocity: Tensor, negated: bool) -> Program | None:
        """What leads to ``velocity``, or None if it has no name."""
        result = self.ref(velocity)
        if result is None:
            return None
        # tensors that share memory stand and fall together
        memory = {ref: place.memory for ref, place in self._places.items()}
        wanted = {memory[result]}
        ops: list[Op | Call] = []
        for op in reversed(self.ops):
            made = op.outputs.values() if isinstance(op, Call) else (*op.results, *op.writes)
            guard = isinstance(op, Op) and op.expected is not None
            if guard or any(ref is not None and memory[ref] in wanted for ref in made):
                if isinstance(op, Call):
                    op.outputs = {key: ref for key, ref in op.outputs.items() if memory[ref] in wanted}
                wanted |= {memory[leaf] for leaf in op.leaves if isinstance(leaf, Ref)}
                ops.append(op)
        places = {ref: place for ref, place in self._places.items() if place.memory in self._written & wanted}
        for key in {place.memory for place in places.values()}:
            if len({place.dtype for place in places.values() if place.memory == key}) > 1:
                raise self._refusal("memory was written to in two dtypes that")
        memories = {key: held for key, (_, held) in self._buffers.items() if key in wanted}
        return Program(ops[::-1], result, negated, places, memories)

    def _calls_behind(self) -> dict[Ref, int]:
        """The number of the first call that each name descends from."""
        since: dict[Ref, int] = {}
        count = 0
        for op in self.ops:
            first = min((since[leaf] for leaf in op.leaves if isinstance(leaf, Ref) and leaf in since), default=None)
            if isinstance(op, Call):
                first, count = count if first is None else first, count + 1
            made = op.outputs.values() if isinstance(op, Call) else (*op.results, *op.writes)
            for ref in made:
                if ref is not None and first is not None:
                    since[ref] = min(first, since.get(ref, first))
        return since

    def _pass_on(self, given: list[Tensor], result: Any) -> None:
        """What is made of something that descends from calls before the first step does so too."""
        known = [self._earlier[x] for x in given if x in self._earlier]
        for made in _tensors(result) if known else ():
            if isinstance(made, Tensor):
                self._earlier[made] = min(known)

    def _leaf(self, value: Any) -> Any:
        ref = self.ref(value)
        return ref if ref is not None else Live(value) if id(value) in self.live else value

    def _give(self, value: Tensor) -> Ref:
        """A new name for a tensor, which is kept so that its id and its memory stay its own."""
        ref = Ref(len(self._places))
        self._refs[id(value)] = ref, value
        self._flow.mark(value)
        size, stride, offset = _geometry(value)
        self._places[ref] = Place(_memory(value), size, stride, offset, value.dtype)
        return ref

    def _find_writes(self, name: str, before: list[tuple[Tensor, Any]], targets: list[Tensor]) -> list[Ref]:
        """Names of the tensors a function wrote to; where it only turned one, it has a new name."""
        written: dict[int, Tensor] = {}
        for leaf, (version, geometry) in before:
            if name in _CUT or id(leaf) in written:
                continue
            if _geometry(leaf) != geometry:
                self._give(leaf)
            elif _state(leaf)[0] != version or (version is None and any(leaf is x for x in targets)):
                written[id(leaf)] = leaf
        refs = [self.ref(leaf) for leaf in written.values()]
        if None in refs:
            raise self._refusal(f"{name} wrote to other memory with a tensor that")
        self._written |= {_memory(leaf) for leaf in written.values()}
        return [ref for ref in refs if ref is not None]

    def _out(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A function with ``out=`` as the function and a copy, which have gradients."""
        out = kwargs["out"]
        made = self.__torch_function__(function, types, args, {k: v for k, v in kwargs.items() if k != "out"})
        for target, value in zip(_tensors(out), _tensors(made)):
            if target.shape != value.shape:
                target.resize_(value.shape)
            self.__torch_function__(Tensor.copy_, types, (target, value), {})
        return out

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"pipeline: {self.name}: {what} descends from the transformer's output, expected torch functions of "
            "tensors between transformer and scheduler: what follows from such numbers outside of torch cannot be "
            "replayed at other weights"
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


def title(function: Any) -> str:
    """The name of a torch function; that of the attribute for one that is read."""
    name = getattr(function, "__name__", str(function))
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def _alias(value: Tensor, *_unused: Any) -> Tensor:
    return value.view_as(value)


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _geometry(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(value.shape), value.stride(), int(value.storage_offset())


def _state(value: Tensor) -> tuple[int | None, Any]:
    return None if value.is_inference() else value._version, _geometry(value)


def _tensors(result: Any) -> list[Any]:
    # torch.return_types are tuples that pytree does not open
    return tree_flatten(tuple(result) if isinstance(result, tuple) else result)[0]


def _targets(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that a function may write to, going by its name."""
    inplace = name.endswith("_") and not name.endswith("__") and name not in _CUT
    augmented = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__", "__iter__")
    if not (inplace or augmented or name == "__setitem__" or kwargs.get("inplace")):
        return []
    return [x for x in tree_flatten(args[:1] or tuple(kwargs.values())[:1])[0] if isinstance(x, Tensor)]
