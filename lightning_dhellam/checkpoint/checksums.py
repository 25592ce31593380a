"""Sizes and checksums of a checkpoint's files.

A checksum is a CRC-32, so that those of parts make that of the whole: ranks share out the bytes of
all files, whoever wrote them, and each byte is summed once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.checkpoint.description import check_size
from lightning_dhellam.remote import Folder

Checksums = dict[str, tuple[int, str]]
"""By the names of files how many bytes they have, and the checksum of those."""
AT_ONCE = 2**20
"""Bytes that are read or written together: what a core's cache still has when they are summed."""
_POLYNOMIAL = 0xEDB88320
"""Of CRC-32: the bit of the highest power comes last."""
_ONE = 1 << 31
_SIZE_BITS = 63
"""Of a file's size, at most."""


def _find_crc32() -> Callable[[Any, int], int]:
    """CRC-32 by zlib-ng: fourteen times as fast as zlib 1.2, which stands in where it is not."""
    try:
        found: Callable[[Any, int], int] = import_module("zlib_ng.zlib_ng").crc32
    except ImportError as error:
        rank_zero_warn(
            f"zlib-ng cannot be imported ({error}): checkpoints are summed by zlib, which may take"
            " longer than to read them: pip install zlib-ng"
        )
        found = zlib.crc32
    return found


crc32 = _find_crc32()


def checksum(file: Folder) -> tuple[int, str]:
    """How many bytes a file has, and their checksum."""
    size, found = _sum(file)
    return size, f"{found:08x}"


def check_file(file: Folder, size: int, digest: str) -> None:
    """Refuse a file that is not as it was written.

    Raises:
        ValueError: it is missing, cut off or changed.
    """
    check_size(file, size)
    if checksum(file) != (size, digest):
        raise damaged(file)


def damaged(file: Folder) -> ValueError:
    """What is raised of a file that was changed."""
    return ValueError(f"{file} is damaged: its checksum is not that of what was written: {REMEDY}")


class Part(NamedTuple):
    """A part of a file.

    Attributes:
        file: its name.
        start: its first byte.
        size: how many bytes it has.
        crc: of these.
    """

    file: str
    start: int
    size: int
    crc: int


def sum_share(
    folder: Folder, files: Mapping[str, Sequence[Any]], rank: int, ranks: int
) -> list[Part]:
    """A rank's share of the bytes of all files of a checkpoint, summed. Each has about as many.

    Args:
        folder: of the checkpoint.
        files: by name the size of each that was written, and its checksum.
        rank: whose share it is.
        ranks: that share.

    Raises:
        ValueError: a file is missing, or has another size.
    """
    found = []
    for name, start, size in share_of(files, rank, ranks):
        file = folder / name
        check_size(file, files[name][0])
        read, crc = _sum(file, start, size)
        found.append(Part(name, start, read, crc))
    return found


def share_of(
    files: Mapping[str, Sequence[Any]], rank: int, ranks: int
) -> Iterator[tuple[str, int, int]]:
    """A rank's share of some files: of which one from where how many bytes."""
    names = sorted(files)
    ends = list(accumulate(files[name][0] for name in names))
    whole = ends[-1] if ends else 0
    first, last = (whole * place // ranks for place in (rank, rank + 1))
    for name, end in zip(names, ends, strict=True):
        begin = end - files[name][0]
        start, stop = max(first, begin), min(last, end)
        # One that is empty has no byte, but must be there.
        if start < stop or (begin == end and rank == 0):
            yield name, max(start - begin, 0), max(stop - start, 0)


def compare(folder: Folder, files: Mapping[str, Sequence[Any]], parts: Iterable[Part]) -> None:
    """Refuse a checkpoint of which the parts that all ranks have summed are not as was written.

    Raises:
        ValueError: a file was changed.
    """
    sums = dict.fromkeys(files, (0, 0))
    for part in sorted(parts):
        size, crc = sums[part.file]
        sums[part.file] = size + part.size, combined(crc, part.crc, part.size)
    for name, (size, crc) in sums.items():
        if [size, f"{crc:08x}"] != [*files[name]]:
            raise damaged(folder / name)


def combined(first: int, second: int, size: int) -> int:
    """The checksum of two parts that follow each other, the second of `size` bytes.

    The first is moved by so many bytes of zero: multiplied by a power of x, as polynomials are.
    """
    power = _ONE
    for place, square in enumerate(_squares() if first else ()):
        if size >> place & 1:
            power = _times(power, square)
    return _times(first, power) ^ second


@cache
def _squares() -> list[int]:
    """What 1, 2, 4, … bytes of zero move a checksum by, up to any size of a file."""
    found = [_ONE >> 8]
    while len(found) < _SIZE_BITS:
        found.append(_times(found[-1], found[-1]))
    return found


def _times(a: int, b: int) -> int:
    """The product of two polynomials, of which what is left beside CRC-32's counts."""
    found = 0
    while a:
        if a & _ONE:
            found ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return found


def _sum(file: Folder, start: int = 0, size: int | None = None) -> tuple[int, int]:
    """How many bytes were read of a part of a file, up to its end by default, and their CRC-32."""
    buffer = memoryview(bytearray(AT_ONCE))
    found = read = 0
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while count := stream.readinto(buffer if size is None else buffer[: size - read]):
            found = crc32(buffer[:count], found)
            read += count
    return read, found
