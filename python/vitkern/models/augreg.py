# SPDX-License-Identifier: Apache-2.0
"""Weights of Google's vision transformers (AugReg and later) from their .npz files."""

from __future__ import annotations

import torch
from torch import Tensor


def from_augreg(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts to timm's names and layouts: Linear [out, in], convolutions [out, in, height, width]."""
    try:
        return _translated(arrays)
    except KeyError as error:
        raise ValueError(f"the checkpoint has the names of AugReg, but lacks {error}") from error


def _translated(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    arrays = {name.removeprefix("params/"): array for name, array in arrays.items()}
    kernel = arrays["embedding/kernel"]  # [16, 16, 3, D]
    weights = {
        "patch_embed.proj.weight": kernel.permute(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["embedding/bias"],
        "pos_embed": arrays["Transformer/posembed_input/pos_embedding"],
        "cls_token": arrays["cls"],
        "norm.weight": arrays["Transformer/encoder_norm/scale"],
        "norm.bias": arrays["Transformer/encoder_norm/bias"],
    }
    blocks = {name.split("/")[1] for name in arrays if name.startswith("Transformer/encoderblock_")}
    for block in blocks:
        prefix = f"Transformer/{block}/"
        parts = {
            name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)
        }
        target = f"blocks.{block.removeprefix('encoderblock_')}."
        weights |= {target + name: array for name, array in _block(parts).items()}
    return {name: array.contiguous() for name, array in weights.items()}


def _block(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """One block. Numbers in names count all layers in older files, layers of one kind in newer ones."""

    def found(kind: str, place: int) -> str:
        layers = sorted({name.split("/")[0] for name in parts if name.startswith(kind)})
        if place >= len(layers):
            raise KeyError(f"{kind}{place}")
        return layers[place]

    attention, mlp = found("MultiHeadDotProductAttention_", 0), found("MlpBlock_", 0)
    heads = [parts[f"{attention}/{name}/kernel"] for name in ("query", "key", "value")]  # [D, M, D / M]
    head_biases = [parts[f"{attention}/{name}/bias"] for name in ("query", "key", "value")]  # [M, D / M]
    weights = {
        "attn.qkv.weight": torch.cat([head.flatten(1).T for head in heads]),
        "attn.qkv.bias": torch.cat([bias.flatten() for bias in head_biases]),
        "attn.proj.weight": parts[f"{attention}/out/kernel"].flatten(0, 1).T,  # [M, D / M, D]
        "attn.proj.bias": parts[f"{attention}/out/bias"],
    }
    for place in (0, 1):
        norm = found("LayerNorm_", place)
        weights[f"norm{place + 1}.weight"] = parts[f"{norm}/scale"]
        weights[f"norm{place + 1}.bias"] = parts[f"{norm}/bias"]
        weights[f"mlp.fc{place + 1}.weight"] = parts[f"{mlp}/Dense_{place}/kernel"].T
        weights[f"mlp.fc{place + 1}.bias"] = parts[f"{mlp}/Dense_{place}/bias"]
    return weights
