"""What the visits of a pipeline cost: seconds, memory, and what they send on."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from lightning_dhellam.pipeline.schedules import LIVE, Part, Placement, Schedule, Visit, Work
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair, Strand, passes
from lightning_dhellam.search.model import Costs, Order, Place, Stop, Walk, as_planned
from lightning_dhellam.search.model.halves import halves, with_halves


@dataclass(frozen=True, slots=True)
class VisitCost:
    """What a visit costs its stage.

    Attributes:
        seconds: seconds from the start of the visit to its end.
        compute: seconds in which compute works; in the others it waits for communication or host.
        ready: seconds from the start until a strand's result can be sent.
        rise: how far saved activations grow above what they were before, at most.
        change: by how much saved activations have grown at the end.
    """

    seconds: float
    compute: float
    ready: Mapping[Strand, float]
    rise: float
    change: float


class VisitCosts(Protocol):
    """Tells what visits cost, and how much is sent between them."""

    def of(self, works: Visit) -> VisitCost:
        """Return the cost of a visit."""

    def bytes_sent(self, work: Work) -> float:
        """Return the bytes of the result of a work, which the next chunk needs."""


@dataclass(frozen=True)
class UniformCosts:
    """Costs of visits where every chunk costs the same.

    Memory is in units of a chunk's activations of a micro-batch.

    Attributes:
        forward: seconds of a forward.
        input: seconds of the gradient of the input, the first half of backward.
        weight: seconds of the gradients of weights, the second half.
        both: seconds of a forward beside a whole backward; by default their sum: nothing gained.
        message: bytes of what a chunk hands on to the next.
    """

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    both: float | None = None
    message: float = 0.0

    def of(self, works: Visit) -> VisitCost:
        """Return the cost of a visit."""
        alone = {
            Part.FORWARD: self.forward,
            Part.BACKWARD: self.input + self.weight,
            Part.INPUT: self.input,
            Part.WEIGHT: self.weight,
        }
        seconds = sum(alone[work.part] for work in works)
        if len(works) == 2 and self.both is not None:
            seconds = self.both
        change = float(sum(LIVE[work.part] for work in works))
        rise = float(any(work.part is Part.FORWARD for work in works))
        ready = {work.strand: seconds for work in works}
        return VisitCost(seconds, seconds, ready, rise, change)

    def bytes_sent(self, work: Work) -> float:
        """Return the bytes of the result of a work."""
        return self.message


Entry = tuple[Place | None, float]
"""A micro-batch in a layer, or None if there is nothing to do there, and the bytes per token that
this adds to what is saved, or frees of it."""


Step = tuple[Stop, float, float]
"""What a visit meets, and the bytes per token that it saves there and frees."""


Played = dict[object, tuple[VisitCost, str]]
"""Visits that were played: what each costs, and the name of its order."""


class LayerCosts:
    """Costs of visits through chunks of layers, played with the machine model of the search.

    A visit is carried out in the fastest of the orders offered, whatever the schedule. Layers of
    the two strands meet in opposite order, as one frees what the other fills. Memory is what is
    saved between forward and backward; what lives inside a layer only is left out. The next visit
    is taken to start when nothing of this one is left to do, although the engine does not wait.

    Args:
        chunks: layers of each chunk, in order.
        costs: what their operators cost.
        tokens: how many tokens a micro-batch has.
        builders: orders to choose from, by default the built-in ones.
        known: visits that were played already, through layers with the same graphs, costs and
            tokens under the same orders; those that are played now are added.

    Attributes:
        sized: whether the graphs know the sizes of their slots. If not, memory is in layers whose
            activations of a micro-batch are saved, and messages are empty.
        costs: what the operators cost, halves of backwards included.
    """

    def __init__(
        self,
        chunks: Sequence[Sequence[GraphPair]],
        costs: Costs,
        *,
        tokens: int,
        builders: Mapping[str, Builder] = BUILDERS,
        known: Played | None = None,
    ) -> None:
        layers = {id(layer): layer for chunk in chunks for layer in chunk}.values()
        self.chunks = chunks
        self._sizes = {id(layer): _bytes(layer) for layer in layers}
        self.sized = any(saved for saved, _ in self._sizes.values())
        self.costs = with_halves(costs, [*layers])
        self._kinds = [tuple(layer.backward.fingerprint for layer in chunk) for chunk in chunks]
        self._halves: dict[str, tuple[GraphPair, GraphPair]] = {}
        self._tokens = tokens
        self._builders = builders
        self._known: Played = {} if known is None else known

    def of(self, works: Visit) -> VisitCost:
        """Return the cost of a visit."""
        return self._cost(works)[0]

    def order_of(self, works: Visit) -> str:
        """Return the name of the order in which a visit is carried out."""
        return self._cost(works)[1]

    def bytes_sent(self, work: Work) -> float:
        """Return the bytes of a hidden state, or of its gradient, between a chunk and the next."""
        layers = self.chunks[work.chunk]
        if not layers:
            return 0.0
        graph = layers[-1].forward if work.part is Part.FORWARD else layers[0].backward
        return sum(graph.bytes_per_token.get(slot, 0.0) for slot in graph.outputs) * self._tokens

    def kind_of(self, works: Visit) -> Hashable:
        """Return what the cost of a visit depends on: which layers meet, and how."""
        return (_ascends(works), *((work.part, self._kinds[work.chunk]) for work in works))

    def saved(self, steps: Iterable[Step]) -> tuple[float, float]:
        """Return how far saved activations rise, and by how much they change, in bytes."""
        rise = change = 0.0
        for _, saved, freed in steps:
            rise = max(rise, change + saved)
            change += saved - freed
        unit = self._tokens if self.sized else 1
        return rise * unit, change * unit

    def _cost(self, works: Visit) -> tuple[VisitCost, str]:
        kind = self.kind_of(works)
        if kind not in self._known:
            self._known[kind] = self._played(works)
        return self._known[kind]

    def _played(self, works: Visit) -> tuple[VisitCost, str]:
        steps = list(self.steps(works))
        memory = self.saved(steps)
        stops = [stop for stop, _, _ in steps if stop.forward or stop.backward]
        if not stops:
            return VisitCost(0.0, 0.0, {work.strand: 0.0 for work in works}, *memory), "nothing"
        found = []
        for name, build in self._builders.items():
            plans = [build(*stop.graphs) for stop in stops]
            walk = Walk(stops, as_planned(self.costs, stops, plans))
            order = walk.order(plans)
            first = walk.first_of(plans)
            found.append((_timed(walk, order, first, works, memory), name))
        return min(found, key=lambda cost: cost[0].seconds)

    def steps(self, works: Visit) -> Iterator[Step]:
        """Give the pairs of layers that a visit meets, and the bytes each saves and frees."""
        ahead: list[Entry] = []
        behind: list[Entry] = []
        for work in works:
            layers = self.chunks[work.chunk]
            if work.part is Part.FORWARD:
                ahead = [self._entry(work, i, layer) for i, layer in enumerate(layers)]
            else:
                behind = [self._entry(work, i, layer) for i, layer in enumerate(layers)][::-1]
        nothing: Entry = (None, 0.0)
        if _ascends(works):
            # Both strands end together, so that the two ends of the model meet.
            ahead = [nothing] * (len(behind) - len(ahead)) + ahead
            behind = [nothing] * (len(ahead) - len(behind)) + behind
        for (forward, saved), (backward, freed) in zip_longest(ahead, behind, fillvalue=nothing):
            yield Stop(forward, backward), saved, freed

    def _entry(self, work: Work, index: int, layer: GraphPair) -> Entry:
        """Return what a work meets in a layer. The two strands of a visit differ in micro-batch."""
        unsized = (float(bool(layer.saved)),) * 2
        whole, kept = self._sizes[id(layer)] if self.sized else unsized
        if work.part is Part.FORWARD:
            return Place(1, index, layer), whole
        if work.part is Part.BACKWARD:
            return Place(0, index, layer), whole
        key = layer.backward.fingerprint
        if key not in self._halves:
            self._halves[key] = halves(layer)
        early, late = self._halves[key]
        half, freed = (early, whole - kept) if work.part is Part.INPUT else (late, kept)
        return (Place(0, index, half) if half.backward.operators else None), freed


Kind = tuple[tuple[int, Part], ...]
"""Chunk and part of each work of a visit: what its cost depends on."""


def kinds_of(placement: Placement, stage: int) -> Iterator[Visit]:
    """Give one visit of every kind that a stage can carry out, whatever the schedule.

    A forward goes beside a backward, or its first half, of another chunk of the stage, or of the
    same one where there is no other.
    """
    held = placement.held(stage)
    for chunk in held:
        for part in Part:
            yield (Work(chunk, part, 0),)
    for ahead in held:
        for behind in held:
            if ahead != behind or len(held) == 1:
                for part in (Part.BACKWARD, Part.INPUT):
                    yield Work(ahead, Part.FORWARD, 1), Work(behind, part, 0)


@dataclass(frozen=True)
class VisitTable:
    """Costs of visits one by one, as stages that know their own tell them each other.

    Attributes:
        costs: cost of each kind of visit.
        bytes: bytes of the result of each chunk and strand.
    """

    costs: Mapping[Kind, VisitCost]
    bytes: Mapping[tuple[int, Strand], float]

    @classmethod
    def of_stage(cls, costs: VisitCosts, schedule: Schedule, stage: int) -> VisitTable:
        """Tabulate what the visits of one stage cost in one schedule."""
        return cls._of(costs, schedule.visits[stage])

    @classmethod
    def of_kinds(cls, costs: VisitCosts, placement: Placement, stage: int) -> VisitTable:
        """Tabulate what the visits of one stage cost in any schedule; see `kinds_of`."""
        return cls._of(costs, kinds_of(placement, stage))

    @classmethod
    def _of(cls, costs: VisitCosts, visits: Iterable[Visit]) -> VisitTable:
        kinds = {_kind(works): works for works in visits}
        known = {(work.chunk, work.strand): work for works in kinds.values() for work in works}
        return cls(
            {kind: costs.of(works) for kind, works in kinds.items()},
            {key: costs.bytes_sent(work) for key, work in known.items()},
        )

    @classmethod
    def joined(cls, tables: Iterable[VisitTable]) -> VisitTable:
        """Join the tables of all stages."""
        costs, sizes = dict[Kind, VisitCost](), dict[tuple[int, Strand], float]()
        for table in tables:
            costs |= table.costs
            sizes |= table.bytes
        return cls(costs, sizes)

    def of(self, works: Visit) -> VisitCost:
        """Return the cost of a visit."""
        return self.costs[_kind(works)]

    def bytes_sent(self, work: Work) -> float:
        """Return the bytes of the result of a work."""
        return self.bytes[work.chunk, work.strand]


def _kind(works: Visit) -> Kind:
    return tuple((work.chunk, work.part) for work in works)


def _ascends(works: Visit) -> bool:
    """Tell whether two strands go up the stages: forward is in the later chunk."""
    chunks = {work.strand: work.chunk for work in works}
    return len(chunks) == 2 and chunks[Strand.FORWARD] > chunks[Strand.BACKWARD]


def _bytes(layer: GraphPair) -> tuple[float, float]:
    """Return the bytes per token saved after forward, and after the first half of backward."""
    sizes = layer.forward.bytes_per_token
    saved = sum(sizes.get(slot, 0.0) for slot in layer.saved)
    return saved, passes.left_bytes(layer)


def _timed(
    walk: Walk, order: Order, first: frozenset[int], works: Visit, memory: tuple[float, float]
) -> VisitCost:
    starts, ends = walk.play(order, first)
    compute = sum(
        end - start for start, end, lane in zip(starts, ends, walk.lane, strict=True) if not lane
    )
    ready = {work.strand: 0.0 for work in works}
    for launch, end in zip(walk.launches, ends, strict=True):
        if set(launch.operator.writes) & set(launch.graph.outputs):
            ready[launch.strand] = max(ready[launch.strand], end)
    return VisitCost(max(ends), compute, ready, *memory)
