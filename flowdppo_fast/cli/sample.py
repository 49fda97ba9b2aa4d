"""``flowdppo sample``: images by the trained weights of a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.logs import given
from ._extra import check_extra

if TYPE_CHECKING:
    from ..trainer.recipe.recipe import Recipe
from .export import add_run_arguments

_SUFFIXES = (".png", ".jpg", ".gif")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--n", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next has seed + 1, and so on")
    parser.add_argument("--steps", type=int, help="denoising steps of the ODE (default: as in the run's evaluation)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="argument of the pipeline's call, read as YAML"
    )
    parser.add_argument("--base", action="store_true", help="the model as it was before training, to compare")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the component that is at work")
    parser.add_argument("--device", help="as torch names it (default: a GPU if there is one)")
    parser.add_argument(
        "-o", "--output", type=given, required=True, metavar="FILE",
        help="one image, or a grid of several (.png, .jpg); .gif animates a video; a folder gets a file per image",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    try:
        check_extra()
        if options.n < 1:
            raise ValueError(f"--n: got {options.n}, expected at least 1")
        if options.output.suffix not in (*_SUFFIXES, ""):
            raise ValueError(f"--output: got {options.output}, expected a folder or a file in {', '.join(_SUFFIXES)}")
        arguments = _call_arguments(options.set)
        _check_output(options.output)
        images, captions = _draw(options, arguments)
    except (ValueError, TypeError) as error:
        options.parser.error(str(error))
    for path in _write(images, captions, options.output, options.n):
        print(path)
    return 0


def _check_output(output: Path) -> None:
    from ..trainer.run_folder import CHECKPOINTS, check_elsewhere

    # a picture beside a run's files is nobody's trouble
    folder = output if output.suffix == "" or CHECKPOINTS in output.absolute().parts else None
    if folder is not None:
        check_elsewhere(folder, "--output")


def _constant_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments that all training prompts have in common, such as a negative prompt; none where their file is gone."""
    from ..trainer.prompts import REWARD_KEYS

    try:
        prompts, _ = recipe.load_prompts()
    except ValueError:
        print("flowdppo sample: the run's prompts cannot be read, so arguments that they had in common are left out")
        return {}
    first = prompts[0]
    if isinstance(first, str):
        return {}
    rows = [dict(entry) for entry in prompts if not isinstance(entry, str)]
    keys = [key for key in first if key not in ("prompt", *REWARD_KEYS) and isinstance(first[key], (str, int, float))]
    return {key: first[key] for key in keys if all(row[key] == first[key] for row in rows)}


def _call_arguments(settings: list[str]) -> dict[str, Any]:
    import yaml

    arguments = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"--set: got {setting!r}, expected key=value, as in guidance_scale=4.5")
        arguments[key] = yaml.safe_load(text)
    return arguments


def _draw(options: argparse.Namespace, arguments: dict[str, Any]) -> tuple[list[Any], list[str]]:
    import torch

    from ..trainer.recipe.export import SavedRun, apply_weights, drawing
    from ..trainer.recipe.loading import load_pipeline
    from ..trainer.recipe.preflight import check_environment, inspect_pipeline

    saved = SavedRun.open(options.run_folder, iteration=options.iteration, average=options.average)
    recipe = saved.recipe()
    sampling, evaluation = recipe.config.sampling, recipe.config.evaluation
    constant = _constant_arguments(recipe)
    # files with prompts were for training and may be gone
    recipe.prompts.train, recipe.prompts.eval = options.prompt, None
    check_environment(recipe)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline = load_pipeline(recipe, inspect_pipeline(recipe))
    if not options.base:
        apply_weights(saved, pipeline)
    if options.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        **constant,
        **sampling.pipeline_kwargs,
        **evaluation.pipeline_kwargs,
        "num_inference_steps": options.steps or evaluation.num_steps or sampling.num_steps,
        **arguments,
    }
    images, captions = [], []
    for prompt in options.prompt:
        for seed in range(options.seed, options.seed + options.n):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad(), drawing(saved, pipeline, device):
                drawn = pipeline(prompt=prompt, generator=generator, output_type="pil", return_dict=False, **arguments)[
                    0
                ]
            images.append(drawn[0])
            captions.append(f"{prompt}\nseed {seed}")
    return images, captions


def _write(images: list[Any], captions: list[str], output: Path, columns: int) -> list[Path]:
    from ..runs.grids import frames_of, image_grid

    if output.suffix == "":
        output.mkdir(parents=True, exist_ok=True)
        video = len(frames_of(images[0])) > 1
        paths = [output / f"{position:04d}{'.gif' if video else '.png'}" for position in range(len(images))]
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        paths = [output]
    if len(paths) < len(images):
        image_grid(images, captions, tile=None, columns=columns if columns > 1 else None).save(output)
        return paths
    for path, image in zip(paths, images):
        first, *others = frames_of(image)
        if path.suffix == ".gif":
            first.save(path, save_all=True, append_images=others, duration=1000 // 16, loop=0)
        elif others:
            image_grid([image], captions, tile=None).save(path)
        else:
            first.save(path)
    return paths
