"""The published scheme, for comparison: operators in blocks, blocks in pairs, barriers between.

Each strand keeps its default order and is cut into contiguous blocks. A block of one strand runs
beside a block of the other, or alone, and a barrier follows. A dynamic programme over how far
each strand has come finds the cut with the least total time (DHelix, arXiv 2411.15871, section 4):

    compute  F F|B B|F
    tp       b  |f  |b b
"""

from __future__ import annotations

from math import inf

import numpy as np

from lightning_dhellam.plan import Barrier, Issue, Lane, Plan, Strand
from lightning_dhellam.plan.plan import Row
from lightning_dhellam.search.model.machine import perform
from lightning_dhellam.search.solve.problem import Problem

LONGEST = 5
"""Operators in a block at most."""

_Point = tuple[int, int]


class _Blocks:
    """Times blocks of both strands that run together."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._none = np.zeros(problem.size, bool)

    def best(self, forward: range, backward: range) -> tuple[float, tuple[int, ...]]:
        """Return seconds, and the better of both orders: which strand is issued first."""
        orders = [(*forward, *backward), (*backward, *forward)]
        if not (forward and backward):
            orders = orders[:1]
        return min((self._seconds(order), order) for order in orders)

    def _seconds(self, order: tuple[int, ...]) -> float:
        waits = np.zeros(self.problem.size, np.int64)
        for x in order:
            waits[x] = sum(y in order for y in self.problem.before[x])
        block = self.problem.single._replace(waits=waits)
        numbers = np.array(order, np.int64)
        _, ends = perform(block, len(self.problem.lanes), numbers, self._none, False)
        return float(ends[numbers].max())


def pairs(problem: Problem) -> Plan:
    """Return the plan that the published scheme finds."""
    count = sum(graph.direction is Strand.FORWARD for graph, _ in problem.operators)
    end: _Point = (count, problem.size)
    blocks = _Blocks(problem)
    times = {(i, j): inf for i in range(count + 1) for j in range(count, problem.size + 1)}
    came: dict[_Point, tuple[_Point, tuple[int, ...]]] = {}
    times[0, count] = 0.0
    for (i, j), reached in sorted(times.items()):
        reached = times[i, j]
        for to_i in range(i, min(i + LONGEST, count) + 1):
            for to_j in range(j, min(j + LONGEST, problem.size) + 1):
                if (to_i, to_j) == (i, j):
                    continue
                seconds, order = blocks.best(range(i, to_i), range(j, to_j))
                if reached + seconds < times[to_i, to_j]:
                    times[to_i, to_j] = reached + seconds
                    came[to_i, to_j] = (i, j), order
    return _plan(problem, came, end)


def _plan(
    problem: Problem, came: dict[_Point, tuple[_Point, tuple[int, ...]]], end: _Point
) -> Plan:
    groups: list[tuple[int, ...]] = []
    while end in came:
        end, order = came[end]
        groups.append(order)
    rows: list[Row] = []
    for order in reversed(groups):
        for x in order:
            graph, operator = problem.operators[x]
            rows.append(Issue(graph.direction, Lane(operator.lane), operator.name))
        rows.append(Barrier())
    forward = problem.forward.name if problem.forward else None
    backward = problem.backward.name if problem.backward else None
    return Plan("pairs", forward, backward, tuple(rows))
