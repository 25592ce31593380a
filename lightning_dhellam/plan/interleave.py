"""List scheduling of two graphs on one compute lane and the communication lanes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lightning_dhellam.plan.graph import Graph
from lightning_dhellam.plan.operator import Lane, Operator

_Candidate = tuple[int, Operator]


def interleave(graphs: Sequence[Graph]) -> list[tuple[Graph, Operator]]:
    """An issue order in which each strand's communication runs under the other's compute.

    At every step the operator that can start first is issued; among those that can start at
    once, the one with the longest way to the end of its graph. Weight gradients, which nothing
    waits for, so fill the gaps. The host waits for a value only when nothing else can start: the
    device works meanwhile. Costs are the operators' nominal ones.
    """
    ahead = [_time_to_end(graph) for graph in graphs]
    left = [list(graph.operators) for graph in graphs]
    finish: list[dict[str, float]] = [{} for _ in graphs]
    free_at: dict[Lane, float] = defaultdict(float)
    order: list[tuple[Graph, Operator]] = []

    def start(candidate: _Candidate) -> float:
        index, operator = candidate
        ready = max(
            (finish[index][name] for name in graphs[index].predecessors[operator.name]),
            default=0.0,
        )
        return max(ready, free_at[operator.lane])

    while any(left):
        candidates = [
            (index, operator)
            for index, operators in enumerate(left)
            for operator in operators
            if all(name in finish[index] for name in graphs[index].predecessors[operator.name])
        ]
        index, operator = min(
            candidates,
            key=lambda c: (
                start(c),
                c[1].waits,
                not c[1].moves,
                -ahead[c[0]][c[1].name],
                c[0],
            ),
        )
        begin = start((index, operator))
        finish[index][operator.name] = begin + operator.cost
        free_at[operator.lane] = begin + operator.cost
        left[index].remove(operator)
        order.append((graphs[index], operator))
    return order


def _time_to_end(graph: Graph) -> dict[str, float]:
    """Nominal cost of the longest chain from each operator to the end of the graph."""
    ahead: dict[str, float] = {}
    followers: dict[str, list[str]] = defaultdict(list)
    for name, before in graph.predecessors.items():
        for predecessor in before:
            followers[predecessor].append(name)
    for operator in reversed(graph.operators):
        rest = max((ahead[name] for name in followers[operator.name]), default=0.0)
        ahead[operator.name] = operator.cost + rest
    return ahead
