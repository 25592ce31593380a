"""The table of `dhellam bench memory`: a row for each case."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.bench.report import Row
from lightning_dhellam.memory import RankMemory

COLUMNS = (
    "case", "recompute", "states GiB", "slots GiB", "slots error", "predicted GiB", "measured GiB",
    "error", "with slack GiB", "reserved GiB", "retries", "growth MiB", "left GiB", "loss",
    "parity", "s",
)  # fmt: skip
_GIB = 2**30


@dataclass(frozen=True)
class Taken:
    """Bytes that a case has taken.

    Attributes:
        peak: of tensors at once, in all steps.
        slots: of those the engine's, as it has counted them.
        reserved: by the allocator; 0 on a CPU.
        growth: of what the allocator has reserved, since the second step.
        retries: of the allocator, which had to give memory back to get some.
        left: by the cases before.
    """

    peak: int
    slots: int
    reserved: int = 0
    growth: int = 0
    retries: int = 0
    left: int = 0


def row_of(predicted: RankMemory, taken: Taken) -> Row:
    """What was predicted of a case beside what was measured."""
    states = predicted.weights + predicted.gradients + predicted.optimizer
    total = predicted.allocated if taken.reserved else predicted.tensors
    return {
        "states GiB": states / _GIB,
        "slots GiB": taken.slots / _GIB,
        "slots error": predicted.activations / taken.slots - 1,
        "predicted GiB": total / _GIB,
        "measured GiB": taken.peak / _GIB,
        "error": total / taken.peak - 1,
        "with slack GiB": predicted.total / _GIB,
        "reserved GiB": taken.reserved / _GIB or None,
        "retries": taken.retries,
        "growth MiB": taken.growth / 2**20,
        "left GiB": taken.left / _GIB,
        "predicted bytes": dict(predicted.parts),
    }
