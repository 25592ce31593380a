"""From plans to the launches of a walk through pairs of layers, in issue order.

A walk is works that follow each other on one stage: a row of stops, at each of which a forward
graph, a backward graph or both are carried out by a plan. What an operator waits for follows from
the slots, within a stop and between stops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_dhellam.plan import Graph, Issue, Lane, Operator, Plan, Strand
from lightning_dhellam.search.model.arrays import Array, Rows
from lightning_dhellam.search.model.cost import Costs, lanes_of
from lightning_dhellam.search.model.machine import Machine, perform
from lightning_dhellam.search.model.memory import BARRIER, Slots, most, taking
from lightning_dhellam.search.model.stops import Place, Stop

Order = list[int | None]
"""Launches in issue order; None is a barrier."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator that is launched at one stop."""

    stop: int
    strand: Strand
    place: Place
    graph: Graph
    operator: Operator


class Walk:
    """Knows the launches of a row of stops, and what each waits for, whatever the plans are.

    Attributes:
        stops: the stops, in walking order.
        launches: of each stop the forward graph's, then the backward graph's, in default order.
        first: index of the first launch of each stop.
        lanes: compute, and the other lanes in use.
        lane: index in `lanes` of the lane of each launch.
        seconds: seconds of each launch while nothing else runs.
        waits: launches that write what each launch reads.
        machine: plays the launches, where nothing but slots is waited for.
    """

    def __init__(self, stops: Sequence[Stop], costs: Costs) -> None:
        self.stops = tuple(stops)
        self.launches: list[Launch] = []
        self.first: list[int] = []
        self.waits: list[tuple[int, ...]] = []
        self._costs = costs
        self._numbers: list[dict[tuple[Strand, str], int]] = []
        self._slots = _Slots()
        for number, stop in enumerate(self.stops):
            self._enter(number, stop)
        self.lanes = lanes_of(launch.graph for launch in self.launches)
        index = {lane: number for number, lane in enumerate(self.lanes)}
        self.lane = [index[launch.operator.lane] for launch in self.launches]
        self._keys = [costs.key(launch.graph, launch.operator.name) for launch in self.launches]
        # The same where operators leave processors, should a search ask for that.
        self._spare_keys = [costs.spares.get(key, key) for key in self._keys]
        self._distinct = list(dict.fromkeys([*self._keys, *self._spare_keys]))
        self.seconds = [costs.seconds[key] for key in self._keys]
        self.machine = self._machine()

    def _machine(self) -> Machine:
        return Machine(
            np.array(self.lane, np.int64),
            np.array(self.seconds, float),
            self._kinds(self._keys),
            np.array([len(before) for before in self.waits], np.int64),
            Rows.of(_followers(self.waits)),
            *self._costs.arrays(self._distinct),
            float(self._costs.launch),
            self._costs.inline,
            np.array([launch.operator.waits for launch in self.launches], np.bool_),
        )

    def _kinds(self, keys: Sequence[str]) -> Array:
        number = {key: kind for kind, key in enumerate(self._distinct)}
        return np.array([number[key] for key in keys], np.int64)

    def machine_of(self, costs: Costs) -> Machine:
        """Return the machine with other times of the same operators."""
        together, behind = costs.arrays(self._distinct)
        seconds = np.array([costs.seconds[key] for key in self._keys], float)
        return self.machine._replace(seconds=seconds, slowdowns=together, behind=behind)

    def leaving(self, machine: Machine, costs: Costs) -> Machine:
        """Return `machine`, which is that of `costs`, where all leave processors that can."""
        seconds = np.array([costs.seconds[key] for key in self._spare_keys], float)
        return machine._replace(seconds=seconds, kinds=self._kinds(self._spare_keys))

    def play(
        self, order: Order, first: frozenset[int] | None = None
    ) -> tuple[list[float], list[float]]:
        """Return start and end of each launch in seconds. What `order` leaves out never starts.

        `first` are the launches that begin before the compute launch that is issued next. None:
        all communication does that could begin at the same moment, which no order can promise.
        """
        machine = self.machine
        if None in order:
            waits = self._with_barriers(order)
            counts = np.array([len(before) for before in waits], np.int64)
            machine = machine._replace(waits=counts, followers=Rows.of(_followers(waits)))
        marks = np.zeros(len(self.launches), bool)
        marks[list(first or ())] = True
        launches = np.array([x for x in order if x is not None], np.int64)
        starts, ends = perform(machine, len(self.lanes), launches, marks, first is not None)
        return starts.tolist(), ends.tolist()

    def _enter(self, number: int, stop: Stop) -> None:
        self.first.append(len(self.launches))
        self._numbers.append({})
        for strand, place, graph in stop.strands:
            self._slots.hand_in(strand, place, graph)
            for operator in graph.operators:
                index = len(self.launches)
                self._numbers[-1][strand, operator.name] = index
                self.launches.append(Launch(number, strand, place, graph, operator))
                self.waits.append(self._slots.launch(index, place, graph, operator))
            self._slots.hand_out(strand, place, graph)

    def order(self, plans: Sequence[Plan]) -> Order:
        """Return the launches in the order of one plan for each stop.

        What a stop leaves for the next is issued there if both have the same plan and carry on
        with the same micro-batches, and before the next stop otherwise.
        """
        order: Order = []
        left: int | None = None
        for number, plan in enumerate(plans):
            same = left is not None and self.stops[left].leads_to(self.stops[number])
            if left is not None and not (same and plans[left] == plan):
                order.extend(self._left_over(left, plans[left]))
                left = None
            numbers = self._numbers[number]
            for row in plan.rows:
                if not isinstance(row, Issue):
                    order.append(None)
                elif not row.lag:
                    order.append(numbers[row.strand, row.operator])
                elif left is not None:
                    order.append(self._numbers[left][row.strand, row.operator])
            left = number if any(row.lag for row in plan.issues) else None
        if left is not None:
            order.extend(self._left_over(left, plans[left]))
        return order

    def _left_over(self, number: int, plan: Plan) -> Iterator[int]:
        for row in plan.issues:
            if row.lag:
                yield self._numbers[number][row.strand, row.operator]

    def first_of(self, plans: Sequence[Plan]) -> frozenset[int]:
        """Return the launches that go first by one plan for each stop."""
        return frozenset(
            numbers[row.strand, row.operator]
            for numbers, plan in zip(self._numbers, plans, strict=True)
            for row in plan.issues
            if row.first
        )

    def _with_barriers(self, order: Sequence[int | None]) -> list[tuple[int, ...]]:
        """Return what launches wait for when barriers count as well."""
        waits = list(self.waits)
        latest: dict[int, int] = {}
        barrier: dict[int, set[int]] = defaultdict(set)
        for launch in order:
            if launch is None:
                for lane in range(len(self.lanes)):
                    barrier[lane] |= set(latest.values())
                continue
            lane = self.lane[launch]
            waits[launch] = tuple({*waits[launch], *barrier.pop(lane, ())})
            latest[lane] = launch
        return waits

    def peak_bytes(self, order: Sequence[int | None], tokens: int) -> float:
        """Return the most bytes of slots at once, by issue order, with `tokens` per micro-batch."""
        ahead = [launch.operator.ahead for launch in self.launches]
        slots = self._slots.of(self.lane, self.lanes, ahead, waits=not self._costs.inline)
        issued = np.array([BARRIER if x is None else x for x in order], np.int64)
        return float(most(slots, issued, np.zeros(len(self.lane), np.bool_), 1)) * tokens


class _Slots:
    """Knows who writes and who reads the slots of a walk."""

    def __init__(self) -> None:
        self._number: dict[tuple[int, int, str], int] = {}
        self._writer: list[int] = []
        self._bytes: list[float] = []
        self._handed: dict[tuple[Strand, int], list[int]] = {}
        self._reads: list[tuple[int, ...]] = []
        self._takes: list[int] = []

    def hand_in(self, strand: Strand, place: Place, graph: Graph) -> None:
        handed = self._handed.get((strand, place.micro_batch), [])
        at = place.micro_batch, place.layer
        # What the first half of a backward has left for the second comes from no neighbour.
        left = all((*at, name) in self._number for name in graph.inputs)
        if handed and not left:
            for name, number in zip(graph.inputs, handed, strict=True):
                self._number[*at, name] = number

    def hand_out(self, strand: Strand, place: Place, graph: Graph) -> None:
        at = place.micro_batch, place.layer
        self._handed[strand, place.micro_batch] = [self._number[*at, s] for s in graph.outputs]

    def launch(self, index: int, place: Place, graph: Graph, operator: Operator) -> tuple[int, ...]:
        """Note what a launch reads and writes. Returns the launches that it waits for."""
        at = place.micro_batch, place.layer
        known = (self._number.get((*at, slot)) for slot in dict.fromkeys(operator.reads))
        read = tuple(number for number in known if number is not None)
        self._reads.append(read)
        taken = {write: self._number.get((*at, slot), -1) for write, slot in operator.takes}
        for slot in operator.writes:
            self._takes.append(taken.get(slot, -1))
            self._number[*at, slot] = len(self._writer)
            self._writer.append(index)
            self._bytes.append(graph.bytes_per_token.get(slot, 0.0))
        return tuple(dict.fromkeys(self._writer[number] for number in read))

    def of(
        self, lane: Sequence[int], lanes: Sequence[Lane], ahead: Sequence[int], *, waits: bool
    ) -> Slots:
        """Return all slots. None comes from outside the walk, and none stays."""
        count = len(self._writer)
        written: list[list[int]] = [[] for _ in lane]
        for slot, writer in enumerate(self._writer):
            written[writer].append(slot)
        owner = [lane[writer] for writer in self._writer]
        return Slots(
            np.array(lane, np.int64),
            Rows.of(self._reads),
            Rows.of(written),
            np.array(self._bytes, float),
            np.array(owner, np.int64),
            np.array(self._writer, np.int64),
            np.full(count, -1),
            *taking(self._takes, owner),
            np.zeros(count, np.bool_),
            len(lanes),
            waits,
            np.array([one.copies for one in lanes], np.bool_),
            np.array(ahead, np.int64),
        )


def _followers(waits: Sequence[tuple[int, ...]]) -> list[list[int]]:
    followers: list[list[int]] = [[] for _ in waits]
    for launch, before in enumerate(waits):
        for earlier in before:
            followers[earlier].append(launch)
    return followers


def as_planned(costs: Costs, stops: Sequence[Stop], plans: Sequence[Plan]) -> Costs:
    """Return costs whose operators leave processors to communication where `plans` say so.

    What one plan says of an operator of a graph counts for all of them.
    """
    marked = {
        (graph.fingerprint, row.operator)
        for stop, plan in zip(stops, plans, strict=True)
        for strand, _, graph in stop.strands
        for row in plan.issues
        if row.spare and row.strand is strand
    }
    return costs.sparing(marked)
