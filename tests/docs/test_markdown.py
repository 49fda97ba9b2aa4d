"""What can be said of the pages from their text alone, without the package, its dependencies or the site."""

from __future__ import annotations

import re

import pytest
import yaml

from .pages import ALL, ROOT, load

DOCS = ROOT / "docs"
EACH = [pytest.param(page, id=str(page)) for page in ALL]


@pytest.mark.parametrize("page", EACH)
def test_no_semicolon_joins_two_claims(page):
    found = [" ".join(text.split()) for text in re.findall(r"[^\n]*\n?[^\n]*;[^\n]*", page.sentences)]
    assert not found, f"{page}: one claim per sentence"


@pytest.mark.parametrize("page", EACH)
def test_links_lead_somewhere(page):
    for target, anchor in page.links():
        linked = (page.path.parent / target).resolve() if target else page.path
        assert linked.exists(), f"{page} links to {target}"
        assert linked.is_relative_to(ROOT), f"{page} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in load(linked).anchors(), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", EACH)
def test_every_renderer_reads_the_page_alike(page):
    assert wrong_markup(page.prose) == []


@pytest.mark.parametrize(
    ("prose", "said"),
    [
        ("A list:\n- one\n", "a list"),
        ("Steps:\n1. one\n", "a list"),
        ("A table:\n| a |\n|---|\n", "a table"),
        ("<details>\n<summary>x</summary>\n", "markdown"),
        ("![plot](https://elsewhere.example/plot.png)", "another host"),
        ("It costs $x, and $y.", "a dollar"),
        ("$ x $ is no formula", "a dollar"),
        ("$x$s is none", "a dollar"),
        (r"$\operatorname{mean}(x)$", "operatorname"),
        (r"$a\,x$", "GitHub refuses"),
    ],
)
def test_what_is_read_otherwise_somewhere(prose, said):
    assert len(wrong_markup(prose)) == 1
    assert said in wrong_markup(prose)[0]


def test_what_is_read_alike_everywhere():
    assert not wrong_markup(
        "# A\n- one\n  - two\n\n1. x\n   y\n\n| a |\n|---|\n\n<!-- b -->\n| a |\n\n$x'$, $-dt$ ($y$)\n"
    )


_ITEM, _ROW = re.compile(r"\s*([-*]|\d+\.) "), re.compile(r"\s*\|")


def wrong_markup(prose: str) -> list[str]:
    """What GitHub and python-markdown read differently, or one of them not at all."""
    found = []
    for first, *rest in (run.strip("\n").split("\n") for run in re.split(r"\n\s*\n", prose)):
        for form, name in ((_ITEM, "list"), (_ROW, "table")):
            if not form.match(first) and not first.startswith(("#", "<!--")) and any(map(form.match, rest)):
                found.append(f"a {name} begins without an empty line: {first}")
    if re.search(r'<details(?! markdown="1")', prose):
        found.append('markdown inside <details> needs markdown="1"')
    if re.search(r'(?:!\[[^\]]*\]\(|<img[^>]* src=")(?:https?:)?//', prose):
        found.append("a picture of another host")
    text = re.sub(r"``.+?``|`[^`]+`", "", prose, flags=re.DOTALL)
    formula = re.compile(r"^\$\$\n.+?\n\$\$$|(?<![\w\\])\$(?! )[^$\n]+(?<! )\$(?!\w)", re.MULTILINE | re.DOTALL)
    for match in formula.finditer(text):
        # markdown takes a backslash before punctuation for its own
        found += [
            f"GitHub refuses {wrong} in {match[0]}" for wrong in re.findall(r"\\operatorname|\\[^A-Za-z]", match[0])
        ]
    text = formula.sub("", text)
    found += [f"a dollar that ends no formula: {line}" for line in text.splitlines() if "$" in line]
    return found


def test_every_page_is_in_the_navigation_once():
    """Pages for contributors are reached from the page on contributing."""
    text = (ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    listed = list(_leaves(nav))
    assert sorted(listed) == sorted(page for page in pages if not page.startswith("contributing/"))
    linked = {target for target, _ in load(DOCS / "contributing.md").links()}
    assert {page for page in pages if page.startswith("contributing/")} <= linked


def _leaves(nav):
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _leaves(entry)
