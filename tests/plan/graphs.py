"""Small graphs written as text, and random valid plans of any pair of graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_dhellam.plan import (
    BUILDERS,
    Barrier,
    Builder,
    Graph,
    GraphPair,
    Issue,
    Lane,
    Operator,
    Plan,
    Strand,
)
from lightning_dhellam.plan.plan import Row


def no_launch(*values: Any) -> None:
    raise AssertionError("graphs of these tests never run")


def graph(
    direction: str, text: str, inputs: str = "", outputs: str = "", name: str = "toy"
) -> Graph:
    """A graph from lines `name lane: slots read -> slots written`."""
    operators = []
    for line in text.strip().splitlines():
        head, _, slots = line.partition(":")
        operator, lane = head.split()
        reads, _, writes = slots.partition("->")
        operators.append(
            Operator(operator, Lane(lane), tuple(reads.split()), tuple(writes.split()), no_launch)
        )
    return Graph(
        name, Strand(direction), tuple(operators), tuple(inputs.split()), tuple(outputs.split())
    )


FORWARD = """
norm compute: x -> normal
gather tp: normal -> whole
gemm compute: whole -> partial
scatter tp: partial -> y
"""
BACKWARD = """
grad_gather tp: dy -> d_partial
dgrad compute: d_partial -> d_whole
grad_scatter tp: d_whole -> d_normal
regather tp: normal -> whole_again
wgrad compute: d_partial whole_again ->
norm.grad compute: d_normal x -> dx
"""


def toy_pair() -> GraphPair:
    """A norm and a linear layer between two ranks."""
    return GraphPair(graph("forward", FORWARD, "x", "y"), graph("backward", BACKWARD, "dy", "dx"))


def random_builder(seed: int) -> Callable[[Graph | None, Graph | None], Plan]:
    """A builder of random valid plans, some with barriers, some that leave work to the next
    pair, some with communication that goes first, some with GEMMs that leave it processors.

    The same seed and graphs give the same plan, on every rank and in any order of calls.
    """

    def build(forward: Graph | None, backward: Graph | None) -> Plan:
        graphs = [graph for graph in (forward, backward) if graph]
        draw = random.Random(f"{seed} {[graph.fingerprint for graph in graphs]}")
        barriers = draw.choice((0.0, 0.0, 0.1, 0.4))
        lags = draw.choice((0.0, 0.0, 0.5, 1.0))
        firsts = draw.choice((0.0, 0.3, 1.0))
        spares = draw.choice((0.0, 0.5, 1.0))
        rows: list[Issue | Barrier] = []
        left = [(graph, operator) for graph in graphs for operator in graph.operators]
        lagging = {graph.direction: _lagging(graph, lags, draw) for graph in graphs}
        while left:
            graph, operator = draw.choice([o for o in left if _ready(*o, left, lagging)])
            left.remove((graph, operator))
            if draw.random() < barriers:
                rows.append(Barrier())
            lag = int(operator.name in lagging[graph.direction])
            first = operator.is_communication and draw.random() < firsts
            spare = operator.shrinks and draw.random() < spares
            rows.append(Issue(graph.direction, operator.lane, operator.name, lag, first, spare))
        names = (graph.name if graph else None for graph in (forward, backward))
        return Plan(f"random-{seed}", *names, tuple(rows))

    return build


def _lagging(graph: Graph, share: float, draw: random.Random) -> set[str]:
    """Operators to leave to the next pair: nothing of this one may wait for them."""
    chosen: set[str] = set()
    for operator in reversed(graph.operators):
        followed = all(name in chosen for name in graph.followers[operator.name])
        handed_over = set(operator.writes) & set(graph.outputs)
        if followed and not handed_over and draw.random() < share:
            chosen.add(operator.name)
    return chosen


def _ready(
    graph: Graph,
    operator: Operator,
    left: list[tuple[Graph, Operator]],
    lagging: dict[Strand, set[str]],
) -> bool:
    late = lagging[graph.direction]
    waiting = {other.name for owner, other in left if owner is graph}
    if operator.name in late:
        waiting &= late
    return waiting.isdisjoint(graph.predecessors[operator.name])


def sparing(name: str) -> Builder:
    """A built-in plan with every GEMM that can leaving processors to communication."""

    def build(forward: Graph | None, backward: Graph | None) -> Plan:
        graphs = {Strand.FORWARD: forward, Strand.BACKWARD: backward}
        plan = BUILDERS[name](forward, backward)
        rows: list[Row] = []
        for row in plan.rows:
            graph = graphs[row.strand] if isinstance(row, Issue) else None
            if graph is not None and isinstance(row, Issue):
                row = replace(row, spare=graph.by_name[row.operator].shrinks)
            rows.append(row)
        return replace(plan, rows=tuple(rows))

    return build
