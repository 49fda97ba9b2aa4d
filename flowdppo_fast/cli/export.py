"""``flowdppo export``: trained weights of a run folder as diffusers loads them."""

from __future__ import annotations

import argparse

from ..runs.logs import given
from ._extra import check_extra

DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("diffusers", "kohya")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights of which run; shared with ``sample``."""
    parser.add_argument("run_folder", type=given, metavar="RUN", help="output folder of a run (run.output_dir)")
    parser.add_argument("--iteration", type=int, help="take this checkpoint (default: the newest complete one)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--average", action="store_true", default=None, help="the moving average, if there is one: default"
    )
    kind.add_argument("--no-average", dest="average", action="store_false", help="the weights as they were trained")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("-o", "--output", type=given, required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights (default: float32)")
    parser.add_argument(
        "--fold-alpha",
        action="store_true",
        help="multiply LoRA weights by alpha/rank, for programs that do not read diffusers' metadata",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="diffusers",
        help="names in LoRA files; kohya: those that sd-scripts, musubi-tuner and ComfyUI read (default: diffusers)",
    )


def run(options: argparse.Namespace) -> int:
    try:
        check_extra()
        import torch

        from ..trainer.recipe.export import SavedRun, export_run

        saved = SavedRun.open(options.run_folder, iteration=options.iteration, average=options.average)
        written = export_run(
            saved,
            options.output,
            dtype=getattr(torch, options.dtype),
            fold_alpha=options.fold_alpha,
            layout=options.layout,
        )
    except (ValueError, TypeError) as error:
        options.parser.error(str(error))
    print(f"iteration {saved.iteration}, {'moving average' if saved.kind == 'ema' else 'trained weights'}")
    for path in written:
        print(path)
    if saved.config.model.train == "lora":
        print(f"pipeline.load_lora_weights({str(options.output)!r}) loads it")
        for extra in sorted(path.parent.name for path in written if path.parent != options.output):
            folder = str(options.output / extra)
            print(f"pipeline.load_lora_weights({folder!r}, load_into_{extra}=True) loads the one of {extra}")
    return 0
