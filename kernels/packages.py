"""Which optional packages are there, and which libraries this process has loaded."""

from __future__ import annotations

import csv
import importlib.util
import re
from importlib import metadata
from pathlib import Path


def importable(package: str) -> bool:
    """Whether `package` can be imported, and is more than a folder that others share.

    flash-attn 4 lives in `flash_attn.cute`, so `flash_attn` can be found where flash-attn 2 is not
    installed.
    """
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def installed(distribution: str) -> bool:
    """Whether `distribution`, as named to pip, is installed."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def whole(distribution: str) -> bool:
    """Whether the files of an installed `distribution` still have the sizes that it came with.

    flash-attn 2.8 brings an early `flash_attn.cute` of its own, which replaces that of flash-attn 4
    when it is installed later.
    """
    found = metadata.distribution(distribution)
    # Not `metadata.files`, which from Python 3.12 on leaves out what is missing.
    rows = csv.reader((found.read_text("RECORD") or "").splitlines())
    sizes = {name: int(size) for name, _, size in rows if name.endswith(".py") and size}
    return all(_size(Path(str(found.locate_file(name)))) == size for name, size in sizes.items())


def loaded(library: str) -> list[str]:
    """Where the shared libraries of a name lie that this process has loaded, of any version."""
    named = re.compile(rf"/\S*/lib{library}\.so[.\d]*")
    return sorted({*named.findall(Path("/proc/self/maps").read_text())})


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
