"""A stage's step played walk by walk, with what its layers make again and have on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.pipeline.stage import Leg
from lightning_dhellam.plan import Builder, GraphPair, Kind, Plan, kind_of
from lightning_dhellam.search.model import Costs, Place, Stop, Walk, as_planned
from lightning_dhellam.search.model.halves import halves
from lightning_dhellam.search.recompute.tables import BUDGET
from lightning_dhellam.search.solve import solve_pair


def played(
    layers: Sequence[GraphPair],
    legs: Sequence[Leg],
    costs: Costs,
    *,
    tokens: int,
    builder: Builder | None,
    slack: float = 0.0,
    made: dict[Kind, Plan] | None = None,
) -> tuple[float, float]:
    """Return seconds and bytes of slots of a step, whose walks follow each other at once.

    Args:
        layers: of a stage.
        legs: its walks.
        costs: of the layers' operators, and of the halves of their backwards.
        tokens: of a micro-batch.
        builder: makes the plans; None to search them.
        slack: bytes that a searched plan of a pair of layers may take above the sequential one.
        made: plans that are known; those that are made are added.
    """
    stops = list(_stops(layers, legs))
    made = {} if made is None else made
    for stop in stops:
        kind = kind_of(*stop.graphs)
        if kind in made:
            continue
        if builder is not None:
            made[kind] = builder(*stop.graphs)
        else:
            made[kind] = solve_pair(
                *stop.pairs, costs, tokens=tokens, memory_slack=slack, budget=BUDGET
            ).plan
    plans = [made[kind_of(*stop.graphs)] for stop in stops]
    walk = Walk(stops, as_planned(costs, stops, plans))
    order = walk.order(plans)
    _, ends = walk.play(order, walk.first_of(plans))
    return max(ends), walk.peak_bytes(order, tokens)


def _stops(layers: Sequence[GraphPair], legs: Sequence[Leg]) -> Iterator[Stop]:
    cut: dict[int, tuple[GraphPair, GraphPair]] = {}
    for leg in legs:
        for ahead, behind in leg.pairs:
            forward = backward = None
            if ahead is not None:
                assert leg.forward is not None
                forward = Place(leg.forward, ahead, layers[ahead])
            if behind is not None:
                assert leg.backward is not None
                whole = layers[behind]
                if leg.part is not Part.BACKWARD:
                    if behind not in cut:
                        cut[behind] = halves(whole)
                    whole = cut[behind][leg.part is Part.WEIGHT]
                if whole.backward.operators:
                    backward = Place(leg.backward, behind, whole)
            if forward or backward:
                yield Stop(forward, backward)
