# SPDX-License-Identifier: Apache-2.0
"""Modules around the ops, with the parameter names of the original projects."""

from vitkern.nn.adapter_bottleneck import AdapterBottleneck
from vitkern.nn.ms_deform_attn import MSDeformAttn
from vitkern.nn.tokens import (
    ClusteringTokenizer,
    FilterTokenizer,
    PoolingTokenizer,
    RecurrentTokenizer,
    TokenProjector,
    TokenTransformer,
)

__all__ = [
    "AdapterBottleneck",
    "ClusteringTokenizer",
    "FilterTokenizer",
    "MSDeformAttn",
    "PoolingTokenizer",
    "RecurrentTokenizer",
    "TokenProjector",
    "TokenTransformer",
]
