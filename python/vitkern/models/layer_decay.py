# SPDX-License-Identifier: Apache-2.0
"""Parameter groups whose learning rate falls from the last block of a transformer to the first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

EMBEDDINGS = ("cls_token", "mask_token", "pos_embed", "patch_embed", "visual_embed")
# Mask2Former's queries, which the segmentation form trains as slowly as the embeddings.
MASK_QUERIES = ("mask_embed", "cls_embed", "level_embed", "query_embed", "query_feat")
BLOCK = re.compile(r"(?:blocks|layers)\.(\d+)\.")
# What torch.compile, DistributedDataParallel and activation checkpointing put into names.
WRAPPERS = re.compile(r"\b(?:_orig_mod|module|_checkpoint_wrapped_module)\.")


def layer_of(name: str, depth: int) -> int:
    """0 for embeddings, 1 to depth for blocks, depth + 1 for all else: adapter and heads."""
    name = WRAPPERS.sub("", name)
    if name.startswith(tuple(f"decode_head.{part}" for part in MASK_QUERIES)):
        return 0
    name = name.removeprefix("backbone.")
    if name.startswith(EMBEDDINGS):
        return 0
    block = BLOCK.match(name)
    if block is not None and int(block[1]) >= depth:
        raise ValueError(
            f"depth must be the number of the transformer's blocks, got {depth} and there is {name}"
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
        model: a backbone, or a detector or segmentor that has one under that name.
        weight_decay: of weights; vectors, such as biases and factors, have none.
        depth: blocks of the transformer, or stages where the model has those.
        no_weight_decay: names of more parameters that have none.
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
