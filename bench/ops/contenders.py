"""Who is measured: the trainers' own code, the same compiled, every backend and form of this library, and each
trainer's step before and after."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flowdppo_fast
from flowdppo_fast import (
    DPPO,
    RatioClip,
    fused_dppo_loss,
    fused_policy_velocity_loss,
    sde_step,
)
from flowdppo_fast import backend as library

from . import peers, trainers
from .inputs import CLIP_RANGE, THRESHOLD, Inputs, Rollout
from .oracle import Start
from .workloads import Workload

# backends there are, or will be; one that this version lacks is listed as missing
BACKENDS = ("cpu", "triton", "cuda", "reference")
# the reference backend is the oracle, not an opponent: it is timed where that costs little
_REFERENCE_ELEMENTS = 1 << 20
# twelve contenders more; their steps differ by what each trainer does around the same latents, not by their size
_TRAINER_WORKLOADS = ("sd3-512",)


# objective and bound of every eager form that is timed
METHODS: dict[Callable[..., peers.PeerOutput], tuple[str, float]] = {
    peers.dppo: ("dppo", THRESHOLD),
    peers.ratio_clip: ("ratio_clip", CLIP_RANGE),
}


class RowResults(NamedTuple):
    """Per-row numbers of a call, for the checks; ``kl`` is 0-d where only its mean is reported, None where the method
    has none."""

    kl: Tensor | None
    log_ratio: Tensor


@dataclass(frozen=True)
class Contender:
    """One way to compute loss, metrics and gradient.

    Args:
        name: unique, ``family/form``.
        start: what it starts from, which decides its oracle and the bytes it must move.
        objective: ``"dppo"`` or ``"ratio_clip"``.
        prepare: rollout -> the call to be timed, ``inputs -> output``; compiling happens at its first use.
        read: output -> row results.
        backend: which backend of this library, or None.
        compile_mode: mode of ``torch.compile``, or None.
        single_pass: the call returns the gradient itself; there is no separate forward.
        syncs: the call reads numbers back to the host, so no graph can hold it.
        trainer: whose step it is, of :data:`trainers.TRAINERS`, or None.
        host_reads: how many of the reads seen in a trace of a CPU are of tensors that training keeps there.
    """

    name: str
    start: Start
    objective: str
    prepare: Callable[[Rollout], Callable[[Inputs], Any]]
    read: Callable[[Any], RowResults]
    backend: str | None = None
    compile_mode: str | None = None
    single_pass: bool = False
    syncs: bool = False
    trainer: str | None = None
    host_reads: int = 0

    def leaf(self, inputs: Inputs) -> Tensor:
        """What the gradient is taken in."""
        return inputs.mean if self.start is Start.MEANS else inputs.velocity

    def gradient(self, output: Any, inputs: Inputs) -> Tensor:
        """The backward half of the call. The upstream gradient, a 1, is given: autograd would launch a fill for it."""
        if self.single_pass:
            return output.grad
        return torch.autograd.grad(output.loss, self.leaf(inputs), _one(output.loss.dtype, output.loss.device))[0]

    def input_bytes(self, inputs: Inputs) -> int:
        """Bytes of the latents it starts from, each once."""
        latents = {
            Start.CHAIN: (inputs.velocity, inputs.sample, inputs.prev_sample, inputs.old_mean),
            Start.MEANS: (inputs.mean, inputs.old_mean, inputs.prev_sample),
            Start.VELOCITY: (inputs.velocity, inputs.old_velocity, inputs.noise),
            Start.SEEDED: (inputs.velocity, inputs.old_velocity),
        }[self.start]
        if self.start is Start.CHAIN and self.objective == "ratio_clip":
            # ratio clipping as the trainers write it needs no old mean
            latents = latents[:3]
        return sum(latent.nbytes for latent in latents)

    def missing(self, device_type: str) -> str | None:
        """Why it cannot run on such a device, or None."""
        if self.trainer is not None:
            return trainers.TRAINERS[self.trainer].missing()
        if self.backend is None:
            return None
        if self.backend not in flowdppo_fast.BACKENDS:
            return f"flowdppo_fast {flowdppo_fast.__version__} has no backend {self.backend!r}"
        return library.problem(self.backend, device_type)

    def left_out(self, workload: Workload) -> str | None:
        """Why it is not timed on a workload although it could be, or None."""
        if self.trainer is not None and workload.name not in _TRAINER_WORKLOADS:
            return f"the trainers' steps are timed on {', '.join(_TRAINER_WORKLOADS)} only"
        if self.backend == "reference" and workload.elements > _REFERENCE_ELEMENTS:
            return f"the reference backend is the oracle, timed up to {_REFERENCE_ELEMENTS} elements"
        slow_compile = self.compile_mode is not None and self.name != "peer-compiled"
        if slow_compile and not workload.core:
            return "compiled once more only for the core workloads (compile time)"
        return None


@functools.cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def _peer_call(method: Callable, bound: float, rollout: Rollout) -> Callable[[Inputs], peers.PeerOutput]:
    levels = rollout.levels

    def call(i: Inputs) -> peers.PeerOutput:
        return method(i.velocity, i.sample, i.prev_sample, i.old_mean, i.old_log_prob, i.advantages, levels, bound)

    return call


def _peer(name: str, method: Callable, *, syncs: bool = False, mode: str | None = None) -> Contender:
    objective, bound = METHODS[method]

    def prepare(rollout: Rollout) -> Callable[[Inputs], peers.PeerOutput]:
        if mode is not None:
            # static shapes and one whole graph: the best case for the compiler
            return _peer_call(torch.compile(method, dynamic=False, fullgraph=True, mode=mode), bound, rollout)
        call = _peer_call(method, bound, rollout)
        return (lambda i: peers.synced(call(i))) if syncs else call

    def read(output: peers.PeerOutput) -> RowResults:
        return RowResults(output.kl, output.log_ratio)

    return Contender(name, Start.CHAIN, objective, prepare, read, compile_mode=mode, syncs=syncs)


def _read_fused(output: flowdppo_fast.LossOutput) -> RowResults:
    return RowResults(output.rows.kl, output.rows.log_ratio)


def _device_std(rollout: Rollout) -> float | Tensor:
    """``S`` as a trainer holds it: a float for all rows, or per-row numbers on the device."""
    std = rollout.step.std
    return std.float().to(rollout.inputs.mean.device) if isinstance(std, torch.Tensor) else std


def _fused(backend: str) -> list[Contender]:
    options: dict[str, Any] = {"backend": backend}

    def means(rollout: Rollout) -> Callable[[Inputs], flowdppo_fast.LossOutput]:
        std = _device_std(rollout)
        return lambda i: fused_dppo_loss(
            i.mean, i.old_mean, i.prev_sample, std, i.advantages, threshold=THRESHOLD, **options
        )

    def drop_in(rollout: Rollout) -> Callable[[Inputs], flowdppo_fast.LossOutput]:
        step, rows = rollout.step, len(rollout.workload.rows)
        std = _device_std(rollout)

        def call(i: Inputs) -> flowdppo_fast.LossOutput:
            stepped = sde_step(
                i.sample, i.velocity, step, prev_sample=i.prev_sample, return_mean=True, row_dims=rows, **options
            )
            assert stepped.mean is not None
            return fused_dppo_loss(
                stepped.mean, i.old_mean, i.prev_sample, std, i.advantages, threshold=THRESHOLD, **options
            )

        return call

    def velocity(seeded: bool = False, single_pass: bool | None = None, floats: bool = False, clip: bool = False):
        def prepare(rollout: Rollout) -> Callable[[Inputs], flowdppo_fast.LossOutput]:
            step, philox = rollout.step, rollout.philox
            objective = RatioClip(CLIP_RANGE) if clip else DPPO(THRESHOLD)

            def call(i: Inputs) -> flowdppo_fast.LossOutput:
                output = fused_policy_velocity_loss(
                    i.velocity,
                    i.old_velocity,
                    philox if seeded else i.noise,
                    step,
                    i.advantages,
                    objective=objective,
                    single_pass=single_pass,
                    **options,
                )
                if floats:
                    output.metrics().to_floats()
                return output

            return call

        return prepare

    def contender(form: str, start: Start, prepare: Callable, objective: str = "dppo", **flags: Any) -> Contender:
        return Contender(f"{backend}/{form}", start, objective, prepare, _read_fused, backend, **flags)

    return [
        contender("velocity", Start.VELOCITY, velocity()),
        contender("two passes", Start.VELOCITY, velocity(single_pass=False)),
        contender("velocity, metrics read", Start.VELOCITY, velocity(floats=True), syncs=True),
        contender("seeded", Start.SEEDED, velocity(seeded=True)),
        contender("single-pass", Start.VELOCITY, velocity(single_pass=True), single_pass=True),
        contender("seeded single-pass", Start.SEEDED, velocity(seeded=True, single_pass=True), single_pass=True),
        contender("means", Start.MEANS, means),
        contender("step, then means", Start.CHAIN, drop_in),
        contender("clip", Start.VELOCITY, velocity(clip=True), "ratio_clip"),
    ]


def _trainer_step(name: str, when: str) -> Contender:
    pair = trainers.TRAINERS[name]

    def read(output: trainers.StepOutput) -> RowResults:
        kl = None if output.kl is None else torch.as_tensor(output.kl)
        return RowResults(kl, output.log_ratio())

    return Contender(
        f"{name}/{when}",
        Start.CHAIN,
        pair.objective,
        getattr(pair, when),
        read,
        single_pass=pair.single_pass,
        syncs=True,
        trainer=name,
        host_reads=pair.host_reads[when == "after"],
    )


def registry(device_type: str) -> list[Contender]:
    """All contenders for a device; those that cannot run there are in it, :meth:`Contender.missing` says why."""
    peers_and_clip = [
        _peer("peer-eager", peers.dppo, syncs=True),
        _peer("peer-eager, no syncs", peers.dppo),
        _peer("peer-compiled", peers.dppo, mode="default"),
        _peer("clip-eager", peers.ratio_clip),
        _peer("clip-compiled", peers.ratio_clip, mode="default"),
    ]
    if device_type == "cuda":
        peers_and_clip.append(_peer("peer-compiled, max-autotune", peers.dppo, mode="max-autotune-no-cudagraphs"))
    fused = [contender for backend in BACKENDS for contender in _fused(backend)]
    steps = [_trainer_step(name, when) for name in trainers.TRAINERS for when in ("before", "after")]
    return peers_and_clip + fused + steps


def select(all_contenders: Sequence[Contender], names: Sequence[str]) -> list[Contender]:
    """Contenders by name or by what stands before the slash (``cpu``), ``trainers`` (their steps), or ``all``.

    Raises:
        ValueError: an unknown name.
    """
    if list(names) == ["all"]:
        return list(all_contenders)
    chosen = []
    for name in names:
        found = [c for c in all_contenders if name in (c.name, c.name.split("/")[0], c.trainer and "trainers")]
        if not found:
            known = ", ".join(repr(c.name) for c in all_contenders)
            raise ValueError(f"contenders: got {name!r}, expected 'all' or any of {known}")
        chosen += [c for c in found if c not in chosen]
    return chosen
