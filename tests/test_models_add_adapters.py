# SPDX-License-Identifier: Apache-2.0
"""Adapters in models of other projects: here in small models whose blocks have the same parts and names."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import close, gradients_of
from tests.parity.weights import fill, seeded
from vitkern.models import (
    AdaptFormer,
    ViTAdapter,
    adapter_state_dict,
    add_adapters,
    freeze_backbone,
    load_adapter_state_dict,
)
from vitkern.nn import AdapterBottleneck


class SelfAttention(nn.Linear):
    def forward(self, x):
        x = super().forward(x)
        return F.scaled_dot_product_attention(x, x, x)


def feed_forward(channels):
    return nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))


class TorchvisionBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.self_attention, self.mlp = SelfAttention(channels, channels), feed_forward(channels)

    def forward(self, x):
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NormAfterBlock(nn.Module):
    """A block as in Swin V2: the output of each branch is normalised, not its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn, self.mlp = SelfAttention(channels, channels), feed_forward(channels)

    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class TransformersBlock(nn.Module):
    """A block of two modules for the feed-forward network; it returns a tuple."""

    def __init__(self, channels):
        super().__init__()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, channels)
        self.intermediate, self.output = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x):
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x)))), None


class Classifier(nn.Module):
    def __init__(self, kind, channels=24):
        super().__init__()
        self.embed, self.head = nn.Linear(6, channels), nn.Linear(channels, 3)
        self.layers = nn.ModuleList(kind(channels) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(dim=1))


KINDS = pytest.mark.parametrize("kind", [TorchvisionBlock, NormAfterBlock, TransformersBlock])
X = seeded("x", (2, 5, 6))


def adapted(kind, **options):
    return add_adapters(fill(Classifier(kind)), 8, **options).eval()


def perturbed(model):
    for name, parameter in model.named_parameters():
        if "up_proj" in name:
            nn.init.normal_(parameter)
    return model


@KINDS
@torch.no_grad()
@pytest.mark.parametrize("option", ["parallel", "sequential"])
def test_a_new_adapter_changes_no_bit_and_no_key(kind, option):
    plain, model = fill(Classifier(kind)).eval(), adapted(kind, option=option)
    assert torch.equal(model(X), plain(X))
    assert set(plain.state_dict()) == {key for key in model.state_dict() if ".adaptmlp." not in key}
    assert not torch.equal(perturbed(model)(X), plain(X))


@torch.no_grad()
def test_the_adapter_reads_what_is_between_attention_and_network():
    model = perturbed(adapted(TorchvisionBlock, scale=2.0))
    block, x = model.layers[0], seeded("y", (2, 5, 24))
    middle = x + block.self_attention(block.ln_1(x))
    expected = middle + block.mlp(block.ln_2(middle)) + block.adaptmlp(middle, add_residual=False)
    torch.testing.assert_close(block(x), expected)
    block = perturbed(adapted(NormAfterBlock)).layers[0]
    middle = x + block.norm1(block.attn(x))
    expected = middle + block.norm2(block.mlp(middle)) + block.adaptmlp(middle, add_residual=False)
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_a_sequential_adapter_reads_what_the_network_adds():
    model = perturbed(adapted(TorchvisionBlock, option="sequential", scale=2.0))
    block, x = model.layers[0], seeded("y", (2, 5, 24))
    middle = x + block.self_attention(block.ln_1(x))
    close(block(x), middle + block.adaptmlp(block.mlp(block.ln_2(middle))))
    block = perturbed(adapted(NormAfterBlock, option="sequential")).layers[0]
    middle = x + block.norm1(block.attn(x))
    close(block(x), middle + block.adaptmlp(block.norm2(block.mlp(middle))))


def test_a_recomputed_block_leaves_nothing_behind():
    """Recomputed blocks with adapters give the same gradients, and leave no state that would prevent copies."""
    model = add_adapters(ViTAdapter(embed_dim=48, depth=4, num_heads=3), 4)
    x = seeded("image", (2, 3, 32, 32))

    def gradients(enable):
        model.set_grad_checkpointing(enable)
        return gradients_of(model.eval(), x)

    close(gradients(True), gradients(False))
    assert copy.deepcopy(model)(x)[0].shape == (2, 48, 8, 8)


@KINDS
@torch.no_grad()
def test_copies_have_adapters_of_their_own_and_pickles_work(kind):
    model = adapted(kind)
    before, twin = model(X), copy.deepcopy(model)
    perturbed(model)
    assert torch.equal(twin(X), before) and not torch.equal(model(X), before)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), model(X))
    load_adapter_state_dict(twin, adapter_state_dict(model))
    assert torch.equal(twin(X), model(X))


@KINDS
def test_training_changes_adapters_and_classifier_and_nothing_else(kind):
    model = freeze_backbone(adapted(kind, dropout=0.1)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if ".adaptmlp." in key or key.startswith("head.")}
    assert changed == set(adapter_state_dict(model))


@KINDS
@pytest.mark.parametrize("option", ["parallel", "sequential"])
def test_it_compiles_and_exports_with_its_hooks(kind, option):
    model = perturbed(adapted(kind, option=option))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


def test_chosen_layers_bottlenecks_and_a_model_of_this_package():
    model = adapted(TorchvisionBlock, layers=[1, 1])
    assert [name for name, m in model.named_modules() if isinstance(m, AdapterBottleneck)] == [
        "layers.1.adaptmlp"
    ]
    assert add_adapters(Classifier(NormAfterBlock), None).layers[0].adaptmlp.bottleneck == 2
    own = add_adapters(ViTAdapter(embed_dim=48, depth=4, num_heads=3), 4)
    assert sum(isinstance(module, AdapterBottleneck) for module in own.modules()) == 4


@torch.no_grad()
@pytest.mark.parametrize("option", ["parallel", "sequential"])
def test_in_a_plain_adaptformer_they_are_those_of_a_tuned_one(option):
    options = dict(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    added = add_adapters(AdaptFormer(**options), 8, option=option, scale=0.1)
    built = AdaptFormer(tuning_config=dict(ffn_num=8, ffn_option=option, ffn_adapter_scalar=0.1), **options)
    built.load_state_dict(fill(added).state_dict())
    image = seeded("image", (1, 3, 32, 32))
    assert torch.equal(added.eval()(image), built.eval()(image))


def test_adapters_have_the_type_and_place_of_their_block():
    model = add_adapters(Classifier(TorchvisionBlock).to("meta", torch.bfloat16), 4)
    assert model.layers[0].adaptmlp.up_proj.weight.is_meta
    assert model.layers[0].adaptmlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "message, make",
    [
        ("Linear has no transformer blocks", lambda: add_adapters(nn.Linear(2, 2))),
        ("has adapters already", lambda: add_adapters(adapted(TorchvisionBlock))),
        ("some of the blocks 0 to 1", lambda: adapted(TorchvisionBlock, layers=[2])),
        ("option must be one of", lambda: adapted(TorchvisionBlock, option="beside")),
        ("no adapters, prompts or classifier to train", lambda: freeze_backbone(nn.Linear(2, 2))),
    ],
)
def test_what_it_refuses(message, make):
    with pytest.raises(ValueError, match=message):
        make()
