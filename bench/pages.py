"""Generated blocks of README.md and docs/, between the marks ``<!-- name -->`` and ``<!-- /name -->``; a check compares
each with its source."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class PageError(Exception):
    """A page that has no place for a block, or whose block is not the generated one."""


def block_of(text: str, name: str, page: str) -> tuple[str, str, str]:
    """``text`` before, in and after block ``name``, the marks belonging to the outer parts.

    Raises:
        PageError: not exactly one pair of marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise PageError(f"{page}: expected one line {begin} and below it one line {end}, around the generated block")
    before, rest = text.split(begin)
    inner, after = rest.split(end)
    return before + begin, inner, end + after


def fill(page: Path, blocks: Mapping[str, str], *, check: bool) -> bool:
    """Writes every block of ``blocks`` into ``page``.

    Args:
        check: change nothing; raise if a block differs.

    Returns:
        Whether the page was changed.

    Raises:
        PageError: page or marks missing, or (``check``) a block differs.
    """
    if not page.exists():
        marks = " and ".join(f"<!-- {name} --> .. <!-- /{name} -->" for name in blocks)
        raise PageError(f"{page.name}: no such file; it must hold the lines {marks}")
    old = new = page.read_text()
    for name, content in blocks.items():
        before, _, after = block_of(new, name, page.name)
        new = f"{before}\n\n{content.strip()}\n\n{after}"
    if old == new:
        return False
    if check:
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), "in the page", "generated", lineterm="", n=1)
        raise PageError(f"{page.name}: what stands there is not what is generated:\n" + "\n".join(diff))
    page.write_text(new)
    return True


def put(page: Path, blocks: Mapping[str, str], *, check: bool, program: str) -> int:
    """:func:`fill` for a command line: says what happened; returns the exit status."""
    try:
        changed = fill(page, blocks, check=check)
    except PageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    print(f"{page}: {', '.join(blocks)} {'written' if changed else 'up to date'}")
    return 0


def shown(folder: Path) -> str:
    """A result folder as a page names it: from the repository's root, or by its name alone where it is elsewhere."""
    resolved = folder.resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else folder.name
