"""The fused sampler step: mean, noise, next state and log-prob of any affine sampler in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layout
from .autograd import SamplerStep
from .backend import BackendName, resolve_backend
from .noise import PhiloxNoise
from .objectives import LogProbKind
from .rows import plan_of
from .samplers import SDEStep, on_host
from .schedule import HostSchedule, per_row


class SampledStep(NamedTuple):
    """Result of :func:`sde_step`.

    Attributes:
        prev_sample: next state ``x'``, in the requested dtype (the one that was given, if it was).
        mean: ``mu`` in float32 (float64 for float64 samples), or None unless asked for.
        log_prob: ``[rows]`` mean-reduced log-density of the step, or None unless asked for.
        noise: the noise that was drawn (tensor or :class:`PhiloxNoise`); None when ``prev_sample`` was given.
    """

    prev_sample: Tensor
    mean: Tensor | None
    log_prob: Tensor | None
    noise: Tensor | PhiloxNoise | None


def sde_step(
    sample: Tensor,
    velocity: Tensor,
    step: SDEStep,
    *,
    noise: Tensor | PhiloxNoise | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    prev_sample: Tensor | None = None,
    dtype: torch.dtype | None = None,
    return_mean: bool = False,
    log_prob: LogProbKind | None = None,
    row_dims: int = 1,
    backend: BackendName = "auto",
) -> SampledStep:
    """One step ``mu = a*x + b*v``, ``x' = mu + S*e`` of any sampler, one launch (two with a log-prob).

    Args:
        sample: ``[rows, *latent]`` state ``x``.
        velocity: same shape, model output; ``mean`` and ``log_prob`` are differentiable in it.
        step: :class:`SDEStep` of the rows, scalar or stacked; ``S == 0`` (ODE) gives ``x' = mu``.
        noise: standard normal noise, or :class:`PhiloxNoise` drawn in the kernel; None draws float32 noise from
            ``generator`` (one, or one per row of the first dim).
        prev_sample: the next state of a recorded step: nothing is drawn, mean and log-prob are of that step.
        dtype: of the next state; default: the sample's.
        return_mean: also return ``mu``.
        log_prob: None, ``"gaussian"`` (``-mean(e**2)/2 - log S - log(2*pi)/2``) or ``"unnormalized"``
            (``-mean((x'-mu)**2)``, the convention of Flow-CPS trainers). A step without noise has no density: its
            log-prob is not finite.
        row_dims: how many leading dims are rows, 1 (default) or 2.
        backend: as for the losses.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value. RuntimeError: the named backend
            cannot run.
    """
    layout.check_row_dims(row_dims)
    if log_prob not in (None, "gaussian", "unnormalized"):
        raise ValueError(f"log_prob: got {log_prob!r}, expected None, 'gaussian' or 'unnormalized'")
    if not isinstance(step, SDEStep):
        raise TypeError(f"step: got {type(step).__name__}, expected an SDEStep")
    if prev_sample is not None and (noise is not None or generator is not None):
        raise ValueError(
            "prev_sample: got it together with noise or a generator, expected one source of the next state"
        )
    if noise is not None and generator is not None:
        raise ValueError("noise: got it together with a generator, expected one source of the noise")
    if not isinstance(sample, torch.Tensor):
        raise TypeError(f"sample: got {type(sample).__name__}, expected a tensor")
    shape = tuple(sample.shape[:row_dims])
    stored = None if isinstance(noise, PhiloxNoise) else noise
    named = {"sample": sample, "velocity": velocity}
    named |= {name: x for name, x in (("noise", stored), ("prev_sample", prev_sample)) if x is not None}
    plan = plan_of(named, shape, "velocity")
    device, compute = plan.device, plan.dtype
    dtype = sample.dtype if dtype is None else dtype
    if dtype not in layout.LATENT_DTYPES or (dtype == torch.float64) != (sample.dtype == torch.float64):
        raise TypeError(
            f"dtype: got {dtype} for a {sample.dtype} sample, expected float32, bfloat16 or float16, and float64 for "
            "float64 alone"
        )
    if step.is_scalar:
        table, values = None, step.sampler_values()
    else:
        table, values = step.sampler_table(shape, device, compute), []
    streams, seed, first_stream = noise.kernel_source(shape, device) if isinstance(noise, PhiloxNoise) else (None, 0, 0)
    if prev_sample is None and noise is None:
        noise = stored = _draw(sample.shape, generator, device, compute)
    flags = (return_mean, log_prob is not None, log_prob == "unnormalized")
    next_sample, mean, density = SamplerStep.apply(
        velocity, sample, stored, prev_sample, streams, table, values, seed, first_stream,
        plan, resolve_backend(backend, device.type, compute), dtype, flags,
    )  # fmt: skip
    return SampledStep(
        next_sample if prev_sample is None else prev_sample,
        mean if return_mean else None,
        None if log_prob is None else density.reshape(shape),
        noise,
    )


def sde_step_with_logprob(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """flow_grpo's step under its signature, fused and differentiable in ``model_output``.

    Args:
        scheduler: a diffusers flow scheduler with ``sigmas`` and ``timesteps``; read to the host once per schedule.
        model_output, sample: ``[B, *latent]`` of any rank.
        timestep: ``[B]`` timesteps of the schedule.
        noise_level: eta.
        prev_sample: the next state of a recorded step, same shape as ``sample``; None draws it.
        generator: of the drawn noise, one or one per row.
        sde_type: ``"sde"`` (Flow-SDE) or ``"cps"``; for ``"cps"`` the log-prob is theirs, ``-mean((x'-mu)**2)``.
        return_sqrt_dt: also return ``sqrt(-dt)``.

    Returns:
        ``(prev_sample, log_prob [B], prev_sample_mean, std_dev_t [B, 1, ...])``, float32, and ``sqrt_dt [B, 1, ...]``
        if asked. ``std_dev_t`` is the diffusion ``s`` for ``"sde"`` and ``S`` for ``"cps"``, as in flow_grpo.

    Raises:
        ValueError: unknown ``sde_type``, or anything :func:`sde_step` refuses.
    """
    samplers = {"sde": "flow_sde", "cps": "cps"}
    if sde_type not in samplers:
        raise ValueError(f"sde_type: got {sde_type!r}, expected 'sde' or 'cps'")
    host = HostSchedule.of(scheduler)
    step = host.step(samplers[sde_type], host.indices(timestep), noise_level)
    result = sde_step(
        sample.float(),
        model_output.float(),
        step,
        generator=generator,
        prev_sample=None if prev_sample is None else prev_sample.detach().float(),
        return_mean=True,
        log_prob="gaussian" if sde_type == "sde" else "unnormalized",
    )
    sqrt_dt = torch.sqrt(-on_host(step.dt))
    # one number per row even where all rows share a step, as flow_grpo returns it
    shape = (timestep.numel(),) + (1,) * (sample.ndim - 1)
    std_dev_t = per_row(step.std / sqrt_dt if sde_type == "sde" else step.std, sample).expand(shape)
    results = (result.prev_sample, result.log_prob, result.mean, std_dev_t)
    return (*results, per_row(sqrt_dt, sample).expand(shape)) if return_sqrt_dt else results  # type: ignore[return-value]


def _draw(
    shape: torch.Size,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normal noise; a generator may live on the CPU while the latents do not."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generator):
        raise TypeError(
            f"generator: got {type(generator).__name__}, expected a torch.Generator, or a list of them, one per row of "
            "the first dim"
        )
    if len(generator) != shape[0]:
        raise ValueError(
            f"generator: got {len(generator)} generators, expected one per row of the first dim ({shape[0]})"
        )
    return torch.stack([_draw(shape[1:], one, device, dtype) for one in generator])
