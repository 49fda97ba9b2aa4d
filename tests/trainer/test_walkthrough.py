"""The page that walks through one iteration: its code runs, and its table is what the shapes say."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "one_iteration.md").read_text()


def test_the_code_of_the_page_runs_in_order(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "digits"))
    torch.set_num_threads(1)
    namespace: dict = {"__name__": "one_iteration"}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    for number, body in enumerate(blocks):
        exec(compile(body, f"one_iteration.md[{number}]", "exec"), namespace)


def test_the_table_of_shapes():
    rows = re.findall(r"^\| [^|]+ \| \[([\d, ]+)\] \| ([\d,]+) \| ([\d.]+) (KiB|MiB) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for latent, elements, size, unit in rows:
        count = math.prod(int(part) for part in latent.split(","))
        assert count == int(elements.replace(",", ""))
        # the large one is rounded
        assert 2 * count / 2 ** (10 if unit == "KiB" else 20) == pytest.approx(float(size), rel=1e-3)
