# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer's options on small models: their effects, the trained parameters, and the refused values."""

from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitkern
from tests.helpers import close, gradients_of
from tests.parity.weights import fill, seeded, weight
from vitkern.models import (
    AdaptFormer,
    AdaptFormerSwin,
    AdaptFormerVideo,
    adapter_state_dict,
    freeze_backbone,
    load_adapter_state_dict,
    load_checkpoint,
)
from vitkern.models.swin import shifted_mask
from vitkern.models.table import count_parameters
from vitkern.nn import AdapterBottleneck

ADAPT = dict(ffn_num=8)
PROMPTS = dict(ffn_adapt=False, vpt_on=True, vpt_num=3)
VIT = dict(patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def image_model(tuning=ADAPT, **options):
    return AdaptFormer(tuning_config=tuning, **{"img_size": 32, **VIT, **options})


def video_model(tuning=ADAPT, **options):
    own = dict(img_size=32, all_frames=4, qkv_bias=True, init_scale=1.0)
    return AdaptFormerVideo(tuning_config=tuning, **{**own, **VIT, **options})


def swin_model(tuning=ADAPT, **options):
    own = dict(img_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=7, num_classes=5)
    return AdaptFormerSwin(tuning_config=tuning, **{**own, **options})


KINDS = {"image": image_model, "video": video_model, "swin": swin_model}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
MODELS = {
    **KINDS,
    "swin-sequential": lambda: swin_model(dict(ffn_option="sequential"), ape=True, use_checkpoint=True),
    "dropped": lambda: image_model(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2),
    "sequential": lambda: image_model(dict(ffn_num=8, ffn_option="sequential")),
    "norm-in": lambda: image_model(dict(ffn_num=8, ffn_adapter_layernorm_option="in")),
    "norm-out": lambda: image_model(dict(ffn_num=8, ffn_adapter_layernorm_option="out")),
    "learnable-scale": lambda: image_model(dict(ffn_num=8, ffn_adapter_scalar="learnable_scalar")),
    "some-layers": lambda: image_model(dict(ffn_num=8, ffn_layers=[1])),
    "global-pool": lambda: image_model(global_pool=True),
    "prompts": lambda: image_model(PROMPTS),
    "video-prompts": lambda: video_model(PROMPTS),
    "linear-probe": lambda: image_model(None, head_norm=True),
    "plain": lambda: image_model(None),
}
ALL_MODELS = pytest.mark.parametrize("name", MODELS)


def inputs(model, batch=2):
    return seeded("input", (batch, *getattr(model, "input_shape", (3, *model.patch_embed.img_size))))


def test_a_configuration_is_a_dict_a_namespace_or_any_object():
    config = dict(ADAPT, ffn_adapt=True, ffn_option="parallel", d_model=48, vpt_on=False, vpt_num=1)
    attributes = type("Config", (), dict(config, unrelated=1))
    models = [image_model(form) for form in (config, Namespace(**config), attributes())]
    assert len({tuple(model.state_dict()) for model in models}) == 1


@pytest.mark.parametrize("option", ["parallel", "sequential"])
@pytest.mark.parametrize("layer_norm", ["none", "in", "out"])
@pytest.mark.parametrize("scalar", ["0.1", 2.0, "learnable_scalar"])
@ALL_KINDS
@torch.no_grad()
def test_a_new_adapter_changes_no_bit(kind, option, layer_norm, scalar):
    plain = KINDS[kind](None).eval()
    tuning = dict(
        ffn_num=8, ffn_option=option, ffn_adapter_layernorm_option=layer_norm, ffn_adapter_scalar=scalar
    )
    adapted = KINDS[kind](tuning).eval()
    loaded = load_checkpoint(adapted, plain.state_dict())
    assert loaded.unexpected == [] and all(".adaptmlp." in key for key in loaded.missing)
    assert torch.equal(adapted(inputs(plain)), plain(inputs(plain)))


@ALL_KINDS
def test_training_changes_adapters_and_classifier_and_nothing_else(kind):
    model = freeze_backbone(KINDS[kind]())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for _ in range(3):
        F.cross_entropy(model.train()(inputs(model)), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    tuned = {key for key in before if ".adaptmlp." in key or key.startswith(("head.", "fc_norm."))}
    assert changed == tuned == set(adapter_state_dict(model))


@ALL_KINDS
def test_tuned_weights_alone_make_another_copy_of_the_backbone_the_same_model(kind):
    backbone = fill(KINDS[kind](None)).state_dict()
    tuned, other = KINDS[kind](), KINDS[kind]()
    for model in (tuned, other):
        load_checkpoint(model, backbone)
    for key, tensor in adapter_state_dict(tuned).items():
        tensor.copy_(weight(key, tensor))
    load_adapter_state_dict(other, adapter_state_dict(tuned))
    x = inputs(tuned)
    assert torch.equal(other.eval()(x), tuned.eval()(x))
    with pytest.raises(ValueError, match="it needs the same adapters first"):
        load_adapter_state_dict(KINDS[kind](None), adapter_state_dict(tuned))
    with pytest.raises(ValueError, match="which is not among what is loaded"):
        load_adapter_state_dict(other, {})


@ALL_MODELS
def test_every_parameter_learns_and_checkpointing_changes_nothing(name):
    model = fill(MODELS[name]()).eval()
    plain = gradients_of(model, inputs(model))
    model.set_grad_checkpointing()
    close(gradients_of(model, inputs(model)), plain)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


def test_chosen_layers_and_where_the_adapter_reads():
    model = image_model(dict(ffn_num=8, ffn_layers=[1]))
    assert model.blocks[0].adaptmlp is None and isinstance(model.blocks[1].adaptmlp, AdapterBottleneck)
    block, x = fill(model).eval().blocks[1], seeded("x", (1, 3, 48))
    middle = x + block.attn(block.norm1(x))
    beside = block.fc2(F.gelu(block.fc1(block.norm2(middle))))
    torch.testing.assert_close(block(x), middle + beside + block.adaptmlp(middle, add_residual=False))


def test_initial_weights_of_the_video_model():
    paper, release = video_model(), video_model(official_init=True)
    assert (paper.blocks[0].adaptmlp.up_proj.weight == 0).all()
    assert release.blocks[0].adaptmlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert (video_model(init_scale=0.0).head.weight == 0).all()
    assert "pos_embed" not in paper.state_dict()


def test_norms_and_dropout_are_the_official_ones():
    model = image_model(dict(ffn_num=8, ffn_adapter_layernorm_option="in"))
    assert model.norm.eps == model.blocks[0].norm1.eps == video_model().fc_norm.eps == 1e-6
    assert model.blocks[0].adaptmlp.adapter_layer_norm_before.eps == 1e-5
    assert model.blocks[0].adaptmlp.dropout == 0.1 and video_model().blocks[0].adaptmlp.dropout == 0.0
    assert image_model(norm_layer=nn.LayerNorm).norm.eps == 1e-5


def test_the_linear_probe_of_the_official_runs():
    model = freeze_backbone(image_model(None, head_norm=True))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "head.1.weight",
        "head.1.bias",
    }
    assert {"head.0.running_mean", "head.1.weight"} < set(adapter_state_dict(model))


def test_other_channels_no_classifier_and_another_one():
    model = image_model(in_chans=1, num_classes=0)
    assert (
        model(torch.zeros(2, 1, 32, 32)).shape
        == (2, 48)
        == model.forward_features(torch.zeros(2, 1, 32, 32)).shape
    )
    model.reset_classifier(7)
    assert model.get_classifier().out_features == 7 and model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert swin_model(in_chans=4, num_classes=0)(torch.zeros(1, 4, 64, 64)).shape == (1, 48)
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}


def encoder(prefix="", qkv_bias=True):
    """A checkpoint with the keys of MAE, VideoMAE or timm, for a transformer like those above."""
    shapes = {"norm.weight": (48,), "norm.bias": (48,)}
    for block in ("blocks.0.", "blocks.1."):
        linear = {"attn.qkv": (144, 48), "attn.proj": (48, 48), "mlp.fc1": (192, 48), "mlp.fc2": (48, 192)}
        shapes |= {f"{block}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{block}{name}.bias": shape[:1] for name, shape in linear.items()}
        shapes |= {f"{block}norm{n}.{kind}": (48,) for n in (1, 2) for kind in ("weight", "bias")}
        if not qkv_bias:
            del shapes[f"{block}attn.qkv.bias"]
            shapes |= {f"{block}attn.q_bias": (48,), f"{block}attn.v_bias": (48,)}
    return {prefix + key: seeded(key, shape) for key, shape in shapes.items()}


def test_mae_splits_and_the_official_rule_trains_what_it_lacks():
    model = image_model(global_pool=True)
    published = encoder() | {"cls_token": seeded("c", (1, 1, 48)), "pos_embed": seeded("p", (1, 197, 48))}
    published |= {
        "patch_embed.proj.weight": seeded("w", (48, 3, 16, 16)),
        "patch_embed.proj.bias": seeded("b", (48,)),
    }
    loaded = load_checkpoint(model, {"model": published})
    assert loaded.unexpected == ["norm.weight", "norm.bias"]
    attention = model.blocks[1].attn
    projections = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(projections, published["blocks.1.attn.qkv.weight"])
    assert torch.equal(model.blocks[1].fc1.weight, published["blocks.1.mlp.fc1.weight"])
    freeze_backbone(model, loaded)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(loaded.missing) and "fc_norm.weight" in trained and "pos_embed" not in trained


def test_videomae_with_its_prefix_or_a_bias_of_keys():
    model = video_model()
    published = encoder("encoder.", qkv_bias=False) | {"decoder.head.weight": torch.zeros(3, 3)}
    loaded = load_checkpoint(model, {"model": published})
    assert set(loaded.unexpected) == {"norm.weight", "norm.bias", "decoder.head.weight"}
    assert torch.equal(model.blocks[0].attn.v_bias, published["encoder.blocks.0.attn.v_bias"])
    load_checkpoint(model, encoder())
    assert torch.equal(model.blocks[0].attn.q_bias, encoder()["blocks.0.attn.qkv.bias"][:48])


def test_a_classifier_of_other_classes_stays_out_and_one_with_a_norm_is_found():
    model, other = image_model(), image_model(num_classes=9)
    with pytest.warns(
        UserWarning, match="other classes than the 5 of AdaptFormer: head.weight and head.bias are not loaded"
    ):
        assert set(load_checkpoint(model, other.state_dict()).missing) == {"head.weight", "head.bias"}
    probe = image_model(head_norm=True)
    load_checkpoint(probe, model.state_dict())
    assert torch.equal(probe.head[1].weight, model.head.weight)
    with pytest.raises(ValueError, match="head_norm=True"):
        load_checkpoint(model, probe.state_dict())


def test_swin_checkpoints_of_timm_and_of_another_size():
    model, other = fill(swin_model(None)), swin_model()
    timm = {
        key.replace("layers.0.downsample", "layers.1.downsample").replace("head.", "head.fc."): tensor
        for key, tensor in model.state_dict().items()
        if not key.endswith("relative_position_index")
    }
    loaded = load_checkpoint(other, timm)
    assert loaded.unexpected == [] and all(".adaptmlp." in key for key in loaded.missing)
    x = inputs(model)
    assert torch.equal(other.eval()(x), model.eval()(x))
    microsoft = model.state_dict() | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    assert load_checkpoint(swin_model(None, img_size=112), microsoft, strict=True) == ([], [])


def test_windows_of_a_rolled_map_keep_opposite_sides_apart():
    mask = shifted_mask(4, 4, 2, 1)
    assert mask.shape == (4, 4, 4) and (mask[0] == 0).all()
    assert mask[1].tolist() == [[0, -100] * 2, [-100, 0] * 2] * 2  # right: columns 3 | 0
    assert (mask[3] == 0).sum() == 4  # the corner: each token alone


def test_a_swin_block_is_attention_in_windows():
    """Compares the block with attention over the whole map in which pairs from different windows are masked."""
    block = fill(swin_model(None).layers[0].blocks[1]).eval()  # 16 x 16, padded to 21 x 21, rolled by 3
    x = seeded("x", (1, 256, 24))
    place = torch.arange(21)
    window = (place - 3) % 21 // 7  # of a row or a column, once it is rolled; the last holds both ends
    part = window + 3 * ((place - 3) % 21 >= 18)
    y = F.pad(block.norm1(x).unflatten(1, (16, 16)), (0, 0, 0, 5, 0, 5)).flatten(1, 2)
    part = (7 * part[:, None] + part[None, :]).flatten()
    rolled = (place - 3) % 21 % 7
    within = (7 * rolled[:, None] + rolled[None, :]).flatten()
    table = block.attn.position_bias()[:, within[:, None], within[None, :]]
    bias = table.masked_fill(part[:, None] != part[None, :], float("-inf"))
    query, key, value = block.attn.qkv(y).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, bias[None]).transpose(1, 2).flatten(2)
    expected = block.attn.proj(attended).unflatten(1, (21, 21))[:, :16, :16].flatten(1, 2)
    torch.testing.assert_close(block._attention(block.norm1(x)), expected, atol=1e-5, rtol=1e-5)


COUNTS = [
    ("adaptformer_vit_base", dict(num_classes=100), 1_266_532),
    ("adaptformer_vit_base", dict(num_classes=100, tuning_config=dict(ffn_num=1)), 104_560),
    ("adaptformer_vit_base", dict(num_classes=100, tuning_config=dict(ffn_num=4)), 159_892),
    ("adaptformer_vit_base", dict(num_classes=100, tuning_config=None), 76_900),
    ("adaptformer_vit_base", dict(num_classes=100, tuning_config=dict(vpt_on=True)), 86_116),
    ("adaptformer_video_vit_base", dict(num_classes=174), 1_323_438 + 1_536),
    ("adaptformer_video_vit_base", dict(num_classes=51), 1_228_851 + 1_536),
    ("adaptformer_swin_base", dict(num_classes=0), 1_161_948),
]


@pytest.mark.parametrize("name, options, count", COUNTS, ids=lambda value: str(value))
def test_parameters_that_are_trained_to_the_unit(name, options, count):
    with torch.device("meta"):
        model = freeze_backbone(vitkern.create_model(name, **options))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_parameters_of_whole_models_to_the_unit():
    with torch.device("meta"):
        plain = vitkern.create_model("adaptformer_vit_base", num_classes=100, tuning_config=None)
        swin = vitkern.create_model("adaptformer_swin_base", tuning_config=None)
    assert (count_parameters(plain), count_parameters(swin)) == (85_875_556, 87_768_224)


@pytest.mark.parametrize("name", sorted(vitkern.list_models("adaptformer_*")))
def test_every_name_runs_on_meta_tensors(name):
    with torch.device("meta"):
        model = vitkern.create_model(name, num_classes=7).eval()
        shape = getattr(model, "input_shape", (3, 224, 224))
        assert model(torch.empty(2, *shape)).shape == (2, 7)


@ALL_MODELS
def test_bfloat16_autocast_trains(name):
    model = MODELS[name]().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(inputs(model)), torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@ALL_MODELS
def test_export(name):
    model = fill(MODELS[name]()).eval()
    exported = torch.export.export(model, (inputs(model),)).module()
    torch.testing.assert_close(exported(inputs(model)), model(inputs(model)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_compiles_whole(name):
    """Forward and backward compile as one graph; inductor is left out, because it takes minutes."""
    torch.compiler.reset()  # one forward serves all of these models, and has a limit of recompilations
    model = freeze_backbone(MODELS[name]()).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(inputs(model)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "message, make",
    [
        (
            r"image must be \[B, 3, 32, 32\], got \[1, 3, 48, 32\]",
            lambda: image_model()(torch.zeros(1, 3, 48, 32)),
        ),
        (
            r"video must be \[B, 3, 4, 32, 32\], got \[1, 3, 8, 32, 32\]",
            lambda: video_model()(torch.zeros(1, 3, 8, 32, 32)),
        ),
        (r"image must be \[B, 3, 64, 64\]", lambda: swin_model()(torch.zeros(1, 1, 64, 64))),
        ("img_size must be a multiple of 8, got 60", lambda: swin_model(img_size=60)),
        ("d_model must be None or the model's embed_dim=48, got 768", lambda: image_model(dict(d_model=768))),
        ("tuning_config must be a dict, a Namespace or .*, got '64'", lambda: image_model("64")),
        ("bottleneck must be at least 1, got -1", lambda: image_model(dict(ffn_num=-1))),
        ("tuning_config has 'ffn_nun'", lambda: image_model(dict(ffn_nun=8))),
        ("all_frames must be at least tubelet_size=2, got 1", lambda: video_model(all_frames=1)),
        ("depths and num_heads must be of as many stages", lambda: swin_model(num_heads=(2, 4, 8))),
        ("ffn_option must be one of", lambda: image_model(dict(ffn_option="beside"))),
        ("vpt_num must be at least 1", lambda: image_model(dict(vpt_on=True, vpt_num=0))),
        ("some of the blocks 0 to 1", lambda: image_model(dict(ffn_layers=[2]))),
        ("some of the blocks 0 to 3", lambda: swin_model(dict(ffn_layers=[4]))),
        ("init_option must be 'lora'", lambda: image_model(dict(ffn_adapter_init_option="bert"))),
        ("no place for prompts", lambda: swin_model(PROMPTS)),
        ("distilled must be False", lambda: image_model(distilled=True)),
        ("representation_size must be None or embed_dim=48", lambda: image_model(representation_size=7)),
        ("use_mean_pooling must be True", lambda: video_model(use_mean_pooling=False)),
        (
            "positions of a video are not resized",
            lambda: load_checkpoint(
                video_model(use_learnable_pos_emb=True), {"pos_embed": torch.zeros(1, 3, 48)}
            ),
        ),
        (
            r"blocks.0.norm1.weight is \[7\] in the checkpoint and \[48\]",
            lambda: load_checkpoint(image_model(), {"blocks.0.norm1.weight": torch.ones(7)}),
        ),
    ],
)
def test_what_it_refuses(message, make):
    with pytest.raises(ValueError, match=message):
        make()
