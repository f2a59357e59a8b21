# SPDX-License-Identifier: Apache-2.0
"""The origin of each value that an instruction takes: the stack of the bytecode, without running it."""

from __future__ import annotations

import sys
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

from vitkern.compat.trial.flow import Flow, Step, flow_of, words

Read = tuple[str, str]  # kind and name of a Leaf
UNKNOWN: Read = ("other", "")

LOADS = frozenset({"LOAD_FAST", "LOAD_FAST_AND_CLEAR", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF"})
CONSTANTS = frozenset({"LOAD_CONST", "LOAD_SMALL_INT", "LOAD_COMMON_CONSTANT", "LOAD_ASSERTION_ERROR"})
ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
SUBSCRIPTS = frozenset({"BINARY_SUBSCR", "BINARY_SLICE"})
NB_SUBSCR, NB_INPLACE = 26, 13  # arguments of BINARY_OP: x[i], and the first of those that write in place
CALLS = frozenset({"CALL", "CALL_KW", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX", "CALL_METHOD"})
# Each takes some values and leaves one.
COMBINES = words(
    "COMPARE_OP IS_OP CONTAINS_OP FORMAT_VALUE FORMAT_SIMPLE FORMAT_WITH_SPEC CONVERT_VALUE TO_BOOL LIST_TO_TUPLE "
    "GET_ITER CALL_INTRINSIC_1 MAKE_FUNCTION SET_FUNCTION_ATTRIBUTE"
)
EXTENDS = frozenset({"LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE"})  # a collection below the top
STORES = words(
    "STORE_FAST STORE_NAME STORE_GLOBAL STORE_DEREF STORE_ATTR STORE_SUBSCR STORE_SLICE POP_TOP DELETE_ATTR "
    "DELETE_SUBSCR RETURN_VALUE RAISE_VARARGS"
)
NEUTRAL = words(
    "PRECALL KW_NAMES JUMP_FORWARD JUMP_ABSOLUTE JUMP_BACKWARD POP_BLOCK "
    "JUMP_BACKWARD_NO_INTERRUPT DELETE_FAST DELETE_GLOBAL DELETE_NAME DELETE_DEREF RETURN_CONST "
    "SETUP_ANNOTATIONS"
)
OPERATORS = ("BINARY_", "INPLACE_", "UNARY_", "BUILD_")
ROTATIONS = {"ROT_TWO": 2, "ROT_THREE": 3, "ROT_FOUR": 4}
COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})


class Item(NamedTuple):
    """One value on the stack."""

    reads: frozenset[Read]  # all values that it was made of, except constants
    chain: str | None  # "torch.cuda.is_available", for plain attributes of a name. A constant's name is empty
    root: Read | None  # the name whose value it is part of: kind "global", "local", "self", "free"
    start: int  # the step with which its expression begins, or -1


NOTHING_KNOWN = Item(frozenset({UNKNOWN}), None, None, -1)
NULL = "<NULL>"  # the chain of an empty slot, which CPython leaves beside a callable


@lru_cache(maxsize=512)
def operands_of(code: CodeType) -> tuple[tuple[Item, ...], ...]:
    """For each step the values that it takes, the deepest first; for FOR_ITER the iterator."""
    flow = flow_of(code)
    before = _entries(flow)
    machine = _Machine(code)
    taken: list[tuple[Item, ...]] = [()] * len(flow.steps)
    after: dict[int, list[Item]] = {}
    for number, block in enumerate(flow.blocks):
        machine.stack = list(after.get(before.get(number, -1), []))
        for index in range(block.first, block.last + 1):
            taken[index] = machine.take(index, flow.steps[index])
        after[number] = machine.stack
        following = flow.blocks[number + 1].first if number + 1 < len(flow.blocks) else -1
        if following in block_starts(flow, block.ways) and flow.steps[following].op == "FOR_ITER":
            machine.iterators[following] = machine.stack[-1] if machine.stack else NOTHING_KNOWN
    return tuple(taken)


def block_starts(flow: Flow, ways: tuple[int, ...]) -> list[int]:
    return [flow.blocks[way].first for way in ways]


def _entries(flow: Flow) -> dict[int, int]:
    """The only block before each block. If two meet, or an exception leads there, the stack is not known."""
    sources: dict[int, list[int]] = {}
    for number, block in enumerate(flow.blocks):
        for way in block.ways:
            sources.setdefault(way, []).append(number)
        for handler in block.handlers:
            sources.setdefault(handler, []).extend((-1, -1))
    return {number: found[0] for number, found in sources.items() if len(found) == 1}


class _Machine:
    """Runs only the stack of the bytecode."""

    def __init__(self, code: CodeType) -> None:
        self.stack: list[Item] = []
        self.iterators: dict[int, Item] = {}
        self._cells = frozenset(code.co_cellvars)
        self._free = frozenset(code.co_freevars)
        self._inlined = code.co_name in COMPREHENSIONS
        own = code.co_varnames[: code.co_argcount][:1] == ("self",) or "self" in self._free
        stored = any(step.op == "STORE_FAST" and step.value == "self" for step in flow_of(code).steps)
        self._self = own and not stored

    def take(self, index: int, step: Step) -> tuple[Item, ...]:
        op = step.op
        if op in LOADS:
            self._load(index, step)
        elif op in CONSTANTS:
            self.stack.append(Item(frozenset(), "", None, index))
        elif op == "PUSH_NULL":
            self.stack.append(Item(frozenset(), NULL, None, index))
        elif op in ATTRIBUTES:
            return self._attribute(step)
        elif op in CALLS:
            return self._call(step)
        elif op in COMBINES or op.startswith(OPERATORS) or (op in EXTENDS and step.arg == 1):
            return self._combine(index, step)
        elif op in STORES or op.startswith("POP_JUMP_"):
            return self._pop(-step.effect)
        elif op.startswith("JUMP_IF_") and op.endswith("_OR_POP"):
            # The value stays at the jump's target; two ways meet there, so its stack is not known anyway.
            return self._pop(1)
        elif op == "FOR_ITER":
            self.stack = []
            return (self.iterators.get(index, NOTHING_KNOWN),)
        elif op not in NEUTRAL:
            self._move(op, step.arg or 0)
        return ()

    def _move(self, op: str, arg: int) -> None:
        depth = ROTATIONS.get(op, arg)
        if op in ("DUP_TOP", "COPY"):
            depth = 1 if op == "DUP_TOP" else arg
            self._fill(depth)
            self.stack.append(self.stack[-depth])
        elif op == "DUP_TOP_TWO":
            self._fill(2)
            self.stack += self.stack[-2:]
        elif op in ROTATIONS or op == "ROT_N":
            self._fill(depth)
            self.stack.insert(len(self.stack) - depth, self.stack.pop())
        elif op == "SWAP":
            self._fill(arg)
            self.stack[-arg], self.stack[-1] = self.stack[-1], self.stack[-arg]
        else:  # the stack is not known after any other instruction
            self.stack = []

    def _fill(self, depth: int) -> None:
        self.stack[:0] = [NOTHING_KNOWN] * (depth - len(self.stack))

    def _pop(self, count: int) -> tuple[Item, ...]:
        self._fill(count)
        popped = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return popped

    def _load(self, index: int, step: Step) -> None:
        kind, name = self._kind(step), step.value
        leaf = {"self": ("local", name), "free": ("other", name)}.get(kind, (kind, name))
        item = Item(frozenset({leaf}), name, (kind, name), index)
        if step.effect == 2:  # with an empty slot for a call, which comes below it until CPython 3.12
            pair = [item, Item(frozenset(), NULL, None, index)]
            self.stack += pair if sys.version_info >= (3, 13) else reversed(pair)
        else:
            self.stack.append(item)

    def _kind(self, step: Step) -> str:
        if step.op == "LOAD_GLOBAL":
            return "global"
        if step.value == "self" and self._self:
            return "self"
        if step.value not in self._free:
            return "local"
        return "local" if self._inlined else "free"

    def _attribute(self, step: Step) -> tuple[Item, ...]:
        (owner,) = self._pop(1)
        item = owner._replace(chain=None)
        if owner.chain is not None and owner.chain != NULL:
            chain = f"{owner.chain}.{step.value}"
            reads = owner.reads
            if owner.root is not None and owner.root[0] == "self":
                reads = frozenset({("attribute", chain.split(".")[1])})
            elif owner.root is not None and owner.root[0] == "global":
                reads = frozenset({("global", chain)})
            item = Item(reads, chain, owner.root, owner.start)
        method = step.op == "LOAD_METHOD" or step.effect == 1
        self.stack += [item, Item(frozenset(), NULL, None, owner.start)][: 1 + method]
        return (owner,)

    def _call(self, step: Step) -> tuple[Item, ...]:
        # CPython 3.11 splits a call in two; there PRECALL counts as taking the arguments.
        count = 1 - step.effect
        if step.op == "CALL":
            count = (step.arg or 0) + 2
        popped = self._pop(count)
        reads = _all_reads(popped)
        called = callee(popped)
        if called is not None and called.root is not None and called.root[0] == "self":
            method = (called.chain or "").split(".")
            if len(method) == 2:
                reads |= {("other", f"self.{method[1]}()")}
        self.stack.append(Item(reads, None, None, _start(popped)))
        return popped

    def _combine(self, index: int, step: Step) -> tuple[Item, ...]:
        popped = self._pop(1 - step.effect)
        part_of = step.op in SUBSCRIPTS or (step.op == "BINARY_OP" and step.arg == NB_SUBSCR)
        root = popped[0].root if popped and part_of else None
        self.stack.append(Item(_all_reads(popped), None, root, _start(popped) if popped else index))
        return popped


def callee(popped: tuple[Item, ...]) -> Item | None:
    """The function among the values that a call takes."""
    return next((item for item in popped if item.chain != NULL), None)


def _all_reads(items: tuple[Item, ...]) -> frozenset[Read]:
    return frozenset().union(*(item.reads for item in items))


def _start(items: tuple[Item, ...]) -> int:
    return min((item.start for item in items), default=-1)
