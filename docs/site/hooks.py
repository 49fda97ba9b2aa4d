"""What the site shows otherwise than the repository does: links out of ``docs/``, and blocks that no test runs."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
log = logging.getLogger("mkdocs.hooks.flowdppo")

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s#]*)(?:#[^)\s]*)?\)")
_NOT_RUN = re.compile(r"^<!-- not run: (.+?) -->\n(```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Markdown of a page as the site shows it; a link to a file that does not exist is a warning."""
    source = Path(page.file.abs_src_path)

    def outside(match: re.Match) -> str:
        target = (source.parent / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if not target.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_path, match[2])
        # the site has no copy of the sources: the path is what a reader can use
        text, path = match[1], os.path.relpath(target, ROOT)
        return f"`{path}`" if text.strip("`") in (path, match[2], target.name) else f"{text} (`{path}`)"

    markdown = _LINK.sub(outside, markdown)
    return _NOT_RUN.sub(r'\2\n\n<p class="not-run">Not run by the tests: \1.</p>', markdown)
