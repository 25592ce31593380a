"""What processes that were killed have left in a folder, and how to take it away.

.NAME.old-XXXX/NAME      what had the name NAME, for the moment in which another takes it
.….partial  .….partial-… what was being written, and had no name yet
.….removed               what was being removed, and has no name any more
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_OLD = re.compile(r"\.(?P<name>.+)\.old-[^.]+")
_REMOVED = re.compile(r"\..+\.removed")
_PARTIAL = re.compile(r"\..+\.partial(-[^.]+)?")
_STALE = 3600.0
"""Seconds after which nobody writes any more to what has not changed: another job may be at it."""


def restore(folder: Path) -> None:
    """Give back its name to what has lost it between two renames. Any number of ranks may do so."""
    for place, found in _entries(folder, _OLD):
        target, kept = folder / found["name"], place / found["name"]
        if not os.path.lexists(target):
            with suppress(OSError):  # another rank was first
                kept.rename(target)


def clear(folder: Path) -> None:
    """Restore what `restore` does, and take away what is left of the rest. For one rank.

    What cannot be removed stays: it is in nobody's way.
    """
    restore(folder)
    for place, _ in (*_entries(folder, _OLD), *_entries(folder, _REMOVED)):
        _take_away(place)
    for place, _ in _entries(folder, _PARTIAL):
        if time.time() - _last_change(place) > _STALE:
            _take_away(place)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder. Of a folder there is all under its name, or nothing."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # A folder that has this name already is of one that was killed here.
    hidden = path.with_name(f".{name_digest(path)}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def name_digest(path: Path) -> str:
    """What stands for the name of a path where that must not be seen."""
    return hashlib.sha256(path.name.encode()).hexdigest()[:16]


def _entries(folder: Path, kind: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    with suppress(OSError):
        for place in sorted(folder.iterdir()):
            found = kind.fullmatch(place.name)
            if found is not None:
                yield place, found


def _last_change(place: Path) -> float:
    """When something in a file or folder was written last; the end of time if it is gone."""
    found = 0.0
    try:
        for path in (place, *place.rglob("*")):
            found = max(found, path.lstat().st_mtime)
    except OSError:
        return float("inf")
    return found


def _take_away(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()
