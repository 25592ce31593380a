"""Lets Sphinx read docstrings as they are written here, in the manner of Markdown."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

BEFORE_NAPOLEON = 100
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")


def setup(app: Sphinx) -> dict[str, Any]:
    """Join Sphinx: called by it."""
    app.connect("autodoc-process-docstring", _process, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = with_literal_blocks(lines)
    if what in ("attribute", "data", "property"):
        lines.insert(0, "\\")  # or Napoleon takes what stands before a colon for a type


def with_literal_blocks(lines: list[str]) -> list[str]:
    """Mark indented paragraphs (code, tables, timelines) as literal; sections stay as they are."""
    found: list[str] = []
    in_section = literal = False
    for line in lines:
        indented = line.startswith("  ")
        if line and not indented:
            in_section, literal = bool(_SECTION.fullmatch(line)), False
        follows_text = bool(found) and not found[-1]
        in_list = any(text.startswith(("- ", "1. ")) for text in found[-12:])
        if indented and not (literal or in_section or in_list) and follows_text:
            found += ["::", ""]
            literal = True
        found.append(line)
    return found
