"""What the orders of one pair of layers cost: time and memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lightning_dhellam.plan import Barrier, GraphPair, Issue, Lane, Plan
from lightning_dhellam.search.model import (
    Costs,
    Order,
    PairMemory,
    Stop,
    Walk,
    names,
    repeated,
)
from lightning_dhellam.search.model.arrays import Array
from lightning_dhellam.search.model.machine import Machine, period
from lightning_dhellam.search.model.memory import BARRIER
from lightning_dhellam.search.solve.orders import Orders, PairOrder

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


class Problem(Orders):
    """Knows what the orders of a pair of layers cost.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        costs: what the operators cost.
        tokens: how many tokens a micro-batch has, for the memory limit.
        memory_limit: bytes that slots may take at once during the pair, or None.
        surroundings: None for a pair that repeats itself, whose cost is its period; else the
            cost is the time of all of them together.
        sharing: whether it is chosen with the order what leaves processors to communication, of
            a pair that repeats itself, unless `costs` say it already.
        leaves: slots that `behind`, the first half of a backward, leaves for the second.

    Attributes:
        seconds: seconds of each operator while nothing else runs.
        sparable: bit mask of the operators that may leave processors to communication.
        evaluations: how many orders were played so far.
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
        leaves: Collection[str] = (),
    ) -> None:
        super().__init__(ahead, behind, cyclic=surroundings is None)
        self._ahead, self._behind, self._surroundings = ahead, behind, surroundings
        self.costs = self._heeded(costs)
        self.memory_limit = memory_limit
        self._memory = PairMemory(
            ahead, behind, self.lanes, tokens=tokens, waits=not costs.inline, leaves=leaves
        )
        self.sparable = self._sparable() if sharing and self.cyclic and not costs.spared else 0
        self.sparable_ones = [x for x in range(self.size) if self.sparable >> x & 1]
        self._stage(surroundings)
        self.evaluations = 0
        self._known: dict[object, tuple[Cost, Array]] = {}
        self._masks: dict[tuple[int, int], Array] = {}

    def _heeded(self, costs: Costs) -> Costs:
        """Leave out of the costs what no order can change.

        Communication that shares the host with compute takes the processor's time in any order.
        A host that runs far ahead of a device, round after round, is never waited for, unless it
        waits itself.
        """
        if costs.inline:
            return costs.without_slowdowns()
        work = sum(costs.alone(graph, o.name) for graph, o in self.operators)
        ahead = self.size * costs.launch <= _AHEAD * work and not self.looks
        return replace(costs, launch=0.0) if self.cyclic and ahead else costs

    def _sparable(self) -> int:
        able = self.costs.sparable
        own = [(graph.fingerprint, operator.name) for graph, operator in self.operators]
        return sum(1 << x for x, operator in enumerate(own) if operator in able)

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
        # The surroundings may use more lanes than the pair.
        self.lane = self._walk.lane[own]
        self.lanes = self._walk.lanes
        self.seconds = self._walk.seconds[own]

    def _plans(self, plan: Plan) -> list[Plan]:
        """Return `plan` between those of the surroundings."""
        around = self._surroundings
        assert around is not None
        return [*(p for _, p in around.before), plan, *(p for _, p in around.after)]

    @property
    def name(self) -> str:
        """Name of the pair: `transformer|head`."""
        return names(self._ahead, self._behind)

    def load(self) -> dict[Lane, float]:
        """Return the seconds of work on each lane: of the pair, or of it and its surroundings."""
        totals = dict.fromkeys(self.lanes, 0.0)
        launches = range(self.size) if self.cyclic else range(len(self._walk.launches))
        for launch in launches:
            totals[self.lanes[self._walk.lane[launch]]] += self._walk.seconds[launch]
        return totals

    @property
    def exchangeable(self) -> bool:
        """Whether only the order within each lane matters."""
        costs = self.costs
        alone = costs.launch or costs.inline or self.looks or self.memory_limit is not None
        return not alone

    @property
    def averages(self) -> bool:
        """Whether a cost is a mean over what other measurements could have given as well."""
        return self.cyclic and bool(self.costs.samples)

    def order(self, plan: Plan) -> PairOrder:
        """Return the order of a plan, without its barriers; spare is what may be."""
        order = super().order(plan)
        return order._replace(spare=order.spare & self.sparable)

    def cost(self, order: PairOrder) -> Cost:
        """Return what an order costs. It counts as an evaluation unless it is known."""
        return self._evaluated(order)[0]

    def aligned(self, order: PairOrder) -> PairOrder:
        """Return the same order, issued by when operators start, where that is the same.

        Moves then mean what they look like.
        """
        begun = self._evaluated(order)[1]
        if not (self.cyclic and self.exchangeable):
            return order
        moments = np.rint(begun / _MOMENT).tolist()
        numbers = tuple(sorted(order.numbers, key=lambda x: moments[x]))
        other = order._replace(numbers=numbers)
        # What goes first might hold another compute operator.
        same = self.valid(other) and self._key(other) == self._key(order)
        return other if same else order

    def _evaluated(self, order: PairOrder) -> tuple[Cost, Array]:
        key = self._key(order)
        known = self._known.get(key)
        if known is None:
            self.evaluations += 1
            seconds, begun = self._timed(order, _FEW)
            excess = self._excess(np.array(order.numbers, np.int64), order.lagging)
            known = self._known[key] = (excess, seconds), begun
        return known

    def _key(self, order: PairOrder) -> object:
        """Return the same for orders that cost the same."""
        if not self.exchangeable:
            return order
        lanes: list[list[int]] = [[] for _ in self.lanes]
        ahead: list[int] = []
        for x in order.numbers:
            lanes[self.lane[x]].append(x)
            if order.first >> x & 1:
                ahead.append(x)
            elif ahead and not self.lane[x]:
                # Where they stand among the others does not matter.
                lanes.append([x, *sorted(ahead)])
                ahead = []
        return order.lagging, order.spare, tuple(map(tuple, lanes)), tuple(ahead)

    def cost_of_plan(self, plan: Plan) -> Cost:
        """Return what a plan costs, which may have barriers."""
        return self._excess(*self._issued(plan)), self.seconds_of_plan(plan)

    def _excess(self, numbers: Array, lagging: int) -> float:
        """Return the bytes above the limit."""
        if self.memory_limit is None:
            return 0.0
        return max(0.0, self._peak(numbers, lagging) - self.memory_limit)

    def _peak(self, numbers: Array, lagging: int) -> float:
        return self._memory.peak(numbers, self._marks(lagging))

    def peak(self, order: PairOrder) -> float:
        """Return the most bytes of slots at once while the pair is carried out."""
        return self._peak(np.array(order.numbers, np.int64), order.lagging)

    def peak_of_plan(self, plan: Plan) -> float:
        """Return the most bytes at once by a plan, at whose barriers memory goes back."""
        return self._peak(*self._issued(plan))

    def _issued(self, plan: Plan) -> tuple[Array, int]:
        """Return the operators of a plan with its barriers, and what lags."""
        numbers = [
            self.number[row.strand, row.operator] if isinstance(row, Issue) else BARRIER
            for row in plan.rows
        ]
        return np.array(numbers, np.int64), self.order(plan).lagging

    def seconds_on_average(self, order: PairOrder) -> float:
        """Return the mean period by the costs and all that other measurements could have given.

        Of a pair that does not repeat itself it is the time with its surroundings.

        Where lanes disturb each other, an order can be fast only as long as every time is exactly
        as measured. The cost of an order looks at some of them.
        """
        return self._timed(order, None)[0]

    def _timed(self, order: PairOrder, samples: int | None) -> tuple[float, Array]:
        """Return seconds by so many samples and the costs, and starts of operators by the costs."""
        issued = np.array(order.numbers, np.int64)
        first = self._marks(order.first)
        if not self.cyclic:
            own = (self._base + issued).tolist()
            ahead = self._first.union((np.flatnonzero(first) + self._base).tolist())
            starts, ends = self._walk.play([*self._prefix, *own, *self._suffix], ahead)
            return max(ends), np.array(starts)[self._base : self._base + self.size]
        lagging = self._marks(order.lagging)
        numbers = range(len(self._machines))[: None if samples is None else samples + 1]
        found = [self._period(number, issued, lagging, first, order.spare) for number in numbers]
        return sum(seconds for seconds, _ in found) / len(found), found[0][1]

    def _period(
        self, number: int, issued: Array, lagging: Array, first: Array, spare: int
    ) -> tuple[float, Array]:
        lanes = len(self.lanes)
        machine = self._told(self._machines[number], spare, _ROUNDS)
        seconds, settled, begun = period(machine, lanes, issued, lagging, first)
        if not settled:
            machine = self._told(self._patient[number], spare, _MORE_ROUNDS)
            seconds, _, _ = period(machine, lanes, issued, lagging, first)
        return seconds, begun

    def _told(self, both: _Both, spare: int, rounds: int) -> Machine:
        """Return the machine of so many rounds, where operators in the mask leave processors."""
        taking, leaving = both
        return taking.mixed(leaving, self._marks(spare, rounds)) if spare else taking

    def _marks(self, mask: int, times: int = 1) -> Array:
        """Return a bit mask as an array, so many times."""
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
        """Machines of more rounds, for orders that take long to repeat themselves."""
        return self._both(self._longer)

    def _both(self, walk: Walk) -> list[_Both]:
        both = []
        for costs in (self.costs, *self.costs.others):
            taking = walk.machine if costs is self.costs else walk.machine_of(costs)
            both.append((taking, walk.leaving(taking, costs) if self.sparable else taking))
        return both

    def seconds_of_plan(self, plan: Plan) -> float:
        """Return the seconds of a plan, which may have barriers, by the costs as measured alone.

        Where it has some, nothing leaves processors that the costs do not say.
        """
        if not self.cyclic:
            plans = self._plans(plan)
            return max(self._walk.play(self._walk.order(plans), self._walk.first_of(plans))[1])
        if not any(isinstance(row, Barrier) for row in plan.rows):
            return self._timed(self.order(plan), 0)[0]
        walk = self._longer
        plans = [plan] * len(walk.stops)
        ends = walk.play(walk.order(plans), walk.first_of(plans))[1]
        last, half = walk.first[-2], len(walk.stops) // 2
        return (
            max(ends[last + x] - ends[last - half * self.size + x] for x in range(self.size)) / half
        )

    @cached_property
    def single(self) -> Machine:
        """The machine of one round, which no host holds up."""
        walk = Walk(repeated(self._ahead, self._behind, 1), self.costs)
        never = np.zeros_like(walk.machine.looks)
        return walk.machine._replace(launch=0.0, inline=False, looks=never)

    @cached_property
    def _longer(self) -> Walk:
        return Walk(repeated(self._ahead, self._behind, _MORE_ROUNDS), self.costs)
