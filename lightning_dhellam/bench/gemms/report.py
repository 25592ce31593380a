"""The table of `dhellam bench gemms`: a row for each GEMM and library."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_dhellam.bench.report import Row

KINDS = ("forward", "dgrad", "wgrad")
COLUMNS = ("library", "gemm", "tokens", "out", "in", *(f"{kind} TFLOP/s" for kind in KINDS))


def row_of(
    library: str, gemm: str, tokens: int, shape: tuple[int, int], rates: Mapping[str, float]
) -> Row:
    """The row of one GEMM.

    Args:
        library: The BLAS library that computed it.
        gemm: Its name.
        tokens: Rows of its input.
        shape: Its output and input channels.
        rates: FLOP/s of each kind.
    """
    row: Row = {"library": library, "gemm": gemm, "tokens": tokens}
    row |= {"out": shape[0], "in": shape[1]}
    return row | {f"{kind} TFLOP/s": rates[kind] / 1e12 for kind in KINDS}
