"""What no order can beat."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np

from lightning_dhellam.plan import Strand
from lightning_dhellam.search.solve.problem import Problem

_ITERATIONS = 500
_EPSILON = 1e-12


def bounds(problem: Problem) -> dict[str, float]:
    """Return the seconds that each resource needs at least, whatever the order.

    A lane needs the sum of its operators. Two lanes together need more when they disturb each
    other. A strand that repeats itself needs its longest chain from what it is handed to what it
    hands over. The host needs its launches.
    """
    load = problem.load()
    found = {str(lane): seconds for lane, seconds in load.items()}
    if not problem.cyclic:
        return found
    for one, other in combinations(range(len(problem.lanes)), 2):
        name = f"{problem.lanes[one]} beside {problem.lanes[other]}"
        found[name] = _together(problem, one, other)
    for strand in Strand:
        found[f"{strand} chain"] = _chain(problem, strand)
    if not problem.costs.inline:
        found["launch"] = problem.size * problem.costs.launch
    return found


def _chain(problem: Problem, strand: Strand) -> float:
    """Return the seconds of the longest way from an input of the strand's graph to its output."""
    ways: dict[int, float] = {}
    longest = 0.0
    for x, (graph, operator) in enumerate(problem.operators):
        if graph.direction is not strand:
            continue
        starts = [0.0] if set(operator.reads) & set(graph.inputs) else []
        starts += [ways[y] for y in problem.before[x] if y in ways]
        if starts:
            ways[x] = max(starts) + problem.seconds[x]
            if set(operator.writes) & set(graph.outputs):
                longest = max(longest, ways[x])
    return longest


def _together(problem: Problem, one: int, other: int) -> float:
    """Return the least seconds in which two lanes can both be done, slowed as they are.

    `other` is a communication lane. It is a linear programme over the time that each two operators
    run together. A second of it does the work of 1/a + 1/b seconds alone, a and b being the
    slowdowns, and so saves that less one.
    """
    work: dict[int, dict[str, float]] = {one: defaultdict(float), other: defaultdict(float)}
    for x, (graph, operator) in enumerate(problem.operators):
        if problem.lane[x] in work:
            key = problem.costs.key(graph, operator.name)
            work[problem.lane[x]][key] += problem.seconds[x]
    beside, communication = work[one], work[other]
    total = sum(beside.values()) + sum(communication.values())
    # Both ways to begin are open to every couple.
    columns = [
        (a, b, table.get((a, b), (1.0, 1.0)))
        for table in problem.costs.tables()
        for a in communication
        for b in beside
    ]
    rows = [*communication, *beside]
    used = np.zeros((len(rows), len(columns)))
    for column, (a, b, (slow_a, slow_b)) in enumerate(columns):
        used[rows.index(a), column] = 1 / slow_a
        used[len(communication) + list(beside).index(b), column] = 1 / slow_b
    gain = np.array([1 / slow_a + 1 / slow_b - 1 for _, _, (slow_a, slow_b) in columns])
    room = np.array([*communication.values(), *beside.values()])
    saved = maximum(gain, used, room) if columns else 0.0
    return max(0.0, total - saved)


def maximum(gain: np.ndarray, used: np.ndarray, room: np.ndarray) -> float:
    """Return the largest `gain @ x` with `used @ x <= room` and `x >= 0`, for `room >= 0`: simplex.

    Infinite if it does not end in time, so that a bound made from it stays one.
    """
    count, width = used.shape
    scale = float(room.max()) or 1.0
    table = np.zeros((count + 1, width + count + 1))
    table[:count, :width] = used
    table[:count, width:-1] = np.eye(count)
    table[:count, -1] = room / scale
    table[-1, :width] = -gain
    for _ in range(_ITERATIONS):
        # The first improving column, as Bland's rule has it, cannot cycle.
        improving = np.flatnonzero(table[-1, :-1] < -_EPSILON)
        if not improving.size:
            return float(table[-1, -1]) * scale
        column = improving[0]
        steep = table[:count, column]
        ratios = np.full(count, np.inf)
        np.divide(table[:count, -1], steep, out=ratios, where=steep > _EPSILON)
        row = int(np.argmin(ratios))
        table[row] /= table[row, column]
        others = np.arange(count + 1) != row
        table[others] -= np.outer(table[others, column], table[row])
    return float("inf")
