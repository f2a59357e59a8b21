# SPDX-License-Identifier: Apache-2.0
"""Loads published weights: DeiT, AugReg, MAE, DINOv2, timm, BEiT, BEiTv2, Uni-Perceiver, mm checkpoints."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.augreg import from_augreg
from vitkern.models.blocks import resize_positions
from vitkern.models.pyramid import Classifier
from vitkern.models.relative_positions import resize_table

StateDict = dict[str, Tensor]
TABLE = "relative_position_bias_table"
CONSTANTS = ("relative_position_index", "attn_mask")
# None; a class token; a class and a distillation token; a class token and four registers.
TOKENS_BEFORE = (0, 1, 2, 5)
WRAPPED = re.compile(r"^(?:module\.|_orig_mod\.)+")  # by DistributedDataParallel and torch.compile

# Uni-Perceiver's names in its own checkpoints and in the adapter's.
UNIPERCEIVER = {
    "fused_encoder.": "",
    "in_proj_": "in_proj.",
    "video_embed.": "visual_embed.",
    "visual_embed.embeddings.": "visual_embed.patch_embed.proj.",
    "visual_embed.embeddings_st_pos.": "visual_embed.patch_embed.",
}


class Loaded(NamedTuple):
    """Keys of the model that the checkpoint lacks, and keys of the checkpoint that the model lacks."""

    missing: list[str]
    unexpected: list[str]


def read_checkpoint(path: str | Path) -> Any:
    """Reads a file: .npz (AugReg), .safetensors, or a file of torch with only tensors and plain values."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: download it, then give its path")
    try:
        return _read(Path(path))
    except (ImportError, MemoryError, PermissionError):
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and _is_of_torch(Path(path)):
            raise ValueError(
                f"{path} holds more than tensors and plain values: if you trust its source, read it with "
                "torch.load(path, weights_only=False) and give load_checkpoint its state dict"
            ) from error
        kind = type(error).__name__
        raise ValueError(f"{path} is not a checkpoint, or is truncated ({kind}): {error}") from error


def _is_of_torch(path: Path) -> bool:
    """Whether the file begins as a zip archive or, from older versions of torch, as a pickle."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _read(path: Path) -> Any:
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def find_state_dict(checkpoint: Any) -> StateDict:
    """The state dict inside a trainer's checkpoint."""
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint is a dict of tensors, got {type(checkpoint).__name__}")
    return {WRAPPED.sub("", key): value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def of_backbone(tensors: StateDict) -> StateDict:
    """The backbone's tensors in a whole detector or segmentor, under the backbone's own names."""
    if not any(key.startswith("backbone.") for key in tensors):
        return tensors
    return {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}


def tensors_for(model: nn.Module, checkpoint: Any) -> StateDict:
    """A checkpoint's tensors under the model's names; a model with a backbone also takes a backbone's checkpoint."""
    tensors, backbone = find_state_dict(checkpoint), getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return convert(of_backbone(tensors), model)
    whole = any(key.startswith("backbone.") for key in tensors)
    heads = {key: value for key, value in tensors.items() if whole and not key.startswith("backbone.")}
    converted = convert(of_backbone(tensors), backbone)
    return heads | {f"backbone.{key}": value for key, value in converted.items()}


def convert(tensors: StateDict, model: nn.Module) -> StateDict:
    """Converts names, shapes and sizes of published weights to the model's."""
    if any(key.startswith(("Transformer/", "params/Transformer/")) for key in tensors):
        tensors = from_augreg(tensors)
    if any(key.startswith("fused_encoder.") for key in tensors):
        tensors = {_renamed(key, UNIPERCEIVER): value for key, value in tensors.items()}
    tensors = {_renamed(k, {".ls1.gamma": ".gamma1", ".ls2.gamma": ".gamma2"}): v for k, v in tensors.items()}
    if hasattr(model, "translate"):
        tensors = model.translate(tensors)  # type: ignore[operator]
    own = model.state_dict()
    shared = tensors.pop(f"rel_pos_bias.{TABLE}", None)
    if shared is not None:
        tensors |= {key: shared for key in own if key.endswith(f"attn.{TABLE}")}
        if f"rel_pos_bias.{TABLE}" in own:
            tensors[f"rel_pos_bias.{TABLE}"] = shared
    # Buffers for the checkpoint's window and image size are not the model's.
    tensors = {k: v for k, v in tensors.items() if not k.endswith(CONSTANTS)}
    grid = next((module.grid_size for module in model.modules() if hasattr(module, "grid_size")), None)
    for key in tensors.keys() & own.keys():
        tensors[key] = _fitted(key, tensors[key], own[key], grid)
    return tensors


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def _fitted(key: str, tensor: Tensor, own: Tensor, grid: Any) -> Tensor:
    """The tensor, resized if it depends on the size of the image, the window or the patches."""
    if tensor.shape == own.shape:
        return tensor
    is_image = tensor.dim() == own.dim() == 4
    if key == "patch_embed.proj.weight" and is_image and tensor.shape[:2] == own.shape[:2]:
        return F.interpolate(tensor.float(), size=own.shape[2:], mode="bilinear", align_corners=False)
    if key.rpartition(".")[2] == "pos_embed" and tensor.shape[-1] == own.shape[-1]:
        return resize_pos_embed(tensor, own.shape[1], grid)
    if key.endswith("spatial_pos_embed.weight") and tensor.shape[-1] == own.shape[-1]:
        return resize_pos_embed(tensor[None], own.shape[0], grid)[0]
    if key.endswith(TABLE) and tensor.shape[-1] == own.shape[-1]:
        return resize_table(tensor, own.shape[0])
    return tensor


def resize_pos_embed(
    positions: Tensor, tokens: int, size: tuple[int, int] | None = None, *, old: tuple[int, int] | None = None
) -> Tensor:
    """Resizes position embeddings [1, N, D] to another number of tokens; one may be the class token's.

    The grid comes last. If several tokens precede it (distillation, registers), the first is kept.

    Args:
        size: the new grid; None: it is square.
        old: the grid they were trained on; None: it is square.
    """
    count = positions.shape[1]
    rows, columns = old or (math.isqrt(count), math.isqrt(count))
    before = count - rows * columns
    if before not in TOKENS_BEFORE:
        raise ValueError(
            f"{count} position embeddings do not form a grid of {rows} x {columns} with {TOKENS_BEFORE} tokens before: "
            "vitkern.models.checkpoints.resize_pos_embed(positions, tokens, size, old=(rows, columns)) resizes those "
            "of a grid that is not square"
        )
    new = size or (math.isqrt(tokens), math.isqrt(tokens))
    first = positions[:, :1] if before else torch.zeros_like(positions[:, :1])
    grid = positions[:, before:].float()
    if (rows, columns) != new:
        grid = resize_positions(grid, (rows, columns), *new)
    return torch.cat([first, grid], dim=1) if tokens > new[0] * new[1] else grid


def load_checkpoint(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Any], *, strict: bool = False
) -> Loaded:
    """Loads published weights of a backbone or of a whole detector or segmentor.

    A backbone loads its part of a whole one, a :class:`vitkern.models.Segmentor` all of it. Names are translated;
    position embeddings, tables of relative positions and patches are resized. A classifier of other classes is left
    out, with a warning. Any other tensor of a wrong shape is an error, as is a checkpoint without a matching key.

    Args:
        checkpoint: a file or its contents.
        strict: whether missing or unexpected keys are an error.

    Returns:
        The missing and the unexpected keys.
    """
    source = "the checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint(checkpoint)
    tensors = tensors_for(model, checkpoint)
    own = model.state_dict()
    if not tensors.keys() & own.keys():
        raise ValueError(
            f"{source} has no tensor for {type(model).__name__}; its keys begin with {list(tensors)[:3]}"
        )
    _leave_other_classes(model, tensors, own, source)
    for key in own:
        if key in tensors and tensors[key].shape != own[key].shape:
            raise ValueError(
                f"{key} is {list(tensors[key].shape)} in {source} and {list(own[key].shape)} in {type(model).__name__}"
            )
    missing = [key for key in own if key not in tensors and not key.endswith(CONSTANTS)]
    unexpected = [key for key in tensors if key not in own]
    if strict and (missing or unexpected):
        raise ValueError(f"{source} lacks {missing[:3]} and has the unexpected {unexpected[:3]}")
    model.load_state_dict(tensors, strict=False)
    return Loaded(missing, unexpected)


def _leave_other_classes(model: nn.Module, tensors: StateDict, own: StateDict, source: str) -> None:
    """Removes a classifier of other classes than the model's from the tensors, with a warning."""
    if not isinstance(model, Classifier):
        return
    others = [
        key
        for key in own
        if key.startswith("head.") and key in tensors and tensors[key].shape != own[key].shape
    ]
    for key in others:
        del tensors[key]
    if others:
        warnings.warn(
            f"{source} has a classifier of other classes than the {model.num_classes} of {type(model).__name__}: "
            f"{' and '.join(others)} are not loaded",
            stacklevel=3,
        )


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Saves the state dict; in the .safetensors format if the file has that suffix."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    else:
        torch.save(model.state_dict(), path)


def load_pretrained(
    model: nn.Module, pretrained: str | None, init_cfg: Mapping[str, Any] | None, *, ema: bool = False
) -> None:
    """Loads the file that an mm configuration names in either way. `ema`: its moving averages, if it has any."""
    if init_cfg is not None:
        known = isinstance(init_cfg, Mapping) and init_cfg.get("type") == "Pretrained"
        if not known or "checkpoint" not in init_cfg:
            raise ValueError(f"init_cfg must be dict(type='Pretrained', checkpoint=...), got {init_cfg}")
        pretrained = pretrained or init_cfg["checkpoint"]
    if pretrained is not None:
        checkpoint = read_checkpoint(pretrained)
        averaged = checkpoint.get("state_dict_ema") if ema else None
        load_checkpoint(model, averaged or checkpoint)
