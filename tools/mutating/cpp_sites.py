# SPDX-License-Identifier: Apache-2.0
"""The mutations that the rules allow in a C++ or CUDA file, found in the text as clang-format leaves it.

Comments, string literals, preprocessor lines and template parameters are not mutated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.mutating.mutation import Mutation

_HIDDEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'"""
    r"""|^[ \t]*\#(?:[^\n\\]|\\.|\\\n)*|\btemplate <[^\n]*|\bstatic_assert\([^;]*;|\busing namespace[^\n]*""",
    re.DOTALL | re.MULTILINE,
)
_TERM = r"(?:[\w:]|\.(?=\w)|->)+(?:\[[^\[\]\n]*\])?(?:<[\w, :]*>)?(?:\([^()\n]*\))?"
_SWAPS = {
    "sign": {" + ": " - ", " - ": " + ", " += ": " -= ", " -= ": " += "},
    "bound": {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > "},
    "mask": {" && ": " || ", " || ": " && ", " == ": " != ", " != ": " == "},
}
_WORDS = {
    "bound": {"smaller": "larger", "larger": "smaller", "min": "max", "max": "min"},
    "dtype": {
        "int64_t": "int32_t",
        "double": "float",
        "Accumulator<T>": "T",
        "Tile::A": "Tile::T",
        "uint32_t": "uint8_t",
    },
    "index": {
        "row": "column",
        "rows": "columns",
        "column": "row",
        "columns": "rows",
        "batch_stride": "query_stride",
        "query_stride": "batch_stride",
        "level_stride": "query_stride",
        "first": "last",
        "tokens": "channels",
        "pixels": "tokens",
        "queries": "heads",
        "channels": "tokens",
        "batch": "queries",
    },
}
# One pattern for a rule: what `cut` names is replaced by the text behind it.
_PATTERNS: tuple[tuple[str, str, str], ...] = (
    ("sign", r"(?:[(=,?:\[]|return) ?(?P<cut>-)(?=[\w(])", ""),
    ("index", r"[\w)\]]\[(?P<cut>[^\[\]\n;]+)\]", r"(\g<cut>) + 1"),
    ("index", r"\bfor \(\w+ \w+ = (?P<cut>0);", "1"),
    ("index", r"(?<=[\w\])])\.(?P<cut>x)\b", "y"),
    ("index", r"(?<=[\w\])])\.(?P<cut>y)\b", "x"),
    ("bound", r"(?P<cut> [-+] 1)\b(?![.\w])", ""),
    ("barrier", r"^ *(?P<cut>(?:__sync\w+|wait_for_\w+|commit_\w+|wait)(?:<[^;\n]*>)?\([^;\n]*\);)", ";"),
    ("barrier", r"^ *(?P<cut>std::(?:lock_guard|unique_lock)[^;\n]*;)", ""),
    ("barrier", r"\bmemory_order_(?P<cut>acquire|release|acq_rel|seq_cst)\b", "relaxed"),
    ("mask", r"(?P<cut>!)(?=[\w(])", ""),
    ("mask", r"\bif \((?P<cut>[^()\n]+(?:\([^()\n]*\)[^()\n]*)*)\)", r"!(\g<cut>)"),
    ("mask", r"\? (?P<cut>" + _TERM + " : " + _TERM + r")(?=[;,)])", "SWAP"),
    ("dropped term", r"(?P<cut> [-+*/] " + _TERM + r")(?=[;,)\]]| [-+<>=&|?:])", ""),
    ("dropped term", r"^ *(?P<cut>" + _TERM + r" [-+*]?= [^;{}\n]*;)", ";"),
    ("dropped term", r"^ *(?P<cut>(?!return\b|else\b|using\b)" + _TERM + r";)", ";"),
    ("dropped term", r"^ *(?P<cut>if \([^;{}\n]*\) (?:continue|return|break);)", ""),
)
_DECLARED = re.compile(
    r"^\s*(?:(?:const|constexpr|static|alignas\(.*?\)|__shared__|extern|inline) )*[\w:<>, ]+[&*]* \w+\[$"
)


def _blanked(text: str) -> str:
    """The text with spaces in place of the parts that must not change."""
    return _HIDDEN.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _is_declared(code: str, at: int) -> bool:
    """Whether a bracket opens the size of an array, not a subscript."""
    start = code.rfind("\n", 0, at) + 1
    return _DECLARED.match(code[start:at]) is not None


def _found(code: str) -> Iterator[tuple[str, int, int, str]]:
    for rule, swaps in _SWAPS.items():
        for before, after in swaps.items():
            for match in re.finditer(re.escape(before) + r"(?=\S)", code):
                yield rule, match.start() + 1, match.end() - 1, after.strip()
    for rule, swaps in _WORDS.items():
        for before, after in swaps.items():
            for match in re.finditer(rf"(?<!\w){re.escape(before)}(?!\w)", code):
                yield rule, match.start(), match.end(), after
    for rule, pattern, template in _PATTERNS:
        for match in re.finditer(pattern, code, re.MULTILINE):
            start, end = match.span("cut")
            if "[" in pattern[:14] and _is_declared(code, start):
                continue
            if template == "SWAP":
                one, _, other = match["cut"].partition(" : ")
                after = f"{other} : {one}"
            else:
                after = template.replace(r"\g<cut>", match["cut"])
            yield rule, start, end, after


def sites(file: str, text: str) -> list[Mutation]:
    """All mutations of a file, in the order of its text."""
    found = {
        Mutation(file, rule, start, text[start:end], after, text.count("\n", 0, start) + 1)
        for rule, start, end, after in _found(_blanked(text))
        if text[start:end] != after
    }
    return sorted(found, key=lambda each: (each.start, each.rule, each.after, each.before))
