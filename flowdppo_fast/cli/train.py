"""``flowdppo train``: fine-tunes a pipeline by a recipe; what is wrong with it is said before weights are loaded."""

from __future__ import annotations

import argparse
import sys

from ..runs.logs import given
from ._extra import check_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=given, help="YAML file, as in examples/configs")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings other than the file's, read as YAML"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument(
        "--allow-changed", action="store_true", help="with --resume, also with settings that change results"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything but weights, print the settings and estimated memory"
    )


def run(options: argparse.Namespace) -> int:
    try:
        check_extra()
        import torch
        from accelerate import PartialState

        from ..trainer.recipe import PreparedRun, Recipe

        recipe = Recipe.from_yaml(options.config, options.overrides)
        prepared = PreparedRun.of(
            recipe, resume=options.resume, allow_changed=options.allow_changed, devices=not options.dry_run
        )
    except (ValueError, TypeError) as error:
        options.parser.error(str(error))
    if options.dry_run:
        import yaml

        from ..trainer.recipe.rehearsal import describe

        print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), end="")
        print(describe(recipe, prepared.plan))
        if prepared.note is not None:
            print(f"note: {prepared.note}")
        return 0
    try:
        history = prepared.train()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues from the newest checkpoint")
        return 130
    except torch.OutOfMemoryError as error:
        print(f"flowdppo train: {error}", file=sys.stderr)
        return 1
    if PartialState().is_main_process:
        folder = recipe.config.run.output_dir
        print(f"{folder}: iteration {len(history)}; flowdppo sample and flowdppo export read it")
    return 0
