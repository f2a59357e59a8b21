# SPDX-License-Identifier: Apache-2.0
"""The token modules beyond the paper's equations: other widths, parameter names, export."""

import pytest
import torch

from vitkern.nn import FilterTokenizer, RecurrentTokenizer, TokenProjector, TokenTransformer


def test_widths_that_differ():
    x = torch.randn(2, 49, 24)
    tokens = FilterTokenizer(24, 5, 32)(x)
    assert tokens.shape == (2, 5, 32)
    tokens = RecurrentTokenizer(24, 32)(x, tokens)
    assert tokens.shape == (2, 5, 32)
    tokens = TokenTransformer(32, key_channels=16, hidden_channels=8)(tokens)
    assert tokens.shape == (2, 5, 32)
    assert TokenProjector(24, 32, 48, key_channels=12)(x, tokens).shape == (2, 49, 48)


def test_keys():
    assert list(FilterTokenizer(8, 2).state_dict()) == ["attention.weight"]
    assert list(FilterTokenizer(8, 2, 6).state_dict()) == ["attention.weight", "value.weight"]
    assert list(RecurrentTokenizer(8).state_dict()) == ["attention.weight"]
    assert list(TokenTransformer(8).state_dict()) == [
        "key.weight",
        "query.weight",
        "fc1.weight",
        "fc2.weight",
    ]
    assert list(TokenProjector(8).state_dict()) == ["query.weight", "key.weight"]
    projector = TokenProjector(8, 6, 4).state_dict()
    assert list(projector) == ["query.weight", "key.weight", "value.weight", "shortcut.weight"]


def test_attention_maps_add_up_to_one():
    x = torch.randn(2, 49, 24)
    tokenizer = FilterTokenizer(24, 5)
    torch.testing.assert_close(tokenizer.attention_map(x).sum(1), torch.ones(2, 5))
    again = RecurrentTokenizer(24)
    torch.testing.assert_close(again.attention_map(x, tokenizer(x)).sum(1), torch.ones(2, 5))


class Chain(torch.nn.Module):
    """A Visual Transformer module: tokens of the map, their transformer, back to the map."""

    def __init__(self, backend=None):
        super().__init__()
        self.tokenizer = FilterTokenizer(16, 4, backend=backend)
        self.again = RecurrentTokenizer(16, backend=backend)
        self.transformer = TokenTransformer(16, backend=backend)
        self.projector = TokenProjector(16, backend=backend)

    def forward(self, x):
        tokens = self.transformer(self.again(x, self.tokenizer(x)))
        return self.projector(x, tokens)


def test_all_gradients_of_a_whole_module():
    ours, plain = Chain(), Chain("reference")
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 30, 16)
    results = []
    for module in (ours, plain):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        results.append([leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports_and_compiles_as_a_whole(dynamic):
    module, x = Chain(), torch.randn(3, 30, 16)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(x), module(x))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 30, 16)
    torch.testing.assert_close(exported(x), module(x))
