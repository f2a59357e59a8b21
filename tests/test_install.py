# SPDX-License-Identifier: Apache-2.0
"""vitkern.install and uninstall: the modules that imports find before, between and after, with stand-in packages."""

import importlib
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import vitkern
from tests.test_compat_deformable_detr import make
from vitkern.compat import deformable_detr, forms, mmcv
from vitkern.compat.install import ECOSYSTEMS

EXTENSIONS = {name: ecosystem.extension for name, ecosystem in ECOSYSTEMS.items()}
LAYER = f"""
import sys

sys.path.append({str(Path(__file__).parents[1])!r})
from tests import layers_of_others as others

MultiScaleDeformableAttnFunction = others.MultiScaleDeformableAttnFunction
multi_scale_deformable_attn_pytorch = others.multi_scale_deformable_attn_pytorch

class MultiScaleDeformableAttention(others.MultiScaleDeformableAttention):
    pass
"""
REAL = "def ms_deform_attn_forward(*_):\n    return 'theirs'\n\ndef another():\n    return 'theirs'\n"
GROUNDINGDINO = {
    "groundingdino/__init__.py": "",
    "groundingdino/models/__init__.py": "from .GroundingDINO import ms_deform_attn",
    "groundingdino/models/GroundingDINO/__init__.py": "",
    "groundingdino/models/GroundingDINO/ms_deform_attn.py": (
        "import torch\ntry:\n    from groundingdino import _C\nexcept ImportError:\n    _C = None\n" + LAYER
    ),
}
MMCV_LITE = {
    "mmcv/__init__.py": "",
    "mmcv/ops/__init__.py": "from . import nms\nfrom .multi_scale_deform_attn import *",
    "mmcv/ops/nms.py": "from mmcv import _ext\nassert hasattr(_ext, 'nms')",
    "mmcv/ops/multi_scale_deform_attn.py": "import torch\nfrom mmcv import _ext\n" + LAYER,
}


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    before, finders, path = dict(sys.modules), list(sys.meta_path), list(sys.path)
    yield
    vitkern.uninstall()
    assert sys.meta_path == finders
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in {extension.partition(".")[0] for extension in EXTENSIONS.values()}:
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A function that creates packages of other projects on sys.path."""

    def build(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    return build


def places(table):
    return [row.place for row in table]


def load(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["deformable_detr", "groundingdino", "detrex"])
def test_compiled_module_is_there_and_works_and_goes(name):
    extension = EXTENSIONS[name]
    table = vitkern.install(name)
    assert (extension, "compiled module", "ms_deform_attn", (extension,)) in table.rows and not table.left
    module = load(extension)
    output = module.ms_deform_attn_forward(*make(), 64)
    gradients = module.ms_deform_attn_backward(*make(), torch.ones_like(output), 64)
    assert [gradient.shape for gradient in gradients] == [make()[at].shape for at in (0, 3, 4)]
    assert extension in places(vitkern.uninstall(name))
    assert extension not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        load(extension)


def test_deformable_detr_serves_its_relatives():
    vitkern.install("deformable_detr")
    import detrex._C
    import groundingdino._C

    assert detrex._C.ms_deform_attn_forward is groundingdino._C.ms_deform_attn_forward
    vitkern.uninstall("deformable_detr")
    assert not {"detrex", "groundingdino", "detrex._C"} & set(sys.modules)


def test_a_package_that_comes_later_is_found(tree):
    vitkern.install("deformable_detr")
    tree({"groundingdino/__init__.py": "name = 'theirs'"})
    assert load("groundingdino").name == "theirs"
    assert load("groundingdino._C").ms_deform_attn_forward is deformable_detr.ms_deform_attn_forward


def test_a_package_that_comes_after_its_stand_in_takes_its_place(tree):
    """As in a script that tries the import and then extends sys.path."""
    vitkern.install("deformable_detr")
    stand_in = load("groundingdino")
    extension = load("groundingdino._C")
    assert importlib.util.find_spec("groundingdino").origin == "vitkern.compat.imports"
    tree({**GROUNDINGDINO, "groundingdino/__init__.py": "from groundingdino.models import ms_deform_attn"})
    layer = load("groundingdino.models").ms_deform_attn.MultiScaleDeformableAttention
    assert forms.is_ours(layer.forward)
    assert load("groundingdino") is stand_in and stand_in.__file__.endswith("__init__.py")
    assert stand_in._C is extension is load("groundingdino._C")
    vitkern.uninstall()
    assert load("groundingdino") is stand_in and not hasattr(stand_in, "_C")


def test_a_package_in_the_place_of_its_stand_in_may_wait_for_a_thread_that_imports(tree):
    vitkern.install("deformable_detr")
    load("groundingdino")
    threads = """
        import importlib, threading
        thread = threading.Thread(target=importlib.import_module, args=["a_module_of_a_thread"], daemon=True)
        thread.start()
        thread.join(10)
        waits = thread.is_alive()
    """
    tree({"groundingdino/__init__.py": threads, "groundingdino/util.py": "", "a_module_of_a_thread.py": ""})
    assert load("groundingdino.util") and not load("groundingdino").waits
    del sys.modules["a_module_of_a_thread"]


def test_an_extension_that_comes_after_the_stand_in_of_its_package_is_not_shadowed(tree):
    vitkern.install("deformable_detr")
    load("groundingdino")
    tree({**GROUNDINGDINO, "groundingdino/_C.py": REAL})
    assert load("groundingdino._C").ms_deform_attn_forward() == "theirs"


def test_a_package_that_fails_in_the_place_of_its_stand_in_is_not_imported(tree):
    vitkern.install("deformable_detr")
    load("groundingdino")
    tree({"groundingdino/__init__.py": "1 / 0"})
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load("groundingdino.models")


def test_modules_of_a_package_that_is_not_there_are_missing():
    vitkern.install("deformable_detr")
    with pytest.raises(
        ModuleNotFoundError, match="'groundingdino.util': groundingdino is not installed"
    ) as error:
        load("groundingdino.util")
    assert error.value.name == "groundingdino.util"
    with pytest.raises(ImportError, match="cannot import name 'util'"):
        exec("from groundingdino import util")


def test_two_threads_install_once(tree, monkeypatch):
    tree(MMCV_LITE)
    vitkern.install("mmcv")
    kind = load("mmcv.ops").MultiScaleDeformableAttention
    vitkern.uninstall("mmcv")
    original, is_ours = kind.forward, forms.is_ours

    def slow(function):
        answer = is_ours(function)
        time.sleep(0.05)  # for another thread to come in between
        return answer

    monkeypatch.setattr(forms, "is_ours", slow)
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(vitkern.install, ["mmcv"] * 4))
    assert kind.forward.replaces is original
    assert len({str(table) for table in tables}) == 1


def test_twice_is_once():
    assert str(vitkern.install("deformable_detr")) == str(vitkern.install("deformable_detr"))
    module = load("MultiScaleDeformableAttention")
    vitkern.install("deformable_detr")
    assert load("MultiScaleDeformableAttention") is module
    assert vitkern.uninstall() and not vitkern.uninstall()


def test_unknown_name():
    for function in (vitkern.install, vitkern.uninstall):
        with pytest.raises(ValueError, match="unknown name 'dino': choose from 'deformable_detr': .* DINO"):
            function("dino")

    for function in (vitkern.install, vitkern.uninstall):
        with pytest.raises(ValueError, match=r"unknown name \['mmcv'\]"):
            function(["mmcv"])


def test_what_is_not_installed_is_not_undone():
    vitkern.install("mmcv")
    assert not vitkern.uninstall("groundingdino")
    assert places(vitkern.uninstall("mmcv")) == ["mmcv._ext", "mmcv.ops.multi_scale_deform_attn"]


def test_reload_and_pickle():
    vitkern.install("deformable_detr")
    module = load("MultiScaleDeformableAttention")
    forward = module.ms_deform_attn_forward
    del module.ms_deform_attn_forward
    assert importlib.reload(module) is module and module.ms_deform_attn_forward is forward
    assert pickle.loads(pickle.dumps(forward)) is deformable_detr.ms_deform_attn_forward
    assert importlib.util.find_spec("MultiScaleDeformableAttention").name == module.__name__


def test_an_installed_extension_is_not_shadowed(tree):
    tree({"MultiScaleDeformableAttention.py": REAL})
    with pytest.raises(
        RuntimeError, match="is installed, from .*py. Uninstall that, or call .*override=True"
    ):
        vitkern.install("deformable_detr")
    assert load("MultiScaleDeformableAttention").ms_deform_attn_forward() == "theirs"
    assert not vitkern.uninstall()


def test_override_and_back(tree):
    tree({"MultiScaleDeformableAttention.py": REAL})
    vitkern.install("deformable_detr", override=True)
    assert "MultiScaleDeformableAttention" in places(vitkern.install("deformable_detr"))
    module = load("MultiScaleDeformableAttention")
    assert module.ms_deform_attn_forward is deformable_detr.ms_deform_attn_forward
    assert module.another() == "theirs"
    vitkern.uninstall()
    assert load("MultiScaleDeformableAttention").ms_deform_attn_forward() == "theirs"


def test_too_late_for_override(tree):
    tree({"MultiScaleDeformableAttention.py": REAL})
    load("MultiScaleDeformableAttention")
    with pytest.raises(RuntimeError, match="and imported: call install\\('deformable_detr'\\) earlier"):
        vitkern.install("deformable_detr", override=True)


def test_an_extension_that_comes_later_is_found(tree):
    vitkern.install("deformable_detr")
    tree({"MultiScaleDeformableAttention.py": REAL})
    assert load("MultiScaleDeformableAttention").ms_deform_attn_forward() == "theirs"


@pytest.mark.parametrize("late", [False, True])
def test_groundingdino_without_its_extension(tree, late):
    tree(GROUNDINGDINO)
    if late:
        load("groundingdino.models")
    vitkern.install("groundingdino")
    module = load("groundingdino.models").ms_deform_attn
    layer = module.MultiScaleDeformableAttention
    assert forms.is_ours(layer.forward)
    assert (module._C is None) == late
    vitkern.uninstall("groundingdino")
    assert not forms.is_ours(layer.forward)
    assert not hasattr(sys.modules["groundingdino"], "_C")


def test_a_layer_whose_extension_is_installed_is_ours_all_the_same(tree):
    tree({**GROUNDINGDINO, "groundingdino/_C.py": REAL})
    table = vitkern.install("groundingdino")
    assert "left as it is: groundingdino._C (compiled module): installed, from " in str(table)
    module = load("groundingdino.models").ms_deform_attn
    assert module._C.ms_deform_attn_forward() == "theirs"
    assert forms.is_ours(module.MultiScaleDeformableAttention.forward)


def test_mmcv_lite(tree):
    tree(MMCV_LITE)
    vitkern.install("mmcv")
    ops = load("mmcv.ops")
    assert forms.is_ours(ops.MultiScaleDeformableAttention.forward)
    extension = sys.modules["mmcv._ext"]
    assert extension.ms_deform_attn_backward is mmcv.ms_deform_attn_backward
    with pytest.raises(NotImplementedError, match="mmcv._ext.nms is not available: vitkern stands in"):
        extension.nms(torch.zeros(1, 4), iou_threshold=0.5)
    with pytest.raises(AttributeError, match="'mmcv._ext' has no attribute '__path__'"):
        extension.__path__  # noqa: B018


def test_patch_knows_what_install_has_done(tree):
    theirs = (Path(__file__).parent / "layers_of_others.py").read_text(encoding="utf-8")
    tree({**MMCV_LITE, "mmcv/ops/multi_scale_deform_attn.py": theirs})
    vitkern.install("mmcv")
    layer = load("mmcv.ops").MultiScaleDeformableAttention()
    assert str(vitkern.patch(layer)) == "nothing was replaced"
    vitkern.uninstall("mmcv")
    assert vitkern.patch(layer)
    vitkern.install("mmcv")
    vitkern.uninstall("mmcv")
    assert vitkern.unpatch(layer) and not forms.is_ours(layer.forward)


def test_a_forward_that_was_changed_since_stays(tree):
    tree(MMCV_LITE)
    vitkern.install("mmcv")
    kind = load("mmcv.ops").MultiScaleDeformableAttention
    kind.forward = lambda self: "another"
    vitkern.uninstall("mmcv")
    assert kind().forward() == "another"


def test_withdrawn_between_search_and_import(tree):
    tree({**MMCV_LITE, "mmcv/ops/multi_scale_deform_attn.py": "import torch\n" + LAYER})
    vitkern.install("mmcv")
    load("mmcv.ops")
    del sys.modules["mmcv.ops.multi_scale_deform_attn"]
    spec = importlib.util.find_spec("mmcv.ops.multi_scale_deform_attn")
    vitkern.uninstall("mmcv")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not forms.is_ours(module.MultiScaleDeformableAttention.forward)


def test_full_mmcv_keeps_its_other_functions(tree):
    tree({**MMCV_LITE, "mmcv/_ext.py": REAL + "nms = another"})
    vitkern.install("mmcv", override=True)
    load("mmcv.ops")
    extension = sys.modules["mmcv._ext"]
    assert extension.ms_deform_attn_forward is mmcv.ms_deform_attn_forward
    assert extension.nms() == "theirs"


def test_what_did_without_the_layer_is_told(tree):
    """If its compiled module is missing, detrex replaces the class by a dummy."""
    without = (
        "try:\n    from detrex import _C\nexcept ImportError:\n    MultiScaleDeformableAttention = 'dummy'"
    )
    files = {"detrex/__init__.py": "", "detrex/layers/__init__.py": ""}
    tree({**files, "detrex/layers/multi_scale_deform_attn.py": without})
    load("detrex.layers.multi_scale_deform_attn")
    for name in ("detrex", "deformable_detr"):
        with pytest.raises(RuntimeError, match="was imported without detrex._C.*: call install earlier"):
            vitkern.install(name)
    assert not vitkern.uninstall()


def test_a_version_without_the_layer_says_so(tree):
    tree({**MMCV_LITE, "mmcv/ops/multi_scale_deform_attn.py": "class Renamed: pass"})
    vitkern.install("mmcv")
    with pytest.raises(ImportError, match="the class MultiScaleDeformableAttention .* none in this version"):
        load("mmcv.ops")
    vitkern.uninstall("mmcv")
    assert load("mmcv.ops.multi_scale_deform_attn").Renamed


def test_a_reload_of_the_layers_keeps_ours(tree):
    tree(MMCV_LITE)
    vitkern.install("mmcv")
    module = load("mmcv.ops.multi_scale_deform_attn")
    earlier = module.MultiScaleDeformableAttention
    assert LAYER in importlib.import_module("inspect").getsource(module)
    later = importlib.reload(module).MultiScaleDeformableAttention
    assert later is not earlier and forms.is_ours(later.forward)
    vitkern.uninstall("mmcv")
    assert not forms.is_ours(later.forward) and not forms.is_ours(earlier.forward)
