"""The reduction of gradients over data-parallel ranks, beside the last backward of a step.

Gradients fill buckets from the last layer to the first. A bucket that is full is reduced on the
`dp` lane, while the layers before it still compute and communicate:

    compute  |= layer 2 =|= layer 1 =|= layer 0 =|
    dp                   |== reduce ==|          |= rest =|
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_dhellam.plan import Graph, GraphPair, Issue, Lane, Operator, Plan, Strand
from lightning_dhellam.search.measure import Key
from lightning_dhellam.search.model.cost import Costs
from lightning_dhellam.search.model.slowdowns import Slowdowns
from lightning_dhellam.search.model.stops import Stop


@dataclass(frozen=True)
class Reductions:
    """What is reduced in a step.

    Attributes:
        key: key of the measured reduction of a bucket.
        bucket: bytes of the bucket that was measured.
        gradients: bytes of the gradients of each layer, first to last.
    """

    key: Key
    bucket: float
    gradients: tuple[float, ...]

    def due(self) -> dict[int, list[float]]:
        """Return what is reduced once the backward of a layer is done, as shares of a bucket.

        Layers behind which no bucket is full are left out.
        """
        found: dict[int, list[float]] = {}
        filled = 0.0
        for layer in reversed(range(len(self.gradients))):
            filled += self.gradients[layer]
            full, filled = divmod(filled, self.bucket)
            found[layer] = [1.0] * int(full)
        if filled:
            found[0].append(filled / self.bucket)
        return {layer: shares for layer, shares in found.items() if shares}

    def added(
        self, stops: Sequence[Stop], plans: Sequence[Plan], costs: Costs
    ) -> tuple[list[Stop], list[Plan], Costs]:
        """Return the stops, plans and costs of a step in which gradients are reduced as well."""
        due = self.due()
        last = max((stop.backward.micro_batch for stop in stops if stop.backward), default=-1)
        with_them: list[Stop] = []
        planned: list[Plan] = []
        for stop, plan in zip(stops, plans, strict=True):
            place = stop.backward
            shares = due.get(place.layer, []) if place and place.micro_batch == last else []
            if place is not None and shares:
                named = dict(map(_named, enumerate(shares)))
                reduced = _reducing(place.graphs.backward, named)
                costs = self._known(costs, place.graphs.backward, reduced, named)
                graphs = GraphPair(replace(place.graphs.forward, layouts=None), reduced)
                stop = replace(stop, backward=replace(place, graphs=graphs))
                plan = _with_rows(plan, reduced)
            with_them.append(stop)
            planned.append(plan)
        return with_them, planned, costs

    def _known(
        self, costs: Costs, graph: Graph, reduced: Graph, shares: Mapping[str, float]
    ) -> Costs:
        """Return costs that know the operators of `reduced`, which is `graph` with reductions."""
        own = dict(costs.keys.get(graph.fingerprint, {}))
        for name, share in shares.items():
            key = own[name] = self.key if share == 1.0 else f"{self.key} × {share:.6f}"
            if key not in costs.seconds:
                costs = _like(costs, key, self.key, share)
        return replace(costs, keys={**costs.keys, reduced.fingerprint: own})


def _like(costs: Costs, key: Key, other: Key, share: float) -> Costs:
    """Return costs with a key that takes a share of another's time, and disturbs as that does."""
    seconds = {**costs.seconds, key: share * costs.seconds[other]}
    slowdowns, behind = (
        {**table, **dict(_renamed(table, other, key))} for table in (costs.slowdowns, costs.behind)
    )
    return replace(costs, seconds=seconds, slowdowns=slowdowns, behind=behind)


def _renamed(
    table: Slowdowns, old: Key, new: Key
) -> Iterator[tuple[tuple[Key, Key], tuple[float, float]]]:
    for (a, b), value in table.items():
        if old in (a, b):
            yield (new if a == old else a, new if b == old else b), value


def _named(reduction: tuple[int, float]) -> tuple[str, float]:
    """Return the name of a reduction, which tells a whole bucket from the rest, and its share."""
    number, share = reduction
    return f"gradients.{'reduce' if share == 1.0 else 'rest'}{number}", share


def _reducing(graph: Graph, names: Iterable[str]) -> Graph:
    """Return a backward graph with reductions of the gradients that it completes."""
    complete = tuple(f"{o.name}.gradient" for o in graph.operators if o.accumulates)
    operators = [
        replace(o, writes=(*o.writes, f"{o.name}.gradient")) if o.accumulates else o
        for o in graph.operators
    ]
    operators += [Operator(name, Lane.DP, complete, (), _never) for name in names]
    sizes: Mapping[str, float] = {**graph.bytes_per_token, **dict.fromkeys(complete, 0.0)}
    # It is played and never run, so nobody asks how its slots lie.
    return replace(graph, operators=tuple(operators), bytes_per_token=sizes, layouts=None)


def _with_rows(plan: Plan, reduced: Graph) -> Plan:
    """Return the plan with the reductions issued behind the last addition to a gradient.

    Where an addition is left for the next pair of layers, so are they.
    """
    adding = {o.name for o in reduced.operators if o.accumulates}
    mine = [
        (at, row.lag)
        for at, row in enumerate(plan.rows)
        if isinstance(row, Issue) and row.strand is Strand.BACKWARD and row.operator in adding
    ]
    lag = max((late for _, late in mine), default=0)
    behind = max((at for at, late in mine if late == lag), default=len(plan.rows) - 1) + 1
    rows = tuple(
        Issue(Strand.BACKWARD, Lane.DP, o.name, lag) for o in reduced.operators if o.lane is Lane.DP
    )
    return replace(plan, rows=(*plan.rows[:behind], *rows, *plan.rows[behind:]))


def _never(*values: Any) -> None:
    raise AssertionError("a reduction that is played is not carried out")
