# SPDX-License-Identifier: Apache-2.0
"""Patched layers call their children as the originals do, and can be wrapped, compiled and copied like them."""

import contextlib
import copy
import datetime
import gc
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import vitkern
from tests.changed_layers import PLAIN, Inputs, Model, changed, distance, results, tensors_of
from tests.layers_to_change import OURS

each_base = pytest.mark.parametrize("base", OURS, ids=lambda base: base.name)
patch_first = pytest.mark.parametrize("first", [True, False], ids=["patched before", "patched after"])
CHILDREN = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def pair(base) -> tuple[Model, Model]:
    """Two equal models, one of which is patched later."""
    return Model(base, changed(base)), Model(base, changed(base))


def assert_replaced(table) -> None:
    assert sum(len(row.paths) for row in table) == 2 and not table.left, str(table)


def assert_same(model, original, inputs=PLAIN) -> None:
    assert distance(results(model, inputs), results(original, inputs)) <= 1e-4


def heard(model, base, register) -> list[tuple[str, list[torch.Tensor]]]:
    """The calls that hooks on children record: the child and its input."""
    calls = []

    def listen(path):
        def hook(child, given, *_):
            calls.append((path, [tensor.detach() for tensor in given if isinstance(tensor, torch.Tensor)]))

        return hook

    names = (*CHILDREN, "dropout") if base.name == "mmcv" else CHILDREN
    handles = [
        register(layer.get_submodule(name), listen(f"{i}.{name}"))
        for i, layer in enumerate(model.layers)
        for name in names
    ]
    results(model, Inputs(masked=True))
    for handle in handles:
        handle.remove()
    return sorted(calls, key=lambda call: call[0])


@each_base
@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
    ],
)
def test_hooks_on_children_hear_the_same(base, register):
    model, original = pair(base)
    assert_replaced(vitkern.patch(model))
    found, expected = heard(model, base, register), heard(original, base, register)
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, ours), (_, theirs) in zip(found, expected):
        assert distance(ours, theirs) <= 1e-4, path


@each_base
@patch_first
def test_what_hooks_on_children_give_is_used(base, first):
    model, original = pair(base)
    if first:
        assert_replaced(vitkern.patch(model))
    for layer in (*model.layers, *original.layers):
        for name in CHILDREN:
            layer.get_submodule(name).register_forward_hook(lambda child, given, output: output * 0.5)
    if not first:
        assert_replaced(vitkern.patch(model))
    assert_same(model, original)


class LoraLinear(nn.Module):
    """A low-rank adapter beside a frozen layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.linspace(-0.3, 0.3, 3 * base.in_features).view(3, -1))
        self.b = nn.Parameter(torch.linspace(-0.2, 0.2, 3 * base.out_features).view(-1, 3))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class QuantisedLinear(nn.Module):
    """A quantised layer, with integer weights and a scale instead of a parameter `weight`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = float(base.weight.detach().abs().max()) / 127
        self.register_buffer("packed", (base.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", base.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.packed.to(x.dtype) * self.scale, self.bias)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(linear: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(linear, "weight", Halved())


@each_base
@patch_first
@pytest.mark.parametrize("wrap", [LoraLinear, QuantisedLinear, parametrized])
@pytest.mark.parametrize("name", ["value_proj", "sampling_offsets"])
def test_other_children(base, first, wrap, name):
    """Any module may replace a Linear child."""
    model, original = pair(base)
    if first:
        assert_replaced(vitkern.patch(model))
    for layer in (*model.layers, *original.layers):
        setattr(layer, name, wrap(layer.get_submodule(name)))
    if not first:
        assert_replaced(vitkern.patch(model))
    assert_same(model, original)


@contextlib.contextmanager
def one_process(folder):
    alone = dict(rank=0, world_size=1, timeout=datetime.timedelta(seconds=30))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **alone)
    try:
        yield
    finally:
        # A wrapper holds the group. The last one to release it waits for its threads with the GIL held: a deadlock.
        gc.collect()
        dist.destroy_process_group()


def data_parallel(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process shards nothing
        return fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def gradients(model, parameters):
    """Outputs, and the gradient of each parameter as one tensor."""
    outputs = model(*tensors_of(PLAIN))
    sum(output.square().mean() for output in outputs).backward()
    found = [output.detach() for output in outputs]
    for parameter in parameters:
        grad = parameter.grad
        found.append(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
    return found


@each_base
@patch_first
@pytest.mark.parametrize("wrap", [data_parallel, fsdp1, fsdp2])
def test_distributed(base, first, wrap, tmp_path):
    model, original = pair(base)
    expected = gradients(original, original.parameters())
    with one_process(tmp_path):
        if first:
            assert_replaced(vitkern.patch(model))
        wrapped = wrap(model)
        if not first:
            assert_replaced(vitkern.patch(wrapped))
        found = gradients(wrapped, model.parameters())
        del wrapped
    assert distance(found, expected) <= 1e-4


@each_base
@patch_first
def test_compiled(base, first):
    """A patched layer compiles to one graph, although it checks its proof at each call."""
    model, original = pair(base)
    query, *others = tensors_of(Inputs(masked=True))
    expected = base.call(original.layers[0], query, *others)
    layer = model.layers[0]
    graph = torch.compile(base.call, backend="aot_eager", fullgraph=True)
    if not first:
        broken = torch.compile(base.call, backend="aot_eager")
        torch.testing.assert_close(broken(layer, query, *others), expected, atol=1e-5, rtol=1e-4)
    assert vitkern.patch(layer)
    torch.testing.assert_close(graph(layer, query, *others), expected, atol=1e-5, rtol=1e-4)


@each_base
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_right(base, copied):
    model, original = pair(base)
    assert_replaced(vitkern.patch(model))
    twin = copied(model)
    assert_same(twin, original)
    assert not vitkern.patch(twin), "it was patched already"
    assert len(vitkern.unpatch(twin).rows[0].paths) == 2
    assert_same(model, original)


@each_base
def test_state_dict(base):
    model, original = pair(base)
    state = {name: tensor * 2 for name, tensor in original.state_dict().items()}
    assert_replaced(vitkern.patch(model))
    for each in (model, original):
        each.load_state_dict(state)
    assert_same(model, original)
