# SPDX-License-Identifier: Apache-2.0
"""vitkern.patch changes the classes of layers and nothing else, in any context and for any contents of the layers."""

import contextlib
import gc
import random
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import vitkern
from tests.changed_layers import AS_IT_IS, PLAIN, Model, changed, distance, results
from tests.changes import CHANGES
from tests.layers_to_change import OURS

each_base = pytest.mark.parametrize("base", OURS, ids=lambda base: base.name)
# One that is replaced, and three that are not fused: their code runs in the trial, if at all, on nothing of the user's.
ROWS = [
    AS_IT_IS,
    *(row for row in CHANGES if row.name in ("scaled", "a counter of the module", "a list that grows")),
]
BORDER = next(row for row in CHANGES if row.name == "border")  # in the core, so that nothing is replaced
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def state_of(model) -> dict[str, object]:
    """The readable state of a model and of the process, with objects by identity; no code of the model runs."""
    layers = list(model.layers)
    state: dict[str, object] = {}
    for path, part in model.named_modules():
        state[f"{path}.__dict__"] = {name: id(value) for name, value in vars(part).items()}
        for name, value in vars(part).items():
            if isinstance(value, dict):
                state[f"{path}.{name}"] = {key: id(each) for key, each in value.items()}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = (id(parameter), parameter._version, parameter.requires_grad, id(parameter.grad))
    module = sys.modules[type(layers[0]).__module__]
    state["globals"] = {name: id(value) for name, value in vars(module).items()}
    state["counted"] = (getattr(module, "CALLS", 0), list(getattr(module, "SEEN", ())))
    kind = next(kind for kind in type(layers[0]).__mro__ if "__init__" in vars(kind))
    state["class"] = {name: id(value) for name, value in vars(kind).items() if name != "__abstractmethods__"}
    state["process"] = process_state()
    return state


def process_state() -> dict[str, object]:
    with unset_fake_temporarily():
        drawn = torch.get_rng_state().tolist()
    return {
        "random numbers of torch": drawn,
        "random numbers of Python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device() if hasattr(torch, "get_default_device") else None,
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomalies": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast's dtype": torch.get_autocast_dtype("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warning": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": torch.get_num_threads(),
        "tracer": sys.gettrace(),
        "collector": gc.isenabled(),
        "profiler": sys.getprofile(),
        "warnings": list(warnings.filters),
        "CUDA": torch.cuda.is_initialized(),
    }


def differences(before, after) -> list[str]:
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


@each_base
@each_row
def test_nothing_but_classes_changes(base, row):
    model = Model(base, changed(base, row))
    model.layers[0].register_forward_hook(lambda *_: None)
    model.layers[0].value_proj.register_forward_pre_hook(lambda *_: None)
    model.layers[0].register_buffer("other", torch.ones(2))
    before = state_of(model)
    vitkern.patch(model)
    assert differences(before, state_of(model)) == []
    vitkern.unpatch(model)
    assert differences(before, state_of(model)) == []


@each_base
def test_tracers_of_others_go_on(base):
    """The tracer of a debugger or of coverage stays active."""

    def tracer(frame, event, argument):
        return None

    model, before = Model(base, changed(base)), sys.gettrace()
    sys.settrace(tracer)
    try:
        vitkern.patch(model)
        during = sys.gettrace()
    finally:
        sys.settrace(before)
    assert during is tracer


@each_base
def test_no_call_is_seen_by_hooks(base):
    model, seen = Model(base, changed(base)), []
    for part in model.modules():
        part.register_forward_pre_hook(lambda part, *_: seen.append(part))
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(part))
    try:
        vitkern.patch(model)
    finally:
        everywhere.remove()
    assert seen == []


@contextlib.contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def double_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def a_callback_of_the_collector():
    """A callback of the garbage collector, which runs in the middle of the tried code; hypothesis registers one."""

    def callback(phase, info):
        if info["uncollectable"] > 1000:  # a way that no trial takes
            info.clear()

    before = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(callback)


@contextlib.contextmanager
def a_hook_of_imports():
    """An import hook, which runs if torch imports one of its modules for the first time."""

    class Hook:
        def find_spec(self, name, path=None, target=None):
            if len(name) > 1000:  # a way that no trial takes
                sys.modules.clear()

    plain, hook = torch.autograd.grad, Hook()
    scope = {"__name__": "torch.importing", "sys": sys, "plain": plain}
    exec(
        "def grad(*inputs, **options):\n"
        "    sys.modules.pop('colorsys', None)\n"
        "    import colorsys\n"
        "    return plain(*inputs, **options)\n",
        scope,
    )
    torch.autograd.grad = scope["grad"]
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        sys.meta_path.remove(hook)
        torch.autograd.grad = plain


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "the meta device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "double by default": double_by_default,
    "FakeTensorMode": FakeTensorMode,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "warnings are errors": warnings_are_errors,
    "a callback of the collector": a_callback_of_the_collector,
    "a hook of imports": a_hook_of_imports,
}


@each_base
@pytest.mark.parametrize("context", CONTEXTS)
def test_patch_under(context, base):
    """The table is the same as outside of the context, and the patched model works afterwards."""
    model, original = (Model(base, changed(base)) for _ in range(2))
    stays = Model(base, changed(base, BORDER))
    with warnings_are_errors(), CONTEXTS[context]():
        before = state_of(model)
        table, other = vitkern.patch(model), vitkern.patch(stays)
        assert differences(before, state_of(model)) == []
    assert [row.paths for row in table] == [("layers.0", "layers.1")] and not table.left
    assert not other and len(other.left) == 2
    assert distance(results(model, PLAIN), results(original, PLAIN)) <= 1e-4


def of_dtype(dtype):
    return lambda model: model.to(dtype)


def filled(value):
    def fill(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)

    return fill


WEIGHTS = {
    "half": of_dtype(torch.float16),
    "bfloat16": of_dtype(torch.bfloat16),
    "double": of_dtype(torch.float64),
    "meta": lambda model: model.to("meta"),
    "zero": filled(0.0),
    "not a number": filled(float("nan")),
    "frozen": lambda model: model.requires_grad_(False),
}


@each_base
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_are_never_read(weights, base):
    """Layers are judged by their code alone, for any values of their weights."""
    model, stays = Model(base, changed(base)), Model(base, changed(base, BORDER))
    for each in (model, stays):
        WEIGHTS[weights](each)
    before = state_of(model)
    table, other = vitkern.patch(model), vitkern.patch(stays)
    assert differences(before, state_of(model)) == []
    assert [row.paths for row in table] == [("layers.0", "layers.1")] and not table.left
    assert not other and len(other.left) == 2


@each_base
def test_a_graph_that_was_recorded_before_is_still_good(base):
    """patch does not write to weights, not even the values that they already have."""
    model = Model(base, changed(base))
    loss = model.layers[0].value_proj(torch.ones(1, 32)).square().sum()
    vitkern.patch(model)
    loss.backward()
    assert model.layers[0].value_proj.weight.grad is not None
