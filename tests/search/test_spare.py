"""GEMMs that leave processors to communication: measured, priced, searched and marked."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dhellam.plan import BUILDERS, Graph, GraphPair, Plan, PlanError, validate
from lightning_dhellam.search.measure import Profile, Samples, Target, measure
from lightning_dhellam.search.model import Costs, Sample, as_planned, repeated, simulate
from lightning_dhellam.search.report.pictures import hidden_shares
from lightning_dhellam.search.solve import Budget, Problem, solve, solve_pair
from lightning_dhellam.search.solve.local import neighbour, plain
from tests.plan.graphs import sparing
from tests.search.graphs import FINGERPRINT, FakeBench, costs, graphs_of, model, transformer

SLOWER = 1.05
"""Times that a GEMM takes longer when it leaves processors to communication."""
DEAR = 2.0
"""The same of one for which it does not pay."""


class SharingBench(FakeBench):
    """GEMMs that take all processors disturb communication, and those that leave some do not."""

    def __init__(self, given: Costs, different: str = "", dear: str = "") -> None:
        super().__init__(given, spread=0.0)
        self.different, self.dear = different, dear

    def shrinks(self, target: Target) -> bool:
        return target.operator.name != self.different

    def alone(self, target: Target) -> Samples:
        (seconds, *_) = super().alone(target).seconds
        slower = DEAR if target.operator.name == self.dear else SLOWER
        return Samples((seconds * (slower if target.spare else 1.0),))

    def beside(self, communication: Target, compute: Target) -> tuple[Samples, Samples]:
        if compute.spare:
            return self.alone(communication), self.alone(compute)
        return super().beside(communication, compute)


def _shrinking(layer: GraphPair) -> GraphPair:
    def shrunk(graph: Graph) -> Graph:
        gemms = (".gemm", ".dgrad", ".wgrad")
        operators = [replace(o, shrinks=o.name.endswith(gemms)) for o in graph.operators]
        return replace(graph, operators=tuple(operators))

    return GraphPair(shrunk(layer.forward), shrunk(layer.backward))


LAYER = _shrinking(transformer())
GEMM = "qkv.gemm"
GEMMS = {o.name for g in graphs_of([LAYER]) for o in g.operators if o.shrinks}


def _spared(plan: Plan) -> set[str]:
    return {row.operator for row in plan.issues if row.spare}


def _profile(different: str = "") -> Profile:
    graphs = graphs_of([LAYER])
    return measure(SharingBench(costs(graphs, 200e9, True), different), graphs, FINGERPRINT)


def test_gemms_are_measured_both_ways_unless_their_results_differ() -> None:
    profile = _profile()
    assert {key.removeprefix("transformer/") for key in profile.spares} == GEMMS
    alone = {row.operator: row.median for row in profile.timings if row.partner is None}
    for key, spare in profile.spares.items():
        assert alone[spare] == pytest.approx(SLOWER * alone[key])
    assert _profile("fc1.gemm").spares.keys() == profile.spares.keys() - {"transformer/fc1.gemm"}


def test_a_heat_map_shows_operators_once() -> None:
    _, computes, _ = hidden_shares(_profile())
    assert computes and not [key for key in computes if "spare" in key]


def test_a_profile_with_them_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = _profile()
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def test_costs_of_a_plan_are_those_of_how_it_runs_operators() -> None:
    known = Costs.of(_profile())
    stops = repeated(LAYER, LAYER, 1)
    plan = BUILDERS["interleaved"](LAYER.forward, LAYER.backward)
    assert as_planned(known, stops, [plan]) == known
    assert as_planned(known.sparing(known.sparable), stops, [plan]) == known
    everywhere = as_planned(known, stops, [sparing("interleaved")(LAYER.forward, LAYER.backward)])
    assert everywhere.spared == known.sparable
    gemm, norm = (known.alone(LAYER.forward, name) for name in ("fc1.gemm", "mlp.norm"))
    assert everywhere.alone(LAYER.forward, "fc1.gemm") == pytest.approx(SLOWER * gemm)
    assert everywhere.alone(LAYER.forward, "mlp.norm") == norm
    one = replace(plan, rows=tuple(replace(r, spare=r.operator == GEMM) for r in plan.issues))
    some = as_planned(known, stops, [one])
    assert some.alone(LAYER.forward, GEMM) == pytest.approx(
        SLOWER * known.alone(LAYER.forward, GEMM)
    )
    assert some.alone(LAYER.forward, "fc1.gemm") == gemm

    def seconds(spare: bool) -> float:
        build = sparing("interleaved") if spare else BUILDERS["interleaved"]
        return simulate([LAYER] * 3, build, known, micro_batches=3).seconds

    assert seconds(spare=True) < seconds(spare=False)


def test_what_is_searched_for_sparing_gemms_says_so() -> None:
    known, budget = Costs.of(_profile()), Budget(evaluations=300)
    plain = solve_pair(LAYER, LAYER, known, budget=budget)
    everywhere = solve_pair(LAYER, LAYER, known.sparing(known.sparable), budget=budget)
    assert _spared(plain.plan) == set()
    assert _spared(everywhere.plan) == GEMMS
    assert everywhere.seconds < plain.seconds


@pytest.mark.parametrize("dear", ["", "fc1.gemm", "output.gemm"])
def test_gemms_leave_processors_where_it_pays(dear: str) -> None:
    layers = [_shrinking(layer) for layer in model(3)]
    graphs = graphs_of(layers)
    profile = measure(SharingBench(costs(graphs, 200e9, True), dear=dear), graphs, FINGERPRINT)
    known, budget = Costs.of(profile), Budget(evaluations=300, rare_evaluations=50)
    plain, everywhere = (
        solve_pair(LAYER, LAYER, c, budget=budget) for c in (known, known.sparing(known.sparable))
    )
    found = solve(layers, known, budget=budget)
    assert found.main.seconds <= min(plain.seconds, everywhere.seconds)
    assert _spared(found.main.plan)
    assert all(dear not in _spared(plan) for plan in found.plans.values())
    assert all(Plan.parse(str(plan)) == plan for plan in found.plans.values())
    # What one pair of layers is told to leave, it leaves in every other.
    told = {row.operator: row.spare for row in found.main.plan.issues}
    for plan in found.plans.values():
        rows = [r for r in plan.issues if "transformer" in (plan.forward, plan.backward)]
        assert all(row.spare == told[row.operator] for row in rows if row.operator in GEMMS)
    simulated = simulate(layers, found.builder(), known, micro_batches=3)
    others = [simulate(layers, b, known, micro_batches=3).seconds for b in BUILDERS.values()]
    assert simulated.seconds < min(others)


def _sampled(known: Costs) -> Costs:
    """The same with another measurement, in which everything took a third longer."""
    longer = {key: 4 / 3 * seconds for key, seconds in known.seconds.items()}
    return replace(known, samples=(Sample(longer, known.slowdowns, known.behind),))


def test_a_choice_costs_the_same_whether_it_is_made_or_given() -> None:
    known, draw = _sampled(Costs.of(_profile())), random.Random(3)
    choosing = Problem(LAYER, LAYER, known, sharing=True)
    here, seen = choosing.default(), set()
    for _ in range(60):
        here = neighbour(choosing, here, draw)
        plan = choosing.plan(here)
        assert choosing.order(plan) == here
        given = Problem(LAYER, LAYER, as_planned(known, repeated(LAYER, LAYER, 1), [plan]))
        same = here._replace(spare=0)
        assert choosing.cost(here) == pytest.approx(given.cost(same))
        assert choosing.seconds_of_plan(plan) == pytest.approx(given.seconds_of_plan(plan))
        seen.add(here.spare)
    assert len(seen) > 3


def test_gemms_that_gain_nothing_by_it_take_all_processors() -> None:
    known = Costs.of(_profile())
    choosing = Problem(LAYER, LAYER, known, sharing=True)
    sequential = choosing.order(BUILDERS["sequential"](LAYER.forward, LAYER.backward))
    everywhere = sequential._replace(spare=choosing.sparable)
    assert choosing.sparable.bit_count() == len(GEMMS)
    rid = plain(choosing, everywhere)
    assert rid.spare != everywhere.spare
    assert choosing.cost(rid) < choosing.cost(everywhere)


def test_a_choice_that_is_given_is_kept() -> None:
    known, budget = Costs.of(_profile()), Budget(evaluations=100, rare_evaluations=20)
    one = frozenset({(LAYER.forward.fingerprint, GEMM)})
    found = solve([LAYER] * 3, known.sparing(one), budget=budget)
    assert _spared(found.main.plan) == {GEMM}
    assert _spared(solve([LAYER] * 3, known, algorithm="pairs").main.plan) == set()
    again = solve_pair(LAYER, LAYER, known.sparing(one), budget=budget, sharing=True)
    assert _spared(again.plan) == {GEMM}
    assert _spared(solve_pair(LAYER, LAYER, known, algorithm="pairs", sharing=True).plan) == set()


def test_only_gemms_that_compute_the_same_are_marked() -> None:
    known = Costs.of(_profile("fc1.gemm"))
    found = solve_pair(LAYER, LAYER, known.sparing(known.sparable), budget=Budget(evaluations=50))
    assert _spared(found.plan) == GEMMS - {"fc1.gemm"}


def test_a_plan_that_marks_another_operator_is_refused() -> None:
    plan = BUILDERS["sequential"](LAYER.forward, None)
    rows = tuple(replace(row, spare=True) for row in plan.issues)
    with pytest.raises(PlanError, match=r"attention\.norm' is no GEMM"):
        validate(replace(plan, rows=rows), LAYER.forward, None)
