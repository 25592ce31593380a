"""How many bytes a pair of layers needs while it is carried out again and again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lightning_dhellam.plan import Graph, GraphPair, Lane
from lightning_dhellam.search.model.arrays import Array, Rows
from lightning_dhellam.search.model.memory import Slots, most, taking


class PairMemory:
    """Counts the bytes that a pair of layers needs while it is carried out again and again.

    What the pair takes in, what it saves for later, and what it leaves for the next pair count.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        lanes: that the operators of both occupy, compute first.
        tokens: how many tokens a micro-batch has.
        waits: whether memory goes back only when its lane has waited for its readers.
        leaves: slots that `behind`, the first half of a backward, leaves for the second.
    """

    def __init__(
        self,
        ahead: GraphPair | None,
        behind: GraphPair | None,
        lanes: Sequence[Lane],
        *,
        tokens: int,
        waits: bool,
        leaves: Collection[str] = (),
    ) -> None:
        self._tokens = tokens
        collector = _Collector(lanes)
        if ahead is not None:
            collector.add(ahead, ahead.forward, {*ahead.saved, *ahead.forward.outputs})
        if behind is not None:
            collector.add(behind, behind.backward, {*behind.backward.outputs, *leaves})
        self._slots = collector.slots(waits)
        self._rounds = 2 + collector.rounds_ahead() if waits else 1

    def peak(self, issued: Array, lagging: Array) -> float:
        """Return the most bytes at once.

        Args:
            issued: operators in issue order, or `memory.BARRIER`.
            lagging: for each operator, whether it is carried out for the round before.
        """
        return float(most(self._slots, issued, lagging, self._rounds)) * self._tokens


class _Collector:
    """Collects the slots of a pair of layers, with their bytes per token."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = {lane: number for number, lane in enumerate(lanes)}
        self._lane: list[int] = []
        self._ahead: list[int] = []
        self._reads: list[list[int]] = []
        self._writes: list[list[int]] = []
        self._bytes: list[float] = []
        self._owner: list[int] = []
        self._writer: list[int] = []
        self._before: list[int] = []
        self._takes: list[int] = []
        self._kept: list[bool] = []

    def add(self, pair: GraphPair, graph: Graph, kept: set[str]) -> None:
        sizes = dict(pair.forward.bytes_per_token) | dict(graph.bytes_per_token)
        # What a layer like this one hands over; at the ends of a model that is something else.
        handed = {
            name: output
            for name, output in zip(graph.inputs, graph.outputs, strict=False)
            if sizes.setdefault(name, sizes.get(output, 0.0)) == sizes.get(output)
        }
        makers = _makers(pair.forward) | _makers(graph)
        numbers: dict[str, int] = {}
        written = (slot for operator in graph.operators for slot in operator.writes)
        for slot in dict.fromkeys((*graph.inputs, *graph.foreign, *written)):
            numbers[slot] = len(self._bytes)
            self._bytes.append(sizes.get(slot, 0.0))
            maker = makers.get(handed.get(slot, slot), Lane.COMPUTE)
            self._owner.append(self._lanes.get(maker, 0))
            self._writer.append(-1)
            self._before.append(-1)
            self._takes.append(-1)
            self._kept.append(slot in kept)
        for name, output in handed.items():
            self._before[numbers[name]] = numbers[output]
        for operator in graph.operators:
            for slot in operator.writes:
                self._writer[numbers[slot]] = len(self._lane)
            self._lane.append(self._lanes[operator.lane])
            self._ahead.append(operator.ahead)
            self._writes.append([numbers[slot] for slot in operator.writes])
            reads = dict.fromkeys(slot for slot in operator.reads if slot in numbers)
            self._reads.append([numbers[slot] for slot in reads])
            for write, read in operator.takes:
                self._takes[numbers[write]] = numbers[read]

    def slots(self, waits: bool) -> Slots:
        return Slots(
            np.array(self._lane, np.int64),
            Rows.of(self._reads),
            Rows.of(self._writes),
            np.array(self._bytes, float),
            np.array(self._owner, np.int64),
            np.array(self._writer, np.int64),
            np.array(self._before, np.int64),
            *taking(self._takes, self._owner),
            np.array(self._kept, np.bool_),
            len(self._lanes),
            waits,
            np.array([lane.copies for lane in self._lanes], np.bool_),
            np.array(self._ahead, np.int64),
        )

    def rounds_ahead(self) -> int:
        """Return over how many rounds copies to or from the host may be under way."""
        return -(-max(self._ahead, default=0) // max(self._lane.count(0), 1))


def _makers(graph: Graph) -> dict[str, Lane]:
    """Return the lane that makes each slot."""
    return {slot: o.lane for o in graph.operators for slot in o.writes}
