# SPDX-License-Identifier: Apache-2.0
"""Layer-wise learning rate decay: parameter groups whose rate falls from the last block to the first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

EMBEDDINGS = ("cls_token", "mask_token", "pos_embed", "patch_embed", "visual_embed")
# Mask2Former's queries: the segmentation form trains them as slowly as the embeddings.
MASK_QUERIES = ("mask_embed", "cls_embed", "level_embed", "query_embed", "query_feat")
BLOCK = re.compile(r"(?:blocks|layers)\.(\d+)\.")
# Parts of names that torch.compile, DistributedDataParallel and activation checkpointing insert.
WRAPPERS = re.compile(r"\b(?:_orig_mod|module|_checkpoint_wrapped_module)\.")


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter: 0 for embeddings, 1 to depth for blocks, depth + 1 for adapter and heads."""
    name = WRAPPERS.sub("", name)
    if name.startswith(tuple(f"decode_head.{part}" for part in MASK_QUERIES)):
        return 0
    name = name.removeprefix("backbone.")
    if name.startswith(EMBEDDINGS):
        return 0
    block = BLOCK.match(name)
    if block is not None and int(block[1]) >= depth:
        raise ValueError(
            f"depth must be the number of the transformer's blocks, got {depth}, but the model has {name}"
        )
    return depth + 1 if block is None else int(block[1]) + 1


def layer_decay_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    depth: int,
    no_weight_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Groups for an optimizer: a layer's rate is `lr * layer_decay ** (depth + 1 - layer)`.

    Args:
        model: a backbone, or a detector or segmentor with an attribute ``backbone``.
        weight_decay: weight decay of matrices; vectors, such as biases and factors, have none.
        depth: number of blocks, or of stages in a model with stages.
        no_weight_decay: names of more parameters without weight decay.
    """
    exempt = set(no_weight_decay)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() > 1 and WRAPPERS.sub("", name).removeprefix("backbone.") not in exempt
        layer = layer_of(name, depth)
        if (layer, decays) not in groups:
            scale = layer_decay ** (depth + 1 - layer)
            groups[layer, decays] = {
                "params": [],
                "param_names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
            }
        groups[layer, decays]["params"].append(parameter)
        groups[layer, decays]["param_names"].append(name)
    return list(groups.values())
