"""A disk that is full, for whatever this process writes below a folder."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


class _Writing:
    """A file that takes what there is room for, as a file system does."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        taken = min(size, self._room[0])
        self._room[0] -= taken
        self._file.write(memoryview(data).cast("B")[:taken])
        if taken < size:
            self._file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return size

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def full_disk(folder: Path, room: int) -> Iterator[None]:
    """Let this process write only `room` more bytes into binary files below `folder`."""
    left, real = [room], io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        handle = real(file, mode, *args, **kwargs)
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
        inside = Path(path).absolute().is_relative_to(folder.absolute())
        return _Writing(handle, left) if inside and "b" in mode and "r" not in mode else handle

    with mock.patch.object(builtins, "open", opened), mock.patch.object(io, "open", opened):
        yield
