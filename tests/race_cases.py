# SPDX-License-Identifier: Apache-2.0
"""Calls that run every CUDA kernel in every dtype and form, at sizes of two blocks and two rounds of each loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests import test_adapter_bottleneck, test_cuda_emulated, test_token_pool, test_token_project
from tests.helpers import UNITS, assert_as_exact_as, gradients, guarded_memory
from vitkern.cases import AdapterBottleneckCase, TokenCase
from vitkern.ops.plain import in_its_own_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.float64)
WIDE, BF16 = torch.float32, torch.bfloat16


class _CPU:
    device, backend = "cpu", "cuda"


class Call(NamedTuple):
    """A call of an op: `ours` runs it on the emulated kernels, `plain` in plain torch in a dtype."""

    inputs: dict[str, Tensor]
    ours: Callable[[], list[Tensor]]  # the result and all gradients
    plain: Callable[[torch.dtype | None], list[Tensor]]  # None: the call's own
    names: tuple[str, ...]
    atomic: str = ""  # the gradient that atomics sum up
    extra_tolerance: float = 0.0  # of a gradient that is a single long sum: error beyond plain torch's

    def run(self) -> list[Tensor]:
        with guarded_memory():
            return self.ours()

    def assert_right(self, actual: list[Tensor], *names: str) -> None:
        """Checks that the named results, by default all, are as exact as plain torch's."""
        rows = zip(self.names, actual, self.plain(None), self.plain(torch.float64))
        for name, ours, same, oracle in rows:
            if not names or name in names:
                extra_tolerance = self.extra_tolerance if ours.numel() == 1 else 0.0
                assert_as_exact_as(
                    ours, same, oracle, what=name, units=MANY_UNITS, extra_tolerance=extra_tolerance
                )


MANY_UNITS = UNITS | test_cuda_emulated.UNITS


class Case(NamedTuple):
    op: str
    name: str
    make: Callable[[], Call]
    blocks: int | None = None  # that run, of many

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def attention(
    channels: int,
    dtype: torch.dtype,
    *,
    numbers: int = 0,
    method: str = "bilinear",
    points: tuple[int, ...] = (3, 3, 3),
    wide: bool = False,
    deterministic: bool = False,
) -> Call:
    args = test_cuda_emulated.make(channels, dtype, points=points, queries=23, numbers=numbers)
    args[6] = method
    if wide:
        args[3], args[4] = args[3].float(), args[4].float()
    grad_output = torch.randn(2, 23, 3 * channels, dtype=torch.float64).to(dtype)
    names = ("output", "grad_value", "grad_locations", "grad_weights", "grad_computed")
    given = ("value", "spatial_shapes", "level_start_index", "locations", "weights", "reference_points")
    inputs = dict(zip(given, (*args[:5], args[7])))

    def plain(wanted: torch.dtype | None) -> list[Tensor]:
        results = test_cuda_emulated.plain(args, grad_output, wanted or dtype)
        if wide and wanted is None:  # plain torch has the points in value's dtype
            results = [*results[:2], *(result.float() for result in results[2:])]
        return results

    return Call(
        {name: tensor for name, tensor in inputs.items() if tensor is not None}
        | {"grad_output": grad_output},
        lambda: test_cuda_emulated.ours(
            args, grad_output, needed=(True,) * (4 if numbers else 3), deterministic=deterministic
        ),
        plain,
        names,
        "" if deterministic else "grad_value",
    )


def _dense(inputs, ours, oracle, names, **others) -> Call:
    tensors = tuple(inputs.values())
    grad_output = torch.randn_like(oracle(*tensors), dtype=torch.float64).to(tensors[0].dtype)

    def plain(wanted):
        if wanted is None:
            return gradients(in_its_own_dtype(oracle), tensors, grad_output)
        return gradients(oracle, [tensor.to(wanted) for tensor in tensors], grad_output.to(wanted))

    known = inputs | {"grad_output": grad_output}
    return Call(known, lambda: gradients(ours, tensors, grad_output), plain, names, **others)


def adapter(dtype: torch.dtype, rows: int, channels: int, hidden: int, without=(), **options) -> Call:
    case = AdapterBottleneckCase("", "", (rows,), channels, hidden)
    tensors = test_adapter_bottleneck.make(case, _CPU, dtype)
    for name in without:
        del tensors[name]
    ours, oracle = (
        test_adapter_bottleneck.call(tensors, backend, **options) for backend in ("cuda", "reference")
    )
    names = ("output", *(f"grad_{name}" for name in tensors))
    total = (oracle(*tensors.values()) - tensors.get("residual", 0)).abs().sum().item()
    extra_tolerance = total / 4 * torch.finfo(torch.float32).eps
    return _dense(tensors, ours, oracle, names, extra_tolerance=extra_tolerance)


def pool(dtype, pixels, channels, tokens, *, recurrent=False) -> Call:
    tensors = test_token_pool.make(
        TokenCase("", "", 2, pixels, channels, tokens), _CPU, dtype, recurrent=recurrent
    )
    ours, oracle = test_token_pool.call("cuda"), test_token_pool.call("reference")
    return _dense(dict(zip(("x", "weight"), tensors)), ours, oracle, test_token_pool.NAMES)


def project(dtype, pixels, channels, tokens, keys) -> Call:
    tensors = test_token_project.make(TokenCase("", "", 2, pixels, channels, tokens), _CPU, dtype, keys=keys)
    ours, oracle = test_token_project.call("cuda"), test_token_project.call("reference")
    names = ("x", "query", "key", "tokens")
    results = ("output", *(f"grad_{name}" for name in names))
    return _dense(dict(zip(names, tensors)), ours, oracle, results)


def _of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention_cases():
    for dtype in DTYPES:
        for channels in (37,) if dtype == torch.float64 else (16, 32, 64, 37):
            for form, numbers in (("plain", 0), ("boxes", 4)):
                options = {"points": (12, 12, 12) if channels in (37, 64) else (3, 3, 3), "numbers": numbers}
                yield f"{form}-{channels}-{_of(dtype)}", channels, dtype, options
        for form, numbers in (("plain", 0), ("boxes", 4)):
            options = {"numbers": numbers, "deterministic": True, "points": (12, 12, 12)}
            yield f"{form}-deterministic-{_of(dtype)}", 37, dtype, options
    for channels in (32, 37):
        yield f"nearest-{channels}", channels, WIDE, {"method": "nearest"}
        yield f"nearest-points-{channels}", channels, WIDE, {"method": "nearest", "numbers": 2}
        yield f"nearest-ordered-{channels}", channels, WIDE, {"method": "nearest", "deterministic": True}
    yield "ragged", 32, WIDE, {"points": (7, 0, 5), "numbers": 2}
    yield "ragged-deterministic", 32, WIDE, {"points": (7, 0, 5), "deterministic": True}
    yield "wide-coordinates", 32, BF16, {"wide": True}
    yield "wide-offsets", 32, BF16, {"wide": True, "numbers": 2}


def _rows(dtype: torch.dtype) -> int:
    """Rows for three blocks of the kernels made of products."""
    return 40 if dtype == torch.float64 else 70


# Two rounds of pixels; channels of two windows of a block for few tokens and for many. By the bytes of a number.
_POOL_SIZES = {2: (40, 1032, 264), 4: (24, 520, 136), 8: (24, 136, 72)}
_LONG = 64 * 256  # rows from which on a block takes 64


def _cases():
    for name, channels, dtype, options in _attention_cases():
        yield Case("ms_deform_attn", name, lambda c=channels, d=dtype, o=options: attention(c, d, **o))
    for dtype in FLOATS:
        of = _of(dtype)
        yield Case("adapter_bottleneck", f"long-{of}", lambda d=dtype: adapter(d, _LONG, 8, 3), 3)
        yield Case("token_project", f"long-{of}", lambda d=dtype: project(d, _LONG // 2, 8, 3, 4), 3)
    yield Case("token_pool", "more-splits-than-steps", lambda: pool(WIDE, 80, 24, 5))
    for dtype in DTYPES:
        rows, of = _rows(dtype), _of(dtype)
        yield Case("adapter_bottleneck", of, lambda d=dtype, r=rows: adapter(d, r, 136, 72))
        yield Case("token_project", of, lambda d=dtype, r=rows: project(d, r // 2 + 10, 72, 70, 136))
        pixels, wide, many = _POOL_SIZES[dtype.itemsize]
        for name, *sizes in (("small", 256, 40, 16), ("wide", pixels, wide, 3), ("many", pixels, many, 70)):
            yield Case("token_pool", f"{name}-{of}", lambda d=dtype, s=sizes: pool(d, *s))
    no_scale = ("scale", "residual")
    for name, dtype, sizes, without, options in (
        ("bare", WIDE, (70, 71, 37), ("down_bias", "up_bias", *no_scale), {"activation": "gelu"}),
        ("residual-x", BF16, (70, 72, 40), ("residual",), {"residual": "x", "activation": "silu"}),
        ("dropout", WIDE, (70, 40, 72), (), {"dropout_p": 0.3, "training": True, "activation": "gelu"}),
        ("odd-widths", BF16, (70, 71, 37), (), {}),
    ):
        yield Case(
            "adapter_bottleneck", name, lambda d=dtype, s=sizes, w=without, o=options: adapter(d, *s, w, **o)
        )
    for dtype in (WIDE, BF16):
        yield Case(
            "token_pool", f"recurrent-odd-{_of(dtype)}", lambda d=dtype: pool(d, 90, 37, 5, recurrent=True)
        )
        yield Case("token_project", f"odd-{_of(dtype)}", lambda d=dtype: project(d, 45, 37, 5, 11))


CASES = tuple(_cases())
