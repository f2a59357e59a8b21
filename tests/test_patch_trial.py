# SPDX-License-Identifier: Apache-2.0
"""vitkern.patch replaces a layer if and only if it computes the same as the kernels, however it is written.

A layer that computes more keeps its code, except that a kernel replaces the function that samples.

The layers are copies of Deformable-DETR's and mmcv's, each changed in one place (tests/changes.py) or
reworded with the same result (tests/rewordings.py).
"""

import pytest
import torch
from torch import nn

import vitkern
from tests.changed_layers import (
    AS_IT_IS,
    PLAIN,
    Inputs,
    Model,
    Row,
    SnippetNotFoundError,
    changed,
    distance,
    equal,
    results,
)
from tests.changes import BOXES, CHANGES, MASKED
from tests.layers_to_change import BASES, OURS
from tests.rewordings import REWORDINGS

each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
each_change = pytest.mark.parametrize("row", CHANGES, ids=lambda row: row.name)
each_rewording = pytest.mark.parametrize("row", REWORDINGS, ids=lambda row: row.name)
PATHS = ["layers.0", "layers.1"]
ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
NOT_A_NUMBER = next(row for row in CHANGES if row.name == "not a number is none").shown
KEEPS_ITS_CORE = (
    "a counter of the module",  # the code of a copy would count elsewhere
    "a subclass",  # its own forward calls no core, and the one that it calls is of another class
)


def model_of(base, row: Row = AS_IT_IS) -> Model:
    """A model with its own class and module, so that models share no counters or other state."""
    if row.core and not base.calls_core:
        pytest.skip(f"{base.name} does not call its core on a CPU")
    try:
        return Model(base, changed(base, row))
    except SnippetNotFoundError as error:
        if base in OURS:
            raise
        pytest.skip(str(error))


_known: dict[tuple[object, ...], list[torch.Tensor | None]] = {}


def results_unpatched(base, row: Row, inputs: Inputs) -> list[torch.Tensor | None]:
    """The results of a separate, unpatched model, computed once."""
    key = (base.name, row, inputs)
    if key not in _known:
        _known[key] = results(model_of(base, row), inputs)
    return _known[key]


def paths(table) -> list[str]:
    return [path for row in table for path in row.paths]


@each_base
@each_change
def test_the_change_is_one(base, row):
    """Each change alters the result on its inputs, unless it is marked as silent."""
    found = results_unpatched(base, row, row.shown)
    as_it_was = results_unpatched(base, AS_IT_IS, row.shown._replace(attributes=()))
    assert (distance(found, as_it_was) < 1e-5) == row.silent


@each_base
@each_change
def test_a_changed_layer_stays(base, row):
    """The results stay the same: bit by bit if the core is changed too, else within the kernel's error."""
    model = model_of(base, row)
    table = vitkern.patch(model)
    found, expected = results(model, row.shown), results_unpatched(base, row, row.shown)
    assert not any(each.fused for each in table)
    if not row.core and base in OURS and not table.left:
        sampled = {f"{path}.{base.core}" for path in PATHS}
        assert sampled <= set(paths(table)), str(table)
        kept = (
            len(PATHS) if row.shown.dtype in ROUNDING else None
        )  # gradients of 16-bit locations jump at edges
        assert distance(found[:kept], expected[:kept]) <= ROUNDING.get(row.shown.dtype, 1e-4), "other numbers"
        assert not equal(found, expected) or row.shown == NOT_A_NUMBER, "grid_sample still runs"
        return
    assert equal(found, expected), "other numbers"
    assert not table and [left.path for left in table.left] == PATHS
    assert all(len(left.reason) > 10 and " " in left.reason for left in table.left)
    assert row.core or row.name in KEEPS_ITS_CORE or base not in OURS, table


@each_base
@each_rewording
def test_a_reworded_layer_is_replaced(base, row):
    model = model_of(base, row)
    table = vitkern.patch(model)
    assert paths(table) == PATHS and not table.left, str(table)
    assert all(row.fused for row in table)
    outputs = len(PATHS)
    for inputs in (PLAIN, BOXES, MASKED):
        found, expected = results(model, inputs), results_unpatched(base, AS_IT_IS, inputs)
        assert distance(found[:outputs], expected[:outputs]) <= 1e-5
        assert distance(found[outputs:], expected[outputs:]) <= 1e-4
        assert not equal(found, expected), "grid_sample still runs"


BORDER = next(row for row in CHANGES if row.name == "border")


def mixed(base) -> nn.Module:
    """One model with a layer that can be replaced and one that cannot."""
    model = model_of(base)
    model.layers[1] = model_of(base, BORDER).layers[1]
    return model


@each_base
def test_one_layer_is_replaced_and_the_other_stays(base):
    model = mixed(base)
    table = vitkern.patch(model)
    assert paths(table) == ["layers.0"] and [left.path for left in table.left] == ["layers.1"]


@each_base
def test_a_dry_run_says_the_same_and_changes_nothing(base):
    model = mixed(base)
    kinds = [type(layer) for layer in model.layers]
    dry = vitkern.patch(model, dry_run=True)
    assert [type(layer) for layer in model.layers] == kinds
    assert equal(results(model, PLAIN), results(mixed(base), PLAIN))
    wet = vitkern.patch(model)
    assert dry.rows == wet.rows and dry.left == wet.left and str(dry) == str(wet)


@each_base
def test_strict_raises_for_what_is_left_and_changes_nothing(base):
    model = mixed(base)
    kinds = [type(layer) for layer in model.layers]
    (left,) = vitkern.patch(model, dry_run=True).left
    for dry_run in (False, True):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            vitkern.patch(model, strict=True, dry_run=dry_run)
        assert left.path in str(raised.value) and left.reason in str(raised.value)
        assert [type(layer) for layer in model.layers] == kinds


@each_base
def test_strict_says_nothing_where_all_is_replaced(base):
    model = model_of(base)
    assert paths(vitkern.patch(model, strict=True)) == PATHS


def test_a_model_without_such_layers_is_warned_of():
    with pytest.warns(UserWarning, match="vitkern"):
        assert not vitkern.patch(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_that_was_patched_is_not_warned_of(recwarn):
    model = model_of(BASES[0])
    assert vitkern.patch(model) and not vitkern.patch(model)
    assert not [each for each in recwarn if "vitkern" in str(each.message)]


@each_base
def test_code_is_tried_once(base):
    from vitkern.compat.trial import judge as trial

    kind = changed(base)
    before = trial.count()
    assert paths(vitkern.patch(Model(base, kind))) == PATHS
    once = trial.count()
    assert once > before
    assert paths(vitkern.patch(Model(base, kind))) == PATHS and trial.count() == once


@each_base
def test_code_that_stays_is_tried_once(base):
    from vitkern.compat.trial import judge as trial

    kind = changed(base, BORDER)
    first = vitkern.patch(Model(base, kind))
    once = trial.count()
    assert vitkern.patch(Model(base, kind)).left == first.left and trial.count() == once


@each_base
def test_a_class_whose_forward_is_replaced_is_tried_again(base):
    """A new forward under the same name counts as new code."""
    kind = changed(base)
    assert vitkern.patch(Model(base, kind), dry_run=True)
    forward = kind.forward
    kind.forward = lambda self, *inputs, **named: forward(self, *inputs, **named) * 1.001
    model = Model(base, kind)
    expected = results(model, Inputs())
    # The function that a layer calls for the core may be replaced; the layer may not.
    assert not set(paths(vitkern.patch(model))) & set(PATHS)
    assert distance(results(model, Inputs()), expected) < 1e-4


@each_base
@pytest.mark.parametrize(
    "sizes", [dict(heads=8, points=2), dict(heads=1, points=1), dict(heads=2, levels=3)], ids=str
)
def test_other_sizes(base, sizes):
    """Layers of all sizes are replaced, also after a trial of the same class with other sizes."""
    renamed = {name: next(key for key in base.arguments if key.endswith(name)) for name in sizes}
    wide = base._replace(
        arguments={**base.arguments, **{renamed[name]: size for name, size in sizes.items()}}
    )
    levels = ((6, 5), (3, 2), (1, 2))[: sizes.get("levels", 2)]
    kind = changed(base)
    assert vitkern.patch(Model(base, kind))
    model, original = Model(wide, kind), Model(wide, kind)
    assert paths(vitkern.patch(model)) == PATHS
    assert distance(results(model, Inputs(sizes=levels)), results(original, Inputs(sizes=levels))) <= 1e-4


@pytest.mark.parametrize("options", [dict(batch_first=False), dict(dropout=0.5)], ids=str)
def test_options_of_mmcv(options):
    """The axis of queries may come first, and dropout draws the same random numbers as the original."""
    base = next(base for base in BASES if base.name == "mmcv")
    kind = changed(base)
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = kind(**{**base.arguments, **options})
        nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
        layers.append(layer)
    assert paths(vitkern.patch(layers[0])) == [""]
    order = (0, 0) if layers[0].batch_first else (0, 1)  # of the two that are exchanged
    named = dict(
        query=torch.rand(2, 7, 32).transpose(*order),
        value=torch.rand(2, 36, 32).transpose(*order),
        query_pos=torch.rand(2, 7, 32).transpose(*order),
        identity=torch.rand(2, 7, 32).transpose(*order),
        reference_points=torch.rand(2, 7, 2, 2),
        spatial_shapes=torch.tensor([[6, 5], [3, 2]]),
        level_start_index=torch.tensor([0, 30]),
    )
    found = []
    for layer in layers:
        torch.manual_seed(3)
        found.append(layer(**named))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
