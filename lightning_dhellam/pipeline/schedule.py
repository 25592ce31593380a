"""The passes of one step, as data."""

from __future__ import annotations

from typing import NamedTuple


class Pass(NamedTuple):
    """One traversal of the layers: forward of one micro-batch together with backward of another.

    Attributes:
        forward: index of the micro-batch that goes forward, or None.
        backward: index of the micro-batch that goes backward, or None.
    """

    forward: int | None
    backward: int | None


def single_stage(micro_batches: int) -> list[Pass]:
    """The passes of one stage: each micro-batch goes backward while the next goes forward.

    The first goes forward alone, and the last backward alone.

    Raises:
        ValueError: there are no micro-batches.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches} must be at least 1")
    return [
        Pass(k if k < micro_batches else None, k - 1 if k else None)
        for k in range(micro_batches + 1)
    ]
