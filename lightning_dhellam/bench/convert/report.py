"""The table of `dhellam bench convert`: a row for each way of reading and of writing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lightning_dhellam.bench.report import Row

COLUMNS = ("does", "by", "seconds", "GB/s", "of the disk", "lowest", "highest")


def row_of(does: str, by: str, size: int, seconds: Sequence[float], disk: Sequence[float]) -> Row:
    """The row of one way.

    Args:
        does: Reads or writes.
        by: What does.
        size: Bytes of all tensors.
        seconds: In each round.
        disk: Seconds of plain files of as many bytes in the same rounds.
    """
    shares = [plain / own for own, plain in zip(seconds, disk, strict=True)]
    taken = median(seconds)
    values = (does, by, taken, size / taken / 1e9, median(shares), min(shares), max(shares))
    return dict(zip(COLUMNS, values, strict=True))
