# SPDX-License-Identifier: Apache-2.0
"""The shapes that users run, as data, and inputs of these shapes: the same for correctness, gradients and timing."""

from __future__ import annotations

from vitkern.cases.attention import ATTENTION_CASES, MsDeformAttnCase
from vitkern.cases.attention_inputs import (
    MsDeformAttnInputs,
    fused_inputs,
    inside_a_cell,
    levels_of,
    locations_of,
    make_inputs,
    off_edge_inputs,
    pixel_centres,
)
from vitkern.cases.dense import ADAPTER_CASES, TOKEN_CASES, AdapterBottleneckCase, TokenCase
from vitkern.cases.record import Case
from vitkern.cases.results import Function, results

__all__ = [
    "ADAPTER_CASES",
    "ATTENTION_CASES",
    "TOKEN_CASES",
    "AdapterBottleneckCase",
    "Case",
    "Function",
    "MsDeformAttnCase",
    "MsDeformAttnInputs",
    "TokenCase",
    "fused_inputs",
    "inside_a_cell",
    "levels_of",
    "locations_of",
    "make_inputs",
    "off_edge_inputs",
    "pixel_centres",
    "results",
]
