# SPDX-License-Identifier: Apache-2.0
"""Ways through a function that cannot change its result: those that only raise, and those that only warn."""

from __future__ import annotations

from vitkern.compat.trial.flow import ALWAYS, CONDITIONAL, RAISES, RETURNS, Flow, Step, words
from vitkern.compat.trial.stack import (
    ATTRIBUTES,
    CALLS,
    CONSTANTS,
    LOADS,
    NB_INPLACE,
    NB_SUBSCR,
    Item,
    callee,
    operands_of,
)

LOGGERS = frozenset({"warnings", "logging", "logger", "_logger", "LOGGER", "_LOGGER", "log", "LOG"})
FUNCTIONS = frozenset({"warn", "print"})
# Code may build a message with these.
BUILTINS = words(
    "bool dict float format getattr hasattr int isinstance len list max min repr round set sorted "
    "str sum tuple type"
)
METHODS = frozenset({"format", "join", "size", "dim", "numel", "element_size", "is_contiguous"})
# These only read.
READING = (
    (LOADS - {"LOAD_FAST_AND_CLEAR"})
    | CONSTANTS
    | ATTRIBUTES
    | words(
        "COMPARE_OP IS_OP CONTAINS_OP TO_BOOL FORMAT_VALUE FORMAT_SIMPLE FORMAT_WITH_SPEC CONVERT_VALUE "
        "PUSH_NULL PRECALL KW_NAMES LIST_EXTEND LIST_TO_TUPLE CALL_INTRINSIC_1 DICT_MERGE"
    )
)
OPPOSITES = {"TRUE": "FALSE", "FALSE": "TRUE", "NONE": "NOT_NONE", "NOT_NONE": "NONE"}
HANDS_OUT = RETURNS | {"YIELD_VALUE"}


def only_raises(flow: Flow, start: int) -> bool:
    """Whether an exception ends each way from this block on. One that a handler catches does not end it."""
    seen: set[int] = set()
    todo = [start]
    raises = False
    while todo:
        number = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        block = flow.blocks[number]
        ops = {step.op for step in flow.steps[block.first : block.last + 1]}
        if ops & HANDS_OUT:
            return False
        raises = raises or bool(ops & RAISES)
        todo += [*block.ways, *block.handlers]
    return raises


def only_warns(flow: Flow, start: int, goal: int) -> bool:
    """Whether each way from one block leads to the other, and only warns, logs or prints."""
    seen: set[int] = set()
    todo = [start]
    while todo:
        number = todo.pop()
        if number in seen:
            return False  # a loop
        seen.add(number)
        block = flow.blocks[number]
        rest = _after_warnings(flow, block.first, block.last)
        if _same_code(flow, rest, flow.blocks[goal].first):
            continue
        if (
            rest <= block.last
            and flow.steps[rest].op not in ALWAYS
            and not _only_tests(flow, rest, block.last)
        ):
            return False
        if not block.ways:
            return False
        todo += block.ways
    return True


def same_ways(flow: Flow, some: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether the two groups of blocks do the same, in any order: CPython copies short ends of functions."""

    def among(way: int, ways: tuple[int, ...]) -> bool:
        return any(_same_code(flow, flow.blocks[way].first, flow.blocks[to].first) for to in ways)

    return all(among(way, others) for way in some) and all(among(way, some) for way in others)


def _same_code(flow: Flow, one: int, two: int, depth: int = 8) -> bool:
    """Whether the code from either step on is the same. `depth` limits the conditions that are compared."""
    for _ in flow.steps:
        one, two = _landing(flow, one), _landing(flow, two)
        if one == two:
            return True
        if max(one, two) >= len(flow.steps):
            return False
        here, there = flow.steps[one], flow.steps[two]
        if here.op in CONDITIONAL and depth:
            some, others = _decided(flow, one), _decided(flow, two)
            return some.keys() == others.keys() and all(
                _same_code(flow, some[key], others[key], depth - 1) for key in some
            )
        if here.does != there.does or here.op in RAISES or here.op in CONDITIONAL:
            return False
        if here.op in RETURNS:
            return True
        one, two = one + 1, two + 1
    return False


def _decided(flow: Flow, jump: int) -> dict[str, int]:
    """The step after a conditional jump, for either outcome."""
    step = flow.steps[jump]
    test, _, outcome = step.op.rpartition("IF_")
    other = OPPOSITES.get(outcome)
    if test != "POP_JUMP_" or other is None:
        return {f"{jump}": jump}
    return {outcome: flow.at[step.value], other: jump + 1}


def _landing(flow: Flow, index: int) -> int:
    """The target of a chain of jumps."""
    for _ in flow.steps:
        if index >= len(flow.steps) or flow.steps[index].op not in ALWAYS:
            break
        index = flow.at[flow.steps[index].value]
    return index


def _after_warnings(flow: Flow, first: int, last: int) -> int:
    """The step after the statements at the start of this range that only warn."""
    operands = operands_of(flow.code)
    height, done, calls = 0, first, []
    for index in range(first, last + 1):
        step = flow.steps[index]
        height += step.effect
        if step.op in CALLS:
            calls.append(callee(operands[index]))
        elif step.op == "POP_TOP" and height == 0:
            *inner, outer = calls or [None]
            if not _is_warning(outer) or not all(map(_builds_message, inner)):
                break
            done, calls = index + 1, []
        elif height <= 0 or not _reads(step):
            break
    return done


def _only_tests(flow: Flow, first: int, last: int) -> bool:
    height = 0
    for step in flow.steps[first:last]:
        height += step.effect
        if height <= 0 or not _reads(step):
            return False
    return height == 1 and flow.steps[last].op.startswith("POP_JUMP_")


def _reads(step: Step) -> bool:
    if step.op == "BINARY_OP":
        return step.arg == NB_SUBSCR or (step.arg or 0) < NB_INPLACE
    return step.op in READING or step.op.startswith(("UNARY_", "BINARY_", "BUILD_"))


def _is_warning(called: Item | None) -> bool:
    if called is None or called.chain is None or called.root is None or called.root[0] != "global":
        return False
    first, *attributes = called.chain.split(".")
    return first in (LOGGERS if attributes else FUNCTIONS)


def _builds_message(called: Item | None) -> bool:
    if called is None:
        return False
    name = called.chain
    if name is not None and called.root is not None and called.root[0] == "global":
        return name in BUILTINS
    return name is not None and name.rpartition(".")[2] in METHODS
