# SPDX-License-Identifier: Apache-2.0
"""The kernels of ms_deform_attn and of Deformable-DETR's algorithm, for four levels of four points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.static.case import Case, Cuda, Points, Target, Triton

OP = "ms_deform_attn"
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
CPP_TYPES = {"fp32": "float", "fp16": "__half", "bf16": "__nv_bfloat16"}
LEVELS, LEVEL_POINTS = 4, 4
POINTS = LEVELS * LEVEL_POINTS
LEVEL_BYTES = 16 * LEVELS  # of csrc/ms_deform_attn/device.cuh
LIMITS = {"forward": {4: 10.0, 2: 14.0}, "backward": {4: 34.0, 2: 34.0}}  # by bytes of a number
TASK = "const __grid_constant__ Task"


def cases(dtype: str, channels: int) -> Iterator[Case]:
    yield from _cuda(dtype, channels)
    yield from _triton(dtype, channels)
    yield from _baseline(dtype, channels)


def _target(kernel: str, form: str, dtype: str, channels: int) -> Target | None:
    if channels != 32:
        return None
    limit = LIMITS[kernel][ITEM_BYTES[dtype]] if form == "plain" else None
    return Target(limit, occupancy=50, width=16)


def _cuda(dtype: str, channels: int) -> Iterator[Case]:
    vector = 16 // ITEM_BYTES[dtype] if channels in (16, 32, 64) else 1
    used = channels if vector > 1 else 0  # as cuda.cu dispatches
    lanes = channels // vector if vector > 1 else 32
    points = Points(r"LDG\.E\.128", 4, vector, lanes) if vector > 1 else None
    for kernel in ("forward", "backward"):
        for form, fused in (("plain", "false"), ("fused", "true")):
            name = f"{OP}_{kernel}<{CPP_TYPES[dtype]}, {used}, {fused}>"
            source = Cuda(f"{OP}/{kernel}.cuh", name, TASK)
            target = _target(kernel, form, dtype, channels) if vector > 1 else None
            yield Case(OP, "cuda", kernel, form, dtype, channels, 256, source, LEVEL_BYTES, points, target)
    for form, fused in (("plain", "false"), ("fused", "true")):
        accumulators = "float*", "const float*"
        for kernel, parameters in (
            ("cells", f"{TASK}, int64_t*, int64_t, {accumulators[0]}"),
            ("gather_grad_value", f"{TASK}, const int64_t*, const int64_t*, {accumulators[1]}"),
        ):
            name = f"{OP}_{kernel}<{CPP_TYPES[dtype]}, {fused}>"
            source = Cuda(f"{OP}/deterministic.cuh", name, parameters)
            target = Target(occupancy=50)
            yield Case(OP, "cuda", kernel, form, dtype, channels, 256, source, LEVEL_BYTES, None, target)


def _baseline(dtype: str, channels: int) -> Iterator[Case]:
    if channels != 32 or dtype == "bf16":
        return
    for kernel, threads in (("forward", 1024), ("backward", channels)):
        name = (
            f"msda_{kernel}<{CPP_TYPES[dtype]}>"
            if kernel == "forward"
            else f"msda_backward<{CPP_TYPES[dtype]}, 32>"
        )
        source = Cuda("benchmarks/baseline_msda.cuh", name, "const Arguments", namespace="baseline")
        points = Points(r"LDG", 7, 1, LEVEL_POINTS)  # x, y, weight, four corners
        yield Case(OP, "baseline", kernel, "plain", dtype, channels, threads, source, 0, points)


def _triton(dtype: str, channels: int) -> Iterator[Case]:
    for kernel in ("forward", "backward", "cells", "gather_grad_value"):
        if kernel == "cells" and (dtype, channels) != ("fp32", 32):
            continue  # it knows neither value nor channels
        for form, numbers in (("plain", 0), ("fused, points", 2), ("fused, boxes", 4)):
            source = Triton(lambda k=kernel, n=numbers: _specialise(k, dtype, channels, n))
            vector = 16 // ITEM_BYTES[dtype] if kernel == "forward" else 4
            full = channels in (16, 32, 64) and kernel in ("forward", "backward")
            width = rf"LDG\.E\.{vector * ITEM_BYTES[dtype] * 8}"
            loads = 5 if width.endswith(".64") else 4  # a location is a pair of floats
            points = Points(width, loads, vector, LEVEL_POINTS) if full else None
            yield Case(OP, "triton", kernel, form, dtype, channels, 128, source, 0, points)


def _specialise(name: str, dtype: str, channels: int, numbers: int):
    """Specialises a kernel as the launcher in vitkern.ops.triton_ms_deform_attn does, for eight heads."""
    import triton.language as tl

    from vitkern.triton_kernels import ms_deform_attn, ms_deform_attn_backward, ms_deform_attn_deterministic

    modules = (ms_deform_attn, ms_deform_attn_backward, ms_deform_attn_deterministic)
    (kernel,) = (getattr(m, f"{OP}_{name}") for m in modules if f"{OP}_{name}" in vars(m))
    table = ms_deform_attn.launch_table(channels, ITEM_BYTES[dtype], name == "backward")
    known = {"D": channels, "L": LEVELS, "GROUPS": LEVELS, "GROUP_POINTS": LEVEL_POINTS, "BILINEAR": True}
    known |= {"ACC": tl.float32, "OFFSET": tl.int32, "BLOCK_P": LEVEL_POINTS, "BLOCK_K": POINTS}
    known |= {"NUMBERS": numbers, "BLOCK_S": table["BLOCK_Q"], "level_of_group_ptr": None} | table
    if not numbers:
        known |= dict.fromkeys(("reference_ptr", "softmax_ptr", "grad_places_ptr"))
    if name == "cells":
        known["BLOCK_Q"] = 128
    constants = {p.name: known[p.name] for p in kernel.params if p.name in known}
    options = {"num_warps": table["num_warps"]}
    if name == "forward" and "maxnreg" in table:
        options["maxnreg"] = table["maxnreg"]
    return kernel, _signature(kernel, dtype, constants), constants, options


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """The types of the arguments: tensors of the value's dtype, float tensors, tables or sizes."""
    tables = ("shapes_ptr", "level_start_ptr", "order_ptr", "first_ptr", "cells_ptr")
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr or name in constants:
            signature[name] = "constexpr"
        elif name in tables:
            signature[name] = "*i64"
        elif name in ("value_ptr", "output_ptr", "grad_output_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
    return signature
