# SPDX-License-Identifier: Apache-2.0
"""The adapter of AdaptFormer: same parameters, same results, one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkern.functional import adapter_bottleneck


class AdapterBottleneck(nn.Module):
    """``x + scale * up(dropout(activation(down(x))))``: a trainable branch beside, or after, a frozen layer.

    Loads adapters of AdaptFormer checkpoints (``adaptmlp.down_proj.weight`` and so on). The up projection
    starts at zero: a new adapter returns exactly its residual.

    Args:
        d_model: channels, C.
        bottleneck: hidden units, H.
        dropout: probability of dropping a hidden unit in training.
        init_option: ``"lora"``: Kaiming-uniform down weight, everything else zero.
        adapter_scalar: the scale: a number, a string of it as in AdaptFormer's configurations, or
            ``"learnable_scalar"`` for a parameter that starts at 1.
        adapter_layernorm_option: ``"in"`` normalises the input, ``"out"`` the output before the residual is added,
            ``"none"`` neither.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        backend: passed on to :func:`vitkern.adapter_bottleneck`.
    """

    def __init__(
        self,
        d_model: int = 768,
        bottleneck: int = 64,
        dropout: float = 0.0,
        init_option: str = "lora",
        adapter_scalar: float | str = 1.0,
        adapter_layernorm_option: str | None = "in",
        *,
        activation: str = "relu",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        layer_norm = adapter_layernorm_option or "none"
        if layer_norm not in ("in", "out", "none"):
            raise ValueError(
                "AdapterBottleneck: adapter_layernorm_option must be 'in', 'out' or 'none', got "
                f"{adapter_layernorm_option!r}"
            )
        if init_option != "lora":
            raise ValueError(f"AdapterBottleneck: init_option must be 'lora', got {init_option!r}")
        if bottleneck < 1:
            raise ValueError(f"AdapterBottleneck: bottleneck must be at least 1, got {bottleneck}")
        self.d_model, self.bottleneck, self.dropout = d_model, bottleneck, dropout
        self.adapter_layernorm_option, self.activation, self.backend = layer_norm, activation, backend
        self.adapter_layer_norm_before = None if layer_norm == "none" else nn.LayerNorm(d_model)
        self.scale = _scale(adapter_scalar)
        self.down_proj = nn.Linear(d_model, bottleneck)
        self.up_proj = nn.Linear(bottleneck, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down_proj.weight, a=5**0.5)
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)

    def forward(self, x: Tensor, add_residual: bool = True, residual: Tensor | None = None) -> Tensor:
        """
        Args:
            x: ``[..., C]``.
            add_residual: whether to add the residual.
            residual: ``[..., C]``; None takes x.
        """
        residual = x if residual is None else residual
        if not add_residual:
            residual = None
        if self.adapter_layer_norm_before is None:
            return self._bottleneck(x, residual)
        if self.adapter_layernorm_option == "in":
            return self._bottleneck(self.adapter_layer_norm_before(x), residual)
        output = self.adapter_layer_norm_before(self._bottleneck(x, None))
        return output if residual is None else residual + output

    def _bottleneck(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return adapter_bottleneck(
            x,
            self.down_proj.weight,
            self.down_proj.bias,
            self.up_proj.weight,
            self.up_proj.bias,
            residual=residual,
            scale=self.scale,
            dropout_p=self.dropout,
            training=self.training,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        scale = "learnable" if isinstance(self.scale, nn.Parameter) else self.scale
        return (
            f"{self.d_model} -> {self.bottleneck} -> {self.d_model}, {self.activation}, scale={scale}, "
            f"dropout={self.dropout}, layer_norm={self.adapter_layernorm_option}"
        )


def _scale(option: float | str) -> nn.Parameter | float:
    if option == "learnable_scalar":
        return nn.Parameter(torch.ones(1))
    try:
        return float(option)
    except (TypeError, ValueError):
        raise ValueError(
            f"AdapterBottleneck: adapter_scalar must be a number or 'learnable_scalar', got {option!r}"
        ) from None
