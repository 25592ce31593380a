"""Chooses the plans of a model from the costs of its operators.

A pair of layers that repeats itself, as in the middle of a deep model, is ordered for its
*period*: layer boundaries are no barriers, and weight gradients may be left for the next pair. The
others, such as embedding beside head, are ordered between their neighbours. Which operators leave
processors to communication is chosen with the order of the pair that repeats itself most often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

from lightning_dhellam.plan import (
    BUILDERS,
    Barrier,
    Builder,
    GraphPair,
    Kind,
    Plan,
    Strand,
    kind_of,
    validate,
)
from lightning_dhellam.search.model import Costs, Stop, as_planned, repeated, step_stops
from lightning_dhellam.search.solve.bound import bounds
from lightning_dhellam.search.solve.exact import Exact
from lightning_dhellam.search.solve.local import plain, search, slim
from lightning_dhellam.search.solve.orders import graphs_of
from lightning_dhellam.search.solve.pairs import pairs
from lightning_dhellam.search.solve.problem import Cost, Problem, Surroundings
from lightning_dhellam.search.solve.solution import ModelSolution, Solution

_SLACK = 0.001
"""Share of the time that less memory may cost."""

_ALONE = 4
"""How many times fewer orders are looked at of a pair that lacks a strand."""

Algorithm = Literal["auto", "pairs"]


@dataclass(frozen=True)
class Budget:
    """How long to search.

    Attributes:
        evaluations: orders whose time is computed, for a pair that repeats itself; half as many
            where other measurements count as well, twice as many where what leaves processors is
            chosen with the order, four times as many with a limit of memory. It takes a second and
            a half at the size of a Llama layer with tensor parallelism, ten with a limit, and
            twenty where what leaves processors is chosen as well.
        rare_evaluations: orders whose time is computed, for each pair that does not repeat itself.
        exact_operators: number of operators up to which the best order is proven.
        exact_nodes: beginnings of orders that the proof may look at before it is given up.
        seed: seed of the random numbers.
    """

    evaluations: int = 16_000
    rare_evaluations: int = 500
    exact_operators: int = 12
    exact_nodes: int = 50_000
    seed: int = 0


def solve_pair(
    ahead: GraphPair | None,
    behind: GraphPair | None,
    costs: Costs,
    *,
    algorithm: Algorithm = "auto",
    tokens: int = 1,
    memory_limit: float | None = None,
    memory_slack: float | None = None,
    budget: Budget | None = None,
    surroundings: Surroundings | None = None,
    sharing: bool = False,
) -> Solution:
    """Return the best order found of one layer's forward beside another's backward.

    Args:
        ahead: layer whose forward graph runs, or None.
        behind: layer whose backward graph runs, or None.
        costs: what the operators cost.
        algorithm: `auto`, or `pairs` for the published scheme.
        tokens: how many tokens a micro-batch has.
        memory_limit: bytes that slots take at once during the pair, with what is saved of both
            layers, what is left for the next pair, and what has been read but not yet given back to
            its lane.
        memory_slack: instead of a limit, bytes above what the sequential plan needs.
        budget: how long to search.
        surroundings: neighbours of a pair that does not repeat itself.
        sharing: whether `auto` chooses what leaves processors to communication, of a pair that
            repeats itself, unless `costs` say it already.

    Raises:
        ValueError: no order keeps the memory limit, or the algorithm is not known.
    """
    if algorithm not in ("auto", "pairs"):
        raise ValueError(f"algorithm='{algorithm}' is not known: use 'auto' or 'pairs'")
    both = graphs_of(ahead, behind)
    made = partial(Problem, ahead, behind, tokens=tokens, surroundings=surroundings)
    problem = made(costs.at_work(both), memory_limit=memory_limit, sharing=sharing)
    sequential = BUILDERS["sequential"](problem.forward, problem.backward)
    least = problem.peak_of_plan(sequential)
    if memory_slack is not None:
        problem.memory_limit = least + max(memory_slack, 0.0)
    found = bounds(problem)
    if algorithm == "pairs":
        plan, proven = pairs(problem), False
    else:
        plan, proven = _best(problem, max(found.values()), budget or Budget())
    peak = problem.peak_of_plan(plan)
    if memory_limit is not None and peak > memory_limit:
        raise ValueError(
            f"memory_limit={memory_limit:.0f} bytes: the least found for {problem.name} is"
            f" {peak:.0f} bytes; raise memory_limit or make micro-batches smaller"
        )
    evaluations = problem.evaluations
    if problem.sparable:
        # From here on the costs say what was chosen, also for how busy compute is.
        costs = as_planned(costs, repeated(ahead, behind, 1), [plan])
        problem = made(costs.at_work(both))
        found = bounds(problem)
    graphs = {Strand.FORWARD: problem.forward, Strand.BACKWARD: problem.backward}
    plan = costs.marked(plan, graphs)
    validate(plan, problem.forward, problem.backward)
    return Solution(
        problem.name,
        plan,
        problem.seconds_of_plan(plan),
        found,
        problem.cyclic,
        proven,
        peak,
        peak - least,
        evaluations,
    )


def _best(problem: Problem, bound: float, budget: Budget) -> tuple[Plan, bool]:
    """Return the best of a search and the built-in plans, and whether it is proven to be it."""
    if not any(graph.moves for graph in (problem.forward, problem.backward) if graph):
        # All orders take as long; the built-in one hands over early.
        early = BUILDERS["interleaved"](problem.forward, problem.backward)
        return Plan("auto", early.forward, early.backward, early.rows), True
    plan, cost, proven = _searched(problem, bound, budget)
    for build in BUILDERS.values():
        # Barriers pay where lanes disturb each other more than waiting costs, which they do least
        # where operators leave processors. What has none has been compared already.
        other = build(problem.forward, problem.backward)
        if not any(isinstance(row, Barrier) for row in other.rows):
            continue
        other_cost = problem.cost_of_plan(other)
        if other_cost < (cost[0], cost[1] * (1 - 1e-9)):
            plan = Plan("auto", other.forward, other.backward, other.rows)
            cost, proven = other_cost, False
    return plan, proven


def _searched(problem: Problem, bound: float, budget: Budget) -> tuple[Plan, Cost, bool]:
    """Return the plan of a search, what it costs, and whether it is proven to be the best."""
    built_in = [build(problem.forward, problem.backward) for build in BUILDERS.values()]
    starts = [problem.default(), *map(problem.order, built_in)]
    evaluations = budget.evaluations if problem.cyclic else budget.rare_evaluations
    if problem.cyclic and problem.memory_limit is not None:
        evaluations *= 4  # with fewer it depends on the seed what is found
    if problem.averages:
        evaluations //= 2  # each takes longer
    if problem.sparable:
        evaluations *= 2
    provable = not (problem.averages or problem.sparable)
    if not provable:
        # A mean may be below what the medians allow, and what leaves processors disturbs less.
        bound = 0.0
    if problem.forward is None or problem.backward is None:
        evaluations //= _ALONE  # these orders are fewer, and carried out at the ends of a step
    best, cost = search(problem, starts, bound, evaluations, budget.seed)
    proven = cost[0] == 0 and cost[1] <= bound * (1 + 1e-9)
    if provable and not proven and problem.size <= budget.exact_operators:
        exact = Exact(problem, best, cost, budget.exact_nodes)
        # It tries every order, but none in which something goes first.
        proven = exact.run(bound) and not problem.costs.behind
        best, cost = exact.best, exact.cost
    slack = 0.0 if proven else _SLACK
    best, _ = slim(problem, best, slack, evaluations // 16, budget.seed)
    plan = problem.plan(plain(problem, best))
    return plan, problem.cost_of_plan(plan), proven


def solve(
    layers: Sequence[GraphPair],
    costs: Costs,
    *,
    algorithm: Algorithm = "auto",
    tokens: int = 1,
    memory_limit: float | None = None,
    memory_slack: float | None = None,
    budget: Budget | None = None,
) -> ModelSolution:
    """Return the plans of every pair of layers that a training step meets.

    Where operators were measured leaving processors to communication, and `costs` do not say which
    of them do, `auto` chooses that as well, if a pair of layers repeats itself.

    Layers may be given in full; equal ones are solved once. Arguments and errors are those
    of `solve_pair`; `memory_slack` are the bytes that a pair may need above its sequential plan.
    """
    stops = step_stops(layers, 3)
    ordered = partial(
        solve_pair,
        algorithm=algorithm,
        tokens=tokens,
        memory_limit=memory_limit,
        memory_slack=memory_slack,
        budget=budget,
    )
    (main, *_), repeating = _ranked(stops)
    if algorithm != "auto" or costs.spared or not costs.sparable or main not in repeating:
        return _solved(stops, partial(ordered, costs=costs), {})
    pair = next(stop.pairs for stop in stops if kind_of(*stop.graphs) == main)
    solution = ordered(*pair, costs, sharing=True)
    costs = as_planned(costs, repeated(*pair, 1), [solution.plan])
    return _solved(stops, partial(ordered, costs=costs), {main: solution})


def _ranked(stops: Sequence[Stop]) -> tuple[list[Kind], set[Kind]]:
    """Return the kinds of pairs, those that count most first, and which repeat themselves."""
    kinds = [kind_of(*stop.graphs) for stop in stops]
    counts = Counter(kinds)
    repeating = {
        kind
        for (kind, stop), (other, following) in pairwise(zip(kinds, stops, strict=True))
        if kind == other and stop.leads_to(following)
    }
    return sorted(counts, key=lambda k: (k not in repeating, "" in k, -counts[k])), repeating


def _solved(
    stops: Sequence[Stop], ordered: Callable[..., Solution], known: Mapping[Kind, Solution]
) -> ModelSolution:
    """Return plans of these pairs: those that are `known`, the others as `ordered` finds them."""
    kinds = [kind_of(*stop.graphs) for stop in stops]
    ranked, repeating = _ranked(stops)
    solutions: dict[Kind, Solution] = {}
    plans: dict[Kind, Plan] = {}
    for kind in ranked:
        if kind in known:
            solutions[kind] = known[kind]
        else:
            around = None if kind in repeating else _surroundings(stops, kinds, kind, plans)
            pair = stops[kinds.index(kind)].pairs
            solutions[kind] = ordered(*pair, surroundings=around)
        plans[kind] = solutions[kind].plan
    return ModelSolution(solutions)


def peak_bytes(
    layers: Sequence[GraphPair], builder: Builder, costs: Costs, *, tokens: int = 1
) -> float:
    """Return the most bytes that slots take at once in a pair of layers that `builder` orders.

    Arguments are those of `solve`; it is what `memory_limit` limits.
    """
    stops = {kind_of(*stop.graphs): stop for stop in step_stops(layers, 3)}
    problems = (Problem(*stop.pairs, costs, tokens=tokens) for stop in stops.values())
    return max(p.peak_of_plan(builder(p.forward, p.backward)) for p in problems)


def _surroundings(
    stops: Sequence[Stop], kinds: Sequence[Kind], kind: Kind, plans: Mapping[Kind, Plan]
) -> Surroundings:
    """Return the last stop of this kind with its neighbours, planned as far as that was done."""
    at = max(i for i, other in enumerate(kinds) if other == kind)

    def planned(number: int) -> tuple[Stop, Plan]:
        stop = stops[number]
        known = plans.get(kinds[number])
        if known is not None:
            return stop, known
        return stop, BUILDERS["interleaved"](*stop.graphs)

    before = tuple(planned(i) for i in range(max(0, at - 1), at))
    after = tuple(planned(i) for i in range(at + 1, min(len(stops), at + 3)))
    return Surroundings(stops[at], before, after)
