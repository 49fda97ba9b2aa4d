"""Canonical operator arguments, and the same ones for the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowdppo_fast import reference
from flowdppo_fast.kernels.philox import _HARDWARE
from flowdppo_fast.noise import philox_normal
from flowdppo_fast.rows import Form, RowSource, stats_dtype

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# on a machine with a GPU these are GPU tests, compiled; elsewhere they are interpreted
MARKS = [pytest.mark.gpu] if CUDA else [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime")]
# (form, columns of the step table: 0 is one step for all rows); a table of S alone belongs to means
FORMS = [(Form.VELOCITY, 0), (Form.VELOCITY, 3), (Form.MEAN, 0), (Form.MEAN, 1), (Form.MEAN, 3)]
STEP = [0.35, -1.75, 0.08]
SEED, FIRST_STREAM = -0x123456789ABCDEF, 2**40 + 5


class Source(dict):
    """The ten arguments that all training operators share, by name; :meth:`args` in the schema's order."""

    ORDER = (
        "new", "old", "noise", "reference", "streams", "step", "step_values", "seed", "first_stream", "form",
    )  # fmt: skip

    def args(self) -> list[Any]:
        return [self[name] for name in self.ORDER]

    def exact(self) -> Source:
        """For the reference on the CPU: everything in float64."""
        wide = {name: _wide(value) if name != "streams" else _host(value) for name, value in self.items()}
        return Source(wide)

    @property
    def rows(self) -> int:
        return self["new"].shape[0] * self["new"].shape[1]

    @property
    def compute(self) -> torch.dtype:
        return stats_dtype(self["new"])


def _host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _wide(value: Any) -> Any:
    return value.cpu().double() if isinstance(value, Tensor) else value


def source(
    shape: tuple[int, int, int] = (2, 3, 300),
    form: int = Form.VELOCITY,
    dtypes: tuple[torch.dtype, ...] | torch.dtype = torch.float32,
    *,
    drift: float = 0.05,
    seeded: bool = False,
    with_reference: bool = False,
    table: int = 0,
    streams: Tensor | None = None,
) -> Source:
    """Random rows; ``dtypes`` of (new, old, noise, reference), ``table`` columns of a step table (0: one step)."""
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 4
    rows = shape[0] * shape[1]

    def normal() -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    old = normal()
    # rows are at different distances from the old policy and lean to either side of the noise
    distance = drift * torch.linspace(0.2, 1.8, max(rows, 1), dtype=torch.float64)[:rows].reshape(*shape[:2], 1)
    if seeded:
        numbers = torch.arange(FIRST_STREAM, FIRST_STREAM + rows) if streams is None else streams.cpu()
        noise = philox_normal(SEED, numbers, shape[2]).reshape(shape)
    else:
        noise = normal()
    lean = 0.2 * torch.randn(*shape[:2], 1, dtype=torch.float64)
    new = old + distance * (normal() + lean * noise)
    std = STEP[0]
    third = old + std * noise if form == Form.MEAN else noise
    tensors = [new, old, None if seeded else third, old + distance * normal() if with_reference else None]
    compute = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    names = ("new", "old", "noise", "reference")
    values = {n: x if x is None else x.to(DEVICE, dtype) for n, x, dtype in zip(names, tensors, dtypes)}
    step = None
    if table:
        scale = torch.linspace(0.6, 1.4, max(rows, 1), dtype=torch.float64)[:rows, None]
        step = (torch.tensor([STEP], dtype=torch.float64) * scale)[:, :table].to(DEVICE, compute).contiguous()
    return Source(
        **values,
        streams=None if streams is None else streams.to(DEVICE),
        step=step,
        step_values=[] if table else STEP,
        seed=SEED,
        first_stream=0 if streams is not None else FIRST_STREAM,
        form=int(form),
    )


def differences(problem: Source) -> tuple[Tensor, Tensor, Tensor | None]:
    """``u, e, w`` of all rows in float64, ``[R, N]``."""
    u, e, w, _ = reference._differences(RowSource(*problem.exact().args()))
    return u, e, w


# bound on the error of a seeded normal, whatever dtype the kernel computes in: with functions of the hardware, or else
# 4 float32 ulp of the largest normal
NORMAL_SLACK = 1e-5 if _HARDWARE else 4 * 2.0**-23 * 6.8
