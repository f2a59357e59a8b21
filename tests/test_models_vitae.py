# SPDX-License-Identifier: Apache-2.0
"""ViTAE's options on small models: their effects, the refused values, and pictures of the attention."""

import pytest
import torch
from torch import nn

import vitkern
from tests.helpers import close, gradients_of, image, loss_of, trained
from tests.parity.weights import fill, seeded
from vitkern.models import ViTAE, ViTAEv2, load_checkpoint
from vitkern.models.attention_maps import grad_cam, mean_attention_distances
from vitkern.models.blocks import sinusoid_positions
from vitkern.models.table import count_parameters
from vitkern.models.vitae_cells import Attention, TokenPerformer, WindowAttention

SMALL = dict(
    embed_dims=[8, 8, 16], token_dims=[16, 16, 32], NC_depth=[0, 1, 2], NC_heads=2, NC_group=4, img_size=64
)
LARGE = dict(
    embed_dims=16,
    token_dims=[16, 16, 16],
    downsample_ratios=[16, 1, 1],
    RC_tokens_type=["embedding", "none", "none"],
    NC_tokens_type="transformer_shallow",
    NC_depth=[0, 0, 2],
    NC_heads=2,
    NC_group=4,
    class_token=True,
    img_size=64,
)
V2 = dict(
    embed_dims=8, token_dims=[8, 16, 16, 32], NC_depth=1, NC_heads=2, RC_heads=1, NC_group=4, RC_group=1
)


def small(**options):
    return fill(ViTAE(num_classes=5, **{**SMALL, **options})).eval()


def small_v2(**options):
    return fill(ViTAEv2(num_classes=5, **{**V2, **options})).eval()


MODELS = {
    "performer": small,
    "performer in all stages": lambda: small(RC_tokens_type="performer"),
    "sum": lambda: small(RC_op="sum", token_dims=[16, 16, 16]),
    "dropped": lambda: small(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2, use_checkpoint=True),
    "embedding": lambda: small(**LARGE),
    "sinusoid": lambda: small(sinusoid=True),
    "v2": small_v2,
    "v2 all tokens": lambda: small_v2(RC_tokens_type="transformer", NC_tokens_type="transformer"),
    "v2 convolutions": lambda: small_v2(
        RC_tokens_type="performer_less", token_dims=[32, 24, 16, 16], use_checkpoint=True
    ),
    "v2 positions": lambda: small_v2(relative_pos=True, window_size=5),
    "v2 maps": lambda: small_v2(out_indices=(0, 1, 2, 3), pad_input=True),
}
ALL_MODELS = pytest.mark.parametrize("name", MODELS)


@ALL_MODELS
def test_every_parameter_learns_and_checkpointing_changes_nothing(name):
    model = MODELS[name]()
    plain = gradients_of(model, image())
    model.set_grad_checkpointing()
    close(gradients_of(model, image()), plain)
    still = {key for key, gradient in plain.items() if gradient.abs().sum() == 0}
    # The last convolutions change the tokens beside the class token, which nothing reads any more.
    assert all(key.startswith("layers.2.NC.1.PCM") for key in still) and (name == "sinusoid" or not still)


@ALL_MODELS
def test_bfloat16_autocast_trains(name):
    model = MODELS[name]().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(image()))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())


@ALL_MODELS
def test_export(name):
    model = MODELS[name]()
    exported = torch.export.export(model, (image(),)).module()
    close(exported(image()), model(image()))


@pytest.mark.slow
@ALL_MODELS
def test_compiles_whole(name):
    """Forward and backward compile as one graph; inductor is left out, because it takes minutes."""
    model = MODELS[name]().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled(image())).backward()
    assert all(p.grad is not None for p in trained(model).values())


COUNTS = [
    ("vitae_tiny", 4_886_888),
    ("vitae_6m", 6_614_120),
    ("vitae_13m", 10_834_728),
    ("vitae_small", 24_032_136),
    ("vitae_base", 89_341_672),
    ("vitae_large", 311_724_008),
    ("vitae_huge", 644_528_360),
    ("vitaev2_s", 19_355_688),
    ("vitaev2_48m", 48_674_632),
    ("vitaev2_b", 89_693_352),
]


@pytest.mark.parametrize("name, count", COUNTS)
def test_parameters_to_the_unit_and_a_pass_on_meta_tensors(name, count):
    with torch.device("meta"):
        model = vitkern.create_model(name).eval()
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert count_parameters(model) == count


def test_every_name_is_counted():
    assert {name for name, _ in COUNTS} == set(vitkern.list_models("vitae*"))


def test_random_features_are_frozen_and_orthogonal():
    performer = small().layers[0].RC.attn
    assert not performer.w.requires_grad and not ViTAE(**SMALL).layers[0].RC.attn.w.requires_grad
    rows = ViTAE(**SMALL).layers[0].RC.attn.w
    close(rows @ rows.T, 8 * torch.eye(8))


def test_performer_is_attention_with_its_own_weights():
    performer = fill(TokenPerformer(12, 8)).eval()
    x, zeros = seeded("x", (2, 9, 12)), torch.zeros(2, 9, 8)
    value = performer.kqv(performer.norm1(x)).chunk(3, -1)[2]
    weights = performer.attention_weights(x, zeros, 3, 3)[:, 0]
    close(weights.sum(-1), torch.ones(2, 9), 1e-3)  # but for the 1e-8 that keep the quotient finite
    mixed = value + performer.proj(weights @ value)
    close(performer(x, zeros, 3, 3), mixed + performer.mlp(performer.norm2(mixed)))


@pytest.mark.parametrize("kind", ["all tokens", "windows"])
def test_attention_weights_are_those_of_attention(kind):
    x, sizes = seeded("x", (2, 12, 8)), (8, 8, 2)
    if kind == "all tokens":
        attention = fill(Attention(*sizes))
        weights, values = attention.attention_weights(x, 3, 4), attention.qkv(x).chunk(3, -1)[2]
    else:
        attention = fill(WindowAttention(*sizes, window_size=4, relative_pos=True))
        weights = attention.attention_weights(x, 3, 4)
        values = attention.qkv(attention.windows(x, 3, 4)[0]).chunk(3, -1)[2]
    mixed = weights @ values.unflatten(-1, (2, 4)).transpose(1, 2)
    expected = attention.proj(mixed.transpose(1, 2).flatten(2))
    close(attention(x, 3, 4), expected[:, :12])


def test_windows_are_padded_to_all_sides():
    attention = WindowAttention(1, 1, 1, window_size=4)
    assert attention.padding(3, 6) == (1, 1, 0, 1)
    windows, rows, columns = attention.windows(torch.arange(1.0, 19).view(1, 18, 1), 3, 6)
    assert (rows, columns) == (4, 8)
    assert windows[0, :, 0].tolist() == [0, 1, 2, 3, 0, 7, 8, 9, 0, 13, 14, 15, 0, 0, 0, 0]


def test_maps_of_images_of_any_shape_and_what_feature_info_says_of_them():
    model = small_v2(out_indices=(1, 3))
    maps, info = model(image(96, 160)), model.feature_info
    assert [list(m.shape) for m in maps] == [
        [2, c, 96 // r, 160 // r] for c, r in zip(info.channels(), info.reduction())
    ]
    assert info == [
        {"num_chs": 16, "reduction": 8, "module": "layers.1"},
        {"num_chs": 32, "reduction": 32, "module": "layers.3"},
    ]
    assert not any(key.startswith("head.") or "index" in key for key in model.state_dict())
    padded = small_v2(out_indices=(1, 3), pad_input=True)
    close(padded(image(96, 160)), maps)
    assert [list(m.shape[2:]) for m in padded(image(90, 150))] == [[12, 19], [3, 5]]


def test_features_only_turns_a_classifier_into_a_pyramid():
    with torch.device("meta"):
        model = vitkern.create_model("vitaev2_s", features_only=True)
        assert [m.shape[1] for m in model(torch.empty(1, 3, 64, 96))] == model.feature_info.channels()
        with pytest.raises(ValueError, match="vitae_tiny returns no feature maps; beit_adapter_base, .* do"):
            vitkern.create_model("vitae_tiny", features_only=True, out_indices=(1,))


def test_weights_of_a_classifier_in_a_pyramid():
    classifier, pyramid = small_v2(), ViTAEv2(out_indices=(3,), **V2).eval()
    loaded = load_checkpoint(pyramid, {"state_dict": classifier.state_dict()})
    assert loaded == ([], ["head.weight", "head.bias"])
    close(classifier.head(pyramid(image())[0].mean((2, 3))), classifier(image()))


def test_positions_of_another_image_size():
    model, larger = small(**LARGE), ViTAE(num_classes=5, **{**LARGE, "img_size": 96})
    assert load_checkpoint(larger, model.state_dict()) == ([], [])
    assert larger.layers[0].RC.pos_embed.shape == (1, 37, 16)
    assert larger(image(96, 96)).shape == (2, 5)


def test_no_classes_gives_the_features():
    for kind, options in ((ViTAE, SMALL), (ViTAEv2, V2)):
        model = kind(num_classes=0, **options).eval()
        assert model(image()).shape == (2, 32) and "head.weight" not in model.state_dict()


@pytest.mark.parametrize("name", ["performer", "embedding", "sinusoid", "v2"])
def test_a_classifier_of_other_classes(name):
    model = MODELS[name]().bfloat16()
    model.reset_classifier(7)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert model(image().bfloat16()).shape == (2, 7)
    published = MODELS[name]().state_dict()
    with pytest.warns(UserWarning, match="other classes than the 7 of ViTAE"):
        assert set(load_checkpoint(model, published).missing) == {"head.weight", "head.bias"}
    model.reset_classifier(0)
    assert model(image().bfloat16()).shape == (2, model.num_features)


def test_image_sizes_may_be_pairs():
    assert small(**{**LARGE, "img_size": (64, 64)})(image()).shape == (2, 5)
    assert small_v2(img_size=(64, 96))(image(64, 96)).shape == (2, 5)


def test_other_than_three_channels():
    assert small(in_chans=5)(torch.randn(1, 5, 64, 64)).shape == (1, 5)
    assert small_v2(in_chans=1)(torch.randn(1, 1, 32, 32)).shape == (1, 5)


def test_class_token_and_positions_of_the_paper():
    model = small(sinusoid=True)
    assert {"layers.2.RC.cls_token", "fc_norm.weight"} <= set(model.state_dict())
    assert model.no_weight_decay() == {"layers.2.RC.cls_token"}
    tokens, *_ = model.layers[2].RC(seeded("x", (1, 16, 8, 8)))
    assert tokens.shape == (1, 17, 32)
    close(tokens[0, 0], model.layers[2].RC.cls_token[0, 0] + sinusoid_positions(17, 32)[0, 0])
    # A formula of its own: sin(p / 10000^(2i / D)) and its cosine take turns.
    assert sinusoid_positions(3, 4)[0, 2].tolist() == pytest.approx(
        [0.909297, -0.416147, 0.019999, 0.9998], abs=1e-6
    )


def test_stochastic_depth_of_each_stage_starts_where_the_released_code_says():
    model = ViTAEv2(drop_path_rate=0.3, **{**V2, "NC_depth": [2, 1, 2, 2]})
    rates = [[cell.drop_path.p for cell in stage.NC] for stage in model.layers]
    assert rates == [pytest.approx(stage) for stage in ([0, 0.05], [0.1], [0.05, 0.1], [0.1, 0.15])]


def test_mean_attention_distance_of_uniform_attention():
    """With zero queries the attention is uniform, so the result is the mean distance of two tokens."""
    model = small(**LARGE)
    for cell in model.layers[2].NC:
        nn.init.zeros_(cell.attn.qkv.weight)
    places = [complex(16 * i, 16 * j) for i in range(4) for j in range(4)]
    expected = sum(abs(a - b) for a in places for b in places) / 256
    for distances in mean_attention_distances(model, image()).values():
        assert distances.tolist() == pytest.approx([expected] * 2)


def test_mean_attention_distance_of_padded_windows():
    """One token in a window of 7 x 7 attends only to itself, so its distance is 0."""
    distances = mean_attention_distances(
        small_v2(RC_tokens_type="window", NC_tokens_type="window"), image(32, 32)
    )
    assert distances["layers.3.NC.0.attn"].tolist() == [0, 0]
    assert all(d.isfinite().all() for d in distances.values()) and len(distances) == 8


def test_grad_cam_finds_what_the_head_reads():
    """If the head reads one channel, the picture is that channel's positive part."""
    model = small_v2()
    nn.init.zeros_(model.head.weight)
    model.head.weight.data[1, 3] = 1
    cam = grad_cam(model, image(64, 96), torch.tensor([1, 1]))
    outputs = model.stage_outputs(image(64, 96))[-1][0][:, :, 3].relu().unflatten(1, (1, 2, 3))
    expected = nn.functional.interpolate(outputs, (64, 96), mode="bilinear", align_corners=False)[:, 0]
    close(cam, expected / expected.amax((1, 2), keepdim=True))


def test_grad_cam_of_a_class_token():
    model = small(sinusoid=True)
    assert grad_cam(model, image(), layer=model.layers[2].NC[-1].norm1).shape == (2, 64, 64)
    with pytest.raises(ValueError, match="give an earlier layer"):
        grad_cam(model, image())
    with pytest.raises(
        ValueError, match="Linear has no stages of which the last could be taken: give a layer"
    ):
        grad_cam(nn.Linear(2, 2), image())


@pytest.mark.parametrize(
    "message, make",
    [
        ("images must be square, got 64 x 96; ViTAEv2", lambda: small()(image(64, 96))),
        ("multiples of 16, got 72 x 72", lambda: small()(image(72, 72))),
        ("multiples of 32, got 48 x 64; pad_input=True", lambda: small_v2()(image(48, 64))),
        (r"\[B, 3, H, W\], got \[1, 4, 64, 64\]", lambda: small()(torch.zeros(1, 4, 64, 64))),
        ("those of 64 x 64, got an image of 96 x 96", lambda: small(**LARGE)(image(96, 96))),
        ("NC_depth must be one value or one for each of the 3 stages, got 2", lambda: small(NC_depth=[1, 2])),
        ("NC_depth must be .* each of the 3 stages, got 4", lambda: small(NC_depth=[1, 2, 1, 2])),
        ("RC_tokens_type must be one of", lambda: small(RC_tokens_type="pooling")),
        ("NC_tokens_type must be one of", lambda: small_v2(NC_tokens_type="performer")),
        ("RC_op must be 'cat' or 'sum'", lambda: small(RC_op="mean")),
        ("RC_heads must be 1", lambda: small(RC_heads=2)),
        ("some of the maps 0 to 3, got", lambda: small_v2(out_indices=(0, 4))),
        ("divisible by num_heads", lambda: small_v2(NC_heads=3)),
        (
            r"layers.2.NC.0.norm1.weight is \[7\] in the checkpoint",
            lambda: load_checkpoint(small(), {"layers.2.NC.0.norm1.weight": torch.ones(7)}),
        ),
        (r"img_size must be square, got \(64, 96\)", lambda: small(img_size=(64, 96))),
        ("no classifier to reset", lambda: small_v2(out_indices=(1,)).reset_classifier(3)),
        ("token_dims of a performer_less cell must be 32", lambda: small(token_dims=[16, 16, 48])),
        ("sinusoid=True needs a reduction cell without a class token", lambda: small(**LARGE, sinusoid=True)),
    ],
)
def test_what_it_refuses(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_list_of_dilations_is_that_of_all_stages():
    one, each = (small(dilations=dilations).state_dict() for dilations in ([1, 2], [[1, 2]] * 3))
    assert {key: t.shape for key, t in one.items()} == {key: t.shape for key, t in each.items()}


def test_an_unknown_option():
    with pytest.raises(TypeError, match="mlp_ration"):
        ViTAE(mlp_ration=3)
