# SPDX-License-Identifier: Apache-2.0
"""The syntax tree of a Python file with positions in its text, without the parts for readers and type checkers."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# Subtrees whose parts are text for people or for the type checker.
_SPEAKS = {
    "print",
    "warn",
    "debug",
    "info",
    "warning",
    "error",
    "log",
    "say",
    "format",
    "join",
    "add_argument",
}


class Finder:
    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.lines = text.splitlines()
        self.parents: dict[ast.AST, ast.AST] = {}

    def offset(self, line: int, column: int) -> int:
        """The offset in the text of a position of ast, which counts in bytes of UTF-8."""
        text = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(text)

    def span(self, node: ast.AST) -> tuple[int, int]:
        node_: ast.expr = node  # type: ignore[assignment]
        assert node_.end_lineno is not None and node_.end_col_offset is not None
        return (
            self.offset(node_.lineno, node_.col_offset),
            self.offset(node_.end_lineno, node_.end_col_offset),
        )

    def source(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def between(self, left: ast.AST, right: ast.AST, symbol: str) -> tuple[int, int] | None:
        """The position of an operator between two operands, if only brackets and spaces surround it."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.text[start:end]
        if "#" in gap or gap.count(symbol) != 1:
            return None
        at = start + gap.index(symbol)
        return at, at + len(symbol)

    def walk(self, node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if not _is_text(node, child):
                self.parents[child] = node
                yield from self.walk(child)

    def function(self, node: ast.AST) -> str:
        """The qualified name of the innermost function whose body the node is in."""
        names: list[str] = []
        child = node
        while (parent := self.parents.get(child)) is not None:
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) and child in parent.body:
                names[:0] = [parent.name, "<locals>"] if names else [parent.name]
            elif isinstance(parent, ast.ClassDef) and names:
                names.insert(0, parent.name)
            child = parent
        return ".".join(names)


def _is_text(parent: ast.AST, child: ast.AST) -> bool:
    if isinstance(child, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(parent, (ast.AnnAssign, ast.arg)) and child is parent.annotation:
        return True
    if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) and child is parent.returns:
        return True
    if isinstance(parent, ast.Assert) and child is parent.msg:
        return True
    if isinstance(parent, ast.If) and "TYPE_CHECKING" in ast.dump(parent.test):
        return True
    if isinstance(child, ast.Call):
        name = getattr(child.func, "attr", getattr(child.func, "id", ""))
        return name in _SPEAKS
    return False


def same_code(one: str, other: str) -> bool:
    """Whether two texts compile to the same bytecode, lines and columns apart. SyntaxError if one does not compile."""
    return _essence(compile(one, "one", "exec", dont_inherit=True)) == _essence(
        compile(other, "one", "exec", dont_inherit=True)
    )


def _essence(code: object) -> object:
    if not hasattr(code, "co_code"):
        return type(code), repr(code)
    constants = tuple(_essence(constant) for constant in code.co_consts)
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    table = getattr(code, "co_exceptiontable", b"")
    return code.co_code, constants, names, code.co_flags, code.co_argcount, code.co_kwonlyargcount, table
