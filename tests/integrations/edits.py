"""The edits that ``docs/integrations`` shows, read from its pages and made on a script.

A block starts with ``--- file ...``. Its hunks are separated by ``@@`` lines and are diffs in which ``...`` stands for
the rest of a line, or alone on a line for any number of lines. Where a hunk fits in several places the last is meant.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGES = Path(__file__).parents[2] / "docs" / "integrations"


class Block(NamedTuple):
    files: list[str]
    hunks: list[list[tuple[str, str]]]


class Edited(NamedTuple):
    text: str
    added: int
    removed: int


def blocks(page: str) -> list[Block]:
    """The edit blocks of a page of ``docs/integrations``."""
    found = []
    for body in re.findall(r"^```diff\n(--- .*?)^```$", (PAGES / page).read_text(), flags=re.M | re.S):
        first, *lines = body.splitlines()
        hunks: list[list[tuple[str, str]]] = [[]]
        for line in lines:
            if line.startswith("@@"):
                hunks.append([])
            else:
                hunks[-1].append((line[:1] or " ", line[1:]))
        found.append(Block(first.split()[1:], [hunk for hunk in hunks if hunk]))
    return found


def block_of(page: str, file: str) -> Block:
    """The one block of ``page`` that is about ``file``."""
    (found,) = (block for block in blocks(page) if file in block.files)
    return found


def apply(text: str, block: Block) -> Edited:
    """``text`` with the hunks of ``block`` made in it.

    Raises:
        LookupError: a hunk that fits nowhere.
    """
    added = removed = 0
    for hunk in block.hunks:
        text, more, fewer = _apply(text, hunk)
        added, removed = added + more, removed + fewer
    return Edited(text, added, removed)


def _apply(text: str, hunk: list[tuple[str, str]]) -> tuple[str, int, int]:
    there = [(mark, line) for mark, line in hunk if mark != "+"]
    pattern = re.compile("".join(_line_pattern(line) for _, line in there))
    starts = [match.start() for match in re.finditer(r"^", text, flags=re.M)]
    match = next((m for m in (pattern.match(text, start) for start in reversed(starts)) if m), None)
    if match is None:
        raise LookupError("no place for the hunk\n" + "\n".join(mark + line for mark, line in hunk))
    source = list(match.groups())
    anchors = [_indent(s) - _indent(line) for s, (_, line) in zip(source, there) if line.strip() != "..."]
    made, seen, added, removed = [], 0, 0, 0
    matched = iter(zip(source, there))
    for mark, line in hunk:
        if mark == "+":
            shift = anchors[max(seen - 1, 0)]
            made.append(" " * (_indent(line) + shift) + line.strip() + "\n")
            added += 1
            continue
        original, (_, pattern_line) = next(matched)
        seen += pattern_line.strip() != "..."
        if mark == " ":
            made.append(original)
        else:
            removed += original.count("\n")
    return text[: match.start()] + "".join(made) + text[match.end() :], added, removed


def _line_pattern(line: str) -> str:
    if line.strip() == "...":
        return r"((?:.*\n)*?)"
    return r"([ \t]*" + re.escape(line.strip()).replace(r"\.\.\.", ".*") + r"[ \t]*\n)"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
