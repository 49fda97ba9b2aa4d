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
        "objectives", "layout", "rows", "noise", "samplers", "schedule", "step_arguments", "results", "row_data",
        "evidence",
    ),
    "reference": ("reference",),
    "backends": ("ops", "kernels", "backend"),
    "autograd": ("autograd",),
    "public losses": ("loss_call", "losses", "loss_module", "sampling"),
    "front door": ("",),
    "style of figures": ("figures",),
    "users of the losses": ("integrations", "trainer", "diagnose"),
    "command line": ("cli",),
}  # fmt: skip
# neighbours in one layer that know nothing of each other
STRANGERS = {("integrations", "trainer"), ("trainer", "integrations"), ("trainer", "diagnose"), ("diagnose", "trainer")}
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
    """Modules of the package that ``path`` imports when it runs, at its top or in a function."""
    tree = ast.parse(path.read_text())
    only_checked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if id(node) in only_checked:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found


IMPORTS = {name: imported(name, path) for name, path in MODULES.items()}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def layer_of(module: str) -> int:
    (layer,) = [place for place, parts in enumerate(LAYERS.values()) if part_of(module) in parts]
    return layer


def test_every_module_has_a_layer():
    known = {part for parts in LAYERS.values() for part in parts}
    assert {part_of(module) for module in MODULES} == known


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    for other in IMPORTS[module] & MODULES.keys():
        assert layer_of(other) <= layer_of(module), f"{module} imports {other} from a layer above"
        assert (part_of(module), part_of(other)) not in STRANGERS, f"{module} imports {other}"


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
