# SPDX-License-Identifier: Apache-2.0
"""The shapes that people run, as data: the same tables feed correctness, gradients and timing."""

from __future__ import annotations

from vitkern.cases.attention import (
    ATTENTION_CASES,
    MsDeformAttnCase,
    MsDeformAttnInputs,
    make_inputs,
)
from vitkern.cases.dense import ADAPTER_CASES, TOKEN_CASES, AdapterBottleneckCase, TokenCase

__all__ = [
    "ADAPTER_CASES",
    "ATTENTION_CASES",
    "TOKEN_CASES",
    "AdapterBottleneckCase",
    "Case",
    "MsDeformAttnCase",
    "MsDeformAttnInputs",
    "TokenCase",
    "make_inputs",
]

Case = MsDeformAttnCase | AdapterBottleneckCase | TokenCase
