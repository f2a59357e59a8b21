# SPDX-License-Identifier: Apache-2.0
"""The trial itself: a layer is replaced only if every run agrees, and if no way through its code was left out."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from vitkern.compat import forms
from vitkern.compat.trial import functions, power
from vitkern.compat.trial.apart import in_a_thread, said
from vitkern.compat.trial.coverage import Coverage
from vitkern.compat.trial.inputs import aim, core_inputs, layer_inputs
from vitkern.compat.trial.proved import cores_proved
from vitkern.compat.trial.reading import require_no_free_comparison, require_plain_class, require_readable
from vitkern.compat.trial.runs import Outcome, Run, difference, run
from vitkern.compat.trial.settings import BASIC, FURTHER, OF_CORES, Setting, fitted
from vitkern.compat.trial.settled import is_settled
from vitkern.compat.trial.specimen import Draws, Specimen, UnfitError, is_own, is_plain
from vitkern.compat.trial.world import World

Kind = tuple[bool, bool]  # of reference points: boxes, and one for all levels

# Names by which code may depend on a setting without a way of its own.
_DECIDED_BY = {"dtype": {"dtype"}, "card": {"is_cuda", "cuda"}, "on_card": {"is_cuda", "cuda"}}
_trials = 0


def count() -> int:
    """The number of trials in this process."""
    return _trials


class Judgement(NamedTuple):
    """The result of a trial."""

    reason: str | None  # why the layer is left, or None
    candidate: forms.Candidate | None = None
    kinds: frozenset[Kind] = frozenset()  # of reference points that were tried; for others the original runs
    takes_mask: bool = False  # whether a mask was tried too
    attributes: tuple[tuple[str, Any], ...] = ()  # that the code reads, with their values
    codes: tuple[tuple[CodeType, dict[str, Any]], ...] = ()  # that ran, with the globals of each
    reads: frozenset[str] = frozenset()  # all names that were looked up on the layer
    taken: tuple[str, ...] = ()  # compiled functions that were taken as published
    functions: tuple[FunctionType, ...] = ()  # of the user's project that may run
    proved: tuple[Any, ...] = ()  # proofs of functions that sample, which this one rests on


def judge(
    layer: nn.Module,
    kind: type[nn.Module] | None = None,
    seed: int = 0,
    known: tuple[forms.Form, ...] = forms.FORMS,
) -> Judgement:
    """Tries a layer on the CPU, as one of class `kind` if given, with the forms that it may have."""
    global _trials
    _trials += 1
    kind = kind or type(layer)
    try:
        return in_a_thread(lambda: Trial(layer, kind, seed, known).judgement())
    except UnfitError as unfit:
        reason = str(unfit)
    except Exception as error:
        reason = f"its trial ended in {said(error)}"
    code = tuple(functions.reachable(layer, kind))
    return Judgement(reason, codes=tuple((each.__code__, each.__globals__) for each in code), functions=code)


class Trial:
    """A layer on trial."""

    def __init__(
        self, layer: nn.Module, kind: type[nn.Module], seed: int, known: tuple[forms.Form, ...]
    ) -> None:
        self.layer, self.kind, self.seed = layer, kind, seed
        self.original = functions.undone(kind.forward)
        self.functions = list(functions.reachable(layer, kind))
        self.specimen = Specimen(layer, kind, seed)
        self.methods = {
            functions.code_of(each)
            for base in kind.__mro__
            for each in vars(base).values()
            if isinstance(each, FunctionType) and not hasattr(each, "samples")  # a core, which has no self
        }
        require_readable(self)
        channels = {
            name: child._sizes[0]
            for name, child in self.specimen.children.items()
            if child._sizes is not None
        }
        self.candidates = forms.candidates(layer, self.original, channels, known)
        if not self.candidates:
            raise UnfitError(
                f"its forward takes {_arguments(self.original)}: no form with these and its attributes is known"
            )
        first = self.candidates[0]
        self.roles, self.sizes, self.is_core = first.roles, first.sizes, first.form.is_core
        if not self.is_core:
            aim(self.specimen.children["sampling_offsets"], self.sizes, self.specimen.draws)
            self.specimen.heads = self.sizes.heads
        self.coverage, self.raised = Coverage(functions.frame_belongs), Coverage(functions.frame_belongs)
        self.worlds: dict[tuple[bool, bool, bool], World] = {}
        self.runs: list[Run] = []
        self.kinds: set[Kind] = set()
        self.takes_mask = True
        self.proved: list[Any] = []
        self.failed: dict[Kind, Exception] = {}

    def judgement(self) -> Judgement:
        above = max([functions.largest_constant(self.functions), *self._limits()])
        for setting in self._settings():
            self._basic(fitted(setting, self.sizes.heads * sum(self.sizes.points), above))
        if not self.runs:
            raise UnfitError(f"its forward raises in a trial: {said(next(iter(self.failed.values())))}")
        self._complain()
        require_no_free_comparison(self)
        require_plain_class(self)
        candidate = self._best()
        self._further(candidate)
        for code in self.coverage.codes:
            if functions.makes_tables(code):
                raise UnfitError(
                    f"its function {code.co_name} builds a dictionary: no trial looks up all of it"
                )
        power.require_sensitive(self)
        power.require_wrong_forms_to_fail(self, candidate)
        worlds = self.worlds.values()
        return Judgement(
            None,
            candidate,
            frozenset(self.kinds),
            self.takes_mask,
            tuple(self._configuration().items()),
            tuple((code, self._original_globals(scope)) for code, scope in self.coverage.codes.items()),
            frozenset(self.specimen.reads),
            tuple(sorted(set().union(*(world.taken for world in worlds)))),
            tuple(self.functions),
            tuple(self.proved),
        )

    def _settings(self) -> Iterator[Setting]:
        """The settings of all layers, or for a core those of each way to pass locations and weights."""
        ways = self.candidates[0].form.ways
        for flat, merged in ways:
            yield from (each._replace(boxes=flat, one_point=merged) for each in BASIC)
        if not ways:
            yield from BASIC

    def _configuration(self) -> dict[str, Any]:
        """The plain attributes that the code has read, or that it names in a way that no run has taken."""
        return {**dict(self.specimen.attributes()), **self._named_attributes()}

    def _names(self) -> set[str]:
        return set().union(*(functions.names_in(each.__code__) for each in self.functions))

    def _named_attributes(self) -> dict[str, Any]:
        named, own = self._names(), vars(self.layer).items()
        return {name: each for name, each in own if name in named and is_own(name) and is_plain(each)}

    def _limits(self) -> list[int]:
        """Whole numbers among the attributes that may limit sizes, except the numbers of channels."""
        widths = {size for child in self.specimen.children.values() for size in child._sizes or ()}
        numbers = (each for each in self._named_attributes().values() if isinstance(each, int))
        return [each for each in numbers if each <= 4096 and each not in widths]

    def _original_globals(self, scope: dict[str, Any]) -> dict[str, Any]:
        return next(
            (each.originals[id(scope)] for each in self.worlds.values() if id(scope) in each.originals), scope
        )

    # The original

    def _inputs(self, setting: Setting) -> dict[str, Any]:
        draws = Draws(zlib.crc32(repr(setting).encode()) + self.seed)
        parameters = inspect.signature(self.original).parameters
        if self.is_core:
            if not self.candidates[0].form.ways:
                setting = setting._replace(boxes=False, one_point=False, masked=False)
            optional = {role for name, role in self.roles.items() if parameters[name].default is None}
            left_out = frozenset() if setting.optional else frozenset(optional)
            return core_inputs(setting, self.sizes, self.roles, draws, left_out=left_out)
        values = [parameters[name] for name, role in self.roles.items() if role == "value"]
        of_query = (
            not setting.optional and self.candidates[0].form.attends_itself and values[0].default is None
        )
        batch_first = bool(getattr(self.layer, "batch_first", True))
        return layer_inputs(
            setting, self.sizes, self.roles, draws, batch_first=batch_first, of_query=of_query
        )

    def original_run(
        self, setting: Setting, inputs: dict[str, Any], dtype: torch.dtype | None = None
    ) -> Outcome:
        """One run of the original."""
        key = (setting.card, setting.traced, setting.compiled_core)
        world = self.worlds.setdefault(
            key, World(card=setting.card, traced=setting.traced, compiled_core=setting.compiled_core)
        )
        self.specimen.enter({name: world.function(each) for name, each in functions.methods_of(self.kind)})
        return run(world.function(self.original), self.specimen, inputs, setting, dtype or setting.dtype)

    def _exact(self, setting: Setting, inputs: dict[str, Any]) -> Outcome | None:
        if setting.exact:
            return None
        return self.original_run(setting.in_float64(), inputs, torch.float64)

    def _basic(self, setting: Setting) -> None:
        """Makes a run for every layer. It leaves out masks and kinds of reference points that the layer cannot take."""
        if not self.takes_mask:
            setting = setting._replace(masked=False)
        kind = (setting.boxes, setting.one_point)
        if kind in self.failed:
            return
        error = self._attempt(setting)
        if error is None:
            self.kinds.add(kind)
            return
        unsure = setting.masked and not any(each.setting.masked for each in self.runs)
        if unsure and self._attempt(setting._replace(masked=False)) is None:
            self.takes_mask = False
            self.kinds.add(kind)
            return
        if kind in self.kinds:
            raise UnfitError(f"its forward raises with {setting}: {said(error)}")
        self.failed[kind] = error

    def _attempt(self, setting: Setting) -> Exception | None:
        """Makes a run of the original and keeps it; returns the exception if it raises one."""
        inputs, seen = self._inputs(setting), Coverage(functions.frame_belongs)
        try:
            exact = self._exact(setting, inputs)
            with seen:
                outcome = self.original_run(setting, inputs)
        except UnfitError:
            raise
        except Exception as error:
            self.raised.update(seen)
            return error
        finally:
            self._complain()
        self.coverage.update(seen)
        self.runs.append(Run(setting, inputs, outcome, exact))
        return None

    def _complain(self) -> None:
        if reason := self.specimen.complaint():
            raise UnfitError(reason)

    # The replacement

    def _ours(self, candidate: forms.Candidate, setting: Setting, inputs: dict[str, Any]) -> Outcome:
        plain = setting._replace(card=False, on_card=False, traced=False)
        before = set(self.specimen.misses), set(self.specimen.writes)
        try:
            return run(candidate.form.forward, self.specimen, inputs, plain, setting.dtype)
        finally:
            self.specimen.misses, self.specimen.writes = before

    def compare(self, candidate: forms.Candidate, run: Run) -> str | None:
        """The difference between a candidate's kernel and a run of the original, or None."""
        try:
            ours = self._ours(candidate, run.setting, run.inputs)
        except Exception as error:
            return f"the kernel raises with {run.setting}: {said(error)}"
        reason = difference(run.theirs, ours, run.exact, run.setting.rounding)
        return None if reason is None else f"its forward {reason}, with {run.setting}"

    def _best(self) -> forms.Candidate:
        """The candidate that agrees in all runs."""
        reasons: list[tuple[int, str]] = []
        for candidate in self.candidates:
            found = ((number, self.compare(candidate, each)) for number, each in enumerate(self.runs))
            first = next(((number, reason) for number, reason in found if reason is not None), None)
            if first is None:
                return candidate
            reasons.append(first)
        raise UnfitError(max(reasons, key=lambda pair: pair[0])[1])

    def _further(self, candidate: forms.Candidate) -> None:
        """Searches ways that no run has taken under further conditions; the runs must agree there too."""
        base = self.runs[0].setting._replace(
            optional=True
        )  # else the query may be all pixels, which takes longer
        named = self._names()
        for change in (*FURTHER, *(OF_CORES if self.candidates[0].form.ways else ())):
            decided = all(named & _DECIDED_BY.get(what, set()) for what in change)
            if not decided and not self._gaps():
                continue
            setting = base._replace(**change)
            if (setting.boxes, setting.one_point) not in self.kinds:
                continue
            inputs, seen = self._inputs(setting), Coverage(functions.frame_belongs)
            try:
                exact = self._exact(setting, inputs)
                with seen:
                    outcome = self.original_run(setting, inputs)
            except UnfitError:
                raise
            except Exception:  # it cannot run like that: this proves nothing
                continue
            self._complain()
            if reason := self.compare(candidate, Run(setting, inputs, outcome, exact)):
                raise UnfitError(reason)
            self.coverage.update(seen)
        for gap in self._gaps():
            raise UnfitError(f"{gap.why}: line {gap.line}, {gap.text!r}")

    def _gaps(self) -> list[Any]:
        gaps = self.coverage.gaps(partial(is_settled, self), self.raised)
        proved = cores_proved(self, {gap.code for gap in gaps})
        self.proved = list(dict.fromkeys(proved.values()))
        return [gap for gap in gaps if id(gap.code) not in proved]


def _arguments(function: Any) -> str:
    return ", ".join(list(inspect.signature(function).parameters)[1:])
