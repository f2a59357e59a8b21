# SPDX-License-Identifier: Apache-2.0
"""The shared parts of AdaptFormer's models: tuning configuration, blocks with adapters, prompts, classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.models.blocks import DropPath, Layer, check_blocks, checkpointed, drop_path_rates
from vitkern.models.pyramid import Classifier
from vitkern.nn import AdapterBottleneck

OPTIONS = ("parallel", "sequential")


@dataclass(frozen=True)
class Tuning:
    """The official tuning configuration, and the choice of layers.

    Args:
        ffn_adapt: whether blocks have adapters; None: only if there are no prompts.
        ffn_option: ``"parallel"`` to the feed-forward network, or ``"sequential"``, after it.
        ffn_adapter_layernorm_option, ffn_adapter_init_option, ffn_adapter_scalar: options of
            :class:`~vitkern.nn.AdapterBottleneck`.
        ffn_num: hidden units of an adapter; None: a twelfth of the channels.
        d_model: channels; None: the model's.
        vpt_on, vpt_num: whether each block has its own prompts (VPT-deep), and how many.
        ffn_layers: numbers of the blocks with adapters; None: all.
    """

    ffn_adapt: bool | None = None
    ffn_option: str = "parallel"
    ffn_adapter_layernorm_option: str | None = "none"
    ffn_adapter_init_option: str = "lora"
    ffn_adapter_scalar: float | str = "0.1"
    ffn_num: int | None = 64
    d_model: int | None = None
    vpt_on: bool = False
    vpt_num: int = 1
    ffn_layers: Sequence[int] | None = None

    @classmethod
    def of(cls, config: Any, **defaults: Any) -> Tuning:
        """Reads a dict, a Namespace or any object with these attributes; missing ones take their defaults."""
        if config is None:
            return cls(ffn_adapt=False)
        names = [field.name for field in fields(cls)]
        if not isinstance(config, Mapping) and not any(hasattr(config, name) for name in names):
            raise ValueError(
                "tuning_config must be a dict, a Namespace or an object with some of the attributes "
                f"{', '.join(names)}, got {config!r}"
            )
        if isinstance(config, Mapping):
            unknown = [key for key in config if key.startswith(("ffn_", "vpt_")) and key not in names]
            if unknown:
                raise ValueError(f"tuning_config has {unknown[0]!r}; it may have {', '.join(names)}")
            given = {name: config[name] for name in names if name in config}
        else:
            given = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return cls(**{**defaults, **given})

    def __post_init__(self) -> None:
        if self.ffn_option not in OPTIONS:
            raise ValueError(f"tuning_config: ffn_option must be one of {OPTIONS}, got {self.ffn_option!r}")
        if self.vpt_on and self.vpt_num < 1:
            raise ValueError(f"tuning_config: vpt_num must be at least 1, got {self.vpt_num}")

    @property
    def adapts(self) -> bool:
        return not self.vpt_on if self.ffn_adapt is None else bool(self.ffn_adapt)

    @property
    def sequential(self) -> bool:
        return self.ffn_option == "sequential"

    def check(self, depth: int, channels: int) -> None:
        if self.adapts and self.d_model not in (None, channels):
            raise ValueError(
                f"tuning_config: d_model must be None or the model's embed_dim={channels}, got {self.d_model}"
            )
        self.check_layers(depth)

    def check_layers(self, depth: int) -> None:
        if self.ffn_layers is not None:
            check_blocks("tuning_config: ffn_layers", self.ffn_layers, depth)

    def adapter(
        self, channels: int, layer: int, dropout: float, backend: str | None
    ) -> AdapterBottleneck | None:
        """The adapter of block number `layer`, or None."""
        if not self.adapts or (self.ffn_layers is not None and layer not in self.ffn_layers):
            return None
        return AdapterBottleneck(
            channels,
            channels // 12 if self.ffn_num is None else self.ffn_num,
            dropout,
            self.ffn_adapter_init_option,
            self.ffn_adapter_scalar,
            self.ffn_adapter_layernorm_option,
            backend=backend,
        )


def joined(x: Tensor, branch: Tensor, adapter: AdapterBottleneck | None, sequential: bool) -> Tensor:
    """The residual stream plus the feed-forward network's output and that of an adapter beside or after it."""
    if adapter is None:
        return x + branch
    return x + (adapter(branch) if sequential else adapter(x, residual=branch))


class Block(nn.Module):
    """A transformer block with an adapter; the layers of its feed-forward network are its own attributes.

    Args:
        drop_hidden: dropout between the two layers of the feed-forward network.
    """

    def __init__(
        self,
        channels: int,
        attention: nn.Module,
        hidden: int,
        *,
        drop: float,
        drop_hidden: float,
        drop_path: float,
        act_layer: Layer,
        norm_layer: Layer,
        adapter: AdapterBottleneck | None,
        sequential: bool,
    ) -> None:
        super().__init__()
        self.sequential, self.with_cp = sequential, False
        self.norm1 = norm_layer(channels)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(channels)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.act = act_layer()
        self.hidden_drop = nn.Dropout(drop_hidden)
        self.mlp_drop = nn.Dropout(drop)
        self.adaptmlp = adapter

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        return checkpointed(self._body, x, with_cp=self.with_cp)

    def _body(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        hidden = self.hidden_drop(self.act(self.fc1(self.norm2(x))))
        branch = self.drop_path(self.mlp_drop(self.fc2(hidden)))
        return joined(x, branch, self.adaptmlp, self.sequential)


class TunedTransformer(Classifier):
    """The blocks, prompts and classifier of the image and the video model."""

    embeddings: nn.ParameterList | None
    trained_parts: tuple[str, ...] = ("embeddings", "fc_norm", "head")  # by freeze_backbone, besides adapters
    always_trained: tuple[str, ...] = ("head",)  # even if a checkpoint had them
    embed_dim: int
    head_norm: bool
    blocks: nn.ModuleList

    def _add_blocks(
        self,
        tuning: Tuning,
        attention: Callable[[], nn.Module],
        *,
        depth: int,
        mlp_ratio: float,
        drop: float,
        drop_hidden: float,
        drop_path_rate: float,
        act_layer: Layer,
        norm_layer: Layer | None,
        adapter_dropout: float,
        backend: str | None,
    ) -> None:
        tuning.check(depth, self.embed_dim)
        self.tuning = tuning
        self.norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(
                self.embed_dim,
                attention(),
                int(self.embed_dim * mlp_ratio),
                drop=drop,
                drop_hidden=drop_hidden,
                drop_path=rate,
                act_layer=act_layer,
                norm_layer=self.norm_layer,
                adapter=tuning.adapter(self.embed_dim, layer, adapter_dropout, backend),
                sequential=tuning.sequential,
            )
            for layer, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )

    def _add_prompts(self) -> None:
        self.embeddings = None
        if self.tuning.vpt_on:
            prompts = [torch.empty(1, self.tuning.vpt_num, self.embed_dim) for _ in self.blocks]
            self.embeddings = nn.ParameterList(nn.init.xavier_uniform_(prompt) for prompt in prompts)

    def _through_blocks(self, x: Tensor) -> Tensor:  # [B, N, C]
        if self.embeddings is None:
            for block in self.blocks:
                x = block(x)
            return x
        for block, prompts in zip(self.blocks, self.embeddings):
            x = torch.cat([prompts.expand(x.shape[0], -1, -1), x], dim=1)
            x = block(x)[:, prompts.shape[1] :]
        return x

    def make_head(self, num_classes: int) -> nn.Module:
        """A classifier; with `head_norm`, after the official runs' normalisation, which has no parameters."""
        head = super().make_head(num_classes)
        if num_classes == 0 or not self.head_norm:
            return head
        return nn.Sequential(nn.BatchNorm1d(self.num_features, affine=False, eps=1e-6), head)

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published weights (MAE, VideoMAE, timm) under this model's names."""
        own = self.state_dict()
        translated: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            key = key.removeprefix("encoder.").replace(".mlp.fc", ".fc")
            if ".attn.qkv." in key:
                translated |= _split(key, tensor, own)
            else:
                translated[key] = tensor
        if "head.1.weight" in translated and "head.1.weight" not in own:
            raise ValueError("the checkpoint's head.0 is a BatchNorm: build the model with head_norm=True")
        if "head.1.weight" in own:
            translated = {_under_norm(key): tensor for key, tensor in translated.items()}
        return translated


def reset_adapters(model: nn.Module) -> None:
    """Restores the adapters' own initial weights after the model has initialised all linear layers alike."""
    for module in model.modules():
        if isinstance(module, AdapterBottleneck):
            module.reset_parameters()


def _split(key: str, tensor: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits a joint qkv tensor. A key bias is left out if the model has none: it does not change the softmax."""
    block, kind = key.split("qkv.")
    parts = dict(zip("qkv", tensor.chunk(3)))
    if kind == "bias" and f"{block}q_bias" in own:
        return {f"{block}{part}_bias": parts[part] for part in "qv"}
    return {f"{block}{part}_proj.{kind}": value for part, value in parts.items()}


def _under_norm(key: str) -> str:
    return f"head.1.{key.removeprefix('head.')}" if key in ("head.weight", "head.bias") else key
