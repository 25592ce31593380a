"""Good orders fast: list scheduling for a start, then annealing over moves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import exp

from lightning_dhellam.search.orders import Candidate, Cost, Problem

_STARTS = 60
_TRIES = 2
_HOT, _COLD = 0.05, 0.0005
_REACH = 8


def search(
    problem: Problem, starts: list[Candidate], bound: float, evaluations: int, seed: int
) -> tuple[Candidate, Cost]:
    """The best order found with so many evaluations of the cost.

    Args:
        problem: what to order.
        starts: orders to begin with, next to those of list scheduling.
        bound: stop at an order whose seconds are within a ten-thousandth of it.
        evaluations: budget.
        seed: of the random numbers: the same seed and problem give the same order.
    """
    draw = random.Random(seed)
    limit = problem.evaluations + evaluations
    found = {start: problem.cost(start) for start in starts}
    for number in range(_STARTS):
        if problem.evaluations > limit // 4:
            break
        start = list_schedule(problem, draw, number)
        found[start] = problem.cost(start)
    ranked = sorted(found, key=lambda c: (found[c], c.order))
    best, cost = ranked[0], found[ranked[0]]
    share = max(1, (limit - problem.evaluations) // _TRIES)
    for start in ranked[:_TRIES]:
        if _reached(cost, bound):
            break
        stop = min(limit, problem.evaluations + share)
        other, other_cost = anneal(problem, start, found[start], bound, stop, draw)
        if other_cost < cost:
            best, cost = other, other_cost
    return best, cost


def _reached(cost: Cost, bound: float) -> bool:
    return cost[0] == 0 and cost[1] <= bound * 1.0001


def list_schedule(problem: Problem, draw: random.Random, number: int) -> Candidate:
    """An order by priorities: what can start first is issued, the longest way to the end first.

    Numbers above 0 disturb the priorities and leave some loose operators for the next pair.
    """
    noise = 0.0 if number == 0 else draw.choice((0.05, 0.2, 0.5))
    lagging = 0
    for x in range(problem.size):
        if problem.loose >> x & 1 and number and draw.random() < 0.4:
            lagging |= (problem.descendants[x] | 1 << x) & problem.loose
    rank = [way * (1 + noise * draw.uniform(-1, 1)) for way in _ways(problem)]
    done: dict[int, float] = {}
    free = [0.0] * len(problem.lanes)
    order: list[int] = []
    left = set(range(problem.size))
    while left:
        x, start = min(
            ((x, start) for x, start in _ready(problem, left, lagging, done, free)),
            key=lambda item: (item[1], -rank[item[0]], item[0]),
        )
        done[x] = free[problem.lane[x]] = start + problem.seconds[x]
        left.remove(x)
        order.append(x)
    return Candidate(tuple(order), lagging)


def _ready(
    problem: Problem, left: set[int], lagging: int, done: dict[int, float], free: list[float]
) -> Iterator[tuple[int, float]]:
    """What may be issued next, and when it would start."""
    for x in sorted(left):
        late = lagging >> x & 1
        before = [y for y in problem.before[x] if lagging >> y & 1 == late]
        if all(y in done for y in before):
            yield x, max([free[problem.lane[x]], *(done[y] for y in before)])


def _ways(problem: Problem) -> list[float]:
    """Seconds of the longest chain from each operator to the end of its graph."""
    ways = list(problem.seconds)
    for x in reversed(range(problem.size)):
        for y in problem.before[x]:
            ways[y] = max(ways[y], problem.seconds[y] + ways[x])
    return ways


def anneal(
    problem: Problem,
    start: Candidate,
    cost: Cost,
    bound: float,
    limit: int,
    draw: random.Random,
) -> tuple[Candidate, Cost]:
    """Random moves, worse ones less and less often, until `limit` evaluations in all."""
    here, here_cost = best, best_cost = start, cost
    begun = problem.evaluations
    heat = here_cost[1]
    idle = 0
    while problem.evaluations < limit and idle < 2000 and not _reached(best_cost, bound):
        share = (problem.evaluations - begun) / max(1, limit - begun)
        temperature = heat * _HOT * (_COLD / _HOT) ** share
        before = problem.evaluations
        there = neighbour(problem, here, draw)
        there_cost = problem.cost(there)
        idle = idle + 1 if problem.evaluations == before else 0
        if _accept(here_cost, there_cost, temperature, draw):
            here, here_cost = there, there_cost
            if here_cost < best_cost:
                best, best_cost = here, here_cost
    return best, best_cost


def _accept(here: Cost, there: Cost, temperature: float, draw: random.Random) -> bool:
    if there <= here:
        return True
    if there[0] > here[0]:
        return False
    return draw.random() < exp((here[1] - there[1]) / temperature)


def neighbour(problem: Problem, candidate: Candidate, draw: random.Random) -> Candidate:
    """A random valid order near to `candidate`."""
    loose = [x for x in range(problem.size) if problem.loose >> x & 1]
    if loose and draw.random() < 0.15:
        x = draw.choice(loose)
        candidate = problem.toggled(candidate, x)
        source = candidate.order.index(x)
        return problem.moved(candidate, source, draw.randrange(problem.size))
    source = draw.randrange(problem.size)
    lane = problem.lane[candidate.order[source]]
    peers = [i for i, x in enumerate(candidate.order) if problem.lane[x] == lane]
    at = peers.index(source)
    near = [i for i in peers[max(0, at - _REACH) : at + _REACH + 1] if i != source]
    if not near:
        return candidate
    return problem.moved(candidate, source, draw.choice(near))


def slim(
    problem: Problem, start: Candidate, slack: float, evaluations: int, seed: int
) -> tuple[Candidate, Cost]:
    """An order with less memory that is slower by a share of `slack` at most.

    Orders of the same time are many, and the search that found one did not look at memory.
    """
    draw = random.Random(seed)
    best, best_cost = start, problem.cost(start)
    allowed = best_cost[1] * (1 + slack)
    peak = problem.memory.peak(best)
    limit = problem.evaluations + evaluations
    for _ in range(4 * evaluations):
        if problem.evaluations >= limit:
            break
        there = neighbour(problem, best, draw)
        there_peak = problem.memory.peak(there)
        if there_peak > peak:
            continue
        cost = problem.cost(there)
        if cost[0] <= best_cost[0] and cost[1] <= allowed:
            best, best_cost, peak = there, cost, there_peak
    return best, best_cost
