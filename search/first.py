"""Which communication goes first: begins before the compute operator that is issued next.

On a GPU a kernel that runs has taken the SMs that it wants. Communication on SMs that becomes ready
when a compute operator ends is a few microseconds too late: the next compute operator has them, and
it waits for that one's end. A plan can hold compute back until the communication has begun:

    compute  |= dgrad =||======== wgrad ========|           |= dgrad =| |========= wgrad ==========|
    tp                  .........................|=scatter=|           |=scatter=|
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_dhellam.plan import Barrier, Issue, Plan
from lightning_dhellam.plan.plan import Row
from lightning_dhellam.search.orders import Problem

_ROUNDS = 2
_GAIN = 1e-4
"""Share of the time that going first must gain."""


def with_first(problem: Problem, plan: Plan) -> tuple[Plan, float]:
    """The plan with the communication going first that gains by it, and its seconds.

    Greedy: one operator after the other, each at every place that its slots and its lane allow.
    """
    best, seconds = plan, problem.seconds_of_plan(plan)
    if not problem.costs.behind:
        return best, seconds
    limit = problem.memory_limit
    allowed = None if limit is None else max(limit, problem.memory.peak(problem.candidate(plan)))
    names = [(row.strand, row.operator) for row in plan.issues if row.lane is not row.lane.COMPUTE]
    for _ in range(_ROUNDS):
        before = seconds
        for name in names:
            for changed in _variants(problem, best, name):
                other = problem.seconds_of_plan(changed)
                if other < seconds * (1 - _GAIN) and _fits(problem, changed, allowed):
                    best, seconds = changed, other
        if seconds > before * (1 - _GAIN):
            break
    return best, seconds


def _fits(problem: Problem, plan: Plan, allowed: float | None) -> bool:
    """Whether a plan needs no more bytes than it may."""
    return allowed is None or problem.memory.peak(problem.candidate(plan)) <= allowed


def _variants(problem: Problem, plan: Plan, name: tuple[object, str]) -> Iterator[Plan]:
    """The plan with one operator going first, or not, at each place where it may be issued."""
    at = next(i for i, row in enumerate(plan.rows) if isinstance(row, Issue) and _is(row, name))
    row = plan.rows[at]
    assert isinstance(row, Issue)
    rest = (*plan.rows[:at], *plan.rows[at + 1 :])
    low, high = _room(problem, rest, row, at)
    for place in range(low, high + 1):
        for first in (True, False):
            moved = replace(row, first=first)
            yield replace(plan, rows=(*rest[:place], moved, *rest[place:]))


def _room(problem: Problem, rest: tuple[Row, ...], row: Issue, at: int) -> tuple[int, int]:
    """The first and the last place for `row` with the same order on its lane."""
    x = problem.number[row.strand, row.operator]
    low, high = 0, len(rest)
    for place, other in enumerate(rest):
        if isinstance(other, Barrier):
            related = True
        else:
            y = problem.number[other.strand, other.operator]
            linked = (problem.ancestors[x] >> y | problem.ancestors[y] >> x) & 1
            related = other.lane is row.lane or (bool(linked) and other.lag == row.lag)
        if related and place < at:
            low = place + 1
        elif related:
            high = min(high, place)
    return low, high


def _is(row: Issue, name: tuple[object, str]) -> bool:
    return (row.strand, row.operator) == name
