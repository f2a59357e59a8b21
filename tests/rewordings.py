# SPDX-License-Identifier: Apache-2.0
"""Other ways to write a layer with the same result: other names, order, syntax, and equivalent functions of torch.

They are written in Deformable-DETR's names, which tests/layers_to_change translates.
"""

from __future__ import annotations

from tests.changed_layers import AS_IT_IS, Row
from tests.changes import GRIDS, LOOP, MASK, SIZES, SPLIT, STACK, first, swaps

OFFSETS = ".view(N, Len_q, self.n_heads, self.n_levels, self.n_points, 2)"
IN_BOXES = "sampling_offsets / self.n_points * reference_points[:, :, None, :, None, 2:] * 0.5"
LOCATIONS = (
    "reference_points[:, :, None, :, None, :] + sampling_offsets"
    " / offset_normalizer[None, None, None, :, None, :]"
)
TWO, FOUR = "if reference_points.shape[-1] == 2:", "elif reference_points.shape[-1] == 4:"
STEPS = f"offset_normalizer = torch.stack({SIZES}, -1)\n            sampling_locations = {LOCATIONS}\n"
BOXED = f"sampling_locations = reference_points[:, :, None, :, None, :2] + {IN_BOXES}\n"
ASKED = (
    f"sampling_offsets = self.sampling_offsets(query){OFFSETS}",
    "attention_weights = self.attention_weights(query)"
    ".view(N, Len_q, self.n_heads, self.n_levels * self.n_points)",
)
SHIFTED = """
def shifted(points, offsets, sizes):
    return points[:, :, None, :, None, :] + offsets / sizes[None, None, None, :, None, :]
"""
METHOD = """
def shifted(self, points, offsets, sizes):
    return points[:, :, None, :, None, :] + offsets / sizes[None, None, None, :, None, :]

MSDeformAttn.shifted = shifted
"""
SUBCLASS = """
class Other(MSDeformAttn):
    def forward(self, $signature):
        return super().forward($passed)
"""
GRID_OPTIONS = ", mode='bilinear', padding_mode='zeros', align_corners=False"

REWORDINGS = (
    AS_IT_IS,
    Row("a local name", (("offset_normalizer", "width_and_height", 2),)),
    Row("a local name of the core", (("sampling_value_list", "samples_of_levels", 3),), core=True),
    Row("a temporary", (("self.value_proj($raw)", "self.value_proj(pixels)"), first("pixels = $raw"))),
    Row("a temporary size", (first("width = reference_points.shape[-1]"), (TWO, "if width == 2:"))),
    swaps("statements in another order", "\n        ".join(ASKED), "\n        ".join(reversed(ASKED))),
    swaps("reshape", OFFSETS, OFFSETS.replace("view", "reshape")),
    swaps("unflatten", OFFSETS, ".unflatten(-1, (self.n_heads, self.n_levels, self.n_points, 2))"),
    swaps(
        "heads by unflatten",
        "value.view(N, Len_in, self.n_heads, $channels)",
        "value.unflatten(-1, (self.n_heads, -1))",
    ),
    swaps("softmax of torch", "$softmax", "torch.softmax(attention_weights, dim=-1)"),
    swaps("softmax of nn", "$softmax", "nn.functional.softmax(attention_weights, dim=-1)"),
    swaps("softmax of tensors", "$softmax", "attention_weights.softmax(dim=attention_weights.dim() - 1)"),
    swaps("masked by an integer", MASK, "value.masked_fill(input_padding_mask[..., None], 0)"),
    swaps("masked by a tensor", MASK, "value.masked_fill(input_padding_mask[..., None], torch.zeros(()))"),
    swaps(
        "masked by where", MASK, "torch.where(input_padding_mask.unsqueeze(-1), value.new_zeros(()), value)"
    ),
    swaps("flip", f"torch.stack({SIZES}, -1)", "input_spatial_shapes.flip(-1)"),
    swaps(
        "times one over the size",
        "/ offset_normalizer[None, None, None, :, None, :]",
        "* (1.0 / offset_normalizer[None, None, None, :, None, :])",
    ),
    swaps(
        "factors in another order",
        IN_BOXES,
        "0.5 * (sampling_offsets * reference_points[:, :, None, :, None, 2:]) / self.n_points",
    ),
    swaps(
        "an ellipsis",
        "reference_points[:, :, None, :, None, :2]",
        "reference_points[..., :2].unsqueeze(2).unsqueeze(4)",
    ),
    Row(
        "boxes first",
        (
            (TWO, TWO.replace("2", "4")),
            (FOUR, FOUR.replace("4", "2")),
            (STEPS, "swapped"),
            (BOXED, STEPS),
            ("swapped", BOXED),
        ),
    ),
    swaps(
        "no assertion",
        "assert (input_spatial_shapes[:, 0] * input_spatial_shapes[:, 1]).sum() == Len_in",
        "pass",
    ),
    Row("a string that says nothing", (first("'The queries are projected.'"),)),
    Row("an annotation", (first("count: int = Len_q"),)),
    Row("an import", (first("import torch.nn.functional as F"),)),
    Row("a local that is not used", (first("channels = query.shape[-1] // self.n_heads"),)),
    swaps(
        "another error",
        "raise ValueError(f'Last dim of reference_points must be 2 or 4, got {reference_points.shape[-1]}')",
        "raise ValueError('reference_points have %d numbers' % reference_points.shape[-1])",
    ),
    swaps("an early return", "${tail}return $result", "$early"),
    swaps(
        "a function",
        LOCATIONS,
        "shifted(reference_points, sampling_offsets, offset_normalizer)",
        appended=SHIFTED,
    ),
    swaps(
        "a method",
        LOCATIONS,
        "self.shifted(reference_points, sampling_offsets, offset_normalizer)",
        appended=METHOD,
    ),
    Row("a subclass that calls it", appended=SUBCLASS, kind="Other"),
    Row("a subclass that inherits it", appended="class Other(MSDeformAttn):\n    pass", kind="Other"),
    swaps(
        "permute", "output.transpose(1, 2).contiguous()", "output.permute(0, 2, 1).contiguous()", core=True
    ),
    swaps("grids by another formula", GRIDS, "(sampling_locations - 0.5) * 2", core=True),
    swaps("cat", STACK, "torch.cat(sampling_value_list, dim=-1)", core=True),
    swaps("defaults left out", GRID_OPTIONS, ", align_corners=False", core=True),
    Row(
        "zip",
        (
            (LOOP, "for lid_, (pixels, (H_, W_)) in enumerate(zip(value_list, value_spatial_shapes)):"),
            ("value_list[lid_]", "pixels"),
        ),
        core=True,
    ),
    swaps("range", LOOP, "for lid_ in range(L_):\n        H_, W_ = value_spatial_shapes[lid_]", core=True),
    Row(
        "sizes on the host",
        (
            (LOOP, LOOP.replace("shapes)", "shapes.tolist())")),
            (SPLIT, "value_spatial_shapes.tolist()], dim=1)"),
        ),
        core=True,
    ),
)
