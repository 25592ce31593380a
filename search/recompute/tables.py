"""What candidates cost beside each other: times under a plan, and bytes, of pairs of layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair
from lightning_dhellam.plan.passes import left_bytes, recompute
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.model.halves import halves
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

    @property
    def left(self) -> tuple[float, ...]:
        """What each leaves between the halves of backward, in bytes per token."""
        return tuple(map(left_bytes, self.pairs))

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


@dataclass(frozen=True)
class _Back:
    """A part of a layer's backward.

    Attributes:
        pair: with that part as its backward; None where there is nothing to do in it.
        leaves: slots that it leaves for the second half.
        held: bytes per token of what it finds saved or left.
    """

    pair: GraphPair | None = None
    leaves: frozenset[str] = frozenset()
    held: float = 0.0

    @classmethod
    def of(cls, pair: GraphPair, part: Part) -> _Back:
        early, late = halves(pair)
        own, leaves = pair, frozenset[str]()
        if part is Part.INPUT:
            own, leaves = early, frozenset({*late.backward.inputs, *late.backward.foreign})
        elif part is Part.WEIGHT:
            own = late
        if not own.backward.operators:
            return cls()
        found = own.backward.foreign
        if part is Part.WEIGHT:
            found += own.backward.inputs
        sizes = {**pair.forward.bytes_per_token, **pair.backward.bytes_per_token}
        return cls(own, leaves, sum(sizes.get(slot, 0.0) for slot in found))


def meeting(
    ahead: Kind | None,
    behind: Kind | None,
    part: Part,
    costs: Costs,
    tokens: int,
    builder: Builder | None,
    slack: float,
) -> Meeting:
    """Play a pair with each candidate by a plan of `builder`, or else by a searched one.

    A searched one takes at most `slack` bytes above the sequential plan, since what hides best
    holds most. So will the one that is used in the end, which is searched for the two candidates
    themselves; and the sequential plan, which that one is tried against, has to fit as well.
    """
    seconds: list[float] = []
    fronts = ahead.pairs if ahead else (None,)
    sizes: list[list[float]] = [[] for _ in fronts]
    for pair in behind.pairs if behind else (None,):
        back = _Back() if pair is None else _Back.of(pair, part)
        if ahead is None and back.pair is None:
            seconds.append(0.0)
            sizes[0].append(0.0)
            continue
        problem = _problem(fronts[0], back, costs, tokens)
        if builder is None:
            plan = solve_pair(
                fronts[0], back.pair, costs, tokens=tokens, memory_slack=slack, budget=BUDGET
            ).plan
        else:
            plan = builder(problem.forward, problem.backward)
        seconds.append(problem.seconds_of_plan(plan))
        for row, front in enumerate(fronts):
            problem = _problem(front, back, costs, tokens)
            peak = problem.peak_of_plan(plan)
            if builder is None:
                sequential = BUILDERS["sequential"](problem.forward, problem.backward)
                least = problem.peak_of_plan(sequential)
                peak = min(max(peak, least), least + slack)
            saved = ahead.candidates[row].saved if ahead else 0.0
            sizes[row].append(peak - (saved + back.held) * tokens)
    return Meeting(tuple(seconds), tuple(map(tuple, sizes)))


def _problem(ahead: GraphPair | None, back: _Back, costs: Costs, tokens: int) -> Problem:
    costs = costs.at_work(graphs_of(ahead, back.pair))
    return Problem(ahead, back.pair, costs, tokens=tokens, leaves=back.leaves)
