"""Costs of layers that make other slots again than those that were measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lightning_dhellam.plan import GraphPair, Operator
from lightning_dhellam.plan.passes import AGAIN
from lightning_dhellam.search.model import Costs


def of_forward(costs: Costs, measured: GraphPair, operator: Operator) -> float:
    """Return the seconds of an operator of forward, or of a part of one.

    A part is not measured, and takes its nominal share of the whole.
    """
    own = costs.keys[measured.forward.fingerprint]
    if operator.name in own:
        return costs.seconds[own[operator.name]]
    whole = next(o for o in measured.forward.operators if operator in o.remakes)
    share = operator.cost / whole.cost if whole.cost else 1.0
    return costs.seconds[own[whole.name]] * share


def covering(costs: Costs, layers: Iterable[tuple[GraphPair, GraphPair]]) -> Costs:
    """Return the costs with those of further layers, without other measurements' samples.

    Args:
        costs: of layers that were measured.
        layers: a layer that was measured, and the same one with other slots made again.
    """
    keys, seconds = dict(costs.keys), dict(costs.seconds)
    compute = set(costs.compute)
    for measured, other in layers:
        ahead = keys[measured.forward.fingerprint]
        theirs = keys[measured.backward.fingerprint]
        keys.setdefault(other.forward.fingerprint, ahead)
        back = {}
        for operator in other.backward.operators:
            name = operator.name.removesuffix(AGAIN)
            if operator.name in theirs:
                back[operator.name] = theirs[operator.name]
            elif name in ahead:
                back[operator.name] = ahead[name]
            else:
                part = next(
                    o
                    for whole in measured.forward.operators
                    for o in whole.remakes
                    if o.name == name
                )
                key = back[operator.name] = f"{measured.name}/{operator.name}"
                seconds[key] = of_forward(costs, measured, part)
                compute.add(key)
        keys.setdefault(other.backward.fingerprint, back)
    return replace(costs, keys=keys, seconds=seconds, compute=frozenset(compute), samples=())
