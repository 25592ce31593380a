"""Issue orders of one pair of layers: which are valid, how they change, what they cost.

An order is a list of operator numbers, forward graph first; a bit mask says which of them lag, that
is, are carried out for the previous pair of layers. Orders change by moves that keep them valid.
Which operators leave processors to communication changes with them, if that is to be chosen: one
that does takes longer, but communication begins beside it at any time, so which of them had better
do so depends on the order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lightning_dhellam.plan import Barrier, Graph, GraphPair, Issue, Lane, Plan, Strand
from lightning_dhellam.search.model.cost import Costs, lanes_of
from lightning_dhellam.search.model.machine import Array, Machine, period
from lightning_dhellam.search.model.memory import BARRIER, PairMemory
from lightning_dhellam.search.model.walk import Order, Stop, Walk, names, repeated

_ROUNDS = 4
_MORE_ROUNDS = 16
_FEW = 6
"""Samples that a search looks at all the time."""
_AHEAD = 0.25
"""A host that issues all operators in this share of their time is never waited for: the longest
lane needs more."""
_MOMENT = 1e-9
"""Operators that start so few seconds apart start together."""

Cost = tuple[float, float]
"""Bytes above the limit, then seconds: compared in this order."""

_Both = tuple[Machine, Machine]
"""Where no operator leaves processors, and where all do that can."""


@dataclass(frozen=True)
class Candidate:
    """An issue order of a pair of layers.

    Attributes:
        order: operator numbers.
        lagging: bit mask of the operators that lag.
        first: bit mask of the communication that begins before the compute issued next.
        spare: bit mask of the operators that leave processors to communication, where that is
            chosen with the order.
    """

    order: tuple[int, ...]
    lagging: int = 0
    first: int = 0
    spare: int = 0


@dataclass(frozen=True)
class Surroundings:
    """Where a pair of layers stands when it does not repeat itself.

    Attributes:
        stop: where it stands.
        before: pairs that come first, with their plans.
        after: pairs that follow, with their plans.
    """

    stop: Stop
    before: tuple[tuple[Stop, Plan], ...] = ()
    after: tuple[tuple[Stop, Plan], ...] = ()


def graphs_of(ahead: GraphPair | None, behind: GraphPair | None) -> list[Graph]:
    """The graphs of a pair of layers, forward first."""
    return [pair.forward for pair in (ahead,) if pair] + [p.backward for p in (behind,) if p]


class Problem:
    """One pair of layers whose operators are to be ordered.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        costs: of the operators.
        tokens: of a micro-batch, for the memory limit.
        memory_limit: bytes that slots may take at once during the pair, or None.
        surroundings: None for a pair that repeats itself, whose cost is its period; else the
            cost is the time of all of them together.
        sharing: whether it is chosen with the order what leaves processors to communication, of
            a pair that repeats itself, unless `costs` say it already.
    """

    def __init__(
        self,
        ahead: GraphPair | None,
        behind: GraphPair | None,
        costs: Costs,
        *,
        tokens: int = 1,
        memory_limit: float | None = None,
        surroundings: Surroundings | None = None,
        sharing: bool = False,
    ) -> None:
        self._ahead, self._behind, self._surroundings = ahead, behind, surroundings
        self.forward = ahead.forward if ahead else None
        self.backward = behind.backward if behind else None
        self.operators = [(g, o) for g in graphs_of(ahead, behind) for o in g.operators]
        self.size = len(self.operators)
        self.cyclic = surroundings is None
        self.costs = self._heeded(costs)
        self.memory_limit = memory_limit
        lanes = lanes_of(graphs_of(ahead, behind))
        self._memory = PairMemory(ahead, behind, lanes, tokens=tokens, waits=not costs.inline)
        self.number = {(g.direction, o.name): i for i, (g, o) in enumerate(self.operators)}
        self.sparable = self._sparable() if sharing and self.cyclic and not costs.spared else 0
        self._relations()
        self._stage(surroundings)
        self.evaluations = 0
        self._known: dict[object, tuple[Cost, Array]] = {}
        self._masks: dict[tuple[int, int], Array] = {}

    def _heeded(self, costs: Costs) -> Costs:
        """What an order can change.

        Communication that shares the host with compute takes the processor's time in any order.
        A host that runs far ahead of a device, round after round, is never waited for.
        """
        if costs.inline:
            return costs.without_slowdowns()
        work = sum(costs.alone(graph, o.name) for graph, o in self.operators)
        ahead = self.size * costs.launch <= _AHEAD * work
        return replace(costs, launch=0.0) if self.cyclic and ahead else costs

    def _sparable(self) -> int:
        able = self.costs.sparable
        own = [(graph.fingerprint, operator.name) for graph, operator in self.operators]
        return sum(1 << x for x, operator in enumerate(own) if operator in able)

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
        self.sparable_ones = [x for x in range(self.size) if self.sparable >> x & 1]
        self.communications = [x for x, (_, o) in enumerate(self.operators) if o.is_communication]

    def _stage(self, surroundings: Surroundings | None) -> None:
        self._prefix: Order = []
        self._suffix: Order = []
        self._base = 0
        self._first: frozenset[int] = frozenset()
        if surroundings is None:
            self._walk = Walk(repeated(self._ahead, self._behind, _ROUNDS), self.costs)
        else:
            before, after = surroundings.before, surroundings.after
            stops = [*(s for s, _ in before), surroundings.stop, *(s for s, _ in after)]
            self._walk = Walk(stops, self.costs)
            self._base = self._walk.first[len(before)]
            plans = self._plans(self.plan(self.default()))
            order = self._walk.order(plans)
            begin = order.index(self._base)
            self._prefix, self._suffix = order[:begin], order[begin + self.size :]
            self._first = self._walk.first_of(plans)
        own = slice(self._base, self._base + self.size)
        self.lane = self._walk.lane[own]
        self.lanes = self._walk.lanes
        self.seconds = self._walk.seconds[own]

    def _plans(self, plan: Plan) -> list[Plan]:
        """`plan` between those of the surroundings."""
        around = self._surroundings
        assert around is not None
        return [*(p for _, p in around.before), plan, *(p for _, p in around.after)]

    @property
    def name(self) -> str:
        """Of the pair: `transformer|head`."""
        return names(self._ahead, self._behind)

    def load(self) -> dict[Lane, float]:
        """Seconds of work on each lane: of the pair, or of it and its surroundings."""
        totals = dict.fromkeys(self.lanes, 0.0)
        span = range(self.size) if self.cyclic else range(len(self._walk.launches))
        for launch in span:
            totals[self.lanes[self._walk.lane[launch]]] += self._walk.seconds[launch]
        return totals

    def default(self) -> Candidate:
        """Forward, then backward, in the graphs' own order."""
        return Candidate(tuple(range(self.size)))

    @property
    def exchangeable(self) -> bool:
        """Whether only the order within each lane matters."""
        return not (self.costs.launch or self.costs.inline or self.memory_limit is not None)

    @property
    def averages(self) -> bool:
        """Whether a cost is a mean over what other measurements could have given as well."""
        return self.cyclic and bool(self.costs.samples)

    def cost(self, candidate: Candidate) -> Cost:
        """What the candidate costs. Counts as an evaluation unless it is known."""
        return self._evaluated(candidate)[0]

    def aligned(self, candidate: Candidate) -> Candidate:
        """The same order, issued by when operators start: moves then mean what they look like."""
        begun = self._evaluated(candidate)[1]
        if not (self.cyclic and self.exchangeable):
            return candidate
        moments = np.rint(begun / _MOMENT).tolist()
        order = tuple(sorted(candidate.order, key=lambda x: moments[x]))
        other = replace(candidate, order=order)
        # What goes first might hold another compute operator.
        same = self._valid(other) and self._key(other) == self._key(candidate)
        return other if same else candidate

    def _valid(self, candidate: Candidate) -> bool:
        """Whether nothing is issued before what it reads is written."""
        done = 0
        for x in candidate.order:
            late = candidate.lagging if candidate.lagging >> x & 1 else ~candidate.lagging
            if self.ancestors[x] & late & ~done:
                return False
            done |= 1 << x
        return True

    def _evaluated(self, candidate: Candidate) -> tuple[Cost, Array]:
        key = self._key(candidate)
        known = self._known.get(key)
        if known is None:
            self.evaluations += 1
            seconds, begun = self._timed(candidate, _FEW)
            known = self._known[key] = (
                (self._excess(candidate.order, candidate.lagging), seconds),
                begun,
            )
        return known

    def _key(self, candidate: Candidate) -> object:
        if not self.exchangeable:
            return candidate
        lanes: list[list[int]] = [[] for _ in self.lanes]
        ahead: list[int] = []
        for x in candidate.order:
            lanes[self.lane[x]].append(x)
            if candidate.first >> x & 1:
                ahead.append(x)
            elif ahead and not self.lane[x]:
                # Where they stand among the others does not matter.
                lanes.append([x, *sorted(ahead)])
                ahead = []
        return candidate.lagging, candidate.spare, tuple(map(tuple, lanes)), tuple(ahead)

    def cost_of_plan(self, plan: Plan) -> Cost:
        """What `cost` says of a candidate, of a plan, which may have barriers."""
        return self._excess(*self._issued(plan)), self.seconds_of_plan(plan)

    def _excess(self, order: Iterable[int], lagging: int) -> float:
        """Bytes above the limit."""
        if self.memory_limit is None:
            return 0.0
        return max(0.0, self._memory.peak(order, lagging) - self.memory_limit)

    def peak(self, candidate: Candidate) -> float:
        """Most bytes of slots at once while the pair is carried out."""
        return self._memory.peak(candidate.order, candidate.lagging)

    def peak_of_plan(self, plan: Plan) -> float:
        """The same of a plan, at whose barriers memory goes back."""
        return self._memory.peak(*self._issued(plan))

    def _issued(self, plan: Plan) -> tuple[list[int], int]:
        """The order of a plan with its barriers, and what lags."""
        order = [
            self.number[row.strand, row.operator] if isinstance(row, Issue) else BARRIER
            for row in plan.rows
        ]
        return order, self.candidate(plan).lagging

    def seconds_on_average(self, candidate: Candidate) -> float:
        """The period of a pair that repeats itself, by the costs and all that other measurements
        could have given; else the time with its surroundings.

        Where lanes disturb each other, an order can be fast only as long as every time is exactly
        as measured. The cost of a candidate looks at some of them.
        """
        return self._timed(candidate, None)[0]

    def _timed(self, candidate: Candidate, samples: int | None) -> tuple[float, Array]:
        """Seconds by so many samples and the costs, and when each operator starts by the costs."""
        order = np.array(candidate.order, np.int64)
        first = self._marks(candidate.first)
        if not self.cyclic:
            own = (self._base + order).tolist()
            ahead = self._first.union((np.flatnonzero(first) + self._base).tolist())
            starts, ends = self._walk.play([*self._prefix, *own, *self._suffix], ahead)
            return max(ends), np.array(starts)[self._base : self._base + self.size]
        lagging = self._marks(candidate.lagging)
        numbers = range(len(self._machines))[: None if samples is None else samples + 1]
        found = [self._period(number, order, lagging, first, candidate.spare) for number in numbers]
        return sum(seconds for seconds, _ in found) / len(found), found[0][1]

    def _period(
        self, number: int, order: Array, lagging: Array, first: Array, spare: int
    ) -> tuple[float, Array]:
        lanes = len(self.lanes)
        machine = self._told(self._machines[number], spare, _ROUNDS)
        seconds, settled, begun = period(machine, lanes, order, lagging, first)
        if not settled:
            machine = self._told(self._patient[number], spare, _MORE_ROUNDS)
            seconds, _, _ = period(machine, lanes, order, lagging, first)
        return seconds, begun

    def _told(self, both: _Both, spare: int, rounds: int) -> Machine:
        """The machine of so many rounds, where the operators in the mask leave processors."""
        taking, leaving = both
        return taking.mixed(leaving, self._marks(spare, rounds)) if spare else taking

    def _marks(self, mask: int, times: int = 1) -> Array:
        """A bit mask as an array, so many times."""
        known = self._masks.get((mask, times))
        if known is None:
            bits = [bool(mask >> x & 1) for x in range(self.size)]
            known = self._masks[mask, times] = np.tile(bits, times)
        return known

    @cached_property
    def _machines(self) -> list[_Both]:
        return self._both(self._walk)

    @cached_property
    def _patient(self) -> list[_Both]:
        """More rounds, for orders that take long to repeat themselves."""
        return self._both(self._longer)

    def _both(self, walk: Walk) -> list[_Both]:
        both = []
        for costs in (self.costs, *self.costs.others):
            taking = walk.machine if costs is self.costs else walk.machine_of(costs)
            both.append((taking, walk.leaving(taking, costs) if self.sparable else taking))
        return both

    def seconds_of_plan(self, plan: Plan) -> float:
        """The same of a plan, which may have barriers, by the costs as measured alone.

        Where it has some, nothing leaves processors that the costs do not say.
        """
        if not self.cyclic:
            plans = self._plans(plan)
            return max(self._walk.play(self._walk.order(plans), self._walk.first_of(plans))[1])
        if not any(isinstance(row, Barrier) for row in plan.rows):
            return self._timed(self.candidate(plan), 0)[0]
        walk = self._longer
        plans = [plan] * len(walk.stops)
        ends = walk.play(walk.order(plans), walk.first_of(plans))[1]
        last, half = walk.first[-2], len(walk.stops) // 2
        return (
            max(ends[last + x] - ends[last - half * self.size + x] for x in range(self.size)) / half
        )

    @cached_property
    def single(self) -> Machine:
        """One round, which no host holds up."""
        walk = Walk(repeated(self._ahead, self._behind, 1), self.costs)
        return walk.machine._replace(launch=0.0, inline=False)

    @cached_property
    def _longer(self) -> Walk:
        return Walk(repeated(self._ahead, self._behind, _MORE_ROUNDS), self.costs)

    def plan(self, candidate: Candidate, name: str = "auto") -> Plan:
        """The candidate as a plan."""
        rows = []
        for x in candidate.order:
            graph, operator = self.operators[x]
            lag, first = candidate.lagging >> x & 1, bool(candidate.first >> x & 1)
            spare = bool(candidate.spare >> x & 1)
            rows.append(Issue(graph.direction, operator.lane, operator.name, lag, first, spare))
        forward = self.forward.name if self.forward else None
        backward = self.backward.name if self.backward else None
        return Plan(name, forward, backward, tuple(rows))

    def candidate(self, plan: Plan) -> Candidate:
        """The order of a plan, without its barriers."""
        rows = [(self.number[row.strand, row.operator], row) for row in plan.issues]
        lagging = sum(1 << x for x, row in rows if row.lag)
        first = sum(1 << x for x, row in rows if row.first)
        spare = sum(1 << x for x, row in rows if row.spare) & self.sparable
        return Candidate(tuple(x for x, _ in rows), lagging, first, spare)

    def moved(self, candidate: Candidate, source: int, target: int) -> Candidate:
        """The operator at `source` goes to `target`, and what must go along goes along."""
        order, lagging = candidate.order, candidate.lagging
        x = order[source]
        same = lagging if lagging >> x & 1 else ~lagging
        if target < source:
            company = (self.ancestors[x] & same) | 1 << x
            segment = order[target : source + 1]
            taken = tuple(y for y in segment if company >> y & 1)
            rest = tuple(y for y in segment if not company >> y & 1)
            return replace(candidate, order=(*order[:target], *taken, *rest, *order[source + 1 :]))
        company = (self.descendants[x] & same) | 1 << x
        segment = order[source : target + 1]
        taken = tuple(y for y in segment if company >> y & 1)
        rest = tuple(y for y in segment if not company >> y & 1)
        return replace(candidate, order=(*order[:source], *rest, *taken, *order[target + 1 :]))

    def related(self, candidate: Candidate, x: int, y: int) -> bool:
        """Whether the order of two operators matters beyond when they are issued."""
        apart = (candidate.lagging >> x ^ candidate.lagging >> y) & 1
        linked = (self.ancestors[x] >> y | self.ancestors[y] >> x) & 1
        return self.lane[x] == self.lane[y] or bool(linked and not apart)

    def toggled(self, candidate: Candidate, x: int) -> Candidate:
        """`x` begins or ceases to lag, and what must go along goes along: the same work order.

        What begins to lag goes to the front, and what ceases to goes to the end, which is the
        same place in a pair that repeats itself.
        """
        order, lagging = candidate.order, candidate.lagging
        if lagging >> x & 1:
            company = (self.ancestors[x] & lagging) | 1 << x
        else:
            company = (self.descendants[x] & ~lagging) | 1 << x
        taken = tuple(y for y in order if company >> y & 1)
        rest = tuple(y for y in order if not company >> y & 1)
        if lagging >> x & 1:
            return replace(candidate, order=(*rest, *taken), lagging=lagging & ~company)
        return replace(candidate, order=(*taken, *rest), lagging=lagging | company)
