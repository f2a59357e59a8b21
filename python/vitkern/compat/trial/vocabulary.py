# SPDX-License-Identifier: Apache-2.0
"""The attributes that the code of a layer may use besides the layer's own: a trial sees their effect.

They do not recognise a layer. They exclude code that depends on more than values, sizes and dtypes, or leaves more than
a result: hooks, random numbers, changes in place, the state of autograd, the attributes of other classes and modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

from vitkern.compat.trial.flow import instructions, words
from vitkern.compat.trial.functions import BACKWARD, FORWARD, codes_in

_SHAPES = words(
    "T chunk concat concatenate cat contiguous dim expand expand_as flatten flip index_select meshgrid movedim mT "
    "narrow ndim numel pad permute repeat repeat_interleave reshape roll select shape size split split_with_sizes "
    "squeeze stack swapaxes tensor_split transpose unbind unflatten unsqueeze view view_as"
)
_NUMBERS = words(
    "abs add ceil clamp clamp_max clamp_min clip cumsum detach div einsum eq exp floor gather ge gt le log logical_not "
    "lt masked_fill matmul maximum mean minimum mul ne neg pow prod reciprocal relu round rsqrt sigmoid softmax sqrt "
    "square sub sum tanh tril triu true_divide where"
)
_MAKERS = words(
    "arange as_tensor empty full full_like linspace new_empty new_full new_ones new_tensor new_zeros ones ones_like "
    "tensor zeros zeros_like"
)
_KINDS = words(
    "Tensor astype bfloat16 bool device double dtype finfo float float16 float32 float64 half int int32 int64 is_cuda "
    "is_mlu is_musa is_npu item long to tolist type type_as uint8"
)
_PLACES = words(
    "_assert _dynamo compiler cuda functional grid_sample grid_sampler is_available is_compiling is_dynamo_compiling "
    "is_exporting is_in_onnx_export is_scripting is_tracing is_tensor jit nn onnx "
    "ops nvidia MultiscaleDeformableAttnPlugin_TRT DMHA_backward"
)
_FUNCTIONS = words("apply save_for_backward saved_tensors needs_input_grad set_materialize_grads im2col_step")
_PYTHON = words("append extend format insert index items join keys pop reverse values warn warnings warning")

# Limits beyond the inputs of a trial show no effect. Cores have some, of pixels.
_LIMITS = words("clamp clamp_max clamp_min clip maximum minimum")

KNOWN = _SHAPES | _NUMBERS | _MAKERS | _KINDS | _PLACES | _FUNCTIONS | _PYTHON | {FORWARD, BACKWARD}


_READ = words("LOAD_ATTR LOAD_METHOD LOAD_SUPER_ATTR STORE_ATTR IMPORT_FROM IMPORT_NAME")


def unknown(code: CodeType, others: set[str], *, is_method: bool) -> str | None:
    """An attribute in the code that is neither known here nor in `others` nor, in a method, the layer's; or None."""
    names = {name for each in codes_in(code) for name in _read(each, is_method=is_method)}
    known = KNOWN - _LIMITS if is_method else KNOWN
    return min(names - known - others - {"torch"}, default=None)


def _read(code: CodeType, *, is_method: bool) -> Iterator[str]:
    """The attributes that code reads, except those of the layer, which a specimen records."""
    itself = code.co_varnames[0] if is_method and code.co_argcount else None
    before: Any = None
    for step in instructions(code):
        if step.opname in _READ and not (
            before is not None and before.argval == itself and itself is not None
        ):
            yield from str(step.argval).split(".")
        before = step if step.opname.startswith("LOAD_FAST") else None
