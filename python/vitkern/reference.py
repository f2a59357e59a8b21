# SPDX-License-Identifier: Apache-2.0
"""The maths of every op in plain PyTorch: the oracle that the kernels are checked against.

The code is written to be read: any dtype and device, no host reads, differentiable any number of times. It also serves
calls that no kernel runs, and second derivatives. Equation numbers are those of ``docs/derivations``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Corner = tuple[Tensor, Tensor, Tensor, Tensor]  # column, row, coefficient, whether it is inside


def ms_deform_attn(
    value: Tensor,  # [B, S, M, D]
    spatial_shapes: Tensor,  # [L, 2] as (height, width)
    level_start_index: Tensor,  # [L]
    sampling_locations: Tensor,  # [B, Q, M, K, 2] as (x, y)
    attention_weights: Tensor,  # [B, Q, M, K]
    points_per_level: tuple[int, ...],  # L numbers; their sum is K
    method: str = "bilinear",
) -> Tensor:  # [B, Q, M * D]
    """Sum over the points of weight times sample, eq. (1)."""
    batch, pixels, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    value_of_head = value.transpose(1, 2)  # [B, M, S, D]
    # Zero, but a function of the inputs: without points to sample, the gradients are zeros, not None.
    zero = value[:0].sum() + sampling_locations[:0].sum() + attention_weights[:0].sum()
    output = zero + value.new_zeros(batch, heads, queries, channels)

    first = 0
    for level, points in enumerate(points_per_level if pixels else ()):
        height, width = spatial_shapes[level].unbind()
        xy = sampling_locations[:, :, :, first : first + points].transpose(1, 2)  # [B, M, Q, P, 2]
        weight = attention_weights[:, :, :, first : first + points].transpose(1, 2)  # [B, M, Q, P]
        first += points
        corners = _bilinear_corners if method == "bilinear" else _nearest_pixel
        for x, y, coefficient, inside in corners(xy[..., 0], xy[..., 1], width, height):
            pixel = torch.where(inside, level_start_index[level] + y * width + x, 0)  # [B, M, Q, P]
            sample = value_of_head.gather(2, pixel.flatten(2)[..., None].expand(-1, -1, -1, channels))
            sample = sample.unflatten(2, (queries, points))
            # A corner outside is not read: a NaN there times 0 would be NaN.
            # Its weight is not used either: a NaN there times 0 would make the location's gradient NaN.
            share = (torch.where(inside, weight, 0) * torch.where(inside, coefficient, 0))[..., None]
            output = output + torch.where(inside[..., None], sample * share, 0).sum(-2)
    return output.to(value.dtype).transpose(1, 2).reshape(batch, queries, heads * channels)


def ms_deform_attn_fused(
    value: Tensor,  # [B, S, M, D]
    spatial_shapes: Tensor,  # [L, 2] as (height, width)
    level_start_index: Tensor,  # [L]
    reference_points: Tensor,  # [B | 1, Q, L | 1, 2 | 4]
    sampling_offsets: Tensor,  # [B, Q, M, K, 2]
    attention_logits: Tensor,  # [B, Q, M, K]
    points_per_level: tuple[int, ...],
    method: str = "bilinear",
) -> Tensor:  # [B, Q, M * D]
    """Softmax and locations first, eqs. (8) to (10), then ms_deform_attn."""
    weights = attention_logits.softmax(-1)
    locations = sampling_locations_of(spatial_shapes, reference_points, sampling_offsets, points_per_level)
    return ms_deform_attn(
        value, spatial_shapes, level_start_index, locations, weights, points_per_level, method
    )


def sampling_locations_of(
    spatial_shapes: Tensor, reference_points: Tensor, offsets: Tensor, points_per_level: tuple[int, ...]
) -> Tensor:  # [B, Q, M, K, 2]
    """The sampling locations from reference points and offsets, eqs. (9) and (10)."""
    count = sum(points_per_level)
    points = torch.tensor(points_per_level, device=offsets.device, dtype=torch.int64)  # [L]
    reference = reference_points.expand(-1, -1, len(points_per_level), -1)
    reference = reference.repeat_interleave(points, 2, output_size=count)[:, :, None]  # [., Q, 1, K, .]
    if reference_points.shape[-1] == 2:
        step = 1 / spatial_shapes.flip(-1).clamp(min=1).to(offsets.dtype)
        step = step.repeat_interleave(points, 0, output_size=count)
    else:
        step = reference[..., 2:] / (2 * points.repeat_interleave(points)[:, None])
    # An offset or a box that is not finite gets no gradient: 0 times infinity would be NaN.
    finite = (offsets * step).isfinite()
    moved = torch.where(finite, offsets, 0) * torch.where(finite, step, 0)
    return torch.where(finite, reference[..., :2] + moved, float("nan"))


def _bilinear_corners(x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> Iterator[Corner]:
    """The four pixels around a location with their bilinear coefficients, eqs. (2) and (3)."""
    x = x * width - 0.5
    y = y * height - 0.5
    # Every comparison with NaN is false: a location that is not a number touches no pixel.
    near = (x > -1) & (x < width) & (y > -1) & (y < height)
    x = torch.where(near, x, 0)
    y = torch.where(near, y, 0)
    left, top = x.detach().floor(), y.detach().floor()
    right_share, bottom_share = x - left, y - top
    for down, row_share in ((0, 1 - bottom_share), (1, bottom_share)):
        for along, column_share in ((0, 1 - right_share), (1, right_share)):
            column, row = left.long() + along, top.long() + down
            inside = near & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            yield column, row, row_share * column_share, inside


def _nearest_pixel(x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> Iterator[Corner]:
    """The 'discrete' sampling of RT-DETR v2: pixel floor(location * size + 0.5), clamped to the level, eq. (4)."""
    x = x.detach() * width + 0.5
    y = y.detach() * height + 0.5
    finite = x.isfinite() & y.isfinite() & (width > 0) & (height > 0)
    # Clamped twice: as a real number against integer overflow, as an integer because the real bound is rounded.
    column = torch.where(finite, x, 0).clamp(min=0).minimum((width - 1).to(x.dtype)).long().minimum(width - 1)
    row = torch.where(finite, y, 0).clamp(min=0).minimum((height - 1).to(y.dtype)).long().minimum(height - 1)
    yield column, row, torch.ones_like(x), finite


def ms_deform_attn_by_grid_sample(
    value: Tensor,  # [B, S, M, D]
    level_sizes: list[tuple[int, int]],  # L pairs of (height, width) on the host
    sampling_locations: Tensor,  # [B, Q, M, L, P, 2]
    attention_weights: Tensor,  # [B, Q, M, L, P]
) -> Tensor:  # [B, Q, M * D]
    """The usual form without kernels: one ``grid_sample`` per level. It is the baseline of the benchmarks."""
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # [B * M, Q, L, P, 2]
    samples = []
    for level, pixels in enumerate(value.split([height * width for height, width in level_sizes], dim=1)):
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, *level_sizes[level])
        samples.append(
            torch.nn.functional.grid_sample(
                image, grids[:, :, level], padding_mode="zeros", align_corners=False
            )
        )
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)  # [B * M, 1, Q, L * P]
    output = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)  # [B * M, D, Q]
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def _gelu(x: Tensor) -> Tensor:
    # torch 2.13 gives NaN for +inf in float32 where oneDNN computes its GELU: pytorch/pytorch#185770.
    return torch.where(x == torch.inf, x, torch.nn.functional.gelu(x))


ACTIVATIONS = {"relu": torch.relu, "gelu": _gelu, "silu": torch.nn.functional.silu}


def adapter_bottleneck(
    x: Tensor,  # [..., C]
    down_weight: Tensor,  # [H, C]
    down_bias: Tensor | None,  # [H]
    up_weight: Tensor,  # [C, H]
    up_bias: Tensor | None,  # [C]
    residual: Tensor | None = None,  # [..., C]
    scale: Tensor | float = 1.0,  # one number
    seed: Tensor | None = None,  # [1] int64: the dropout mask's
    dropout_p: float = 0.0,
    activation: str = "relu",
) -> Tensor:  # [..., C]
    """Down, activation, dropout, up, scale and residual, eqs. (1) to (3)."""
    hidden = ACTIVATIONS[activation](torch.nn.functional.linear(x, down_weight, down_bias))
    if seed is not None:
        rows = hidden.shape[:-1].numel()
        factor = dropout_factor(seed, rows * hidden.shape[-1], dropout_p)
        hidden = hidden * factor.view(hidden.shape).to(hidden.dtype)
    output = scale * torch.nn.functional.linear(hidden, up_weight, up_bias)
    return output if residual is None else residual + output


def dropout_factor(seed: Tensor, count: int, p: float) -> Tensor:  # [count] float64
    """The dropout factor of the i-th number, 0 or 1 / (1 - p), for all i below `count`; eqs. (4) and (5).

    The mask depends only on the seed and i: every backend draws the same mask, and backward draws it again.
    """
    index = torch.arange(count, device=seed.device)
    words = torch.stack(philox(seed, index >> 2), -1)  # [count, 4], each group of four numbers four times
    word = words.gather(-1, (index & 3)[:, None])[:, 0]
    return (word >= dropout_threshold(p)).double() * dropout_rescale(p)


def dropout_threshold(p: float) -> int:
    """The threshold: a number is dropped if its 32 random bits are below it."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_rescale(p: float) -> float:
    """The factor of the numbers that are kept, which preserves the expectation."""
    return 1 / (1 - p) if p < 1 else 0.0


def philox(seed: Tensor, counter: Tensor) -> list[Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011) of key `seed` and counter (low, high, 0, 0): four words of 32 random bits."""
    low32 = 0xFFFFFFFF
    words = [counter & low32, counter >> 32 & low32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & low32, seed >> 32 & low32]
    for _ in range(10):
        # int64 products wrap around: all 64 bits are right.
        left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (right >> 32 & low32) ^ words[1] ^ key[0],
            right & low32,
            (left >> 32 & low32) ^ words[3] ^ key[1],
            left & low32,
        ]
        key = [key[0] + 0x9E3779B9 & low32, key[1] + 0xBB67AE85 & low32]
    return words


def token_pool(x: Tensor, weight: Tensor) -> Tensor:  # [B, N, C], [T, C] or [B, T, C] -> [B, T, C]
    """Each token is a mean of the pixels, weighted by a softmax over the pixels, eqs. (1) to (3)."""
    return token_pool_attention(x, weight).transpose(1, 2) @ x


def token_pool_attention(x: Tensor, weight: Tensor) -> Tensor:  # [B, N, T]
    """The attention weights of token_pool; the weights of a token add up to 1."""
    return (x @ weight.mT).softmax(1)


def token_project(x: Tensor, query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    """Adds tokens [B, T, C] to pixels [B, N, C], weighted by query [B, N, K] and key [B, T, K]; eqs. (1) and (2)."""
    return x + (query @ key.mT).softmax(2) @ tokens
