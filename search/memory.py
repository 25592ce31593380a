"""How many bytes slots take at once, by issue order.

On a device memory goes back to the lane that made it, and only once that lane has waited for every
other lane that read it (`engine.lanes`). Until then it is of no use to anyone, so it counts:

    compute   GEMM reads x                       GEMM writes y
    tp        gather writes x     . . held . . . . . . . . .    scatter waits for y: x is free
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lightning_dhellam.plan import Graph, GraphPair, Lane
from lightning_dhellam.search.machine import Array, Rows, compiled

BARRIER = -1
"""In an order: every lane waits for every other."""


class Slots(NamedTuple):
    """Who makes, reads and keeps the slots of operators that are carried out once or repeatedly.

    Attributes:
        lane: of each operator.
        reads: slots of each operator.
        writes: the same.
        bytes: of each slot.
        owner: lane that makes each slot.
        writer: operator that writes each slot, or -1 where it comes from outside.
        before: the slot that each one was in the round before, or -1.
        kept: of each slot, whether it stays when it has been read.
        lanes: how many there are.
        waits: whether memory goes back only when its lane has waited for its readers.
    """

    lane: Array
    reads: Rows
    writes: Rows
    bytes: Array
    owner: Array
    writer: Array
    before: Array
    kept: Array
    lanes: int
    waits: bool


@compiled
def most(slots, order, lagging, rounds):  # type: ignore[no-untyped-def]
    """Most bytes at once in the last of some rounds of an order.

    Args:
        slots: of its operators.
        order: operators of a round, or `BARRIER`.
        lagging: of each operator, whether it is carried out for the round before.
        rounds: how many.
    """
    count, lanes = len(slots.bytes), slots.lanes
    # By round, one from before the first included: reads to come; number of the operator that
    # writes it on its lane, and what that lane had seen of the others; last readers by lane.
    left = np.zeros((rounds + 1, count), np.int64)
    number = np.full((rounds + 1, count), -1)
    knew = np.full((rounds + 1, count, lanes), -1)
    used = np.full((rounds + 1, count, lanes), -1)
    for x in order:
        if x != BARRIER:
            for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
                slot = slots.reads.values[at]
                left[1:, slot] += 1
                left[0, slot] += lagging[x]
    live, held, peak = 0.0, 0.0, 0.0
    for slot in range(count):
        writer = slots.writer[slot]
        late = writer >= 0 and lagging[writer]
        if left[0, slot] and not late and not slots.kept[slot]:
            live += slots.bytes[slot]
    issued = np.zeros(lanes, np.int64)
    seen = np.full((lanes, lanes), -1)
    waiting = np.zeros(((rounds + 1) * count, 2), np.int64)
    length = 0
    for turn in range(rounds):
        for slot in range(count):
            if slots.writer[slot] < 0:
                live += slots.bytes[slot]
                old = slots.before[slot]
                if old >= 0:
                    number[turn + 1, slot] = number[turn, old]
                    knew[turn + 1, slot] = knew[turn, old]
            if turn and slots.kept[slot]:
                # It is another pair's by now.
                live -= slots.bytes[slot]
        for x in order:
            waited = False
            if x == BARRIER:
                for lane in range(lanes):
                    for other in range(lanes):
                        if other != lane:
                            seen[lane, other] = issued[other]
                waited = True
            else:
                own, mine = slots.lane[x], turn + 1 - lagging[x]
                reads = slots.reads.values[slots.reads.offsets[x] : slots.reads.offsets[x + 1]]
                writes = slots.writes.values[slots.writes.offsets[x] : slots.writes.offsets[x + 1]]
                for slot in reads:
                    other = slots.owner[slot]
                    if other != own and seen[own, other] < number[mine, slot]:
                        seen[own, other] = number[mine, slot]
                        for lane in range(lanes):
                            if lane != own:
                                seen[own, lane] = max(seen[own, lane], knew[mine, slot, lane])
                        waited = True
            if waited:
                kept = 0
                for at in range(length):
                    when, slot = waiting[at]
                    if _passed(slots, seen, used[when, slot], slot):
                        held -= slots.bytes[slot]
                    else:
                        waiting[kept] = waiting[at]
                        kept += 1
                length = kept
            if x == BARRIER:
                continue
            issued[own] += 1
            for slot in reads:
                used[mine, slot, own] = issued[own]
            for slot in writes:
                number[mine, slot] = issued[own]
                knew[mine, slot] = seen[own]
                live += slots.bytes[slot]
            if turn == rounds - 1:
                peak = max(peak, live + held)
            for slot in reads:
                left[mine, slot] -= 1
                if left[mine, slot] or slots.kept[slot]:
                    continue
                live -= slots.bytes[slot]
                if slots.waits and not _passed(slots, seen, used[mine, slot], slot):
                    held += slots.bytes[slot]
                    waiting[length, 0], waiting[length, 1] = mine, slot
                    length += 1
            for slot in writes:
                if not left[mine, slot] and not slots.kept[slot]:
                    live -= slots.bytes[slot]
    return peak


@compiled
def _passed(slots, seen, used, slot):  # type: ignore[no-untyped-def]
    """Whether the lane that made a slot has waited for all that read it."""
    own, passed = slots.owner[slot], True
    for lane in range(slots.lanes):
        passed = passed and (lane == own or seen[own, lane] >= used[lane])
    return passed


class PairMemory:
    """Bytes that a pair of layers needs while it is carried out again and again.

    What the pair takes in, what it saves for later, and what it leaves for the next pair count.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        lanes: of their operators, compute first.
        tokens: of a micro-batch.
        waits: whether memory goes back only when its lane has waited for its readers.
    """

    def __init__(
        self,
        ahead: GraphPair | None,
        behind: GraphPair | None,
        lanes: Sequence[Lane],
        *,
        tokens: int,
        waits: bool,
    ) -> None:
        self._tokens = tokens
        self._rounds = 2 if waits else 1
        collector = _Collector(lanes)
        if ahead is not None:
            collector.add(ahead, ahead.forward, {*ahead.saved, *ahead.forward.outputs})
        if behind is not None:
            collector.add(behind, behind.backward, set(behind.backward.outputs))
        self._slots = collector.slots(waits)

    def peak(self, order: Iterable[int], lagging: int = 0) -> float:
        """Most bytes at once, by operators in issue order and a bit mask of those that lag."""
        size = len(self._slots.lane)
        late = np.array([lagging >> x & 1 for x in range(size)], np.int64)
        issued = np.array(list(order), np.int64)
        return float(most(self._slots, issued, late, self._rounds)) * self._tokens


class _Collector:
    """Collects the slots of a pair of layers, bytes per token."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = {lane: number for number, lane in enumerate(lanes)}
        self._lane: list[int] = []
        self._reads: list[list[int]] = []
        self._writes: list[list[int]] = []
        self._bytes: list[float] = []
        self._owner: list[int] = []
        self._writer: list[int] = []
        self._before: list[int] = []
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
            self._kept.append(slot in kept)
        for name, output in handed.items():
            self._before[numbers[name]] = numbers[output]
        for operator in graph.operators:
            for slot in operator.writes:
                self._writer[numbers[slot]] = len(self._lane)
            self._lane.append(self._lanes[operator.lane])
            self._writes.append([numbers[slot] for slot in operator.writes])
            reads = dict.fromkeys(slot for slot in operator.reads if slot in numbers)
            self._reads.append([numbers[slot] for slot in reads])

    def slots(self, waits: bool) -> Slots:
        return Slots(
            np.array(self._lane, np.int64),
            Rows.of(self._reads),
            Rows.of(self._writes),
            np.array(self._bytes, float),
            np.array(self._owner, np.int64),
            np.array(self._writer, np.int64),
            np.array(self._before, np.int64),
            np.array(self._kept, np.bool_),
            len(self._lanes),
            waits,
        )


def _makers(graph: Graph) -> dict[str, Lane]:
    """The lane that makes each slot."""
    return {slot: o.lane for o in graph.operators for slot in o.writes}
