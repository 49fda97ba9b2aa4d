"""Run as a script: dtypes, kernel launches and bytes of a transformer's call by CUDA's own autocast, without a GPU."""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from flowdppo_fast.trainer.weights.adapters import add_lora  # noqa: E402
from flowdppo_fast.trainer.weights.precision import HalfCopies, autocast  # noqa: E402

HALF = torch.bfloat16
_VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select"}
_VIEWS |= {"split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "as_strided", "empty", "unsqueeze_"}


class Work(TorchDispatchMode):
    """Counts operations that launch a kernel, and the bytes that they read and write."""

    launches = bytes = casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        if name in _VIEWS or name.startswith(("empty", "new_empty")):
            return out
        self.launches += 1
        self.casts += name == "_to_copy"
        self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves((args, out)) if torch.is_tensor(x))
        return out


def on_cuda(module: torch.nn.Module) -> torch.nn.Module:
    """Gives ``module`` weights of the same shapes on the device; ``to`` cannot swap a fake tensor for a real one."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                own = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                part._parameters[name] = torch.nn.Parameter(own, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return module


def transformer() -> SD3Transformer2DModel:
    with unset_fake_temporarily():
        made = SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=16, num_layers=4, attention_head_dim=64, num_attention_heads=4,
            joint_attention_dim=256, caption_projection_dim=256, pooled_projection_dim=64, pos_embed_max_size=32,
        )  # fmt: skip
        made.to(HALF).requires_grad_(False)
        add_lora(made, 16, 32.0, None, 0)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    for parameter in on_cuda(made).parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return made


def watched(copies: bool) -> dict[str, Any]:
    """A forward and a backward: as a run makes them, or in autocast over everything with float32 adapters."""
    model = transformer()
    if copies:
        HalfCopies([p for p in model.parameters() if p.requires_grad], HALF)
    kinds: dict[str, set[str]] = {}
    for module in model.modules():
        module.register_forward_hook(
            lambda m, _, out: kinds.setdefault(type(m).__name__, set()).update(
                str(x.dtype) for x in tree_leaves(out) if torch.is_tensor(x)
            )
        )
    given = {
        "hidden_states": torch.randn(8, 16, 32, 32, device="cuda", dtype=HALF),
        "encoder_hidden_states": torch.randn(8, 64, 256, device="cuda", dtype=HALF),
        "pooled_projections": torch.randn(8, 64, device="cuda", dtype=HALF),
        "timestep": torch.ones(8, device="cuda"),
    }
    with Work() as work, torch.autocast("cuda", HALF, enabled=not copies):
        out = model(**given, return_dict=False)[0]
        out.backward(torch.ones_like(out))
    return {
        "velocity": str(out.dtype),
        "kinds": {name: sorted(dtypes) for name, dtypes in kinds.items()},
        "launches": work.launches,
        "casts": work.casts,
        "bytes": work.bytes,
    }


def decoded(around_everything: bool) -> list[str]:
    """Dtypes of a float32 VAE's convolutions, with a transformer in autocast."""
    with unset_fake_temporarily():
        vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    on_cuda(vae)
    dtypes: set[str] = set()
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: dtypes.add(str(out.dtype)))
    scope = torch.autocast("cuda", HALF) if around_everything else autocast("cuda", HALF, [torch.nn.Linear(1, 1)])
    with torch.no_grad(), scope:
        vae.decode(torch.randn(1, 4, 8, 8, device="cuda"))
    return sorted(dtypes)


def main() -> None:
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    # the backend is chosen by the device that is there
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: q * k.mean() * v.mean()
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = {
            "autocast": watched(copies=False),
            "copies": watched(copies=True),
            "vae inside": decoded(around_everything=True),
            "vae outside": decoded(around_everything=False),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
