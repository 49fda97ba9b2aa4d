"""What a pipeline does between its modules and its scheduler, recorded as the torch functions it was.

Within a step every tensor that descends from the output of a replayed module has a name, a :class:`Ref`. A torch
function that is given one is noted with its arguments; other tensors among these are constants and kept as they were.
What leads to the velocity is a :class:`Program`: run again on the outputs of other weights it gives their velocity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from .arguments import Call, Ref
from .branches import follow
from .functions import AS, ASKED, CHOOSE, CUT, LIKE, SIZES, targets_of, tensors_in, title
from .program import Const, Live, Op, Place, Program


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
        if function.overloadpacket.__name__ in LIKE:
            return result
        given, _ = tree_flatten((args, kwargs))
        if any(isinstance(x, Tensor) and _memory(x) in self.touched for x in given):
            for made in tensors_in(result):
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
        # names whose size follows from numbers, and those of them whose size was asked for
        self._sized: set[Ref] = set()
        self._asked: set[Ref] = set()
        # memory of tensors that stand for the value a branch chose
        self._chosen: set[int] = set()
        # how many functions the side of a branch still has, and what then has to be done with its result
        self.pending: tuple[int, Callable[[Any], None]] | None = None

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
            with torch.inference_mode(False):
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
        only_asked = name in ASKED or name == "requires_grad" or (name in LIKE and refs == kept[:1])
        if only_asked or not refs or (name in AS and not isinstance(kept[0], (Ref, Live))):
            if name in SIZES | LIKE | AS:
                self._asked |= self._sized.intersection(x for x in refs if isinstance(x, Ref))
            result = function(*args, **kwargs)
            if self._earlier and not refs:
                self._pass_on([x for x in leaves if isinstance(x, Tensor)], result)
            return result
        if name == "__iter__":
            return iter(self.__torch_function__(Tensor.unbind, types, args, {}))
        if name in ("__set__", "tensor"):
            raise self._refusal(f"{name} copied or changed by hand what")
        if kwargs.get("out") is not None:
            return self._out(function, types, args, kwargs)
        # before it happens: what a constant's memory holds that is written to
        for target in targets_of(name, args, kwargs):
            if self.ref(target) is None:
                flat = torch.empty(0, dtype=target.dtype, device=target.device).set_(target.detach().untyped_storage())
                self._buffers[_memory(target)] = target, Const(flat.clone())
        kept = [self._leaf(leaf) for leaf in leaves]
        before = [(leaf, _state(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
        kept = [Const(self.snapshot(x)) if isinstance(x, Tensor) and x is leaf else x for x, leaf in zip(kept, leaves)]
        result = function(*args, **kwargs)
        writes = self._find_writes(name, before, targets_of(name, args, kwargs))
        results = [(self.ref(x) or self._give(x)) if isinstance(x, Tensor) else None for x in tensors_in(result)]
        answer = None
        if not writes and not any(results):
            if result is None or getattr(function, "__name__", "") == "__get__" or isinstance(result, torch.Size):
                return result
            if not isinstance(result, bool):
                raise self._refusal(f"{name} took numbers out of a tensor that")
            answer = result
        noted = Op(_alias if name in CUT else function, kept, spec, results, tuple(writes), answer)
        self.ops.append(noted)
        masked = name == "__getitem__" and any(isinstance(x, Tensor) and x.dtype is torch.bool for x in leaves[1:])
        if masked or name in CHOOSE or (name == "where" and len(refs) == 1) or self._sized.intersection(refs):
            self._sized |= {x for x in results if x is not None}
            if name in ("unbind", "split", "chunk"):
                self._asked |= self._sized.intersection(refs)
        if answer is not None:
            self.pending = None
            if len(leaves) == 1 and isinstance(leaves[0], Tensor):
                follow(self, sys._getframe(1), noted, leaves[0])
        elif self.pending is not None:
            left, settle = self.pending
            self.pending = (left - 1, settle) if left > 1 else None
            if left == 1:
                settle(result)
        return result

    def rename(self, value: Tensor, other: Tensor) -> None:
        """From here on the name of ``value`` is that of ``other``, and nothing may be written to its memory."""
        self._refs[id(value)] = self._refs[id(other)][0], value
        self._chosen.add(_memory(value))
        self._flow.mark(value)

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
            guard = isinstance(op, Op) and (op.expected is not None or not self._asked.isdisjoint(op.results))
            if guard or any(ref is not None and memory[ref] in wanted for ref in made):
                if isinstance(op, Call):
                    # another velocity of the step may need more of them
                    op = replace(op, outputs={key: ref for key, ref in op.outputs.items() if memory[ref] in wanted})
                wanted |= {memory[leaf] for leaf in op.leaves if isinstance(leaf, Ref)}
                ops.append(op)
        places = {ref: place for ref, place in self._places.items() if place.memory in self._written & wanted}
        for key in {place.memory for place in places.values()}:
            if len({place.dtype for place in places.values() if place.memory == key}) > 1:
                raise self._refusal("memory was written to in two dtypes that")
        memories = {key: held for key, (_, held) in self._buffers.items() if key in wanted}
        sizes = {ref: self._places[ref].size for ref in self._asked}
        return Program(ops[::-1], result, negated, places, memories, sizes)

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
        for made in tensors_in(result) if known else ():
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
            if name in CUT or id(leaf) in written:
                continue
            if _geometry(leaf) != geometry:
                self._give(leaf)
            elif _state(leaf)[0] != version or (version is None and any(leaf is x for x in targets)):
                written[id(leaf)] = leaf
        if any(_memory(leaf) in self._chosen for leaf in written.values()):
            raise self._refusal(f"{name} wrote to what a branch chose, which")
        refs = [self.ref(leaf) for leaf in written.values()]
        if None in refs:
            raise self._refusal(f"{name} wrote to other memory with a tensor that")
        self._written |= {_memory(leaf) for leaf in written.values()}
        return [ref for ref in refs if ref is not None]

    def _out(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A function with ``out=`` as the function and a copy, which have gradients."""
        out = kwargs["out"]
        made = self.__torch_function__(function, types, args, {k: v for k, v in kwargs.items() if k != "out"})
        for target, value in zip(tensors_in(out), tensors_in(made)):
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


def _alias(value: Tensor, *_unused: Any) -> Tensor:
    return value.view_as(value)


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _geometry(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(value.shape), value.stride(), int(value.storage_offset())


def _state(value: Tensor) -> tuple[int | None, Any]:
    return None if value.is_inference() else value._version, _geometry(value)
