"""The middle of a deep model, where the same pair of layers is carried out again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_dhellam.plan import GraphPair, Lane, Plan
from lightning_dhellam.search.model import Costs, Interval, Timeline, Walk, repeated
from lightning_dhellam.search.solve.problem import Problem


@dataclass(frozen=True)
class SteadyState:
    """The middle of a deep model, where the same pair of layers repeats itself.

    Attributes:
        plan: name of the plan.
        period: seconds from one pair of layers to the next.
        exposed: seconds per pair that each communication lane works while compute idles.
        intervals: operators of a few pairs, time 0 at the first one shown; layers count from 0.
    """

    plan: str
    period: float
    exposed: Mapping[Lane, float]
    intervals: tuple[Interval, ...]


def steady_state(
    ahead: GraphPair | None,
    behind: GraphPair | None,
    plan: Plan,
    costs: Costs,
    *,
    shown: int = 2,
) -> SteadyState:
    """Play `plan` again and again, and keep the middle.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        plan: order of both.
        costs: what the operators cost.
        shown: how many pairs to keep the intervals of.
    """
    problem = Problem(ahead, behind, costs)
    period = problem.seconds_of_plan(plan)
    rounds = 2 * shown + 6
    walk = Walk(repeated(ahead, behind, rounds), costs)
    plans = [plan] * rounds
    order = walk.order(plans)
    starts, ends = walk.play(order, walk.first_of(plans))
    first = min(starts[walk.first[4] : walk.first[5]])
    timeline = Timeline.of(walk, order, starts, ends)
    rows = timeline.between(first, first + shown * period)
    exposed = {lane: value / shown for lane, value in Timeline(rows).exposed().items()}
    return SteadyState(plan.name, period, exposed, rows)
