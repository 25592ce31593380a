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
        takes: share of a stage's compute that a transfer takes, from 0 up to less than 1: of NCCL's
            kernels their share of the device's multiprocessors, of a copy engine 0 or little.
        spins: whether a receive takes that share while it waits, too, as NCCL's kernels do.
    """

    bandwidth: float = inf
    latency: float = 0.0
    takes: float = 0.0
    spins: bool = True


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
    takes, spins = min(most.takes, _MOST), most.spins
    longer = most.beside - least.beside
    if longer <= 0.0:
        return Link(most.bytes / most.beside, 0.0, takes, spins)
    bandwidth = (most.bytes - least.bytes) / longer
    latency = most.beside - most.bytes / bandwidth
    if latency < 0.0:
        return Link(most.bytes / most.beside, 0.0, takes, spins)
    return Link(bandwidth, latency, takes, spins)
