# SPDX-License-Identifier: Apache-2.0
"""The bytecode of a function as blocks with the ways between them, the same for all versions of CPython."""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any, NamedTuple


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALWAYS = frozenset({"JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"})
RETURNS = frozenset({"RETURN_VALUE", "RETURN_CONST"})
# CPython adds CLEANUP_THROW to `yield from`, for an exception that is thrown into it.
RAISES = frozenset({"RAISE_VARARGS", "RERAISE", "CLEANUP_THROW"})
# These have no effect here, and tracers do not see all of them. CPython jumps over END_FOR, unless a generator ends.
IDLE = words(
    "CACHE EXTENDED_ARG NOP NOT_TAKEN END_FOR RESUME RETURN_GENERATOR GEN_START MAKE_CELL COPY_FREE_VARS"
)
LEAVE_POP = frozenset({"RETURN_GENERATOR", "END_FOR"})  # after these POP_TOP belongs to them
# Names with more detail than is needed here.
NAMES = {
    "LOAD_FAST_BORROW": "LOAD_FAST",
    "LOAD_FAST_CHECK": "LOAD_FAST",
    "LOAD_NAME": "LOAD_GLOBAL",
    **{op: re.sub("_(FORWARD|BACKWARD)_IF_", "_IF_", op) for op in dis.opmap if "_IF_" in op},
}
CONDITIONAL = frozenset(NAMES[op] for op in dis.opmap if "_IF_" in op) | {"FOR_ITER", "SEND"}
PAIRS = {
    "LOAD_FAST_LOAD_FAST": ("LOAD_FAST", "LOAD_FAST"),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": ("LOAD_FAST", "LOAD_FAST"),
    "STORE_FAST_LOAD_FAST": ("STORE_FAST", "LOAD_FAST"),
    "STORE_FAST_STORE_FAST": ("STORE_FAST", "STORE_FAST"),
}
PROTECTS = frozenset({"SETUP_FINALLY", "SETUP_WITH", "SETUP_ASYNC_WITH"})  # CPython 3.10


class Step(NamedTuple):
    """One instruction. An instruction that loads or stores two locals at once becomes two steps."""

    op: str
    arg: int | None
    value: Any
    line: int | None
    offset: int
    effect: int  # on the height of the stack

    @property
    def does(self) -> tuple[str, Any]:
        """A key that is equal for steps with the same effect. Constants differ by index: 1, 1.0 and True are equal."""
        return self.op, self.value if self.op.endswith("_FAST") else self.arg


class Block(NamedTuple):
    """Steps that run one after the other, unless one raises."""

    first: int
    last: int
    ways: tuple[
        int, ...
    ]  # the blocks that may follow. After a conditional jump: the next one, then its target
    handlers: tuple[int, ...]  # the blocks that an exception leads to


class Flow(NamedTuple):
    code: CodeType
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    at: dict[int, int]  # offset of an instruction -> its step, or the next one if it has no effect
    block_of: tuple[int, ...]  # step -> its block
    yielded: dict[int, int]  # offset where a generator resumes -> the step that yielded


@lru_cache(maxsize=512)
def instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    """The instructions of a code object, or of an equal one."""
    return tuple(dis.get_instructions(code))


@lru_cache(maxsize=512)
def flow_of(code: CodeType) -> Flow:
    steps, at, yielded = _steps(code)
    guards = _guards(code, steps, at)
    first = _leaders(steps, at, guards)
    block_of, current = [], -1
    for index in range(len(steps)):
        current += index in first
        block_of.append(current)
    starts = [*sorted(first), len(steps)]
    swallows = "suppress" in code.co_names
    blocks = []
    for start, stop in pairwise(starts):
        ways = tuple(dict.fromkeys(block_of[i] for i in _ways(steps, at, start, stop - 1, swallows)))
        handlers = dict.fromkeys(block_of[h] for i in range(start, stop) for h in guards.get(i, ()))
        blocks.append(Block(start, stop - 1, ways, tuple(handlers)))
    return Flow(code, tuple(steps), tuple(blocks), at, tuple(block_of), yielded)


def _steps(code: CodeType) -> tuple[list[Step], dict[int, int], dict[int, int]]:
    lines = {start: line for start, _, line in code.co_lines()}
    steps: list[Step] = []
    at: dict[int, int] = {}
    yielded: dict[int, int] = {}
    line, before = None, ""
    for offset, op, arg, value, effect in _instructions(code):
        line = lines.get(offset, line)
        at[offset] = len(steps)
        idle = op in IDLE or (op == "POP_TOP" and before in LEAVE_POP)
        before = op
        if op == "RESUME":
            yielded[offset] = len(steps) - 1
        if idle:
            continue
        if op in PAIRS:
            for half, name in zip(PAIRS[op], value):
                steps.append(Step(half, arg, name, line, offset, 1 if half == "LOAD_FAST" else -1))
        else:
            steps.append(Step(NAMES.get(op, op), arg, value, line, offset, effect))
    return steps, at, yielded


def _instructions(code: CodeType) -> Iterator[tuple[int, str, int | None, Any, int]]:
    for step in instructions(code):
        arg = step.arg if step.opcode >= dis.HAVE_ARGUMENT else None
        yield step.offset, step.opname, arg, step.argval, dis.stack_effect(step.opcode, arg, jump=False)


def _target(step: Step, at: dict[int, int]) -> int:
    return at[step.value]


def _ways(steps: list[Step], at: dict[int, int], first: int, last: int, swallows: bool) -> list[int]:
    step = steps[last]
    if step.op in RETURNS or step.op in RAISES:
        return []
    if step.op in ALWAYS:
        return [_target(step, at)]
    if step.op not in CONDITIONAL:
        return [last + 1] if last + 1 < len(steps) else []
    # A context manager that swallows exceptions has its own code for that, unless it is contextlib's.
    if not swallows and any(steps[i].op == "WITH_EXCEPT_START" for i in range(first, last)):
        return [last + 1]
    return [last + 1, _target(step, at)]


def _leaders(steps: list[Step], at: dict[int, int], guards: dict[int, tuple[int, ...]]) -> set[int]:
    first = {0}
    for index, step in enumerate(steps):
        if step.op in CONDITIONAL or step.op in ALWAYS:
            first |= {index + 1, _target(step, at)}
        elif step.op in RETURNS or step.op in RAISES:
            first.add(index + 1)
        if guards.get(index, ()) != guards.get(index - 1, ()):
            first |= {index, *guards.get(index, ())}
    first.discard(len(steps))
    return first


def _guards(code: CodeType, steps: list[Step], at: dict[int, int]) -> dict[int, tuple[int, ...]]:
    """Step -> the step of the handler that an exception in it leads to, if the function has one."""
    if sys.version_info < (3, 11):
        return _guards_on_stack(steps, at)
    guards = {}
    for entry in dis.Bytecode(code).exception_entries:  # type: ignore[attr-defined,unused-ignore]
        for index in range(at[entry.start], at.get(entry.end, len(steps))):
            guards[index] = (at[entry.target],)
    return guards


def _guards_on_stack(steps: list[Step], at: dict[int, int]) -> dict[int, tuple[int, ...]]:
    """The guards in CPython 3.10, which keeps the handlers on a stack. None stands for a running handler."""
    guards: dict[int, tuple[int, ...]] = {}
    seen: set[int] = set()
    todo: list[tuple[int, tuple[int | None, ...]]] = [(0, ())]
    while todo:
        index, stack = todo.pop()
        if index in seen or index >= len(steps):
            continue
        seen.add(index)
        step = steps[index]
        top = next((handler for handler in reversed(stack) if handler is not None), None)
        if top is not None:
            guards[index] = (top,)
        if step.op in PROTECTS:
            handler = _target(step, at)
            todo.append((handler, (*stack, None)))
            stack = (*stack, handler)
        elif step.op in ("POP_BLOCK", "POP_EXCEPT"):
            stack = stack[:-1]
        if step.op in CONDITIONAL or step.op in ALWAYS:
            todo.append((_target(step, at), stack))
        if step.op not in ALWAYS and step.op not in RETURNS and step.op not in RAISES:
            todo.append((index + 1, stack))
    return guards
