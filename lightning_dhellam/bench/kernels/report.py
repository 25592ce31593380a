"""The table of `dhellam bench kernels`: a row for each kernel at each size."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dhellam.bench.kernels.cases import Case
from lightning_dhellam.bench.report import Row

OURS, LIGER, EAGER, COMPILED = "ours GB/s", "liger GB/s", "eager GB/s", "compiled GB/s"
COLUMNS = (
    "kernel", "tokens", "width", "ours us", OURS, "copy GB/s", "of copy", EAGER, COMPILED, LIGER,
)  # fmt: skip


def row_of(case: Case, wrong: Sequence[str]) -> Row:
    """The row of a kernel before it is timed; it failed if its operator computes what is wrong."""
    row: Row = {"kernel": case.name, "tokens": case.tokens, "width": case.width}
    return row | {"failed": "; ".join(wrong)} if wrong else row


def add_copy(row: Row, moved: int, copy: float) -> None:
    """Add how our kernel compares with a device copy.

    Args:
        row: A row in which our rate stands.
        moved: Bytes that the kernel moves.
        copy: Bytes per second of a copy of as many.
    """
    row |= {"ours us": moved / row[OURS] / 1e3, "copy GB/s": copy / 1e9}
    row["of copy"] = f"{row[OURS] * 1e9 / copy:.0%}"
