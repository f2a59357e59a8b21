# SPDX-License-Identifier: Apache-2.0
"""The layers of Deformable-DETR and mmcv as text, and the different names that they use.

If VITKERN_DEFORMABLE_DETR or VITKERN_MMCV names a checkout, that project's own layer is included.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent


class Base(NamedTuple):
    """A project's version of the layer."""

    name: str
    kind: str  # its class
    core: str  # the global that samples
    text: str
    words: dict[str, str]  # of Deformable-DETR, and what they are here
    phrases: dict[str, str]
    call: Callable[..., object]
    arguments: dict[str, object]  # of the class
    calls_core: bool = True  # on a CPU


def _call_deformable_detr(layer, query, pixels, points, shapes, starts, mask):
    return layer(query, points, pixels, shapes, starts, mask)


def _call_mmcv(layer, query, pixels, points, shapes, starts, mask):
    levels = dict(reference_points=points, spatial_shapes=shapes, level_start_index=starts)
    return layer(query, value=pixels, key_padding_mask=mask, **levels)


def _plain(*sources: str) -> str:
    """The text without comments and in one layout, so that snippets can be found in it."""
    text = "\n".join(ast.unparse(ast.parse(source)) for source in sources)
    text = re.sub(
        r"(?m)^( *)\(([\w, ]+)\) = ", r"\1\2 = ", text
    )  # Python 3.10 puts brackets round what is unpacked
    return re.sub(r"\bfor \(([\w, ]+(?:\([\w, ]+\))?)\) in ", r"for \1 in ", text)


DEFORMABLE_DETR = Base(
    name="Deformable-DETR",
    kind="MSDeformAttn",
    core="MSDeformAttnFunction",
    text=_plain((FOLDER / "deformable_detr.py").read_text()),
    words={},
    phrases=dict(
        raw="input_flatten",
        softmax="F.softmax(attention_weights, -1)",
        zero="float(0)",
        channels="self.d_model // self.n_heads",
        tail="output = self.output_proj(output)\n        ",
        result="output",
        it="output",
        early="return self.output_proj(output)",
        signature="query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, "
        "input_padding_mask=None",
        passed="query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, "
        "input_padding_mask",
    ),
    call=_call_deformable_detr,
    arguments=dict(d_model=32, n_levels=2, n_heads=4, n_points=4),
)

_OF_MMCV = """
MSDeformAttn MultiScaleDeformableAttention
MSDeformAttnFunction MultiScaleDeformableAttnFunction
ms_deform_attn_core_pytorch multi_scale_deformable_attn_pytorch
input_spatial_shapes spatial_shapes
input_level_start_index level_start_index
input_padding_mask key_padding_mask
n_heads num_heads
n_levels num_levels
n_points num_points
N bs
Len_q num_query
Len_in num_value
N_ bs
M_ num_heads
D_ embed_dims
Lq_ num_queries
L_ num_levels
P_ num_points
lid_ level
"""

_NAMED = "query, {0}, value{1}, identity{1}, query_pos{1}, key_padding_mask{1}, reference_points{1}, "
_NAMED += "spatial_shapes{1}, level_start_index{1}, **kwargs"

MMCV = Base(
    name="mmcv",
    kind="MultiScaleDeformableAttention",
    core="multi_scale_deformable_attn_pytorch",
    text=_plain((FOLDER / "mmcv.py").read_text()),
    words=dict(line.split() for line in _OF_MMCV.strip().splitlines()),
    phrases=dict(
        raw="value",
        softmax="attention_weights.softmax(-1)",
        zero="0.0",
        channels="-1",
        tail="output = output.permute(1, 0, 2)\n        ",
        result="self.dropout(output) + identity",
        it="(self.dropout(output) + identity)",
        early="return self.dropout(output.permute(1, 0, 2)) + identity\n        "
        "return self.dropout(output) + identity",
        signature=_NAMED.format("key=None", "=None"),
        passed=_NAMED.format("key", ""),
    ),
    call=_call_mmcv,
    arguments=dict(embed_dims=32, num_heads=4, num_levels=2, num_points=4, dropout=0.0, batch_first=True),
)

# In place of what checkouts import from packages that are not installed, or were not built.
_COMPILED = "from vitkern.compat import deformable_detr as MSDA"
_OPENMMLAB = """
import types
import torch

class BaseModule(torch.nn.Module):
    def __init__(self, init_cfg=None):
        super().__init__()

def constant_init(module, val=0.0, bias=0.0, **others):
    torch.nn.init.constant_(module.weight, val)
    torch.nn.init.constant_(module.bias, bias)

def xavier_init(module, **others):
    torch.nn.init.xavier_uniform_(module.weight)

def deprecated_api_warning(*others, **more):
    return lambda function: function

MODELS = types.SimpleNamespace(register_module=lambda *others, **more: lambda kind: kind)
mmengine = types.SimpleNamespace(ConfigDict=dict)
ext_loader = types.SimpleNamespace(load_ext=lambda *others: None)
IS_CUDA_AVAILABLE = IS_MLU_AVAILABLE = IS_NPU_AVAILABLE = IS_MUSA_AVAILABLE = False
"""
_STANDINS = {"MultiScaleDeformableAttention", "__future__", "mmengine", "mmcv"}


def _of_checkout(prelude: str, folder: Path, *files: str) -> str:
    """The files of a project joined into one module, without their imports from that project."""
    parts = [prelude]
    for file in files:
        tree = ast.parse((folder / file).read_text())
        tree.body = [statement for statement in tree.body if not _is_of_project(statement)]
        parts.append(ast.unparse(tree))
    return _plain(*parts)


def _is_of_project(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return statement.level > 0 or (statement.module or "").partition(".")[0] in _STANDINS
    return isinstance(statement, ast.Import) and statement.names[0].name.partition(".")[0] in _STANDINS


OURS = (DEFORMABLE_DETR, MMCV)
BASES = list(OURS)
if folder := os.environ.get("VITKERN_DEFORMABLE_DETR"):
    files = ("functions/ms_deform_attn_func.py", "modules/ms_deform_attn.py")
    text = _of_checkout(_COMPILED, Path(folder) / "models" / "ops", *files)
    BASES.append(
        DEFORMABLE_DETR._replace(name="the checkout of Deformable-DETR", text=text, calls_core=False)
    )
if folder := os.environ.get("VITKERN_MMCV"):
    text = _of_checkout(_OPENMMLAB, Path(folder) / "mmcv" / "ops", "multi_scale_deform_attn.py")
    BASES.append(MMCV._replace(name="the checkout of mmcv", text=text))
