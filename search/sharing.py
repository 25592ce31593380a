"""Chooses which operators leave processors to communication, for a given order of all of them.

A GEMM that leaves processors takes longer, but communication begins beside it at any time; one that
takes all lets communication wait for its end. Which is better depends on what the order puts there.
"""

from __future__ import annotations

from lightning_dhellam.plan import GraphPair, Plan
from lightning_dhellam.search.cost import Costs
from lightning_dhellam.search.orders import Problem

_WORTH = 1e-4
"""Share of the time that a change must gain."""


def shared(
    ahead: GraphPair | None, behind: GraphPair | None, plan: Plan, costs: Costs
) -> frozenset[tuple[str, str]]:
    """The operators of a model that had better leave processors, as `Costs.spared` has them.

    From those that do in `costs` one operator of this pair after the other changes, always the one
    that gains most, until none gains.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        plan: of this pair, which repeats itself.
        costs: of the operators.
    """
    graphs = [pair.forward for pair in (ahead,) if pair] + [p.backward for p in (behind,) if p]
    own = {(graph.fingerprint, o.name) for graph in graphs for o in graph.operators}

    def seconds(spared: frozenset[tuple[str, str]]) -> float:
        return Problem(ahead, behind, costs.sparing(spared).at_work(graphs)).seconds_of_plan(plan)

    chosen, best = costs.spared, seconds(costs.spared)
    while True:
        changes = [chosen ^ {operator} for operator in sorted(own & costs.sparable)]
        gain, change = min(((seconds(c), i) for i, c in enumerate(changes)), default=(best, 0))
        if gain >= best * (1 - _WORTH):
            return chosen
        chosen, best = changes[change], gain
