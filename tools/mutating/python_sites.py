# SPDX-License-Identifier: Apache-2.0
"""The mutations that the rules allow in a Python file. Strings, annotations and error messages are not mutated."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from tools.mutating.mutation import Mutation
from tools.mutating.python_text import Finder

_SIGNS: dict[type, str] = {ast.Add: "-", ast.Sub: "+"}
_SYMBOLS: dict[type, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.And: "and",
    ast.Or: "or",
}
_BOUNDS: dict[type, str] = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_OPPOSITES: dict[type, str] = {
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.And: "or",
    ast.Or: "and",
}
_DTYPES = {
    "float64": "float32",
    "float32": "float16",
    "float16": "bfloat16",
    "bfloat16": "float16",
    "int64": "int32",
    "int32": "int64",
}
_CASTS = {"float", "double", "half", "to", "type_as", "long"}
_BARRIERS = {"detach", "contiguous", "clone"}
_CONTEXTS = ("no_grad", "inference_mode", "lock", "enable_grad", "autocast", "device", "deterministic")
_AXES = {"transpose", "permute", "flatten", "size", "unsqueeze", "squeeze", "movedim", "stride", "unflatten"}
_FIXED = {"isinstance", "issubclass", "getattr", "setattr", "hasattr", "cast"}  # a swap always raises
_EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
Found = tuple[str, int, int, str]  # rule, start, end, new text


def _is_sequence(node: ast.AST) -> bool:
    return isinstance(node, (ast.List, ast.Tuple, ast.JoinedStr, ast.ListComp)) or (
        isinstance(node, ast.Constant) and not isinstance(node.value, (int, float))
    )


def _binary(finder: Finder, node: ast.BinOp) -> Iterator[Found]:
    symbol = _SYMBOLS.get(type(node.op))
    if symbol is None or _is_sequence(node.left) or _is_sequence(node.right):
        return
    place = finder.between(node.left, node.right, symbol)
    if place is not None and type(node.op) in _SIGNS:
        yield "sign", *place, _SIGNS[type(node.op)]
    start, end = finder.span(node)
    yield "dropped term", start, end, finder.source(node.left)


def _unary(finder: Finder, node: ast.UnaryOp) -> Iterator[Found]:
    start, end = finder.span(node)
    if isinstance(node.op, ast.USub) and not isinstance(finder.parents[node], (ast.Subscript, ast.Slice)):
        yield "sign", start, end, finder.source(node.operand)
    if isinstance(node.op, ast.Not):
        yield "mask", start, end, finder.source(node.operand)


def _augmented(finder: Finder, node: ast.AugAssign) -> Iterator[Found]:
    start, end = finder.span(node)
    symbol = _SYMBOLS.get(type(node.op))
    if type(node.op) in _SIGNS and not _is_sequence(node.value):
        place = finder.between(node.target, node.value, f"{symbol}=")
        if place is not None:
            yield "sign", *place, f"{_SIGNS[type(node.op)]}="
    yield "dropped term", start, end, "pass"


def _next(finder: Finder, node: ast.AST | None) -> Iterator[Found]:
    """A constant whose magnitude is larger by one."""
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    number = node.operand if negative else node  # type: ignore[union-attr]
    if isinstance(number, ast.Constant) and type(number.value) is int:
        value = -number.value if negative else number.value
        start, end = finder.span(node)  # type: ignore[arg-type]
        yield "index", start, end, str(value - 1 if value < 0 else value + 1)


def _subscript(finder: Finder, node: ast.Subscript) -> Iterator[Found]:
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for part in parts:
        if isinstance(part, ast.Slice):
            yield from _next(finder, part.lower)
            yield from _next(finder, part.upper)
            if isinstance(part.upper, ast.Name):
                start, end = finder.span(part.upper)
                yield "bound", start, end, f"{part.upper.id} - 1"
        else:
            yield from _next(finder, part)


def _compare(finder: Finder, node: ast.Compare) -> Iterator[Found]:
    operands = [node.left, *node.comparators]
    for left, op, right in zip(operands, node.ops, operands[1:]):
        symbol = _SYMBOLS[type(op)]
        place = finder.between(left, right, symbol)
        if place is not None and type(op) in _BOUNDS:
            yield "bound", *place, _BOUNDS[type(op)]
        elif place is not None:
            yield "mask", *place, _OPPOSITES[type(op)]


def _bool(finder: Finder, node: ast.BoolOp) -> Iterator[Found]:
    place = finder.between(node.values[0], node.values[1], _SYMBOLS[type(node.op)])
    if place is not None and len(node.values) == 2:
        yield "mask", *place, _OPPOSITES[type(node.op)]
    start, end = finder.span(node)
    kept_end = finder.span(node.values[-2])[1]
    if finder.text[start:kept_end].count("(") == finder.text[start:kept_end].count(")"):
        yield "dropped term", start, end, finder.text[start:kept_end]


def _if(finder: Finder, node: ast.If | ast.IfExp) -> Iterator[Found]:
    start, end = finder.span(node.test)
    yield "mask", start, end, f"not ({finder.source(node.test)})"


def _with(finder: Finder, node: ast.With) -> Iterator[Found]:
    first, last = node.items[0], node.items[-1]
    source = finder.source(first.context_expr)
    if len(node.items) == 1 and first.optional_vars is None and any(name in source for name in _CONTEXTS):
        start = finder.span(node)[0]
        end = finder.span(last.context_expr)[1]
        yield "barrier", start, end, "if True"


def _call(finder: Finder, node: ast.Call) -> Iterator[Found]:
    start, end = finder.span(node)
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if isinstance(node.func, ast.Attribute):
        receiver = finder.source(node.func.value)
        is_module = receiver in ("torch", "tl", "F", "math", "np")
        if name in _CASTS and not is_module:
            yield "dtype", start, end, receiver
        if name in _BARRIERS and not is_module:
            yield "barrier", start, end, receiver
    if name in _EXTREMES and node.args:
        func_end = finder.span(node.func)[1]
        yield "bound", func_end - len(name), func_end, _EXTREMES[name]
    if name == "range":
        at_start, at_end = finder.span(node.args[min(1, len(node.args) - 1)])
        yield "bound", at_end, at_end, " - 1"
    if name in _AXES:
        for argument in node.args:
            yield from _next(finder, argument)
    yield from _arguments(finder, node, name)


def _arguments(finder: Finder, node: ast.Call, name: str) -> Iterator[Found]:
    pair = node.args[-2:] if name == "where" else node.args[:2]
    if len(pair) == 2 and name not in _FIXED and not any(isinstance(each, ast.Starred) for each in pair):
        first, second = pair
        alike = isinstance(first, ast.Name) and isinstance(second, ast.Name)
        if (alike or name == "where") and finder.source(first) != finder.source(second):
            (start, middle), (again, end) = finder.span(first), finder.span(second)
            swapped = finder.source(second) + finder.text[middle:again] + finder.source(first)
            yield "mask" if name == "where" else "index", start, end, swapped
    for keyword in node.keywords:
        if keyword.arg in ("dim", "axis"):
            yield from _next(finder, keyword.value)
        elif keyword.arg is not None and (node.args or len(node.keywords) > 1):
            start, end = finder.span(keyword)
            behind = len(finder.text[end:]) - len(finder.text[end:].lstrip(", \n"))
            after = finder.text[end : end + behind]
            rule = "mask" if keyword.arg == "mask" else "dtype" if keyword.arg == "dtype" else "dropped term"
            if "," in after:
                yield rule, start, end + len(after) - len(after.lstrip(", ")), ""
            else:
                before = finder.text[:start].rstrip()
                if before.endswith(","):
                    yield rule, len(before) - 1, end, ""


def _attribute(finder: Finder, node: ast.Attribute) -> Iterator[Found]:
    if node.attr in _DTYPES and isinstance(node.value, ast.Name) and node.value.id in ("torch", "tl", "np"):
        end = finder.span(node)[1]
        yield "dtype", end - len(node.attr), end, _DTYPES[node.attr]


def _statement(finder: Finder, node: ast.Expr) -> Iterator[Found]:
    if isinstance(node.value, ast.Call):
        start, end = finder.span(node)
        rule = "barrier" if "barrier" in finder.source(node) or "synchronize" in finder.source(node) else None
        yield rule or "dropped term", start, end, "pass"


_METHODS: dict[type, Callable[[Finder, ast.AST], Iterator[Found]]] = {  # type: ignore[assignment]
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.AugAssign: _augmented,
    ast.Subscript: _subscript,
    ast.Compare: _compare,
    ast.BoolOp: _bool,
    ast.If: _if,
    ast.IfExp: _if,
    ast.With: _with,
    ast.Call: _call,
    ast.Attribute: _attribute,
    ast.Expr: _statement,
}


def _found(finder: Finder, node: ast.AST) -> Iterator[Found]:
    for kind, method in _METHODS.items():
        if isinstance(node, kind):
            yield from method(finder, node)


def sites(file: str, text: str) -> list[Mutation]:
    """All mutations of a file, in the order of its text."""
    finder = Finder(text)
    all_found: dict[tuple[str, int, int, str], Mutation] = {}
    for node in finder.walk(ast.parse(text)):
        for rule, start, end, after in _found(finder, node):
            before, line = text[start:end], text.count("\n", 0, start) + 1
            function = finder.function(node)
            all_found.setdefault(
                (rule, start, end, after), Mutation(file, rule, start, before, after, line, function)
            )
    return sorted(all_found.values(), key=lambda each: (each.start, each.rule, each.after, each.before))
