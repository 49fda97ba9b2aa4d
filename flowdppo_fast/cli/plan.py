"""``flowdppo plan``: what a recipe's run will do and need of a device, before anything is loaded."""

from __future__ import annotations

import argparse
import json

from ..runs.logs import given
from ._extra import check_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=given, help="YAML file, as in examples/configs")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings other than the file's, read as YAML"
    )
    parser.add_argument(
        "--card", type=float, action="append", default=[], metavar="GB",
        help="memory of a device in GB: say what is too large for it and which setting to change next; repeatable",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="numbers for programs")


def run(options: argparse.Namespace) -> int:
    try:
        check_extra()
        from ..trainer.recipe import Recipe
        from ..trainer.recipe.plan import describe_plan, plan_run
        from ..trainer.recipe.preflight import check_environment, inspect_pipeline

        recipe = Recipe.from_yaml(options.config, options.overrides)
        check_environment(recipe, devices=False)
        plan = inspect_pipeline(recipe)
    except (ValueError, TypeError) as error:
        options.parser.error(str(error))
    found = plan_run(recipe, plan)
    if options.json:
        numbers = {name: getattr(found, name) for name in ("trained", "peaks", "calls", "forwards", "trajectory")}
        print(json.dumps({**numbers, "missing": found.missing}))
    else:
        print(describe_plan(recipe, plan, found, options.card))
    return 0
