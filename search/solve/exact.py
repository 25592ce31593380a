"""The best order of a small pair of layers, proven by branch and bound."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from lightning_dhellam.search.solve.orders import PairOrder
from lightning_dhellam.search.solve.problem import Cost, Problem

Chains = tuple[tuple[float, ...], ...]
"""By lane and operator: the longest chain from the start of the lane's first operator."""


class Exhausted(Exception):
    """The budget of nodes was used up before the search was complete."""


class Exact:
    """Tries every valid order that may be better than the best known.

    Orders that differ only in how lanes are woven into each other are tried once. A beginning is
    given up when one lane alone makes it too slow: from its first operator to its last so far,
    and then what it has left.
    """

    def __init__(self, problem: Problem, best: PairOrder, cost: Cost, nodes: int) -> None:
        self.problem = problem
        self.best, self.cost = best, cost
        self._nodes = nodes

    def run(self, bound: float) -> bool:
        """Improve `best`, and tell whether it is proven that nothing is better.

        `bound` are seconds that no order can beat.
        """
        self._bound = bound
        try:
            for lagging in closed_sets(self.problem):
                if self._done:
                    break
                unreached = (-inf,) * self.problem.size
                chains = (unreached,) * len(self.problem.lanes)
                left = [0.0] * len(self.problem.lanes)
                for x, lane in enumerate(self.problem.lane):
                    left[lane] += self.problem.seconds[x]
                self._extend((), lagging, chains, [-1] * len(left), left)
        except Exhausted:
            return False
        return True

    @property
    def _done(self) -> bool:
        return self.cost[0] == 0 and self.cost[1] <= self._bound * (1 + 1e-9)

    def _extend(
        self,
        order: tuple[int, ...],
        lagging: int,
        chains: Chains,
        last: list[int],
        left: list[float],
    ) -> None:
        problem = self.problem
        self._nodes -= 1
        if self._nodes < 0:
            raise Exhausted
        if len(order) == problem.size:
            found = PairOrder(order, lagging)
            cost = problem.cost(found)
            if cost < self.cost:
                self.best, self.cost = found, cost
            return
        for x in self._next(order, lagging):
            lane = problem.lane[x]
            longer = self._longer(x, lagging, chains, last)
            then, rest = last.copy(), left.copy()
            then[lane] = x
            rest[lane] -= problem.seconds[x]
            if problem.cyclic and not self._promising(longer, then, rest):
                continue
            self._extend((*order, x), lagging, longer, then, rest)
            if self._done:
                return

    def _promising(self, chains: Chains, last: list[int], left: list[float]) -> bool:
        least = max(
            chains[lane][x] + left[lane] if x >= 0 else left[lane] for lane, x in enumerate(last)
        )
        return self.cost[0] > 0 or least < self.cost[1] * (1 - 1e-12)

    def _next(self, order: tuple[int, ...], lagging: int) -> Iterator[int]:
        problem = self.problem
        done = sum(1 << x for x in order)
        for x in range(problem.size):
            late = lagging >> x & 1
            before = [y for y in problem.before[x] if lagging >> y & 1 == late]
            if done >> x & 1 or not all(done >> y & 1 for y in before):
                continue
            if order and problem.exchangeable:
                previous = order[-1]
                apart = problem.lane[previous] != problem.lane[x] and previous not in before
                if apart and x < previous:
                    continue
            yield x

    def _longer(self, x: int, lagging: int, chains: Chains, last: list[int]) -> Chains:
        problem = self.problem
        lane = problem.lane[x]
        late = lagging >> x & 1
        before = [y for y in problem.before[x] if lagging >> y & 1 == late]
        if last[lane] >= 0:
            before.append(last[lane])
        grown = []
        for number, row in enumerate(chains):
            start = max((row[y] for y in before), default=-inf)
            if number == lane and last[lane] < 0:
                start = max(start, 0.0)
            grown.append((*row[:x], start + problem.seconds[x], *row[x + 1 :]))
        return tuple(grown)


def closed_sets(problem: Problem) -> Iterator[int]:
    """Give every set of operators that may lag together, as bit masks.

    With each operator all that read what it writes lag as well.
    """
    loose = [x for x in range(problem.size) if problem.loose >> x & 1]
    for choice in range(1 << len(loose)):
        lagging = sum(1 << x for number, x in enumerate(loose) if choice >> number & 1)
        if all(problem.descendants[x] & ~lagging == 0 for x in loose if lagging >> x & 1):
            yield lagging
