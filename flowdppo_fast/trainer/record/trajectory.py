"""What the recorder keeps of a pipeline call: chosen steps, their velocities, noise and transformer calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...noise import PhiloxNoise
from ...samplers import SDEStep
from .arguments import Call, joinable, row_index
from .offload import fetch, stored_bytes, to_host
from .program import Program
from .rules import rule_of


@dataclass(frozen=True)
class Transition:
    """What a chosen step did.

    Attributes:
        index: position in the schedule, 0 is the noisiest step.
        velocity: ``[B, *latent]`` the velocity after guidance, as the scheduler was given it.
        noise: the drawn noise: ``[B, *latent]`` float32, or :class:`PhiloxNoise` with one stream per row.
        step: the :class:`SDEStep` of all rows.
        active: ``[B, L, 1]`` bool, the tokens that were moved, where the pipeline gives a timestep per token and holds
            some still; None where all were.
        number: of the pass through the schedule.
    """

    index: int
    velocity: Tensor
    noise: Tensor | PhiloxNoise
    step: SDEStep
    active: Tensor | None = None
    number: int = 0


@dataclass
class RecordedStep:
    """A chosen step.

    Attributes:
        index: position in the schedule.
        program: the module calls that were made for it, and what was done with their outputs.
        active: ``[B, L, 1]`` what the scheduler moved, None: everything.
    """

    index: int
    program: Program
    active: Tensor | None

    @property
    def calls(self) -> list[Call]:
        """The module calls that lead to its velocity."""
        return self.program.calls

    @property
    def rule(self) -> str:
        """How the velocity is made of the calls' outputs ``b0``, ``b1``, ..., for people."""
        return rule_of(self.program)


@dataclass
class Trajectory:
    """The chosen steps of one pipeline call on ``B`` rows.

    Attributes:
        steps: S recorded steps in schedule order.
        velocity: ``[B, S, *latent]`` velocities after guidance, in the dtype the scheduler was given; zero where a
            condition such as a first frame keeps tokens from moving.
        noise: ``[B, S, *latent]`` float32, or :class:`PhiloxNoise` with streams ``[B, S]``.
        sde_step: :class:`SDEStep` stacked to ``[S]``.
        groups: positions of steps that one transformer call can replay together.
        device: where it is replayed, if it was moved to the host (:meth:`offload`).
    """

    steps: list[RecordedStep] = field(default_factory=list)
    velocity: Tensor = None  # type: ignore[assignment]
    noise: Tensor | PhiloxNoise = None  # type: ignore[assignment]
    sde_step: SDEStep = None  # type: ignore[assignment]
    groups: list[list[int]] = field(default_factory=list)
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.velocity)

    @property
    def elements(self) -> int:
        """Latent elements of a row."""
        return self.velocity.shape[2:].numel()

    @property
    def kinds(self) -> set[tuple]:
        """What the replay of each step depends on besides numbers: sizes, place in the schedule, functions, calls."""
        return {(tuple(self.velocity.shape[2:]), step.index, step.program.signature) for step in self.steps}

    @property
    def nbytes(self) -> int:
        """Bytes that the trajectory holds: velocities, noise and the arguments of the calls, shared ones once."""
        return stored_bytes([self])

    def select(self, rows: Sequence[int], steps: range | None = None) -> tuple[Tensor, Tensor | PhiloxNoise, SDEStep]:
        """Old velocities ``[b, S, *latent]``, noise and steps ``[S]`` of ``rows`` at positions ``steps`` (or all)."""
        index = row_index(rows, self.velocity.device)
        part = slice(None) if steps is None else slice(steps.start, steps.stop)
        velocity = fetch(self.velocity[:, part][index], self.device)
        if isinstance(self.noise, PhiloxNoise):
            stream: Tensor = self.noise.stream  # type: ignore[assignment]
            noise: Tensor | PhiloxNoise = PhiloxNoise(self.noise.seed, stream[:, part][row_index(rows, stream.device)])
        else:
            noise = fetch(self.noise[:, part][index], self.device)
        return velocity, noise, self.sde_step[part]

    def finish(self, transitions: Sequence[Transition], sde_step: SDEStep) -> None:
        """Takes velocities and noise of the recorded steps; ``sde_step`` is theirs, stacked."""
        velocities = [t.velocity if t.active is None else t.velocity * t.active for t in transitions]
        self.velocity = torch.stack(velocities, dim=1)
        seeded = [t.noise for t in transitions if isinstance(t.noise, PhiloxNoise)]
        stored = [t.noise for t in transitions if isinstance(t.noise, Tensor)]
        if seeded:
            streams = [torch.as_tensor(noise.stream) for noise in seeded]
            self.noise = PhiloxNoise(seeded[0].seed, torch.stack(streams, dim=1))
        else:
            self.noise = torch.stack(stored, dim=1)
        for position, record in enumerate(self.steps):
            group = self.groups[-1] if self.groups else None
            if group is not None and _together(self.steps[group[0]], record):
                group.append(position)
            else:
                self.groups.append([position])
        self.sde_step = sde_step

    def offload(self, device: torch.device) -> None:
        """Moves what was recorded to the host, to pinned memory where there is a GPU; returns when it is there.

        Row by row it comes back to ``device`` when it is replayed. Seeds of noise and the numbers of the steps, a few
        bytes, stay where they are. What is on the host already is left as it is.
        """
        to_host(self)
        self.device = device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def trajectory_bytes(trajectories: Sequence[Trajectory]) -> float:
    """Bytes kept per sample: velocities, noise or its seeds, and the arguments of transformer calls."""
    return stored_bytes(trajectories) / sum(map(len, trajectories))


def _together(a: RecordedStep, b: RecordedStep) -> bool:
    """Whether one transformer call per slot can replay both steps."""
    same = len(a.calls) == len(b.calls) and (a.active is None) == (b.active is None)
    return same and all(map(joinable, a.calls, b.calls))
