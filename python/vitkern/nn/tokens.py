# SPDX-License-Identifier: Apache-2.0
"""The token modules of Visual Transformers (arXiv 2006.03677): equations (1) to (5) and the ablations' tokenizers.

The paper's equations have as many channels in the map as in the tokens. If they differ, linear maps without bias
project the tokens' values and, if the map changes its width, the projector's shortcut.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.functional import token_pool, token_project


def _channels(given: int, wanted: int | None) -> nn.Module:
    """A linear map if the channels change, else the identity."""
    return nn.Identity() if wanted is None or wanted == given else nn.Linear(given, wanted, bias=False)


class FilterTokenizer(nn.Module):
    """Equation (1): ``softmax(X W_A)`` over the pixels, transposed, times ``X``.

    Args:
        channels: channels of the map, C.
        tokens: number of tokens, T.
        token_channels: channels of a token; None: C, without a linear map.
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
        """The weights of the pixels for each token; they add up to 1."""
        return token_pool(x, self.attention.weight, return_attention=True, backend=self.backend)[1]


class RecurrentTokenizer(nn.Module):
    """Equation (2): the filter is computed from the previous tokens, ``W_R = T_in W_TR``.

    Args:
        channels: channels of the map, C.
        token_channels: channels of a token, in and out; None: C.
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
    """A map [B, H W, C], resized to [B, T, C]: bilinear, with rows and columns as nearly equal as T allows."""
    rows = max(rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0)
    maps = x.transpose(1, 2).unflatten(2, (height, width))
    maps = F.interpolate(maps, size=(rows, tokens // rows), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


class PoolingTokenizer(nn.Module):
    """The downsampled map: each of its pixels is a token.

    Args:
        channels: channels of the map, C.
        tokens: number of tokens, T.
        token_channels: channels of a token; None: C, without a linear map.
    """

    def __init__(self, channels: int, tokens: int, token_channels: int | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.value = _channels(channels, token_channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C] -> [B, T, CT]
        return self.value(_downsampled(x, height, width, self.tokens))


class ClusteringTokenizer(nn.Module):
    """Equation (1) with k-means centroids of the image's own pixels, on the unit sphere, as W_A.

    Args:
        channels: channels of the map, C.
        tokens: number of tokens, T. The initial centroids are the downsampled map.
        token_channels: channels of a token; None: C, without a linear map.
        iterations: iterations of k-means.
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
    """Equations (3) and (4): tokens attend to each other, ``T + softmax((T K)(T Q)^T) T``, then ``T + relu(T F1) F2``.

    Args:
        channels: channels of a token.
        key_channels: channels of keys and queries; None: channels.
        hidden_channels: channels between F1 and F2; None: channels.
        scaled: whether to divide products of keys and queries by the root of key_channels, unlike the paper.
        value_proj: whether the values are a linear map of the tokens, unlike the paper.
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
        # The paper swaps the roles of K and Q: the softmax runs over the rows of T Q.
        asking, answering = self.scale * self.key(tokens), self.query(tokens)
        tokens = token_project(tokens, asking, answering, self.value(tokens), backend=self.backend)
        return tokens + self.fc2(self.fc1(tokens).relu())


class TokenProjector(nn.Module):
    """Equation (5): ``X + softmax over the tokens of ((X W_Q)(T W_K)^T) T``.

    Args:
        channels: channels of the map, C.
        token_channels: channels of a token; None: C.
        out_channels: channels of the new map; None: C.
        key_channels: channels of queries and keys; None: C.
        scaled: whether to divide their products by the root of key_channels, unlike the paper.
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
