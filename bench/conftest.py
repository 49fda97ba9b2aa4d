"""``pytest bench/``: the CPU part of the op benchmark under pytest-benchmark."""

from __future__ import annotations

import pytest

from bench.ops import threads

try:
    threads.prepare()
    _UNFIT = None
except RuntimeError as error:
    _UNFIT = str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Benchmarks in a process whose OpenMP threads spin are skipped: they would time the waiting."""
    if _UNFIT is None:
        return
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=_UNFIT))
