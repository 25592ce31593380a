"""Cross-entropy over a vocabulary that is split between ranks."""

from lightning_dhellam.kernels.cross_entropy.reference import (
    CHUNK,
    backward_,
    combine,
    statistics,
)

__all__ = ["CHUNK", "backward_", "combine", "statistics"]
