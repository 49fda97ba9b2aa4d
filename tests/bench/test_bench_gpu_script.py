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
    *'"a" *'*) echo 90a ;;
    *get_device_capability*) echo 90 ;;
    *sys.prefix*) echo /opt/python ;;
    "-m bench.ops folder"*) echo "bench/results/stub-gpu/2026-01-01-0123456789" ;;
    "-m bench.ops environment"*) eval "${STUB_ENVIRONMENT:-echo environment}" ;;
    "-m bench.ops run"*) echo "$*"; eval "${STUB_BENCH:-true}" ;;
    "-m bench.first_light triton"*) echo "$*"; eval "${STUB_LIGHT_TRITON:-true}" ;;
    "-m bench.first_light cuda"*) echo "$*"; eval "${STUB_LIGHT_CUDA:-true}" ;;
    "-m bench.record"*) echo "$*"; mkdir -p "$4"; eval "${STUB_RECORD:-echo [] >$4/launches.json}" ;;
    *replay.py*) echo "$*"; eval "${STUB_REPLAY:-true}" ;;
    *backends/nvidia/include*) echo /opt/include ;;
    "-m bench.train run"*) echo "$*"; eval "${STUB_TRAIN:-true}" ;;
    "-m bench.ops plot"*) eval "${STUB_PLOTS:-true}" ;;
    "-m pytest"*)
        echo "$FLOWDPPO_GPU_TESTS_OF: $*"; echo "required $FLOWDPPO_REQUIRE_CUDA"; eval "${STUB_TESTS:-true}" ;;
    *cuda_code.py*--is-current*) exit ${STUB_CURRENT:-1} ;;
    *cuda_code.py*) echo "| cuda kernel |"; eval "${STUB_CUDA_CODEGEN:-true}" ;;
    "setup.py build_ext"*) echo "$* $FLOWDPPO_CUDA_ARCHS"; eval "${STUB_BUILD:-true}" ;;
    *aot.py*) echo "| kernel |"; eval "${STUB_CODEGEN:-true}" ;;
    *) echo "stub: got $*" >&2; exit 64 ;;
esac
"""
NOTHING = """#!/usr/bin/env bash
exit 0
"""
SANITIZER = """#!/usr/bin/env bash
echo "$*"; eval "${STUB_MEMORY:-true}"
"""


@pytest.fixture
def run(tmp_path):
    """Runs gpu.sh with the stub; returns the process, the steps' verdicts and the result folder."""

    def call(*arguments, sanitizer=True, nvcc=True, **steps):
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        scripts = {"python": STUB} | ({"compute-sanitizer": SANITIZER} if sanitizer else {})
        scripts |= {"cc": NOTHING} | ({"nvcc": NOTHING} if nvcc else {})
        for name, text in scripts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        out = tmp_path / "out"
        env = dict(os.environ, PYTHON=str(tools / "python"), PATH=f"{tools}:{os.environ['PATH']}")
        if not nvcc:
            # what else the machine has, this one has not
            env |= {"PATH": f"{tools}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path)}
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
    ran = (
        "first-light-triton", "build", "first-light-cuda", "environment", "gpu-tests-triton", "gpu-tests-cuda",
        "gpu-tests-others", "record-triton", "memcheck-triton", "racecheck-triton", "record-cuda", "memcheck-cuda",
        "racecheck-cuda", "codegen", "cuda-codegen", "bench", "plots",
    )  # fmt: skip
    assert {name: steps[name][0] for name in ran} == dict.fromkeys(ran, "ok")
    assert list(steps)[:3] == ["first-light-triton", "build", "first-light-cuda"]
    assert steps["end-to-end"] == ("skipped", "not installed here: diffusers")
    assert steps["trainer-tests"] == ("skipped", "diffusers is not installed here")
    logs = {path.stem: path.read_text() for path in (out / "logs").iterdir()}
    for backend in ("triton", "cuda"):
        assert "--tool memcheck --error-exitcode 9" in logs[f"memcheck-{backend}"]
        assert f"replay.py ./launches-{backend}" in logs[f"racecheck-{backend}"]
        assert logs[f"first-light-{backend}"] == f"-m bench.first_light {backend} --device cuda\n"
        tests = logs[f"gpu-tests-{backend}"]
        assert tests.startswith(f"{backend}: -m pytest -m gpu")
        assert f"-n {os.cpu_count()}" in tests
        assert tests.endswith("required 1\n"), "what was built has to run"
    assert (out / "codegen.md").read_text() == "| kernel |\n\n| cuda kernel |\n"
    assert logs["build"] == "setup.py build_ext --inplace 90a\n"
    assert "--device cuda" in logs["bench"]
    assert "--quick" not in logs["bench"]


@pytest.mark.parametrize(
    ("step", "variable"),
    [
        ("environment", "environment"), ("gpu-tests-triton", "tests"), ("record-cuda", "record"),
        ("codegen", "codegen"), ("cuda-codegen", "cuda_codegen"), ("bench", "bench"), ("plots", "plots"),
    ],
)  # fmt: skip
def test_a_failed_check_fails_the_run_which_still_goes_on(run, step, variable):
    done, steps, out = run(**{variable: "echo went wrong in $PWD; false"})
    assert done.returncode == 1
    assert "A CHECK FAILED" in done.stdout
    assert steps[step][0] == "FAILED"
    assert "went wrong" in done.stdout
    assert steps["end-to-end"][0] == "skipped", "the script stopped at the failure"
    log = (out / "logs" / f"{step}.log").read_text()
    assert "went wrong in ." in log
    assert str(ROOT) not in log


def test_a_backend_without_first_light_is_left_out(run):
    done, steps, _ = run(light_triton="echo 'FAILED: triton: loss: SyntaxError: duplicate argument'; false")
    assert done.returncode == 1
    assert steps["first-light-triton"][0] == "FAILED"
    assert "FAILED: triton: loss: SyntaxError: duplicate argument" in steps["first-light-triton"][1]
    assert steps["gpu-tests-triton"] == ("skipped", "triton is not there, or failed at first light")
    assert "record-triton" not in steps
    assert steps["gpu-tests-cuda"][0] == steps["memcheck-cuda"][0] == steps["bench"][0] == "ok"


def test_nothing_follows_where_no_backend_has_first_light(run):
    done, steps, _ = run(light_triton="false", light_cuda="false")
    assert done.returncode == 1
    assert list(steps) == ["first-light-triton", "build", "first-light-cuda", "environment"]
    assert "A CHECK FAILED" in done.stdout


def test_a_library_that_does_not_compile_takes_nothing_else_along(run):
    done, steps, out = run(build="echo no; false")
    assert done.returncode == 1
    assert steps["build"][0] == "FAILED"
    assert "first-light-cuda" not in steps
    assert "cuda-codegen" not in steps
    assert steps["gpu-tests-cuda"][0] == "skipped"
    assert steps["gpu-tests-triton"][0] == steps["bench"][0] == "ok"
    assert (out / "logs" / "gpu-tests-others.log").read_text().endswith("required 0\n")


def test_the_end_to_end_benchmark_runs_where_its_packages_and_time_are(run):
    done, steps, out = run("--seconds", "600", diffusers="0")
    assert done.returncode == 0
    assert steps["end-to-end"][0] == "ok"
    assert "--device cuda" in (out / "logs" / "end-to-end.log").read_text()
    done, steps, _ = run("--seconds", "600", diffusers="0", peft="1")
    assert steps["end-to-end"] == ("skipped", "not installed here: peft")
    done, steps, _ = run("--seconds", "600", diffusers="0", train="echo went wrong; false")
    assert done.returncode == 1
    assert steps["end-to-end"][0] == "FAILED"
    done, steps, _ = run("--seconds", "120", diffusers="0")
    assert steps["end-to-end"] == ("skipped", "no time is left for it; --seconds gives more")


def test_a_library_that_is_there_is_not_built_again(run):
    done, steps, out = run(current="0")
    assert done.returncode == 0
    assert steps["build"] == ("ok", "the CUDA library is there, made from these sources")
    assert "setup.py" not in (out / "logs" / "build.log").read_text()
    assert steps["first-light-cuda"][0] == "ok"


def test_without_nvcc_there_is_no_cuda_backend_and_the_rest_goes_on(run):
    done, steps, _ = run(nvcc=False)
    assert done.returncode == 0, done.stdout
    assert steps["build"] == ("skipped", "nvcc is not installed here, so there is no CUDA backend")
    assert steps["gpu-tests-cuda"][0] == "skipped"
    assert steps["gpu-tests-triton"][0] == "ok"
    assert "cuda-codegen" not in steps


def test_a_step_is_stopped_when_the_time_is_up(run):
    done, steps, _ = run("--seconds", "6", bench="sleep 60")
    assert done.returncode == 1
    assert steps["bench"][0] == "TIMED OUT"
    assert steps["end-to-end"][0] == "skipped"


def test_a_memory_error_fails_the_run(run):
    done, steps, _ = run(memory="echo 'Invalid __global__ write'; exit 9")
    assert done.returncode == 1
    assert steps["memcheck-triton"] == ("FAILED", "recorded launches of every form; exit status 9")


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
        name = f"{tool}-cuda" if present else tool
        assert steps[name][0] == "skipped"
        assert reason in steps[name][1]
    assert done.returncode == 0


def test_quick_asks_for_quick_steps_and_says_what_it_left_out(run):
    done, steps, out = run("--quick", diffusers="0")
    assert done.returncode == 0
    assert steps["memcheck"] == steps["end-to-end"] == steps["gpu-tests-others"] == ("skipped", "not part of --quick")
    assert "--quick" in (out / "logs" / "bench.log").read_text()
    tests = (out / "logs" / "gpu-tests-triton.log").read_text()
    assert "gpu and not slow" in tests
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
@pytest.mark.timeout(900)
def test_dry_run(tmp_path):
    """Everything that needs no device, for real; the kernels run on the emulator."""
    out = tmp_path / "out"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [SCRIPT, "--dry-run", "--output", out], env=env, capture_output=True, text=True, timeout=880, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "logs" / "first-light-triton.log").read_text().count("triton: ") == 4
    assert "launches of 6 kernels" in (out / "logs" / "replay-triton.log").read_text()
    result = json.loads((out / "results.json").read_text())
    assert result["device"] == "rehearsal"
    assert all(case["contenders"][1]["samples"]["device_total"] for case in result["cases"])
    for name in ("summary.md", "environment.json", "table.md", "plots/time.png", "logs/gpu-tests.log"):
        assert (out / name).exists(), name
    written = "".join(path.read_text() for path in out.rglob("*") if path.is_file() and path.suffix != ".png")
    for private in (str(ROOT), str(tmp_path), os.uname().nodename, sys.prefix):
        assert private not in written


def test_folders_that_need_diffusers_are_left_out_without_it():
    """A test file that cannot be imported would stop the run before its first test."""
    (listed,) = re.findall(r"for needs in ([\w ]+); do", SCRIPT.read_text())
    needs = re.compile(r"^(?:import|from) (?:diffusers|transformers|accelerate|peft|flowdppo_fast\.trainer)\b", re.M)
    files = [path for path in (ROOT / "tests").rglob("*.py") if needs.search(path.read_text())]
    # in support there are no tests: what needs them there runs in a process of its own
    assert {path.relative_to(ROOT / "tests").parts[0] for path in files} - {"support"} <= set(listed.split())
