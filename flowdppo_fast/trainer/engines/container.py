"""A rollout that was sampled elsewhere: what the loss and the trainer's update need of it, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...noise import PhiloxNoise
from ...samplers import SDEStep
from ..record.scheduler import trainable_step

_KEY = "flowdppo_rollout"
_VERSION = 1
_CONDITIONING = "conditioning."


@dataclass
class EngineRollout:
    """``B`` rows with ``S`` chosen steps out of a schedule of ``T``.

    Attributes:
        velocity: ``[B, S, *latent]`` the rollout policy's velocities after guidance, in the dtype of its model.
        noise: ``[B, S, *latent]`` float32, or :class:`PhiloxNoise` with int64 streams ``[B, S]``.
        sigmas: ``[T+1]`` float32 noise levels, from noise (at most 1) to data.
        steps: indices of the chosen steps, ascending.
        states: ``[B, K, *latent]`` latents before the steps ``state_steps``; ``T`` means those after the last one.
        state_steps: indices in 0..T, ascending.
        sampler, eta: of the chosen steps.
        conditioning: ``[B, ...]`` by name, such as embeddings of the prompts; may be empty.

    Raises:
        ValueError, TypeError: shapes, dtypes or indices that do not fit together.
    """

    velocity: Tensor
    noise: Tensor | PhiloxNoise
    sigmas: Tensor
    steps: tuple[int, ...]
    states: Tensor
    state_steps: tuple[int, ...]
    sampler: str = "flow_sde"
    eta: float = 0.7
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps, self.state_steps = tuple(self.steps), tuple(self.state_steps)
        rows, latent = self.velocity.shape[:1], self.velocity.shape[2:]
        wanted: dict[str, tuple[Tensor, Sequence[int]]] = {
            "velocity": (self.velocity, (*rows, len(self.steps), *latent)),
            "states": (self.states, (*rows, len(self.state_steps), *latent)),
        }
        if isinstance(self.noise, PhiloxNoise):
            if not isinstance(self.noise.stream, Tensor):
                raise TypeError("noise: got one first stream for all rows, expected an int64 stream per row and step")
            wanted["noise.stream"] = (self.noise.stream, (*rows, len(self.steps)))
        else:
            wanted["noise"] = (self.noise, (*rows, len(self.steps), *latent))
        for name, value in self.conditioning.items():
            wanted[f"{_CONDITIONING}{name}"] = (value, (*rows, *value.shape[1:]))
        for name, (value, shape) in wanted.items():
            if tuple(value.shape) != tuple(shape):
                raise ValueError(f"{name}: got shape {list(value.shape)}, expected {list(shape)}")
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{name}: got numbers that are not finite: the model has diverged")
        if self.sigmas.dtype != torch.float32 or self.sigmas.ndim != 1:
            raise ValueError(f"sigmas: got {self.sigmas.dtype} {list(self.sigmas.shape)}, expected float32 [T+1]")
        last = len(self.sigmas) - 1
        for name, indices, end in (("steps", self.steps, last - 1), ("state_steps", self.state_steps, last)):
            if list(indices) != sorted(set(indices)) or not all(0 <= index <= end for index in indices):
                raise ValueError(f"{name}: got {list(indices)}, expected ascending indices from 0 to {end}")

    def __len__(self) -> int:
        return len(self.velocity)

    @property
    def sde_step(self) -> SDEStep:
        """The chosen steps, stacked to ``[S]``: ``loss(new, rollout.velocity, rollout.noise, rollout.sde_step, ...)``.

        Raises:
            ValueError: a step that cannot be a training row, such as the last one.
        """
        levels = self.sigmas.tolist()
        return SDEStep.stack([trainable_step(self.sampler, levels, index, self.eta) for index in self.steps])

    def state(self, index: int) -> Tensor | None:
        """Latents ``[B, *latent]`` before step ``index``, None where they were not kept."""
        return self.states[:, self.state_steps.index(index)] if index in self.state_steps else None

    def check_steps(self) -> float:
        """How far chosen steps are from ``x' = a*x + b*v + S*e``, over the size of ``x'``, where both states are kept.

        Raises:
            ValueError: further than their dtype explains: the engine took other steps than ``sampler`` and ``eta`` say.
        """
        noise = self.noise
        if isinstance(noise, PhiloxNoise):
            noise = noise.materialize(tuple(self.velocity.shape), row_dims=2, device=self.velocity.device)
        worst, levels = 0.0, self.sigmas.tolist()
        for place, index in enumerate(self.steps):
            before, after = self.state(index), self.state(index + 1)
            if before is None or after is None:
                continue
            step = trainable_step(self.sampler, levels, index, self.eta)
            made = step.sample_coef * before.double() + step.velocity_coef * self.velocity[:, place].double()
            made += step.std * noise[:, place].double()
            worst = max(worst, float((made - after.double()).abs().max() / after.double().abs().max().clamp_min(1e-12)))
            bound = max(4 * torch.finfo(after.dtype).eps, 1e-4)
            if not worst <= bound:
                raise ValueError(
                    f"rollout: step {index} is off by {worst:.3g} of its size from the one that sampler="
                    f"{self.sampler!r} with eta={self.eta:g} takes from sigma={levels[index]:.4g} to "
                    f"{levels[index + 1]:.4g}, expected at most {bound:.3g}; give the engine the trainer's sampler, "
                    "eta and schedule"
                )
        return worst

    @classmethod
    def join(cls, parts: Sequence[EngineRollout]) -> EngineRollout:
        """Rows of several rollouts of the same steps, one after the other.

        Raises:
            ValueError: rollouts with other steps, levels, samplers or kinds of noise.
        """
        first = parts[0]
        for part in parts[1:]:
            for name in ("steps", "state_steps", "sampler", "eta"):
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(f"{name}: got {getattr(part, name)!r} and {getattr(first, name)!r}, expected one")
            if not torch.equal(part.sigmas, first.sigmas) or part.conditioning.keys() != first.conditioning.keys():
                raise ValueError("rollout: parts have other levels or conditioning, expected the same in all of them")
        noises = [part.noise for part in parts]
        stored = [noise for noise in noises if isinstance(noise, Tensor)]
        seeded = [noise for noise in noises if isinstance(noise, PhiloxNoise)]
        if (stored and seeded) or len({noise.seed for noise in seeded}) > 1:
            raise ValueError("noise: got stored and seeded parts, or several seeds, expected one kind and one seed")
        noise: Tensor | PhiloxNoise = (
            PhiloxNoise(seeded[0].seed, torch.cat([torch.as_tensor(one.stream) for one in seeded]))
            if seeded
            else torch.cat(stored)
        )
        conditioning = {name: torch.cat([part.conditioning[name] for part in parts]) for name in first.conditioning}
        velocity, states = (torch.cat([getattr(part, name) for part in parts]) for name in ("velocity", "states"))
        return cls(
            velocity, noise, first.sigmas, first.steps, states, first.state_steps, first.sampler, first.eta,
            conditioning,
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: ``velocity``, ``noise`` or ``noise_stream``, ``sigmas``, ``states`` and
        ``conditioning.*``; everything else is JSON in its metadata under ``flowdppo_rollout``."""
        described = {
            "version": _VERSION, "steps": self.steps, "state_steps": self.state_steps, "sampler": self.sampler,
            "eta": self.eta,
        }  # fmt: skip
        tensors = {"velocity": self.velocity, "sigmas": self.sigmas, "states": self.states}
        if isinstance(self.noise, PhiloxNoise):
            described["noise_seed"] = self.noise.seed
            tensors["noise_stream"] = torch.as_tensor(self.noise.stream)
        else:
            tensors["noise"] = self.noise
        tensors |= {f"{_CONDITIONING}{name}": value for name, value in self.conditioning.items()}
        packed = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(packed, Path(path).expanduser(), {_KEY: json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> EngineRollout:
        """Reads a file that :meth:`save`, or another program in the same form, wrote.

        Raises:
            ValueError: no such file, or one that is not of this form.
        """
        path = Path(path).expanduser()
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {}).get(_KEY, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: no rollout could be read: {error}; expected a safetensors file") from None
        if not isinstance(described, dict) or described.get("version") != _VERSION:
            raise ValueError(f"{path}: got metadata {described!r}, expected {_KEY} of version {_VERSION}")
        seed = described.get("noise_seed")
        wanted = ["velocity", "sigmas", "states", "noise" if seed is None else "noise_stream"]
        missing = [name for name in wanted if name not in tensors]
        missing += [name for name in ("steps", "state_steps", "sampler", "eta") if name not in described]
        if missing:
            raise ValueError(f"{path}: got no {', '.join(missing)}, expected a whole rollout")
        return cls(
            tensors["velocity"],
            tensors["noise"] if seed is None else PhiloxNoise(seed, tensors["noise_stream"]),
            tensors["sigmas"],
            described["steps"],
            tensors["states"],
            described["state_steps"],
            described["sampler"],
            described["eta"],
            {
                name.removeprefix(_CONDITIONING): value
                for name, value in tensors.items()
                if name.startswith(_CONDITIONING)
            },
        )
