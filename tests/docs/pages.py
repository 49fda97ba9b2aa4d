"""The pages of the documentation as tests see them: blocks, commands, headings and links.

A block that cannot run here has a comment in the line before it, ``<!-- not run: needs ... -->``, with what it needs;
the site shows it under the block, and its test is skipped with that reason.
"""

from __future__ import annotations

import itertools
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "examples").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])
LANGUAGES = {
    "", "bash", "console", "cpp", "diff", "ini", "json", "make", "markdown", "python", "sh", "text", "toml", "yaml",
}  # fmt: skip
SHELL = ("bash", "sh")

_FENCE = re.compile(
    r"^(?:[ ]*<!-- not run: (?P<reason>.+?) -->\n)?(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n"
    r"(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_OURS = r"(?:[A-Z_]+=\S+ )*(?:flowdppo|make|python|bench/gpu\.sh) "
# commands of this project that prose names between backticks
_SPAN = re.compile(rf"`({_OURS}[^`]+)`")
COMMAND_LINE = re.compile(rf"^{_OURS}", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line, ``reason`` why it is not run, None if it is."""

    page: str
    line: int
    language: str
    body: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _commands(line: str) -> list[list[str]]:
    """The commands of a line of shell, each split into its words."""
    words = shlex.split(line, comments=True)
    ends = [-1, *(place for place, word in enumerate(words) if word in ("&&", "||", "|", ";")), len(words)]
    return [part for begin, end in itertools.pairwise(ends) if (part := words[begin + 1 : end])]


@dataclass(frozen=True)
class Page:
    """A page, named by its path from the root of the repository."""

    path: Path
    text: str

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    def blocks(self, *languages: str) -> list[Block]:
        """Fenced blocks in one of ``languages``, or all of them."""
        return [
            Block(
                str(self),
                self.text.count("\n", 0, found.start("body")) + 1,
                found["language"],
                textwrap.dedent(found["body"]),
                found["reason"],
            )
            for found in _FENCE.finditer(self.text)
            if not languages or found["language"] in languages
        ]

    @property
    def prose(self) -> str:
        """The text without fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def sentences(self) -> str:
        """The prose without tables, code spans, formulas, comments and the names of API pages."""
        text = re.sub(
            r"<!--.*?-->|^::: [^\n]*(\n    [^\n]*)*|^[ ]*\|[^\n]*$", "", self.prose, flags=re.MULTILINE | re.DOTALL
        )
        return re.sub(r"``.+?``|`[^`]+`|\$\$.+?\$\$|\$[^$\n]+\$", "x", text, flags=re.DOTALL)

    def commands(self) -> list[tuple[str, list[str]]]:
        """Where a command stands, and its words: lines of shell blocks, and commands that prose names."""
        found = []
        for block in self.blocks(*SHELL):
            if block.reason is None:
                lines = block.body.replace("\\\n", " ").splitlines()
                found += [(str(block), words) for line in lines for words in _commands(line)]
        return found + [(str(self), words) for span in _SPAN.findall(self.prose) for words in _commands(span)]

    def anchors(self) -> set[str]:
        """Anchors of the headings, as GitHub and the site make them."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}

    def links(self) -> list[tuple[str, str]]:
        """Target and anchor of links within the repository, images included."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.prose)
        return [tuple(target.partition("#")[::2]) for target in targets if not re.match(r"[a-z]+:", target)]


def load(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"))


ALL = [load(path) for path in PAGES]
