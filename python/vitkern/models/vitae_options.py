# SPDX-License-Identifier: Apache-2.0
"""The options of ViTAE's stages, made from values for all stages or lists of one value for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """A reduction cell (RC) and normal cells (NC), under the names of the released code.

    Args:
        embed_dims: channels of each dilated convolution of the reduction cell.
        token_dims: channels of the tokens; a single number is doubled from each stage to the next.
        downsample_ratios: factor by which each side of the map shrinks; 1: no reduction cell.
        kernel_size, dilations, RC_op: options of the dilated convolutions, concatenated ("cat") or added ("sum").
        RC_tokens_type, RC_heads: attention of the reduction cell.
        RC_group, NC_group: groups of the convolutions beside attention.
        NC_tokens_type, NC_heads, NC_depth: attention and number of the normal cells.
        mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate: options of the normal cells.
    """

    embed_dims: int
    token_dims: int
    downsample_ratios: int
    RC_tokens_type: str
    NC_tokens_type: str
    NC_depth: int
    NC_heads: int
    NC_group: int
    mlp_ratio: float
    kernel_size: int
    dilations: Sequence[int]
    RC_op: str
    RC_heads: int
    RC_group: int
    qkv_bias: bool
    qk_scale: float | None
    drop_rate: float
    attn_drop_rate: float

    @property
    def hidden(self) -> int:
        return int(self.token_dims * self.mlp_ratio)


TINY = dict(
    embed_dims=[64, 64, 128],
    token_dims=[64, 64, 256],
    downsample_ratios=[4, 2, 2],
    RC_tokens_type=["performer", "performer", "performer_less"],
    NC_tokens_type="transformer",
    NC_depth=[0, 0, 7],
    NC_heads=[1, 1, 4],
    NC_group=[1, 1, 64],
    mlp_ratio=2.0,
)
SMALL_V2 = dict(
    embed_dims=[64, 64, 128, 256],
    token_dims=[64, 128, 256, 512],
    downsample_ratios=[4, 2, 2, 2],
    RC_tokens_type=["window", "window", "transformer", "transformer"],
    RC_heads=[1, 1, 2, 4],
    RC_group=[1, 16, 32, 64],
    NC_tokens_type=["window", "window", "transformer", "transformer"],
    NC_depth=[2, 2, 8, 2],
    NC_heads=[1, 2, 4, 8],
    NC_group=[1, 32, 64, 128],
    mlp_ratio=4.0,
)
COMMON = dict(
    kernel_size=[7, 3, 3, 3],
    dilations=[[1, 2, 3, 4], [1, 2, 3], [1, 2], [1, 2]],
    RC_op="cat",
    RC_heads=1,
    RC_group=1,
    qkv_bias=True,
    qk_scale=None,
    drop_rate=0.0,
    attn_drop_rate=0.0,
)


def stage_options(stages: int, defaults: dict[str, Any], given: dict[str, Any]) -> list[StageOptions]:
    """The options of each stage. A single value holds for all stages; defaults may list more stages than there are."""
    options = {**defaults, **given}
    if isinstance(options["token_dims"], int):
        options["token_dims"] = [options["token_dims"] << stage for stage in range(stages)]
    for name, option in options.items():
        one = isinstance(option[0], int) if name == "dilations" else not isinstance(option, (list, tuple))
        if one:
            options[name] = [option] * stages
        elif len(option) < stages or (name in given and len(option) > stages):
            raise ValueError(
                f"{name} must be one value or one for each of the {stages} stages, got {len(option)}"
            )
    return [
        StageOptions(**{name: option[stage] for name, option in options.items()}) for stage in range(stages)
    ]


def one_of(name: str, option: str, kinds: Sequence[str]) -> str:
    if option not in kinds:
        raise ValueError(f"{name} must be one of {tuple(kinds)}, got {option!r}")
    return option
