# SPDX-License-Identifier: Apache-2.0
"""Functions that sample and have a proof of their own: a layer's trial need not take every way through their code."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from vitkern.compat.trial import functions
from vitkern.compat.trial.purity import names_of

if TYPE_CHECKING:
    from vitkern.compat.proofs import Proof
    from vitkern.compat.trial.judge import Trial


def cores_proved(trial: Trial, codes: set[CodeType]) -> dict[int, Proof]:
    """The proofs of the functions that sample, by the ids of their codes, as far as these codes are among them.

    A function counts only if the layer reaches the functions that it calls by way of it alone.
    """
    from vitkern.compat import cores  # its trials use this module

    found: dict[int, Proof] = {}
    for function in trial.functions if codes and not trial.is_core else ():
        core = cores.core_of(function)
        if core is None or not core.roles:
            continue
        proof = cores.replacement_of(core).proof
        own = {id(each.__code__) for each in proof.functions} | {id(function.__code__)}
        if proof.holds and not _others_use(trial, own, function):
            nested = (
                inner for each in (function, *proof.functions) for inner in functions.codes_in(each.__code__)
            )
            found.update((id(each), proof) for each in nested)
    return {key: proof for key, proof in found.items() if key in set(map(id, codes))}


def _others_use(trial: Trial, own: set[int], core: FunctionType) -> bool:
    """Whether the layer or code outside of a function that samples refers to one of its inner functions."""
    values: list[Any] = list(vars(trial.layer).values())
    for function in trial.functions:
        if id(function.__code__) not in own:
            scope = function.__globals__
            values += [scope.get(name) for name in names_of(function.__code__)]
            values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            values += map(functions.content, function.__closure__ or ())
    used = (functions.undone(getattr(value, "func", value)) for value in values)
    return any(
        isinstance(value, FunctionType) and value is not core and id(value.__code__) in own for value in used
    )
