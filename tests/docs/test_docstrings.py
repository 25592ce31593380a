"""Docstrings become the reference: each begins with a sentence that stands alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

FOLDERS = ("lightning_dhellam", "kernels", "search", "recipes")
DANGLING = {"Of", "Those", "That", "As", "It", "With", "By", "From", "The same of"}
"""How fragments begin that lean on the name above them."""


def docstrings(folder: str) -> Iterator[tuple[str, str]]:
    """Where each class or function is, and what its docstring says."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                said = ast.get_docstring(node)
                if said:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", said


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_begins_in_the_middle_of_a_sentence(folder: str) -> None:
    fragments = [
        f"{place}: {said.splitlines()[0]}"
        for place, said in docstrings(folder)
        if any(said.startswith(f"{start} ") for start in DANGLING)
    ]
    assert fragments == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_docstring_ends_its_first_sentence(folder: str) -> None:
    unended = [
        f"{place}: {said.splitlines()[0]}"
        for place, said in docstrings(folder)
        if said.split("\n\n")[0].rstrip()[-1] not in ".:?!`" or len(said.split()) < 2
    ]
    assert unended == []
