# SPDX-License-Identifier: Apache-2.0
"""The cells of ViTAE: attention and convolutions side by side.

A reduction cell shrinks a map; a normal cell keeps the number of tokens. In both, a branch of convolutions (PCM) reads
the same input as the attention, and the two outputs are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.blocks import (
    DropPath,
    Layer,
    Mlp,
    PatchEmbed,
    attend,
    head_channels,
    merge_windows,
    sinusoid_positions,
    split_windows,
    to_map,
)
from vitkern.models.relative_positions import relative_position_index

RC_WINDOW = 7  # of reduction cells; normal cells may have another


def convolutions(
    channels: Sequence[int],
    groups: int,
    *,
    strides: Sequence[int] = (1, 1, 1),
    norms: Sequence[bool] = (True, True),
    last_act: bool = False,
) -> nn.Sequential:
    """PCM: 3 x 3 convolutions with SiLU and some BatchNorms between them."""
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(channels)):
        layers.append(nn.Conv2d(before, after, 3, strides[index], 1, groups=groups))
        if index < len(channels) - 2:
            layers += [nn.BatchNorm2d(after), nn.SiLU()] if norms[index] else [nn.SiLU()]
    return nn.Sequential(*layers, nn.SiLU()) if last_act else nn.Sequential(*layers)


class PRM(nn.Module):
    """Convolutions that differ only in their dilation, concatenated or, with ``"sum"``, added."""

    def __init__(
        self, in_chans: int, channels: int, kernel_size: int, ratio: int, dilations: Sequence[int], op: str
    ) -> None:
        super().__init__()
        if op not in ("cat", "sum"):
            raise ValueError(f"RC_op must be 'cat' or 'sum', got {op!r}")
        self.op = op
        self.out_chans = channels * (len(dilations) if op == "cat" else 1)
        self.convs = nn.ModuleList()
        for dilation in dilations:
            padding = math.ceil(((kernel_size - 1) * dilation + 1 - ratio) / 2)
            conv = nn.Conv2d(in_chans, channels, kernel_size, ratio, padding, dilation)
            self.convs.append(nn.Sequential(conv, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, r H, r W] -> [B, out_chans, H, W]
        maps = [conv(x) for conv in self.convs]
        return torch.cat(maps, dim=1) if self.op == "cat" else torch.stack(maps).sum(0)


class Attention(nn.Module):
    """Self-attention over all tokens, which may change their channels.

    Args:
        value_skip: whether the values are added to the result, in place of an input with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        value_skip: bool = False,
    ) -> None:
        super().__init__()
        self.scale = qk_scale or head_channels(channels, num_heads) ** -0.5
        self.num_heads, self.attn_drop, self.value_skip = num_heads, attn_drop, value_skip
        self.qkv = nn.Linear(in_channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def position_bias(self) -> Tensor | None:  # [M, N, N]
        return None

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, N, C] -> [B, N, C']
        qkv = self.qkv(x)
        dropout_p = self.attn_drop if self.training else 0.0
        x = attend(qkv, self.num_heads, scale=self.scale, bias=self.position_bias(), dropout_p=dropout_p)
        x = self.proj_drop(self.proj(x))
        return x + qkv.chunk(3, dim=-1)[2] if self.value_skip else x

    def attention_weights(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, M, N, N]
        """The attention weights, for the arguments of the forward pass."""
        query, key, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores, bias = self.scale * query @ key.transpose(-2, -1), self.position_bias()
        return (scores if bias is None else scores + bias).softmax(dim=-1)


class WindowAttention(Attention):
    """Self-attention inside windows. The map is padded on all sides and not masked: padding has the bias as its key.

    Args:
        window_size: height and width of a window.
        relative_pos: whether there are learnable biases for distances inside a window.
        index_size: side of the window that the position buffer describes; 0: no buffer.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_heads: int,
        *,
        window_size: int,
        relative_pos: bool = False,
        index_size: int = 0,
        **options: float,
    ) -> None:
        super().__init__(in_channels, channels, num_heads, **options)  # type: ignore[arg-type]
        self.window_size = window_size
        self.relative_position_bias_table = None
        if relative_pos:
            rows = (2 * window_size - 1) ** 2
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        if relative_pos or index_size:
            size = window_size if relative_pos else index_size
            self.register_buffer("relative_position_index", relative_position_index(size, size, False))

    def position_bias(self) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return None
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The padding to the left, to the right, above and below."""
        across, down = -width % self.window_size, -height % self.window_size
        return across // 2, across - across // 2, down // 2, down - down // 2

    def windows(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """Tokens [B, H W, C] to [B', size * size, C], and the size of the padded map."""
        left, right, above, below = self.padding(height, width)
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, left, right, above, below)).flatten(1, 2)
        height, width = height + above + below, width + left + right
        return split_windows(x, self.window_size, height, width), height, width

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C] -> [B, H W, C']
        windows, rows, columns = self.windows(x, height, width)
        x = merge_windows(super().forward(windows, height, width), self.window_size, rows, columns)
        left, _, above, _ = self.padding(height, width)
        x = x.unflatten(1, (rows, columns))[:, above : above + height, left : left + width]
        return x.flatten(1, 2)

    def attention_weights(self, x: Tensor, height: int, width: int) -> Tensor:  # [B', M, size^2, size^2]
        return super().attention_weights(self.windows(x, height, width)[0], height, width)


class TokenTransformer(nn.Module):
    """The transformer of a reduction cell: attention plus the branch of convolutions, then a feed-forward network."""

    def __init__(self, in_channels: int, attention: Attention, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_channels)
        self.attn = attention
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, channels)

    def forward(self, x: Tensor, convolved: Tensor, height: int, width: int) -> Tensor:
        """Returns [B, N, C'] from tokens [B, N, C] and the convolutions' output for the same map, [B, N, C']."""
        x = self.attn(self.norm1(x), height, width) + convolved
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """A TokenTransformer with attention in linear time: random features phi with phi(q) . phi(k) near exp(q . k).

    Keys come first in `kqv`. The dropout rate is fixed, as in the released code.
    """

    def __init__(self, in_channels: int, channels: int, drop: float = 0.1) -> None:
        super().__init__()
        features = channels // 2
        self.num_features = features
        self.w = nn.Parameter(torch.empty(features, channels), requires_grad=False)
        self.kqv = nn.Linear(in_channels, 3 * channels)
        self.dp = nn.Dropout(drop)
        self.proj = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(in_channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.Dropout(drop)
        )
        nn.init.orthogonal_(self.w, gain=math.sqrt(features))

    def features(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C / 2]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        exponent = F.linear(x, self.w.to(x.dtype)) - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.num_features)

    def forward(self, x: Tensor, convolved: Tensor, height: int, width: int) -> Tensor:
        """Returns [B, N, C'] from tokens [B, N, C] and the convolutions' output for the same map, [B, N, C']."""
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        with full_precision(x):
            key, query = self.features(key), self.features(query)
            mixed = query @ (key.transpose(1, 2) @ value.to(key.dtype))
            mixed = mixed / (query @ key.sum(1).unsqueeze(-1) + 1e-8)
        x = value + self.dp(self.proj(mixed.to(value.dtype))) + convolved
        return x + self.mlp(self.norm2(x))

    def attention_weights(self, x: Tensor, convolved: Tensor, height: int, width: int) -> Tensor:
        """The attention weights, [B, 1, N, N], for the arguments of the forward pass."""
        key, query, _ = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        with full_precision(x):
            scores = self.features(query) @ self.features(key).transpose(1, 2)
        return (scores / (scores.sum(-1, keepdim=True) + 1e-8)).unsqueeze(1)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Switches autocast off: the exponential turns a rounding error of its argument into a factor."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class TokenEmbedding(nn.Module):
    """The reduction cell of the large models: plain patches, a class token and learnt positions."""

    def __init__(self, img_size: int, ratio: int, in_chans: int, channels: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // ratio) ** 2 + 1, channels))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.PRM = PatchEmbed(img_size, ratio, in_chans, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"the position embeddings are those of {self.img_size} x {self.img_size}, got an image of "
                f"{x.shape[2]} x {x.shape[3]}"
            )
        x, height, width = self.PRM(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos_embed, height, width


class ReductionCell(nn.Module):
    """A map [B, C, r H, r W] to tokens [B, H W, C'], with H and W.

    Args:
        attention: module that makes tokens from the dilated convolutions; None: the convolutions give the tokens.
        convolved: branch of convolutions beside the attention.
        sinusoid: whether to put a class token before the tokens and add fixed positions to all of them.
    """

    def __init__(
        self,
        prm: PRM,
        attention: TokenTransformer | TokenPerformer | None = None,
        convolved: nn.Module | None = None,
        sinusoid: bool = False,
    ) -> None:
        super().__init__()
        self.PCM = convolved
        self.PRM = prm
        self.attn = attention
        self.cls_token = nn.Parameter(torch.zeros(1, 1, prm.out_chans)) if sinusoid else None

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        reduced = self.PRM(x)
        height, width = reduced.shape[2:]
        tokens = reduced.flatten(2).transpose(1, 2)
        if self.attn is not None and self.PCM is not None:
            tokens = self.attn(tokens, self.PCM(x).flatten(2).transpose(1, 2), height, width)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            tokens = tokens + sinusoid_positions(tokens.shape[1], tokens.shape[2]).to(tokens)
        return tokens, height, width


class NormalCell(nn.Module):
    """Attention beside convolutions, then a feed-forward network. The convolutions leave class tokens out.

    Args:
        convolved: branch of convolutions.
    """

    def __init__(
        self,
        channels: int,
        attention: Attention,
        convolved: nn.Module,
        hidden: int,
        *,
        drop: float,
        drop_path: float,
        norm_layer: Layer,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(channels)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(channels)
        self.mlp = Mlp(channels, hidden, drop=drop)
        self.PCM = convolved

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, (1 +) H W, C]
        first = x.shape[1] - height * width
        convolved = self.PCM(to_map(x[:, first:], height, width)).flatten(2).transpose(1, 2)
        convolved = self.drop_path(convolved)
        if first:
            convolved = F.pad(convolved, (0, 0, first, 0))
        x = x + self.drop_path(self.attn(self.norm1(x), height, width)) + convolved
        return x + self.drop_path(self.mlp(self.norm2(x)))
