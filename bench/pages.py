"""Generated blocks of README.md and docs/: each stands between two marks, and a check compares it with its source."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class PageError(Exception):
    """A page that has no place for a block, or whose block is not the generated one."""


def place(page: Path, name: str, content: str, *, check: bool) -> bool:
    """Writes ``content`` between the markers of block ``name`` in ``page``.

    Args:
        check: change nothing; raise if the block differs.

    Returns:
        Whether the page was changed.

    Raises:
        PageError: page or marker missing, or (``check``) the block differs.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if not page.exists():
        raise PageError(f"{page.name}: no such file; it must hold the lines {begin} and {end}")
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise PageError(
            f"{page.name}: expected one line {begin} and below it one line {end}, around the generated block"
        )
    before, rest = text.split(begin)
    old, after = rest.split(end)
    new = f"\n\n{content.strip()}\n\n"
    if old == new:
        return False
    if check:
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), "in the page", "generated", lineterm="", n=1)
        raise PageError(f"{page.name}: block {name!r} is not the generated one:\n" + "\n".join(diff))
    page.write_text(before + begin + new + end + after)
    return True


def put(page: Path, name: str, content: str, *, check: bool, program: str) -> int:
    """:func:`place` for a command line: says what happened; returns the exit status."""
    try:
        changed = place(page, name, content, check=check)
    except PageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    print(f"{page}: block {name!r} {'written' if changed else 'is up to date'}")
    return 0


def shown(folder: Path) -> str:
    """A result folder as a page names it: from the repository's root, or by its name alone where it is elsewhere."""
    resolved = folder.resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else folder.name
