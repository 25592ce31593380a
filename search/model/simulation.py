"""Plays plans over a whole training step with the cost function of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_dhellam.plan import Builder, GraphPair, Kind, Lane, Plan, kind_of
from lightning_dhellam.search.model.cost import Costs
from lightning_dhellam.search.model.reductions import Reductions
from lightning_dhellam.search.model.stops import Stop, step_stops
from lightning_dhellam.search.model.timeline import Interval, Timeline
from lightning_dhellam.search.model.walk import Order, Walk, as_planned

_ROUNDING = 1e-12
_CLOCK_ROUNDS = 6
_CLOCK_SETTLED = 0.002


@dataclass(frozen=True)
class Simulation:
    """What a training step of one rank would do.

    Attributes:
        plan: name of the plans.
        seconds: seconds from the first start to the last end.
        intervals: the operators, in issue order.
        busy: seconds that each lane works.
        exposed: seconds that each communication lane works while compute idles.
        waited: seconds that compute idles because its next operator waits for a lane, by lane:
            the critical part of `exposed`.
        peak_bytes: most bytes that slots take at once, by issue order.
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
        """Return the share of the step that each lane works."""
        return {lane: busy / self.seconds for lane, busy in self.busy.items()}

    def window(self, first: float, last: float) -> tuple[Interval, ...]:
        """Return the intervals that overlap the time from `first` to `last`, in seconds."""
        return tuple(i for i in self.intervals if i.end > first and i.start < last)


def simulate(
    layers: Sequence[GraphPair],
    builder: Builder,
    costs: Costs,
    *,
    micro_batches: int,
    tokens: int = 1,
    reductions: Reductions | None = None,
) -> Simulation:
    """Play a training step of one rank.

    Args:
        layers: layers of the model, first to last, each in both directions.
        builder: makes the plan of each pair of graphs.
        costs: what the operators cost.
        micro_batches: how many the step has.
        tokens: how many a micro-batch has, for the peak of memory.
        reductions: what data-parallel ranks reduce; None where they do not, or nobody knows.
    """
    stops = step_stops(layers, micro_batches)
    made: dict[Kind, Plan] = {}
    plans = [_plan(stop, builder, made) for stop in stops]
    if reductions is not None:
        stops, plans, costs = reductions.added(stops, plans, costs)
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


def _waited(
    walk: Walk, order: Order, starts: Sequence[float], ends: Sequence[float]
) -> dict[Lane, float]:
    """Blame each idle gap of compute on the lane of what its next operator waited for last."""
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
