"""Clusters to emulate that ship with the package, found by name."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path


def names() -> list[str]:
    """Names of the clusters, without `.yaml`."""
    paths = (Path(str(item)) for item in files(__name__).iterdir())
    return sorted(path.stem for path in paths if path.suffix == ".yaml")


def find(name: str) -> Path:
    """The file of a cluster, by its name without `.yaml`.

    Raises:
        ValueError: there is no such cluster; the message names the known ones.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(
            f"emulate='{name}' is neither the file of a cluster (.yaml) nor one that ships:"
            f" {names()}{hint}"
        )
    return Path(str(files(__name__).joinpath(f"{name}.yaml")))
