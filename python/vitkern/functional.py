# SPDX-License-Identifier: Apache-2.0
"""The public functions: definitions, arguments, results and backends."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitkern import reference
from vitkern.ops import adapter_bottleneck as adapter_ops
from vitkern.ops import ms_deform_attn as ops
from vitkern.ops import native
from vitkern.ops import token_pool as token_pool_ops
from vitkern.ops import token_project as token_project_ops
from vitkern.ops.autocast import any_autocast, autocast_dtype, without_autocast
from vitkern.ops.levels import as_levels, whole_numbers


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    points_per_level: Sequence[int] | None = None,
    method: str = "bilinear",
    backend: str | None = None,
) -> Tensor:
    """Multi-scale deformable attention: for each query and head, a weighted sum of samples of a feature pyramid.

    ``output[b, q, m] = sum over l, p of attention_weights[b, q, m, l, p] * sample(value of level l, head m, at
    sampling_locations[b, q, m, l, p])``

    Args:
        value: ``[B, S, M, D]``, the pixels of all levels one after the other, M heads of D channels. float32, float64,
            float16 or bfloat16, any strides.
        spatial_shapes: ``[L, 2]`` int64 tensor of (height, width) on value's device, or a sequence of pairs.
            The sizes add up to S.
        level_start_index: ``[L]`` int64, the first pixel of each level; None: the levels follow each other.
        sampling_locations: ``[B, Q, M, L, P, 2]`` as (x, y), where 0 and 1 are a level's outer edges; pixel centres
            are at (i + 0.5) / size. Use at least float32: 16-bit numbers cannot address a pixel in a wide map.
        attention_weights: ``[B, Q, M, L, P]``.
        points_per_level: the L numbers of points, if levels have different ones. Locations are then
            ``[B, Q, M, K, 2]`` and weights ``[B, Q, M, K]``, level after level, with K the sum of the numbers.
        method: ``"bilinear"`` (zeros outside the level) or ``"nearest"``, the 'discrete' sampling of RT-DETR v2:
            pixel ``floor(location * size + 0.5)``, clamped to the level; the gradient of locations is zero.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the best for the tensors.

    Returns:
        ``[B, Q, M * D]`` in value's dtype. Sums are made in float32 (float64 for float64).

    A location that is NaN, infinite or outside adds nothing and receives zero gradient. Gradients flow to value,
    locations and weights; a second derivative raises, except with ``backend="reference"``, which has all of them.
    The CPU backward is bitwise reproducible, the CUDA and Triton ones under
    ``torch.use_deterministic_algorithms(True)``. Under autocast, value is cast to the autocast dtype and locations and
    weights to float32.

    Examples:
        >>> shapes = [(8, 8), (4, 4)]
        >>> value = torch.randn(1, 80, 2, 16)
        >>> locations, weights = torch.rand(1, 5, 2, 2, 4, 2), torch.rand(1, 5, 2, 2, 4)
        >>> vitkern.ms_deform_attn(value, shapes, None, locations, weights).shape
        torch.Size([1, 5, 32])
    """
    if not isinstance(spatial_shapes, Tensor) or not isinstance(level_start_index, Tensor):
        spatial_shapes, level_start_index = as_levels(
            "ms_deform_attn", spatial_shapes, level_start_index, value
        )
    if points_per_level is not None:
        points_per_level = whole_numbers("ms_deform_attn", points_per_level)
    if any_autocast():
        lowered = autocast_dtype(value, sampling_locations, attention_weights)
        if lowered is not None:
            value = value.to(lowered)
            sampling_locations, attention_weights = sampling_locations.float(), attention_weights.float()
    return ops.ms_deform_attn(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        points_per_level,
        method,
        backend,
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    level_start_index: Tensor | Sequence[int] | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    points_per_level: Sequence[int] | None = None,
    method: str = "bilinear",
    backend: str | None = None,
) -> Tensor:
    """:func:`ms_deform_attn` with softmax and sampling locations computed inside: takes a layer's tensors as they are.

    ``attention_weights = softmax(attention_logits)`` over all points of a query and head, and ``sampling_locations``
    are ``reference + offset / (width, height)``, or, from a reference box, ``centre + offset / (2 P) * size``. Neither
    is ever in memory, forward or backward; gradients flow to reference points, offsets and logits.

    Args:
        value, spatial_shapes, level_start_index: as in :func:`ms_deform_attn`.
        reference_points: ``[B or 1, Q, L or 1, 2]`` as (x, y), or ``[B or 1, Q, L or 1, 4]`` as boxes (x, y, width,
            height) around a centre, in units of the level's size. An axis of 1 is shared by all images, or all levels.
        sampling_offsets: ``[B, Q, M, L, P, 2]``, in pixels of the level; with boxes, in P-ths of half the box.
        attention_logits: ``[B, Q, M, L * P]``.
        points_per_level: as in :func:`ms_deform_attn`: offsets are then ``[B, Q, M, K, 2]``, logits ``[B, Q, M, K]``,
            and P is the level's own number of points.
        method, backend: as in :func:`ms_deform_attn`.

    Returns:
        ``[B, Q, M * D]`` in value's dtype.

    Offsets and logits may be float16 or bfloat16: they are widened first, and locations and softmax are float32
    (float64 for float64 values) throughout. Under autocast, value is cast to the autocast dtype and the others keep
    theirs. Everything else is as in :func:`ms_deform_attn`.

    Examples:
        >>> shapes = [(8, 8), (4, 4)]
        >>> value, reference_points = torch.randn(1, 80, 2, 16), torch.rand(1, 5, 1, 2)
        >>> offsets, logits = torch.randn(1, 5, 2, 2, 4, 2), torch.randn(1, 5, 2, 8)
        >>> vitkern.ms_deform_attn_fused(value, shapes, None, reference_points, offsets, logits).shape
        torch.Size([1, 5, 32])
    """
    if not isinstance(spatial_shapes, Tensor) or not isinstance(level_start_index, Tensor):
        spatial_shapes, level_start_index = as_levels(
            "ms_deform_attn_fused", spatial_shapes, level_start_index, value
        )
    if points_per_level is not None:
        points_per_level = whole_numbers("ms_deform_attn_fused", points_per_level)
    if any_autocast():
        lowered = autocast_dtype(value, reference_points, sampling_offsets, attention_logits)
        if lowered is not None:
            value = value.to(lowered)
    return ops.ms_deform_attn_fused(
        value,
        spatial_shapes,
        level_start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
        points_per_level,
        method,
        backend,
    )


def adapter_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    activation: str = "relu",
    backend: str | None = None,
) -> Tensor:
    """The adapter of AdaptFormer in one pass: down, activation, dropout, up, scale, residual.

    ``residual + scale * (dropout(activation(x @ down_weight.T + down_bias)) @ up_weight.T + up_bias)``

    Args:
        x: ``[..., C]``; float32, float64, float16 or bfloat16, any strides.
        down_weight, down_bias: ``[H, C]`` and ``[H]`` or None, as in ``torch.nn.Linear(C, H)``.
        up_weight, up_bias: ``[C, H]`` and ``[C]`` or None.
        residual: ``[..., C]``, like x; None adds nothing. If it is x itself, one pass computes x's whole gradient.
        scale: a number, or a tensor of one element, which may be learnable.
        dropout_p: the probability of dropping a hidden unit if ``training`` is true. The mask follows torch's
            generator; backward draws it again instead of storing it.
        activation: ``"relu"``, ``"gelu"`` (exact) or ``"silu"``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the best for the tensors.

    Returns:
        ``[..., C]`` in x's dtype. Sums are made in float32 (float64 for float64).

    The result is the only tensor of x's size that is written, and x the only one that is saved for backward. Gradients
    flow to x, weights, biases, residual and a tensor scale. Only the required ones are computed: a frozen x, or frozen
    weights, cost less. Every backward is bitwise reproducible. Weights and biases are converted to x's dtype. Under
    autocast, x, weights and biases are cast to the autocast dtype; torch adds a residual of another dtype, and the
    result has the wider dtype of both.

    Examples:
        >>> x = torch.randn(2, 197, 768)
        >>> down, up = torch.nn.Linear(768, 64), torch.nn.Linear(64, 768)
        >>> y = vitkern.adapter_bottleneck(x, down.weight, down.bias, up.weight, up.bias, residual=x, scale=0.1)
        >>> y.shape
        torch.Size([2, 197, 768])
    """
    parameters = (down_weight, down_bias, up_weight, up_bias)
    if any_autocast():
        lowered = autocast_dtype(x, *(tensor for tensor in parameters if tensor is not None))
        if lowered is not None:
            x = x.to(lowered)
    options = residual, scale, dropout_p, training, activation, backend
    return adapter_ops.call(x, parameters, *options)


def token_pool(
    x: Tensor, weight: Tensor, *, return_attention: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The tokenizer of Visual Transformers: each token is a softmax-weighted mean of all pixels.

    ``softmax(x @ weight.T over the pixels).T @ x``, in one pass over x: the weights of the pixels are never stored.

    Args:
        x: ``[B, N, C]``, N pixels of C channels; float32, float64, float16 or bfloat16, any strides.
        weight: ``[T, C]``, shared by all images (the filter tokenizer), or ``[B, T, C]`` (the recurrent tokenizer).
        return_attention: whether to also return the weights of the pixels ``[B, N, T]``, computed by plain torch.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the best for the tensors.

    Returns:
        ``[B, T, C]`` in x's dtype, and the weights if asked for. Sums are made in float32 (float64 for float64).

    Logits may be of any size: no exponent is positive. Without pixels the tokens are zero. Gradients flow to x and
    weight in one pass over x and are bitwise reproducible. Under autocast both are cast to the autocast dtype.

    Examples:
        >>> vitkern.token_pool(torch.randn(8, 3136, 256), torch.randn(16, 256)).shape
        torch.Size([8, 16, 256])
    """
    lowered = autocast_dtype(x, weight)
    if lowered is not None:
        x, weight = x.to(lowered), weight.to(lowered)
    tokens = token_pool_ops.token_pool(x, weight, backend)
    if not return_attention:
        return tokens
    wide = native.accumulator(x.dtype)  # 16 bits do not hold every logit
    with without_autocast(x.device.type):
        return tokens, reference.token_pool_attention(x.to(wide), weight.to(x.dtype).to(wide)).to(x.dtype)


def token_project(
    x: Tensor, query: Tensor, key: Tensor, tokens: Tensor, *, backend: str | None = None
) -> Tensor:
    """The projector of Visual Transformers: adds a softmax-weighted mean of the tokens to each pixel.

    ``x + softmax(query @ key.T over the tokens) @ tokens``; the weights of the tokens are never stored.

    Args:
        x: ``[B, N, C]``, N pixels of C channels; float32, float64, float16 or bfloat16, any strides.
        query: ``[B, N, K]``, the queries of the pixels.
        key: ``[B, T, K]``, the keys of the tokens.
        tokens: ``[B, T, C]``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the best for the tensors.

    Returns:
        ``[B, N, C]`` in x's dtype. Sums are made in float32 (float64 for float64).

    Without tokens the result is x. Gradients flow to all four and are bitwise reproducible; x is not saved for
    backward. All four have one dtype; autocast casts them to its own.

    Examples:
        >>> x, query = torch.randn(8, 196, 256), torch.randn(8, 196, 64)
        >>> key, tokens = torch.randn(8, 16, 64), torch.randn(8, 16, 256)
        >>> vitkern.token_project(x, query, key, tokens).shape
        torch.Size([8, 196, 256])
    """
    lowered = autocast_dtype(x, query, key, tokens)
    if lowered is not None:
        x, query, key, tokens = (tensor.to(lowered) for tensor in (x, query, key, tokens))
    return token_project_ops.token_project(x, query, key, tokens, backend)
