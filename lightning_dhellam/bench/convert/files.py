"""Files read and written by plain means, and by safetensors alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_AT_ONCE = 2**24


def write_plain(folder: Path, sizes: Sequence[int]) -> None:
    """Write files of these sizes, to the disk."""
    folder.mkdir()
    buffer = memoryview(os.urandom(_AT_ONCE))
    for number, left in enumerate(sizes):
        target = folder / str(number)
        with target.open("wb", buffering=0) as file:
            while left:
                left -= file.write(buffer[:left])
        settle(target)


def read_plain(files: Sequence[Path]) -> None:
    """Read files from end to end."""
    buffer = memoryview(bytearray(_AT_ONCE))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_tensors(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write tensors by the names of files, to the disk."""
    folder.mkdir()
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        settle(folder / name)


def read_tensors(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Read tensors into memory that is there."""
    for name, tensors in files.items():
        with safe_open(folder / name, "pt") as file:
            for one, tensor in tensors.items():
                tensor.copy_(file.get_tensor(one))


def settle(file: Path) -> None:
    """Bring a file to the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def forget(files: Sequence[Path]) -> None:
    """Drop what the system has in memory of files that are on the disk."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
