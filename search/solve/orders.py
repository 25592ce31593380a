"""Issue orders of one pair of layers: which are valid, and how they change.

An order is a list of operator numbers, forward graph first; a bit mask says which of them lag, that
is, are carried out for the previous pair of layers. Orders change by moves that keep them valid.
Which operators leave processors to communication changes with them, if that is to be chosen: one
that does takes longer, but communication begins beside it at any time, so which of them had better
do so depends on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_dhellam.plan import Graph, GraphPair, Issue, Operator, Plan, Strand
from lightning_dhellam.search.model import lanes_of


class PairOrder(NamedTuple):
    """An issue order of a pair of layers.

    Attributes:
        numbers: operator numbers, as they are issued.
        lagging: bit mask of the operators that lag.
        first: bit mask of the communication that begins before the compute issued next.
        spare: bit mask of the operators that leave processors to communication, where that is
            chosen with the order.
    """

    numbers: tuple[int, ...]
    lagging: int = 0
    first: int = 0
    spare: int = 0


def graphs_of(ahead: GraphPair | None, behind: GraphPair | None) -> list[Graph]:
    """Return the graphs of a pair of layers, forward first."""
    return [pair.forward for pair in (ahead,) if pair] + [p.backward for p in (behind,) if p]


class Orders:
    """Knows which orders of a pair of layers are valid, and moves from one to the next.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        cyclic: whether the pair repeats itself, so that operators may lag.

    Attributes:
        operators: of both graphs, forward first, each with its graph: operators have the numbers
            of this list.
        size: how many operators there are.
        number: number of each operator, by strand and name.
        lanes: compute, and the other lanes in use.
        lane: index in `lanes` of the lane of each operator.
        before: operators that write what each one reads.
        ancestors: bit mask of all that each operator depends on.
        descendants: bit mask of all that depend on each operator.
        loose: bit mask of the operators that may lag.
        communications: numbers of the operators that communicate.
        looks: whether the host waits for some operator.
    """

    def __init__(self, ahead: GraphPair | None, behind: GraphPair | None, *, cyclic: bool) -> None:
        self.forward = ahead.forward if ahead else None
        self.backward = behind.backward if behind else None
        graphs = graphs_of(ahead, behind)
        self.operators: Sequence[tuple[Graph, Operator]] = [
            (graph, operator) for graph in graphs for operator in graph.operators
        ]
        self.size = len(self.operators)
        self.cyclic = cyclic
        self.number = {(g.direction, o.name): i for i, (g, o) in enumerate(self.operators)}
        self.lanes = lanes_of(graphs)
        self.lane = [self.lanes.index(operator.lane) for _, operator in self.operators]
        self._relations()

    def _relations(self) -> None:
        self.before: list[tuple[int, ...]] = [
            tuple(self.number[graph.direction, name] for name in graph.predecessors[operator.name])
            for graph, operator in self.operators
        ]
        self.ancestors = [0] * self.size
        self.descendants = [0] * self.size
        for x, before in enumerate(self.before):
            for y in before:
                self.ancestors[x] |= self.ancestors[y] | 1 << y
        for x in range(self.size):
            for y in range(self.size):
                if self.ancestors[x] >> y & 1:
                    self.descendants[y] |= 1 << x
        handing = 0
        for x, (graph, operator) in enumerate(self.operators):
            if graph.direction is Strand.FORWARD or set(operator.writes) & set(graph.outputs):
                handing |= 1 << x | self.ancestors[x]
        self.loose = ((1 << self.size) - 1) & ~handing if self.cyclic else 0
        self.loose_ones = [x for x in range(self.size) if self.loose >> x & 1]
        self.communications = [x for x, (_, o) in enumerate(self.operators) if o.is_communication]
        self.looks = any(operator.waits for _, operator in self.operators)

    def default(self) -> PairOrder:
        """Return forward, then backward, in the graphs' own order."""
        return PairOrder(tuple(range(self.size)))

    def valid(self, order: PairOrder) -> bool:
        """Tell whether nothing is issued before what it reads is written."""
        done = 0
        for x in order.numbers:
            late = order.lagging if order.lagging >> x & 1 else ~order.lagging
            if self.ancestors[x] & late & ~done:
                return False
            done |= 1 << x
        return True

    def related(self, order: PairOrder, x: int, y: int) -> bool:
        """Tell whether the order of two operators matters beyond when they are issued."""
        apart = (order.lagging >> x ^ order.lagging >> y) & 1
        linked = (self.ancestors[x] >> y | self.ancestors[y] >> x) & 1
        return self.lane[x] == self.lane[y] or bool(linked and not apart)

    def moved(self, order: PairOrder, source: int, target: int) -> PairOrder:
        """Move the operator at `source` to `target`, and what must go along with it."""
        numbers, lagging = order.numbers, order.lagging
        x = numbers[source]
        same = lagging if lagging >> x & 1 else ~lagging
        if target < source:
            company = (self.ancestors[x] & same) | 1 << x
            taken, rest = _parted(numbers[target : source + 1], company)
            return order._replace(
                numbers=(*numbers[:target], *taken, *rest, *numbers[source + 1 :])
            )
        company = (self.descendants[x] & same) | 1 << x
        taken, rest = _parted(numbers[source : target + 1], company)
        return order._replace(numbers=(*numbers[:source], *rest, *taken, *numbers[target + 1 :]))

    def toggled(self, order: PairOrder, x: int) -> PairOrder:
        """Let `x` begin or cease to lag, and what must go along with it: the same work order.

        What begins to lag goes to the front, and what ceases to goes to the end, which is the
        same place in a pair that repeats itself.
        """
        lagging = order.lagging
        if lagging >> x & 1:
            company = (self.ancestors[x] & lagging) | 1 << x
        else:
            company = (self.descendants[x] & ~lagging) | 1 << x
        taken, rest = _parted(order.numbers, company)
        if lagging >> x & 1:
            return order._replace(numbers=(*rest, *taken), lagging=lagging & ~company)
        return order._replace(numbers=(*taken, *rest), lagging=lagging | company)

    def plan(self, order: PairOrder, name: str = "auto") -> Plan:
        """Return the order as a plan."""
        rows = []
        for x in order.numbers:
            graph, operator = self.operators[x]
            lag, first = order.lagging >> x & 1, bool(order.first >> x & 1)
            spare = bool(order.spare >> x & 1)
            rows.append(Issue(graph.direction, operator.lane, operator.name, lag, first, spare))
        forward = self.forward.name if self.forward else None
        backward = self.backward.name if self.backward else None
        return Plan(name, forward, backward, tuple(rows))

    def order(self, plan: Plan) -> PairOrder:
        """Return the order of a plan, without its barriers."""
        rows = [(self.number[row.strand, row.operator], row) for row in plan.issues]
        lagging = sum(1 << x for x, row in rows if row.lag)
        first = sum(1 << x for x, row in rows if row.first)
        spare = sum(1 << x for x, row in rows if row.spare)
        return PairOrder(tuple(x for x, _ in rows), lagging, first, spare)


def _parted(numbers: Sequence[int], company: int) -> tuple[list[int], list[int]]:
    """Return those of the numbers that are in a bit mask, and the others."""
    taken: list[int] = []
    rest: list[int] = []
    for y in numbers:
        (taken if company >> y & 1 else rest).append(y)
    return taken, rest
