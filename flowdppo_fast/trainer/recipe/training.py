"""From a recipe to a trained run: everything is checked before weights are loaded, and the folder keeps the recipe."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger

from ...samplers import find_sampler
from .. import checkpoint
from ..callables import search_working_directory
from ..resume import may_differ
from ..rewards import Reward, build_rewards
from ..run_folder import CHECKPOINTS, INPUTS_FILE, RECIPE_FILE, FolderLock, check_ours
from ..trainer import FlowDPPOTrainer
from .loading import load_pipeline
from .preflight import PipelinePlan, check_environment, inspect_pipeline
from .recipe import Recipe

logger = get_logger(__name__)

# settings of the pipeline that change no more than rounding of what it computes
_FREE_PIPELINE_SETTINGS = ("attention_backend", "local_files_only", "vae_slicing", "vae_tiling")


@dataclass(frozen=True)
class PreparedRun:
    """A recipe of which everything is known that can be known without weights.

    >>> PreparedRun.of(Recipe.from_yaml("recipe.yaml")).train()  # as `flowdppo train recipe.yaml`

    Attributes:
        recipe: what is trained.
        plan: its pipeline.
        reward: its rewards, whose networks are loaded at first use.
        weights: of the rewards, by name.
        resume: whether the run that the folder holds is continued.
        allow_changed: whether it may be continued with settings that change its results.
        note: why the folder could not be trained in, where that was only looked at.
    """

    recipe: Recipe
    plan: PipelinePlan
    reward: Reward
    weights: dict[str, float]
    resume: bool
    allow_changed: bool = False
    note: str | None = None

    @classmethod
    def of(
        cls, recipe: Recipe, *, resume: bool = False, allow_changed: bool = False, devices: bool = True
    ) -> PreparedRun:
        """Checks files, packages, rewards, the pipeline's configs, and that the output folder may be written to.

        Args:
            recipe: what is to be trained.
            resume: continue the run that the folder holds.
            allow_changed: also with settings that change its results.
            devices: also look for a GPU where one is needed.

        Raises:
            ValueError, TypeError: whatever is missing, does not fit, or cannot be imported.
        """
        check_environment(recipe, devices=devices)
        note = None
        try:
            _check_folder(recipe, resume=resume, allow_changed=allow_changed)
        except ValueError as error:
            if devices:
                raise
            # for a look at a recipe its folder is no trouble
            note = str(error)
        plan = inspect_pipeline(recipe)
        c = recipe.config
        own = ":" in c.sampling.sampler or c.objective.callable is not None
        if own or any("callable" in entry for entry in recipe.rewards):
            search_working_directory()
        # what is named and not there is found out before weights are loaded
        find_sampler(c.sampling.sampler)
        c.objective.build()
        return cls(recipe, plan, *build_rewards(list(recipe.rewards)), resume, allow_changed, note)

    def train(self) -> list[dict[str, float]]:
        """Loads what the recipe names and trains; returns the metrics by iteration."""
        recipe, config = self.recipe, self.recipe.config
        # each process has to be on its own device before quantised weights are put there
        PartialState(cpu=config.run.device == "cpu")
        prompts, evaluation = recipe.load_prompts()
        if not config.advantage.reward_weights:
            advantage = dataclasses.replace(config.advantage, reward_weights=dict(self.weights))
            config = dataclasses.replace(config, advantage=advantage)
        pipeline = load_pipeline(recipe, self.plan)
        trainer = FlowDPPOTrainer(pipeline, self.reward, prompts, config, eval_prompts=evaluation)
        trainer.state.on_begin = functools.partial(_save_recipe, recipe)
        trainer.state.allow_changed, trainer.state.pipeline_settings = self.allow_changed, recipe.pipeline
        return trainer.train(resume=self.resume)


def _check_folder(recipe: Recipe, *, resume: bool, allow_changed: bool) -> None:
    """A run is neither overwritten nor, unless that is allowed, continued with settings that change its results."""
    folder = Path(recipe.config.run.output_dir).expanduser()
    FolderLock(folder).check()
    saved = checkpoint.checkpoints(folder / CHECKPOINTS)
    if not resume and (saved or (folder / "metrics.jsonl").exists()):
        raise ValueError(f"run.output_dir: {folder} holds a run already; --resume continues it (resume=True in Python)")
    check_ours(folder)
    if not (saved and (folder / RECIPE_FILE).is_file()):
        return
    differing = _differing(recipe, folder)
    if differing and not allow_changed:
        raise ValueError(
            f"config: the run in {folder} was started with other {', '.join(differing)}; expected the same, or "
            "--allow-changed (allow_changed=True in Python)"
        )
    if differing:
        logger.warning("the run in %s was started with other %s", folder, ", ".join(differing))


def _differing(recipe: Recipe, folder: Path) -> list[str]:
    """Settings that change results and are other ones than those of the run in ``folder``.

    Files and models are compared by what they hold where both are on this machine, so that a run can move.
    """
    before, now = Recipe.from_yaml(folder / RECIPE_FILE).portable(), recipe.portable()
    read_before, read = json.loads((folder / INPUTS_FILE).read_text()), recipe.inputs()
    both = read.keys() & read_before.keys()
    differing = [
        f"{section}.{key}"
        for section in (section for section in now if section != "rewards")
        for key, value in now[section].items()
        if not (may_differ(section, key) or (section == "pipeline" and key in _FREE_PIPELINE_SETTINGS))
        and f"{section}.{key}" not in both
        and before[section].get(key) != value
    ]
    differing += ["rewards"] * (before["rewards"] != now["rewards"])
    return differing + [f"the contents of {name}" for name in read if name in both and read_before[name] != read[name]]


def _save_recipe(recipe: Recipe, folder: Path) -> None:
    """Leaves the recipe and the digests of its prompt files in the output folder."""
    for name, write in (
        (INPUTS_FILE, lambda path: path.write_text(json.dumps(recipe.inputs(), indent=2) + "\n")),
        (RECIPE_FILE, recipe.save),
    ):
        temporary = folder / f".{name}.writing"
        write(temporary)
        os.replace(temporary, folder / name)
