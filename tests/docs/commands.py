"""Checks a command line of the documentation without running what it starts: the program's own parser reads it."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import tomllib

from .pages import ROOT

OURS = ("bench", "examples", "flowdppo_fast", "tests")
# what the project does not bring, so that nothing here knows its options
OUTSIDE = {
    "apt-get", "cat", "cd", "clang-format", "cmake", "cp", "cuobjdump", "curl", "docker", "export", "gh", "git",
    "grep", "ls", "mkdir", "mypy", "ncu", "nsys", "nvcc", "nvidia-smi", "rm", "ruff", "sha256sum", "source", "tar",
    "tee", "tensorboard", "twine", "unzip", "wandb",
}  # fmt: skip


class Parsed(Exception):
    """A program's parser has accepted the command."""


def check(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Fails with what is wrong with the command."""
    words = [_plain(word) for word in words]
    while words and re.fullmatch(r"\w+=.*", words[0]):
        _check_variable(words.pop(0).partition("=")[0])
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program in ("python", "python3"):
        _check_python(arguments, patch)
    elif program in _CHECKS:
        _CHECKS[program](arguments, patch)
    elif program.endswith(".sh"):
        _check_script(program, arguments)
    else:
        assert program in OUTSIDE, f"{program}: not a program of this project, nor one in tests/docs/commands.py"


def _plain(word: str) -> str:
    """A word of a synopsis: options in brackets are there, dots repeat."""
    if word.startswith("[-") or (word.endswith("]") and "[" not in word):
        word = word.strip("[]")
    return word.removesuffix("...")


def _check_variable(name: str) -> None:
    if name.startswith("FLOWDPPO_"):
        # nobody reads a variable of a misspelt name
        sources = ["flowdppo_fast", "setup.py", "tests", "bench", "csrc", "kernels"]
        found = subprocess.run(["grep", "-rqw", "--include=*.py", "--include=*.cpp", name, *sources], cwd=ROOT)
        assert found.returncode == 0, f"{name}: nothing reads that variable"


def _check_flowdppo(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    from flowdppo_fast import cli

    assert arguments[0] in cli.COMMANDS, f"flowdppo {arguments[0]}: no such command"
    # prose names a command without what it needs
    if len(arguments) == 1:
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(cli.COMMANDS[arguments[0]][0]).add_arguments(parser)
    for action in parser._actions:
        # prose leaves out what does not matter there
        action.required = action.required and not action.option_strings
    options, rest = parser.parse_known_args(arguments[1:])
    # settings after an option are settings as well
    assert all("=" in word and word[0] != "-" for word in rest), f"{rest}: no such arguments"
    if arguments[0] == "train" and "/" in str(options.config):
        from flowdppo_fast.trainer.recipe import Recipe

        recipe = Recipe.from_yaml(ROOT / options.config, [*options.overrides, *rest])
        assert all((ROOT / path).is_file() for path in recipe.prompt_files().values())


def _check_make(targets: list[str], patch: pytest.MonkeyPatch) -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in targets:
        assert "=" in target or target in known, f"make {target}: no such target"


def _check_pip(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extras in re.findall(r"(\S*?)\[([\w,]+)\]", " ".join(arguments)):
        if package in (project["name"], "."):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), f"{extras}: no such extra"


def _check_script(script: str, arguments: list[str]) -> None:
    text = (ROOT / script).read_text()
    for option in (word for word in arguments if word.startswith("-")):
        assert re.search(rf"{option}\b", text), f"{script} has no {option}"


def _check_accelerate(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    options = launch_command_parser().parse_args(arguments[1:])
    if options.config_file:
        assert (ROOT / options.config_file).is_file(), options.config_file
    if options.module:
        assert options.training_script == "flowdppo_fast.cli"
        _check_flowdppo(options.training_script_args, patch)
    # a script of the reader's own has no folder
    elif "/" in options.training_script:
        _check_python([options.training_script, *options.training_script_args], patch)


def _check_python(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-c":
        ast.parse(arguments[1])
    elif arguments[0] != "-m":
        _check_arguments(ROOT / arguments[0], arguments[1:], patch, run=runpy.run_path, name=str(ROOT / arguments[0]))
    elif arguments[1] == "flowdppo_fast.cli":
        _check_flowdppo(arguments[2:], patch)
    elif arguments[1] == "pip":
        _check_pip(arguments[2:], patch)
    elif arguments[1] == "pytest":
        _check_pytest(arguments[2:], patch)
    elif arguments[1].partition(".")[0] in OURS:
        place = ROOT / arguments[1].replace(".", "/")
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        _check_arguments(file, arguments[2:], patch, run=runpy.run_module, name=arguments[1])


def _check_pytest(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    for word in arguments:
        place = word.partition("::")[0]
        assert "/" not in place or (ROOT / place).exists(), f"{place}: no such test"


def _check_arguments(file: Path, arguments: list[str], patch: pytest.MonkeyPatch, *, run, name: str) -> None:
    """Lets a script come as far as its parser, if it has one; else its options must at least occur in it."""
    assert file.is_file(), f"{file}: no such file"
    source = file.read_text()
    if not arguments or "ArgumentParser" not in source:
        for option in (word for word in arguments if word.startswith("-")):
            assert f'"{option}"' in source, f"{file} has no {option}"
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, given=None, namespace=None) -> NoReturn:
        parse(parser, given, namespace)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(sys, "argv", [str(file), *arguments])
    # as python does for a script
    patch.syspath_prepend(str(file.parent if run is runpy.run_path else ROOT))
    # scripts of several examples have helpers of one name
    for helper in file.parent.glob("*.py"):
        patch.delitem(sys.modules, helper.stem, raising=False)
    # runpy warns of modules that are imported already
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning), pytest.raises(Parsed):
        run(name, run_name="__main__")


_CHECKS = {
    "accelerate": _check_accelerate,
    "flowdppo": _check_flowdppo,
    "make": _check_make,
    "pip": _check_pip,
    "pytest": _check_pytest,
}
