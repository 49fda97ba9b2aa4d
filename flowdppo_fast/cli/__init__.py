"""``flowdppo``: the command line. Each command is a module that is imported when its command is given."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# command: module with add_arguments(parser) and run(options) -> exit status, and its line in the help
COMMANDS = {
    "doctor": ("flowdppo_fast.cli.doctor", "what is built, what is usable here, and why not"),
    "train": ("flowdppo_fast.cli.train", "fine-tune a pipeline by the settings of a YAML file"),
    "plan": ("flowdppo_fast.cli.plan", "say what a run will need of a device's memory and how to need less"),
    "sample": ("flowdppo_fast.cli.sample", "draw images with the trained weights of a run"),
    "diagnose": (
        "flowdppo_fast.runs.diagnose",
        "plot what a run's logs say about its trust region, and name likely trouble",
    ),
    "report": ("flowdppo_fast.runs.report", "write one page with a run's curves, images, verdict and settings"),
    "export": ("flowdppo_fast.cli.export", "write the trained weights of a run as diffusers loads them"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``flowdppo`` command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="flowdppo", description="Flow-DPPO fine-tuning of flow-matching image and video models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in given if not word.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == chosen:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(execute=implementation.run, parser=command)
    options, rest = parser.parse_known_args(given)
    # argparse does not see overrides that come after an option
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options.execute(options)
