# SPDX-License-Identifier: Apache-2.0
"""Cases of the ops that multiply matrices, the adapter bottleneck and the token ops, each with its inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

KEYS = 64  # channels of a query of token_project


@dataclass(frozen=True)
class AdapterBottleneckCase:
    name: str
    what: str
    shape: tuple[int, ...]  # of x without its channels
    channels: int
    hidden: int

    @property
    def batch(self) -> int:
        return self.shape[0]

    def with_batch(self, batch: int) -> AdapterBottleneckCase:
        return replace(self, shape=(batch, *self.shape[1:]))

    def shrunk(self) -> AdapterBottleneckCase:
        """The same dispatch at a size for exhaustive checks: few rows."""
        return replace(self, shape=(13,))

    def make(
        self, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """x, weights and biases of the size of trained ones, a residual and a scale."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

        channels, hidden = self.channels, self.hidden
        return {
            "x": normal(*self.shape, channels),
            "down_weight": normal(hidden, channels) / max(channels, 1) ** 0.5,
            "down_bias": normal(hidden) * 0.1,
            "up_weight": normal(channels, hidden) / max(hidden, 1) ** 0.5,
            "up_bias": normal(channels) * 0.1,
            "residual": normal(*self.shape, channels),
            "scale": torch.full((1,), 0.7, dtype=dtype, device=device),
        }


ADAPTER_CASES = {
    case.name: case
    for case in (
        AdapterBottleneckCase("adaptformer-video", "AdaptFormer-64, ViT-B, video", (2, 784), 768, 64),
        AdapterBottleneckCase("adaptformer-image", "AdaptFormer-64, ViT-B", (8, 197), 768, 64),
        AdapterBottleneckCase("adaptformer-4", "AdaptFormer-4, ViT-B", (8, 197), 768, 4),
        AdapterBottleneckCase("adaptformer-vit-l", "AdaptFormer-64, ViT-L", (8, 197), 1024, 64),
        AdapterBottleneckCase("adaptformer-512", "AdaptFormer-512, ViT-B", (8, 197), 768, 512),
        *(
            AdapterBottleneckCase(
                f"swin-b-{stage}", f"Swin-B, stage {stage}", (2, size, size), dim, dim // 12
            )
            for stage, (size, dim) in enumerate(((56, 128), (28, 256), (14, 512), (7, 1024)), 1)
        ),
        AdapterBottleneckCase("one-image", "AdaptFormer-64, ViT-B, inference", (1, 197), 768, 64),
    )
}


@dataclass(frozen=True)
class TokenCase:
    name: str
    what: str
    batch: int
    pixels: int
    channels: int
    tokens: int

    def with_batch(self, batch: int) -> TokenCase:
        return replace(self, batch=batch)

    def shrunk(self) -> TokenCase:
        """The same dispatch at a size for exhaustive checks: few pixels."""
        return replace(self, batch=min(self.batch, 2), pixels=min(self.pixels, 53))

    def make_pool(
        self, *, recurrent: bool = False, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x and weight in float64, with logits of about unit size."""
        generator = torch.Generator().manual_seed(seed)
        images = (self.batch,) if recurrent else ()
        x = torch.randn(self.batch, self.pixels, self.channels, generator=generator, dtype=torch.float64)
        weight = torch.randn(*images, self.tokens, self.channels, generator=generator, dtype=torch.float64)
        return x.to(device), weight.to(device) / max(self.channels, 1) ** 0.5

    def make_project(self, *, keys: int = KEYS, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
        """x, query, key and tokens in float64, with logits of about unit size."""
        generator = torch.Generator().manual_seed(seed)
        sizes = ((self.pixels, self.channels), (self.pixels, keys), (self.tokens, keys))
        x, query, key, tokens = (
            torch.randn(self.batch, *size, generator=generator, dtype=torch.float64).to(device)
            for size in (*sizes, (self.tokens, self.channels))
        )
        return x, query, key / max(keys, 1) ** 0.5, tokens


TOKEN_CASES = {
    case.name: case
    for case in (
        TokenCase("vt-3136", "56 x 56 pixels, 16 tokens", 8, 3136, 256, 16),
        TokenCase("vt-resnet18", "VT-ResNet-18, 14 x 14 pixels", 32, 196, 256, 16),
        TokenCase("vt-resnet50", "VT-ResNet-50, 14 x 14 pixels", 32, 196, 1024, 16),
        TokenCase("vt-fpn", "VT-FPN, finest level of 800 x 1216", 1, 60800, 256, 8),
        TokenCase("vt-64", "VT-ResNet with 64 tokens", 8, 196, 256, 64),
    )
}
