"""The benchmark's tests time and profile, which poisoned memory would blur."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# the benchmark lives beside the package, not in it; last, so that nothing is shadowed
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Overrides the suite's fixture: filling fresh memory would be timed and counted."""


@pytest.fixture(autouse=True)
def thread_count():
    """Runs set torch's thread count; every test leaves it as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process claims quiet OpenMP threads, so that commands run in it; their timings are not looked at."""
    from bench.ops import threads

    for name, value in threads.SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def oracle():
    """Truth for 16 small rows in float32."""
    from bench_support import make_oracle

    return make_oracle()
