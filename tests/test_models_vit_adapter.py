# SPDX-License-Identifier: Apache-2.0
"""ViT-Adapter's options on small models: their effects, and the refused values."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import close, gradients_of, image
from tests.parity.weights import fill, seeded
from vitkern.models import (
    BEiTAdapter,
    UniPerceiverAdapter,
    ViTAdapter,
    ViTBaseline,
    beit,
    layer_decay_groups,
    uniperceiver,
    vit,
)
from vitkern.models.attention_maps import sampling_points
from vitkern.models.blocks import DropPath, SyncBatchNorm, merge_windows, split_windows
from vitkern.nn import MSDeformAttn

SMALL = dict(embed_dim=48, depth=4, num_heads=3, conv_inplane=8)
WINDOWS = dict(window_attn=[True, False, True, False], window_size=[3, None, 2, None])
LIGHT = dict(interaction_indexes=[[0, 3]], with_cffn=False, use_extra_extractor=False, add_vit_feature=False)
POSITIONS = dict(use_abs_pos_emb=True, pretrain_size=64)
FORMS = pytest.mark.parametrize("variant", ["segmentation", "detection"])


def build(kind=ViTAdapter, **options):
    return fill(kind(**{**SMALL, **options})).eval()


def beit_adapter(variant="detection", **options):
    own = dict(img_size=64) if variant == "segmentation" else dict(window_attn=True, window_size=3)
    return build(BEiTAdapter, variant=variant, qkv_bias=True, init_values=1e-6, **own, **options)


def baseline(**options):
    return fill(ViTBaseline(**{"embed_dim": 64, "depth": 4, "num_heads": 4, **options})).eval()


MODELS = {
    "segmentation": build,
    "detection": lambda: build(variant="detection", **WINDOWS),
    "light": lambda: build(**LIGHT),
    "bare": lambda: build(layer_scale=False, qkv_bias=False, deform_ratio=0.5, n_points=2, **WINDOWS),
    "dropped": lambda: build(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2, with_cp=True),
    "padded": lambda: build(pad_input=True),
    "beit-segmentation": lambda: beit_adapter("segmentation"),
    "beit-positions": lambda: beit_adapter("segmentation", use_rel_pos_bias=False, **POSITIONS),
    "beit-detection": beit_adapter,
    "beit-old": lambda: beit_adapter(version="old", img_size=64, with_cp=True, **POSITIONS),
    "uniperceiver": lambda: build(UniPerceiverAdapter, **WINDOWS),
    "uniperceiver-detection": lambda: build(UniPerceiverAdapter, variant="detection", with_cp=True),
    "baseline": baseline,
    "vitdet": lambda: baseline(out_indices=[3], residual_indices=[1, 3], **WINDOWS),
}
ALL_MODELS = pytest.mark.parametrize("name", MODELS)


@ALL_MODELS
def test_four_maps_and_what_feature_info_says_of_them(name):
    model = MODELS[name]()
    maps, info = model(image()), model.feature_info
    assert [list(m.shape) for m in maps] == [
        [2, c, 64 // r, 64 // r] for c, r in zip(info.channels(), info.reduction())
    ]
    assert info.reduction() == [4, 8, 16, 32]


@ALL_MODELS
def test_every_parameter_learns_and_checkpointing_changes_nothing(name):
    model = MODELS[name]()
    plain = gradients_of(model, image())
    model.set_grad_checkpointing()
    close(gradients_of(model, image()), plain)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


@FORMS
def test_which_parts_recompute(variant):
    """Interactions are not recomputed in the official detection form, nor in Uni-Perceiver's segmentation form."""
    part = {
        kind: kind(variant=variant, with_cp=True, **SMALL).interactions[0]
        for kind in (ViTAdapter, UniPerceiverAdapter)
    }
    assert part[ViTAdapter].injector.with_cp == (variant == "segmentation")
    assert part[UniPerceiverAdapter].injector.with_cp == (variant == "detection")


def test_windows_are_cut_row_by_row_and_joined_again():
    x = torch.arange(2 * 5 * 4.0).view(2, 20, 1)
    windows = split_windows(x, 3, 5, 4)
    assert windows.shape == (2 * 2 * 2, 9, 1)
    assert windows[1, :, 0].tolist() == [3, 0, 0, 7, 0, 0, 11, 0, 0]
    assert torch.equal(merge_windows(windows, 3, 5, 4), x)


def test_what_the_padding_of_a_window_is():
    """One token in a window of 2 x 2: the softmax includes its own key and three keys of the padding."""
    x, channels = seeded("x", (1, 1, 8)), 8
    attentions = {
        "zeros": fill(vit.Attention(channels, 2, window_size=2)),
        "value bias": fill(
            beit.Attention(
                channels,
                2,
                qkv_bias=True,
                qk_scale=None,
                attn_drop=0,
                proj_drop=0,
                window=(2, 2),
                with_cls=False,
                split=True,
            )
        ),
        "biases": fill(uniperceiver.Attention(channels, 2, 2)),
    }
    attentions["value bias"].relative_position_bias_table.data.zero_()
    for padding, attention in attentions.items():
        if padding == "value bias":
            bias = torch.cat([attention.q_bias, torch.zeros(8), attention.v_bias])
            out, padded = attention.proj, bias[None, None]
            qkv = F.linear(x, attention.qkv.weight, bias)
        elif padding == "biases":
            out, padded, qkv = attention.out_proj, attention.in_proj.bias[None, None], attention.in_proj(x)
        else:
            out, padded, qkv = attention.proj, torch.zeros(1, 1, 24), attention.qkv(x)
        query, key, value = torch.cat([qkv, padded, padded, padded], 1).view(4, 3, 2, 4).permute(1, 2, 0, 3)
        weights = (query[:, :1] @ key.transpose(1, 2) / 2).softmax(-1)
        close(attention(x, 1, 1), out((weights @ value).reshape(1, 1, 8)), 1e-6)


@pytest.mark.parametrize("window_size", [None, [2, None, 2, None]], ids=str)
def test_beit_without_a_window_has_no_position_biases_there(window_size):
    windowed = False if window_size is None else [True, False, True, False]
    model = build(BEiTAdapter, variant="detection", window_attn=windowed, window_size=window_size)
    assert model(image(64, 96))[0].shape == (2, 48, 16, 24)
    tables = [hasattr(block.attn, "relative_position_bias_table") for block in model.blocks]
    assert tables == ([False] * 4 if window_size is None else windowed)


def test_gamma_of_zero_leaves_the_transformer_alone():
    model = build()
    for interaction in model.interactions:
        torch.nn.init.zeros_(interaction.injector.gamma)
    taken = []
    model.interactions[-1].register_forward_hook(lambda module, inputs, output: taken.append(output[0]))
    model(image())
    x, height, width = model.embed(image())
    for block in model.blocks:
        x = block(x, height, width)
    assert torch.equal(taken[0], x)


def test_layer_scale_starts_as_if_it_was_not_there():
    with_scale, without = ViTAdapter(**SMALL).eval(), ViTAdapter(layer_scale=False, **SMALL).eval()
    missing, unexpected = with_scale.load_state_dict(without.state_dict(), strict=False)
    assert not unexpected and all(key.endswith(("gamma1", "gamma2")) for key in missing)
    close(with_scale(image()), without(image()), 1e-6)


def test_the_forms_differ_in_the_features_they_add():
    segmentation, detection = build(), build(variant="detection")
    assert segmentation.state_dict().keys() == detection.state_dict().keys()
    assert not torch.allclose(segmentation(image())[0], detection(image())[0])
    close(segmentation(image())[3], detection(image())[3])  # its features are the last ones in both
    close(beit_adapter(version="old")(image())[3], beit_adapter(version="new")(image())[3])


def test_extra_extractors_are_in_the_last_interaction_only():
    keys = set(build().state_dict()) - set(build(use_extra_extractor=False).state_dict())
    assert {key.split(".extra_extractors.")[0] for key in keys} == {"interactions.3"}


def test_images_of_the_pretraining_size_take_the_position_embeddings_as_they_are():
    model = build(img_size=64, pretrain_size=64)
    x, height, width = model.patch_embed(image())
    assert torch.equal(model.embed(image())[0], x + model.pos_embed[:, 1:])
    assert model.embed(image(96, 32))[0].shape == (2, 12, 48)


def test_padding_and_levels_on_demand():
    model, padded = build(), build(pad_input=True, out_indices=(1, 3))
    assert torch.equal(padded(image())[1], model(image())[3])
    assert torch.equal(build(out_indices=(-1,))(image())[0], model(image())[3])
    assert build(out_indices=(0, -1)).feature_info.reduction() == [4, 32]
    maps = padded(image(40, 70))
    assert [list(m.shape[2:]) for m in maps] == [[5, 9], [2, 3]]
    whole = model(F.pad(image(40, 70), (0, 26, 0, 24)))
    assert torch.equal(maps[0], whole[1][:, :, :5, :9])


def test_sampling_points_of_every_layer():
    model = build()
    found = sampling_points(model, image())
    assert set(found) == {name for name, module in model.named_modules() if isinstance(module, MSDeformAttn)}
    for locations, weights in found.values():
        assert locations.shape[:-1] == weights.shape
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(weights.shape[:3]))


def test_sampling_points_of_a_layer_that_is_called_by_names():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MSDeformAttn(16, 1, 2, 2)

        def forward(self, tokens):
            named = dict(input_flatten=tokens, input_spatial_shapes=[(2, 3)], input_level_start_index=[0])
            return self.layer(tokens, reference_points=torch.full((1, 6, 1, 2), 0.5), **named)

    model, tokens = Model(), torch.randn(2, 6, 16)
    locations, weights = sampling_points(model, tokens)["layer"]
    assert locations.shape == (2, 6, 2, 1, 2, 2) and weights.shape == (2, 6, 2, 1, 2)


def test_other_than_three_channels():
    assert build(in_chans=5)(torch.randn(1, 5, 32, 32))[0].shape == (1, 48, 8, 8)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    x = drop(torch.ones(4000, 2, 3))
    assert x.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (x == x[:, :1, :1]).all() and x.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x


def test_norms_are_synchronised_ones_that_run_on_a_cpu():
    model = build().train()
    assert isinstance(model.norm1, SyncBatchNorm) and isinstance(model.norm1, torch.nn.SyncBatchNorm)
    assert model(image())[3].isfinite().all()


def test_initial_weights():
    model = ViTAdapter(**SMALL)
    assert (model.interactions[0].injector.gamma == 0).all() and (model.blocks[0].gamma1 == 1).all()
    assert (model.pos_embed == 0).all() and model.level_embed.std() > 0.5
    assert model.interactions[0].extractor.ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.interactions[0].injector.attn.attention_weights.weight == 0).all()
    assert BEiTAdapter(init_values=1e-6, **SMALL).blocks[1].gamma_2[0].item() == pytest.approx(1e-6)
    assert (UniPerceiverAdapter(**SMALL).layers[0].gamma_1 == 0).all()


def test_learning_rates_fall_towards_the_first_block():
    model = build()
    segmentor = torch.nn.ModuleDict({"backbone": model, "decode_head": torch.nn.Linear(48, 3)})
    groups = layer_decay_groups(segmentor, 1e-3, 0.05, 0.5, 4, model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(list(segmentor.parameters()))
    of = {name: group for group in groups for name in group["param_names"]}
    expected = {
        "backbone.pos_embed": (0.5**5, 0),
        "backbone.patch_embed.proj.weight": (0.5**5, 0.05),
        "backbone.blocks.0.mlp.fc1.weight": (0.5**4, 0.05),
        "backbone.blocks.3.gamma1": (0.5, 0),
        "backbone.level_embed": (1, 0),
        "backbone.spm.fc1.weight": (1, 0.05),
        "decode_head.bias": (1, 0),
    }
    for name, (scale, decay) in expected.items():
        assert of[name]["lr"] == pytest.approx(1e-3 * scale) and of[name]["weight_decay"] == decay, name
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        lambda model: torch.nn.ModuleDict({"module": model}),  # DistributedDataParallel's name for it
    ],
    ids=["compiled", "distributed"],
)
def test_learning_rates_of_a_wrapped_model_are_its_own(wrap):
    def scales(model, strip=""):
        groups = layer_decay_groups(model, 1.0, 0.05, 0.5, 4, {"level_embed"})
        of = {name.removeprefix(strip): group for group in groups for name in group["param_names"]}
        return {name: (group["lr"], group["weight_decay"]) for name, group in of.items()}

    model = build()
    wrapped = wrap(model)
    prefix = next(iter(dict(wrapped.named_parameters()))).partition(".")[0] + "."
    assert scales(wrapped, prefix) == scales(model)


@ALL_MODELS
def test_every_parameter_is_in_one_group(name):
    model = MODELS[name]()
    groups = layer_decay_groups(model, 1.0, 0.05, 0.5, 4, model.no_weight_decay())
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {group["lr_scale"] for group in groups} == {0.5**layer for layer in range(6)}


@ALL_MODELS
def test_bfloat16_autocast_trains(name):
    model = MODELS[name]().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model(image())
        loss = sum(m.float().square().mean() for m in maps)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@ALL_MODELS
def test_meta_tensors(name):
    model = MODELS[name]().to("meta")
    assert [m.device.type for m in model(image().to("meta"))] == ["meta"] * 4


@ALL_MODELS
def test_export(name):
    model = MODELS[name]()
    exported = torch.export.export(model, (image(),)).module()
    close(exported(image()), model(image()), 1e-5)


@pytest.mark.slow
@ALL_MODELS
def test_compiles_whole(name):
    """Forward and backward compile as one graph, the input of inductor, which itself would take minutes.

    Plain "aot_eager" keeps the backward of dropout as one op, for whose result torch 2.13 has wrong strides.
    """
    model = MODELS[name]().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    compiled(image())[0].sum().backward()
    assert model.up1[0].weight.grad is not None if hasattr(model, "up1") else model.up.weight.grad is not None


@pytest.mark.parametrize(
    "message, make",
    [
        ("multiples of 32, got 48 x 64", lambda: build()(image(48, 64))),
        (r"\[B, 3, H, W\], got \[1, 4, 64, 64\]", lambda: build()(torch.zeros(1, 4, 64, 64))),
        (r"\[B, 3, H, W\], got \[1, 3, 0, 64\]", lambda: build()(torch.zeros(1, 3, 0, 64))),
        (r"some of the maps 0 to 3, got \(1, 4\)", lambda: build(out_indices=(1, 4))),
        ("some of the maps 0 to 3, got 2", lambda: build(out_indices=2)),
        (
            "depth must be .* got 3, but the model has blocks.3",
            lambda: layer_decay_groups(build(), 1, 0, 0.5, 3),
        ),
        ("variant must be", lambda: build(variant="panoptic")),
        ("img_size=384", lambda: build(img_size=384)),
        ("img_size=64 makes 16", lambda: beit_adapter("segmentation", use_abs_pos_emb=True)),
        ("four interactions", lambda: build(interaction_indexes=[[0, 1], [2, 3]])),
        ("blocks 0 to 3", lambda: build(interaction_indexes=[[0, 4]], add_vit_feature=False)),
        ("interaction_indexes must be given", lambda: build(depth=3)),
        ("window_attn must be one value or one for each of the 4", lambda: build(window_attn=[True])),
        ("drop_path_rate must be .* got 1.5", lambda: build(drop_path_rate=1.5)),
        ("window_size of block 0 must be at least 1", lambda: build(window_attn=True, window_size=0)),
        ("window_size of block 0", lambda: build(window_attn=True, window_size=None)),
        ("divisible by num_heads", lambda: build(num_heads=5)),
        ("patch_size must be 16", lambda: build(patch_size=14)),
        ("an image of 64 x 64 is needed", lambda: beit_adapter("segmentation")(image(96, 96))),
        ("version must be", lambda: beit_adapter(version="newer")),
        ("hybrid_backbone", lambda: beit_adapter(hybrid_backbone=object())),
        ("one or four of the blocks", lambda: baseline(out_indices=[0, 1])),
        ("from first to last, got .3, 2, 1, 0.", lambda: baseline(out_indices=[3, 2, 1, 0])),
        ("from first to last, got .1, 1, 3, 3.", lambda: baseline(out_indices=[1, 1, 3, 3])),
        ("out_indices must be given: 6 blocks cannot be split into four quarters", lambda: baseline(depth=6)),
        ("residual_indices must be some of the blocks 0 to 3", lambda: baseline(residual_indices=[4])),
        ("at least 32 x 32", lambda: baseline()(image(16, 64))),
    ],
)
def test_what_it_refuses(message, make):
    with pytest.raises(ValueError, match=message):
        make()
