# SPDX-License-Identifier: Apache-2.0
"""ViT-Adapter (arXiv 2205.08534): a plain transformer with a feature pyramid beside it for dense prediction.

Parameters, buffers and results are those of the official code, in its segmentation and its detection form. Deformable
attention runs on this package's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.adapter_modules import InteractionBlock, SpatialPriorModule, deform_inputs
from vitkern.models.beit import BEiT
from vitkern.models.blocks import Layer, SyncBatchNorm, initialise, to_map
from vitkern.models.checkpoints import load_pretrained
from vitkern.models.pyramid import Pyramid, some_of
from vitkern.models.uniperceiver import UnifiedBertEncoder
from vitkern.models.vit import VisionTransformer
from vitkern.nn import MSDeformAttn

FORMS = ("segmentation", "detection")


class Adapter(Pyramid):
    """A mixin that adds the adapter to the transformer class after it among a class's bases.

    Args:
        variant: ``"segmentation"`` adds the transformer's features after each interaction to the pyramid,
            ``"detection"`` adds its last features to all maps.
        conv_inplane: channels of the spatial prior's first convolution.
        n_points, deform_num_heads, deform_ratio: options of deformable attention.
        init_values: initial gamma of the injectors.
        interaction_indexes: first and last block of each interaction; None: four interactions of the same length.
        with_cffn, cffn_ratio: whether extractors have a convolutional feed-forward network, and its width.
        add_vit_feature: whether the transformer's features are added to the pyramid.
        use_extra_extractor: whether the last interaction has two more extractors.
        features_of_each: whether the features after each interaction are added; None: only for segmentation.
        out_indices: numbers of the maps to return; negative numbers count from the last.
        pad_input: whether to pad images to multiples of 32 and crop the maps; other sizes are refused if not.
        pretrained, init_cfg: a file to load, or ``dict(type="Pretrained", checkpoint=file)``.
        backend: passed on to :func:`vitkern.ms_deform_attn_fused`.
        **transformer: arguments of the transformer.

    An image ``[B, C, H, W]`` gives maps ``[B, D, H / s, W / s]`` for the strides s = 4, 8, 16 and 32.
    """

    norm_layer: Layer
    drop_path_rate: float
    cls_token: nn.Parameter | None
    # In these forms checkpointing covers interactions as well as blocks.
    interactions_with_cp: tuple[str, ...] = FORMS

    def __init__(
        self,
        *,
        variant: str = "segmentation",
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 6,
        init_values: float = 0.0,
        interaction_indexes: Sequence[Sequence[int]] | None = None,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        add_vit_feature: bool = True,
        use_extra_extractor: bool = True,
        with_cp: bool = False,
        features_of_each: bool | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pad_input: bool = False,
        pretrained: str | None = None,
        init_cfg: dict[str, Any] | None = None,
        backend: str | None = None,
        **transformer: Any,
    ) -> None:
        if variant not in FORMS:
            raise ValueError(f"variant must be one of {FORMS}, got {variant!r}")
        super().__init__(with_cp=with_cp, **transformer)
        self.variant, self.add_vit_feature, self.pad_input = variant, add_vit_feature, pad_input
        self.features_of_each = variant == "segmentation" if features_of_each is None else features_of_each
        self.out_levels = some_of(4, out_indices)
        self.interaction_indexes = _interactions(interaction_indexes, len(self.trunk))
        self._check_interactions()

        channels, last = self.embed_dim, len(self.interaction_indexes) - 1
        self.level_embed = nn.Parameter(torch.zeros(3, channels))
        self.spm = SpatialPriorModule(conv_inplane, channels, self.in_chans)
        self.interactions = nn.ModuleList(
            InteractionBlock(
                channels,
                num_heads=deform_num_heads,
                n_points=n_points,
                deform_ratio=deform_ratio,
                norm_layer=self.norm_layer,
                init_values=init_values,
                with_cffn=with_cffn,
                cffn_ratio=cffn_ratio,
                drop_path=self.drop_path_rate,
                extra_extractor=use_extra_extractor and index == last,
                with_cp=with_cp and variant in self.interactions_with_cp,
                backend=backend,
            )
            for index in range(last + 1)
        )
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.norm1 = SyncBatchNorm(channels)
        self.norm2 = SyncBatchNorm(channels)
        self.norm3 = SyncBatchNorm(channels)
        self.norm4 = SyncBatchNorm(channels)

        self._initialise_adapter()
        load_pretrained(self, pretrained, init_cfg)

    def _initialise_adapter(self) -> None:
        """Initialises the weights of the adapter."""
        for part in (self.up, self.spm, self.interactions):
            part.apply(initialise)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module._reset_parameters()
        nn.init.normal_(self.level_embed)

    @property
    def trunk(self) -> nn.ModuleList:
        """The transformer's blocks."""
        return self.blocks  # type: ignore[return-value]

    def _check_interactions(self) -> None:
        if self.add_vit_feature and self.features_of_each and len(self.interaction_indexes) != 4:
            raise ValueError(
                "add_vit_feature needs four interactions, one for each map, got interaction_indexes="
                f"{self.interaction_indexes}"
            )

    def forward(self, image: Tensor) -> list[Tensor]:
        padded = self._checked(image, 32)
        queries = deform_inputs(padded)
        c1, *levels = self.spm(padded)
        c = torch.cat([level + embed for level, embed in zip(levels, self.level_embed.unbind())], dim=1)
        x, height, width = self.embed(padded)  # type: ignore[operator]
        cls = None if self.cls_token is None else self.cls_token.expand(x.shape[0], -1, -1)

        features = []
        for (first, last), interaction in zip(self.interaction_indexes, self.interactions):
            blocks = [self.trunk[index] for index in range(first, last + 1)]
            x, c, cls = interaction(x, c, cls, blocks, queries, height, width)
            features.append(to_map(x, height, width))

        c2, c3, c4 = c.split([level.shape[1] for level in levels], dim=1)
        c2 = to_map(c2, 2 * height, 2 * width)
        c3 = to_map(c3, height, width)
        c4 = to_map(c4, height // 2, width // 2)
        maps = [self.up(c2) + c1, c2, c3, c4]
        if self.add_vit_feature:
            features = features if self.features_of_each else features[-1:] * 4
            maps = [m + _resized(x, scale) for m, x, scale in zip(maps, features, (4.0, 2.0, 1.0, 0.5))]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return self._cropped([norms[level](maps[level]) for level in self.out_levels], image)


def _resized(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def _interactions(indexes: Sequence[Sequence[int]] | None, depth: int) -> list[tuple[int, int]]:
    """First and last block of each interaction."""
    if indexes is None:
        if depth % 4:
            raise ValueError(
                f"interaction_indexes must be given: {depth} blocks cannot be split into four equal parts"
            )
        indexes = [(depth // 4 * part, depth // 4 * (part + 1) - 1) for part in range(4)]
    pairs = [(part[0], part[-1]) for part in indexes]
    if not pairs or any(not 0 <= first <= last < depth for first, last in pairs):
        raise ValueError(
            f"interaction_indexes must hold the first and last of some of the blocks 0 to {depth - 1}, got {indexes}"
        )
    return pairs


class ViTAdapter(Adapter, VisionTransformer):
    """A plain ViT with the adapter.

    Arguments: see :class:`Adapter` and :class:`~vitkern.models.vit.VisionTransformer`.
    """

    interactions_with_cp = ("segmentation",)


class BEiTAdapter(Adapter, BEiT):
    """A BEiT with the adapter. Arguments: see :class:`Adapter` and :class:`~vitkern.models.beit.BEiT`.

    The segmentation form has a class token and takes images of `img_size` only; the detection form has windows.

    Args:
        init_values: initial gamma of the injectors and initial factors of the blocks.
        version: version of the detection form. ``"old"`` adds features as the segmentation form does.
    """

    def __init__(
        self, *, variant: str = "segmentation", init_values: float = 0.0, version: str = "new", **options: Any
    ) -> None:
        if version not in ("old", "new"):
            raise ValueError(f"version must be 'old' or 'new', got {version!r}")
        segmentation = variant == "segmentation"
        super().__init__(
            variant=variant,
            init_values=init_values,
            layer_scale_init=init_values,
            features_of_each=segmentation or version == "old",
            with_cls=segmentation,
            **options,
        )


class UniPerceiverAdapter(Adapter, UnifiedBertEncoder):
    """A Uni-Perceiver with the adapter.

    Arguments: see :class:`Adapter` and :class:`~vitkern.models.uniperceiver.UnifiedBertEncoder`.
    """

    interactions_with_cp = ("detection",)

    @property
    def trunk(self) -> nn.ModuleList:
        return self.layers
