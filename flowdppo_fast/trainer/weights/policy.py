"""The weights that are trained: adapters or everything, their average, and what they were at the start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..objective import ObjectiveConfig
from ..seeds import derive_seed
from .adapters import add_lora, save_lora, without_adapters
from .distributed import Workers
from .ema import MovingAverage, holding
from .names import bare, plain_name
from .precision import HalfCopies, computes_in


class PolicyWeights:
    """Prepares transformers for training; everything else of the pipeline is frozen by the caller.

    Args:
        modules: transformers by name.
        model: what is trained of them.
        seed: of the adapters.
        device: where the weights live.
        objective: whether there is a :meth:`reference` and when it moves. A copy is kept of full weights, and of
            adapters where it moves.
        workers: processes that train the same weights, or shards of them.

    Attributes:
        names: of the trained weights.
        parameters: this process's own tensors of them (:mod:`.sharding`), float32.
        called: the transformers as a pipeline calls them.
        half: whether they compute in ``model.mixed_precision`` themselves, without autocast.
        ema: their moving average, or None.
        classes: of the transformers, by name.

    Raises:
        ValueError: processes that start from different weights.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        model: ModelConfig,
        seed: int,
        device: torch.device,
        objective: ObjectiveConfig,
        workers: Workers,
    ):
        self.called = list(modules.values())
        self.modules = {name: bare(module) for name, module in modules.items()}
        # sharding gives them classes of its own
        self.classes = {name: type(module).__name__ for name, module in self.modules.items()}
        self.model, self.workers = model, workers
        for name, module in self.modules.items():
            # no dropout of activations or labels: the replay must be the function that the rollout was
            module.eval()
            if model.train == "lora":
                add_lora(module, model.rank, model.alpha, model.lora_targets, derive_seed(seed, "adapters", name))
            else:
                module.requires_grad_(True)
            if model.gradient_checkpointing:
                module.enable_gradient_checkpointing()  # type: ignore[operator]
            for parameter in module.parameters():
                if parameter.requires_grad:
                    # sharding moves what it has split
                    where = None if workers.sharded else device
                    parameter.data = parameter.data.to(device=where, dtype=torch.float32)
            if workers.count > 1:
                workers.check_same(_fingerprint(module), f"{name} weights")
        self.parameters = workers.sharding.prepare(self.modules)
        # what is split is gathered in its own dtype, float32
        own = model.train == "lora" and not workers.sharded
        self.half = own and computes_in(self.modules.values(), model.autocast_dtype)
        self._copies = HalfCopies(self.parameters, model.autocast_dtype) if self.half else None
        if self._copies is not None:
            self.parameters = self._copies.masters
        self.names = list(workers.sharding.named)
        if model.compile:
            for module in self.modules.values():
                _compile(module)
        self.ema = None if model.ema_decay is None else MovingAverage(self.parameters, model.ema_decay)
        self._objective = objective
        copied = objective.needs_reference and (model.train == "full" or objective.reference_every is not None)
        self._start = [p.detach().clone() for p in self.parameters] if copied else None

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context the transformers are the reference: what they were before training, unless it moved.

        Raises:
            RuntimeError: full weights whose start was not kept, as no setting needs it.
        """
        if self.model.train == "lora" and self._start is None:
            with without_adapters(list(self.modules.values())):
                yield
            return
        if self._start is None:
            raise RuntimeError(
                "reference: the weights at the start were not kept, expected objective.kl_weight or drift_budget"
            )
        if self.workers.sharded:
            # what is gathered is read from the memory that the shards had at first
            with holding(self.parameters, self._start):
                yield
            return
        own = [p.data for p in self.parameters]
        try:
            for parameter, start in zip(self.parameters, self._start):
                parameter.data = start
            self._written()
            yield
        finally:
            for parameter, data in zip(self.parameters, own):
                parameter.data = data
            self._written()

    @torch.no_grad()
    def move_reference(self, iteration: int) -> None:
        """Where it is time, the reference keeps its decay of itself and takes the rest from the present weights."""
        every = self._objective.reference_every
        if self._start is None or every is None or iteration % every:
            return
        for start, parameter in zip(self._start, self.parameters):
            start.lerp_(parameter.detach(), 1.0 - self._objective.reference_decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the weights are their moving average, if there is one."""
        if self.ema is None:
            yield
            return
        try:
            with holding(self.parameters, self.ema.averages):
                self._written()
                yield
        finally:
            self._written()

    def stepped(self) -> None:
        """To be called after each step of the optimizer."""
        self._written()
        if self.ema is not None:
            self.ema.update()

    def _written(self) -> None:
        """The transformers follow what was written to :attr:`parameters`."""
        if self._copies is not None:
            self._copies.refresh()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by file: whole tensors; all processes have to come here."""
        return {file: self.workers.sharding.whole(values) for file, values in self._kept().items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores :meth:`state`.

        Raises:
            ValueError: other weights than those of the pipeline.
        """
        for file, values in self._kept().items():
            saved = tensors.get(file, {})
            odd = sorted(set(saved) ^ set(self.names))
            if odd:
                raise ValueError(f"checkpoint: {file} has other weights than the pipeline, {odd[0]!r} among them")
            for name, shape in self.workers.sharding.shapes.items():
                if saved[name].shape != shape:
                    raise ValueError(
                        f"checkpoint: {file} has shape {list(saved[name].shape)} for {name!r}, expected that of the "
                        f"pipeline's weight, {list(shape)}"
                    )
            for own, value in zip(self.workers.sharding.own(saved), values):
                value.copy_(own)
        self._written()

    def save_pretrained(self, folder: Path) -> None:
        """Writes the (averaged) weights as diffusers loads them, one folder per transformer, from the main process; all
        processes have to come here."""
        with self.averaged():
            apart = self.workers.sharded or self._copies is not None
            whole = self.workers.sharding.whole(self.parameters) if apart else {}
            for name, module in self.modules.items():
                own = {k.removeprefix(f"{name}."): value for k, value in whole.items() if k.startswith(f"{name}.")}
                # its own state has shards, or copies in half precision
                hook = module.register_state_dict_post_hook(lambda _, state, *__, own=own: _plain(state, own))
                try:
                    if self.workers.is_main:
                        if self.model.train == "lora":
                            self.workers.attempt(save_lora, module, folder / name)
                        else:
                            self.workers.attempt(module.save_pretrained, folder / name)  # type: ignore[arg-type]
                finally:
                    hook.remove()

    def _kept(self) -> dict[str, Sequence[Tensor]]:
        kept = {
            "weights": self.parameters,
            "ema": None if self.ema is None else self.ema.averages,
            "start": self._start,
        }
        return {file: values for file, values in kept.items() if values is not None}


def _fingerprint(module: nn.Module) -> list[int]:
    """Sums of the bits of all plain tensors: the same on any device, and in any order of summation."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers()) if type(t) in (Tensor, nn.Parameter)]
    bits = [t.flatten().view(whole[t.element_size()]) for t in tensors if t.element_size() in whole]
    return torch.stack([b.sum(dtype=torch.int64).cpu() for b in bits]).tolist()


def _plain(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for key in [key for key in state if plain_name(key) != key]:
        state[plain_name(key)] = state.pop(key)
    state.update(own)


def _compile(module: nn.Module) -> None:
    # block by block where the model knows its blocks: minutes less, and the hooks on the whole stay outside
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks()  # type: ignore[operator]
    else:
        module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
