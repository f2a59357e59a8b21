# SPDX-License-Identifier: Apache-2.0
"""Visual Transformers' options on small models, and the ResNet under them."""

import pytest
import torch

import vitkern
from tests.helpers import close, gradients_of, image, loss_of
from tests.parity.weights import fill, seeded
from vitkern.models import VTFPN, VTResNet, load_checkpoint
from vitkern.models.attention_maps import grad_cam, token_attention
from vitkern.models.resnet import ResNet
from vitkern.models.table import count_macs, count_parameters
from vitkern.nn import ClusteringTokenizer, PoolingTokenizer, TokenProjector, TokenTransformer

SMALL = dict(token_channels=32, key_channels=16, map_channels=48)
SMALL_FPN = dict(token_channels=32, key_channels=16, out_channels=16, projector_channels=8, head_channels=16)


def classifier(**options):
    return VTResNet(18, **{**SMALL, "num_classes": 5, **options}).eval()


def segmentor(**options):
    return VTFPN(18, **{**SMALL_FPN, "num_classes": 5, **options}).eval()


MODELS = {
    "filter": classifier,
    "not recurrent": lambda: classifier(recurrent=False),
    "pooling": lambda: classifier(tokenizer="pooling"),
    "clustering": lambda: classifier(tokenizer="clustering", recurrent=False),
    "no projector": lambda: classifier(projector=False),
    "as elsewhere": lambda: classifier(scaled=True, value_proj=True, key_channels=None, with_cp=True),
    "fpn": segmentor,
    "fpn clustering": lambda: segmentor(tokenizer="clustering", scaled=True, value_proj=True, with_cp=True),
    "fpn maps": lambda: segmentor(num_classes=0, tokenizer="pooling"),
}
ALL_MODELS = pytest.mark.parametrize("name", MODELS)


@ALL_MODELS
def test_every_parameter_learns_and_checkpointing_changes_nothing(name):
    model = MODELS[name]()
    plain = gradients_of(model, image(64, 96))
    model.set_grad_checkpointing()
    close(gradients_of(model, image(64, 96)), plain)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


@ALL_MODELS
def test_bfloat16_autocast_trains(name):
    model = MODELS[name]().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(image(64, 96)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@ALL_MODELS
def test_export(name):
    model = MODELS[name]()
    exported = torch.export.export(model, (image(64, 96),)).module()
    close(exported(image(64, 96)), model(image(64, 96)))


@pytest.mark.slow
@ALL_MODELS
def test_compiles_whole(name):
    """Forward and backward compile as one graph; inductor is left out, because it takes minutes."""
    model = MODELS[name]().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled(image(64, 96))).backward()
    assert all(p.grad is not None for p in model.parameters())


# Parameters and GMACs for an image of 224 x 224, for the two models whose widths the paper's appendix gives. The paper
# has 11.6 M and 1.579 GMACs, 21.8 M and 3.299 GMACs.
@pytest.mark.parametrize(
    "name, count, gmacs", [("vt_resnet18", 11.68e6, 1.585), ("vt_resnet34", 22.04e6, 3.337)]
)
def test_sizes_are_those_of_the_paper(name, count, gmacs):
    with torch.device("meta"):
        model = vitkern.create_model(name).eval()
        assert count_parameters(model) == pytest.approx(count, rel=1e-3)
        assert count_macs(model, torch.empty(1, 3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=1e-3)


def test_the_pyramid_needs_little():
    """The paper has 8.5 GMACs for an image of 800 x 1216, and 55.1 for a convolutional pyramid."""
    with torch.device("meta"):
        model, large = vitkern.create_model("vt_fpn_resnet50").eval(), torch.empty(1, 3, 800, 1216)
        macs = count_macs(model.forward_features, large) - count_macs(model.maps, large)
    assert macs / 1e9 == pytest.approx(8.8, abs=0.05)


@pytest.mark.parametrize("name", ["vt_resnet50", "vt_resnet101", "vt_fpn_resnet101"])
def test_meta_tensors(name):
    with torch.device("meta"):
        output = vitkern.create_model(name, num_classes=7).eval()(torch.empty(1, 3, 64, 64))
    assert output.shape == ((1, 7, 64, 64) if "fpn" in name else (1, 7))


def test_widths_of_the_equations():
    model = VTResNet(18, key_channels=None, last_projector=True)
    assert model.vt[0].transformer.key.weight.shape == (1024, 1024)
    assert model.vt[1].projector is not None and classifier().vt[1].projector is None
    assert [type(vt.tokenizer).__name__ for vt in model.vt] == ["FilterTokenizer", "RecurrentTokenizer"]


def test_pixels_have_no_order():
    """A permutation of the last map's pixels changes no logits."""
    model = fill(classifier()).double().eval()
    order, size = torch.randperm(24), image(64, 96).double()
    maps = model.maps(size)[-1]
    model.maps = lambda _: [maps]
    expected = model(size)
    model.maps = lambda _: [maps.flatten(2)[:, :, order].view_as(maps)]
    close(model(size), expected, 1e-10)


TORCHVISION = {  # a few keys of the state dict of each published ResNet, with their shapes
    18: {
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.downsample.1.running_var": (128,),
        "layer4.1.bn2.bias": (512,),
    },
    34: {
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.2.bn2.weight": (512,),
        "layer3.0.downsample.0.weight": (256, 128, 1, 1),
    },
    50: {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer3.5.conv3.weight": (1024, 256, 1, 1),
        "layer4.2.bn3.bias": (2048,),
    },
    101: {"layer3.22.conv2.weight": (256, 256, 3, 3), "layer4.0.conv1.weight": (512, 1024, 1, 1)},
}
# Without their classifiers of 1000 classes.
SIZES = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032, 101: 42_500_160}


@pytest.mark.parametrize("depth", SIZES)
def test_resnets_are_those_of_torchvision(depth):
    with torch.device("meta"):
        model = ResNet(depth)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = {"conv1.weight": (64, 3, 7, 7), "bn1.num_batches_tracked": (), **TORCHVISION[depth]}
    assert expected.items() <= shapes.items()
    assert count_parameters(model) == SIZES[depth]


def test_weights_of_a_published_resnet():
    published = {
        **fill(ResNet(18)).state_dict(),
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
    }
    model, pyramid = classifier(), segmentor(num_classes=0)
    loaded = load_checkpoint(model, published)
    assert all(key.startswith(("layer4.", "fc.")) for key in loaded.unexpected)
    assert all(key.startswith(("vt.", "head.")) for key in loaded.missing)
    assert torch.equal(model.layer3[1].conv2.weight, published["layer3.1.conv2.weight"])
    assert load_checkpoint(pyramid, published).unexpected == ["fc.weight", "fc.bias"]


def test_no_classes_gives_the_features():
    assert classifier(num_classes=0)(image(64, 96)).shape == (2, 32)
    with torch.device("meta"):
        model = vitkern.create_model(
            "vt_fpn_resnet50", features_only=True, num_classes=5, out_indices=(1, -1)
        )
        maps = model(torch.empty(1, 3, 70, 90))
    assert [list(m.shape) for m in maps] == [[1, 256, 9, 12], [1, 256, 3, 3]]
    assert model.feature_info.channels() == [256, 256] and model.feature_info.reduction() == [8, 32]
    assert not hasattr(segmentor(), "feature_info")


def test_a_classifier_of_other_classes():
    model = classifier()
    model.reset_classifier(7)
    assert model(image(64, 96)).shape == (2, 7) and model.get_classifier().out_features == 7
    with pytest.warns(UserWarning, match="other classes than the 7 of VTResNet"):
        assert set(load_checkpoint(model, classifier().state_dict()).missing) == {"head.weight", "head.bias"}


def test_images_of_any_size_and_number_of_channels():
    assert classifier(in_chans=1)(torch.randn(1, 1, 33, 50)).shape == (1, 5)
    assert segmentor(in_chans=4)(torch.randn(1, 4, 70, 33)).shape == (1, 5, 70, 33)


@pytest.mark.parametrize("tokens, grid", [(16, (4, 4)), (8, (2, 4)), (7, (1, 7))])
def test_pooling_makes_the_map_smaller(tokens, grid):
    x = seeded("x", (2, 8 * 12, 6))
    maps = x.transpose(1, 2).unflatten(2, (8, 12))
    expected = torch.nn.functional.interpolate(maps, grid, mode="bilinear").flatten(2).transpose(1, 2)
    close(PoolingTokenizer(6, tokens)(x, 8, 12), expected)
    assert PoolingTokenizer(6, tokens, 10)(x, 8, 12).shape == (2, tokens, 10)


def test_centroids_find_the_clusters():
    """The pixels lie around two directions, more around the first; each centroid is the mean of one group."""
    directions = torch.eye(6, dtype=torch.float64)[:2]
    of = (torch.arange(64) >= 40).long()
    x = (directions[of] * 3 + 0.05 * seeded("x", (64, 6)).double())[None]
    tokenizer = ClusteringTokenizer(6, 2)
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    means = torch.stack([unit[of == group].sum(0) for group in (0, 1)])
    centroids = tokenizer.centroids(x, 8, 8)[0]
    close(centroids, torch.nn.functional.normalize(means, dim=-1), 1e-6)
    weights = (x[0] @ centroids.T).softmax(0)
    close(tokenizer(x, 8, 8)[0], weights.T @ x[0], 1e-6)


def test_clusters_without_members_keep_their_centroid():
    tokens = ClusteringTokenizer(4, 4)(torch.ones(1, 16, 4), 4, 4)
    close(tokens, torch.ones(1, 4, 4))


def test_scaled_attention_and_mapped_values():
    tokens, x = seeded("tokens", (2, 5, 8)), seeded("x", (2, 12, 6))
    transformer = fill(TokenTransformer(8, 4, scaled=True, value_proj=True))
    weights = (transformer.key(tokens) @ transformer.query(tokens).mT / 2).softmax(-1)
    looked = tokens + weights @ transformer.value(tokens)
    close(transformer(tokens), looked + transformer.fc2(transformer.fc1(looked).relu()))
    projector = fill(TokenProjector(6, 8, key_channels=16, scaled=True))
    weights = (projector.query(x) @ projector.key(tokens).mT / 4).softmax(-1)
    close(projector(x, tokens), x + weights @ projector.value(tokens))


def test_where_tokens_come_from():
    attention = token_attention(classifier(), image(64, 96))
    assert [*attention] == ["vt.0.tokenizer", "vt.1.tokenizer"]
    for weights in attention.values():
        assert weights.shape == (2, 16, 4, 6)
        close(weights.sum((2, 3)), torch.ones(2, 16))
    shapes = [tuple(weights.shape[2:]) for weights in token_attention(segmentor(), image(64, 96)).values()]
    assert shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_grad_cam_needs_a_layer_that_is_called():
    model = classifier()
    assert grad_cam(model, image(64, 96), layer=model.layer3[-1]).shape == (2, 64, 96)
    with pytest.raises(ValueError, match="give one of them"):
        grad_cam(model, image(64, 96), layer=model.layer3)


@pytest.mark.parametrize(
    "message, make",
    [
        ("depth must be one of", lambda: VTResNet(20)),
        (
            r"VTResNet: image must be \[B, 3, H, W\], got \[1, 4, 64, 64\]",
            lambda: classifier()(torch.zeros(1, 4, 64, 64)),
        ),
        ("some of the maps 0 to 3, got", lambda: segmentor(num_classes=0, out_indices=())),
        ("tokens must be at least 1, got 0", lambda: classifier(tokens=0)),
        ("tokenizer must be one of", lambda: classifier(tokenizer="fourier")),
        ("projector=False needs recurrent=True", lambda: classifier(projector=False, recurrent=False)),
        ("no module of PoolingTokenizer", lambda: token_attention(PoolingTokenizer(4, 4), image(64, 96))),
    ],
)
def test_what_it_refuses(message, make):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_learns_a_batch_by_heart():
    model, images, labels = classifier(scaled=True).train(), image(32, 32, batch=10), torch.arange(10) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
