# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer on a Swin Transformer; as in the paper, hidden units are a twelfth of the channels."""

from __future__ import annotations

from typing import Any

from vitkern.models.adaptformer_blocks import Tuning
from vitkern.models.swin import SwinTransformer


class AdaptFormerSwin(SwinTransformer):
    """A Swin with an adapter in each block. The other arguments are those of
    :class:`~vitkern.models.swin.SwinTransformer`.

    Args:
        tuning_config: a dict, Namespace or object with attributes of
            :class:`~vitkern.models.adaptformer_blocks.Tuning`; d_model has no effect, and without ffn_num the hidden
            units are a twelfth of the channels. None: a plain Swin.
        adapter_dropout: dropout of the adapters' hidden units.
        backend: passed on to :func:`vitkern.adapter_bottleneck`.
    """

    def __init__(
        self,
        *,
        tuning_config: Any = None,
        adapter_dropout: float = 0.0,
        backend: str | None = None,
        **swin: Any,
    ) -> None:
        tuning = Tuning.of(tuning_config, ffn_num=None)
        if tuning.vpt_on:
            raise ValueError(
                "tuning_config: vpt_on must be False, the windows of a Swin have no place for prompts"
            )
        super().__init__(
            adapter=lambda channels, block: tuning.adapter(channels, block, adapter_dropout, backend),
            sequential=tuning.sequential,
            **swin,
        )
        tuning.check_layers(sum(len(stage.blocks) for stage in self.layers))  # type: ignore[arg-type, misc]
        self.tuning = tuning
