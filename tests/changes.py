# SPDX-License-Identifier: Apache-2.0
"""Changes of a layer that change its result, each with inputs that show the difference.

They are written in Deformable-DETR's names, which tests/layers_to_change translates.
"""

from __future__ import annotations

import torch

from tests.changed_layers import PLAIN, Inputs, Row, Swap

BOXES, MASKED, MANY = Inputs(last=4), Inputs(masked=True), Inputs(queries=130)
SIZES = "[input_spatial_shapes[..., 1], input_spatial_shapes[..., 0]]"
MASK = "value.masked_fill(input_padding_mask[..., None], $zero)"
GRIDS, STACK = "2 * sampling_locations - 1", "torch.stack(sampling_value_list, dim=-2).flatten(-2)"
LOOP, SPLIT = "for lid_, (H_, W_) in enumerate(value_spatial_shapes):", "value_spatial_shapes], dim=1)"


def first(*statements: str) -> Swap:
    """Inserts statements near the beginning of forward."""
    line = "N, Len_q, _ = query.shape"
    return line, "\n        ".join([line, *statements])


def last(result: str, *statements: str) -> Swap:
    """Inserts these statements at the end of forward, which then returns this expression of its result, $it."""
    return "${tail}return $result", "${tail}" + "\n        ".join([*statements, f"return {result}"])


def gives(name: str, result: str, shown: Inputs = PLAIN, **others) -> Row:
    return Row(name, (last(result),), shown, **others)


def swaps(name: str, snippet: str, other: str, shown: Inputs = PLAIN, **others) -> Row:
    return Row(name, ((snippet, other),), shown, **others)


EACH_LEVEL = "attention_weights.view(N, Len_q, self.n_heads, self.n_levels, self.n_points).softmax(-1)"
FILLED = "$raw if input_padding_mask is None else $raw.masked_fill(input_padding_mask[..., None], 0.0)"

ALWAYS = (
    gives("three outputs", "$it, sampling_locations, attention_weights"),
    swaps("no half", " * 0.5", "", BOXES),
    swaps("not divided by the points", " / self.n_points", "", BOXES),
    swaps("height before width", SIZES, "[input_spatial_shapes[..., 0], input_spatial_shapes[..., 1]]"),
    swaps("size minus one", SIZES, "[input_spatial_shapes[..., 1] - 1, input_spatial_shapes[..., 0] - 1]"),
    swaps("softmax over each level", "$softmax", EACH_LEVEL),
    swaps("sigmoid", "$softmax", "attention_weights.sigmoid()"),
    swaps("weights that are not normalised", "$softmax", "attention_weights.exp()"),
    swaps("dropout of weights", "$softmax", "F.dropout($softmax, 0.5, self.training)", Inputs(training=True)),
    swaps("minus one under the mask", MASK, "value.masked_fill(input_padding_mask[..., None], -1.0)", MASKED),
    Row(
        "mask before the projection",
        ((MASK, "value"), ("self.value_proj($raw)", f"self.value_proj({FILLED})")),
        MASKED,
    ),
    gives("query added", "$it + query"),
    gives("scaled", "$it * 1.001"),
    gives("not a number is none", "torch.nan_to_num($it)", Inputs(magnitude=float("nan"), graded=False)),
    swaps("output_proj twice", "self.output_proj(output)", "self.output_proj(self.output_proj(output))"),
    swaps("aligned corners", "align_corners=False", "align_corners=True", core=True),
    swaps("border", "padding_mode='zeros'", "padding_mode='border'", core=True),
    swaps("nearest", "mode='bilinear'", "mode='nearest'", core=True),
    swaps("clamped", GRIDS, "2 * sampling_locations.clamp(0, 1) - 1", core=True),
    swaps("y before x", GRIDS, "2 * sampling_locations.flip(-1) - 1", core=True),
    Row("points as (y, x)", (first("reference_points = reference_points.flip(-1)"),)),
    Row("points without gradient", (first("reference_points = reference_points.detach()"),)),
    Row(
        "levels from last to first",
        ((SPLIT, "value_spatial_shapes.flip(0)], dim=1)"), ("value_list[lid_]", "value_list[-1 - lid_]")),
        core=True,
    ),
)

# The same as the original, unless ...
SELDOM = (
    gives("in training", "$it * (2 if self.training else 1)", Inputs(training=True)),
    gives("above 64 pixels", "$it * (2 if Len_in > 64 else 1)", Inputs(sizes=((8, 8), (4, 4)))),
    gives("above batch 2", "$it * (2 if N > 2 else 1)", Inputs(batch=3)),
    gives(
        "in half precision", "$it * (2 if value.dtype == torch.float16 else 1)", Inputs(dtype=torch.float16)
    ),
    gives("in bfloat16", "$it * (2 if value.dtype == torch.bfloat16 else 1)", Inputs(dtype=torch.bfloat16)),
    gives("in double", "$it * (2 if value.dtype == torch.float64 else 1)", Inputs(dtype=torch.float64)),
    gives("on CUDA", "$it * (2 if value.is_cuda else 1)", silent=True),
    gives("without gradients", "$it * (1 if torch.is_grad_enabled() else 2)", Inputs(graded=False)),
    gives("large values", "$it * (2 if value.max() > 1000 else 1)", Inputs(magnitude=1e4)),
    gives("clamped where large", "$it.clamp(-1000, 1000)", Inputs(magnitude=1e4)),
    gives("an attribute set later", "$it + getattr(self, 'extra', 0)", Inputs(attributes=(("extra", 1),))),
    Row(
        "from the second call on",
        (first("self.calls += 1"), last("$it * self.calls")),
        Inputs(calls=3),
        appended="MSDeformAttn.calls = 0",
    ),
    Row(
        "a counter of the module",
        (first("global CALLS", "CALLS += 1"), last("$it * (1 + CALLS // 4)")),
        Inputs(calls=3),
        appended="CALLS = 0",
    ),
    Row(
        "a list that grows",
        (first("SEEN.append(Len_q)"), last("$it * (1 + len(SEEN) // 4)")),
        Inputs(calls=3),
        appended="SEEN = []",
    ),
)

# The same numbers, and something besides, or in a way that a child which is replaced later would not notice.
UNSEEN = (
    Row(
        "a weight read",
        (("self.value_proj($raw)", "F.linear($raw, self.value_proj.weight, self.value_proj.bias)"),),
        silent=True,
    ),
    Row("weights kept", (last("$it", "self.kept = attention_weights"),), silent=True),
    Row(
        "weights kept in a list",
        (last("$it", "KEPT.append(attention_weights)"),),
        appended="KEPT = []",
        silent=True,
    ),
)

# More than 100 queries, in all the ways that one may say it.
WORDED = (
    gives("a conditional", "$it if Len_q <= 100 else $it * 2", MANY),
    Row("an if", (last("$it", "if Len_q > 100:", "    output = output * 2"),), MANY),
    gives("a product", "$it * (1 + (Len_q > 100))", MANY),
    gives("an and", "$it * (Len_q > 100 and 2 or 1)", MANY),
    gives("slices", "torch.cat([$it[:, :100], $it[:, 100:] * 2], 1)", MANY),
    gives("an index", "$it * [1, 2][Len_q > 100]", MANY),
    gives("a dictionary", "$it * {130: 2}.get(Len_q, 1)", MANY),
    gives("a maximum", "$it + max(Len_q - 100, 0)", MANY),
    gives("a quotient", "$it * (1 + Len_q // 101)", MANY),
    gives("a mask of queries", "$it * (1 + (torch.arange(Len_q) >= 100))[:, None]", MANY),
    gives("a count of numbers", "$it * (1 + (query.numel() > 100 * N * query.shape[-1]))", MANY),
    Row("a loop", (last("$it", "for _ in range(Len_q // 101):", "    output = output * 2"),), MANY),
    Row(
        "a while",
        (last("$it", "left = Len_q", "while left > 100:", "    output, left = (output * 2, left - 100)"),),
        MANY,
    ),
    Row(
        "an exception",
        (
            last(
                "$it",
                "try:",
                "    query[0, 100]",
                "    output = output * 2",
                "except IndexError:",
                "    pass",
            ),
        ),
        MANY,
    ),
    Row(
        "a match",
        (last("$it", "match Len_q:", "    case many if many > 100:", "        output = output * 2"),),
        MANY,
    ),
    Row(
        "a function",
        (last("_twice_if_many($it, Len_q)"),),
        MANY,
        appended="def _twice_if_many(output, count):\n    return output * 2 if count > 100 else output",
    ),
    Row(
        "a subclass",
        (),
        MANY,
        appended="class Other(MSDeformAttn):\n"
        "    def forward(self, $signature):\n"
        "        output = super().forward($passed)\n"
        "        return output * 2 if query.shape[1] > 100 else output",
        kind="Other",
    ),
)

CHANGES = (*ALWAYS, *SELDOM, *UNSEEN, *WORDED)
