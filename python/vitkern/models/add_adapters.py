# SPDX-License-Identifier: Apache-2.0
"""Adapters for transformers that are already built, and the choice of the parameters to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitkern.models.adaptformer_blocks import OPTIONS
from vitkern.models.blocks import check_blocks
from vitkern.models.checkpoints import Loaded
from vitkern.nn import AdapterBottleneck

# Names of a block's parts in timm, torchvision and transformers.
ATTENTION = ("attn", "attention", "self_attention", "self_attn")
NORM = ("norm2", "ln_2", "layernorm_after", "layer_norm2")
FEED_FORWARD = ("mlp", "intermediate", "fc1")
HEADS = (
    *("head", "heads", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "fc"),
    *("decode_head", "auxiliary_head"),  # of segmentors
)


class HookedAdapter(AdapterBottleneck):
    """An adapter beside, or after, the feed-forward network of an unmodified block, attached by hooks.

    The hooks are methods: they stay with the adapter when the model is copied or pickled.
    """

    sequential = False
    _runs = False  # whether its block runs; backward may recompute parts of the block alone
    _stream: Tensor | None = None  # during the block: the residual stream between attention and network

    def attach(self, block: nn.Module, norm: nn.Module, feed_forward: nn.Module, sequential: bool) -> None:
        self.sequential = sequential
        block.register_forward_pre_hook(self._begin)
        # Hooks the first of the two to run: blocks normalise either the input or the output of the network.
        norm.register_forward_pre_hook(self._remember)
        feed_forward.register_forward_pre_hook(self._remember)
        block.register_forward_hook(self._add)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._runs, self._stream = True, None

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        if self._runs and self._stream is None:
            self._stream = inputs[0]

    def _add(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        stream, self._runs, self._stream = self._stream, False, None
        assert stream is not None  # the hook before the network has set it
        first, *others = output if isinstance(output, tuple) else (output,)
        stream = stream.reshape(first.shape)  # from tokens to a map: some networks take tokens
        # The difference of the streams is the network's output after scaling, normalisation and dropout.
        adapted = self(first - stream if self.sequential else stream, residual=first)
        return (adapted, *others) if isinstance(output, tuple) else adapted


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: modules with an attention, a second norm and a feed-forward network."""
    return [m for m in model.modules() if all(_part(m, kind) for kind in (ATTENTION, NORM, FEED_FORWARD))]


def _part(block: nn.Module, names: Sequence[str]) -> nn.Module | None:
    children = dict(block.named_children())
    return next((children[name] for name in names if name in children), None)


def add_adapters(
    model: nn.Module,
    bottleneck: int | None = 64,
    *,
    option: str = "parallel",
    scale: float | str = 0.1,
    dropout: float = 0.0,
    layer_norm: str = "none",
    activation: str = "relu",
    layers: Sequence[int] | None = None,
    backend: str | None = None,
) -> nn.Module:
    """Adds an AdaptFormer adapter beside, or after, the feed-forward network of each block of a ViT or Swin.

    Blocks of timm, torchvision and transformers are recognised by their structure. The model's keys stay;
    each block gains ``adaptmlp.``. New adapters add zero: the model's results stay bitwise equal.

    Args:
        model: the model, changed in place.
        bottleneck: hidden units; None: a twelfth of the block's channels, as for a Swin.
        option: ``"parallel"`` to the feed-forward network, or ``"sequential"``, after it.
        scale, dropout, layer_norm, activation: options of :class:`~vitkern.nn.AdapterBottleneck`.
        layers: numbers of the blocks that get an adapter; None: all.
        backend: passed on to :func:`vitkern.adapter_bottleneck`.

    Returns:
        The model. :func:`freeze_backbone` freezes everything but the adapters and the classifier.

    Examples:
        >>> model = vitkern.models.add_adapters(timm.create_model("vit_base_patch16_224", pretrained=True))
        >>> vitkern.models.freeze_backbone(model)
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no transformer blocks that add_adapters supports")
    if any(getattr(block, "adaptmlp", None) is not None for block in blocks):
        raise ValueError(f"{type(model).__name__} has adapters already")
    if option not in OPTIONS:
        raise ValueError(f"option must be one of {OPTIONS}, got {option!r}")
    chosen = range(len(blocks)) if layers is None else layers
    check_blocks("layers", chosen, len(blocks))
    options = (dropout, "lora", scale, layer_norm)
    for number in sorted(set(chosen)):
        _adapt(
            blocks[number],
            bottleneck,
            option == "sequential",
            *options,
            activation=activation,
            backend=backend,
        )
    return model


def _adapt(
    block: nn.Module, bottleneck: int | None, sequential: bool, *options: Any, **named_options: Any
) -> None:
    """Adds an adapter with these options to a block."""
    norm: Any = _part(block, NORM)
    feed_forward: Any = _part(block, FEED_FORWARD)
    channels = norm.weight.numel()
    hidden = channels // 12 if bottleneck is None else bottleneck
    own = hasattr(block, "adaptmlp")  # a block of this package calls its adapter itself
    adapter = (AdapterBottleneck if own else HookedAdapter)(channels, hidden, *options, **named_options)
    adapter.to(norm.weight).train(block.training)
    block.adaptmlp = adapter
    if isinstance(adapter, HookedAdapter):
        adapter.attach(block, norm, feed_forward, sequential)
    else:
        block.sequential = sequential  # type: ignore[assignment]


def _trained(model: nn.Module, parts: Sequence[str]) -> tuple[str, ...]:
    """Prefixes of the keys of the adapters and of these parts."""
    adapters = [name for name, module in model.named_modules() if isinstance(module, AdapterBottleneck)]
    return tuple(f"{name}." for name in (*adapters, *parts))


def freeze_backbone(model: nn.Module, loaded: Loaded | None = None) -> nn.Module:
    """Freezes the pretrained parameters; adapters, prompts and the classifier stay trainable.

    Args:
        model: a model of this package, or one changed by :func:`add_adapters`.
        loaded: the result of :func:`load_checkpoint`. Parameters that the checkpoint lacked are then trained too, the
            official rule; a norm before the classifier is trained only if it was lacking (for videos, always).

    Returns:
        The model.
    """
    parts = getattr(model, "trained_parts", HEADS)
    missing = () if loaded is None else loaded.missing
    if loaded is not None:
        parts = getattr(model, "always_trained", HEADS)
    prefixes = _trained(model, parts)
    trained = {name for name, _ in model.named_parameters() if name.startswith(prefixes) or name in missing}
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has no adapters, prompts or classifier to train: add_adapters comes first"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tuned part of the state dict: adapters, prompts, classifier, and all unfrozen parts of a frozen model."""
    prefixes = _trained(model, getattr(model, "trained_parts", HEADS))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(trained) == len(list(model.parameters())):
        trained = set()
    return {
        key: tensor
        for key, tensor in model.state_dict().items()
        if key.startswith(prefixes) or key in trained
    }


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the result of :func:`adapter_state_dict` into a model with the same adapters."""
    own, name = model.state_dict(), type(model).__name__
    for key, tensor in state.items():
        if key not in own:
            raise ValueError(f"{name} has no {key}: it needs the same adapters first")
        if own[key].shape != tensor.shape:
            raise ValueError(f"{key} is {list(tensor.shape)} and in {name} {list(own[key].shape)}")
    lacking = [key for key in own if key.startswith(_trained(model, ())) and key not in state]
    if lacking:
        raise ValueError(f"the adapters of {name} have {lacking[0]}, which is not among what is loaded")
    model.load_state_dict(state, strict=False)
