"""Each supported trainer's step before and after: its own convention in eager torch, and the same through the library.

A call is what a trainer does with the model's output for one micro-batch at one timestep: replay the recorded step,
take its loss, differentiate, and read to the host what the trainer reads there at that point. ``before`` is the
convention that the integration's own tests state, ``after`` is the integration called as its guide says. Both start
from the same inputs and have the trainer's own objective at equal bounds.

Where a trainer's classes are extended (verl-omni, UniRL, Flow-Factory), the stand-ins of the tests take their place;
those hold interfaces and no mathematics. The parts of an extended trainer that stay its own (Flow-Factory's adapter,
UniRL's gathering of stored columns) are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..inputs import Rollout
from . import classes, scripts
from .common import Call, StepOutput, problem

__all__ = ["TRAINERS", "Pair", "StepOutput"]


class Pair(NamedTuple):
    """One trainer.

    Args:
        objective: ``"dppo"`` or ``"ratio_clip"``.
        before, after: rollout -> call.
        single_pass: the trainer's own function runs the backward too.
        host_reads: reads, before and after, of tensors that a training run keeps on the CPU (a schedule, step indices),
            and that of the C++ library's backward, which looks at the gradient from above. No syncs, but like them in a
            trace of a CPU.
        needs: packages that the integration or the stand-in imports.
    """

    objective: str
    before: Callable[[Rollout], Call]
    after: Callable[[Rollout], Call]
    single_pass: bool = False
    host_reads: tuple[int, int] = (0, 0)
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        return problem(self.needs)


TRAINERS: dict[str, Pair] = {
    "flow_grpo": Pair("ratio_clip", scripts.flow_grpo_before, scripts.flow_grpo_after, host_reads=(0, 1)),
    "verl_omni": Pair("dppo", classes.verl_omni_before, classes.verl_omni_after, needs=("diffusers",)),
    "unirl": Pair("dppo", classes.unirl_before, classes.unirl_after, single_pass=True, host_reads=(3, 3)),
    "flow_factory": Pair(
        "dppo",
        classes.flow_factory_before,
        classes.flow_factory_after,
        single_pass=True,
        host_reads=(0, 1),
        needs=("tqdm",),
    ),
    "dance_grpo": Pair("ratio_clip", scripts.dance_grpo_before, scripts.dance_grpo_after, host_reads=(0, 2)),
    "mix_grpo": Pair("ratio_clip", scripts.mix_grpo_before, scripts.mix_grpo_after, host_reads=(0, 1)),
}
