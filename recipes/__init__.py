"""LightningCLI configurations that ship with the package, found by name."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

OPTIONS = ("--config", "-c")
"""What a recipe stands behind on the command line."""


def names() -> list[str]:
    """Names of the recipes, without `.yaml`."""
    return sorted(Path(str(item)).stem for item in files(__name__).iterdir() if _is_recipe(item))


def find(name: str, option: str = OPTIONS[0]) -> Path:
    """The file of a recipe, by its name with or without `.yaml`; `option` is what named it.

    Raises:
        ValueError: there is no such recipe; the message names the known ones.
    """
    stem = name.removesuffix(".yaml")
    if stem not in names():
        close = difflib.get_close_matches(stem, names(), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(
            f"{option} {name} is neither a file nor a recipe: the recipes are {names()}{hint}"
        )
    return Path(str(files(__name__).joinpath(f"{stem}.yaml")))


def _is_recipe(item: object) -> bool:
    return str(item).endswith(".yaml")
