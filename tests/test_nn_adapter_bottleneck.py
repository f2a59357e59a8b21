# SPDX-License-Identifier: Apache-2.0
"""AdapterBottleneck compared with AdaptFormer's adapter in plain torch."""

import pytest
import torch

from vitkern.nn import AdapterBottleneck


def official(module: AdapterBottleneck, x, add_residual=True, residual=None):
    """The computation of AdaptFormer's Adapter, step by step."""
    residual = x if residual is None else residual
    if module.adapter_layernorm_option == "in":
        x = module.adapter_layer_norm_before(x)
    hidden = torch.nn.functional.dropout(module.down_proj(x).relu(), module.dropout, module.training)
    up = module.up_proj(hidden) * module.scale
    if module.adapter_layernorm_option == "out":
        up = module.adapter_layer_norm_before(up)
    return up + residual if add_residual else up


def trained(**options) -> AdapterBottleneck:
    """A module with random weights instead of the initial ones."""
    module = AdapterBottleneck(24, 6, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layer_norm", ["in", "out", "none", None])
@pytest.mark.parametrize("scalar", [0.1, "0.1", "learnable_scalar"])
@pytest.mark.parametrize("residual", ["x", "other", "none"])
def test_output_and_gradients_of_the_official_adapter(backend, layer_norm, scalar, residual):
    module = trained(adapter_scalar=scalar, adapter_layernorm_option=layer_norm, backend=backend)
    x = torch.randn(2, 7, 24, requires_grad=True)
    other = torch.randn(2, 7, 24, requires_grad=True) if residual == "other" else None
    leaves = [x, *module.parameters(), *([] if other is None else [other])]
    results = []
    for function in (module, lambda *inputs: official(module, *inputs)):
        output = function(x, residual != "none", other)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        results.append((output, *gradients))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_exactly_its_residual(backend, dtype):
    module = AdapterBottleneck(64, 16, adapter_scalar=0.1, backend=backend).to(dtype)
    x = torch.randn(3, 50, 64, dtype=dtype)
    assert torch.equal(module(x), x)
    assert torch.equal(module(x, add_residual=False), torch.zeros_like(x))


def test_initial_weights():
    module = AdapterBottleneck(768, 64)
    bound = 1 / 768**0.5  # kaiming_uniform with a = sqrt(5)
    assert 0.99 * bound < module.down_proj.weight.abs().max() <= bound
    for zero in (module.down_proj.bias, module.up_proj.weight, module.up_proj.bias):
        assert not zero.any()


def test_a_learnable_scale_is_reset_with_the_weights():
    module = AdapterBottleneck(8, 2, adapter_scalar="learnable_scalar")
    torch.nn.init.zeros_(module.scale)
    module.reset_parameters()
    assert module.scale.item() == 1


def test_keys_of_adaptformer():
    keys = {"down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias"}
    norm = {"adapter_layer_norm_before.weight", "adapter_layer_norm_before.bias"}
    assert AdapterBottleneck(8, 2, adapter_layernorm_option="none").state_dict().keys() == keys
    assert AdapterBottleneck(8, 2, adapter_layernorm_option="out").state_dict().keys() == keys | norm
    learnable = AdapterBottleneck(8, 2, adapter_scalar="learnable_scalar").state_dict()
    assert learnable.keys() == keys | norm | {"scale"}
    assert learnable["scale"].shape == (1,)


def test_mistakes_are_named():
    with pytest.raises(
        ValueError, match="adapter_layernorm_option must be 'in', 'out' or 'none', got 'before'"
    ):
        AdapterBottleneck(8, 2, adapter_layernorm_option="before")
    with pytest.raises(ValueError, match="init_option must be 'lora', got 'bert'"):
        AdapterBottleneck(8, 2, init_option="bert")
    with pytest.raises(
        ValueError, match="adapter_scalar must be a number or 'learnable_scalar', got 'learnt'"
    ):
        AdapterBottleneck(8, 2, adapter_scalar="learnt")


def test_dropout_only_in_training():
    module = trained(dropout=0.5)
    x = torch.randn(4, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("residual", [True, False])
def test_autocast_gives_what_the_official_adapter_gives(residual):
    module = trained(adapter_layernorm_option="none")
    x = torch.randn(2, 7, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module(x, add_residual=residual), official(module, x, add_residual=residual)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    ours.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
