"""A pair of layers in the middle of a step: its timeline, its plan, and what it exposes by lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_dhellam.plan import Builder, GraphPair, Lane
from lightning_dhellam.search.model import (
    Costs,
    Interval,
    Timeline,
    Walk,
    as_planned,
    names,
    repeated,
)

_PAIRS = 4


@dataclass(frozen=True)
class Middle:
    """A layer forward beside one of its kind backward, between neighbours like them.

    Attributes:
        name: of the pair, such as `transformer|transformer`.
        plan: its plan, as a table.
        intervals: of the pair and its neighbours.
        exposed: share of all exposed communication that each lane has.
    """

    name: str
    plan: str
    intervals: tuple[Interval, ...]
    exposed: Mapping[Lane, float]


def middle(layer: GraphPair, builder: Builder, costs: Costs) -> Middle:
    """Play a pair of layers between others like it.

    Args:
        layer: the commonest one of a model.
        builder: makes its plan.
        costs: what operators cost.
    """
    stops = repeated(layer, layer, _PAIRS)
    plan = builder(layer.forward, layer.backward)
    plans = [plan] * len(stops)
    walk = Walk(stops, as_planned(costs.at_work((layer.forward, layer.backward)), stops, plans))
    order = walk.order(plans)
    starts, ends = walk.play(order, walk.first_of(plans))
    timeline = Timeline.of(walk, order, starts, ends)
    exposed = timeline.exposed()
    total = sum(exposed.values())
    shares = {lane: own / total if total else 0.0 for lane, own in exposed.items()}
    return Middle(names(layer, layer), str(plan), timeline.intervals, shares)
