"""The rooms of the house: imports point down, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_dhellam"
FOLDERS = {
    PACKAGE: PACKAGE,
    **{name: f"{PACKAGE}.{name}" for name in ("kernels", "search", "recipes")},
}
"""Where each package lies in the repository, and its name when installed."""

FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(rooms.split())
    for rooms in (
        "__main__",
        "commands",
        "bench",
        "callbacks",
        "strategy",
        "autosearch",
        "displays expert_load module predictions",
        "hosted",
        "runner",
        "balance recomputing training",
        "anomalies",
        "agreed advice",
        "checkpoint memory",
        "models",
        "engine layers data search",
        "pipeline",
        "parallel",
        "plan remote",
        "failures files kernels late leftovers optimizing precision recipes values versions",
        "importing nearest",
    )
)
"""Rooms from the top floor down; those of one floor do not know each other."""

INDEPENDENT = ("kernels", "recipes")
"""Rooms that import nothing of ours."""

Imports = Mapping[str, frozenset[str]]
"""The modules that each module imports."""


@pytest.fixture(scope="module")
def imports() -> Imports:
    """What each of our modules imports of the others, wherever in its file, for types as well."""
    files = dict(_modules())
    return {
        name: frozenset(_imported(file, name, files)) - {name, PACKAGE}
        for name, file in files.items()
        if name != PACKAGE  # its public names are looked up when they are asked for
    }


def _modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in inner if part != "__init__"))), file


def _imported(file: Path, name: str, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import, where all others are absolute"
            for alias in node.names:
                found = f"{node.module}.{alias.name}"
                if found in files:
                    yield found
                elif node.module in files:
                    yield str(node.module)


def room(module: str) -> str:
    """The folder or file right below the package that a module is part of."""
    return module.split(".")[1]


def test_every_room_has_a_floor(imports: Imports) -> None:
    known = frozenset().union(*FLOORS)
    assert {room(name) for name in imports} == known


def test_imports_point_down(imports: Imports) -> None:
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    up = [
        f"{importer} imports {imported}"
        for importer, found in imports.items()
        for imported in sorted(found)
        if room(importer) != room(imported) and floor[room(importer)] >= floor[room(imported)]
    ]
    assert not up, "imports that do not point down:\n" + "\n".join(up)


def test_nothing_imports_in_a_circle(imports: Imports) -> None:
    circles = list(_circles(imports))
    assert not circles, "circles:\n" + "\n".join(" - ".join(circle) for circle in circles)


def test_the_rooms_of_search_know_those_before_them(imports: Imports) -> None:
    """In the order in which its documentation lists them."""
    text = Path(ROOT / "search" / "__init__.py").read_text()
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    found = [path.name for path in (ROOT / "search").iterdir() if (path / "__init__.py").exists()]
    assert sorted(listed) == sorted(found)
    parts = {name: name.split(".") for name in imports if room(name) == "search"}
    inside = {name: listed.index(path[2]) for name, path in parts.items() if path[2:]}
    up = [
        f"{importer} imports {imported}"
        for importer in inside
        for imported in sorted(imports[importer] & inside.keys())
        if inside[imported] > inside[importer]
    ]
    assert not up, "imports of rooms that come later:\n" + "\n".join(up)


@pytest.mark.parametrize("inside", INDEPENDENT)
def test_rooms_that_import_nothing_of_ours(imports: Imports, inside: str) -> None:
    others = {
        importer: sorted(name for name in found if room(name) != inside)
        for importer, found in imports.items()
        if room(importer) == inside
    }
    assert not {name: found for name, found in others.items() if found}


def test_a_circle_and_an_arrow_up_are_found() -> None:
    circle = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"b"})}
    assert list(_circles(circle)) == [("b", "c")]


def _circles(imports: Imports) -> Iterator[tuple[str, ...]]:
    """Groups of modules of which each reaches each other."""
    reached = {name: _reachable(name, imports) for name in imports}
    seen: set[str] = set()
    for name in imports:
        if name not in seen and name in reached[name]:
            circle = {other for other in reached[name] if name in reached.get(other, ())}
            seen |= circle
            yield tuple(sorted(circle))


def _reachable(start: str, imports: Imports) -> set[str]:
    found: set[str] = set()
    left = list(imports[start])
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left.extend(imports.get(name, ()))
    return found
