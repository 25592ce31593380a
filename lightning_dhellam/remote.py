"""Folders that fsspec reads and writes: `s3://`, `gs://`, `memory://` and others.

Checkpoints are written by the methods that a `Path` of this machine has, as far as they need them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from lightning_dhellam.files import local_path

_PROCESS = "memory"
"""The file system that each process has for itself."""


class Status(NamedTuple):
    """What is known of a file. Attributes: its size in bytes."""

    st_size: int


class RemotePath:
    """A folder or a file of a file system that is not this machine's.

    Args:
        url: with the protocol: `s3://bucket/run/last.ckpt`.

    Raises:
        ImportError: the package of the protocol is not installed.
        ValueError: there is no such protocol.
    """

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        self._scheme = scheme
        self._path = PurePosixPath(rest)
        self._files, self._root = fsspec.core.url_to_fs(f"{scheme}://{self._path}")

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._scheme}://{self._path / name}")

    @property
    def _seen(self) -> Any:
        """The file system as it is now: listings are kept, and other ranks write as well."""
        self._files.invalidate_cache()
        return self._files

    @property
    def is_of_one_process(self) -> bool:
        """Whether each process has files of its own there, also under a cache or a prefix."""
        files = self._files
        while files is not None:
            names = files.protocol
            if _PROCESS in ([names] if isinstance(names, str) else names):
                return True
            files = getattr(files, "fs", None)
        return False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.name

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(f"{self._scheme}://{self._path.parent}")

    def exists(self) -> bool:
        """Whether there is a file, or a folder with something in it."""
        return bool(self._seen.exists(self._root))

    def is_file(self) -> bool:
        """Whether there is a file."""
        return bool(self._seen.isfile(self._root))

    def is_dir(self) -> bool:
        """Whether there is a folder with something in it."""
        return bool(self._seen.isdir(self._root))

    def stat(self) -> Status:
        """What is known of the file."""
        return Status(int(self._seen.size(self._root)))

    def modified(self) -> float:
        """When the file was written, in seconds."""
        return float(self._seen.modified(self._root).timestamp())

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in the folder; nothing if there is none."""
        if self.is_dir():
            for found in sorted(self._seen.ls(self._root, detail=False)):
                yield self / PurePosixPath(str(found)).name

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """Open the file; `buffering` is the file system's own matter."""
        return self._seen.open(self._root, mode)

    def read_bytes(self) -> bytes:
        """All of the file."""
        return bytes(self._seen.cat_file(self._root))

    def write_bytes(self, data: bytes) -> None:
        """Write all of a file at once, which object stores show whole or not at all."""
        self._files.makedirs(str(PurePosixPath(self._root).parent), exist_ok=True)
        self._files.pipe_file(self._root, data)

    def mkdir(self) -> None:
        """Make the folder, where folders are anything."""
        self._files.makedirs(self._root, exist_ok=True)

    def rename(self, target: RemotePath) -> None:
        """Give a small file another name: by a copy, since there may be nothing else."""
        target.write_bytes(self.read_bytes())
        self.remove()

    def remove(self) -> None:
        """Remove a file, or a folder and all in it, if it is there."""
        if self.exists():
            self._files.rm(self._root, recursive=True)


Folder = Path | RemotePath
"""Where a checkpoint may be."""


def place_of(path: str | os.PathLike[str], given: str = "", processes: int = 1) -> Folder:
    """Where a path is that a user has given.

    Args:
        path: of this machine, or with a protocol of fsspec's.
        given: what the user typed, if not the path itself.
        processes: how many write and read there.

    Raises:
        ValueError: fsspec does not know the protocol, its package is not installed, or other
            processes would not find there what one has written.
    """
    spelt = os.fspath(path)
    try:
        return local_path(spelt, given)
    except ValueError:
        scheme = spelt.partition("://")[0]
    try:
        place = RemotePath(spelt)
    except (ImportError, ValueError) as error:
        reason = f"{error}".strip().rstrip(".")
        raise ValueError(
            f"{given or spelt}: {scheme}:// cannot be used ({reason}): install the package of that"
            " file system, or give a folder that all nodes see"
        ) from error
    if place.is_of_one_process and processes > 1:
        raise ValueError(
            f"{given or spelt}: {scheme}:// is the memory of one process, and {processes} have"
            " their parts there: give a folder that all of them see"
        )
    return place
