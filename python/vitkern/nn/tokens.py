# SPDX-License-Identifier: Apache-2.0
"""The token modules of Visual Transformers (arXiv 2006.03677): its equations (1) to (5) and its ablations' tokenizers.

The paper's equations have as many channels in the map as in the tokens. Where they differ, linear maps lead from one to
the other: the tokens' values and, where the map changes its width, the shortcut of the projector. None has a bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.functional import token_pool, token_project


def _channels(given: int, wanted: int | None) -> nn.Module:
    """A linear map where the channels change."""
    return nn.Identity() if wanted is None or wanted == given else nn.Linear(given, wanted, bias=False)


class FilterTokenizer(nn.Module):
    """Equation (1): ``softmax over the pixels of (X W_A)``, transposed, times ``X``.

    Args:
        channels: of the map, C.
        tokens: how many, T.
        token_channels: of a token; None: C, and no map between.
        backend: passed on to :func:`vitkern.token_pool`.
    """

    def __init__(
        self, channels: int, tokens: int, token_channels: int | None = None, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.attention = nn.Linear(channels, tokens, bias=False)
        self.value = _channels(channels, token_channels)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, T, CT]
        return self.value(token_pool(x, self.attention.weight, backend=self.backend))

    def attention_map(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, T]
        """Where each token looks: its weights of the pixels, which add up to 1."""
        return token_pool(x, self.attention.weight, return_attention=True, backend=self.backend)[1]


class RecurrentTokenizer(nn.Module):
    """Equation (2): the filter is made of the previous tokens, ``W_R = T_in W_TR``.

    Args:
        channels: of the map, C.
        token_channels: of a token, coming in and going out; None: C.
        backend: passed on to :func:`vitkern.token_pool`.
    """

    def __init__(
        self, channels: int, token_channels: int | None = None, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.attention = nn.Linear(token_channels or channels, channels, bias=False)
        self.value = _channels(channels, token_channels)
        self.backend = backend

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:  # [B, N, C], [B, T, CT] -> [B, T, CT]
        return self.value(token_pool(x, self.attention(tokens), backend=self.backend))

    def attention_map(self, x: Tensor, tokens: Tensor) -> Tensor:  # [B, N, C], [B, T, CT] -> [B, N, T]
        return token_pool(x, self.attention(tokens), return_attention=True, backend=self.backend)[1]


def _downsampled(x: Tensor, height: int, width: int, tokens: int) -> Tensor:
    """A map [B, H W, C] as [B, T, C]: bilinear samples in rows and columns as nearly as many as T allows."""
    rows = max(rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0)
    maps = x.transpose(1, 2).unflatten(2, (height, width))
    maps = F.interpolate(maps, size=(rows, tokens // rows), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


class PoolingTokenizer(nn.Module):
    """The map made smaller, a token for each pixel that is left.

    Args:
        channels: of the map, C.
        tokens: how many, T.
        token_channels: of a token; None: C, and no map between.
    """

    def __init__(self, channels: int, tokens: int, token_channels: int | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.value = _channels(channels, token_channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C] -> [B, T, CT]
        return self.value(_downsampled(x, height, width, self.tokens))


class ClusteringTokenizer(nn.Module):
    """Equation (1) with the centroids of the image's own pixels for W_A, which k-means finds on the unit sphere.

    Args:
        channels: of the map, C.
        tokens: how many, T. The first centroids are the map made smaller.
        token_channels: of a token; None: C, and no map between.
        iterations: of k-means.
        backend: passed on to :func:`vitkern.token_pool`.
    """

    def __init__(
        self,
        channels: int,
        tokens: int,
        token_channels: int | None = None,
        *,
        iterations: int = 5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.iterations, self.backend = tokens, iterations, backend
        self.value = _channels(channels, token_channels)

    @torch.no_grad()
    def centroids(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C] -> [B, T, C]
        centroids = F.normalize(_downsampled(x, height, width, self.tokens), dim=-1)
        x = F.normalize(x, dim=-1)
        for _ in range(self.iterations):
            nearest = (x @ centroids.transpose(1, 2)).argmax(-1)
            members = F.one_hot(nearest, self.tokens).to(x.dtype).transpose(1, 2)  # [B, T, N]
            sums = F.normalize(members @ x, dim=-1)
            centroids = torch.where(members.sum(-1, keepdim=True) > 0, sums, centroids)
        return centroids

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C] -> [B, T, CT]
        return self.value(token_pool(x, self.centroids(x, height, width), backend=self.backend))

    def attention_map(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C] -> [B, H W, T]
        weight = self.centroids(x, height, width)
        return token_pool(x, weight, return_attention=True, backend=self.backend)[1]


class TokenTransformer(nn.Module):
    """Equations (3) and (4): tokens look at each other, ``T + softmax((T K)(T Q)^T) T``, then ``T + relu(T F1) F2``.

    Args:
        channels: of a token.
        key_channels: of keys and queries; None: as many.
        hidden_channels: between F1 and F2; None: as many.
        scaled: whether products of keys and queries are divided by the root of their length, as elsewhere.
        value_proj: whether tokens look at a linear map of the tokens, as elsewhere.
        backend: passed on to :func:`vitkern.token_project`.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int | None = None,
        hidden_channels: int | None = None,
        *,
        scaled: bool = False,
        value_proj: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.scale = (key_channels or channels) ** -0.5 if scaled else 1.0
        self.key = nn.Linear(channels, key_channels or channels, bias=False)
        self.query = nn.Linear(channels, key_channels or channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False) if value_proj else nn.Identity()
        self.fc1 = nn.Linear(channels, hidden_channels or channels, bias=False)
        self.fc2 = nn.Linear(hidden_channels or channels, channels, bias=False)
        self.backend = backend

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T, CT] -> [B, T, CT]
        # The paper's K asks and its Q answers: the softmax runs over the tokens that Q made.
        asking, answering = self.scale * self.key(tokens), self.query(tokens)
        tokens = token_project(tokens, asking, answering, self.value(tokens), backend=self.backend)
        return tokens + self.fc2(self.fc1(tokens).relu())


class TokenProjector(nn.Module):
    """Equation (5): ``X + softmax over the tokens of ((X W_Q)(T W_K)^T) T``.

    Args:
        channels: of the map, C.
        token_channels: of a token; None: C.
        out_channels: of the new map; None: C.
        key_channels: of queries and keys; None: C.
        scaled: whether their products are divided by the root of key_channels, as elsewhere.
        backend: passed on to :func:`vitkern.token_project`.
    """

    def __init__(
        self,
        channels: int,
        token_channels: int | None = None,
        out_channels: int | None = None,
        key_channels: int | None = None,
        *,
        scaled: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.scale = (key_channels or channels) ** -0.5 if scaled else 1.0
        token_channels, out_channels = token_channels or channels, out_channels or channels
        self.query = nn.Linear(channels, key_channels or channels, bias=False)
        self.key = nn.Linear(token_channels, key_channels or channels, bias=False)
        self.value = _channels(token_channels, out_channels)
        self.shortcut = _channels(channels, out_channels)
        self.backend = backend

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:  # [B, N, C], [B, T, CT] -> [B, N, C']
        query, key = self.query(x), self.scale * self.key(tokens)
        return token_project(self.shortcut(x), query, key, self.value(tokens), backend=self.backend)
