# SPDX-License-Identifier: Apache-2.0
"""If attributes or functions of a patched layer change later, the original runs, with one warning."""

import contextlib
import sys
import warnings

import pytest
import torch

import vitkern
from tests.changed_layers import AS_IT_IS, PLAIN, Inputs, Model, Row, changed, distance, equal, results
from tests.changes import BOXES
from tests.layers_to_change import BASES, DEFORMABLE_DETR, OURS

each_base = pytest.mark.parametrize("base", OURS, ids=lambda base: base.name)
REACH = Row("a class attribute", ((" * 0.5", " * self.reach"),), appended="MSDeformAttn.reach = 0.5")


def pair(base, row: Row = AS_IT_IS) -> tuple[Model, Model]:
    """A patched model and an unpatched one, whose classes are in separate modules."""
    model, original = (Model(base, changed(base, row)) for _ in range(2))
    assert len(vitkern.patch(model).rows[0].paths) == 2
    return model, original


@contextlib.contextmanager
def one_warning(*names):
    """Expects exactly one warning, which mentions one of these names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(each.message) for each in caught]
    assert len(texts) == 1 and any(name in texts[0] for name in names), texts


def assert_same(model, original, inputs, *names):
    """Checks that three calls of the patched model, after a change of all layers, equal the original's bit by bit."""
    inputs = inputs._replace(calls=3)
    with one_warning(*names):
        found = results(model, inputs)
    assert equal(found, results(original, inputs))


def class_of(model):
    """The class in the model's own module, from which the patched class is derived."""
    layer = model.layers[0]
    return next(kind for kind in type(layer).__mro__ if "__init__" in vars(kind))


@each_base
def test_nothing_is_said_while_nothing_changes(base):
    model, _ = pair(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(model, Inputs(calls=3))


@each_base
def test_an_attribute_of_one_layer(base):
    """The other layer still runs on the kernel, so the last bits differ."""
    model, original = pair(base, REACH)
    for each in (model, original):
        each.layers[1].reach = 0.25
    with one_warning("reach"):
        found = results(model, BOXES._replace(calls=3))
    expected = results(original, BOXES._replace(calls=3))
    assert distance(found, expected) <= 1e-4 and not equal(found, expected)


@each_base
def test_sizes_of_a_layer(base):
    """Eight heads with two points have as many weights as four heads with four points."""
    heads, points = (
        next(name for name in base.arguments if name.endswith(end)) for end in ("heads", "points")
    )
    models = pair(base)
    for model in models:
        for layer in model.layers:
            setattr(layer, heads, 8)
            setattr(layer, points, 2)
    assert_same(*models, PLAIN, heads, points)


@each_base
def test_an_attribute_without_effect(base):
    """Any changed attribute makes the original run, even one that has no effect."""
    models = pair(base)
    for model in models:
        for layer in model.layers:
            layer.im2col_step = 32
    assert_same(*models, PLAIN, "im2col_step")


@each_base
def test_an_attribute_of_the_class(base):
    models = pair(base, REACH)
    for model in models:
        class_of(model).reach = 0.25
    assert_same(*models, BOXES, "reach")


@each_base
def test_an_attribute_that_hides_that_of_the_class(base):
    models = pair(base, REACH)
    for model in models:
        for layer in model.layers:
            layer.reach = 0.25
    assert_same(*models, BOXES, "reach")


@each_base
def test_an_attribute_that_the_code_does_not_read(base):
    model, original = pair(base)
    for layer in (*model.layers, *original.layers):
        layer.remark = "a note"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = results(model, PLAIN)
    assert not equal(found, results(original, PLAIN)), "grid_sample runs again"


@each_base
def test_an_attribute_that_is_set_back(base):
    model, original = pair(base)
    quick = results(model, PLAIN)
    for layer in (*model.layers, *original.layers):
        layer.im2col_step = 32
    assert_same(model, original, PLAIN, "im2col_step")
    for layer in model.layers:
        layer.im2col_step = 64
    assert equal(results(model, PLAIN), quick)


def core_times_two(module, base):
    """A core that returns twice the result of the module's own."""
    own = vars(module)["ms_deform_attn_core_pytorch" if base is DEFORMABLE_DETR else base.core]

    def core(*tensors):
        return own(*tensors) * 2

    return core


def module_of(model):
    return sys.modules[class_of(model).__module__]


@each_base
def test_the_core_is_replaced(base):
    models = pair(base)
    name = "ms_deform_attn_core_pytorch" if base is DEFORMABLE_DETR else base.core
    for model in models:
        module = module_of(model)
        setattr(module, name, core_times_two(module, base))
    assert_same(*models, PLAIN, name)


def test_the_function_is_replaced():
    models = pair(DEFORMABLE_DETR)
    for model in models:
        module = module_of(model)
        core = core_times_two(module, DEFORMABLE_DETR)

        class Other:
            @staticmethod
            def apply(value, shapes, starts, locations, weights, step, core=core):
                return core(value, shapes, locations, weights)

        module.MSDeformAttnFunction = Other
    assert_same(*models, PLAIN, "MSDeformAttnFunction")


def test_the_function_gets_another_apply():
    models = pair(DEFORMABLE_DETR)
    for model in models:
        module = module_of(model)
        core = core_times_two(module, DEFORMABLE_DETR)
        module.MSDeformAttnFunction.apply = staticmethod(
            lambda value, shapes, starts, locations, weights, step, core=core: core(
                value, shapes, locations, weights
            )
        )
    assert_same(*models, PLAIN, "MSDeformAttnFunction", "apply")


@each_base
def test_a_function_that_the_layer_calls_is_replaced(base):
    row = Row(
        "softmax by a function of the module",
        (("$softmax", "weigh(attention_weights)"),),
        appended="def weigh(logits):\n    return logits.softmax(-1)",
    )
    models = pair(base, row)
    for model in models:
        module_of(model).weigh = torch.sigmoid
    assert_same(*models, PLAIN, "weigh")


@each_base
def test_a_method_of_the_class_is_replaced(base):
    row = Row(
        "softmax by a method",
        (("$softmax", "self.weigh(attention_weights)"),),
        appended="MSDeformAttn.weigh = lambda self, logits: logits.softmax(-1)",
    )
    models = pair(base, row)
    for model in models:
        class_of(model).weigh = lambda self, logits: logits.sigmoid()
    assert_same(*models, PLAIN, "weigh")


@each_base
def test_another_forward_of_the_class(base):
    """If a tool wraps the forward of the class, the wrapper runs."""
    models = pair(base)
    for model in models:
        kind = class_of(model)
        kind.forward = lambda self, *inputs, own=kind.forward, **named: own(self, *inputs, **named) * 2
    assert_same(*models, PLAIN, "forward")


def test_every_checkout_is_warned_of_too():
    """The same for the layers of the checkouts that variables name."""
    others = [base for base in BASES if base not in OURS]
    if not others:
        pytest.skip("neither VITKERN_DEFORMABLE_DETR nor VITKERN_MMCV names a checkout")
    for base in others:
        models = pair(base)
        for model in models:
            for layer in model.layers:
                layer.im2col_step = 32
        assert_same(*models, PLAIN, "im2col_step")


@each_base
def test_a_refusal_holds_as_long_as_its_cause(base):
    """A refused layer is tried again after its core was replaced."""
    model = Model(base, changed(base, Row("nearest", (("mode='bilinear'", "mode='nearest'"),), core=True)))
    reasons = {left.reason for left in vitkern.patch(model).left}
    name = "ms_deform_attn_core_pytorch" if base is DEFORMABLE_DETR else base.core
    setattr(module_of(model), name, core_times_two(module_of(model), base))
    assert reasons.isdisjoint(left.reason for left in vitkern.patch(model).left)
