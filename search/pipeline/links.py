"""What carries results between stages, as it is given or as a profile has measured it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from lightning_dhellam.search.measure import Transfer


@dataclass(frozen=True)
class Link:
    """A link between stages.

    Attributes:
        bandwidth: bytes per second that a stage can send, and as many that it can receive.
        latency: seconds until the first byte arrives.
        takes: share of a stage's compute that a transfer takes while bytes come, from 0 up to less
            than 1: of NCCL's kernels their share of the device's multiprocessors, and of its memory
            and power; of a copy engine 0 or little.
        waits: share that a receive takes from its posting on while none come: of NCCL's kernels,
            which spin, that of the multiprocessors; None if that is not known.
    """

    bandwidth: float = inf
    latency: float = 0.0
    takes: float = 0.0
    waits: float | None = None

    @property
    def waiting(self) -> float:
        """What a receive is taken to take while it waits: no more than while bytes come."""
        return min(self.takes, _SPINNING if self.waits is None else self.waits)


_SPINNING = 16 / 132
"""Multiprocessors of an H200 on which NCCL's kernels wait, where a profile does not say it."""
Links = Mapping[tuple[int, int], Link]
"""The link from each stage to each neighbour."""
_MOST = 0.9
"""A transfer takes less than all of compute, whatever was measured."""


def links_of(transfers: Iterable[Transfer]) -> Links:
    """Return the links that were measured, beside compute; none where nothing was.

    The least and the most bytes of a link tell its bandwidth and its latency. What it takes of
    compute is told by the most, of which it is the larger part of what was measured.
    """
    known: dict[tuple[int, int], list[Transfer]] = {}
    for row in transfers:
        known.setdefault((row.source, row.target), []).append(row)
    return {edge: _link(sorted(rows, key=lambda row: row.bytes)) for edge, rows in known.items()}


def _link(rows: list[Transfer]) -> Link:
    least, most = rows[0], rows[-1]
    takes, waits = min(most.takes, _MOST), most.waits if most.spins else 0.0
    longer = most.beside - least.beside
    if longer <= 0.0:
        return Link(most.bytes / most.beside, 0.0, takes, waits)
    bandwidth = (most.bytes - least.bytes) / longer
    latency = most.beside - most.bytes / bandwidth
    if latency < 0.0:
        return Link(most.bytes / most.beside, 0.0, takes, waits)
    return Link(bandwidth, latency, takes, waits)
