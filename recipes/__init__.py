"""LightningCLI configurations that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from lightning_dhellam.recipes.shelf import Shelf

OPTIONS = ("--config", "-c")
"""What a recipe stands behind on the command line."""

SHELF = Shelf(__name__)
"""Every recipe with its description."""

names = SHELF.names


def find(name: str, option: str = OPTIONS[0]) -> Path:
    """The file of a recipe, by its name with or without `.yaml`; `option` is what named it.

    Raises:
        ValueError: there is no such recipe; the message names the known ones.
    """
    stem = name.removesuffix(".yaml")
    if stem not in names():
        raise ValueError(
            f"{option} {name} is neither a file nor a recipe: the recipes are"
            f" {names()}{SHELF.hint(stem)}"
        )
    return SHELF.path(stem)
