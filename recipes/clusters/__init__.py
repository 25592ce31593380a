"""Clusters to emulate that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from lightning_dhellam.recipes.shelf import Shelf

SHELF = Shelf(__name__)
"""Every cluster with its description."""

names = SHELF.names


def find(name: str, option: str = "emulate=") -> Path:
    """The file of a cluster, by its name without `.yaml`.

    Args:
        name: of the cluster.
        option: what it was given by, as the user wrote it.

    Raises:
        ValueError: there is no such cluster; the message names the known ones.
    """
    if name not in names():
        raise ValueError(
            f"{option}'{name}' is neither the file of a cluster (.yaml) nor one that ships:"
            f" {names()}{SHELF.hint(name)}"
        )
    return SHELF.path(name)
