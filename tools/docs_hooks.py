# SPDX-License-Identifier: Apache-2.0
"""Additions to mkdocs for this site: pages from files of the root, MathML, and the commands' help."""

from __future__ import annotations

import argparse
import html
import posixpath
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)  # as pymdownx.arithmatex writes them
ROLE = re.compile(r":(?:func|class|meth):<code>~?([\w.]+)</code>")  # of docstrings


def on_files(files, config):
    """Adds the files at the root of the repository as pages, so that each text exists only once."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=LINK.sub(_from_root, text)))
    return files


def _from_root(link: re.Match) -> str:
    target = link[1]
    return f"]({PAGES.get(target, target.removeprefix('docs/'))}"


def on_page_markdown(markdown, page, config, files):
    folder = posixpath.dirname(page.file.src_uri)

    def to_page(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        return f"]({posixpath.relpath(PAGES[target], folder or '.')}" if target in PAGES else link[0]

    markdown = LINK.sub(to_page, markdown)
    return markdown.replace("<!-- commands -->", _commands()) if "<!-- commands -->" in markdown else markdown


def _commands() -> str:
    sys.path.insert(0, str(ROOT / "python"))  # cli.py can be imported without torch
    from vitkern.cli import make_parser

    return "\n\n".join(f"## {parser.prog}\n\n```text\n{_help(parser)}```" for parser in _all(make_parser()))


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
    return parser.format_help()


def _all(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser, unless it only has subcommands, and the parsers of its subcommands."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        return [parser]
    return [leaf for child in inner[0].choices.values() for leaf in _all(child)]


def on_page_content(html, page, config, files):
    return FORMULA.sub(_mathml, ROLE.sub(_reference, html))


def _reference(role: re.Match) -> str:
    """The name, with a link to its documentation if there is any."""
    name = role[1] if role[1].startswith("vitkern.") else f"vitkern.{role[1]}"
    return f'<autoref identifier="{name}" optional><code>{role[1].rpartition(".")[2]}</code></autoref>'


def _mathml(found: re.Match) -> str:
    formula = html.unescape(found[2])
    if found[1] == "span":
        return convert(formula)
    tags = re.findall(r"\\tag\{(\w+)\}", formula)
    formula = convert(re.sub(r"\\tag\{\w+\}", "", formula), display="block")
    if not tags:
        return f'<div class="formula">{formula}</div>'
    (tag,) = tags
    return f'<div class="formula" id="eq-{tag}">{formula}<span>({tag})</span></div>'
