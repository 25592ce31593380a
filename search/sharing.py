"""Chooses which operators leave processors to communication, for a given order of all of them.

A GEMM that leaves processors takes longer, but communication begins beside it at any time; one that
takes all lets communication wait for its end. Which is better depends on what the order puts there.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_dhellam.plan import GraphPair, Plan
from lightning_dhellam.search.cost import Costs, Spared
from lightning_dhellam.search.orders import Problem, graphs_of

_WORTH = 1e-3
"""Share of the time that a change must gain. Measurements are not truer than that."""


def sparable(ahead: GraphPair | None, behind: GraphPair | None, costs: Costs) -> Spared:
    """The operators of a pair of layers that can leave processors."""
    graphs = graphs_of(ahead, behind)
    own = {(graph.fingerprint, o.name) for graph in graphs for o in graph.operators}
    return costs.sparable & own


def shared(ahead: GraphPair | None, behind: GraphPair | None, plan: Plan, costs: Costs) -> Spared:
    """The operators of a pair of layers that had better leave processors.

    From those that do in `costs` one after the other changes, always the one that gains most, until
    none gains.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        plan: of this pair, which repeats itself.
        costs: of the operators.
    """
    graphs, able = graphs_of(ahead, behind), sorted(sparable(ahead, behind, costs))
    # A plan is timed by the costs alone.
    costs = replace(costs, samples=())

    def seconds(spared: Spared) -> float:
        return Problem(ahead, behind, costs.sparing(spared).at_work(graphs)).seconds_of_plan(plan)

    chosen, best = costs.spared, seconds(costs.spared)
    while True:
        changes = [chosen ^ {operator} for operator in able]
        gain, change = min(((seconds(c), i) for i, c in enumerate(changes)), default=(best, 0))
        if gain >= best * (1 - _WORTH):
            return chosen
        chosen, best = changes[change], gain
