"""The kohya layout of LoRA files, which sd-scripts, musubi-tuner and ComfyUI read.

Layers have the names of the published checkpoint with ``_`` for ``.``, matrices are ``lora_down`` and ``lora_up``, and
every layer brings its alpha. Where the published model has one matrix and diffusers several (q, k and v), their
adapters become one, block by block: ``rank`` and ``alpha`` grow by the number of blocks, so their quotient stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def _named(theirs: str, ours: str, layers: str) -> dict[str, tuple[str, ...]]:
    """``theirs=ours`` pairs, apart by blanks, below two prefixes; one of theirs may be several of ours, with ``,``."""
    pairs = (pair.split("=") for pair in layers.split())
    return {theirs + name: tuple(ours + part for part in parts.split(",")) for name, parts in pairs}


# published name (without what follows from the rule above) to the layers that diffusers has in its place; # is a number
_FLUX_DOUBLE = (
    "img_attn_qkv=attn.to_q,attn.to_k,attn.to_v img_attn_proj=attn.to_out.0 "
    "txt_attn_qkv=attn.add_q_proj,attn.add_k_proj,attn.add_v_proj txt_attn_proj=attn.to_add_out "
)
_MLPS = "{0}0={1}.net.0.proj {0}2={1}.net.2 "
_SD3_JOINT = (
    "x_block_attn_qkv=attn.to_q,attn.to_k,attn.to_v x_block_attn_proj=attn.to_out.0 "
    "x_block_attn2_qkv=attn2.to_q,attn2.to_k,attn2.to_v x_block_attn2_proj=attn2.to_out.0 "
    "context_block_attn_qkv=attn.add_q_proj,attn.add_k_proj,attn.add_v_proj context_block_attn_proj=attn.to_add_out "
    "x_block_mlp_fc1=ff.net.0.proj x_block_mlp_fc2=ff.net.2 "
    "context_block_mlp_fc1=ff_context.net.0.proj context_block_mlp_fc2=ff_context.net.2 "
    "x_block_adaLN_modulation_1=norm1.linear"
)
_WAN_BLOCK = (
    "self_attn_q=attn1.to_q self_attn_k=attn1.to_k self_attn_v=attn1.to_v self_attn_o=attn1.to_out.0 "
    "cross_attn_q=attn2.to_q cross_attn_k=attn2.to_k cross_attn_v=attn2.to_v cross_attn_o=attn2.to_out.0 "
    "cross_attn_k_img=attn2.add_k_proj cross_attn_v_img=attn2.add_v_proj "
)
_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "FluxTransformer2DModel": {
        **_named(
            "double_blocks_#_",
            "transformer_blocks.#.",
            f"{_FLUX_DOUBLE}{_MLPS.format('img_mlp_', 'ff')}{_MLPS.format('txt_mlp_', 'ff_context')}"
            "img_mod_lin=norm1.linear txt_mod_lin=norm1_context.linear",
        ),
        **_named(
            "single_blocks_#_",
            "single_transformer_blocks.#.",
            "linear1=attn.to_q,attn.to_k,attn.to_v,proj_mlp linear2=proj_out modulation_lin=norm.linear",
        ),
    },
    "Flux2Transformer2DModel": {
        **_named(
            "double_blocks_#_",
            "transformer_blocks.#.",
            f"{_FLUX_DOUBLE}img_mlp_0=ff.linear_in img_mlp_2=ff.linear_out "
            "txt_mlp_0=ff_context.linear_in txt_mlp_2=ff_context.linear_out",
        ),
        **_named(
            "single_blocks_#_",
            "single_transformer_blocks.#.",
            "linear1=attn.to_qkv_mlp_proj linear2=attn.to_out",
        ),
    },
    "SD3Transformer2DModel": _named("joint_blocks_#_", "transformer_blocks.#.", _SD3_JOINT),
    "WanTransformer3DModel": _named("blocks_#_", "blocks.#.", _WAN_BLOCK + _MLPS.format("ffn_", "ffn")),
    "QwenImageTransformer2DModel": _named(
        "transformer_blocks_#_",
        "transformer_blocks.#.",
        " ".join(
            f"{name.replace('.', '_')}={name}"
            for name in (
                *(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
                *(f"attn.add_{letter}_proj" for letter in "qkv"),
                *(f"{side}_{layer}" for side in ("img", "txt") for layer in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
            )
        ),
    ),
}
# outputs per input of layers that may be missing from a matrix of several; 1 for all others
_WIDTHS = {"proj_mlp": 4}


def kohya(tensors: Mapping[str, Tensor], alpha: float, kind: str | None) -> dict[str, Tensor]:
    """An adapter in the kohya layout.

    Args:
        tensors: ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight`` by diffusers' names of layers.
        alpha: of all layers.
        kind: class of the transformer.

    Raises:
        ValueError: a class or a layer whose published name is not known here.
    """
    if kind not in _LAYERS:
        raise ValueError(
            "layout: got 'kohya' for a transformer of class "
            f"{kind or 'unknown (an older version wrote the checkpoint)'}, expected one of {', '.join(_LAYERS)}; the "
            "layout 'diffusers' fits all"
        )
    places = {part: (name, parts) for name, parts in _LAYERS[kind].items() for part in parts}
    fused: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
    for layer in sorted({key.partition(".lora_")[0] for key in tensors}):
        number = re.search(r"\d+", layer)
        pattern = re.sub(r"\d+", "#", layer, count=1)
        if pattern not in places:
            raise ValueError(
                f"layout: got 'kohya' and an adapter on {layer}, expected layers of {kind} that the published model "
                "has alike; the layout 'diffusers' fits all"
            )
        name, parts = places[pattern]
        whole = f"lora_unet_{name.replace('#', number.group() if number else '')}"
        fused.setdefault(whole, (parts, {}))[1][pattern] = layer
    return {key: value for name, entry in fused.items() for key, value in _entries(name, *entry, tensors, alpha)}


def _entries(
    name: str, parts: tuple[str, ...], layers: Mapping[str, str], tensors: Mapping[str, Tensor], alpha: float
) -> Iterator[tuple[str, Tensor]]:
    """One matrix of the published model, whose rows are those of ``parts``, of which ``layers`` have an adapter."""
    pairs = {
        part: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for part, layer in layers.items()
    }
    present = [part for part in parts if part in pairs]
    down = torch.cat([pairs[part][0] for part in present])
    rows, start = [], 0
    for part in parts:
        if part in pairs:
            own = pairs[part][1]
            block = own.new_zeros(len(own), len(down))
            block[:, start : start + own.shape[1]] = own
            start += own.shape[1]
        else:
            block = down.new_zeros(_WIDTHS.get(part.rpartition(".")[2], 1) * down.shape[1], len(down))
        rows.append(block)
    yield f"{name}.lora_down.weight", down
    yield f"{name}.lora_up.weight", torch.cat(rows)
    # exact in any case, where the matrices may be bfloat16
    yield f"{name}.alpha", torch.tensor(alpha * len(present), dtype=torch.float32)
