"""What the site's own code does to a page; the build itself is `make docs`."""

from __future__ import annotations

import html
import importlib.util
import logging
import re
from types import ModuleType, SimpleNamespace

import pytest

from .pages import ROOT


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


def page(name: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "docs" / name), src_path=name))


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        ("[the file](../Makefile)", "the file (`Makefile`)"),
        ("[`digits.yaml`](../examples/configs/digits.yaml#L3)", "`examples/configs/digits.yaml`"),
        ("[a](./memory.md), [b](rewards.md#security)", "[a](./memory.md), [b](rewards.md#security)"),
        ("![plot](../bench/plot.png)", "![plot](../bench/plot.png)"),
    ],
)  # fmt: skip
def test_links_out_of_the_pages_become_paths(markdown, shown, caplog):
    assert hooks.on_page_markdown(markdown, page("training.md"), None, None) == shown
    assert not caplog.records


def test_a_link_to_nothing_is_a_warning(caplog):
    hooks.on_page_markdown("[file](../nothing.py)", page("training.md"), None, None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].name.startswith("mkdocs.")


def test_a_block_that_is_not_run_says_so():
    shown = hooks.on_page_markdown("<!-- not run: needs a GPU -->\n```python\nx\n```\n", page("a.md"), None, None)
    assert shown == '```python\nx\n```\n\n<p class="not-run">Not run by the tests: needs a GPU.</p>\n'


@pytest.mark.parametrize(
    ("built", "word"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "fetches"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "fetches"),
        ("<article><p>a\n| b |\n|---|</p></article>", "markup"),
        ("<article><p>a list:\n- one</p></article>", "markup"),
        ("<article><p>[text](page.md)</p></article>", "markup"),
        ("<article><p>$x$s</p></article>", "markup"),
    ],
)
def test_what_a_built_page_may_not_have(built, word, caplog):
    assert hooks.on_post_page(built, page("a.md"), None) == built
    assert word in caplog.text


def test_what_a_built_page_may_have(caplog):
    built = '<a href="https://arxiv.org"></a><img src="a.svg"><article><pre>- one\n|---|</pre><li>one</li></article>'
    hooks.on_post_page(built, page("a.md"), None)
    assert not caplog.records


def test_formulas_become_mathml(caplog):
    pytest.importorskip("latex2mathml", reason="formulas are drawn with latex2mathml")
    content = r"""<span class="arithmatex">\(x' &lt; \frac{a}{b}\)</span><div class="arithmatex">\[y\]</div>"""
    shown = hooks.on_page_content(content, page("a.md"), None, None)
    assert html.unescape(re.sub(r"<[^>]+>", "", shown)) == "x\N{PRIME}<aby"
    assert [shown.count(part) for part in ("<mfrac>", 'display="block"', "<msup>", "arithmatex")] == [1, 1, 0, 0]
    assert not caplog.records
    hooks.on_page_content(r'<span class="arithmatex">\(\nosuchthing{x}\)</span>', page("a.md"), None, None)
    assert "cannot be drawn" in caplog.text


def test_roles_become_links():
    griffe = pytest.importorskip("griffe", reason="cross-references are those of griffe")
    roles = load("roles")
    source = '''
class Other:
    """Text."""

class This:
    """See :class:`Other`, :meth:`go`, :func:`~.elsewhere.name` and ``code``."""

    def go(self):
        """As :class:`~package.Other`."""
'''
    with griffe.temporary_visited_module(source, module_name="package") as module:
        for obj in (module["This"], module["This.go"]):
            roles.Roles().on_object(obj=obj)
        assert module["This"].docstring.value == (
            'See <autoref optional identifier="package.Other"><code>Other</code></autoref>, '
            '<autoref optional identifier="package.This.go"><code>go</code></autoref>, '
            '<autoref optional identifier="elsewhere.name"><code>name</code></autoref> and ``code``.'
        )
        assert 'identifier="package.Other"><code>Other<' in module["This.go"].docstring.value
