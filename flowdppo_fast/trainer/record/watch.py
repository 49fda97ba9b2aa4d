"""One recording: hooks on a pipeline's modules, and the tape between them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .arguments import ArgumentStore, Call, Ref, parts, row_index
from .layouts import find_layouts
from .program import Const, Op, Program, drive
from .surroundings import Surroundings
from .tape import Tape
from .trajectory import RecordedStep, Trajectory, Transition

# components that make the model's inputs or show its outputs
_AMBIENT = ("vae", "text_encoder", "image_encoder", "audio_vae", "vocoder", "tokenizer", "safety_checker")


@dataclass
class _Seen:
    """A call that was seen: copies of its arguments, and of what it gave."""

    call: Call
    named: dict[Ref, Tensor]
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    lengths: list[int | None] = field(default_factory=list)

    @property
    def times(self) -> list[Tensor]:
        """Its arguments of one number, or one per row."""
        return [x for x in self.call.leaves if isinstance(x, Tensor) and x.ndim <= 1]


class Watch:
    """One recording: hooks on the modules, and the tape between them.

    Args:
        chosen: indices of the steps that are recorded.
        upcoming: called after each step with the index of the next one.
        ending: raised by the scheduler, and not by a module, once something is recorded.
    """

    def __init__(
        self, recorder: Any, chosen: list[int], upcoming: Callable[[int], None] | None = None,
        ending: type[BaseException] | None = None,
    ):  # fmt: skip
        self.recorder, self.chosen, self.upcoming, self.ending = recorder, chosen, upcoming, ending
        self.name = recorder.name
        self.trajectory = Trajectory()
        self.transitions: list[Transition] = []
        self.replayed, self.others = modules_of(recorder)
        for module in self.replayed:
            # which some of diffusers' read with gradients and do not have
            if not hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]
        self.store = ArgumentStore()
        self.tape = Tape(self.name, {id(p) for module in self.replayed for p in module.parameters()})
        self._seen: list[_Seen] = []
        self._program: Program | None = None
        self._depth = 0
        self._around: dict[nn.Module, Surroundings] = {}
        # times of the calls before the first step, among them those before the loop
        self._times: list[list[Tensor]] | None = None
        # whether what happens belongs to a chosen step; of the first one nobody knows the number
        self._on = True
        # the recorder's own calls
        self._busy = False
        # whether the schedule was set
        self._looping = False
        # the scheduler and its copies, and what they did in the present step
        self.family: Sequence[Any] = ()
        self._parts: list[tuple[int, Tensor, Transition | None]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks: list[Any] = []
        for module in (*self.replayed, *self.others):
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(self._after, with_kwargs=True))
        self.tape.start()
        try:
            yield
        finally:
            self.tape.stop()
            for hook in hooks:
                hook.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._busy:
            return
        self.tape.stop()
        if self._depth == 0 and self._parts:
            self.close()
        self._depth += 1
        if self._depth > 1 or not self._follows(module):
            return
        leaves, spec = tree_flatten((args, kwargs))
        refs = [self.tape.ref(leaf) for leaf in leaves]
        named = {ref: _copy(leaf.detach()) for ref, leaf in zip(refs, leaves) if ref is not None}
        given = [ref or (self.tape.snapshot(x) if isinstance(x, Tensor) else x) for ref, x in zip(refs, leaves)]
        now = Surroundings.now(module, _device(leaves))
        # one object for all calls between which nothing changed
        if self._around.get(module) != now:
            self._around[module] = now
        call = Call(module, given, spec, 0, surroundings=self._around[module])
        self._seen.append(_Seen(call, named))

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._busy:
            return
        self._depth -= 1
        if self._depth:
            return
        if self._follows(module):
            seen = self._seen[-1]
            made = {
                (number, place): value
                for number, part in enumerate(parts(output))
                for place, value in enumerate(part if isinstance(part, list) else [part])
            }
            self.tape.called(seen.call, made)
            seen.outputs = {key: _copy(value) for key, value in made.items()} if self.recorder.checks else made
            seen.lengths = [len(part) if isinstance(part, list) else None for part in parts(output)]
        if self._on:
            self.tape.start()

    def __deepcopy__(self, memo: Any) -> Watch:
        # a copy of the scheduler is watched as well
        return self

    def on_begin(self) -> None:
        """A pass through the schedule begins; of its first step nobody knows the number."""
        self.close()
        self._looping = self._on = True
        self.tape.start()

    def on_output(self, index: int, output: Tensor, negated: bool) -> None:
        """A scheduler was given ``output`` for step ``index``."""
        self._end()
        if self._parts and self._parts[0][0] != index:
            self.close()
        if self._parts:
            # a copy of the scheduler moves another latent: the step is that of both
            self.tape.start()
            output = torch.cat([self._parts[-1][1].flatten(1), output.flatten(1)], dim=1)
        self.tape.stop()
        self._busy = True
        self._times = [seen.times for seen in self._seen] if self._times is None else self._times
        self._program = self.tape.program(output, negated) if index in self.chosen else None
        self._parts.append((index, output, None))

    def on_step(self, index: int, transition: Transition | None) -> None:
        """A scheduler made step ``index``."""
        self._parts[-1] = (*self._parts[-1][:2], transition)
        if len(self.family) == 1:
            self.close()
            self._end()
            return
        self._busy = False
        if self._on:
            self.tape.start()

    def _end(self) -> None:
        if self.ending is not None and self.transitions:
            raise self.ending

    def close(self) -> None:
        """Records the step that was made, if one was."""
        if not self._parts:
            return
        self.tape.stop()
        self._busy = True
        index, transitions = self._parts[0][0], [transition for *_, transition in self._parts]
        if transitions[0] is not None:
            # what is kept has gradients later, also where the pipeline runs without them for good
            with torch.inference_mode(False), torch.no_grad():
                transition = self._joined([t for t in transitions if t is not None])
                self.trajectory.steps.append(self._record(transition))
                self.transitions.append(transition)
        self._parts.clear()
        self._seen.clear()
        self.tape.begin()
        self.store.next_step()
        self._on, self._busy, self._depth = index + 1 in self.chosen, False, 0
        if self.upcoming is not None:
            self.upcoming(index + 1)
        if self._on:
            self.tape.start()

    def check_chosen(self) -> None:
        """Whether every pass through the schedule made all chosen steps.

        Raises:
            ValueError: it did not.
        """
        for number in sorted({t.number for t in self.transitions} | {0}):
            ran = [t.index for t in self.transitions if t.number == number]
            if ran != self.chosen:
                which = f" in pass {number} through the schedule" if number else ""
                raise ValueError(
                    f"sde_steps: {self.name} ran the chosen steps {ran}{which}, expected {self.chosen} in one call of "
                    "the pipeline, made by its scheduler or a copy of it"
                )

    def _follows(self, module: nn.Module) -> bool:
        """Whether a call of ``module`` is part of the replay: before the loop, one of other modules is not."""
        looping = self._looping or any(module is x for x in self.recorder.modules.values())
        return self._on and looping and any(module is x for x in self.replayed)

    def _joined(self, transitions: Sequence[Transition]) -> Transition:
        """What a step did to all of its latents: one density, as they are drawn independently."""
        first = transitions[0]
        if len(transitions) == 1:
            return first
        if any(t.step != first.step or t.active is not None for t in transitions):
            raise ValueError(
                f"pipeline: {self.name}, step {first.index}: {len(transitions)} latents are at different noise levels, "
                "expected one level per step"
            )
        # seeded noise of the first goes on into the others
        noise = first.noise
        if isinstance(noise, Tensor):
            noise = torch.cat([torch.as_tensor(t.noise).flatten(1) for t in transitions], dim=1)
        return replace(first, velocity=torch.cat([t.velocity.flatten(1) for t in transitions], dim=1), noise=noise)

    def _record(self, transition: Transition) -> RecordedStep:
        batch, index, program = len(transition.velocity), transition.index, self._program
        where = f"pipeline: {self.name}, step {index}"
        if not transition.velocity.isfinite().all():
            raise ValueError(f"{where}: the velocity has numbers that are not finite: the model has diverged")
        if program is None:
            if not self._seen:
                raise ValueError(f"pipeline: {self.name} made no transformer call before step {index}")
            raise ValueError(
                f"{where}: the velocity {list(transition.velocity.shape)} does not descend from a transformer's output "
                "by torch functions, so it cannot be replayed at other weights"
            )
        used = [seen for seen in self._seen if any(seen.call.leaves is call.leaves for call in program.calls)]
        if self._precedes_the_loop(self.tape.oldest(program)):
            raise ValueError(
                f"{where}: the velocity depends on what a transformer gave before the loop, which would stay as it was "
                "while the weights move, expected calls within the step"
            )
        try:
            for position, op in enumerate(program.ops):
                if isinstance(op, Call):
                    (seen,) = [seen for seen in used if seen.call.leaves is op.leaves]
                    program.ops[position] = self._settle(seen, op, batch)
                else:
                    for leaf in op.leaves:
                        if isinstance(leaf, Const) and isinstance(leaf.value, Tensor):
                            leaf.value = self.store.constant(leaf.value, batch)
            if self.recorder.checks:
                self._look(program, used, transition, batch)
        except ValueError as cause:
            raise ValueError(f"{where}: {str(cause).removeprefix('pipeline: ')}") from None
        return RecordedStep(index, program, transition.active)

    def _precedes_the_loop(self, number: int | None) -> bool:
        """Whether a call before the first step is not one of it: the last one is, and has that step's time."""
        if number is None or not self._times:
            return False
        own, last = self._times[number], self._times[-1]
        if not own or not last:
            return number < len(self._times) - len(self._seen)
        # another module's may be among further numbers
        agree = all if len(own) == len(last) else any
        return not agree(x.shape == y.shape and torch.equal(x, y) for x, y in zip(own, last))

    def _settle(self, seen: _Seen, call: Call, batch: int) -> Call:
        """The call with its arguments kept, and the places of rows in its arguments and outputs."""
        known = self.recorder._layouts
        value = tree_unflatten(call.leaves, call.spec)
        key = (id(call.module), batch, call.spec, tuple(map(_sort, call.leaves)), tuple(call.outputs))
        if key not in known:
            outputs = {place: output for place, output in seen.outputs.items() if place in call.outputs}
            known[key] = find_layouts(
                call, value, seen.named, outputs, seen.lengths, batch, checked=self.recorder.checks
            )
        closed, layouts, slots = known[key]
        try:
            kept = self.store.keep(call.module, value, closed, layouts, batch)
        except ValueError as cause:
            switches = [
                name for name in inspect.signature(self.recorder.pipeline.__call__).parameters if "cache" in name
            ]
            raise ValueError(
                f"{cause}{''.join(f'; call the pipeline with {name}=False' for name in switches)}"
            ) from None
        kept.outputs, kept.slots, kept.surroundings = call.outputs, slots, call.surroundings
        return kept

    def _look(self, program: Program, used: list[_Seen], transition: Transition, batch: int) -> None:
        """Runs a new kind of program on the recorded outputs: as they were, and with rows that repeat another one."""
        if all(isinstance(op, Call) for op in program.ops):
            return
        looked = self.recorder._looked
        key = (program.signature, batch, tuple(transition.velocity.shape))
        if key in looked and not program.guards:
            return
        outputs = [seen.outputs for seen in used]
        slots = [call.slots for call in program.calls]

        def answer(number: int, _given: list[Any], fill: list[int] | None = None) -> list[Any]:
            made = outputs[number]
            if fill is None:
                return [made]
            return [{k: _filled(made, k, slots[number][k], fill, batch) for k in program.calls[number].outputs}]

        expected = transition.velocity
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            watched: list[dict[int, list[Tensor]]] = [{}]
            agree = [drive([program.run(watch=watched[0])], answer)[0].eq(expected).all()]
            for row in {0, batch - 1} if batch > 1 else set():
                again = drive([program.run(watch={})], lambda n, g, r=row: answer(n, g, [r] * batch))[0]  # type: ignore[misc]
                agree.append(again[row].eq(expected[row]).all())
            if program.guards:
                self._guard(program, answer, watched, batch)
        # read at once
        first, *others = torch.stack(agree).tolist()
        if not first:
            raise ValueError(
                "the same functions of the transformer's outputs give another velocity, expected the recorded one: "
                "random numbers or something outside of torch's functions are part of it"
            )
        if not all(others):
            raise ValueError(
                "a row's velocity depends on the other rows of its batch (by what is done to the transformer's "
                "outputs), expected independent rows"
            )
        looked[key] = []

    @staticmethod
    def _guard(program: Program, answer: Any, watched: list[dict[int, list[Tensor]]], batch: int) -> None:
        """Which rows each branch depends on: those whose replacement changes the numbers behind it."""
        depends: dict[int, set[int]] = {number: set() for number in watched[0]}
        for row in range(batch) if batch > 1 else ():
            changed: dict[int, list[Tensor]] = {}
            fill = [(row + 1) % batch if other == row else other for other in range(batch)]
            drive([program.run(watch=changed)], lambda n, g, f=fill: answer(n, g, f))  # type: ignore[misc]
            for number, behind in changed.items():
                if not all(torch.equal(a, b) for a, b in zip(behind, watched[0][number])):
                    depends[number].add(row)
        for number, rows in depends.items():
            op = program.ops[number]
            assert isinstance(op, Op)
            op.rows = frozenset(rows)


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Components that a pipeline denoises with: ``transformer*``, or others whose forward takes a timestep."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    named = {name: part for name, part in modules.items() if name.startswith("transformer")}
    if named:
        return named
    return {
        name: part
        for name, part in modules.items()
        if not name.startswith((*_AMBIENT, "controlnet")) and {"timestep", "timesteps"} & _parameters(part)
    }


def modules_of(recorder: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules a replay calls, and the pipeline's other ones, whose outputs are constants."""
    pipeline, own = recorder.pipeline, list(recorder.modules.values())
    found = {**vars(pipeline), **pipeline.components}
    others = {
        id(x): (name, x) for name, x in found.items() if isinstance(x, nn.Module) and not any(x is y for y in own)
    }
    memory = {p.untyped_storage()._cdata for module in own for p in module.parameters()}
    replayed, constant = own, list[nn.Module]()
    for name, module in others.values():
        shares = any(p.untyped_storage()._cdata in memory for p in module.parameters())
        trained = any(p.requires_grad for p in module.parameters()) and not (
            name.startswith(_AMBIENT) or type(module).__module__.startswith("transformers.")
        )
        (replayed if shares or trained else constant).append(module)
    return replayed, constant


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _filled(
    made: Mapping[tuple[int, int], Tensor], key: tuple[int, int], layout: Any, fill: list[int], batch: int
) -> Any:
    """An output whose rows are those of ``fill``, in memory that is laid out as it was."""
    part, place = key
    if layout is None:
        return made[key]
    if layout.listed:
        order = layout.places(batch)
        position = order.index(place)
        return made[part, order[position - position % batch + fill[position % batch]]]
    value = made[key]
    index = row_index(fill, value.device)
    return _copy(value).copy_(layout.merge(layout.split(value, batch)[:, index].unsqueeze(2)))


def _copy(value: Tensor) -> Tensor:
    """A copy with the same strides, as sums over another memory round otherwise."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _sort(leaf: Any) -> Any:
    """What calls of one kind have in common in an argument."""
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)


def _device(leaves: Iterable[Any]) -> str:
    return next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
