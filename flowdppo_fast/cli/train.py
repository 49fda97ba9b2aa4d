"""``flowdppo train``: fine-tunes a pipeline by a recipe; what is wrong with it is said before weights are loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._require import require_trainer

if TYPE_CHECKING:
    from ..trainer.recipe.preflight import PipelinePlan
    from ..trainer.recipe.recipe import Recipe

INPUTS_FILE = "inputs.json"
# settings of the pipeline that do not change what it computes
_FREE_PIPELINE_SETTINGS = ("local_files_only",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file, as in examples/configs")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings other than the file's, read as YAML"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything but weights, print the settings and estimated memory"
    )


def run(options: argparse.Namespace) -> int:
    try:
        require_trainer()
        from ..trainer.recipe.preflight import check_environment, describe, inspect_pipeline
        from ..trainer.recipe.recipe import Recipe

        recipe = Recipe.from_yaml(options.config, options.overrides)
        check_environment(recipe, devices=not options.dry_run)
        check_folder(recipe, resume=options.resume)
        plan = inspect_pipeline(recipe)
        reward, weights = make_rewards(recipe)
    except (ValueError, TypeError) as error:
        options.parser.error(str(error))
    if options.dry_run:
        import yaml

        print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), end="")
        print(describe(recipe, plan))
        return 0
    try:
        train(recipe, plan, reward, weights, resume=options.resume)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues from the newest checkpoint")
        return 130
    return 0


def train(
    recipe: Recipe, plan: PipelinePlan, reward: Any, weights: dict[str, float], *, resume: bool
) -> list[dict[str, Any]]:
    """Loads what ``recipe`` names and trains; returns the metrics by iteration."""
    from accelerate import PartialState

    from ..trainer import FlowDPPOTrainer
    from ..trainer.recipe.loading import load_pipeline

    # each process has to be on its own device before quantised weights are put there
    state = PartialState(cpu=recipe.config.run.device == "cpu")
    prompts, evaluation = recipe.load_prompts()
    config = recipe.config
    if not config.advantage.reward_weights:
        advantage = dataclasses.replace(config.advantage, reward_weights=dict(weights))
        config = dataclasses.replace(config, advantage=advantage)
    pipeline = load_pipeline(recipe, plan)
    trainer = FlowDPPOTrainer(pipeline, reward, prompts, config, eval_prompts=evaluation)
    if state.is_main_process:
        save_recipe(recipe)
    history = trainer.train(resume=resume)
    if state.is_main_process:
        print(f"{config.run.output_dir}: iteration {len(history)}; flowdppo sample and flowdppo export read it")
    return history


def make_rewards(recipe: Recipe) -> tuple[Any, dict[str, float]]:
    """The rewards, whose networks are loaded at first use, and the weight of each by name.

    Raises:
        ValueError, TypeError: an unknown reward or option, or a callable that cannot be imported.
    """
    from ..trainer.recipe.recipe import search_working_directory
    from ..trainer.rewards import build_rewards

    if any("callable" in entry for entry in recipe.rewards):
        search_working_directory()
    return build_rewards(list(recipe.rewards))


def check_folder(recipe: Recipe, *, resume: bool) -> None:
    """Looks at the output folder: a run is neither overwritten nor continued with other settings.

    Raises:
        ValueError: it holds a run and ``resume`` is False, or a run of another recipe.
    """
    from ..trainer.checkpoint import checkpoints
    from ..trainer.recipe.export import RECIPE_FILE
    from ..trainer.recipe.recipe import Recipe
    from ..trainer.resume import FREE_SETTINGS

    folder = Path(recipe.config.run.output_dir)
    saved = checkpoints(folder / "checkpoints")
    if not resume and (saved or (folder / "metrics.jsonl").exists()):
        raise ValueError(f"run.output_dir: {folder} holds a run already; --resume continues it")
    if not (saved and (folder / RECIPE_FILE).is_file()):
        return
    before, now = Recipe.from_yaml(folder / RECIPE_FILE).portable(), recipe.portable()
    free = {"run": FREE_SETTINGS, "pipeline": _FREE_PIPELINE_SETTINGS}
    differing = [
        f"{section}.{key}"
        for section in (section for section in now if section != "rewards")
        for key, value in now[section].items()
        if key not in free.get(section, ()) and before[section].get(key) != value
    ]
    differing += ["rewards"] * (before["rewards"] != now["rewards"])
    read_before = json.loads((folder / INPUTS_FILE).read_text())
    differing += [f"the contents of {name}" for name, digest in recipe.inputs().items() if read_before[name] != digest]
    if differing:
        raise ValueError(
            f"config: the run in {folder} was started with other {', '.join(differing)}; expected the same"
        )


def save_recipe(recipe: Recipe) -> None:
    """Leaves the recipe and the digests of its prompt files in the output folder."""
    from ..trainer.recipe.export import RECIPE_FILE

    folder = Path(recipe.config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (INPUTS_FILE, lambda path: path.write_text(json.dumps(recipe.inputs(), indent=2) + "\n")),
        (RECIPE_FILE, recipe.save),
    ):
        temporary = folder / f".{name}.writing"
        write(temporary)
        os.replace(temporary, folder / name)
