"""The notebook of the digits demo runs in Jupyter and shows its figures; what is committed has no outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "digits" / "demo.ipynb"
SHORT = [
    "run.iterations=4", "run.progress=false", "run.checkpoint_every=4", "optimizer.learning_rate=3e-4",
    "sampling.group_size=8", "optimizer.micro_batch_size=40",
]  # fmt: skip


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_committed_notebook_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    # whatever is longer than a few lines belongs into demo.py
    assert max(len(cell.source.splitlines()) for cell in code) <= 10


@pytest.mark.slow
def test_the_notebook_shows_its_figures_and_what_was_learned(notebook, tmp_path, monkeypatch, learning):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # of this interpreter, whatever kernels are installed
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    settings = next(cell for cell in notebook.cells if "OVERRIDES = " in cell.source)
    overrides = [f"run.output_dir={tmp_path}", f"run.seed={learning.seed}", *SHORT]
    settings.source = re.sub(r"^OVERRIDES = .*$", f"OVERRIDES = {overrides}", settings.source, flags=re.M)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 2
    rewards = eval(outputs[-1].data["text/plain"])
    learning.check(sum(rewards["after"].values()) - sum(rewards["before"].values()), 0.02)
    assert any("trained rows" in output.get("text", "") for output in outputs)
