# SPDX-License-Identifier: Apache-2.0
"""All that is measured. An op comes in by its module here, which lists its kernels for a dtype and channels."""

from __future__ import annotations

from benchmarks.static import ms_deform_attn
from benchmarks.static.case import Case

OPS = (ms_deform_attn,)


def all_cases(names: list[str]) -> list[Case]:
    """The kernels of all ops for cases like fp32x32; one that is the same for several cases comes once."""
    found: dict[str, Case] = {}
    for name in names:
        dtype, channels = name.split("x")
        for op in OPS:
            for case in op.cases(dtype, int(channels)):
                found.setdefault(case.label, case)
    return list(found.values())
