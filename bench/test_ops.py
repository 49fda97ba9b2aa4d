"""A few contenders on small latents, one thread: ``pytest bench/``. The full run is ``python -m bench.ops run``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.ops.contenders import Contender, registry
from bench.ops.devices import CpuDevice
from bench.ops.inputs import build_rollout, draw_noise
from bench.ops.oracle import Oracle
from bench.ops.timing import Runner, rotate
from bench.ops.workloads import WORKLOADS

_NAMES = (
    "peer-eager",
    "peer-compiled",
    "cpu/velocity",
    "cpu/seeded",
    "cpu/single-pass",
    "cpu/means",
    "clip-eager",
    "cpu/clip",
)
_WORKLOADS = {w.key: w for w in WORKLOADS if w.key in ("overhead/8", "sd3-512/8")}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def oracles() -> dict[tuple[str, str], Oracle]:
    return {}


def _oracle(oracles: dict[tuple[str, str], Oracle], workload: str, dtype: str) -> Oracle:
    if (workload, dtype) not in oracles:
        device = torch.device("cpu")
        chosen = _WORKLOADS[workload]
        oracles[workload, dtype] = Oracle(build_rollout(chosen, _DTYPES[dtype], device, draw_noise(chosen, device)))
    return oracles[workload, dtype]


def _contender(name: str) -> Contender:
    found = {contender.name: contender for contender in registry("cpu")}[name]
    reason = found.missing("cpu")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return found


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("workload", _WORKLOADS)
@pytest.mark.parametrize("name", _NAMES)
def test_forward_backward(benchmark, one_thread, oracles, name: str, workload: str, dtype: str) -> None:
    contender = _contender(name)
    oracle = _oracle(oracles, workload, dtype)
    inputs = oracle.rollout.inputs
    torch._dynamo.reset()
    runner = Runner(contender, contender.prepare(oracle.rollout))
    output, grad = runner.total(inputs)
    rows = contender.read(output)
    errors = oracle.errors(contender.start, contender.objective, output.loss.detach(), rows.kl, rows.log_ratio, grad)
    assert not errors.over(oracle.bounds(contender.start))

    sets = rotate(inputs, contender.input_bytes(inputs), CpuDevice()).sets
    position = iter(range(1 << 30))
    benchmark.group = f"{workload} {dtype}"
    benchmark.extra_info["relative_error_of_gradient"] = errors.gradient
    benchmark.pedantic(lambda: runner.total(sets[next(position) % len(sets)]), rounds=30, warmup_rounds=3)
