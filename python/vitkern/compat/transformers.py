# SPDX-License-Identifier: Apache-2.0
"""``vitkern.patch("transformers")``: the classes and functions of the library itself, so that all its models follow.

Imported modules are changed at once, the others on import: transformers loads each family by itself.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from vitkern.compat import imports, proofs, samples
from vitkern.compat.table import Table

KNOWN_RELEASES = "4.57 to 5.23"

# The name of each family's layer, less "MultiscaleDeformableAttention".
FAMILIES = {
    "d_fine": "DFine",
    "deformable_detr": "DeformableDetr",
    "deimv2": "Deimv2",
    "grounding_dino": "GroundingDino",
    "lw_detr": "LwDetr",
    "mask2former": "Mask2FormerPixelDecoderEncoder",
    "mm_grounding_dino": "MMGroundingDino",
    "omdet_turbo": "OmDetTurbo",
    "oneformer": "OneFormerPixelDecoderEncoder",
    "pp_doclayout_v2": "PPDocLayoutV2",
    "pp_doclayout_v3": "PPDocLayoutV3",
    "pp_doclayout_v4": "PPDocLayoutV4",
    "rf_detr": "RfDetr",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
}
_FAMILY_OF = {f"transformers.models.{family}.modeling_{family}": family for family in FAMILIES}

_NOT_FUSED = ("d_fine", "deimv2", "rt_detr_v2")
_CORE_CLASS = "MultiScaleDeformableAttention"


def _layer_of(family: str) -> str:
    return f"{FAMILIES[family]}MultiscaleDeformableAttention"


class Change(NamedTuple):
    """One attribute of a class or module that gets another value."""

    owner: Any
    name: str
    new: Any
    kernel: str

    @property
    def place(self) -> str:
        name: str = self.owner.__module__ if isinstance(self.owner, type) else self.owner.__name__
        return name.rpartition(".")[0]

    @property
    def label(self) -> str:
        return self.owner.__name__ if isinstance(self.owner, type) else self.name


def _changes_of(module: ModuleType) -> list[Change]:
    """The changes in a family's module, each class after a trial. Raises if one of them fails."""
    family = _FAMILY_OF[module.__name__]
    kind = _named(module, _layer_of(family))
    changes = []
    if hasattr(module, _CORE_CLASS):
        core = getattr(module, _CORE_CLASS)
        changes.append(_change_of_forward(core, core()))
    return [_change_of_forward(kind, _sample(family, kind, module)), *changes]


def _sample(family: str, kind: Any, module: ModuleType) -> nn.Module:
    if family == "rt_detr_v2":
        return samples.rt_detr_v2(kind)
    if family in _NOT_FUSED:
        return samples.d_fine(kind, _named(module, "multi_scale_deformable_attention_v2"))
    return samples.deformable_detr(kind, getattr(module, _CORE_CLASS, None))


def _named(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise _unknown(f"{module.__name__} has no {name}")
    return getattr(module, name)


def _change_of_forward(kind: Any, layer: nn.Module) -> Change:
    proof = proofs.proof_of(layer)
    if proof.candidate is None:
        raise _unknown(f"{kind.__name__}: {proof.reason}")
    return Change(kind, "forward", proofs.forward_on_trial(kind.forward), proof.candidate.form.kernel)


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"vitkern knows transformers {KNOWN_RELEASES}, this is {_release()}: {what}. Nothing was patched."
    )


def _release() -> str:
    return str(getattr(sys.modules.get("transformers"), "__version__", "another"))


def refuse_unknown(kind: type, reason: str) -> None:
    """Raises if a class of no known form is one of the layers of FAMILIES, from an unknown release."""
    definer = next(each for each in kind.__mro__ if "forward" in vars(each))
    family = _FAMILY_OF.get(definer.__module__)
    if family is not None and definer.__name__ in (_layer_of(family), _CORE_CLASS):
        raise _unknown(f"{definer.__name__}: {reason}")


_undo: list[tuple[Change, Any]] = []  # each with its earlier value


def patch(*, dry_run: bool = False) -> Table:
    """See :func:`vitkern.patch`."""
    if _is_patched():
        return Table(())
    package = importlib.util.find_spec("transformers")
    if package is None:
        raise ModuleNotFoundError("vitkern.patch: transformers is not installed", name="transformers")
    loaded = {name: _changes_of(sys.modules[name]) for name in sorted(_FAMILY_OF) if name in sys.modules}
    models = [Path(folder) / "models" for folder in package.submodule_search_locations or ()]
    rows = []
    for name, family in _FAMILY_OF.items():
        if name in loaded:
            rows += [(change.place, change.label, change.kernel) for change in loaded[name]]
        elif any((folder / family).is_dir() for folder in models):
            kernel = "ms_deform_attn" if family in _NOT_FUSED else "ms_deform_attn_fused"
            rows.append((f"{name.rpartition('.')[0]}, when imported", _layer_of(family), kernel))
    for name in () if dry_run else _FAMILY_OF:
        imports.follow(name, _change)
    return Table(rows)


def unpatch() -> Table:
    """See :func:`vitkern.unpatch`."""
    for name in _FAMILY_OF:
        imports.withdraw(name)
    rows = []
    while _undo:
        change, old = _undo.pop()
        if vars(change.owner).get(change.name) is change.new:  # it was not changed since
            setattr(change.owner, change.name, old)
            rows.append((change.place, f"{change.label} on {change.kernel}", change.label))
    return Table(reversed(rows))


def _is_patched() -> bool:
    return imports.is_followed(next(iter(_FAMILY_OF)))


def _change(module: ModuleType) -> None:
    try:
        changes = _changes_of(module)
    except RuntimeError as error:  # an import must not fail because of this
        warnings.warn(str(error), stacklevel=2)
        return
    for change in changes:
        _undo.append((change, vars(change.owner)[change.name]))
        setattr(change.owner, change.name, change.new)
