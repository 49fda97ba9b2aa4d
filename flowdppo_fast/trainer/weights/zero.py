"""DeepSpeed's ZeRO stages 1 to 3 as a way to hold the trained weights.

One engine is around all transformers. A micro-batch's replay runs inside one call of it, so that its hooks see one
forward and one backward, however often a transformer is called in between. DeepSpeed reduces gradients and hands a flat
shard with its gradient to its optimizer, which here only calls the trainer back: whether a step is taken, and which, is
decided by :class:`~flowdppo_fast.trainer.weights.optimizer.PolicyOptimizer` as in every other run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available, parse_choice_from_env, parse_flag_from_env
from torch import Tensor, nn

from .ema import holding
from .sharding import BUCKET, T, WholeWeights

# one flat shard per process, and one step of it
_ONE_GROUP = 1 << 62


class ZeroWeights(WholeWeights):
    """ZeRO of a ``stage``; the one own tensor is this process's part of all trained weights, flat and float32."""

    split = True

    def __init__(self, device: torch.device, count: int, rank: int, stage: int):
        super().__init__(device, count, rank)
        self.stage, self.kind = stage, f"DeepSpeed ZeRO-{stage}"
        self._shard: nn.Parameter = None  # type: ignore[assignment]
        self._engine: Any = None

    def prepare(self, modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
        """Moves the transformers to the device and splits what the stage splits."""
        import deepspeed

        if self.device.type == "cpu":
            # gloo sums as well as an operator that every first run would compile
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._collect(modules)
        self._around = around = _Around(modules)
        settings = _settings(self.stage)
        if self.stage == 3:
            # weight by weight, so that the whole need not fit on the device
            deepspeed.zero.Init(module=around, config_dict_or_path=settings)
            for buffer in around.buffers():
                buffer.data = buffer.data.to(self.device)
        self._client = _Client(list(self.named.values()))
        self._engine, zero, *_ = deepspeed.initialize(model=around, optimizer=self._client, config=settings)
        groups = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        (self._shard,) = groups
        self._followed = self._shard._version
        return [self._shard]

    def inside(self, function: Callable[[], T], *, update: bool = False) -> T:
        """``function()`` as the forward of the engine's module, or as its optimizer's step."""
        return self._step(function) if update else self._call(function)

    def _call(self, function: Callable[[], T]) -> T:
        if self._followed != self._shard._version:
            self._follow()
        output, result = self._engine(function), self._around.result
        self._around.result = None
        # hooks are put on tensors; DeepSpeed warns of whatever else comes out of a module
        return result if output is None else output

    def _step(self, take: Callable[[], T]) -> T:
        """DeepSpeed makes the shard's gradient, calls ``take()``, and gives all processes what became of the shard."""
        self._client.take = take
        self._engine.step()
        if self._client.take is not None:
            # stage 3 leaves out what is not finite before it asks its optimizer
            self._shard.grad = torch.full_like(self._shard, float("nan"))
            self._client.step()
            self._shard.grad = None
        if self.stage == 3:
            # a weight that the next update does not reach would keep this gradient
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        self._followed = self._shard._version
        return self._client.taken

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Means over processes become sums."""
        torch._foreach_mul_(list(gradients), float(self.count))

    @torch.no_grad()
    def _follow(self) -> None:
        """Gives the transformers what was written to the shard outside of a step."""
        self._followed = self._shard._version
        if self.stage < 3:
            self._engine.optimizer.update_lp_params()
            return
        from deepspeed.utils import safe_get_local_fp32_param

        weights: Any = self.named.values()
        for parameter in weights:
            parameter.ds_tensor.copy_(safe_get_local_fp32_param(parameter))

    def whole(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gathered one by one, by way of the shard's own memory."""
        from deepspeed.utils import safe_get_full_fp32_param

        (value,) = values
        if value.ndim == 0:
            return {name: value.clone() for name in self.named}
        with holding([self._shard], [value]):
            return {name: self._kept(safe_get_full_fp32_param(p)) for name, p in self.named.items()}

    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """One flat tensor; zero where it is padded."""
        first = next(iter(whole.values()))
        if first.ndim == 0:
            return [first]
        with holding([self._shard], [torch.zeros_like(self._shard)]):
            for name, parameter in self.named.items():
                self._write(parameter, whole[name].to(self.device))
            return [self._shard.detach().clone()]

    def _write(self, parameter: Any, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage < 3:
            safe_set_full_fp32_param(parameter, value)
            return
        # the last part may be padded, which DeepSpeed's own way from whole values does not allow for
        size = parameter.partition_numel()
        part = value.flatten()[self.rank * size : (self.rank + 1) * size]
        safe_set_local_fp32_param(parameter, nn.functional.pad(part, (0, size - len(part))))


class _Around(nn.Module):
    """All transformers as the one module of an engine."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.transformers = nn.ModuleDict(modules)
        self.eval()

    def forward(self, function: Callable[[], Any]) -> Tensor | None:
        self.result = function()
        return self.result if isinstance(self.result, Tensor) else None


class _Client(torch.optim.Optimizer):
    """What DeepSpeed takes for its optimizer."""

    take: Callable[[], Any] | None = None
    taken: Any = None

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.take is not None
        self.taken, self.take = self.take(), None


def zero_stage() -> int:
    """The stage that the launcher asks for.

    Raises:
        ValueError: DeepSpeed is not installed, or a setting that this trainer decides or cannot follow.
    """
    if not is_deepspeed_available():
        raise ValueError("accelerate: got DEEPSPEED, expected the package deepspeed (flowdppo_fast[deepspeed])")
    for name in ("config_file", "offload_optimizer_device", "offload_param_device"):
        value = parse_choice_from_env(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none")
        if value != "none":
            raise ValueError(f"accelerate: got deepspeed_config {name}: {value}, expected none, and a zero_stage")
    if parse_flag_from_env("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        raise ValueError(
            "accelerate: got deepspeed_config zero3_init_flag: true, expected false: nothing is split of text encoders "
            "and reward models"
        )
    stage = parse_choice_from_env("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise ValueError(
            f"accelerate: got deepspeed_config zero_stage: {stage}, expected 1, 2 or 3; DDP splits nothing"
        )
    return int(stage)


def _settings(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": BUCKET}
    if stage < 3:
        zero |= {"compute_grad_norm": False, "allgather_bucket_size": BUCKET}
    else:
        # gathered anew for each call: what stays gathered would be old after a change of the shard
        zero |= {"sub_group_size": _ONE_GROUP, "stage3_param_persistence_threshold": 0}
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        zero["memory_efficient_linear"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
