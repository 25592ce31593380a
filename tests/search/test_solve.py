"""The solver: exact where that can be checked, near the bound where it cannot."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_dhellam.plan import BUILDERS, GraphPair, Issue, Plan, PlanError, validate
from lightning_dhellam.search.measure import Profile, measure, perturbed
from lightning_dhellam.search.model import Costs, Walk, simulate, step_stops
from lightning_dhellam.search.pipeline import layers_of
from lightning_dhellam.search.solve import (
    Budget,
    PairOrder,
    Problem,
    bounds,
    peak_bytes,
    solve,
    solve_pair,
)
from lightning_dhellam.search.solve.bound import maximum
from lightning_dhellam.search.solve.exact import closed_sets
from lightning_dhellam.search.solve.local import neighbour
from tests.plan.graphs import graph
from tests.search.brute import every_plan, lag_choices
from tests.search.graphs import (
    FINGERPRINT,
    TOKENS,
    FakeBench,
    closed,
    costs,
    graphs_of,
    model,
    toy_costs,
    transformer,
)

LINKS = [(370e9, False), (370e9, True), (110e9, False), (110e9, True), (200e9, True)]


def tiny() -> GraphPair:
    """Three forward operators and four backward ones, one of which may lag."""
    forward = graph(
        "forward",
        "norm compute: x -> n\ngather tp: n -> whole\ngemm compute: whole -> y",
        "x",
        "y",
        "tiny",
    )
    backward = graph(
        "backward",
        """
        dgrad compute: dy -> d_whole
        grad_scatter tp: d_whole -> d_n
        wgrad compute: dy whole ->
        norm.grad compute: d_n x -> dx
        """,
        "dy",
        "dx",
        "tiny",
    )
    return GraphPair(forward, backward)


def drawn_costs(pair: GraphPair, seed: int, slowdowns: bool, launch: float = 0.0) -> Costs:
    """Random times, and random slowdowns of each two operators."""
    draw = random.Random(seed)
    graphs = (pair.forward, pair.backward)
    operators = [operator for item in graphs for operator in item.operators]
    keys = {item.fingerprint: {o.name: o.name for o in item.operators} for item in graphs}
    slow = {
        (a.name, b.name): (draw.uniform(1, 3), draw.uniform(1, 1.5))
        for a in operators
        for b in operators
        if slowdowns and a.is_communication and not b.is_communication
    }
    return Costs(keys, {o.name: draw.uniform(0.2, 3) for o in operators}, slow, launch)


def least(
    pair: GraphPair, given: Costs, allowed: Callable[[Plan], bool] = lambda plan: True
) -> float:
    """The shortest period of all valid plans."""
    problem = Problem(pair, pair, given)
    return min(problem.seconds_of_plan(plan) for plan in every_plan(pair) if allowed(plan))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slowdowns", [False, True])
def test_small_pairs_are_ordered_as_well_as_possible(seed: int, slowdowns: bool) -> None:
    pair = tiny()
    given = drawn_costs(pair, seed, slowdowns)
    solution = solve_pair(pair, pair, given)
    assert solution.proven
    assert solution.seconds == pytest.approx(least(pair, given), rel=1e-9)
    assert solution.bound <= solution.seconds * (1 + 1e-9)


def test_so_they_are_when_the_host_is_slow() -> None:
    """Then the order across lanes counts as well."""
    pair = tiny()
    given = drawn_costs(pair, 5, slowdowns=True, launch=0.4)
    solution = solve_pair(pair, pair, given)
    assert solution.proven
    assert solution.seconds == pytest.approx(least(pair, given), rel=1e-9)


def test_the_search_alone_finds_what_the_proof_finds() -> None:
    toy, given = toy_costs({"gather": 2.0, "gemm": 1.7, "wgrad": 1.4, "dgrad": 1.3})
    proven = solve_pair(toy, toy, given)
    found = solve_pair(toy, toy, given, budget=Budget(exact_operators=0))
    assert proven.proven
    assert found.seconds == pytest.approx(proven.seconds, rel=1e-6)


def test_the_sets_that_may_lag_are_those_of_valid_plans() -> None:
    toy, given = toy_costs({})
    problem = Problem(toy, toy, given)
    names = [operator.name for _, operator in problem.operators]
    found = {
        frozenset(name for x, name in enumerate(names) if lagging >> x & 1)
        for lagging in closed_sets(problem)
    }
    assert found == set(lag_choices(toy.backward))
    assert {"wgrad"} in found and {"wgrad", "regather"} in found


def test_moves_keep_orders_valid() -> None:
    layer = transformer()
    problem = Problem(layer, layer, costs(graphs_of([layer]), 110e9))
    draw = random.Random(1)
    here = problem.default()
    seen = set()
    for _ in range(300):
        here = neighbour(problem, here, draw)
        validate(problem.plan(here), layer.forward, layer.backward)
        assert problem.order(problem.plan(here)) == here
        seen.add(here)
    assert len(seen) > 200


@pytest.mark.parametrize(("link", "slowdowns"), LINKS)
def test_a_70b_layer_comes_near_its_bound(link: float, slowdowns: bool) -> None:
    layer = transformer()
    given = costs(graphs_of([layer]), link, slowdowns)
    budget = Budget()
    solution = solve_pair(layer, layer, given, tokens=TOKENS, budget=budget)
    assert solution.gap < 0.05
    assert solution.evaluations <= 1.3 * budget.evaluations
    problem = Problem(layer, layer, given)
    for build in BUILDERS.values():
        plan = build(layer.forward, layer.backward)
        assert solution.seconds <= problem.seconds_of_plan(plan) * (1 + 1e-9)
    published = solve_pair(layer, layer, given, algorithm="pairs")
    assert solution.seconds < published.seconds
    assert published.seconds <= problem.seconds_of_plan(
        BUILDERS["dhellam"](layer.forward, layer.backward)
    )


@pytest.mark.parametrize(("link", "slowdowns"), [(110e9, False), (200e9, True)])
def test_four_times_the_budget_gains_less_than_2_percent(link: float, slowdowns: bool) -> None:
    layer = transformer()
    given = costs(graphs_of([layer]), link, slowdowns)
    found = solve_pair(layer, layer, given)
    longer = solve_pair(layer, layer, given, budget=Budget(evaluations=10_000, seed=1))
    assert found.seconds <= 1.02 * min(longer.seconds, found.seconds)


def test_operators_that_take_no_time_can_be_ordered_and_refused() -> None:
    layer = transformer()
    nothing = Costs.nominal(graphs_of([layer]), 0)
    assert solve_pair(layer, layer, nothing).seconds == 0
    few = Budget(evaluations=500)
    with pytest.raises(ValueError, match="memory_limit=0 bytes: the least found"):
        solve_pair(layer, layer, nothing, tokens=TOKENS, memory_limit=0.0, budget=few)


def test_an_operator_that_never_ends_makes_a_period_infinite() -> None:
    layer = transformer()
    given = costs(graphs_of([layer]), 200e9)
    key = given.key(layer.forward, "fc1.gemm")
    endless = replace(given, seconds={**given.seconds, key: float("inf")})
    problem = Problem(layer, layer, endless)
    assert problem.cost(problem.default())[1] == float("inf")


def test_the_same_profile_and_seed_give_the_same_plan() -> None:
    layer = transformer()
    given = costs(graphs_of([layer]), 200e9, True)
    budget = Budget(evaluations=600)
    one, other = (solve_pair(layer, layer, given, budget=budget) for _ in range(2))
    assert one == other


def test_noise_leads_to_equally_good_plans() -> None:
    layer = transformer()
    graphs = graphs_of([layer])
    profile = measure(FakeBench(costs(graphs, 200e9, True), spread=0.06), graphs, FINGERPRINT)
    given = Costs.of(profile)
    problem = Problem(layer, layer, given)
    draw = random.Random(3)
    times = []
    for _ in range(5):
        noisy = Costs.of(perturbed(profile, draw.random))
        plan = solve_pair(layer, layer, noisy, budget=Budget(evaluations=1200)).plan
        times.append(problem.seconds_of_plan(plan))
    assert max(times) <= 1.02 * min(times)


def test_noise_of_a_real_measurement_leads_to_equally_good_plans() -> None:
    """On H200s a link on SMs makes some orders fast only at exactly the measured times."""
    folder = Path(__file__).parents[2] / "benchmarks" / "multi_gpu"
    profile = Profile.load(next(folder.glob("b6-tp2*/profile.json")))
    (layer,) = (pair for pair in layers_of(profile, 1) if pair.name == "transformer")
    problem = Problem(layer, layer, Costs.of(profile))
    draw = random.Random(0)
    budget = Budget(evaluations=6000)  # fewer than by default are enough
    plans = [
        solve_pair(layer, layer, Costs.of(perturbed(profile, draw.random)), budget=budget).plan
        for _ in range(5)
    ]
    times = [problem.seconds_on_average(problem.order(plan)) for plan in plans]
    assert max(times) <= 1.02 * min(times)
    # And all of them are better than what needs no search.
    others = [problem.order(b(layer.forward, layer.backward)) for b in BUILDERS.values()]
    assert max(times) < 0.98 * min(map(problem.seconds_on_average, others))


def test_slowdowns_change_the_choice() -> None:
    """A plan that knows them is faster than one that was made without."""
    layer = transformer()
    given = costs(graphs_of([layer]), 200e9, True)
    knowing = solve_pair(layer, layer, given)
    blind = solve_pair(layer, layer, given.without_slowdowns())
    assert knowing.seconds < Problem(layer, layer, given).seconds_of_plan(blind.plan)


def test_communication_goes_first_where_it_would_be_kept_waiting() -> None:
    layer = transformer()
    given = costs(graphs_of([layer]), 200e9, slowdowns=True)
    strict = replace(given, behind=dict.fromkeys(given.slowdowns, (20.0, 1.0)))
    solution = solve_pair(layer, layer, strict, tokens=TOKENS)
    first = [row.operator for row in solution.plan.issues if row.first]
    assert first and solution.seconds < solve_pair(layer, layer, strict, algorithm="pairs").seconds
    problem = Problem(layer, layer, strict)
    rows = tuple(
        replace(row, first=False) if isinstance(row, Issue) else row for row in solution.plan.rows
    )
    assert problem.seconds_of_plan(replace(solution.plan, rows=rows)) > 1.001 * solution.seconds
    # Where nothing is kept waiting, holding compute back gains nothing.
    assert not any(row.first for row in solve_pair(layer, layer, given).plan.issues)


def test_where_lanes_disturb_each_other_too_much_barriers_are_kept() -> None:
    pair = tiny()
    given = drawn_costs(pair, 1, slowdowns=False)
    flat = [*pair.forward.operators, *pair.backward.operators]
    slow = {
        (a.name, b.name): (9.0, 9.0)
        for a in flat
        for b in flat
        if a.is_communication and not b.is_communication
    }
    given = replace(given, slowdowns=slow)
    solution = solve_pair(pair, pair, given)
    sequential = BUILDERS["sequential"](pair.forward, pair.backward)
    assert solution.seconds <= Problem(pair, pair, given).seconds_of_plan(sequential)


def test_memory_stays_below_the_limit() -> None:
    layer = transformer()
    given = costs(graphs_of([layer]), 110e9)
    free = solve_pair(layer, layer, given, tokens=TOKENS)
    limit = 0.85 * free.peak_bytes
    budget = Budget(evaluations=4000)
    tight = solve_pair(layer, layer, given, tokens=TOKENS, memory_limit=limit, budget=budget)
    assert tight.peak_bytes <= limit
    assert tight.seconds >= free.seconds * (1 - 1e-9)


def test_the_most_that_a_pair_of_a_model_needs() -> None:
    layers = model(3)
    given = costs(graphs_of(layers), 110e9)
    found = solve(layers, given, tokens=TOKENS, budget=Budget(evaluations=200))
    needs = peak_bytes(layers, found.builder(), given, tokens=TOKENS)
    assert needs == max(solution.peak_bytes for solution in found.solutions.values())


def test_a_small_pair_with_little_memory_is_still_ordered_as_well_as_possible() -> None:
    pair = tiny()
    sizes = {"n": 1.0, "whole": 8.0, "y": 1.0, "d_whole": 8.0, "d_n": 1.0, "dx": 1.0}
    pair = GraphPair(*(replace(g, bytes_per_token=sizes) for g in (pair.forward, pair.backward)))
    given = drawn_costs(pair, 2, slowdowns=True)
    problem = Problem(pair, pair, given, tokens=10)

    def peak(plan: Plan) -> float:
        return problem.peak(problem.order(plan))

    peaks = sorted({peak(plan) for plan in every_plan(pair)})
    limit = peaks[1]
    solution = solve_pair(pair, pair, given, tokens=10, memory_limit=limit)
    assert solution.peak_bytes <= limit
    best = least(pair, given, lambda plan: peak(plan) <= limit)
    assert solution.seconds == pytest.approx(best, rel=1e-9)
    with pytest.raises(ValueError, match=r"memory_limit=\d+ bytes.*tiny\|tiny.*raise memory_limit"):
        solve_pair(pair, pair, given, tokens=10, memory_limit=peaks[0] - 1)


def test_the_peak_of_a_pair_is_what_a_walk_shows() -> None:
    """With one layer, a step of three micro-batches holds what the pair holds and no more."""
    layer = closed(transformer())
    problem = Problem(layer, layer, costs(graphs_of([layer]), 110e9))
    draw = random.Random(7)
    order = problem.default()
    for _ in range(20):
        order = neighbour(problem, order, draw)._replace(lagging=0)
        if not _valid(problem, order):
            order = problem.default()
        plan = problem.plan(order)
        alone = BUILDERS["sequential"]
        walk = Walk(step_stops([layer], 3), problem.costs)
        plans = [alone(layer.forward, None), plan, plan, alone(None, layer.backward)]
        assert problem.peak(order) == pytest.approx(walk.peak_bytes(walk.order(plans), 1))


def _valid(problem: Problem, order: PairOrder) -> bool:
    try:
        validate(problem.plan(order), problem.forward, problem.backward)
    except PlanError:
        return False
    return True


def test_what_lags_holds_its_operands() -> None:
    """A weight gradient left for the next pair keeps what it reads, from both pairs."""
    layer = transformer()
    problem = Problem(layer, layer, costs(graphs_of([layer]), 110e9))
    names = [operator.name for _, operator in problem.operators]
    wgrad = names.index("fc2.wgrad")
    last = problem.moved(problem.default(), wgrad, problem.size - 1)
    late = problem.toggled(problem.default(), wgrad)
    assert late.numbers[0] == wgrad and late.lagging == 1 << wgrad
    # First in the next pair instead of last in its own: its operands meet the next pair's peak
    # only while nothing else has begun.
    assert problem.peak(late) <= problem.peak(last)
    kept = problem.moved(late, 0, problem.size - 1)
    assert problem.peak(kept) > problem.peak(last)


def test_whole_models_get_plans_for_every_pair() -> None:
    layers = model(3)
    given = costs(graphs_of(layers), 110e9, True)
    solved = solve(layers, given, tokens=TOKENS, budget=Budget(evaluations=800))
    assert solved.main.name == "transformer|transformer"
    assert {s.name for s in solved.solutions.values()} == {
        "transformer|transformer",
        "transformer|-",
        "-|transformer",
        "embedding|head",
        "head|embedding",
        "embedding|-",
        "head|-",
        "-|head",
        "-|embedding",
    }
    ours = simulate(layers, solved.builder(), given, micro_batches=4, tokens=TOKENS)
    for name, build in BUILDERS.items():
        other = simulate(layers, build, given, micro_batches=4, tokens=TOKENS)
        assert ours.seconds < other.seconds, name
    published = solve(layers, given, algorithm="pairs")
    theirs = simulate(layers, published.builder(), given, micro_batches=4)
    assert ours.seconds < theirs.seconds


def test_what_has_no_plan_gets_the_fallback() -> None:
    layers = model(1)
    solved = solve(layers, costs(graphs_of(layers), 110e9), budget=Budget(evaluations=50))
    other = tiny()
    assert solved.builder()(other.forward, None).name == "interleaved"


def test_the_bound_names_what_is_critical() -> None:
    layer = transformer()
    for link, name in ((370e9, "compute"), (110e9, "tp")):
        found = bounds(Problem(layer, layer, costs(graphs_of([layer]), link)))
        assert found[name] == pytest.approx(max(found.values()))
    slow = bounds(Problem(layer, layer, costs(graphs_of([layer]), 110e9, True)))
    assert max(slow, key=lambda key: slow[key]) == "compute beside tp"


def test_the_linear_programme() -> None:
    # Largest 3a + 2b with a + b <= 4, a + 3b <= 6, a <= 3: at a = 3, b = 1.
    used = np.array([[1.0, 1.0], [1.0, 3.0], [1.0, 0.0]])
    assert maximum(np.array([3.0, 2.0]), used, np.array([4.0, 6.0, 3.0])) == pytest.approx(11)


def test_an_unknown_algorithm_is_answered_with_the_known_ones() -> None:
    pair = tiny()
    with pytest.raises(ValueError, match=r"algorithm='best'.*'auto' or 'pairs'"):
        solve_pair(pair, pair, drawn_costs(pair, 0, False), algorithm="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("link", [110e9, 370e9])
def test_memory_stays_near_that_of_the_sequential_plan(link: float) -> None:
    layers = model(4)
    given = costs(graphs_of(layers), link)
    free = solve(layers, given, tokens=TOKENS)
    slack = 0.02 * 2**30
    budget = Budget(evaluations=4000)  # a quarter of the default is enough
    found = solve(layers, given, tokens=TOKENS, memory_slack=slack, budget=budget)
    assert free.main.extra_bytes > slack, "the case is not one"
    for name, solution in found.solutions.items():
        assert solution.extra_bytes <= max(slack, 0), name
    assert found.main.seconds <= 1.05 * free.main.seconds


def test_a_limit_of_memory_leaves_little_to_the_seed() -> None:
    layer = transformer()
    given = costs(graphs_of([layer]), 110e9)
    budgets = [Budget(evaluations=4000, seed=seed) for seed in (2, 3)]  # a quarter of the default
    seconds = [
        solve_pair(layer, layer, given, tokens=TOKENS, memory_slack=0.0, budget=budget).seconds
        for budget in budgets
    ]
    assert max(seconds) <= 1.01 * min(seconds)
