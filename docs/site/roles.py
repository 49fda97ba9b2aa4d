"""A griffe extension: cross-references in docstrings, written as ``:class:`DPPO```, become links of the site."""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites roles; a name that the site has no page for stays code."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda match: _link(obj, *match.groups()), obj.docstring.value)


def _link(obj: griffe.Object, short: str, target: str) -> str:
    title = target.rsplit(".", 1)[-1] if short else target.lstrip(".")
    return f'<autoref optional identifier="{_path(obj, target)}"><code>{title}</code></autoref>'


def _path(obj: griffe.Object, target: str) -> str:
    """Where ``target`` is, seen from ``obj``: in its class, in its module, or by its full name."""
    scope: griffe.Object | None = obj
    name, _, rest = target.lstrip(".").partition(".")
    while scope is not None:
        if name in scope.members:
            member = scope.members[name]
            path = member.target_path if member.is_alias else member.path
            return f"{path}.{rest}" if rest else path
        scope = scope.parent
    return target.lstrip(".")
