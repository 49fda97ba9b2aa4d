"""Who computes: what ``auto`` takes, what a name means, what is said when something is missing, what import costs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.backends import BACKENDS, CPU, require
from support.problems import make_problem
from torch._subclasses.fake_tensor import FakeTensorMode

import flowdppo_fast as fast
from flowdppo_fast import backend as backends
from flowdppo_fast import objectives, ops, reference
from flowdppo_fast.cli import doctor


@pytest.fixture
def built():
    return require(CPU)


@pytest.fixture
def not_built(monkeypatch):
    """A pure-Python install, and no warning given yet."""
    monkeypatch.setattr(backends, "_CPU_PROBLEM", "the C++ library is not built")
    monkeypatch.setattr(backends, "_warned", set())


def call_everything(name, dtype=torch.float32):
    """Every public way to an operator; returns the results of all."""
    problem = make_problem((2, 2), (3, 5))
    tensors = (problem.velocity, problem.old_velocity, problem.noise, problem.state)
    velocity, old, noise, state = (x.to(dtype) for x in tensors)
    velocity.requires_grad_()
    advantages = problem.advantages.to(dtype)
    out = fast.fused_dppo_velocity_loss(velocity, old, noise, problem.step, advantages, backend=name)
    out.loss.backward()
    means = fast.fused_dppo_loss(velocity.detach(), old, noise, 0.3, advantages, backend=name)
    single = fast.fused_dppo_velocity_loss(
        velocity.detach(), old, noise, problem.step, advantages, single_pass=True, backend=name
    )
    p, q = fast.row_statistics(velocity, old, noise, problem.step, row_dims=2, backend=name)
    (p.sum() + q.sum()).backward()
    stepped = fast.sde_step(state, velocity, problem.step, noise=noise, log_prob="gaussian", row_dims=2, backend=name)
    stepped.log_prob.sum().backward()
    return [out.loss, velocity.grad, means.loss, single.loss, single.grad, p, q, stepped.prev_sample, stepped.log_prob]


@pytest.fixture
def broken_reference(monkeypatch):
    """Every operator of the reference raises, the registered ones too: each looks one of these up when it runs."""

    def refuse(*args):
        raise AssertionError("the reference ran")

    for name in ("stats_dtype", "row_numbers"):
        monkeypatch.setattr(reference, name, refuse)


def test_breaking_the_reference_breaks_all_of_it(broken_reference):
    x = torch.zeros(1, 1, 4)
    source = (x, x, x, None, None, None, [1.0, 1.0, 1.0], 0, 0, 0)
    epilogue = (torch.zeros(1), None, None, [0] * 6, [1.0] * 5)
    arguments = {
        "row_stats": (*source, False),
        "row_grad": (*source, torch.ones(3, 1), torch.ones(1), 1.0),
        "policy_loss": (*source, *epilogue),
        "policy_loss_and_grad": (*source, *epilogue, 1.0),
        "log_prob_loss": (epilogue[0], epilogue[0], None, None, None, [1.0] * 3, epilogue[0], None, [0] * 6, [1.0] * 5),
        "sde_step": (x, x, x, None, None, None, [1.0, 1.0, 1.0], 0, 0, torch.float32, True, True, False),
    }
    assert arguments.keys() == ops.SCHEMAS.keys()
    for op, values in arguments.items():
        with pytest.raises(AssertionError, match="the reference ran"):
            getattr(reference, op)(*values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_runs_without_the_reference(built, broken_reference, dtype):
    assert all(torch.isfinite(x).all() for x in call_everything("cpu", dtype))


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_cpu_kernels_are_registered(built, op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flowdppo::{op}", "CPU")


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_reference_by_name_is_plain_torch(op):
    assert backends.operator(op, "reference", "cpu") is getattr(reference, op)


def test_reference_by_name_runs_no_kernel_of_others(monkeypatch):
    """Every registered operator raises; only the functions of ``reference.py`` are left."""

    def refuse(*args):
        raise AssertionError("a registered operator ran")

    monkeypatch.setattr(backends, "_OPERATORS", dict.fromkeys(ops.SCHEMAS, refuse))
    call_everything("reference")


def test_cpu_and_reference_agree(built):
    for fused, plain in zip(call_everything("cpu"), call_everything("reference")):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("param", BACKENDS)
def test_the_output_says_which_backend_ran(param):
    backend = require(param)
    problem = make_problem((2,), (3, 5))
    tensors = [x.float().to(backend.device) for x in (problem.velocity, problem.old_velocity, problem.noise)]
    advantages = problem.advantages.float().to(backend.device)
    out = fast.fused_dppo_velocity_loss(*tensors, problem.step, advantages, backend=backend.name)
    assert out.backend == backend.name == fast.resolve_backend(backend.name, backend.device)


def test_auto_takes_cpu_when_built(built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast.resolve_backend("auto", "cpu") == "cpu"
    problem = make_problem((2,), (3, 5))
    tensors = [x.float() for x in (problem.velocity, problem.old_velocity, problem.noise)]
    assert fast.fused_dppo_velocity_loss(*tensors, problem.step, problem.advantages).backend == "cpu"


def test_auto_says_once_that_it_takes_the_reference(not_built):
    problem = make_problem((2,), (3, 5))
    tensors = [x.float() for x in (problem.velocity, problem.old_velocity, problem.noise)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [fast.fused_dppo_velocity_loss(*tensors, problem.step, problem.advantages) for _ in range(3)]
    assert [out.backend for out in outs] == ["reference"] * 3
    (warning,) = caught
    message = str(warning.message)
    for word in ("'auto'", "reference", "'cpu'", "the C++ library is not built", "backend='reference' silences"):
        assert word in message


def test_the_reference_by_name_is_silent(not_built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast.resolve_backend("reference", "cpu") == "reference"


def test_cpu_by_name_never_falls_back(not_built):
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: the C"):
        fast.resolve_backend("cpu", "cpu")


def test_reasons(not_built):
    assert backends.problem("reference", "cuda") is None
    assert "is not built" in backends.problem("cpu", "cpu")
    assert "serves CPU tensors" in backends.problem("cpu", "cuda")
    with pytest.raises(ValueError, match="backend: got 'cudnn', expected 'auto' or one of"):
        backends.problem("cudnn", "cpu")


def test_build_info(built):
    info = fast.build_info()
    assert info, "a built library says what it was built with"
    assert "torch" in info


def test_unfit_library_says_so(monkeypatch, tmp_path):
    """A file that cannot be loaded is a reason in words, not a crash at import."""
    broken = tmp_path / "_C_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(backends, "_LIBRARY", broken)
    assert "cannot be loaded under torch" in backends._load_cpu_library()
    monkeypatch.setattr(backends, "_LIBRARY", tmp_path / "missing.so")
    assert "not built" in backends._load_cpu_library()


def test_cuda_by_name_says_what_is_missing(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: it serves NVIDIA GPU tensors .* 'cpu'"):
        fast.resolve_backend("cuda", "cpu")
    monkeypatch.setattr(backends, "_CUDA_LIBRARY", tmp_path / "missing.so")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA; install a torch that has it" in backends._load_cuda_library()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "the CUDA library is not built; install with CUDA's compiler nvcc" in backends._load_cuda_library()
    monkeypatch.setattr(backends, "_CUDA_LIBRARY", tmp_path / "broken.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    assert "cannot be loaded under torch" in backends._load_cuda_library()


def test_kernels_of_another_checkout_are_refused(tmp_path):
    """A checkout on the path, while another one is installed for development, must not run the other one's kernels."""
    package = Path(backends.__file__).parent
    (tmp_path / package.name).mkdir()
    for file in package.glob("*.py"):
        shutil.copy(file, tmp_path / package.name)
    code = "from flowdppo_fast import backend; print(backend.__file__, backend.problem('triton', 'cuda'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    own = tmp_path / package.name
    assert run.stdout.startswith(f"{own / 'backend.py'} the package is in {own} and its kernels are those of ")
    assert run.stdout.endswith(f"; pip install -e {tmp_path}\n")
    assert backends._kernels_problem() is None


@pytest.mark.skipif(backends.problem("cpu", "cpu") is not None, reason="there is no C++ library that can be loaded")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(" unclipped ", " "), "has 'unclipped' where Python has 'dppo_clipped' of rules:"),
        (
            lambda text: text.replace("clip_low clip_high", "clip_high clip_low"),
            "has 'clip_low' where Python has 'clip_high' of options:",
        ),
        (lambda text: text + "more ", "has None where Python has 'more' of options:"),
    ],
)  # fmt: skip
def test_a_library_with_other_lists_is_refused(monkeypatch, change, message):
    """Operators carry numbers of rules, options and results, which would mean something else."""
    library = backends._LIBRARY
    assert backends._names_problem(library) is None
    theirs = objectives.names()
    monkeypatch.setattr(objectives, "names", lambda: change(theirs))
    assert backends._names_problem(library) == f"{library.name} {message}; build it again: make build"


def test_kernels_that_are_not_installed_are_missed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *package: None if name.endswith("kernels") else find(name, *package)
    )
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", backends._kernels_problem())
    with pytest.raises(RuntimeError, match="cannot run: its kernels are not installed; pip install -e"):
        fast.resolve_backend("triton", "cuda")


def test_both_gpu_backends_have_operators_of_their_own():
    assert backends.operator("row_stats", "cuda", "cuda") is torch.ops.flowdppo_cuda.row_stats.default
    with FakeTensorMode():
        # where somebody has to see the operator
        assert backends.operator("row_stats", "triton", "cuda") is torch.ops.flowdppo.row_stats.default
    if backends.problem("triton", "cuda") is None:
        # else its launcher, without the dispatcher between
        kernels = importlib.import_module("flowdppo_fast.kernels")
        assert backends.operator("row_stats", "triton", "cuda") is kernels.row_stats
    for op in ops.SCHEMAS:
        schemas = [str(getattr(space, op).default._schema) for space in (torch.ops.flowdppo, torch.ops.flowdppo_cuda)]
        assert schemas[1].replace("flowdppo_cuda", "flowdppo") == schemas[0]


def test_the_cuda_library_loads_without_a_gpu():
    """It brings a kernel for every operator, and none for tensors of a CPU."""
    if not backends._CUDA_LIBRARY.exists():
        pytest.skip("the CUDA library is not built")
    code = (
        "import torch; from flowdppo_fast import backend, ops; torch.ops.load_library(str(backend._CUDA_LIBRARY)); "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(torch.ops.flowdppo_cuda.architectures()); "
        "print(all(has(f'flowdppo_cuda::{op}', 'CUDA') for op in ops.SCHEMAS)); "
        "print(any(has(f'flowdppo_cuda::{op}', 'CPU') for op in ops.SCHEMAS))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    architectures, on_gpu, on_cpu = run.stdout.splitlines()[-3:]
    assert architectures.split(";") == fast.build_info()["cuda_architectures"]
    assert (on_gpu, on_cpu) == ("True", "False")


def test_doctor_says_why_cuda_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "_CUDA_PROBLEM", "the CUDA library is not built")
    report = doctor.doctor_report()
    assert report["backends"]["cuda"] == {"unusable": "the CUDA library is not built"}
    assert report["cuda_kernels"] is None
    if not torch.cuda.is_available():
        monkeypatch.setattr(backends, "_CUDA_PROBLEM", None)
        monkeypatch.setattr(doctor, "_cuda_kernels", lambda: "compiled for sm_90a")
        assert doctor.doctor_report()["backends"]["cuda"] == {"unusable": "torch sees no GPU"}


def test_import_is_light():
    """On top of torch: no trainer stack, no Triton, no module outside the package and the standard library, no time."""
    code = (
        "import sys, json, time, torch; before, started = set(sys.modules), time.process_time(); import flowdppo_fast; "
        "print(json.dumps([time.process_time() - started, sorted(set(sys.modules) - before)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(run.stdout.splitlines()[-1])
    new = {name.partition(".")[0] for name in modules}
    assert "flowdppo_fast" in new
    heavy = {"diffusers", "transformers", "triton", "accelerate", "peft", "numpy", "matplotlib", "safetensors", "yaml"}
    assert new & heavy == set()
    assert new - {"flowdppo_fast"} <= set(sys.stdlib_module_names)
    # of the processor, which a busy machine stretches little; it takes a tenth of this
    assert seconds < 0.5
    assert "flowdppo_fast: " not in run.stderr


def test_import_does_not_warn():
    run = subprocess.run([sys.executable, "-W", "error", "-c", "import flowdppo_fast"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
