"""Records chosen denoising steps of a diffusers pipeline and computes their velocities again with other weights.

The pipeline runs its own ``__call__``. While it is recorded, its scheduler is a :class:`FlowMatchSDEScheduler`, hooks
on its modules keep the arguments of the calls that belong to chosen steps, and a :class:`Tape` what is done with their
outputs.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...losses import row_statistics
from ...objectives import DPPO
from ...samplers import SDEStep
from .arguments import ArgumentStore, Call, Ref, join, parts, row_index
from .layouts import find_layouts, scatter
from .offload import fetch
from .scheduler import FlowMatchSDEScheduler, Transition
from .surroundings import Surroundings
from .tape import Const, Op, Program, Tape, drive
from .trajectory import RecordedStep, Trajectory

logger = get_logger(__name__)

# components that make the model's inputs or show its outputs
_AMBIENT = ("vae", "text_encoder", "image_encoder", "audio_vae", "vocoder", "tokenizer", "safety_checker")


@dataclass(frozen=True)
class ReplayCheck:
    """Result of :meth:`TrajectoryRecorder.verify`.

    Attributes:
        rule: how the first chosen step makes its velocity of the outputs ``b0``, ``b1``, ...
        same_geometry: largest absolute difference when each step is replayed with the recorded batch.
        batched_geometry: largest absolute difference when steps and rows are batched as they will be in training.
        batched_kl: the mean-reduced KL that this difference makes at unchanged weights, of the worst row and step.
        tolerance: what ``batched_kl`` may be.
    """

    rule: str
    same_geometry: float
    batched_geometry: float
    batched_kl: float
    tolerance: float


@dataclass
class _Seen:
    """A call that was seen: copies of its arguments, and of what it gave."""

    call: Call
    named: dict[Ref, Tensor]
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    lengths: list[int | None] = field(default_factory=list)


class TrajectoryRecorder:
    """Records and replays the denoising steps of ``pipeline``.

    A replay calls what the pipeline called between two scheduler steps and what has trained parameters, which are
    those of ``transformer*`` or another denoiser, and all that need a gradient or share memory with one of these. What
    other components give is a constant.

    Args:
        pipeline: any diffusers flow pipeline.
        sampler, eta, noise: see :meth:`FlowMatchSDEScheduler.from_config`.
        checks: look at each new kind of call and step a second time while it is recorded: which arguments have an
            entry per row, and whether rows are independent. Without weights there is nothing to look at.

    Raises:
        ValueError: the pipeline has no denoiser or no flow-matching scheduler.
    """

    def __init__(
        self, pipeline: Any, *, sampler: str = "flow_sde", eta: float = 0.7, noise: str = "seeded", checks: bool = True
    ):
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        self.options: dict[str, Any] = {"sampler": sampler, "eta": eta, "noise": noise}
        self.checks = checks
        self.modules = denoisers(pipeline)
        if not self.modules:
            raise ValueError(
                f"pipeline: {self.name} has no component named transformer* and no other denoiser, expected a module "
                "whose forward takes a timestep, so there is nothing to record"
            )
        FlowMatchSDEScheduler.from_config(pipeline.scheduler, **self.options)
        # layouts of the arguments and outputs of calls, and steps that were looked at a second time
        self._layouts: dict[tuple, tuple[Any, ...]] = {}
        self._looked: dict[tuple, list[frozenset[int] | None]] = {}
        # stacked steps by their parts: a step keeps its tables on the device, so rollouts share them
        self._stacked: dict[tuple[SDEStep, ...], SDEStep] = {}

    @contextlib.contextmanager
    def recording(self, sde_steps: Iterable[int], *, seed: int = 0, first_row: int = 0) -> Iterator[Trajectory]:
        """Within this context one call of the pipeline is recorded; afterwards its own scheduler is back, in any case.

        Args:
            sde_steps: indices of the steps that draw noise and are recorded.
            seed, first_row: of the noise, see :class:`FlowMatchSDEScheduler`.

        Raises:
            ValueError: what a step did cannot be replayed, or not all chosen steps were run.
        """
        cached = [name for name, module in self.modules.items() if getattr(module, "is_cache_enabled", False)]
        if cached:
            raise ValueError(
                f"pipeline: {self.name} has a cache enabled on {', '.join(cached)}, so its outputs depend on earlier "
                "steps; call disable_cache()"
            )
        chosen = sorted(sde_steps)
        watch = _Watch(self, chosen)
        own = self.pipeline.scheduler
        scheduler = FlowMatchSDEScheduler.from_config(
            own, sde_steps=chosen, seed=seed, first_row=first_row, on_output=watch.on_output, on_step=watch.on_step,
            **self.options,
        )  # fmt: skip
        self.pipeline.scheduler = scheduler
        try:
            with watch.watching():
                yield watch.trajectory
        finally:
            self.pipeline.scheduler = own
        transitions = watch.transitions
        if [t.index for t in transitions] != chosen:
            raise ValueError(
                f"sde_steps: {self.name} ran the chosen steps {[t.index for t in transitions]}, expected {chosen} in "
                "one call of the pipeline"
            )
        steps = tuple(t.step for t in transitions)
        watch.trajectory.finish(transitions, self._stacked.setdefault(steps, SDEStep.stack(steps)))

    def replay(
        self, trajectory: Trajectory, rows: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> Tensor:
        """Velocities ``[b, S, *latent]`` of the present weights, with gradients if they are enabled.

        Args:
            trajectory: what was recorded.
            rows: rows to replay, default all.
            steps: positions of recorded steps, default all; those that fit together share one transformer call.
        """
        groups = [[p for p in group if steps is None or p in steps] for group in trajectory.groups]
        replayed = [self._replay_group(trajectory, group, rows) for group in groups if group]
        return replayed[0] if len(replayed) == 1 else torch.cat(replayed, dim=1)

    def verify(
        self, trajectory: Trajectory, rows: Sequence[int], *, strict: bool = True, threshold: float | None = None
    ) -> ReplayCheck:
        """Replays a trajectory whose policy is still the present one; nothing else may be replayed before.

        Step by step, with the recorded batch and as many threads, velocities must come out bitwise. In the training
        geometry, all steps of ``rows`` in one batch and with gradients enabled, matrix products may round otherwise:
        there the difference may cost a tenth of the threshold.

        Args:
            rows: of the training geometry.
            strict: False holds the recorded batch to the second bound as well, with a warning.
            threshold: of the mean-reduced KL in the objective; None or infinite: the default of :class:`DPPO`.

        Raises:
            ValueError: a difference beyond that; the message names the pipeline and the largest difference.
        """
        finite = threshold is not None and math.isfinite(threshold)
        same, tolerance = 0.0, (threshold if finite else DPPO().threshold) / 10  # type: ignore[operator]
        everything = range(len(trajectory))
        with torch.no_grad():
            for position, record in enumerate(trajectory.steps):
                replayed = self.replay(trajectory, steps=[position])
                difference, kl = _deviation(replayed, trajectory, everything, range(position, position + 1))
                same = max(same, difference)
                if difference == 0.0:
                    continue
                said = (
                    f"replaying step {record.index} of {self.name} at unchanged weights differs from the recorded "
                    f"velocity by up to {difference:.3g} (a KL of {kl:.3g}), expected 0"
                )
                if strict or not kl <= tolerance:
                    way_out = "; run.strict_replay=false accepts this one" if kl <= tolerance else ""
                    raise ValueError(
                        f"pipeline: {said}; the transformer is no function of its arguments (dropout, caching, kernels "
                        f"that are not deterministic), or its weights changed{way_out}"
                    )
                logger.warning("%s; run.strict_replay is off", said)
        replayed = self.replay(trajectory, rows).detach()
        difference, kl = _deviation(replayed, trajectory, rows, range(len(trajectory.steps)))
        if not kl <= tolerance:
            raise ValueError(
                f"pipeline: replaying {len(rows)} rows and {len(trajectory.steps)} steps of {self.name} in one batch "
                f"differs from the recorded velocity by up to {difference:.3g}, a KL of {kl:.3g}, expected at most "
                f"{tolerance:.3g}, a tenth of the threshold; a row's output depends on the other rows of its batch, or "
                "rounds too coarsely"
            )
        return ReplayCheck(trajectory.steps[0].rule, same, difference, kl, tolerance)

    @staticmethod
    def _replay_group(trajectory: Trajectory, positions: list[int], rows: Sequence[int] | None) -> Tensor:
        """``[b, len(positions), *latent]`` from one module call per recorded call slot."""
        records, device = [trajectory.steps[p] for p in positions], trajectory.device
        batch, here = len(trajectory), trajectory.velocity.device
        index = None if rows is None else row_index(rows, device or here)
        # rows that are not asked for repeat one that is, so that what is done to the whole batch can be done again
        places = [rows.index(row) if row in rows else 0 for row in range(batch)] if rows is not None else []
        fill = None if rows is None else (places, row_index(places, device or here))

        def answer(number: int, given: list[Any]) -> list[Any]:
            calls = [record.program.calls[number] for record in records]
            args, kwargs = fetch(join(calls, rows, here, given), device)
            with Surroundings.put_back(calls[0]):
                made = parts(calls[0].module(*args, **kwargs))
            width = batch if rows is None else len(rows)
            return [
                {
                    key: scatter(made[key[0]], key[1], calls[0].slots[key], (width, len(calls), batch), place, fill)
                    for key in call.outputs
                }
                for place, call in enumerate(calls)
            ]

        velocities = drive([record.program.run(device, rows) for record in records], answer)
        velocity = torch.stack(velocities, dim=1)
        velocity = velocity if index is None else velocity[index]
        active = [record.active for record in records if record.active is not None]
        if active:
            moved = torch.stack(active, dim=1)
            moved = moved if rows is None else moved[row_index(rows, moved.device)]
            velocity = velocity * fetch(moved, device)
        return velocity


class _Watch:
    """One recording: hooks on the modules, and the tape between them."""

    def __init__(self, recorder: TrajectoryRecorder, chosen: list[int]):
        self.recorder, self.chosen = recorder, chosen
        self.name = recorder.name
        self.trajectory = Trajectory()
        self.transitions: list[Transition] = []
        self.replayed, self.others = modules_of(recorder)
        self.store = ArgumentStore()
        self.tape = Tape(self.name, {id(p) for module in self.replayed for p in module.parameters()})
        self._seen: list[_Seen] = []
        self._program: Program | None = None
        self._depth = 0
        self._around: dict[nn.Module, Surroundings] = {}
        # calls before the first step, among them those before the loop
        self._first: int | None = None
        # whether what happens belongs to a chosen step; of the first one nobody knows the number
        self._on = True
        # the recorder's own calls
        self._busy = False

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

    def __deepcopy__(self, memo: Any) -> _Watch:
        # a copy of the scheduler is watched as well
        return self

    def on_output(self, index: int, output: Tensor, negated: bool) -> None:
        """The scheduler was given ``output`` for step ``index``."""
        self.tape.stop()
        self._busy = True
        self._first = len(self._seen) if self._first is None else self._first
        self._program = self.tape.program(output, negated) if index in self.chosen else None

    def _follows(self, module: nn.Module) -> bool:
        """Whether a call of ``module`` is part of the replay: before the loop, one of other modules is not."""
        own = self.recorder.modules.values()
        steps = getattr(self.recorder.pipeline.scheduler, "num_inference_steps", None)
        looping = steps is not None or any(module is x for x in own)
        return self._on and looping and any(module is x for x in self.replayed)

    def on_step(self, index: int, transition: Transition | None) -> None:
        if transition is not None:
            if self.transitions and self.transitions[-1].index == index:
                raise ValueError(
                    f"pipeline: {self.name} took step {index} twice, with a scheduler of its own for a second "
                    "latent such as sound; one latent per step can be trained"
                )
            self.trajectory.steps.append(self._record(transition))
            self.transitions.append(transition)
        self._seen.clear()
        self.tape.begin()
        self.store.next_step()
        self._on, self._busy, self._depth = index + 1 in self.chosen, False, 0
        if self._on:
            self.tape.start()

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
        used = [seen for seen in self._seen if any(seen.call is call for call in program.calls)]
        oldest = self.tape.oldest(program)
        if oldest is not None and self._first is not None and oldest < self._first - len(self._seen):
            raise ValueError(
                f"{where}: the velocity depends on what a transformer gave before the loop, which would stay as it was "
                "while the weights move, expected calls within the step"
            )
        try:
            for position, op in enumerate(program.ops):
                if isinstance(op, Call):
                    (seen,) = [seen for seen in used if seen.call is op]
                    program.ops[position] = self._settle(seen, batch)
                else:
                    for leaf in op.leaves:
                        if isinstance(leaf, Const) and isinstance(leaf.value, Tensor):
                            leaf.value = self.store.constant(leaf.value, batch)
            if self.recorder.checks:
                self._look(program, used, transition, batch)
        except ValueError as cause:
            raise ValueError(f"{where}: {cause}") from None
        return RecordedStep(index, program, transition.active)

    def _settle(self, seen: _Seen, batch: int) -> Call:
        """The call with its arguments kept, and the places of rows in its arguments and outputs."""
        call, known = seen.call, self.recorder._layouts
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


def modules_of(recorder: TrajectoryRecorder) -> tuple[list[nn.Module], list[nn.Module]]:
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


def _deviation(replayed: Tensor, trajectory: Trajectory, rows: Sequence[int], steps: range) -> tuple[float, float]:
    """Largest difference of replayed velocities, and the KL it costs in the worst row and step."""
    recorded, noise, step = trajectory.select(rows, steps)
    difference = float((replayed - recorded).double().abs().max())
    _, squared = row_statistics(replayed.detach(), recorded, noise, step, row_dims=2)
    return difference, float(squared.max()) / 2


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
