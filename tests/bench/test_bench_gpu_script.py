"""bench/gpu.sh: every path of it with a stand-in for python, and the dry run with the real one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
from bench_support import ROOT

SCRIPT = ROOT / "bench" / "gpu.sh"
# answers what gpu.sh asks of python; STUB_<STEP> is a shell command that stands for a step
STUB = """#!/usr/bin/env bash
case "$*" in
    *find_spec*diffusers*) exit ${STUB_DIFFUSERS:-1} ;;
    *find_spec*peft*) exit ${STUB_PEFT:-0} ;;
    *find_spec*) exit 0 ;;
    *get_device_capability*) echo 90 ;;
    *sys.prefix*) echo /opt/python ;;
    "-m bench.ops folder"*) echo "bench/results/stub-gpu/2026-01-01-0123456789" ;;
    "-m bench.ops environment"*) eval "${STUB_ENVIRONMENT:-echo environment}" ;;
    "-m bench.ops run"*) echo "$*"; eval "${STUB_BENCH:-true}" ;;
    "-m bench.ops smoke"*) echo "$*"; eval "${STUB_SMOKE:-true}" ;;
    "-m bench.train run"*) echo "$*"; eval "${STUB_TRAIN:-true}" ;;
    "-m bench.ops plot"*) eval "${STUB_PLOTS:-true}" ;;
    "-m pytest"*) echo "$*"; eval "${STUB_TESTS:-true}" ;;
    *aot.py*) echo "| kernel |"; eval "${STUB_CODEGEN:-true}" ;;
    *) echo "stub: got $*" >&2; exit 64 ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
echo "$*"; eval "${STUB_MEMORY:-true}"
"""


@pytest.fixture
def run(tmp_path):
    """Runs gpu.sh with the stub; returns the process, the steps' verdicts and the result folder."""

    def call(*arguments, sanitizer=True, **steps):
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        scripts = {"python": STUB} | ({"compute-sanitizer": SANITIZER} if sanitizer else {})
        for name, text in scripts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        out = tmp_path / "out"
        env = dict(os.environ, PYTHON=str(tools / "python"), PATH=f"{tools}:{os.environ['PATH']}")
        env |= {f"STUB_{name.upper()}": command for name, command in steps.items()}
        done = subprocess.run(
            [SCRIPT, *arguments, "--output", out], env=env, capture_output=True, text=True, timeout=100, cwd=tmp_path
        )  # fmt: skip
        summary = out / "summary.md"
        rows = re.findall(r"^\| (\S+) \| ([^|]+) \| \d+ \| (.*) \|$", summary.read_text(), re.MULTILINE)
        return done, {name: (verdict, note) for name, verdict, note in rows}, out

    return call


def test_all_green(run):
    done, steps, out = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks that ran are green" in done.stdout
    ran = ("environment", "gpu-tests", "memcheck", "racecheck", "codegen", "bench", "plots")
    assert {name: steps[name][0] for name in ran} == dict.fromkeys(ran, "ok")
    assert steps["end-to-end"] == ("skipped", "not installed here: diffusers")
    assert steps["trainer-tests"] == ("skipped", "diffusers is not installed here")
    assert "--tool memcheck --error-exitcode 9" in (out / "logs" / "memcheck.log").read_text()
    assert "--tool racecheck" in (out / "logs" / "racecheck.log").read_text()
    assert (out / "codegen.md").read_text() == "| kernel |\n"
    bench = (out / "logs" / "bench.log").read_text()
    assert "--device cuda" in bench
    assert "--quick" not in bench


@pytest.mark.parametrize("step", ["environment", "tests", "smoke", "codegen", "bench", "plots"])
def test_a_failed_check_fails_the_run_which_still_goes_on(run, step):
    arguments = ["--dry-run"] if step == "smoke" else []
    done, steps, out = run(*arguments, **{step: "echo went wrong in $PWD; false"})
    name = "gpu-tests" if step == "tests" else step
    assert done.returncode == 1
    assert "A CHECK FAILED" in done.stdout
    assert steps[name][0] == "FAILED"
    assert "went wrong" in done.stdout
    assert [verdict for verdict, _ in steps.values()].count("FAILED") == 1
    assert steps["end-to-end"][0] == "skipped", "the script stopped at the failure"
    log = (out / "logs" / f"{name}.log").read_text()
    assert "went wrong in ." in log
    assert str(ROOT) not in log


def test_the_end_to_end_benchmark_runs_where_its_packages_are(run):
    done, steps, out = run(diffusers="0")
    assert done.returncode == 0
    assert steps["end-to-end"][0] == "ok"
    assert "--device cuda" in (out / "logs" / "end-to-end.log").read_text()
    done, steps, _ = run(diffusers="0", peft="1")
    assert steps["end-to-end"] == ("skipped", "not installed here: peft")
    done, steps, _ = run(diffusers="0", train="echo went wrong; false")
    assert done.returncode == 1
    assert steps["end-to-end"][0] == "FAILED"
    assert steps["bench"][0] == "ok", "the script stopped at the failure"


def test_a_step_is_stopped_when_the_time_is_up(run):
    done, steps, _ = run("--seconds", "4", bench="sleep 60")
    assert done.returncode == 1
    assert steps["bench"][0] == "TIMED OUT"
    assert steps["end-to-end"][0] == "skipped"


def test_a_memory_error_fails_the_run(run):
    done, steps, _ = run(memory="echo 'Invalid __global__ write'; exit 9")
    assert done.returncode == 1
    assert steps["memcheck"] == ("FAILED", "every form of this library on small ragged sizes; exit status 9")


@pytest.mark.parametrize(
    ("present", "command", "reason"),
    [
        (True, "echo 'Error: Device not supported.'; exit 1", "Device not supported"),
        (False, "", "is not installed here"),
    ],
)
def test_a_sanitizer_that_cannot_run_is_skipped_with_the_reason(run, present, command, reason):
    done, steps, _ = run(sanitizer=present, memory=command or "true")
    for tool in ("memcheck", "racecheck"):
        assert steps[tool][0] == "skipped"
        assert reason in steps[tool][1]
    assert done.returncode == 0


def test_quick_asks_for_quick_steps_and_says_what_it_left_out(run):
    done, steps, out = run("--quick", diffusers="0")
    assert done.returncode == 0
    assert steps["memcheck"] == steps["end-to-end"] == ("skipped", "not part of --quick")
    assert "--quick" in (out / "logs" / "bench.log").read_text()
    tests = (out / "logs" / "gpu-tests.log").read_text()
    assert "gpu and not slow" in tests
    assert "--ignore" not in tests
    assert "trainer-tests" not in steps


def test_results_are_packed(run, tmp_path):
    archive = tmp_path / "run.tar.gz"
    run("--quick", "--archive", archive)
    with tarfile.open(archive) as packed:
        assert "out/summary.md" in packed.getnames()


@pytest.mark.parametrize("arguments", [["--fast"], ["--output"]])
def test_unknown_options_are_refused(arguments):
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "expected" in done.stderr


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Everything that needs no device, for real."""
    out = tmp_path / "out"
    env = dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [SCRIPT, "--dry-run", "--output", out], env=env, capture_output=True, text=True, timeout=280, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "results.json").read_text())
    assert result["device"] == "rehearsal"
    assert all(case["contenders"][1]["samples"]["device_total"] for case in result["cases"])
    for name in ("summary.md", "environment.json", "table.md", "plots/time.png", "logs/gpu-tests.log"):
        assert (out / name).exists(), name
    written = "".join(path.read_text() for path in out.rglob("*") if path.is_file() and path.suffix != ".png")
    for private in (str(ROOT), str(tmp_path), os.uname().nodename, sys.prefix):
        assert private not in written
