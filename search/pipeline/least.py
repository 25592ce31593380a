"""What visits take at least, in whatever order their operators are issued.

A lane does one thing at a time, and what reads a slot waits for what writes it. So a visit takes as
long as its busiest lane works, and as long as the longest chain of operators of either strand of
which each reads what the one before it writes, however well all else hides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_dhellam.pipeline.schedules import Visit, Work
from lightning_dhellam.plan import Graph, Lane, Strand
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline.visits import LayerCosts, Played, VisitCost


@dataclass(frozen=True)
class Chain:
    """What graphs take at least that a strand goes through.

    Attributes:
        busy: seconds that each lane works.
        through: seconds from the inputs of the first to the outputs of the last.
        whole: seconds from those inputs to the end of all that follows from them.
        computed: the same up to the end of what computes.
    """

    busy: Mapping[Lane, float]
    through: float
    whole: float
    computed: float

    @classmethod
    def of(cls, graph: Graph, costs: Costs) -> Chain:
        """Follow the slots of a graph. One without inputs begins with its computation."""
        busy: dict[Lane, float] = {}
        there = dict.fromkeys(graph.inputs, 0.0)
        whole = computed = 0.0
        for operator in graph.operators:
            seconds = costs.alone(graph, operator.name)
            busy[operator.lane] = busy.get(operator.lane, 0.0) + seconds
            waits = [there[slot] for slot in operator.reads if slot in there]
            if not waits and (graph.inputs or not operator.computes):
                continue
            end = max(waits, default=0.0) + seconds
            there.update(dict.fromkeys(operator.writes, end))
            whole = max(whole, end)
            computed = max(computed, end) if operator.computes else computed
        through = min((there.get(slot, 0.0) for slot in graph.outputs), default=0.0)
        return cls(busy, through, whole, computed)

    @classmethod
    def joined(cls, chains: Iterable[Chain]) -> Chain:
        """Graphs one after the other, each of which goes on from the outputs of the last."""
        busy: dict[Lane, float] = {}
        at = whole = computed = 0.0
        for one in chains:
            for lane, seconds in one.busy.items():
                busy[lane] = busy.get(lane, 0.0) + seconds
            whole, computed = max(whole, at + one.whole), max(computed, at + one.computed)
            at += one.through
        return cls(busy, at, whole, computed)


class LeastCosts:
    """Costs of visits through chunks of layers, of which none is shorter than they say.

    What they save and send is exact: it does not depend on when anything is done.

    Args:
        layers: knows the layers of each chunk.
        known: visits that were looked at already; see `LayerCosts`.
    """

    def __init__(self, layers: LayerCosts, known: Played | None = None) -> None:
        self._layers = layers
        self._known: Played = {} if known is None else known
        self._chains: dict[str, Chain] = {}

    def of(self, works: Visit) -> VisitCost:
        """Return the least cost of a visit."""
        kind = "least", self._layers.kind_of(works)
        if kind not in self._known:
            self._known[kind] = self._least(works), "nothing"
        return self._known[kind][0]

    def bytes_sent(self, work: Work) -> float:
        """Return the bytes of the result of a work."""
        return self._layers.bytes_sent(work)

    def chain(self, graphs: Iterable[Graph]) -> Chain:
        """What graphs take at least, one after the other."""
        return Chain.joined(map(self._chain, graphs))

    def _chain(self, graph: Graph) -> Chain:
        if graph.fingerprint not in self._chains:
            self._chains[graph.fingerprint] = Chain.of(graph, self._layers.costs)
        return self._chains[graph.fingerprint]

    def _least(self, works: Visit) -> VisitCost:
        steps = list(self._layers.steps(works))
        graphs: dict[Strand, list[Graph]] = {work.strand: [] for work in works}
        for stop, _, _ in steps:
            for strand, _, graph in stop.strands:
                graphs[strand].append(graph)
        chains = {strand: self.chain(own) for strand, own in graphs.items()}
        busy: dict[Lane, float] = {}
        for one in chains.values():
            for lane, seconds in one.busy.items():
                busy[lane] = busy.get(lane, 0.0) + seconds
        longest = max((one.whole for one in chains.values()), default=0.0)
        return VisitCost(
            max(longest, max(busy.values(), default=0.0)),
            busy.get(Lane.COMPUTE, 0.0),
            {strand: one.through for strand, one in chains.items()},
            *self._layers.saved(steps),
        )
