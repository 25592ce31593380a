"""Timelines: which operator occupies which lane when, simulated or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dhellam.plan import Lane, Strand
from lightning_dhellam.search.model.walk import Order, Walk


@dataclass(frozen=True, slots=True)
class Interval:
    """An operator on a timeline.

    Attributes:
        lane: lane that the operator occupies.
        strand: strand of its micro-batch.
        operator: name of the operator.
        layer: index of the layer, or of the pair in a picture of a few pairs.
        micro_batch: index of the micro-batch.
        start: seconds at which it begins.
        end: seconds at which it ends.
    """

    lane: Lane
    strand: Strand
    operator: str
    layer: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Intervals on lanes: simulated, or measured by whoever makes a timeline."""

    intervals: tuple[Interval, ...]

    @classmethod
    def of(
        cls, walk: Walk, order: Order, starts: Sequence[float], ends: Sequence[float]
    ) -> Timeline:
        """Make the timeline of a played walk."""
        rows = []
        for number in order:
            if number is not None:
                launch = walk.launches[number]
                rows.append(
                    Interval(
                        launch.operator.lane,
                        launch.strand,
                        launch.operator.name,
                        launch.place.layer,
                        launch.place.micro_batch,
                        starts[number],
                        ends[number],
                    )
                )
        return cls(tuple(rows))

    def busy(self) -> dict[Lane, float]:
        """Return the seconds that each lane works."""
        lanes = dict.fromkeys((Lane.COMPUTE, *(i.lane for i in self.intervals)))
        return {
            lane: sum(i.end - i.start for i in self.intervals if i.lane is lane) for lane in lanes
        }

    def exposed(self) -> dict[Lane, float]:
        """Return the seconds that each communication lane works while compute idles."""
        compute = sorted((i.start, i.end) for i in self.intervals if i.lane is Lane.COMPUTE)
        found: dict[Lane, float] = {lane: 0.0 for lane in self.busy() if lane is not Lane.COMPUTE}
        for lane in found:
            own = sorted((i.start, i.end) for i in self.intervals if i.lane is lane)
            work = sum(end - start for start, end in own)
            found[lane] = max(0.0, work - _overlap(own, compute))
        return found

    def between(self, first: float, last: float) -> tuple[Interval, ...]:
        """Return what lies between two times, cut there, with time 0 at the first."""
        cut = (_cut(interval, first, last) for interval in self.intervals)
        return tuple(interval for interval in cut if interval.end > interval.start)


def _overlap(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Return the seconds that two sorted rows of disjoint intervals have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return total


def _cut(interval: Interval, first: float, last: float) -> Interval:
    """Return the part of an interval between two times, with time 0 at the first."""
    return Interval(
        interval.lane,
        interval.strand,
        interval.operator,
        interval.layer,
        interval.micro_batch,
        min(max(interval.start, first), last) - first,
        min(max(interval.end, first), last) - first,
    )
