# SPDX-License-Identifier: Apache-2.0
"""Attention for pictures: sampling points, tokenizer weights, attention distances and Grad-CAM. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.blocks import to_map
from vitkern.models.vitae_cells import WindowAttention


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the token grid of an image of this size; a class token may come before the grid."""
    for stride in (4, 8, 16, 32):
        rows, columns = -(-height // stride), -(-width // stride)
        if tokens - rows * columns in (0, 1):
            return rows, columns
    raise ValueError(f"{tokens} tokens match no map of an image of {height} x {width}")


@contextmanager
def _observed(model: nn.Module, method: str, observe: Callable[..., None]) -> Iterator[None]:
    """A context in which `observe` is called before each module with this method: name, module, its arguments."""

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            observe(name, module, *inputs, **named)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, module) for name, module in model.named_modules() if hasattr(module, method)]
    if not handles:
        raise ValueError(f"no module of {type(model).__name__} has the method {method}")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_distance(weights: Tensor, rows: int, columns: int, real: Tensor) -> Tensor:
    """Mean distance [M], in grid steps, of weights [B, M, N, N] over the tokens that are real [B, N]."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack(grid, -1).flatten(0, 1).to(weights)
    weights = weights * real[:, None, None]
    distances = (weights * torch.cdist(places, places)).sum(-1) / weights.sum(-1)  # [B, M, N]
    return (distances * real[:, None]).sum((0, 2)) / real.sum()


@torch.no_grad()
def mean_attention_distances(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The mean attention distances of a ViTAE in pixels: for each attention, one for each head, [M].

    A distance is the sum of attention times distance over all other tokens, averaged over images and tokens. Class
    tokens and the padding of windows are left out.
    """
    found = {}

    def observe(name: str, module: nn.Module, *inputs: Any) -> None:
        x, height, width = inputs[0], *inputs[-2:]
        weights = module.attention_weights(*inputs).float()  # type: ignore[operator]
        if isinstance(module, WindowAttention):
            rows = columns = module.window_size
            real = module.windows(torch.ones_like(x[:, :, :1]), height, width)[0].squeeze(-1).float()
        else:
            first = weights.shape[-1] - height * width
            rows, columns, weights = height, width, weights[:, :, first:, first:]
            real = weights.new_ones(weights.shape[0], height * width)
        found[name] = _mean_distance(weights, rows, columns, real) * (image.shape[2] / height)

    with _observed(model, "attention_weights", observe):
        model(image)
    return found


@torch.no_grad()
def token_attention(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The attention of a Visual Transformer's tokens: for each tokenizer, weights of the pixels [B, T, h, w].

    The weights of a token add up to 1. Pooling tokenizers have none.
    """
    found = {}

    def observe(name: str, module: nn.Module, *inputs: Any, **named: Any) -> None:
        weights = module.attention_map(*inputs, **named)  # type: ignore[operator]  # [B, N, T]
        rows, columns = grid_of(weights.shape[1], *image.shape[2:])
        found[name] = to_map(weights, rows, columns)

    with _observed(model, "attention_map", observe):
        model(image)
    return found


@torch.no_grad()
def sampling_points(model: nn.Module, image: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Deformable attention of each layer: sampling locations [B, Q, M, L, P, 2] and weights [B, Q, M, L, P].

    Locations are (x, y) from 0 to 1 across the image.
    """
    found = {}

    def observe(name: str, module: nn.Module, *inputs: Any, **named: Any) -> None:
        found[name] = module.sampling_points(*inputs, **named)  # type: ignore[operator]

    with _observed(model, "sampling_points", observe):
        model(image)
    return found


def grad_cam(
    model: nn.Module, image: Tensor, classes: Tensor | None = None, layer: nn.Module | None = None
) -> Tensor:
    """Grad-CAM (arXiv 1610.02391): the evidence of each pixel for a class.

    Args:
        model: a classifier, in evaluation mode.
        image: ``[B, C, H, W]``.
        classes: a class for each image, ``[B]``; None: the predicted classes.
        layer: the layer to explain, whose output is a map or tokens; None: the last stage of a ViTAE. If a class token
            is classified, choose an earlier layer; for a VTResNet, ``model.layer3[-1]``.

    Returns:
        ``[B, H, W]``, from 0 to 1.
    """
    if layer is None:
        if not hasattr(model, "layers"):
            raise ValueError(
                f"{type(model).__name__} has no stages of which the last could be taken: give a layer"
            )
        layer = model.layers[-1]  # type: ignore[index, assignment]
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        with torch.enable_grad():
            logits = model(image.detach().requires_grad_())
    finally:
        handle.remove()
    classes = logits.argmax(-1) if classes is None else classes
    if not seen:
        raise ValueError("the layer is not called itself, only modules inside it: give one of them")
    features = seen[0]
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    if features.dim() == 3:
        rows, columns = grid_of(features.shape[1], *image.shape[2:])
        features = to_map(features[:, -rows * columns :], rows, columns)
        gradient = to_map(gradient[:, -rows * columns :], rows, columns)
    if not gradient.any():
        raise ValueError("the class does not depend on the output of this layer: give an earlier layer")
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    cam = F.interpolate(cam, image.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)
