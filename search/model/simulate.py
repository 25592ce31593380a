"""Plays plans over a whole training step with the cost function of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_dhellam.plan import Builder, GraphPair, Kind, Lane, Plan, Strand, kind_of
from lightning_dhellam.search.model.cost import Costs
from lightning_dhellam.search.model.walk import Order, Stop, Walk, as_planned, repeated, step_stops
from lightning_dhellam.search.solve.orders import Problem

_ROUNDING = 1e-12
_CLOCK_ROUNDS = 6
_CLOCK_SETTLED = 0.002


@dataclass(frozen=True, slots=True)
class Interval:
    """One operator on a timeline.

    Attributes:
        lane: that it occupies.
        strand: of its micro-batch.
        operator: its name.
        layer: index of the layer, or of the pair in a picture of a few pairs.
        micro_batch: index.
        start: seconds.
        end: seconds.
    """

    lane: Lane
    strand: Strand
    operator: str
    layer: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What a step would do.

    Attributes:
        plan: name of the plans.
        seconds: from the first start to the last end.
        intervals: in issue order.
        busy: seconds that each lane works.
        exposed: by communication lane: seconds that it works while compute idles.
        waited: by lane: seconds that compute idles because its next operator waits for that
            lane, the critical part of `exposed`.
        peak_bytes: that slots take at once, by issue order.
    """

    plan: str
    seconds: float
    intervals: tuple[Interval, ...]
    busy: Mapping[Lane, float]
    exposed: Mapping[Lane, float]
    waited: Mapping[Lane, float]
    peak_bytes: float

    @property
    def utilisation(self) -> dict[Lane, float]:
        """Share of the step that each lane works."""
        return {lane: busy / self.seconds for lane, busy in self.busy.items()}

    def window(self, first: float, last: float) -> tuple[Interval, ...]:
        """The intervals that overlap the time from `first` to `last`."""
        return tuple(i for i in self.intervals if i.end > first and i.start < last)


def simulate(
    layers: Sequence[GraphPair],
    builder: Builder,
    costs: Costs,
    *,
    micro_batches: int,
    tokens: int = 1,
) -> Simulation:
    """Play a training step of one rank.

    Args:
        layers: first to last, each in both directions.
        builder: makes the plan of each pair of graphs.
        costs: of the operators.
        micro_batches: of the step.
        tokens: of a micro-batch, for the peak of memory.
    """
    return _simulate(step_stops(layers, micro_batches), builder, costs, tokens)


def _simulate(stops: Sequence[Stop], builder: Builder, costs: Costs, tokens: int) -> Simulation:
    made: dict[Kind, Plan] = {}
    plans = [_plan(stop, builder, made) for stop in stops]
    costs = as_planned(costs, stops, plans)
    share = 1.0
    for _ in range(_CLOCK_ROUNDS):
        # How busy compute is decides how fast it is, and the other way round.
        found = _played(stops, plans, costs.clocked(share), tokens)
        before, share = share, found.utilisation[Lane.COMPUTE]
        if costs.clock.slowdown(before) <= costs.clock.slowdown(share) * (1 + _CLOCK_SETTLED):
            break
    return found


def _played(stops: Sequence[Stop], plans: Sequence[Plan], costs: Costs, tokens: int) -> Simulation:
    walk = Walk(stops, costs)
    order = walk.order(plans)
    starts, ends = walk.play(order, walk.first_of(plans))
    timeline = Timeline.of(walk, order, starts, ends)
    return Simulation(
        plans[0].name,
        max(ends),
        timeline.intervals,
        timeline.busy(),
        timeline.exposed(),
        _waited(walk, order, starts, ends),
        walk.peak_bytes(order, tokens),
    )


def _plan(stop: Stop, builder: Builder, made: dict[Kind, Plan]) -> Plan:
    key = kind_of(*stop.graphs)
    if key not in made:
        made[key] = builder(*stop.graphs)
    return made[key]


@dataclass(frozen=True)
class Timeline:
    """Intervals on lanes: simulated, or measured by whoever makes one."""

    intervals: tuple[Interval, ...]

    @classmethod
    def of(
        cls, walk: Walk, order: Order, starts: Sequence[float], ends: Sequence[float]
    ) -> Timeline:
        """The timeline of a played walk."""
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
        """Seconds that each lane works."""
        lanes = dict.fromkeys((Lane.COMPUTE, *(i.lane for i in self.intervals)))
        return {
            lane: sum(i.end - i.start for i in self.intervals if i.lane is lane) for lane in lanes
        }

    def exposed(self) -> dict[Lane, float]:
        """Seconds that each communication lane works while compute idles."""
        compute = sorted((i.start, i.end) for i in self.intervals if i.lane is Lane.COMPUTE)
        found: dict[Lane, float] = {lane: 0.0 for lane in self.busy() if lane is not Lane.COMPUTE}
        for lane in found:
            spans = sorted((i.start, i.end) for i in self.intervals if i.lane is lane)
            work = sum(end - start for start, end in spans)
            found[lane] = max(0.0, work - _overlap(spans, compute))
        return found

    def between(self, first: float, last: float) -> tuple[Interval, ...]:
        """What lies between two times, cut there, with time 0 at the first."""
        cut = (_cut(interval, first, last) for interval in self.intervals)
        return tuple(interval for interval in cut if interval.end > interval.start)


def _overlap(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Seconds that two sorted rows of disjoint spans have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return total


def _waited(
    walk: Walk, order: Order, starts: Sequence[float], ends: Sequence[float]
) -> dict[Lane, float]:
    """Each idle gap of compute, blamed on the lane of what its next operator waited for last."""
    found: dict[Lane, float] = {lane: 0.0 for lane in walk.lanes if lane is not Lane.COMPUTE}
    free = 0.0
    for launch in order:
        if launch is None or walk.lane[launch]:
            continue
        gap = starts[launch] - free
        free = ends[launch]
        if gap > _ROUNDING and walk.waits[launch]:
            last = max(walk.waits[launch], key=lambda before: ends[before])
            lane = walk.lanes[walk.lane[last]]
            if lane is not Lane.COMPUTE:
                found[lane] += gap
    return found


@dataclass(frozen=True)
class SteadyState:
    """The middle of a deep model, where the same pair of layers repeats itself.

    Attributes:
        plan: name.
        period: seconds from one pair of layers to the next.
        exposed: by communication lane, seconds per pair that it works while compute idles.
        intervals: of a few pairs, time 0 at the first one shown; layers are numbered from 0.
    """

    plan: str
    period: float
    exposed: Mapping[Lane, float]
    intervals: tuple[Interval, ...]


def steady_state(
    ahead: GraphPair | None,
    behind: GraphPair | None,
    plan: Plan,
    costs: Costs,
    *,
    shown: int = 2,
) -> SteadyState:
    """Play `plan` again and again, and look at the middle.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        plan: of this pair.
        costs: of the operators.
        shown: pairs to keep the intervals of.
    """

    problem = Problem(ahead, behind, costs)
    period = problem.seconds_of_plan(plan)
    rounds = 2 * shown + 6
    walk = Walk(repeated(ahead, behind, rounds), costs)
    plans = [plan] * rounds
    order = walk.order(plans)
    starts, ends = walk.play(order, walk.first_of(plans))
    first = min(starts[walk.first[4] : walk.first[5]])
    timeline = Timeline.of(walk, order, starts, ends)
    rows = timeline.between(first, first + shown * period)
    exposed = {lane: value / shown for lane, value in Timeline(rows).exposed().items()}
    return SteadyState(plan.name, period, exposed, rows)


def _cut(interval: Interval, first: float, last: float) -> Interval:
    """The part of an interval between two times, with time 0 at the first."""
    return Interval(
        interval.lane,
        interval.strand,
        interval.operator,
        interval.layer,
        interval.micro_batch,
        min(max(interval.start, first), last) - first,
        min(max(interval.end, first), last) - first,
    )
