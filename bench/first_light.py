"""Whether a backend runs on this GPU at all, in under a minute: ``python -m bench.first_light BACKEND...``.

Each backend is asked for a loss with its gradient, stored and seeded, a sampler step, and a loss in a CUDA graph. All
are held to the reference in float64 with the bounds of the tests, but for the graph's replay, which has the bits of the
same call without it. The first failure ends it and is the last line. ``--device emulated`` takes what ``tests/ptx``
emulates, where the graph is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

BACKENDS = ("triton", "cuda")


@contextlib.contextmanager
def emulated(name: str, arch: int = 90) -> Iterator[None]:
    """The backend serves tensors of the CPU, by its kernels as compiled for ``arch``, on an emulator."""
    if name == "triton":
        from ptx.triton_driver import install

        install(arch)
        yield
    else:
        from ptx import cuda_runtime

        cuda = cuda_runtime.load()
        known = {gpu.rstrip("a"): gpu for gpu in cuda_runtime.GPUS}
        # of what there is, the newest that the GPU can run
        cuda.gpus = dict.fromkeys(cuda.gpus, known[max((gpu for gpu in known if int(gpu) <= arch), key=int)])
        with cuda_runtime.serving(cuda):
            yield


def checks(backend: str, device: str) -> dict[str, Callable[[], None]]:
    """What is tried, in order; each raises where something is wrong."""
    from support.cases import bounded_call
    from support.compare import check_backend
    from support.problems import make_problem
    from support.steps import StepCall, check_step

    import flowdppo_fast as fast

    bf16 = torch.bfloat16
    problem = make_problem((8,), (16, 32, 32))

    def loss(**options) -> None:
        check_backend(bounded_call(problem, "velocity", "dppo", dtypes=bf16, device=device, **options), backend)

    def step() -> None:
        sample, velocity = (x.to(device, bf16) for x in (problem.state, problem.velocity))
        check_step(StepCall(problem, sample, velocity, fast.PhiloxNoise(7, 3)), backend)

    found = {
        "loss and gradient, stored noise": loss,
        "loss and gradient, seeded noise": lambda: loss(noise=fast.PhiloxNoise(2**40 + 1, 5)),
        "loss and gradient in one pass": lambda: loss(single_pass=True),
        "sampler step, seeded noise": step,
    }
    if device == "cuda":
        found["loss and gradient in a CUDA graph"] = lambda: replay(backend)
    return found


def replay(backend: str) -> None:
    """A captured loss follows its inputs.

    Raises:
        AssertionError: the replay has other bits than the call.
    """
    import flowdppo_fast as fast

    velocity, old, noise = (torch.randn(8, 16, 32, 32, device="cuda").bfloat16() for _ in range(3))
    advantages = torch.randn(8, device="cuda")
    step = fast.SDEStep.from_sigmas("flow_sde", 0.7, 0.6)

    def run() -> tuple[torch.Tensor, ...]:
        leaf = velocity.detach().requires_grad_()
        out = fast.fused_dppo_velocity_loss(leaf, old, noise, step, advantages, backend=backend)
        return out.loss.detach(), out.row_results, *torch.autograd.grad(out.loss, leaf)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(2):
        velocity.add_(0.25)
        graph.replay()
        for captured, direct in zip(results, run()):
            assert torch.equal(captured, direct), "a replay has other bits than the call"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_light", description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="+", choices=BACKENDS)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    options = parser.parse_args(arguments)
    for backend in options.backends:
        with emulated(backend) if options.device == "emulated" else contextlib.nullcontext():
            for what, check in checks(backend, "cuda" if options.device == "cuda" else "cpu").items():
                started = time.monotonic()
                try:
                    check()
                    if options.device == "cuda":
                        torch.cuda.synchronize()
                except Exception as error:
                    traceback.print_exc()
                    said = (str(error).splitlines() or [""])[0]
                    print(f"FAILED: {backend}: {what}: {type(error).__name__}: {said}", flush=True)
                    return 1
                print(f"{backend}: {what}: {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
