"""The table of `dhellam bench pipeline`: a row for each side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_dhellam.bench.pipeline.settings import Settings
from lightning_dhellam.bench.report import Row

MEGATRON = "Megatron-core 1F1B"
COLUMNS = (
    "side", "stages", "micro-batches", "ms", "over megatron-core", "tokens/s", "loss",
    "grad norm", "error",
)  # fmt: skip
_TOLERANCE = 1e-5
"""The relative error of loss and gradient norm up to which sides compute the same, in fp32."""


@dataclass(frozen=True)
class Measured:
    """What the first stage saw of a side.

    Attributes:
        seconds: The seconds of each timed step.
        loss: The mean loss of a step.
        grad_norm: The 2-norm of the whole model's gradient.
    """

    seconds: Sequence[float]
    loss: float
    grad_norm: float


def rows_of(settings: Settings, sides: Mapping[str, Measured]) -> list[Row]:
    """A row for each side. One that computes something else than Megatron-core has failed."""
    reference = sides[MEGATRON]
    rows = []
    for name, found in sides.items():
        seconds = median(found.seconds)
        error = max(
            _relative(found.loss, reference.loss),
            _relative(found.grad_norm, reference.grad_norm),
        )
        row: Row = {
            "side": name,
            "stages": settings.stages,
            "micro-batches": settings.micro_batches,
            "ms": seconds * 1000,
            "over megatron-core": median(reference.seconds) / seconds,
            "tokens/s": settings.micro_batches * settings.sequence / seconds,
            "loss": found.loss,
            "grad norm": found.grad_norm,
            "seconds": found.seconds,
            "error": error,
        }
        if not error <= _TOLERANCE:
            row["failed"] = "computes another loss or gradient than Megatron-core"
        rows.append(row)
    return rows


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)
