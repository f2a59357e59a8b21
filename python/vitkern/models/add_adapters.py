# SPDX-License-Identifier: Apache-2.0
"""Adapters in transformers that are already built, whoever built them; what is trained of a model, and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitkern.models.adaptformer_blocks import OPTIONS
from vitkern.models.blocks import check_blocks
from vitkern.models.checkpoints import Loaded
from vitkern.nn import AdapterBottleneck

# What the parts of a block are called in timm, torchvision and transformers.
ATTENTION = ("attn", "attention", "self_attention", "self_attn")
NORM = ("norm2", "ln_2", "layernorm_after", "layer_norm2")
FEED_FORWARD = ("mlp", "intermediate", "fc1")
HEADS = (
    *("head", "heads", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "fc"),
    *("decode_head", "auxiliary_head"),  # of segmentors
)


class HookedAdapter(AdapterBottleneck):
    """An adapter beside, or after, the feed-forward network of a block that knows nothing of it.

    Its hooks are methods, so that they stay with the adapter when the model is copied or pickled.
    """

    sequential = False
    _runs = False  # whether its block does; in a backward pass parts of that may run again
    _stream: Tensor | None = None  # while its block runs: the residual stream between attention and network

    def attach(self, block: nn.Module, norm: nn.Module, feed_forward: nn.Module, sequential: bool) -> None:
        self.sequential = sequential
        block.register_forward_pre_hook(self._begin)
        # Whichever comes first: some blocks normalise what goes into the network, some what comes out.
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
        assert stream is not None  # its block's network has run
        first, *others = output if isinstance(output, tuple) else (output,)
        stream = stream.reshape(first.shape)  # a map, of which some networks see the tokens
        # What the network has added, with all that scales, normalises or drops it, is the difference of the streams.
        adapted = self(first - stream if self.sequential else stream, residual=first)
        return (adapted, *others) if isinstance(output, tuple) else adapted


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks: what has an attention, a second norm and a feed-forward network."""
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
    """Puts an adapter of AdaptFormer beside, or after, the feed-forward network of each block of a ViT or Swin.

    Blocks of timm, torchvision and transformers are known by their structure. Keys of the model stay as they are;
    each block has ``adaptmlp.`` besides. At first adapters add zero: the model computes what it did, to the bit.

    Args:
        model: is changed.
        bottleneck: hidden units; None: a twelfth of the block's channels, as for a Swin.
        option: ``"parallel"`` to the feed-forward network, or ``"sequential"``, after it.
        scale, dropout, layer_norm, activation: of :class:`~vitkern.nn.AdapterBottleneck`.
        layers: numbers of the blocks that get one; None: all.
        backend: passed on to :func:`vitkern.adapter_bottleneck`.

    Returns:
        The model. :func:`freeze_backbone` freezes the rest of it.

    Examples:
        >>> model = vitkern.models.add_adapters(timm.create_model("vit_base_patch16_224", pretrained=True))
        >>> vitkern.models.freeze_backbone(model)
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no transformer blocks that add_adapters knows")
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
    """Puts an adapter with these options into a block."""
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
    """What the keys of adapters and of these parts begin with."""
    adapters = [name for name, module in model.named_modules() if isinstance(module, AdapterBottleneck)]
    return tuple(f"{name}." for name in (*adapters, *parts))


def freeze_backbone(model: nn.Module, loaded: Loaded | None = None) -> nn.Module:
    """Freezes what was trained before, and leaves adapters, prompts and the classifier to be trained.

    Args:
        model: one of this package, or one that :func:`add_adapters` has changed.
        loaded: what :func:`load_checkpoint` returned. Then what the checkpoint lacked is trained too, which is the
            official rule, and a norm before the classifier only if it was lacking (in videos always).

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
    """What tuning changes of the state dict: adapters, prompts, classifier, and of a frozen model all that is not."""
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
    """Loads what :func:`adapter_state_dict` returned, into a model with the same adapters."""
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
