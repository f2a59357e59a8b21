# SPDX-License-Identifier: Apache-2.0
"""Coverage of a trial: code that no trial ran is not proved to do the same as the kernel.

A way that no trial took is harmless if it only raises, if it only warns, or if its condition is settled: the values
that the condition reads are the same in each later call. All others are gaps.
"""

from __future__ import annotations

import dis
import linecache
import sys
from collections.abc import Callable, Container, Iterator
from functools import lru_cache
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

from vitkern.compat.trial.flow import CONDITIONAL, NAMES, Flow, Step, flow_of
from vitkern.compat.trial.harmless import only_raises, only_warns, same_ways
from vitkern.compat.trial.stack import UNKNOWN, Read, operands_of

Tracer = Callable[[FrameType, str, Any], Any]
JUMPS = frozenset(number for op, number in dis.opmap.items() if NAMES.get(op, op) in CONDITIONAL)
DEVICES = ("cpu", "cuda", "meta")  # the kernels' own, and that of tensors without numbers
ANNOTATIONS = "__annotate__"  # CPython 3.14 calls it for the annotations


class Leaf(NamedTuple):
    """A value that a condition reads."""

    kind: str  # "attribute" of self, "global", "local", "optional": a local compared with None, "other"
    name: str  # self.method.x -> "method"; a global with its attributes, "torch.cuda.is_available"; a local
    types: frozenset[type] = frozenset()  # of a local: those seen there; object if one was not seen


class Gap(NamedTuple):
    """Code that no trial ran, and that may have any effect."""

    code: CodeType
    line: int
    text: str
    why: str


class _Ran:
    """The part of one code object that ran."""

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.pairs: set[tuple[int, int]] = set()  # offsets of instructions that ran one after the other
        # Offset of a conditional jump -> local -> its types there. Caches look like jumps, but nothing stops there.
        raw = code.co_code
        self.types: dict[int, dict[str, set[type]]] = {
            offset: {} for offset in range(0, len(raw), 2) if raw[offset] in JUMPS
        }
        for offset in [*self.types]:  # CPython stops at the EXTENDED_ARG before a jump, not at the jump
            before = offset - 2
            while before >= 0 and raw[before] == dis.EXTENDED_ARG:
                self.types[before] = self.types[offset]
                before -= 2

    def add(self, other: _Ran) -> None:
        self.pairs |= other.pairs
        for offset, names in other.types.items():
            for name, types in names.items():
                self.types[offset].setdefault(name, set()).update(types)

    def follow(self, last: int) -> Tracer:
        pairs, types = self.pairs, self.types

        def step(frame: FrameType, event: str, arg: Any) -> Tracer:
            nonlocal last
            if event == "opcode":
                offset = frame.f_lasti
                pairs.add((last, offset))
                last = offset
                if offset in types:
                    seen = types[offset]
                    for name, value in frame.f_locals.items():
                        seen.setdefault(name, set()).add(type(value))
            return step

        return step


class Coverage:
    """The instructions and the ways out of each jump that ran, over all frames that belong.

    It may be entered many times, and adds up all runs. It traces the thread that entered it.
    """

    def __init__(self, belongs: Callable[[FrameType], bool]) -> None:
        self.codes: dict[CodeType, dict[str, Any]] = {}
        self._ran: dict[int, _Ran] = {}  # by id: equal code objects may stand in two modules
        self._belongs = belongs
        self._earlier: list[Any] = []

    def __enter__(self) -> Coverage:
        self._earlier.append(sys.gettrace())
        # CPython 3.12 reads this frame's flag when it decides whether there are events for instructions.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._called)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(self._earlier.pop())

    def _called(self, frame: FrameType, event: str, arg: Any) -> Tracer | None:
        code = frame.f_code
        if code is Coverage.__exit__.__code__ or not self._belongs(frame):
            return None
        ran = self._ran.get(id(code))
        if ran is None:
            ran = self._ran[id(code)] = _Ran(code)
            self.codes[code] = frame.f_globals
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        # CPython 3.13 would set it only after this call, and then have no events for instructions in a first call.
        frame.f_trace = tracer = ran.follow(frame.f_lasti)
        return tracer

    def update(self, other: Coverage) -> None:
        """Adds the coverage of other runs."""
        for key, ran in other._ran.items():
            self._ran.setdefault(key, _Ran(ran.code)).add(ran)
        self.codes.update(other.codes)

    def ran(self, code: CodeType, offset: int) -> bool:
        """Whether this instruction ran."""
        ran = self._ran.get(id(code))
        return ran is not None and any(at == offset for _, at in ran.pairs)

    def gaps(self, settled: Callable[[CodeType, Leaf], bool], raised: Coverage | None = None) -> list[Gap]:
        """The first line of each way that no trial took and that is not harmless.

        `raised`: runs that ended in an exception. Ways that only these took are harmless to a caller who never takes
        them; so is the code after them.
        """
        found: dict[tuple[int, int], Gap] = {}
        for key, ran in self._ran.items():
            ended = raised._ran.get(key) if raised is not None else None
            for line, why in _Report(ran, settled, self._ran, ended).gaps():
                found.setdefault((id(ran.code), line), Gap(ran.code, line, text_of(ran.code, line), why))
        return list(found.values())


def text_of(code: CodeType, line: int) -> str:
    text = linecache.getline(code.co_filename, line).strip()
    return text or f"line {line} of {code.co_filename}"


@lru_cache(maxsize=512)
def conditions(code: CodeType) -> dict[int, frozenset[Read]]:
    """The values that the condition of each conditional jump reads, by the step of the jump."""
    operands = operands_of(code)
    found = {}
    for index, step in enumerate(flow_of(code).steps):
        if step.op in CONDITIONAL:
            items = operands[index]
            found[index] = items[-1].reads if items else frozenset({UNKNOWN})
    return found


class _Report:
    """The part of one code object that did not run."""

    def __init__(
        self, ran: _Ran, settled: Callable[[CodeType, Leaf], bool], others: Container[int], ended: _Ran | None
    ) -> None:
        self.code, self.types, self.settled, self.others = ran.code, ran.types, settled, others
        self.flow = flow_of(ran.code)
        self.entered = any(self.flow.at[offset] == 0 for _, offset in ran.pairs)
        self.taken, self.reached = _taken(self.flow, ran.pairs)
        self.ended: dict[int, int] = {}  # the last step of each block before an exception
        if ended is not None:
            taken, self.ended = _taken(self.flow, ended.pairs)
            self.taken |= taken
            for number, last in self.ended.items():
                self.reached[number] = max(last, self.reached.get(number, -1))

    def gaps(self) -> Iterator[tuple[int, str]]:
        if not self.entered:
            yield self.code.co_firstlineno, "the trials did not see all of it"
        for number, reached in sorted(self.reached.items()):
            block = self.flow.blocks[number]
            raised = self.ended.get(number) == reached
            if reached < block.last and not raised and not only_raises(self.flow, number):
                yield self._line(reached + 1), "no trial ran this to its end"
            for way in block.ways if reached == block.last else ():
                if (number, way) not in self.taken and not self._harmless(number, way):
                    yield self._line(block.last), f"no trial went on from here to line {self._way_line(way)}"
            for handler in block.handlers:
                if handler not in self.reached and not only_raises(self.flow, handler):
                    yield self._handler_line(handler), "no trial raised what this handles"
            yield from self._never_called(block.first, reached)

    def _never_called(self, first: int, last: int) -> Iterator[tuple[int, str]]:
        for step in self.flow.steps[first : last + 1]:
            # Not step.value: the steps may come from an equal code object.
            inner = self.code.co_consts[step.arg or 0] if step.op == "LOAD_CONST" else None
            if isinstance(inner, CodeType) and id(inner) not in self.others and inner.co_name != ANNOTATIONS:
                yield inner.co_firstlineno, f"no trial called {inner.co_name}"

    def _harmless(self, number: int, way: int) -> bool:
        flow, block = self.flow, self.flow.blocks[number]
        if only_raises(flow, way):
            return True
        step = flow.steps[block.last]
        if step.op not in CONDITIONAL:
            return False
        # A loop that ended in no run may end because of more than the values that it loops over.
        ends = step.op == "FOR_ITER" and way != block.ways[0]
        if (not ends and self._settled(block.last)) or self._taken_in_copy(number, way):
            return True
        if self._asks_for_other_device(block.last):
            return True
        if not step.op.startswith("POP_JUMP_"):
            return False
        others = [other for other in block.ways if other != way]
        return any(only_warns(flow, way, other) or only_warns(flow, other, way) for other in others)

    def _settled(self, jump: int) -> bool:
        types = self.types.get(self.flow.steps[jump].offset, {})
        for kind, name in conditions(self.code)[jump]:
            seen = frozenset(types.get(name, ())) or frozenset({object})
            leaf = Leaf(kind, name, seen if kind == "local" else frozenset())
            if kind == "local" and self._asks_for_none(jump):
                leaf = leaf._replace(kind="optional")
            if kind == "other" or not self.settled(self.code, leaf):
                return False
        return True

    def _asks_for_none(self, jump: int) -> bool:
        """Whether a condition compares a local with None."""
        test = [op for op, _ in _test(self.code, jump) or ()]
        if self.flow.steps[jump].op.endswith("_NONE"):
            return len(test) == 1 and test[0].startswith("LOAD_FAST")
        return len(test) == 3 and test[0].startswith("LOAD_FAST") and test[1:] == ["LOAD_CONST", "IS_OP"]

    def _asks_for_other_device(self, jump: int) -> bool:
        """Whether a condition compares a device's type with types that no call on a kernel has."""
        steps = _steps_of_test(self.code, jump) or ()
        *path, given, comparison = (
            [(step.op, step.value) for step in steps] if len(steps) > 4 else [("", "")] * 5
        )
        if path[-2:] != [("LOAD_ATTR", "device"), ("LOAD_ATTR", "type")] or given[0] != "LOAD_CONST":
            return False
        named = {given[1]} if isinstance(given[1], str) else set(given[1] or ())
        plain = all(op in ("LOAD_FAST", "LOAD_ATTR") for op, _ in path)
        return plain and comparison[0] in ("COMPARE_OP", "CONTAINS_OP") and named.isdisjoint(DEVICES)

    def _taken_in_copy(self, number: int, way: int) -> bool:
        """Whether a copy of the condition took the way: CPython writes a while loop's before and after the body."""
        flow, block = self.flow, self.flow.blocks[number]
        line, test = flow.steps[block.last].line, _test(self.code, block.last)
        for copy, other in enumerate(flow.blocks):
            if copy == number or len(other.ways) < 2 or flow.steps[other.last].line != line:
                continue
            if (
                test is not None
                and _test(self.code, other.last) == test
                and same_ways(flow, block.ways, other.ways)
            ):
                taken = [to for to in other.ways if (copy, to) in self.taken]
                if any(same_ways(flow, (way,), (to,)) for to in taken):
                    return True
        return False

    def _line(self, index: int) -> int:
        return self.flow.steps[index].line or self.code.co_firstlineno

    def _way_line(self, way: int) -> int:
        return self._line(self.flow.blocks[way].first)

    def _handler_line(self, handler: int) -> int:
        """The line of a handler. Its first instruction has the line of `try`, or none."""
        first = self.flow.blocks[handler].first
        return self._line(first + (self.flow.steps[first].op == "PUSH_EXC_INFO"))


def _test(code: CodeType, jump: int) -> tuple[Any, ...] | None:
    """The instructions that compute the condition of a jump, if they are known."""
    steps = _steps_of_test(code, jump)
    return None if steps is None else tuple(step.does for step in steps)


def _steps_of_test(code: CodeType, jump: int) -> tuple[Step, ...] | None:
    items = operands_of(code)[jump]
    return flow_of(code).steps[items[-1].start : jump] if items and items[-1].start >= 0 else None


def _taken(flow: Flow, pairs: set[tuple[int, int]]) -> tuple[set[tuple[int, int]], dict[int, int]]:
    """The ways between blocks that were taken, and the last step that ran in each block."""
    taken: set[tuple[int, int]] = set()
    reached: dict[int, int] = {}
    for before, offset in pairs:
        index = flow.at[offset]
        to = flow.block_of[index]
        reached[to] = max(reached.get(to, -1), index)
        last = -1 if before < 0 else flow.yielded.get(before, flow.at[before])
        if last < 0:
            continue
        source = flow.block_of[last]
        block = flow.blocks[source]
        if index == flow.blocks[to].first and to in block.ways and (source != to or last == block.last):
            taken.add((source, to))
            reached[source] = block.last
    return taken, reached
