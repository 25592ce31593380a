"""Good orders fast: list scheduling for a start, then parallel tempering over moves.

Several orders are changed side by side, at temperatures from cold to hot; a better one moves to the
cold. The hot ones cross what the cold ones cannot, so that it matters little where they start. All
but the coldest may take more memory than is allowed, at a price: between two orders that keep the
limit there is often none that does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import exp, inf

from lightning_dhellam.search.solve.orders import PairOrder
from lightning_dhellam.search.solve.problem import Cost, Problem

_STARTS = 60
_REPLICAS = 6
_HOT, _COLD = 0.05, 0.001
"""Temperatures as shares of the seconds of the best start."""
_EXCESS = 0.2
"""Price of memory above the limit, as a share of the time for as much again. With half to double of
it a Llama layer's best orders are found as well; where none may exceed the limit, one seed in two
stays 4% above them."""
_SWEEP = 10
"""Moves of each replica between exchanges."""
_PATIENCE = 2000
"""Moves without a new order at most: small problems have few."""
_SPARE, _LAG, _PLACE = 0.1, 0.35, 0.25
"""Shares of moves that choose what leaves processors, of the others, that let work lag, and of
the others, that choose what goes first."""
_INSTANT = 1e-12
"""Seconds of operators that take no time."""
_FINALISTS = 400
"""Orders that are compared more thoroughly in the end."""
_IDLE = 1e-4
"""Share of the time that a mark must gain."""
_FARTHER = 0.8
"""Probability that a move goes one place farther."""


def search(
    problem: Problem, starts: list[PairOrder], bound: float, evaluations: int, seed: int
) -> tuple[PairOrder, Cost]:
    """Return the best order found with so many evaluations of the cost, and what it costs.

    Args:
        problem: pair of layers to order.
        starts: orders to begin with, next to those of list scheduling.
        bound: stop at an order whose seconds are within a ten-thousandth of it.
        evaluations: how many orders may be played.
        seed: seed of the random numbers; the same seed and problem give the same order.
    """
    draw = random.Random(seed)
    limit = problem.evaluations + evaluations
    found = {start: problem.cost(start) for start in starts}
    for number in range(_STARTS):
        if problem.evaluations > limit - evaluations * 3 // 4:
            break
        start = list_schedule(problem, draw, number)
        found[start] = problem.cost(start)
    ranked = sorted(found, key=lambda one: (found[one], one.numbers))
    return temper(problem, ranked[:_REPLICAS], bound, limit, draw)


def temper(
    problem: Problem, starts: list[PairOrder], bound: float, limit: int, draw: random.Random
) -> tuple[PairOrder, Cost]:
    """Temper from `starts`, the best first, until `limit` evaluations in all."""
    here = [starts[number % len(starts)] for number in range(_REPLICAS)]
    costs = [problem.cost(one) for one in here]
    cost = costs[0]
    good = {one: problem.cost(one) for one in here}
    steps = range(_REPLICAS)
    scale = max(cost[1], _INSTANT) * _COLD
    # The coldest keeps to the limit, or comes nearer to it, whatever it takes.
    limit_bytes = max(problem.memory_limit or 0.0, 1.0)
    prices = [inf, *[_EXCESS * max(cost[1], _INSTANT) / limit_bytes] * (_REPLICAS - 1)]
    heat = [scale * (_HOT / _COLD) ** (step / (_REPLICAS - 1)) for step in steps]
    idle = 0
    while problem.evaluations < limit and idle < _PATIENCE and not _reached(cost, bound):
        known = problem.evaluations
        for step in steps:
            for _ in range(_SWEEP):
                there = neighbour(problem, here[step], draw)
                then = problem.cost(there)
                if _accept(costs[step], then, prices[step], heat[step], draw):
                    here[step], costs[step] = problem.aligned(there), then
                    good[here[step]] = then
                    cost = min(cost, then)
        idle = idle + _SWEEP * _REPLICAS if problem.evaluations == known else 0
        for step in reversed(steps[1:]):
            colder = step - 1
            rise = _rise(costs[step], costs[colder], prices[colder])
            gain = (1 / heat[colder] - 1 / heat[step]) * rise
            if gain >= 0 or draw.random() < exp(gain):
                here[step], here[colder] = here[colder], here[step]
                costs[step], costs[colder] = costs[colder], costs[step]
    ranked = sorted(good, key=lambda one: (good[one], one.numbers))[:_FINALISTS]
    if problem.averages:
        ranked.sort(key=lambda one: (good[one][0], problem.seconds_on_average(one)))
    return ranked[0], good[ranked[0]]


def _reached(cost: Cost, bound: float) -> bool:
    return cost[0] == 0 and cost[1] <= bound * 1.0001


def list_schedule(problem: Problem, draw: random.Random, number: int) -> PairOrder:
    """Make an order by priorities: what can start first is issued, the longest way first.

    Numbers above 0 disturb the priorities and leave some loose operators for the next pair.
    """
    noise = 0.0 if number == 0 else draw.choice((0.05, 0.2, 0.5))
    lagging = 0
    for x in range(problem.size):
        if problem.loose >> x & 1 and number and draw.random() < 0.4:
            lagging |= (problem.descendants[x] | 1 << x) & problem.loose
    spare = 0
    if problem.sparable and number:
        some = draw.getrandbits(problem.size) & problem.sparable
        spare = draw.choice((0, problem.sparable, some))
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
    return PairOrder(tuple(order), lagging, spare=spare)


def _ready(
    problem: Problem, left: set[int], lagging: int, done: dict[int, float], free: list[float]
) -> Iterator[tuple[int, float]]:
    """Give what may be issued next, and when it would start."""
    for x in sorted(left):
        late = lagging >> x & 1
        before = [y for y in problem.before[x] if lagging >> y & 1 == late]
        if all(y in done for y in before):
            yield x, max([free[problem.lane[x]], *(done[y] for y in before)])


def _ways(problem: Problem) -> list[float]:
    """Return the seconds of the longest chain from each operator to the end of its graph."""
    ways = list(problem.seconds)
    for x in reversed(range(problem.size)):
        for y in problem.before[x]:
            ways[y] = max(ways[y], problem.seconds[y] + ways[x])
    return ways


def _accept(here: Cost, there: Cost, price: float, temperature: float, draw: random.Random) -> bool:
    rise = _rise(here, there, price)
    return rise <= 0 or draw.random() < exp(-rise / temperature)


def _rise(here: Cost, there: Cost, price: float) -> float:
    """Return how many seconds more `there` costs, with a price in seconds for excess bytes."""
    excess = there[0] - here[0]
    return there[1] - here[1] + (price * excess if excess else 0.0)


def neighbour(problem: Problem, order: PairOrder, draw: random.Random) -> PairOrder:
    """Return a random valid order near to `order`."""
    if problem.sparable and draw.random() < _SPARE:
        x = draw.choice(problem.sparable_ones)
        return order._replace(spare=order.spare ^ 1 << x)
    if problem.loose and draw.random() < _LAG:
        x = draw.choice(problem.loose_ones)
        order = problem.toggled(order, x)
        source = order.numbers.index(x)
        return problem.moved(order, source, draw.randrange(problem.size))
    if problem.costs.behind and problem.communications and draw.random() < _PLACE:
        return _placed(problem, order, draw.choice(problem.communications), draw)
    source = draw.randrange(problem.size)
    reach = 1
    while draw.random() < _FARTHER and reach < problem.size:
        reach += 1
    target = source + (reach if draw.random() < 0.5 else -reach)
    return problem.moved(order, source, min(max(target, 0), problem.size - 1))


def _placed(problem: Problem, order: PairOrder, x: int, draw: random.Random) -> PairOrder:
    """Place communication anywhere between its neighbours on its lane, going first or not."""
    numbers = order.numbers
    low = high = source = numbers.index(x)
    while low > 0 and not problem.related(order, x, numbers[low - 1]):
        low -= 1
    while high < problem.size - 1 and not problem.related(order, x, numbers[high + 1]):
        high += 1
    moved = problem.moved(order, source, draw.randint(low, high))
    return moved._replace(first=moved.first & ~(1 << x) | draw.getrandbits(1) << x)


def slim(
    problem: Problem, start: PairOrder, slack: float, evaluations: int, seed: int
) -> tuple[PairOrder, Cost]:
    """Return an order with less memory that is slower by a share of `slack` at most, and its cost.

    Orders of the same time are many, and the search that found one did not look at memory.
    """
    draw = random.Random(seed)
    best, best_cost = start, problem.cost(start)
    allowed = best_cost[1] * (1 + slack)
    peak = problem.peak(best)
    limit = problem.evaluations + evaluations
    for _ in range(4 * evaluations):
        if problem.evaluations >= limit:
            break
        there = neighbour(problem, best, draw)
        there_peak = problem.peak(there)
        if there_peak > peak:
            continue
        cost = problem.cost(there)
        if cost[0] <= best_cost[0] and cost[1] <= allowed:
            best, best_cost, peak = there, cost, there_peak
    return best, best_cost


def plain(problem: Problem, order: PairOrder) -> PairOrder:
    """Return the order without marks that gain nothing: going first, and leaving processors."""
    cost = problem.cost(order)
    for x in range(problem.size):
        for unmarked in (_not_first, _not_spare):
            other = unmarked(order, x)
            if other != order and problem.cost(other) <= (cost[0], cost[1] * (1 + _IDLE)):
                order = other
    return order


def _not_first(order: PairOrder, x: int) -> PairOrder:
    return order._replace(first=order.first & ~(1 << x))


def _not_spare(order: PairOrder, x: int) -> PairOrder:
    return order._replace(spare=order.spare & ~(1 << x))
