# SPDX-License-Identifier: Apache-2.0
"""Loading published weights, tested on artificial state dicts with the published keys; and models by name."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitkern
from tests.parity.weights import seeded, weight
from vitkern.models import (
    AdaptFormerVideo,
    BEiTAdapter,
    UniPerceiverAdapter,
    ViTAdapter,
    load_checkpoint,
    save_checkpoint,
)
from vitkern.models.checkpoints import resize_pos_embed
from vitkern.models.relative_positions import resize_table, spline_matrix
from vitkern.models.table import count_macs, count_parameters

SMALL = dict(embed_dim=48, depth=4, num_heads=3, conv_inplane=8)
D = 48


def vit_dict(grid=14, patch=16, tokens=1):
    """The state dict of a timm ViT; DeiT, MAE and DINOv2 have the same keys."""
    shapes = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, tokens + grid * grid, D),
        "patch_embed.proj.weight": (D, 3, patch, patch),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "head.weight": (10, D),
    }
    for block in range(4):
        shapes |= {f"blocks.{block}.norm{n}.{kind}": (D,) for n in (1, 2) for kind in ("weight", "bias")}
        linear = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    return {key: weight(key, torch.empty(shape)) for key, shape in shapes.items()}


def test_deit_gives_the_transformer_and_nothing_else():
    model, published = ViTAdapter(**SMALL), vit_dict()
    loaded = load_checkpoint(model, {"model": published})
    assert set(loaded.unexpected) == {"cls_token", "norm.weight", "head.weight"}
    assert all(
        key.startswith(("level_", "spm.", "interactions.", "up.", "norm")) or "gamma" in key
        for key in loaded.missing
    )
    assert torch.equal(model.blocks[3].mlp.fc2.weight, published["blocks.3.mlp.fc2.weight"])
    assert torch.equal(model.pos_embed, published["pos_embed"])


@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_position_embeddings_of_another_size_and_with_other_tokens_before_them(tokens):
    model, published = ViTAdapter(img_size=64, pretrain_size=64, **SMALL), vit_dict(tokens=tokens)
    load_checkpoint(model, published)
    grid = published["pos_embed"][:, tokens:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = (
        F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(model.pos_embed[:, 1:].detach(), expected)
    first = published["pos_embed"][:, 0] if tokens else torch.zeros(1, D)
    assert torch.equal(model.pos_embed[:, 0], first)


def test_position_embeddings_of_a_grid_that_is_not_square():
    model, published = ViTAdapter(img_size=(64, 96), pretrain_size=(64, 96), **SMALL), vit_dict()
    load_checkpoint(model, published)
    grid = published["pos_embed"][:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:].detach(), expected.flatten(2).transpose(1, 2))


def test_position_embeddings_that_were_trained_on_a_grid_that_is_not_square():
    """A grid that is not square is refused: its first positions would be taken for those of tokens before it."""
    trained = ViTAdapter(img_size=(64, 112), pretrain_size=(64, 112), **SMALL).state_dict()
    trained["pos_embed"] = seeded("positions", (1, 1 + 4 * 7, D))
    model = ViTAdapter(img_size=64, pretrain_size=64, **SMALL)
    with pytest.raises(
        ValueError, match=r"29 position embeddings do not form a grid of 5 x 5 .*old=\(rows, columns\)"
    ):
        load_checkpoint(model, trained)
    positions = resize_pos_embed(trained["pos_embed"], 1 + 4 * 4, (4, 4), old=(4, 7))
    grid = trained["pos_embed"][:, 1:].unflatten(1, (4, 7)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(positions[:, 1:], expected.flatten(2).transpose(1, 2))
    load_checkpoint(model, trained | {"pos_embed": positions})
    assert torch.equal(model.pos_embed, positions)


def test_positions_of_uniperceiver_for_another_image():
    published, model = UniPerceiverAdapter(**SMALL).state_dict(), UniPerceiverAdapter(img_size=64, **SMALL)
    assert load_checkpoint(model, published, strict=True) == ([], [])
    key = "visual_embed.patch_embed.spatial_pos_embed.weight"
    grid = published[key].T.unflatten(1, (14, 14))[None]
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.state_dict()[key], expected[0].flatten(1).T)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.backbone."]
)
def test_names_that_trainers_and_compilers_put_before_keys(prefix):
    published = ViTAdapter(**SMALL).state_dict()
    named = {prefix + key: tensor for key, tensor in published.items()}
    assert load_checkpoint(ViTAdapter(**SMALL), named, strict=True) == ([], [])


def test_dinov2_patches_of_14_become_16_and_its_layer_scale_gamma():
    model = ViTAdapter(img_size=592, pretrain_size=592, **SMALL)
    published = vit_dict(grid=37, patch=14)
    published |= {f"blocks.{b}.ls{n}.gamma": torch.full((D,), n + b / 8) for b in range(4) for n in (1, 2)}
    published["mask_token"] = torch.zeros(1, D)
    loaded = load_checkpoint(model, published)
    assert not any("gamma1" in key or "gamma2" in key for key in loaded.missing)
    assert model.blocks[2].gamma2[0] == 2.25
    expected = F.interpolate(
        published["patch_embed.proj.weight"], size=(16, 16), mode="bilinear", align_corners=False
    )
    assert torch.equal(model.patch_embed.proj.weight, expected)
    assert torch.equal(model.pos_embed, published["pos_embed"])


@pytest.mark.parametrize("names", [(1, 3, 0, 2), (0, 0, 0, 1)], ids=["AugReg", "later"])
def test_augreg_npz(names, tmp_path):
    """The layout of flax: kernels [in, out], separate axes for heads, convolutions [height, width, in, out]."""
    published, (attention, mlp, *norms) = vit_dict(), names
    arrays = {
        "embedding/kernel": published["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": published["patch_embed.proj.bias"],
        "cls": published["cls_token"],
        "Transformer/posembed_input/pos_embedding": published["pos_embed"],
        "Transformer/encoder_norm/scale": published["norm.weight"],
        "Transformer/encoder_norm/bias": published["norm.weight"],
    }
    for b in range(4):
        own = {
            key.removeprefix(f"blocks.{b}."): v
            for key, v in published.items()
            if key.startswith(f"blocks.{b}.")
        }
        prefix = f"Transformer/encoderblock_{b}/"
        heads = f"{prefix}MultiHeadDotProductAttention_{attention}/"
        for place, name in enumerate(("query", "key", "value")):
            arrays[heads + name + "/kernel"] = own["attn.qkv.weight"].chunk(3)[place].T.reshape(D, 3, 16)
            arrays[heads + name + "/bias"] = own["attn.qkv.bias"].chunk(3)[place].reshape(3, 16)
        arrays[heads + "out/kernel"] = own["attn.proj.weight"].T.reshape(3, 16, D)
        arrays[heads + "out/bias"] = own["attn.proj.bias"]
        for place in (0, 1):
            arrays[f"{prefix}LayerNorm_{norms[place]}/scale"] = own[f"norm{place + 1}.weight"]
            arrays[f"{prefix}LayerNorm_{norms[place]}/bias"] = own[f"norm{place + 1}.bias"]
            arrays[f"{prefix}MlpBlock_{mlp}/Dense_{place}/kernel"] = own[f"mlp.fc{place + 1}.weight"].T
            arrays[f"{prefix}MlpBlock_{mlp}/Dense_{place}/bias"] = own[f"mlp.fc{place + 1}.bias"]
    np.savez(tmp_path / "augreg.npz", **{name: array.numpy() for name, array in arrays.items()})
    model = ViTAdapter(pretrained=str(tmp_path / "augreg.npz"), **SMALL)
    own = model.state_dict()
    for key in published.keys() & own.keys():
        assert torch.equal(own[key], published[key]), key
    assert len(published.keys() & own.keys()) == len(published) - 3


@pytest.mark.parametrize("variant, rows", [("segmentation", 7 * 7 + 3), ("detection", 9 * 9)])
def test_beit_shared_table_for_every_block_resized_with_or_without_the_class_token(variant, rows):
    window = {} if variant == "segmentation" else dict(window_attn=True, window_size=5)
    model = BEiTAdapter(variant=variant, img_size=64, qkv_bias=True, **window, **SMALL)
    table = seeded("table", (27 * 27 + 3, 3))
    published = {
        "rel_pos_bias.relative_position_bias_table": table,
        "blocks.1.attn.q_bias": seeded("q", (D,)),
    }
    published["blocks.0.attn.relative_position_index"] = torch.zeros(197, 197).long()
    load_checkpoint(model, {"module": published})
    for block in model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, resize_table(table, rows))
    assert torch.equal(model.blocks[1].attn.q_bias, published["blocks.1.attn.q_bias"])
    if variant == "segmentation":
        assert torch.equal(block.attn.relative_position_bias_table[-3:], table[-3:])


def test_resized_tables_keep_the_centre_and_a_table_of_the_same_window():
    table = seeded("table", (27 * 27 + 3, 2))
    assert torch.equal(resize_table(table, 27 * 27 + 3), table)
    assert torch.equal(resize_table(table, 27 * 27), table[:-3])
    larger = resize_table(table, 79 * 79 + 3)[:-3].view(79, 79, 2)
    torch.testing.assert_close(larger[39, 39], table[:-3].view(27, 27, 2)[13, 13])


@pytest.mark.parametrize(
    "rows, message",
    [
        (9, "9 relative positions is too small"),
        (1, "1 relative positions is too small"),
        (2, "no square window"),
    ],
)
def test_tables_that_cannot_be_resized(rows, message):
    with pytest.raises(ValueError, match=message):
        resize_table(torch.zeros(rows, 3), 49)


def test_splines_are_those_of_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    knots = torch.tensor([-9.0, -4, -1.5, 0, 1.5, 4, 9], dtype=torch.float64)
    at = torch.linspace(-9, 9, 31, dtype=torch.float64)
    values = seeded("values", (7,)).double()
    expected = interpolate.CubicSpline(knots, values, bc_type="not-a-knot")(at)
    torch.testing.assert_close(spline_matrix(knots, at) @ values, torch.from_numpy(expected))


def test_splines_reproduce_cubics_and_stay_level_outside():
    knots = torch.tensor([-3.0, -1, 0, 2, 3], dtype=torch.float64)
    at = torch.tensor([-2.5, -0.5, 1.0, 2.9], dtype=torch.float64)
    matrix = spline_matrix(knots, at)
    torch.testing.assert_close(matrix @ knots**3, at**3)
    outside = spline_matrix(knots, torch.tensor([-7.0, 5], dtype=torch.float64))
    torch.testing.assert_close(outside @ knots, torch.tensor([-3.0, 3], dtype=torch.float64))


def test_uniperceiver_under_its_own_names():
    model = UniPerceiverAdapter(**SMALL)
    published = {
        "fused_encoder.layers.2.self_attn.in_proj_weight": seeded("a", (3 * D, D)),
        "video_embed.embeddings.weight": seeded("b", (D, 3, 16, 16)),
        "video_embed.embeddings_st_pos.spatial_pos_embed.weight": seeded("c", (196, D)),
    }
    loaded = load_checkpoint(model, {"model": published})
    assert loaded.unexpected == []
    projection, _, positions = published.values()
    assert torch.equal(model.layers[2].self_attn.in_proj.weight, projection)
    assert torch.equal(model.visual_embed.patch_embed.spatial_pos_embed.weight, positions)


@pytest.mark.parametrize("file", ["model.pth", "model.safetensors"])
def test_a_whole_segmentor_and_back(file, tmp_path):
    if file.endswith("safetensors"):
        pytest.importorskip("safetensors")
    model, path = ViTAdapter(**SMALL), tmp_path / file
    segmentor = nn.ModuleDict({"backbone": model, "decode_head": nn.Linear(D, 3)})
    save_checkpoint(segmentor, path)
    other = ViTAdapter(init_cfg=dict(type="Pretrained", checkpoint=str(path)), **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
    assert load_checkpoint(other, path, strict=True) == ([], [])


@pytest.mark.parametrize(
    "message, checkpoint",
    [
        (
            r"blocks.0.norm1.weight is \[7\] in the checkpoint and \[48\]",
            {"blocks.0.norm1.weight": torch.ones(7)},
        ),
        (
            r"no tensor for ViTAdapter; its keys begin with \['conv1.weight'\]",
            {"conv1.weight": torch.ones(7)},
        ),
        ("a dict of tensors, got list", []),
        (
            "names of AugReg, but lacks 'embedding/kernel'",
            {"Transformer/encoder_norm/scale": torch.ones(D)},
        ),
        ("lacks", {"pos_embed": torch.zeros(1, 197, D)}),
    ],
)
def test_what_it_refuses(message, checkpoint):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(ViTAdapter(**SMALL), checkpoint, strict=True)


def test_files_that_are_missing_or_hold_more_than_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ViTAdapter(pretrained=str(tmp_path / "none.pth"), **SMALL)
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="weights_only=False"):
        load_checkpoint(ViTAdapter(**SMALL), tmp_path / "code.pth")
    with pytest.raises(ValueError, match="init_cfg must be"):
        ViTAdapter(init_cfg=dict(type="Pretrained"), **SMALL)
    with pytest.raises(ValueError, match="init_cfg must be"):
        ViTAdapter(init_cfg=[dict(type="Pretrained", checkpoint="file.pth")], **SMALL)


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("not yours")

    torch.save({}, tmp_path / "file.pth")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        load_checkpoint(ViTAdapter(**SMALL), tmp_path / "file.pth")


@pytest.mark.parametrize("shape", [(48, 3, 2, 8, 8), (48, 3, 16, 16)], ids=["patches of 8", "of images"])
def test_patches_of_videos_are_not_resized(shape):
    model = AdaptFormerVideo(img_size=32, all_frames=4, embed_dim=D, depth=1, num_heads=3)
    with pytest.raises(
        ValueError, match=r"patch_embed.proj.weight is \[48, 3, .* and \[48, 3, 2, 16, 16\] in Adapt"
    ):
        load_checkpoint(model, {"patch_embed.proj.weight": torch.zeros(shape)})


def test_files_that_are_no_checkpoints_or_cut_off(tmp_path):
    torch.save(vit_dict(), tmp_path / "whole.pth")
    half = (tmp_path / "whole.pth").read_bytes()[:4000]
    broken = {"half.pth": half, "empty.pth": b"", "page.pth": b"<html>404</html>", "broken.npz": b"1234"}
    for name, contents in broken.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint, or is truncated"):
            load_checkpoint(ViTAdapter(**SMALL), tmp_path / name)


COUNTS = [
    ("vit_adapter_tiny", {}, 7_966_640),
    ("vit_adapter_small", {}, 27_503_888),
    ("vit_adapter_base", {}, 99_495_392),
    ("vit_adapter_base", dict(img_size=384), 99_787_232),
    ("vit_adapter_large", {}, 326_584_512),
    ("vit_adapter_large", dict(img_size=384), 326_973_632),
    ("beit_adapter_base", {}, 99_907_616),
    ("beit_adapter_large", dict(img_size=640), 328_756_928),
    ("beit_adapter_large", dict(variant="detection"), 327_380_032),
    ("uniperceiver_adapter_base", {}, 99_502_304),
    ("uniperceiver_adapter_large", {}, 326_593_728),
]


@pytest.mark.parametrize("name, options, count", COUNTS, ids=lambda value: str(value))
def test_parameters_to_the_unit(name, options, count):
    with torch.device("meta"):
        assert count_parameters(vitkern.create_model(name, **options)) == count


def test_every_name_is_counted_and_operations_are_those_of_the_official_model():
    assert {name for name, *_ in COUNTS} == set(vitkern.list_models("*_adapter_*"))
    with torch.device("meta"):
        model = vitkern.create_model("vit_adapter_tiny").eval()
        macs = count_macs(model, torch.empty(1, 3, 512, 512))
    sampling = 4 * 192 * 4 * (4 * 1024 * 3 + 6 * 21 * 256)  # corners, channels, points, queries and levels
    assert (macs - sampling) / 1e9 == pytest.approx(20.7, abs=0.05)


@pytest.mark.parametrize("name", ["vit_adapter_tiny", "beit_adapter_base", "uniperceiver_adapter_base"])
def test_windows_of_the_form_for_detection_follow_the_depth(name):
    with torch.device("meta"):
        model = vitkern.create_model(name, variant="detection", depth=8)
    assert len(model.trunk) == 8


def test_an_unknown_name():
    with pytest.raises(
        ValueError, match="no model named 'vit_adaptor_tiny'; close to it are vit_adapter_tiny"
    ):
        vitkern.create_model("vit_adaptor_tiny")


def test_features_only_is_what_a_pyramid_does_anyway():
    with torch.device("meta"):
        model = vitkern.create_model(
            "vit_adapter_tiny", features_only=True, out_indices=(2, 3), num_classes=0
        )
        assert [m.shape[1] for m in model(torch.empty(1, 3, 64, 64))] == model.feature_info.channels()
    assert model.feature_info.reduction() == [16, 32]
