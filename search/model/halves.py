"""Halves of backwards as layers of their own, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_dhellam.plan import GraphPair, passes
from lightning_dhellam.search.model.cost import Costs


def halves(pair: GraphPair) -> tuple[GraphPair, GraphPair]:
    """Return the layer with the half of backward that others wait for, and with the other half.

    The first half leads to the gradient of the layer's input; the second has the gradients of
    weights and what only they read. The second takes in what the first leaves for it. Transfers to
    other stages, which are no operators, are in neither. They are played and never run, so nobody
    asks how their slots lie.
    """
    first, second = passes.halves(replace(pair.backward, receives=(), sends=(), layouts=None))
    known = {*first.inputs, *first.written}
    left = tuple(s for s in dict.fromkeys(second.foreign) if s in known)
    return tuple(  # type: ignore[return-value]
        GraphPair(replace(pair.forward, name=half.name, layouts=None), half)
        for half in (first, replace(second, inputs=left))
    )


def with_halves(costs: Costs, layers: Sequence[GraphPair]) -> Costs:
    """Return costs that also know the halves of the layers' backwards: they have its operators."""
    keys = dict(costs.keys)
    for pair in {pair.backward.fingerprint: pair for pair in layers}.values():
        for half in halves(pair):
            keys[half.backward.fingerprint] = keys[pair.backward.fingerprint]
    return replace(costs, keys=keys)
