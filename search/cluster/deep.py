"""Costs of visits through chunks of layers, of which few are played where many are alike."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_dhellam.pipeline.schedules import Visit
from lightning_dhellam.plan import Builder, Graph, Kind, Plan, kind_of
from lightning_dhellam.search.cluster.work import THIN, Work
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import LayerCosts, LeastCosts, VisitCost
from lightning_dhellam.search.pipeline.visits import Played


class Deep:
    """Costs of visits through many layers that are alike, from those through few.

    None is shorter than all of its layers let it be.

    Args:
        thinner: costs with the least of `THIN` in the smallest chunk.
        thin: costs with the most.
        depth: layers of the smallest chunk.
        least: of all layers.
    """

    def __init__(
        self, thinner: LayerCosts, thin: LayerCosts, depth: int, least: LeastCosts
    ) -> None:
        few, more = THIN
        self._both = thinner, thin
        self._least = least
        self._times = (depth - more) / (more - few)
        self.bytes_sent = thin.bytes_sent
        self.order_of = thin.order_of

    def of(self, works: Visit) -> VisitCost:
        """Return the cost of a visit."""
        less, more = (costs.of(works) for costs in self._both)
        least = self._least.of(works)

        def at(a: float, b: float) -> float:
            return b + (b - a) * self._times

        return VisitCost(
            max(at(less.seconds, more.seconds), least.seconds),
            at(less.compute, more.compute),
            {
                strand: max(at(less.ready[strand], more.ready[strand]), least.ready[strand])
                for strand in more.ready
            },
            at(less.rise, more.rise),
            at(less.change, more.change),
        )


def costs_of(
    work: Work,
    costs: Costs,
    builders: Mapping[str, Builder],
    sketch: bool,
    known: Played | None = None,
) -> LayerCosts | Deep:
    """Return what visits cost: of few layers a chunk, if a sketch is enough.

    See `LayerCosts` for the visits that are `known`.
    """
    if sketch and work.is_deep:
        thinner, thin = (_layer_costs(work.shallow(n), costs, builders, known) for n in THIN)
        least = LeastCosts(_layer_costs(work, costs, builders, None), known)
        return Deep(thinner, thin, min(filter(None, work.split)), least)
    return _layer_costs(work, costs, builders, known)


def _layer_costs(
    work: Work, costs: Costs, builders: Mapping[str, Builder], known: Played | None
) -> LayerCosts:
    chunks = [[work.layers[n] for n in chunk] for chunk in work.chunks]
    return LayerCosts(chunks, costs, tokens=work.tokens, builders=builders, known=known)


def remembered(build: Builder) -> Builder:
    """Return a builder that makes each plan once."""
    known: dict[Kind, Plan] = {}

    def make(forward: Graph | None, backward: Graph | None) -> Plan:
        key = kind_of(forward, backward)
        if key not in known:
            known[key] = build(forward, backward)
        return known[key]

    return make
