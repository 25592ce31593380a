"""What candidates cost beside each other: times under a plan, and bytes, of pairs of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair, Issue, Plan
from lightning_dhellam.plan.offloading import offload
from lightning_dhellam.plan.passes import left_bytes, recompute
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.model.halves import halves
from lightning_dhellam.search.recompute.candidates import (
    MOST,
    Candidate,
    Hiding,
    candidates,
    narrowed,
)
from lightning_dhellam.search.recompute.covering import Copies, of_forward
from lightning_dhellam.search.solve import Budget, Problem, solve_pair
from lightning_dhellam.search.solve.orders import graphs_of

BUDGET = Budget(evaluations=400, rare_evaluations=100, exact_operators=0)
"""How long the order of a pair with a candidate is searched: its time is compared, not used."""


@dataclass(frozen=True)
class Kind:
    """Layers that are alike, and what they may do for memory.

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
    def of(
        cls,
        measured: GraphPair,
        kept: GraphPair,
        costs: Costs,
        copies: Copies | None,
        *,
        free: bool,
    ) -> Kind:
        """Make the kind of a layer from the one that was measured and one that makes nothing.

        Unless it is `free` it stays like that. Slots may wait on the host where `copies` are known.
        """
        alone = partial(of_forward, costs, measured)
        hiding = None
        if copies is not None:
            hiding = Hiding(copies.seconds, _computing(measured, kept, costs))
        found = candidates(kept, alone, MOST if free else 0, hiding)
        return cls(tuple(found), tuple(_with(kept, one) for one in found), measured)

    def narrowed(self, costs: Costs, tokens: int, builder: Builder | None, slack: float) -> Kind:
        """The kind with those of its candidates that none beats beside themselves.

        What of their copies is exposed, the layer alone does not tell.
        """
        if not any(one.away for one in self.candidates):
            return self

        def played(number: int) -> float:
            pair = self.pairs[number]
            return _played(pair, _Back.of(pair, Part.BACKWARD), costs, tokens, builder, slack)[1]

        of = {
            (one.slots, one.away): pair
            for one, pair in zip(self.candidates, self.pairs, strict=True)
        }
        found = tuple(narrowed(self.candidates, played))
        return replace(self, candidates=found, pairs=tuple(of[o.slots, o.away] for o in found))


def _with(kept: GraphPair, one: Candidate) -> GraphPair:
    """The layer as a candidate has it: to be looked at, since its copies do nothing."""
    return offload(recompute(kept, one.slots), one.away, _nothing, _nothing)


def _nothing(value: object) -> object:
    raise AssertionError("a layer of a candidate is not carried out")


def _computing(measured: GraphPair, kept: GraphPair, costs: Costs) -> float:
    """Seconds that a layer computes when it makes nothing again, one operator after the other."""
    return sum(
        costs.seconds[costs.keys[own.fingerprint][operator.name]]
        for own, graph in ((measured.forward, kept.forward), (measured.backward, kept.backward))
        for operator in graph.operators
        if operator.computes
    )


@dataclass(frozen=True)
class Meeting:
    """A kind of layer forward beside another one backward, or alone.

    Attributes:
        seconds: by candidate of the one that goes backward, beside the same one of its kind if that
            goes forward; of a layer that goes forward alone by its own.
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
    if behind is None:
        seconds = [_played(front, _Back(), costs, tokens, builder, slack)[1] for front in fronts]
    for number, pair in enumerate(behind.pairs if behind else (None,)):
        back = _Back() if pair is None else _Back.of(pair, part)
        if ahead is None and back.pair is None:
            seconds.append(0.0)
            sizes[0].append(0.0)
            continue
        beside = fronts[number if ahead is behind else 0]
        plan, taken = _played(beside, back, costs, tokens, builder, slack)
        if behind is not None:
            seconds.append(taken)
        for row, front in enumerate(fronts):
            problem = _problem(front, back, costs, tokens)
            peak = problem.peak_of_plan(_adapted(plan, front))
            if builder is None:
                sequential = BUILDERS["sequential"](problem.forward, problem.backward)
                least = problem.peak_of_plan(sequential)
                peak = min(max(peak, least), least + slack)
            saved = ahead.candidates[row].saved if ahead else 0.0
            sizes[row].append(peak - (saved + back.held) * tokens)
    return Meeting(tuple(seconds), tuple(map(tuple, sizes)))


def _played(
    ahead: GraphPair | None,
    back: _Back,
    costs: Costs,
    tokens: int,
    builder: Builder | None,
    slack: float,
) -> tuple[Plan, float]:
    """A plan of two layers, and the seconds that it takes."""
    problem = _problem(ahead, back, costs, tokens)
    if builder is None:
        plan = solve_pair(
            ahead, back.pair, costs, tokens=tokens, memory_slack=slack, budget=BUDGET
        ).plan
    else:
        plan = builder(problem.forward, problem.backward)
    return plan, problem.seconds_of_plan(plan)


def _adapted(plan: Plan, ahead: GraphPair | None) -> Plan:
    """The plan for another candidate of the layer that goes forward: of other copies to the host.

    Each comes behind what it needs, as it does in the graph.
    """
    if ahead is None:
        return plan
    graph = ahead.forward
    there = {row.operator for row in plan.issues if row.strand is graph.direction}
    copies = [o for o in graph.operators if o.lane.copies and o.name not in there]
    rows = [
        row
        for row in plan.rows
        if not isinstance(row, Issue)
        or row.strand is not graph.direction
        or row.operator in graph.by_name
    ]
    for copy in copies:
        users = {o.name for o in graph.operators if {*o.reads, *o.writes} & {*copy.reads}}
        users.discard(copy.name)
        last = max(
            (
                at
                for at, row in enumerate(rows)
                if isinstance(row, Issue)
                and row.strand is graph.direction
                and row.operator in users
            ),
            default=-1,
        )
        rows.insert(last + 1, Issue(graph.direction, copy.lane, copy.name))
    return replace(plan, rows=tuple(rows))


def _problem(ahead: GraphPair | None, back: _Back, costs: Costs, tokens: int) -> Problem:
    costs = costs.at_work(graphs_of(ahead, back.pair))
    return Problem(ahead, back.pair, costs, tokens=tokens, leaves=back.leaves)
