# SPDX-License-Identifier: Apache-2.0
"""Text from elsewhere, such as a compiler's message, made fit for our files."""

from __future__ import annotations

import html
import re

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
_NOT_OF_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def readable(text: str) -> str:
    r"""The text without a terminal's colours, and with characters outside of XML 1.0 in Python's form: ``\x00``."""
    return _NOT_OF_XML.sub(lambda found: ascii(found[0])[1:-1], _ANSI.sub("", text))


def in_html(text: str) -> str:
    """The text for HTML or SVG, or for an attribute's quotes."""
    return html.escape(readable(text))


def in_markdown(text: str) -> str:
    """The text for a line or for a cell of a table: without HTML, links, pictures, pipes or ends of lines."""
    marked = re.sub(r"([\\`*\[\]|~#])", r"\\\1", " ".join(readable(text).split()))
    return html.escape(marked, quote=False)
