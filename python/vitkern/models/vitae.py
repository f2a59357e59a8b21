# SPDX-License-Identifier: Apache-2.0
"""ViTAE (arXiv 2106.03348) and ViTAEv2 (arXiv 2202.10108): transformers with the biases of convolutions.

Parameters, buffers and results are those of the released code, which departs from the first paper: its small models
have neither class token nor positions, and their last reduction cell has no attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitkern.models.blocks import Layer, checkpointed, drop_path_rates, pair, to_map
from vitkern.models.pyramid import Classifier, FeatureInfo, Pyramid, some_of
from vitkern.models.vitae_cells import (
    PRM,
    RC_WINDOW,
    Attention,
    NormalCell,
    ReductionCell,
    TokenEmbedding,
    TokenPerformer,
    TokenTransformer,
    WindowAttention,
    convolutions,
)
from vitkern.models.vitae_options import COMMON, SMALL_V2, TINY, StageOptions, one_of, stage_options


def initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Stage(nn.Module):
    def __init__(self, reduction: nn.Module | None, cells: Sequence[NormalCell], with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.RC = reduction or nn.Identity()
        self.NC = nn.ModuleList(cells)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """Returns tokens [B, (1 +) H' W', C'], H' and W' from an image or tokens on an H x W grid."""
        if not isinstance(self.RC, nn.Identity):
            x, height, width = self.RC(x if x.dim() == 4 else to_map(x, height, width))
        for cell in self.NC:
            x = checkpointed(partial(cell, height=height, width=width), x, with_cp=self.with_cp)
        return x, height, width


class Stages(Classifier):
    """The shared part of both versions. Subclasses define the cells."""

    layers: nn.ModuleList

    def build(
        self,
        options: Sequence[StageOptions],
        img_size: int | Sequence[int],
        in_chans: int,
        num_classes: int,
        drop_path_rate: float,
        norm_layer: Layer,
        use_checkpoint: bool,
    ) -> None:
        """The stages and the classifier."""
        self.img_size, self.in_chans, self.num_classes = pair(img_size), in_chans, num_classes
        self.num_features = options[-1].token_dims
        self.stride = math.prod(stage.downsample_ratios for stage in options)
        rates = drop_path_rates(drop_path_rate, sum(stage.NC_depth for stage in options))
        self.layers = nn.ModuleList()
        before = 0  # as in the released code, only the cells of the previous stage
        side = min(self.img_size)
        for stage in options:
            reduction = self.reduction(stage, in_chans, side) if stage.downsample_ratios > 1 else None
            cells = [
                NormalCell(
                    stage.token_dims,
                    self.attention(stage),
                    self.convolutions(stage),
                    stage.hidden,
                    drop=stage.drop_rate,
                    drop_path=rates[before + cell],
                    norm_layer=norm_layer,
                )
                for cell in range(stage.NC_depth)
            ]
            self.layers.append(Stage(reduction, cells, use_checkpoint))
            before, in_chans = stage.NC_depth, stage.token_dims
            side //= stage.downsample_ratios
        self.head = self.make_head(num_classes)
        self.apply(initialise_linear)

    def attention_options(self, options: StageOptions) -> dict[str, Any]:
        return dict(
            qkv_bias=options.qkv_bias,
            qk_scale=options.qk_scale,
            attn_drop=options.attn_drop_rate,
            proj_drop=options.drop_rate,
        )

    def prm(self, options: StageOptions, in_chans: int) -> PRM:
        return PRM(
            in_chans,
            options.embed_dims,
            options.kernel_size,
            options.downsample_ratios,
            options.dilations,
            options.RC_op,
        )

    def reduction(self, options: StageOptions, in_chans: int, side: int) -> nn.Module | None:
        """The reduction cell for an input whose shorter side is `side`; None: no reduction."""
        raise NotImplementedError

    def attention(self, options: StageOptions) -> Attention:
        """The attention of a normal cell."""
        raise NotImplementedError

    def convolutions(self, options: StageOptions) -> nn.Sequential:
        """The convolutions beside the attention of a normal cell."""
        raise NotImplementedError


def checked(prm: PRM, options: StageOptions) -> PRM:
    """Checks the convolutions of a cell without attention: nothing else could change their channels."""
    if prm.out_chans != options.token_dims:
        raise ValueError(
            f"token_dims of a performer_less cell must be {prm.out_chans}, the channels of its convolutions together,  "
            f"got {options.token_dims}"
        )
    return prm


def strides(ratio: int) -> list[int]:
    """The strides of the three convolutions of a reduction cell."""
    if ratio not in (2, 4, 8):
        raise ValueError(f"downsample_ratios must be 2, 4 or 8 beside convolutions, got {ratio}")
    return [2 if ratio >> index > 1 else 1 for index in range(3)]


class ViTAE(Stages):
    """ViTAE: images [B, C, H, H] to logits [B, num_classes]. The defaults are those of ViTAE-T.

    Args:
        num_classes: number of classes; 0: the model returns the features before the classifier, [B, C].
        class_token: whether a class token goes through the normal cells, with a norm before the classifier, which
            reads the mean of the other tokens. The reduction cell of type "embedding" adds it, as in the large models.
        sinusoid: whether to build the paper's form, which has no published weights: a class token and fixed positions
            before the last stage's normal cells; the class token is classified.
        drop_path_rate: stochastic depth of the last cell.
        use_checkpoint: whether backward recomputes the normal cells.
        **options: options of :class:`StageOptions`, one value for all stages or one for each. Types of reduction cells
            are "performer", "performer_less" (alias "transformer"), "embedding" and "none"; types of normal cells are
            "transformer" and "transformer_shallow".
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        stages: int = 3,
        class_token: bool = False,
        sinusoid: bool = False,
        drop_path_rate: float = 0.0,
        norm_layer: Layer | None = None,
        use_checkpoint: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        per_stage = stage_options(stages, {**COMMON, **TINY}, options)
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.class_token, self.sinusoid, self.last = class_token, sinusoid, per_stage[-1]
        self.fc_norm = norm_layer(self.last.token_dims) if class_token or sinusoid else None
        self.build(per_stage, img_size, in_chans, num_classes, drop_path_rate, norm_layer, use_checkpoint)
        if self.img_size[0] != self.img_size[1]:
            raise ValueError(f"img_size must be square, got {img_size}; ViTAEv2 takes images of any shape")
        if sinusoid and not isinstance(self.layers[-1].RC, ReductionCell):
            raise ValueError("sinusoid=True needs a reduction cell without a class token in the last stage")

    def reduction(self, options: StageOptions, in_chans: int, side: int) -> nn.Module | None:
        kinds = ("performer", "performer_less", "transformer", "embedding", "none")
        kind = one_of("RC_tokens_type", options.RC_tokens_type, kinds)
        channels, ratio = options.token_dims, options.downsample_ratios
        if kind == "none":
            return None
        if kind == "embedding":
            return TokenEmbedding(side, ratio, in_chans, channels)
        prm, sinusoid = self.prm(options, in_chans), self.sinusoid and options is self.last
        if kind != "performer":  # the released code has no attention in its "transformer" cells either
            return ReductionCell(checked(prm, options), sinusoid=sinusoid)
        if options.RC_heads != 1:
            raise ValueError(f"RC_heads must be 1 for a performer, got {options.RC_heads}")
        widths = (in_chans, options.embed_dims, options.embed_dims, channels)
        branch = convolutions(
            widths, options.RC_group, strides=strides(ratio), norms=(False, True), last_act=True
        )
        return ReductionCell(prm, TokenPerformer(prm.out_chans, channels), branch, sinusoid)

    def attention(self, options: StageOptions) -> Attention:
        one_of("NC_tokens_type", options.NC_tokens_type, ("transformer", "transformer_shallow"))
        channels = options.token_dims
        return Attention(channels, channels, options.NC_heads, **self.attention_options(options))

    def convolutions(self, options: StageOptions) -> nn.Sequential:
        channels, hidden = options.token_dims, options.hidden
        if options.NC_tokens_type == "transformer_shallow":
            return convolutions((channels, hidden, channels), options.NC_group)
        return convolutions((channels, hidden, channels, channels), options.NC_group, last_act=True)

    def forward_features(self, image: Tensor) -> Tensor:  # [B, C]
        height, width = self._checked(image, self.stride).shape[2:]
        if height != width:
            raise ValueError(
                f"ViTAE: images must be square, got {height} x {width}; ViTAEv2 takes images of any shape"
            )
        x = image
        for stage in self.layers:
            x, height, width = stage(x, height, width)
        x = x[:, 0] if self.sinusoid else x[:, -height * width :].mean(1)
        return x if self.fc_norm is None else self.fc_norm(x)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.forward_features(image))


class ViTAEv2(Stages, Pyramid):
    """ViTAEv2 for images [B, C, H, W]. The defaults are those of ViTAEv2-S.

    Returns logits [B, num_classes] or the maps of some stages, [B, C_s, H / stride, W / stride]. Height and width must
    be multiples of the last stride.

    Args:
        num_classes: number of classes; 0: the model returns the features before the classifier, [B, C].
        out_indices: numbers of the stages whose maps are returned; None: the model has a classifier instead.
        window_size: side of the normal cells' windows; reduction cells have 7 x 7.
        relative_pos: whether windows have learnable position biases.
        drop_path_rate: stochastic depth of the last cell.
        use_checkpoint: whether backward recomputes the normal cells.
        pad_input: whether to pad images to multiples of the last stride and crop the maps; other sizes are refused if
            not.
        **options: options of :class:`StageOptions`, one value for all stages or one for each. Types of reduction cells
            are "window", "transformer" and "performer_less"; types of normal cells are "window" and "transformer".
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        stages: int = 4,
        out_indices: Sequence[int] | None = None,
        window_size: int = 7,
        relative_pos: bool = False,
        drop_path_rate: float = 0.0,
        norm_layer: Layer | None = None,
        use_checkpoint: bool = False,
        pad_input: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.window_size, self.relative_pos, self.pad_input = window_size, relative_pos, pad_input
        self.out_indices = None if out_indices is None else some_of(stages, out_indices)
        self.options = stage_options(stages, {**COMMON, **SMALL_V2}, options)
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.build(self.options, img_size, in_chans, num_classes, drop_path_rate, norm_layer, use_checkpoint)
        if out_indices is not None:
            del self.head

    @property
    def feature_info(self) -> FeatureInfo:
        if self.out_indices is None:
            raise AttributeError("a classifier has no feature_info: give out_indices")
        ratios = [stage.downsample_ratios for stage in self.options]
        return FeatureInfo(
            {
                "num_chs": self.options[level].token_dims,
                "reduction": math.prod(ratios[: level + 1]),
                "module": f"layers.{level}",
            }
            for level in self.out_indices
        )

    def windows(self, size: int, index_size: int) -> dict[str, Any]:
        """Released classifiers have a position buffer in each window even without position biases."""
        return dict(
            window_size=size,
            relative_pos=self.relative_pos,
            index_size=0 if self.out_indices is not None else index_size,
        )

    def reduction(self, options: StageOptions, in_chans: int, side: int) -> nn.Module | None:
        kind = one_of("RC_tokens_type", options.RC_tokens_type, ("window", "transformer", "performer_less"))
        prm, channels, ratio = self.prm(options, in_chans), options.token_dims, options.downsample_ratios
        if kind == "performer_less":
            return ReductionCell(checked(prm, options))
        attention: Attention
        if kind == "window":
            windows = self.windows(RC_WINDOW, min(RC_WINDOW, side // ratio))
            attention = WindowAttention(prm.out_chans, channels, options.RC_heads, **windows)
        else:
            attention = Attention(prm.out_chans, channels, options.RC_heads, qkv_bias=False, value_skip=True)
        widths = (in_chans, options.embed_dims, options.embed_dims, channels)
        branch = convolutions(widths, options.RC_group, strides=strides(ratio))
        return ReductionCell(prm, TokenTransformer(prm.out_chans, attention, channels), branch)

    def attention(self, options: StageOptions) -> Attention:
        kind = one_of("NC_tokens_type", options.NC_tokens_type, ("window", "transformer"))
        channels, common = options.token_dims, self.attention_options(options)
        if kind == "transformer":
            return Attention(channels, channels, options.NC_heads, **common)
        windows = self.windows(self.window_size, self.window_size)
        return WindowAttention(channels, channels, options.NC_heads, **windows, **common)

    def convolutions(self, options: StageOptions) -> nn.Sequential:
        channels = options.token_dims
        return convolutions((channels, options.hidden, channels, channels), options.NC_group)

    def stage_outputs(self, image: Tensor) -> list[tuple[Tensor, int, int]]:
        """Tokens, height and width after each stage."""
        x = self._checked(image, self.stride)
        height, width = x.shape[2:]
        outputs = []
        for stage in self.layers:
            x, height, width = stage(x, height, width)
            outputs.append((x, height, width))
        return outputs

    def forward_features(self, image: Tensor) -> Tensor:  # [B, C]
        return self.stage_outputs(image)[-1][0].mean(1)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if self.out_indices is None:
            return self.head(self.forward_features(image))
        outputs = self.stage_outputs(image)
        return self._cropped([to_map(*outputs[level]) for level in self.out_indices], image)
