# SPDX-License-Identifier: Apache-2.0
"""All measured cases. Each op has a module here that lists its kernels for a dtype and a number of channels."""

from __future__ import annotations

from benchmarks.static import ms_deform_attn
from benchmarks.static.case import Case

OPS = (ms_deform_attn,)


def all_cases(names: list[str]) -> list[Case]:
    """The kernels of all ops for cases such as fp32x32; a kernel that several cases share appears once."""
    found: dict[str, Case] = {}
    for name in names:
        dtype, channels = name.split("x")
        for op in OPS:
            for case in op.cases(dtype, int(channels)):
                found.setdefault(case.label, case)
    return list(found.values())
