"""`dhellam recipes` and `dhellam clusters`: what ships with the package, to read and to copy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_dhellam import recipes
from lightning_dhellam.files import check_file, save_bytes
from lightning_dhellam.recipes import clusters
from lightning_dhellam.recipes.shelf import Shelf

SHELVES = {"recipes": recipes.SHELF, "clusters": clusters.SHELF}

USAGE = """\
usage: dhellam {word}
       dhellam {word} copy NAME [FILE]

  copy       write one into FILE (NAME.yaml where it is left out), to change it there

Without a word: the {word} that ship with the package, each with what it describes. {use}
"""
USES = {
    "recipes": "A recipe is\nwhat `--config` takes; so is a file.",
    "clusters": "A cluster\nis what `emulate` and `--cluster` take; so is a file.",
}


def shelf_command(words: Sequence[str]) -> int:
    """List what is on a shelf, or copy one of it. The first word names it: `recipes`, `clusters`.

    Returns the exit code.
    """
    word, *argv = words
    shelf = SHELVES[word]
    if not argv:
        width = max(map(len, shelf.names()))
        print("\n".join(f"{name:<{width}}  {shelf.description(name)}" for name in shelf.names()))
        return 0
    if argv[0] in ("-h", "--help") or argv[1:2] in (["-h"], ["--help"]):
        print(USAGE.format(word=word, use=USES[word]), end="")
        return 0
    if argv[0] != "copy" or len(argv) not in (2, 3):
        raise ValueError(
            f"{word} {' '.join(argv)}: use 'dhellam {word}' to see them or 'dhellam {word} copy"
            " NAME [FILE]'"
        )
    print(f"written to {_copy(word, shelf, *argv[1:])}")
    return 0


def _copy(word: str, shelf: Shelf, name: str, file: str | None = None) -> Path:
    stem = name.removesuffix(".yaml")
    if stem not in shelf.names():
        raise ValueError(
            f"{word} copy {name}: there is no such one: use one of"
            f" {', '.join(shelf.names())}{shelf.hint(stem)}"
        )
    target = Path(file or f"{stem}.yaml")
    if target.suffix != ".yaml":
        raise ValueError(f"{target} must end in .yaml: that is how a file is told from a name")
    check_file(target, str(target))
    if os.path.lexists(target):
        raise ValueError(f"{target} exists, and is not overwritten: give another file or remove it")
    save_bytes(target, shelf.path(stem).read_bytes())
    return target
