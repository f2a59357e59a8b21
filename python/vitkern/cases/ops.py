# SPDX-License-Identifier: Apache-2.0
"""The ops of the package, each with its record. All of them are checked, timed and tested, on a GPU too.

A new op needs a case (its shapes), a `make` that builds a Problem from one, and an Op that names its settings.
"""

from __future__ import annotations

from vitkern.cases.attention_settings import MS_DEFORM_ATTN, MS_DEFORM_ATTN_FUSED
from vitkern.cases.dense_settings import ADAPTER_BOTTLENECK, TOKEN_POOL, TOKEN_PROJECT

OPS = {
    op.name: op
    for op in (MS_DEFORM_ATTN, MS_DEFORM_ATTN_FUSED, ADAPTER_BOTTLENECK, TOKEN_POOL, TOKEN_PROJECT)
}
