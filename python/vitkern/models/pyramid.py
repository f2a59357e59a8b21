# SPDX-License-Identifier: Apache-2.0
"""Base classes of the models: backbones, classifiers and feature pyramids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class FeatureInfo(list[dict[str, Any]]):
    """Channels and stride of each map that a backbone returns, with the accessors of timm's class."""

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        return [info["module"] for info in self]


def some_of(maps: int, out_indices: Sequence[int]) -> tuple[int, ...]:
    """Checks the numbers of the maps to return; negative ones count from the last."""
    known = isinstance(out_indices, Sequence) and all(-maps <= index < maps for index in out_indices)
    if not known or not out_indices:
        raise ValueError(f"out_indices must be some of the maps 0 to {maps - 1}, got {out_indices}")
    return tuple(index % maps for index in out_indices)


class Backbone(nn.Module):
    """A model of images with `in_chans` channels."""

    in_chans: int

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether backward recomputes the blocks instead of saving their intermediate results."""
        for module in self.modules():
            if hasattr(module, "with_cp"):
                module.with_cp = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        names = {"pos_embed", "cls_token", "level_embed"}
        return {
            name
            for name, _ in self.named_parameters()
            if name.rpartition(".")[2] in names or "pos_embed" in name
        }

    def _checked(self, image: Tensor, multiple: int, advice: str = "") -> Tensor:
        self._check_channels(image)
        height, width = image.shape[2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"{type(self).__name__}: height and width must be multiples of {multiple}, "
                f"got {height} x {width}{advice}"
            )
        return image

    def _check_channels(self, image: Tensor) -> None:
        if image.dim() != 4 or image.shape[1] != self.in_chans or 0 in image.shape[2:]:
            raise ValueError(
                f"{type(self).__name__}: image must be [B, {self.in_chans}, H, W], got {list(image.shape)}"
            )

    def _check_shape(self, x: Tensor, shape: tuple[int, ...]) -> None:
        """Refuses inputs of another shape than the model's image or video size."""
        if tuple(x.shape[1:]) != shape:
            kind = "video" if len(shape) == 4 else "image"
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{type(self).__name__}: {kind} must be [B, {expected}], got {list(x.shape)}")


class Classifier(Backbone):
    """A model whose `head` classifies `num_features` features."""

    num_classes: int
    num_features: int
    head: nn.Module

    def make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """Replaces the classifier; 0 classes: the model returns features. `global_pool`: accepted for compatibility."""
        if not hasattr(self, "head"):
            raise ValueError(f"{type(self).__name__} returns feature maps: it has no classifier to reset")
        self.num_classes = num_classes
        self.head = self.make_head(num_classes).to(next(self.parameters()))


class Pyramid(Backbone):
    """A backbone of four maps at strides 4, 8, 16 and 32, each with embed_dim channels."""

    embed_dim: int
    out_levels: tuple[int, ...] = (0, 1, 2, 3)
    pad_input = False

    @property
    def feature_info(self) -> FeatureInfo:
        return FeatureInfo(
            {"num_chs": self.embed_dim, "reduction": 4 << level, "module": f"norm{level + 1}"}
            for level in self.out_levels
        )

    def _checked(self, image: Tensor, multiple: int, advice: str = "; pad_input=True pads them") -> Tensor:
        """The image, padded to this multiple if `pad_input` is set; refused if its size is not a multiple otherwise."""
        if self.pad_input:
            self._check_channels(image)
            height, width = image.shape[2:]
            return F.pad(image, (0, -width % multiple, 0, -height % multiple))
        return super()._checked(image, multiple, advice)

    def _cropped(self, maps: Sequence[Tensor], image: Tensor) -> list[Tensor]:
        """The maps without the cells that lie wholly in the padding."""
        if not self.pad_input:
            return list(maps)
        height, width = image.shape[2:]
        return [
            m[:, :, : -(-height // stride), : -(-width // stride)]
            for m, stride in zip(maps, self.feature_info.reduction())
        ]
