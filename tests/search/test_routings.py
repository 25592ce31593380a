"""Operators whose time depends on the routing: measured over several, and an order is for all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from lightning_dhellam.files import FileError
from lightning_dhellam.plan import BUILDERS, Graph, GraphPair
from lightning_dhellam.search.measure import (
    BenchError,
    Profile,
    mean_of,
    measure,
    merged,
    range_of,
    with_routings,
)
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.solve import Budget, Problem, solve_pair
from tests.search.graphs import FINGERPRINT, FakeBench, costs, graphs_of, transformer

VARYING = ("fc1.gemm", "fc1.gather", "fc2.gemm", "fc1.dgrad", "fc1.wgrad", "fc2.wgrad")
SHARES = ((1.0, 0.6), (0.5, 1.4), (1.9, 0.3))
"""How many times as long as measured first what varies takes forward and backward."""

LINK = 150e9
BUDGET = Budget(evaluations=2000)


def _marked(graph: Graph) -> Graph:
    operators = (replace(o, varies=o.name in VARYING) for o in graph.operators)
    return replace(graph, operators=tuple(operators))


def _layer() -> GraphPair:
    layer = transformer()
    return GraphPair(_marked(layer.forward), _marked(layer.backward))


def _bench(given: Costs, ahead: float, behind: float) -> FakeBench:
    times = {
        name: own * (behind if "grad" in name else ahead) if name in VARYING else own
        for name, own in given.seconds.items()
    }
    return FakeBench(replace(given, seconds=times), spread=0.0)


def _measured(link: float = 370e9) -> tuple[Profile, GraphPair]:
    layer = _layer()
    graphs = graphs_of([layer])
    given = costs(graphs, link)
    plain = measure(FakeBench(given, spread=0.0), graphs, FINGERPRINT)
    benches = [lambda one=one: _bench(given, *one) for one in SHARES]
    return with_routings(plain, benches), layer


def test_what_varies_is_measured_by_every_routing_and_nothing_else_is() -> None:
    profile, _ = _measured()
    keys = {f"transformer/{name}" for name in VARYING}
    assert len(profile.routings) == 1 + len(SHARES)
    first, *others = profile.routings
    for seconds, (ahead, behind) in zip(others, SHARES, strict=True):
        assert seconds.keys() == first.keys() == keys
        for key, own in seconds.items():
            assert own == pytest.approx(first[key] * (behind if "grad" in key else ahead))
    plain = graphs_of([transformer()])
    same = measure(FakeBench(costs(plain, 370e9)), plain, FINGERPRINT)
    assert with_routings(same, [lambda: FakeBench(costs(plain, 370e9), broken="qkv.gemm")]) is same
    total = [sum(seconds.values()) for seconds in profile.routings]
    assert range_of(profile) == pytest.approx(
        (min(total) / fmean(total), max(total) / fmean(total))
    )
    assert range_of(same) is None and mean_of(same) == {}


def test_values_of_a_routing_are_let_go_before_the_next_ones_are_made() -> None:
    graphs = graphs_of([_layer()])
    given = costs(graphs, 370e9)
    alive: list[int] = []

    class Counted(FakeBench):
        def __del__(self) -> None:
            alive.append(-1)

    def made() -> Counted:
        alive.append(1)
        assert sum(alive) == 1
        return Counted(given)

    plain = measure(FakeBench(given), graphs, FINGERPRINT)
    seen: list[tuple[int, int, str]] = []
    with_routings(plain, [made] * 3, rounds=2, progress=lambda *now: seen.append(now))
    assert len(alive) == 6 and sum(alive) == 0
    assert [done for done, _, _ in seen] == list(range(3 * len(VARYING) + 1))
    assert {total for _, total, _ in seen} == {3 * len(VARYING)} and seen[-1][2] == "done"
    with pytest.raises(BenchError, match=r"transformer/fc1\.gemm failed: out of memory"):
        with_routings(plain, [lambda: FakeBench(given, broken="fc1.gemm")])


def test_costs_are_of_the_mean_and_of_each_routing() -> None:
    profile, _ = _measured()
    found = Costs.of(profile)
    for name in VARYING:
        key = f"transformer/{name}"
        assert found.seconds[key] == pytest.approx(fmean(one[key] for one in profile.routings))
    assert (
        found.seconds["transformer/qkv.gemm"]
        == Costs.of(replace(profile, routings=())).seconds["transformer/qkv.gemm"]
    )
    assert len(found.samples) == len(profile.routings)
    for sample, routing in zip(found.samples, profile.routings, strict=True):
        assert {key: sample.seconds[key] for key in routing} == pytest.approx(dict(routing))
    # What leaves processors was measured by one routing, and varies with the others alike.
    spare = replace(
        profile,
        spares={"transformer/fc1.gemm": "spare"},
        timings=(*profile.timings, replace(profile.timings[0], operator="spare", median=7.0)),
    )
    again = Costs.of(spare)
    ratios = [
        one["transformer/fc1.gemm"] / profile.routings[0]["transformer/fc1.gemm"]
        for one in profile.routings
    ]
    assert [one.seconds["spare"] for one in again.samples] == pytest.approx([7 * r for r in ratios])
    assert again.seconds["spare"] == pytest.approx(7 * fmean(ratios))


def test_an_order_costs_what_it_takes_by_all_routings() -> None:
    profile, layer = _measured(150e9)
    found = Costs.of(profile)
    problem = Problem(layer, layer, found)
    assert problem.averages
    for builder in BUILDERS.values():
        plan = builder(layer.forward, layer.backward)
        order = problem.order(plan)
        alone = []
        for own in (found, *found.others):
            other = Problem(layer, layer, replace(own, samples=()))
            alone.append(other.cost(order)[1])
        assert len({round(seconds, 9) for seconds in alone}) > 1
        assert problem.cost(order)[1] == pytest.approx(fmean(alone))


def test_what_is_found_is_better_over_all_routings_than_what_is_best_by_one() -> None:
    profile, layer = _measured(LINK)
    judge = Problem(layer, layer, Costs.of(profile))
    one, several = (
        judge.seconds_on_average(judge.order(solve_pair(layer, layer, own, budget=BUDGET).plan))
        for own in (Costs.of(replace(profile, routings=())), Costs.of(profile))
    )
    assert several < one * 0.99


def test_routings_are_kept_in_the_file_and_merged(tmp_path: Path) -> None:
    profile, _ = _measured()
    path = tmp_path / "profile.json"
    profile.save(path)
    assert Profile.load(path).routings == profile.routings
    assert all(
        g.by_name["fc1.wgrad"].varies for g in Profile.load(path).graphs if "fc1.wgrad" in g.by_name
    )
    slower = replace(
        profile, routings=tuple({k: 3 * s for k, s in r.items()} for r in profile.routings)
    )
    both = merged([profile, profile, slower])
    assert both.routings == profile.routings
    assert merged([profile, replace(profile, routings=())]).routings == ()
    fields = json.loads(path.read_text())
    fields["routings"][1].popitem()
    path.write_text(json.dumps(fields))
    with pytest.raises(FileError, match="routings are not of the operators"):
        Profile.load(path)
