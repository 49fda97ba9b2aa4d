"""Imports run one way, from the mathematics to the command line, and no file grows past what can be read in one go."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flowdppo_fast"
# bottom to top: a module imports from its own layer and those below it
LAYERS = {
    "mathematics": (
        "rules", "objectives", "epilogue", "layout", "rows", "noise", "samplers", "schedule", "step_arguments",
        "results", "evidence",
    ),
    "reference": ("reference",),
    "backends": ("ops", "kernels", "backend"),
    "autograd": ("autograd",),
    "public losses": ("loss_call", "losses", "loss_module", "matching", "sampling"),
    "front door": ("",),
    "users of the losses": ("integrations", "runs"),
    "settings": (
        "trainer.ambient", "trainer.callables", "trainer.config", "trainer.engine_settings", "trainer.levers",
        "trainer.objective", "trainer.prompts", "trainer.seeds", "trainer.settings",
    ),
    "wings of the trainer": ("trainer.record", "trainer.weights", "trainer.rewards"),
    "its loop": (
        "trainer.advantages", "trainer.checkpoint", "trainer.engines", "trainer.evaluation", "trainer.metrics",
        "trainer.mismatch", "trainer.pipeline_calls", "trainer.resume", "trainer.rollout", "trainer.row_plan",
        "trainer.run_folder", "trainer.trainer",
    ),
    "a run as a file": ("trainer.recipe", "trainer.export"),
    "its front door": ("trainer",),
    "command line": ("cli",),
}  # fmt: skip
# parts that know nothing of each other though their layers would let them
STRANGERS = [
    {"integrations", "runs"}, {"integrations", "trainer"}, {"trainer.record", "trainer.weights"},
    {"trainer.record", "trainer.rewards"}, {"trainer.weights", "trainer.rewards"}, {"runs", "trainer.record"},
    {"runs", "trainer.weights"}, {"runs", "trainer.rewards"}, {"runs", "trainer.recipe"},
]  # fmt: skip
# one place to read a whole kernel, oracle or convention; anything longer says here why
LONGEST = 500
LONG_FOR_A_REASON: dict[str, str] = {}
CODE = (".py", ".h", ".cpp", ".cu", ".cuh")


def modules() -> dict[str, Path]:
    """Files of the installed package by dotted name; Triton's kernels are mapped into it."""
    found = {}
    for folder, name in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels" / "triton", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str, path: Path) -> set[str]:
    """Modules of the package that ``path`` imports: at its top, in a function, or for annotations alone."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found


IMPORTS = {name: imported(name, path) for name, path in MODULES.items()}


PARTS = {part: layer for layer, parts in enumerate(LAYERS.values()) for part in parts}


def part_of(module: str) -> str:
    """The smallest part that holds ``module``; ``trainer`` by itself is its ``__init__``."""
    name = module.partition(".")[2]
    return name if name in PARTS or name.rpartition(".")[0] in ("", "trainer") else name.rpartition(".")[0]


def layer_of(module: str) -> int:
    return PARTS[part_of(module)]


def within(part: str, other: str) -> bool:
    return f"{part}.".startswith(f"{other}.")


def test_every_module_has_a_layer():
    assert {part_of(module) for module in MODULES} == PARTS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    for other in IMPORTS[module] & MODULES.keys():
        assert layer_of(other) <= layer_of(module), f"{module} imports {other} from a layer above"
        for one, two in STRANGERS:
            pairs = ((part_of(module), part_of(other)), (part_of(other), part_of(module)))
            assert not any(within(a, one) and within(b, two) for a, b in pairs), f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_the_package_needs_nothing_of_the_repository_around_it(module):
    around = {"bench", "tests", "examples", "kernels"}
    assert not {name.split(".")[0] for name in IMPORTS[module]} & around


def test_no_circles():
    # a package's __init__ only gathers names: what is imported through it is the module itself
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module in done:
            return
        for other in sorted(IMPORTS[module] & MODULES.keys()):
            visit(other, (*way, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / "cuda").iterdir()), ids=lambda path: path.name)
def test_cuda_kernels_know_no_framework(path):
    assert not re.search(r'#include\s*[<"](torch|ATen|c10|pybind11)', path.read_text())


def test_files_can_be_read_in_one_go():
    folders = (PACKAGE, "kernels", "csrc", "bench", "tests", "examples")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in CODE]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    long = {name for name, lines in lengths.items() if lines > LONGEST}
    assert long == set(LONG_FOR_A_REASON), {name: lengths.get(name) for name in long ^ set(LONG_FOR_A_REASON)}
