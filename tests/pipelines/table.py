"""Writes ``docs/pipelines.md`` from what recording the pipelines finds: ``python -m tests.pipelines.table``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from bench.pages import block_of, put
from flowdppo_fast.trainer.record.arguments import tensors_of
from flowdppo_fast.trainer.record.recorder import Trajectory

from .cases import CASES, HALF, REFUSED, Case, Recording, hollow, record
from .families import FAMILIES
from .kinds import KINDS
from .siblings import SIBLINGS

DOCUMENT = Path(__file__).parents[2] / "docs" / "pipelines.md"
BLOCK = "pipelines"


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of different tensors."""
    return sum({id(x): x.untyped_storage().nbytes() for x in tensors}.values())


def shares(trajectory: Trajectory) -> tuple[float, float]:
    """Bytes per image and step, and bytes that all images and steps share."""
    rows, steps = trajectory.velocity.shape[:2]
    held = [{id(x): x for x in tensors_of(step.calls)} for step in trajectory.steps]
    shared = set(held[0]).intersection(*held[1:])
    own = nbytes(x for step in held for key, x in step.items() if key not in shared)
    common = nbytes(held[0][key] for key in shared)
    return (own + nbytes([trajectory.velocity])) / (rows * steps), common


def line(name: str, case: Case, recording: Recording) -> str:
    """The table's line of a case."""
    trajectory, check = recording.trajectory, recording.recorder.verify(recording.trajectory, [1, 2])
    assert check.same_geometry == 0.0, name
    calls = sorted({len(step.calls) for step in trajectory.steps})
    rules = list(dict.fromkeys(f"`{step.rule}`" for step in trajectory.steps))
    options = ", ".join(f"{key}={value}" for key, value in case.options.items()) or "none"
    at_size = "not computed | |"
    # where guidance stops on the way, what is shared depends on which steps are chosen
    if FAMILIES[case.family].published is not None and case.groups != HALF:
        per_step, shared = shares(hollow(case).trajectory)
        at_size = f"{per_step / 1e6:.2f} MB | {shared / 1e6:.2f} MB |"
    joined = "/".join(str(len(group)) for group in trajectory.groups)
    return (
        f"| {recording.recorder.name} | {options} | {', then '.join(rules)} | {'/'.join(map(str, calls))} | {joined} | "
        f"{trajectory.nbytes:,} | {at_size}"
    )


def table(recordings: dict[str, Recording]) -> str:
    """The generated part of the document, from recordings of all cases."""
    lines = [
        "| pipeline | options | velocity | calls per step | steps per replay | bytes, tiny "
        "| computed: per image and step | computed: shared |",
        "|---|---|---|---|---|---:|---:|---:|",
        *(line(name, case, recordings[name]) for name, case in CASES.items()),
    ]
    sizes = {}
    for case in CASES.values():
        family = FAMILIES[case.family]
        if family.published is not None:
            sizes[family.model] = (
                f"{family.published.tokens} text tokens of {family.published.text}, "
                f"{family.published.channels} latent channels"
            )
    lines += ["", "Sizes of the two computed columns:", ""]
    lines += [f"- {model}: {text}" for model, text in sizes.items()]
    lines += ["", "What is refused, and in which words:", "", "| pipeline | message |", "|---|---|"]
    lines += [f"| {name} | {refusal(name)} |" for name in REFUSED]
    bitwise = {recordings[name].recorder.name for name in CASES} | {kind.__name__ for kind in SIBLINGS}
    bitwise |= {type(kind.family.pipeline()).__name__ for kind in KINDS.values()} | {"FluxModularPipeline"}
    found = flow_pipelines()
    refused = {name: why for name, why in found.items() if why}
    untried = sorted(found.keys() - refused.keys() - bitwise)
    lines += [
        "", f"Of the {len(found)} flow pipelines of diffusers {diffusers.__version__}:", "",
        "| what was found | pipelines |", "|---|---|",
        f"| works, bitwise | {', '.join(sorted(bitwise))} |",
        *(
            f"| refused: {why} | {', '.join(sorted(name for name in refused if refused[name] == why))} |"
            for why in sorted(set(refused.values()))
        ),
        f"| not tried | {', '.join(untried)} |",
    ]  # fmt: skip
    return "\n".join(lines)


def flow_pipelines() -> dict[str, str]:
    """Pipelines of diffusers whose scheduler is for flow matching, and why they are refused, if they are."""
    found = {"FluxModularPipeline": ""}
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if not isinstance(kind, type) or name in ("DiffusionPipeline", "ModularPipeline"):
            continue
        scheduler = inspect.signature(kind.__init__).parameters.get("scheduler")
        where, known = kind.__module__, "" if scheduler is None else str(scheduler.annotation)
        if "FlowM" in known or name in OWN_SCHEDULER or (known and any(part in where for part in FLOWS)):
            found[name] = OWN_SCHEDULER.get(name, "")
    for name in [*found, *dir(diffusers)]:
        if name.endswith("ModularPipeline") and name not in ("ModularPipeline", "StableDiffusionXLModularPipeline"):
            found.setdefault(name, "")
    return found


# folders whose pipelines have a scheduler of a more general class
FLOWS = (".sana", ".skyreels", ".wan.", ".cosmos", ".helios", ".pag.pipeline_pag_sana")
SCM = "a consistency model, whose steps draw noise of their own"
MAP = "flow maps are no velocities; there is no way"
# why a pipeline cannot be served with the scheduler that its models have
OWN_SCHEDULER = {
    "SanaSprintPipeline": SCM, "SanaSprintImg2ImgPipeline": SCM, "AnyFlowPipeline": MAP, "AnyFlowFARPipeline": MAP,
    "MochiPipeline": "levels the other way around (`invert_sigmas`); there is no way yet",
    "Flux2KleinKVPipeline": "its cache of keys and values depends on the weights; Flux2KleinPipeline does without",
}  # fmt: skip


def refusal(name: str) -> str:
    """The message with which a pipeline is refused."""
    try:
        REFUSED[name]()
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{name} was not refused")


def committed() -> str:
    """The generated part of the document as it stands."""
    return block_of(DOCUMENT.read_text(), BLOCK, DOCUMENT.name)[1].strip()


def main() -> int:
    # more threads only get into each other's way on tensors this small
    torch.set_num_threads(1)
    made = table({name: record(case) for name, case in CASES.items()})
    return put(DOCUMENT, {BLOCK: made}, check=False, program="tests.pipelines.table")


if __name__ == "__main__":
    sys.exit(main())
