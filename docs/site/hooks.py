"""What the site shows otherwise than the repository does, and what a page of it may not have.

Links out of ``docs/`` become paths, a block that no test runs says so, and formulas become MathML, which browsers draw
without a script. Warnings fail a strict build.
"""

from __future__ import annotations

import html
import logging
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
log = logging.getLogger("mkdocs.hooks.flowdppo")

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\.?/[^)\s#]*)(?:#[^)\s]*)?\)")
_NOT_RUN = re.compile(r"^<!-- not run: (.+?) -->\n(```.*?^```$)", re.MULTILINE | re.DOTALL)
# as pymdownx.arithmatex marks them
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
_PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>(&#x02032;)</mi></msup>")
_FOREIGN = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"[^>]*>')
# what is left where python-markdown reads a page otherwise than its author meant
_LEFTOVERS = re.compile(r"\|\s*-{3,}|<p>(?:[-*] |\d+\. |#)|\n[-*] |\]\(|:[a-z]+:<code>|^```|\$", re.MULTILINE)


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


def on_page_content(content: str, page, config, files) -> str:
    """HTML of a page with MathML in place of TeX; a command that the converter does not know is a warning."""
    from latex2mathml.converter import convert

    def formula(match: re.Match) -> str:
        shown = convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")
        if "\\" in shown:
            log.warning("%s has a formula that cannot be drawn: %s", page.file.src_path, match[2])
        # fonts for mathematics have the prime raised already
        return _PRIME.sub(r"<mrow>\1<mo>\2</mo></mrow>", shown)

    return _FORMULA.sub(formula, content)


def on_post_page(output: str, page, config) -> str:
    """A page that fetches something from another host, or shows its markup, is a warning."""
    for found in _FOREIGN.findall(output):
        if 'rel="canonical"' not in found:
            log.warning("%s fetches from another host: %s", page.file.src_path, found)
    article = output.partition("<article")[2].partition("</article>")[0]
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "<code></code>", article, flags=re.DOTALL)
    for found in _LEFTOVERS.finditer(prose):
        near = " ".join(prose[max(0, found.start() - 40) : found.end() + 40].split())
        log.warning("%s shows its markup: %s", page.file.src_path, near)
    return output
