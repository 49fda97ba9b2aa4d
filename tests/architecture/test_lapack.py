"""Who calls LAPACK, which crashes on numbers that are not finite on some processors, is known and spares it them."""

from __future__ import annotations

import re

from test_structure import ROOT

# file and function; each has a test in which numbers that are not finite do not get there
CALLERS = {("judges.py", "svd"), ("measures.py", "eigvals")}
# what torch and numpy compute themselves
HARMLESS = {"norm", "vector_norm", "vecdot", "cross", "multi_dot", "diagonal"}


def test_every_caller_of_lapack_is_known():
    found = set()
    for folder in ("flowdppo_fast", "bench", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = re.findall(
                r"\blinalg\.(\w+)|\b(?:torch|scipy)\.(svd\w*|pca_lowrank|lstsq|qr|lu\w*)\(", path.read_text()
            )
            found |= {(path.name, own or other) for own, other in calls if (own or other) not in HARMLESS}
    assert found == CALLERS, "guard it, test that, and name it here"
