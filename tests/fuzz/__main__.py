"""The long form: many random calls of one backend, and a tally of them.

    python -m tests.fuzz --backend cpu --cases 100000 --output FILE.json
    TRITON_INTERPRET=1 python -m tests.fuzz --backend triton --cases 2000 --output FILE.json
    python -m tests.fuzz --merge A.json B.json --output FILE.json

With ``--output`` the tally is written as it grows, and the same command goes on where it ended. Calls that are
wrong are named with the seed that repeats them (``--cases 1 --seed N``), and make the exit code 1. ``--merge`` adds up
tallies of seeds that follow each other.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.ops.devices import open_device
from bench.ops.environment import collect, git_sha
from flowdppo_fast.backend import problem, triton_interpreted

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.compare import check_backend  # noqa: E402
from support.problems import Call, Outcome, library  # noqa: E402
from support.steps import check_statistics, check_step  # noqa: E402

from fuzz.draws import Drawn, draw_call, draw_statistics, draw_step, seeded, yardstick_of  # noqa: E402

# facts of a call that are counted by value; numbers are not
COUNTED = (
    "form", "objective", "region", "sampler", "steps", "source", "log_prob", "latent_reduction", "reduction",
    "std_shape", "reference_kl", "advantages", "advantages held", "row weights", "upstream",
)  # fmt: skip
PRESENT = ("with_reference", "with_old_log_prob", "advantage_clip", "single_pass", "noise")
SAVED_EVERY = 250
# a broken backend need not be shown a hundred thousand times
MOST_WRONG = 20


def draw(seed: int, device: str, float64: bool) -> tuple[str, Drawn]:
    """Eight calls in ten are losses."""
    choose = seeded(seed)
    kind = choose.choice((*("loss",) * 8, "sde_step", "row_statistics"))
    draws = {"loss": draw_call, "sde_step": draw_step, "row_statistics": draw_statistics}[kind]
    return kind, draws(choose, device, float64=float64)


def check_repeats(call: Call, backend: str, first: Outcome) -> None:
    """Asserts the same bits once more, with three threads."""
    torch.set_num_threads(3)
    try:
        again = library(call, backend)
    finally:
        torch.set_num_threads(1)
    pairs = {"loss": (first.loss, again.loss), "gradient": (first.grad, again.grad)}
    pairs |= {name: (value, again.rows[name]) for name, value in first.rows.items()}
    pairs |= {name: (value, again.metrics[name]) for name, value in first.metrics.items()}
    differing = [name for name, (one, other) in pairs.items() if not torch.equal(one, other)]
    assert not differing, f"other bits with three threads: {', '.join(differing)}"


class Tally:
    """What was checked so far, as the results file has it."""

    def __init__(self, backend: str, first: int):
        self.backend, self.first, self.done, self.seconds = backend, first, 0, 0.0
        self.wrong: list[int] = []
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.environment = collect(open_device("cpu"))

    @classmethod
    def read(cls, path: Path) -> Tally:
        saved = json.loads(path.read_text())
        tally = cls(saved["backend"], saved["first_seed"])
        tally.environment = saved["environment"]
        tally.done, tally.seconds, tally.wrong = saved["cases"], saved["cpu_seconds"], saved["wrong"]
        for name, counter in saved["tally"].items():
            tally.counts[name].update(counter)
        return tally

    @property
    def sha(self) -> str:
        return self.environment["git_sha"]

    def add(self, other: Tally) -> None:
        if (other.backend, other.first) != (self.backend, self.first + self.done):
            sys.exit(
                f"--merge: got seeds of {other.backend} from {other.first}, expected {self.backend} from "
                f"{self.first + self.done}"
            )
        if other.sha != self.sha:
            sys.exit(f"--merge: got tallies of commits {self.sha} and {other.sha}, expected the same")
        self.done, self.seconds, self.wrong = (
            self.done + other.done, self.seconds + other.seconds, self.wrong + other.wrong,
        )  # fmt: skip
        for name, counter in other.counts.items():
            self.counts[name].update(counter)

    def count(self, kind: str, drawn: Drawn) -> None:
        self.counts["kind"][kind] += 1
        for name in COUNTED:
            if name in drawn.facts:
                self.counts[name][str(drawn.facts[name])] += 1
        for name in PRESENT:
            if name in drawn.facts:
                self.counts["options"][name] += 1
        self.counts["first dtype"][drawn.facts["dtypes"][0]] += 1
        self.counts["row dims"][str(len(drawn.facts["rows"]))] += 1
        self.counts["latent dims"][str(len(drawn.facts["latent"]))] += 1
        for layout in drawn.facts.get("layouts", ()):
            self.counts["layout"][layout] += 1

    def as_dict(self) -> dict[str, Any]:
        variable = "TRITON_INTERPRET=1 " if self.backend == "triton" and triton_interpreted() else ""
        options = f"--backend {self.backend} --cases {self.done} --seed {self.first}"
        return {
            "command": f"{variable}python -m tests.fuzz {options}",
            "environment": self.environment,
            "backend": self.backend,
            "first_seed": self.first,
            "cases": self.done,
            "wrong": self.wrong,
            "cpu_seconds": round(self.seconds, 1),
            "tally": {name: dict(sorted(counter.items())) for name, counter in sorted(self.counts.items())},
        }

    def write(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        os.replace(temporary, path)


def check(tally: Tally, seed: int, device: str) -> None:
    """One call, counted.

    Raises:
        AssertionError: it is wrong.
    """
    kind, drawn = draw(seed, device, tally.backend != "triton")
    if kind == "sde_step":
        check_step(drawn.call, tally.backend)
    elif kind == "row_statistics":
        check_statistics(drawn.call, tally.backend)
    else:
        yardstick, why = yardstick_of(drawn.call)
        if yardstick is None:
            tally.counts["left out"][why] += 1
            return
        outcome = check_backend(drawn.call, tally.backend, yardstick)
        if tally.backend == "cpu":
            check_repeats(drawn.call, tally.backend, outcome)
        kept = int(outcome.rows["kept"].sum())
        tally.counts["rows"].update(kept=kept, dropped=outcome.rows["kept"].numel() - kept)
    tally.count(kind, drawn)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("reference", "cpu", "triton"), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each has its own")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="tallies to add up, in the order of their seeds")
    args = parser.parse_args()
    if args.merge:
        tally, *others = map(Tally.read, args.merge)
        for other in others:
            tally.add(other)
    else:
        tally = run(args)
    result = tally.as_dict()
    print(json.dumps(result, indent=1))
    if args.output is not None:
        tally.write(args.output)
    return 1 if tally.wrong else 0


def run(args: argparse.Namespace) -> Tally:
    torch.set_num_threads(1)
    # as in the tests: memory that a kernel forgets to write is NaN
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if (reason := problem(args.backend, args.device)) is not None:
        sys.exit(f"--backend {args.backend}: {reason}")
    tally = Tally(args.backend, args.seed)
    if args.output is not None and args.output.exists():
        tally = Tally.read(args.output)
        if (tally.backend, tally.first) != (args.backend, args.seed):
            sys.exit(f"{args.output}: holds another backend or other seeds, expected those of the command line")
        if tally.sha != git_sha():
            sys.exit(f"{args.output}: was begun at commit {tally.sha}, expected {git_sha()}; remove it to start afresh")
    before, started = tally.seconds, time.process_time()
    while tally.done < args.cases and len(tally.wrong) < MOST_WRONG:
        seed = args.seed + tally.done
        try:
            check(tally, seed, args.device)
        except Exception:
            tally.wrong.append(seed)
            print(f"seed {seed}: {draw(seed, args.device, args.backend != 'triton')[1]}", file=sys.stderr)
            traceback.print_exc()
        tally.done += 1
        if tally.done % SAVED_EVERY == 0:
            tally.seconds = before + time.process_time() - started
            print(f"{tally.done} of {args.cases}, {tally.seconds:.0f} CPU-seconds", file=sys.stderr, flush=True)
            if args.output is not None:
                tally.write(args.output)
    tally.seconds = before + time.process_time() - started
    return tally


if __name__ == "__main__":
    sys.exit(main())
