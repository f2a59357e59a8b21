# SPDX-License-Identifier: Apache-2.0
"""The parts that the model families share. Parameters have the names of published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Layer = Callable[..., nn.Module]


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a pair or a single number."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_blocks(name: str, numbers: Iterable[int], depth: int) -> None:
    if not set(numbers) <= set(range(depth)):
        raise ValueError(f"{name} must be some of the blocks 0 to {depth - 1}, got {numbers}")


def check_patch_size(patch_size: int | Sequence[int]) -> None:
    if pair(patch_size) != (16, 16):
        raise ValueError(f"patch_size must be 16, got {patch_size}")


def per_block(option: Any, depth: int, name: str) -> list[Any]:
    """An option of each block, from a list or a single value."""
    if not isinstance(option, (list, tuple)):
        return [option] * depth
    if len(option) != depth:
        raise ValueError(f"{name} must be one value or one for each of the {depth} blocks, got {len(option)}")
    return list(option)


def window_sizes(window_attn: Any, window_size: Any, depth: int) -> list[int | None]:
    """The window size of each block; None: global attention."""
    windowed = per_block(window_attn, depth, "window_attn")
    sizes = per_block(window_size, depth, "window_size")
    for block, (is_windowed, size) in enumerate(zip(windowed, sizes)):
        if is_windowed and size is None:
            raise ValueError(f"window_size of block {block} must be a number: its window_attn is set")
        if is_windowed and size < 1:
            raise ValueError(f"window_size of block {block} must be at least 1, got {size}")
    return [size if is_windowed else None for is_windowed, size in zip(windowed, sizes)]


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth: from 0 at the first block to `rate` at the last."""
    return [rate * block / max(depth - 1, 1) for block in range(depth)]


def checkpointed(function: Callable[..., Any], *inputs: Tensor, with_cp: bool) -> Any:
    """The function; with `with_cp`, backward recomputes it instead of saving its intermediate results."""
    if with_cp and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def initialise(module: nn.Module) -> None:
    """Initialises the weights of a module outside of the transformer."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class DropPath(nn.Module):
    """In training, drops a residual branch for whole samples."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"drop_path_rate must be a probability between 0 and 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1.0 - self.p)
        return x * (kept if self.p == 1.0 else kept / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class SyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm on a GPU. On a CPU torch has no such kernel: each process uses its own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_cuda else _BatchNorm.forward(self, x)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return normalised.movedim(-1, 1)


class PatchEmbed(nn.Module):
    """Image [B, C, 16 H, 16 W] to tokens [B, H W, D], with H and W."""

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Layer | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.grid_size = self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(image)
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2], x.shape[3]


class Mlp(nn.Module):
    """A feed-forward network. `drop_hidden=False`: no dropout between the two layers, as in BEiT."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        act_layer: Layer = nn.GELU,
        drop: float = 0.0,
        drop_hidden: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop if drop_hidden else 0.0)
        self.fc2 = nn.Linear(hidden, channels)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class ResBottleneckBlock(nn.Module):
    """ViTDet's convolutions after a group of windowed blocks. Starts as the identity."""

    def __init__(self, channels: int, act_layer: Layer = nn.GELU) -> None:
        super().__init__()
        inner = channels // 2
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = LayerNorm2d(inner)
        self.act1 = act_layer()
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = LayerNorm2d(inner)
        self.act2 = act_layer()
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm3 = LayerNorm2d(channels)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.act2(self.norm2(self.conv2(y)))
        return x + self.norm3(self.conv3(y))


def head_channels(embed_dim: int, num_heads: int) -> int:
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
    return embed_dim // num_heads


def attend(
    qkv: Tensor,  # [B, N, 3 M D]
    num_heads: int,
    *,
    scale: float | None = None,  # None: 1 / sqrt(D)
    bias: Tensor | None = None,  # [M, N, N] or [B, M, N, N], added before the softmax
    dropout_p: float = 0.0,
) -> Tensor:  # [B, N, M D]
    query, key, value = qkv.chunk(3, dim=-1)
    return attend_to(query, key, value, num_heads, scale=scale, bias=bias, dropout_p=dropout_p)


def attend_to(
    query: Tensor,  # [B, N, M D], as key and value
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """As `attend`, for separate queries, keys and values."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    if bias is not None:
        bias = bias.to(query.dtype)  # autocast leaves this parameter in float32
        bias = bias if bias.dim() == 4 else bias[None]
    x = F.scaled_dot_product_attention(query, key, value, bias, dropout_p, scale=scale)
    return x.transpose(1, 2).flatten(2)


def split_windows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """Tokens [B, H W, C] to windows [B', size * size, C], zeros to the right and below."""
    x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % size, 0, -height % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [B, rows, size, columns, size, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `split_windows`, without the padding."""
    rows, columns = -(-height // size), -(-width // size)
    x = windows.unflatten(1, (size, size)).unflatten(0, (-1, rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, rows * size, columns * size, C]
    return x[:, :height, :width].flatten(1, 2)


def position_grid(patches: int, img_size: Any, pretrain_size: Any) -> tuple[int, int]:
    """The grid of position embeddings for patches of 16 x 16: as many as `img_size` has, shaped as `pretrain_size`."""
    height, width = pair(pretrain_size)
    grid = height // 16, width // 16
    if patches != grid[0] * grid[1]:
        raise ValueError(
            f"img_size={img_size} makes {patches} position embeddings and pretrain_size={pretrain_size} "
            f"another number: give both"
        )
    return grid


def resize_positions(positions: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Position embeddings [1, N, D], resized from one grid to another, bicubic."""
    maps = positions.unflatten(1, grid).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def sinusoid_positions(tokens: int, channels: int) -> Tensor:
    """Fixed position encodings [1, N, D]: sines in even channels, cosines in odd ones."""
    channel = torch.arange(channels, dtype=torch.float64)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / channels)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()[None]


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H W, C] to [B, C, H, W]."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))
