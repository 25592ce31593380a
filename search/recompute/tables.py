"""What candidates cost beside each other: times under a plan, and bytes, of pairs of layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lightning_dhellam.plan import Builder, GraphPair
from lightning_dhellam.plan.passes import recompute
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.recompute.candidates import MOST, Candidate, candidates
from lightning_dhellam.search.recompute.covering import of_forward
from lightning_dhellam.search.solve import Budget, Problem, solve_pair
from lightning_dhellam.search.solve.orders import graphs_of

BUDGET = Budget(evaluations=400, rare_evaluations=100, exact_operators=0)
"""How long the order of a pair with a candidate is searched: its time is compared, not used."""


@dataclass(frozen=True)
class Kind:
    """Layers that are alike, and what their backward may make again.

    Attributes:
        candidates: from the most bytes to the fewest.
        pairs: the layer with each of them.
        measured: the layer that was measured.
    """

    candidates: tuple[Candidate, ...]
    pairs: tuple[GraphPair, ...]
    measured: GraphPair

    @classmethod
    def of(cls, measured: GraphPair, kept: GraphPair, costs: Costs, *, free: bool) -> Kind:
        """Make the kind of a layer from the one that was measured and one that makes nothing.

        Unless it is `free` it stays like that.
        """
        most = MOST if free else 0
        found = candidates(kept, partial(of_forward, costs, measured), most)
        pairs = tuple(recompute(kept, one.slots) for one in found)
        return cls(tuple(found), pairs, measured)


@dataclass(frozen=True)
class Meeting:
    """A kind of layer forward beside another one backward, or alone.

    Attributes:
        seconds: by candidate of the one that goes backward.
        bytes: most at once, without what the two have saved, by candidate of either.
    """

    seconds: tuple[float, ...]
    bytes: tuple[tuple[float, ...], ...]


def meeting(
    ahead: Kind | None, behind: Kind | None, costs: Costs, tokens: int, builder: Builder | None
) -> Meeting:
    """Play a pair with each candidate by a plan of `builder`, or else by a searched one."""
    seconds: list[float] = []
    fronts = ahead.pairs if ahead else (None,)
    sizes: list[list[float]] = [[] for _ in fronts]
    for number, back in enumerate(behind.pairs if behind else (None,)):
        problem = _problem(fronts[0], back, costs, tokens)
        if builder is None:
            plan = solve_pair(fronts[0], back, costs, budget=BUDGET).plan
        else:
            plan = builder(problem.forward, problem.backward)
        seconds.append(problem.seconds_of_plan(plan))
        freed = behind.candidates[number].saved if behind else 0.0
        for row, front in enumerate(fronts):
            peak = _problem(front, back, costs, tokens).peak_of_plan(plan)
            saved = ahead.candidates[row].saved if ahead else 0.0
            sizes[row].append(peak - (saved + freed) * tokens)
    return Meeting(tuple(seconds), tuple(map(tuple, sizes)))


def _problem(
    ahead: GraphPair | None, behind: GraphPair | None, costs: Costs, tokens: int
) -> Problem:
    return Problem(ahead, behind, costs.at_work(graphs_of(ahead, behind)), tokens=tokens)
