# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for cards that are not here and prints one JSON line of static figures for each.

Needs a process without TRITON_INTERPRET: ``python tests/aot_compile.py --arch 90 --case fp32x32``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitkern.triton_kernels import ms_deform_attn, ms_deform_attn_backward, ms_deform_attn_deterministic

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
TABLES = ("shapes_ptr", "level_start_ptr", "order_ptr", "first_ptr", "cells_ptr")
KERNELS = {
    "forward": ms_deform_attn.ms_deform_attn_forward,
    "backward": ms_deform_attn_backward.ms_deform_attn_backward,
    "cells": ms_deform_attn_deterministic.ms_deform_attn_cells,
    "gather_grad_value": ms_deform_attn_deterministic.ms_deform_attn_gather_grad_value,
}
FUSED_ONLY = {"reference_ptr", "softmax_ptr", "grad_places_ptr"}
FORMS = {"plain": 0, "points": 2, "boxes": 4}  # numbers of a reference point
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _signature(kernel, dtype: str, numbers: int) -> dict[str, str]:
    """Types of the arguments: value and its like in dtype, everything else as float tensors, tables or sizes."""
    absent = {"level_of_group_ptr"} if numbers else {"level_of_group_ptr"} | FUSED_ONLY
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr or name in absent:
            signature[name] = "constexpr"
        elif name in TABLES:
            signature[name] = "*i64"
        elif name in ("value_ptr", "output_ptr", "grad_output_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
    return signature


def _constants(kernel, channels: int, table: dict[str, int], numbers: int) -> dict[str, object]:
    """Deformable-DETR's four levels of four points."""
    known = {"D": channels, "L": 4, "GROUPS": 4, "GROUP_POINTS": 4, "BILINEAR": True, "ACC": tl.float32}
    known |= {"OFFSET": tl.int32, "BLOCK_P": 4, "BLOCK_K": 16, "NUMBERS": numbers}
    known |= {"BLOCK_S": table["BLOCK_Q"], "level_of_group_ptr": None} | table
    if not numbers:
        known |= dict.fromkeys(FUSED_ONLY)
    if kernel is KERNELS["cells"]:
        known["BLOCK_Q"] = 128
    return {p.name: known[p.name] for p in kernel.params if p.name in known}


def compile_kernel(name: str, arch: int, dtype: str, channels: int, numbers: int):
    """One kernel as the launcher would specialise it: 16-byte aligned pointers, eight heads."""
    kernel = KERNELS[name]
    table = ms_deform_attn.launch_table(channels, ITEM_BYTES[dtype], name == "backward", numbers > 0)
    signature = _signature(kernel, dtype, numbers)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, _constants(kernel, channels, table, numbers), aligned)
    options = {"num_warps": table["num_warps"], "enable_fp_fusion": True}
    if name == "forward" and "maxnreg" in table:
        options["maxnreg"] = table["maxnreg"]
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def static_figures(compiled) -> dict[str, object]:
    """Registers, spills and shared memory from the cubin; the widths of global accesses from the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    resources = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = re.findall(r"\b((?:ld|st|red|atom)\.global[\w.:]*)", compiled.asm["ptx"])
    return {
        "registers": resources["REG"],
        "local": resources["LOCAL"],
        "stack": resources["STACK"],
        "shared": compiled.metadata.shared,
        "accesses": {access: accesses.count(access) for access in sorted(set(accesses))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100, 120])
    parser.add_argument("--case", nargs="+", default=["fp32x32", "fp16x32", "bf16x64", "fp32x30"])
    parser.add_argument("--form", nargs="+", default=["plain", "boxes"], choices=list(FORMS))
    options = parser.parse_args()
    for name, arch, case, form in itertools.product(options.kernel, options.arch, options.case, options.form):
        if name == "cells" and case != options.case[0]:
            continue  # it knows neither value nor channels
        dtype, channels = case.split("x")
        figures = static_figures(compile_kernel(name, arch, dtype, int(channels), FORMS[form]))
        row = {"kernel": name, "arch": arch, "case": case, "form": form}
        print(json.dumps(row | figures), flush=True)


if __name__ == "__main__":
    main()
