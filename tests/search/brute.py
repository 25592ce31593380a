"""Every valid order of a pair of layers, without any of the solver's short cuts."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dhellam.plan import Graph, GraphPair, Issue, Plan, PlanError, Strand, validate


def lag_choices(graph: Graph) -> Iterator[frozenset[str]]:
    """Every set of operators that a valid plan may let lag."""
    names = [operator.name for operator in graph.operators]
    for choice in range(1 << len(names)):
        lagging = frozenset(name for i, name in enumerate(names) if choice >> i & 1)
        if _may_lag(graph, lagging):
            yield lagging


def _may_lag(graph: Graph, lagging: frozenset[str]) -> bool:
    rows = [
        Issue(graph.direction, o.lane, o.name, lag=int(o.name in lagging)) for o in graph.operators
    ]
    try:
        validate(Plan("try", None, graph.name, tuple(rows)), None, graph)
    except PlanError:
        return False
    return True


def every_plan(pair: GraphPair, lags: bool = True) -> Iterator[Plan]:
    """Every valid plan of a layer's forward beside its own kind's backward."""
    for lagging in lag_choices(pair.backward) if lags else [frozenset[str]()]:
        for order in _orders(pair, lagging, []):
            yield Plan("brute", pair.name, pair.name, tuple(order))


def _orders(pair: GraphPair, lagging: frozenset[str], order: list[Issue]) -> Iterator[list[Issue]]:
    done = {(row.strand, row.operator) for row in order}
    complete = True
    for graph in (pair.forward, pair.backward):
        late = lagging if graph.direction is Strand.BACKWARD else frozenset[str]()
        for operator in graph.operators:
            if (graph.direction, operator.name) in done:
                continue
            complete = False
            lag = operator.name in late
            before = [n for n in graph.predecessors[operator.name] if (n in late) == lag]
            if all((graph.direction, name) in done for name in before):
                row = Issue(graph.direction, operator.lane, operator.name, lag=int(lag))
                yield from _orders(pair, lagging, [*order, row])
    if complete:
        yield order
