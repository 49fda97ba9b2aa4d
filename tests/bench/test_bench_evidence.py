"""Which backend ``auto`` takes for CUDA tensors, from made-up result folders."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from bench_support import ROOT

from bench.ops import evidence
from bench.ops.__main__ import main
from flowdppo_fast import backend as backends
from flowdppo_fast import evidence as committed

GREEN = {"passed": 70, "failed": 0, "error": 0, "skipped": 0}


@pytest.fixture
def folder(tmp_path):
    """Makes a result folder with these test outcomes and these device times (ns) of forward and backward."""
    made = []

    def make(tests, times=None, *, quick=False, dirty=False, unfinished=()):
        path = tmp_path / f"2026-01-0{len(made) + 1}-0123456789"
        path.mkdir()
        made.append(path)
        (path / evidence.TESTS).write_text(json.dumps({"quick": quick, "backends": tests, "unfinished": unfinished}))
        (path / "environment.json").write_text(json.dumps({"git_dirty": dirty}))
        if times is not None:
            (path / "results.json").write_text(json.dumps(times))
        return path

    return make


@pytest.fixture
def timed(monkeypatch):
    """Stands in for the parsing of results: a result is a list of cases, a case the total time by contender."""

    class Record:
        def __init__(self, median):
            self.median = median

        def time(self, part):
            return self

    monkeypatch.setattr(
        evidence.results, "load", lambda path: {"cases": json.loads((path / "results.json").read_text())}
    )
    monkeypatch.setattr(evidence, "by_name", lambda result, case: {name: Record(t) for name, t in case.items()})


def case(cuda, triton):
    return {"cuda/velocity": cuda, "triton/velocity": triton}


def test_nothing_measured_is_triton():
    assert evidence.decide([]) == ({}, ["triton"])


def test_a_green_backend_that_is_faster_comes_first(folder, timed):
    path = folder({"cuda": GREEN, "triton": GREEN}, [case(1.0, 2.0), case(3.0, 2.0)])
    proven, order = evidence.decide([path])
    assert proven == {"cuda": [path.name], "triton": [path.name]}
    assert order == ["cuda", "triton"]


def test_a_green_backend_that_is_slower_comes_second(folder, timed):
    path = folder({"cuda": GREEN, "triton": GREEN}, [case(2.0, 1.0), case(1.0, 1.5)])
    assert evidence.decide([path])[1] == ["triton", "cuda"]


def test_green_and_never_timed_beside_triton_is_enough(folder, timed):
    assert evidence.decide([folder({"cuda": GREEN, "triton": GREEN}, [{"cuda/velocity": 1.0}])])[1][0] == "cuda"
    assert evidence.decide([folder({"cuda": GREEN})])[1][0] == "cuda"


def test_a_slow_backend_beats_one_that_fails(folder, timed):
    path = folder({"cuda": GREEN, "triton": GREEN | {"failed": 1}}, [case(2.0, 1.0)])
    assert evidence.decide([path])[1] == ["cuda", "triton"]


@pytest.mark.parametrize("change", [{"failed": 1}, {"error": 1}, {"skipped": 1}, {"passed": 0}], ids=str)
def test_anything_but_green_is_no_evidence(folder, change):
    proven, order = evidence.decide([folder({"cuda": GREEN | change, "triton": GREEN})])
    assert "cuda" not in proven
    assert order == ["triton"]


def test_a_run_that_was_stopped_is_no_evidence(folder):
    proven, order = evidence.decide([folder({"cuda": GREEN, "triton": GREEN}, unfinished=["cuda"])])
    assert proven.keys() == {"triton"}
    assert order == ["triton"]


def test_one_red_folder_outweighs_a_green_one(folder):
    green, red = folder({"cuda": GREEN}), folder({"cuda": GREEN | {"failed": 2}})
    assert evidence.decide([green])[1] == ["cuda", "triton"]
    assert evidence.decide([green, red])[1] == ["triton"]


@pytest.mark.parametrize(("flag", "reason"), [("quick", "quick run"), ("dirty", "not committed")])
def test_runs_that_are_no_evidence_are_refused(folder, flag, reason):
    with pytest.raises(ValueError, match=reason):
        evidence.decide([folder({"cuda": GREEN}, **{flag: True})])


def test_a_folder_without_tests_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bench/gpu\.sh writes one"):
        evidence.decide([tmp_path])


def test_the_module_is_written_and_checked(folder, tmp_path, monkeypatch):
    # nothing is timed here
    monkeypatch.setattr("bench.ops.threads.prepare", lambda: None)
    page = tmp_path / "evidence.py"
    shutil.copy(ROOT / "flowdppo_fast" / "evidence.py", page)
    path = folder({"cuda": GREEN, "triton": GREEN})
    assert main(["evidence", "--check", "--page", str(page), str(path)]) == 1
    assert main(["evidence", "--page", str(page), str(path)]) == 0
    assert main(["evidence", "--check", "--page", str(page), str(path)]) == 0
    spec = importlib.util.spec_from_file_location("written_evidence", page)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.PASSED
    assert written == dict.fromkeys(("cuda", "triton"), (path.name,))
    assert module.ORDER == ("cuda", "triton")
    # as the linter wants it, with several folders, too
    more = folder({"cuda": GREEN})
    assert main(["evidence", "--page", str(page), str(path), str(more)]) == 0
    if importlib.util.find_spec("ruff") is not None:
        command = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", str(page)]
        assert subprocess.run(command, capture_output=True).returncode == 0, page.read_text()
    # and back to nothing
    assert main(["evidence", "--page", str(page)]) == 0
    assert page.read_text() == (ROOT / "flowdppo_fast" / "evidence.py").read_text()


def test_what_is_committed_names_folders_that_are_there():
    assert {folder for where in committed.PASSED.values() for folder in where if not (ROOT / folder).is_dir()} == set()
    assert set(committed.ORDER) - {"triton"} <= set(committed.PASSED)


# a test of each backend, by folder and by parameter, and two of none; one fails, one is skipped, one has no promise
GPU_TESTS = {
    "tests/triton/test_kernels.py": "@pytest.mark.parametrize('n', [1, 2])\ndef test_one(n): assert n < 2",
    "tests/api/test_both.py": """
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_one(name): pass
@pytest.mark.parametrize("name", ["triton"])
def test_float64(name): pytest.skip("triton makes no promise for float64")
@pytest.mark.parametrize("name", ["cuda"])
def test_skipped(name): pytest.skip("not today")
@pytest.fixture
def broken(): raise RuntimeError
@pytest.mark.parametrize("name", ["cuda"])
def test_error(name, broken): pass
def test_of_none(): pass
""",
}


def run_gpu_tests(folder, *arguments, of=None, tests=GPU_TESTS):
    """The report of a run of made-up GPU tests under the suite's own conftest."""
    for name, text in tests.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{text}\n")
    # no GPU here: the suite's conftest would skip them all
    hide = "import pytest, torch\ntorch.cuda.is_available = lambda: True\n"
    (folder / "tests" / "conftest.py").write_text(
        f"import sys\n{hide}sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        + (ROOT / "tests" / "conftest.py").read_text().replace("from __future__ import annotations\n", "")
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: gpu\n")
    report = folder / "report.json"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"FLOWDPPO_GPU_TESTS_REPORT": str(report)} | ({"FLOWDPPO_GPU_TESTS_OF": of} if of else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests", *arguments]
    subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=100)
    return json.loads(report.read_text())


@pytest.mark.slow
def test_what_gpu_tests_leave_behind(tmp_path):
    """By folder and by parameter, one backend after the other, and over several workers."""
    triton = {"passed": 2, "failed": 1, "error": 0, "skipped": 0}
    found = run_gpu_tests(tmp_path, of="triton")
    assert found == {"quick": False, "backends": {"triton": triton}, "unfinished": []}
    found = run_gpu_tests(tmp_path, "-n", "2", of="cuda")
    cuda = {"passed": 1, "failed": 0, "error": 1, "skipped": 1}
    assert found == {"quick": False, "backends": {"triton": triton, "cuda": cuda}, "unfinished": []}


def test_a_run_that_dies_leaves_what_has_ended(tmp_path):
    tests = {"tests/triton/test_kernels.py": "def test_one(): pass\ndef test_two(): import os; os._exit(3)"}
    found = run_gpu_tests(tmp_path, tests=tests)
    assert found["backends"]["triton"]["passed"] == 1
    assert found["unfinished"] == ["cuda", "triton"]


def auto(monkeypatch, order, *, dtype=torch.float32, cuda=None, triton=None):
    monkeypatch.setattr(backends.evidence, "ORDER", order)
    monkeypatch.setattr(backends, "_CUDA_PROBLEM", cuda)
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", triton)
    monkeypatch.setattr(backends, "_warned", set())
    return backends.resolve_backend("auto", "cuda", dtype)


def test_auto_follows_the_order(monkeypatch):
    assert auto(monkeypatch, ("triton",)) == "triton"
    assert auto(monkeypatch, ("cuda", "triton")) == "cuda"
    assert auto(monkeypatch, ("cuda", "triton"), cuda="not built") == "triton"
    assert auto(monkeypatch, ("triton", "cuda"), triton="not installed") == "cuda"


def test_auto_never_takes_cuda_for_float64(monkeypatch):
    assert auto(monkeypatch, ("cuda", "triton"), dtype=torch.float64) == "triton"
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: it computes in float32.*'reference'"):
        backends.resolve_backend("cuda", "cuda", torch.float64)


def test_auto_says_why_none_can_run(monkeypatch):
    with pytest.warns(UserWarning, match="'cuda' cannot run: not built and 'triton' cannot run: not installed"):
        assert auto(monkeypatch, ("cuda", "triton"), cuda="not built", triton="not installed") == "reference"
