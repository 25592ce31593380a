"""The text that is learned: source code that is on every machine on which this package runs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec
from pathlib import Path

from lightning_dhellam.data.corpus import STDLIB, open_corpus
from lightning_dhellam.data.prepare import prepare
from lightning_dhellam.data.prepared import PreparedData


def sources(packages: tuple[str, ...]) -> list[str]:
    """The standard library, and the folders of the packages.

    Raises:
        ValueError: one is not installed.
    """
    found = [STDLIB]
    for name in packages:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"--packages: '{name}' is not installed: pip install {name}, or leave it out"
            )
        found.append(next(iter(spec.submodule_search_locations)))
    return found


def prepared(packages: tuple[str, ...], vocab_size: int, folder: Path) -> PreparedData:
    """The text in tokens, made in `folder` unless it is there."""
    return prepare(sources(packages), folder, vocab_size=vocab_size)


def described(packages: tuple[str, ...]) -> str:
    """What the text is, and under which licences."""
    parts = [f"Python {platform.python_version()}'s standard library (PSF-2.0)"]
    for name in packages:
        try:
            about = metadata(name)
        except PackageNotFoundError:
            parts.append(name)
            continue
        said = [about[key] for key in ("License-Expression", "License") if key in about]
        licence = said[0].splitlines()[0] if said else "licence not said"
        parts.append(f"{name} {about['Version']} ({licence})")
    size = open_corpus(sources(packages)).size
    return f"source code of {', '.join(parts)}: {size / 1e6:.0f} MB"
