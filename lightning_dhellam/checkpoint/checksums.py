"""Sizes and checksums of a checkpoint's files."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.checkpoint.description import check_size
from lightning_dhellam.remote import Folder

Checksums = dict[str, tuple[int, str]]
"""By the names of files how many bytes they have, and the checksum of those."""
AT_ONCE = 2**20
"""Bytes that are read or written together: what a core's cache still has when they are summed."""


def _find_crc32() -> Callable[[Any, int], int]:
    """CRC-32 by zlib-ng, three to five times as fast as most systems' zlib, where it is there."""
    try:
        found: Callable[[Any, int], int] = import_module("zlib_ng.zlib_ng").crc32
    except ImportError:
        found = zlib.crc32
    return found


crc32 = _find_crc32()


def checksum(file: Folder) -> tuple[int, str]:
    """How many bytes a file has, and their checksum."""
    buffer = memoryview(bytearray(AT_ONCE))
    found = size = 0
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found = crc32(buffer[:count], found)
            size += count
    return size, f"{found:08x}"


def check_file(file: Folder, size: int, digest: str) -> None:
    """Refuse a file that is not as it was written.

    Raises:
        ValueError: it is missing, cut off or changed.
    """
    check_size(file, size)
    if checksum(file) != (size, digest):
        raise ValueError(
            f"{file} is damaged: its checksum is not that of what was written: {REMEDY}"
        )
