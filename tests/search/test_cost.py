"""The machine model against timelines worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from lightning_dhellam.plan import BUILDERS, Barrier, GraphPair, Issue, Lane, Plan, Strand
from lightning_dhellam.search.measure import measure
from lightning_dhellam.search.model import Costs, Place, Stop, Walk, arrays, simulate, slowdown_of
from lightning_dhellam.search.solve import Problem, solve_pair, steady_state
from tests.plan.graphs import graph
from tests.search.graphs import FINGERPRINT, FakeBench, costs, toy_costs, transformer
from tests.search.score import Score, play

FREE = [[(1.0, 1.0)] * 2] * 2


def _pair(slow: tuple[float, float], compute: float, communication: float) -> Score:
    """One compute launch beside one communication launch."""
    table = [[(1.0, 1.0)] * 2, [slow, (1.0, 1.0)]]
    return Score([[0], [1]], [compute, communication], [0, 1], [0, 0], [[], []], None, table, table)


def test_lanes_run_side_by_side_without_slowdown() -> None:
    starts, ends = play(_pair((1.0, 1.0), 3.0, 2.0))
    assert (starts, ends) == ([0, 0], [3, 2])


def test_both_slow_down_while_they_overlap_and_only_then() -> None:
    # Communication at half speed ends at 4, when compute at 1/1.25 has done 3.2 of its 5.
    _, ends = play(_pair((2.0, 1.25), 5.0, 2.0))
    assert ends == pytest.approx([4 + 1.8, 4])


def test_changing_overlaps() -> None:
    """Two compute launches under one communication launch that each slows in its own way."""
    table = [[(1.0, 1.0)] * 3, [(1.0, 1.0)] * 3, [(2.0, 1.0), (4.0, 1.5), (1.0, 1.0)]]
    score = Score([[0, 1], [2]], [2, 2, 2], [0, 1, 2], [0] * 3, [[]] * 3, None, table, table)
    # To 2: half of the communication is done. To 5: three quarters of a second of it.
    starts, ends = play(score)
    assert starts == pytest.approx([0, 2, 0])
    assert ends == pytest.approx([2, 5, 5.25])


def test_a_launch_waits_for_its_slots_its_lane_and_the_host() -> None:
    score = Score([[0, 2], [1]], [1, 1, 1], [0, 0, 0], [0, 1, 1], [[1], [2], []], None, FREE, FREE)
    assert play(score) == ([0, 1, 2], [1, 2, 3])
    score.issued = [0.5, 4, 4.5]
    assert play(score) == ([0.5, 4, 5], [1.5, 5, 6])


def test_what_begins_behind_has_slowdowns_of_its_own() -> None:
    """Communication that is issued at 1 gets nothing until compute is over."""
    together = [[(1.0, 1.0)] * 2, [(1.0, 1.5), (1.0, 1.0)]]
    behind = [[(1.0, 1.0)] * 2, [(20.0, 1.0), (1.0, 1.0)]]
    score = Score([[0], [1]], [4, 2], [0, 1], [0, 0], [[], []], [0, 0], together, behind)
    assert play(score)[1] == pytest.approx([4 + 2 / 3, 2])
    score.issued = [0, 1]
    assert play(score)[1] == pytest.approx([4, 4 + 2 - 3 / 20])
    # What began before compute keeps its pace, although more compute follows.
    score = Score([[0, 2], [1]], [1, 4, 4], [0, 1, 0], [0] * 3, [[]] * 3, None, together, behind)
    assert play(score)[1] == pytest.approx([1.5, 4, 4 + 4 - 2.5 / 1.5])


def test_what_another_lane_releases_comes_a_moment_too_late() -> None:
    """Launch 0 computes what 2 sends, while 1 is next on the compute lane."""
    together = [[(1.0, 1.0)] * 2, [(1.0, 1.5), (1.0, 1.0)]]
    behind = [[(1.0, 1.0)] * 2, [(20.0, 1.0), (1.0, 1.0)]]

    def ends(holds: dict[int, list[int]] | None) -> list[float]:
        waits = [0, 1 if holds else 0, 1]
        score = Score(
            [[0, 1], [2]], [1, 4, 2], [0, 0, 1], waits, [[2], [], []], None, together, behind, holds
        )
        return play(score)[1]

    first = pytest.approx([1, 1 + 4 + 2 - 2 / 1.5, 3])
    assert ends(None) == first
    assert ends({}) == pytest.approx([1, 5, 5 + 2 - 4 / 20])
    assert ends({2: [1]}) == first


def test_communication_that_held_nobody_still_goes_first_on_its_own_lane() -> None:
    """1 and 2 follow each other on their lane; what 1 brought lets compute begin beside 2."""
    together = [[(1.0, 1.0)] * 2, [(1.0, 1.5), (1.0, 1.0)]]
    behind = [[(1.0, 1.0)] * 2, [(20.0, 1.0), (1.0, 1.0)]]
    score = Score(
        [[0], [1, 2]], [4, 1, 2], [0, 1, 1], [1, 0, 0], [[], [0], []], None, together, behind, {}
    )
    assert play(score)[1] == pytest.approx([1 + 4 + 2 - 2 / 1.5, 1, 3])


def test_launches_that_wait_for_each_other_never_start() -> None:
    score = Score([[1, 0]], [1, 1], [0, 0], [0, 1], [[1], []], None, FREE, FREE)
    assert play(score)[1] == [inf, inf]


def test_without_a_place_for_machine_code_it_is_compiled_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def njit(function: Any = None, cache: bool = False) -> Any:
        def refuse(function: Any) -> Any:
            raise RuntimeError("cannot cache function: no locator available")

        return refuse if cache else function

    monkeypatch.setattr(arrays, "njit", njit)
    assert arrays.compiled(len) is len


def test_slowdowns_are_found_from_times_started_together() -> None:
    for slow in ((2.0, 1.25), (1.0, 1.0), (1.1, 3.0)):
        for seconds in ((5.0, 2.0), (2.0, 5.0)):
            compute, communication = seconds
            _, ends = play(_pair(slow, compute, communication))
            found = slowdown_of([((communication, compute), (ends[1], ends[0]))])
            if found != pytest.approx(slow):
                # The longer one alone can hide how much it slowed the shorter one down.
                raise AssertionError(f"{slow} at {seconds}: found {found}")


def test_noise_never_makes_lanes_faster_together() -> None:
    assert slowdown_of([((1.0, 2.0), (0.9, 1.9))]) == (1.0, 1.0)


def test_on_a_host_a_communication_slows_all_compute_alike() -> None:
    """What it takes of the processor when it begins is not what it takes for as long as it runs."""
    layer = transformer()
    graphs = [layer.forward, layer.backward]
    measured = measure(FakeBench(costs(graphs, 370e9, slowdowns=True)), graphs, FINGERPRINT)
    device, host = Costs.of(measured), Costs.of(replace(measured, inline=True))
    assert device.slowdowns.keys() == host.slowdowns.keys()
    alone, rows = device.seconds, {(r.operator, r.partner): r.median for r in measured.timings}
    for communication in {pair[0] for pair in host.slowdowns}:
        own = [pair for pair in host.slowdowns if pair[0] == communication]
        ((first, second),) = {host.slowdowns[pair] for pair in own}
        outlasted = [(a, b) for a, b in own if rows[a, b] <= rows[b, a]]
        assert 0 < len(outlasted) < len(own)
        shared = sum(rows[pair] for pair in outlasted)
        work = sum(alone[b] - rows[b, a] + rows[a, b] for a, b in outlasted)
        assert first == pytest.approx(shared / (len(outlasted) * alone[communication]))
        assert second == pytest.approx(max(1.0, shared / work))


def test_a_step_by_hand() -> None:
    """Two visits of one layer: forward alone, then backward alone."""
    toy, costs = toy_costs({"gather": 2.0, "wgrad": 3.0, "regather": 0.5})
    step = simulate([toy], BUILDERS["sequential"], costs, micro_batches=1)
    # norm 0-1 gather 1-3 gemm 3-4 scatter 4-5, grad_gather 5-6 dgrad 6-7 grad_scatter 7-8
    # regather 8-8.5 wgrad 8.5-11.5 norm.grad 11.5-12.5
    assert step.seconds == pytest.approx(12.5)
    assert step.busy == pytest.approx({Lane.COMPUTE: 7.0, Lane.TP: 5.5})
    assert step.exposed == pytest.approx({Lane.TP: 5.5})
    assert step.utilisation[Lane.COMPUTE] == pytest.approx(7 / 12.5)


def test_compute_waits_are_blamed_on_the_lane() -> None:
    toy, costs = toy_costs({"scatter": 4.0})
    step = simulate([toy], BUILDERS["interleaved"], costs, micro_batches=1)
    assert 0 < step.waited[Lane.TP] <= step.exposed[Lane.TP]


def test_a_barrier_costs_what_it_hides() -> None:
    toy, costs = toy_costs({})
    plan = BUILDERS["interleaved"](toy.forward, toy.backward)
    strict = Plan(
        "strict", "toy", "toy", tuple(row for issue in plan.rows for row in (issue, Barrier()))
    )
    assert steady_state(toy, toy, strict, costs).period == pytest.approx(10.0)
    assert steady_state(toy, toy, plan, costs).period < 10.0


def test_what_lags_runs_in_the_next_pair_of_the_same_plan() -> None:
    toy, costs = toy_costs({})
    names = [issue.operator for issue in BUILDERS["sequential"](None, toy.backward).issues]
    names.remove("wgrad")
    rows = [Issue(Strand.BACKWARD, Lane.COMPUTE, "wgrad", lag=1)]
    rows += [Issue(Strand.BACKWARD, toy.backward.by_name[n].lane, n) for n in names]
    plan = Plan("late", None, "toy", tuple(rows))
    other = BUILDERS["sequential"](None, toy.backward)
    stops = [Stop(None, Place(0, 2 - number, toy)) for number in range(3)]
    walk = Walk(stops, costs)
    order = [walk.launches[x] for x in walk.order([plan, plan, other]) if x is not None]
    where = [(at, x.stop) for at, x in enumerate(order) if x.operator.name == "wgrad"]
    # The first is issued with the second pair, the second before the third, which differs.
    assert where == [(5, 0), (11, 1), (16, 2)]


def test_the_host_limits_what_is_issued() -> None:
    toy, costs = toy_costs({}, launch=2.0)
    plan = BUILDERS["interleaved"](toy.forward, toy.backward)
    assert steady_state(toy, toy, plan, costs).period == pytest.approx(20.0)


def test_inline_compute_holds_up_the_host() -> None:
    """What is issued behind compute starts after it, although its lane is free."""
    toy, costs = toy_costs({"wgrad": 5.0})
    graph = toy.backward
    order = ["grad_gather", "regather", "wgrad", "dgrad", "grad_scatter", "norm.grad"]
    rows = [Issue(Strand.BACKWARD, graph.by_name[name].lane, name) for name in order]
    early = [rows[0], rows[1], rows[3], rows[4], rows[2], rows[5]]
    times = {}
    for inline in (False, True):
        for name, chosen in (("late", rows), ("early", early)):
            plan = Plan(name, None, "toy", tuple(chosen))
            stops = [Stop(None, Place(0, 0, toy))]
            walk = Walk(stops, replace(costs, inline=inline))
            times[inline, name] = max(walk.play(walk.order([plan]))[1])
    # gathers 0-2, wgrad 2-7, dgrad 7-8, scatter 8-9, norm 9-10
    assert times[True, "late"] == pytest.approx(10)
    # gathers 0-2 (dgrad is issued when the second has been), dgrad 1-2, scatter and wgrad 2-7
    assert times[True, "early"] == pytest.approx(8)
    assert times[False, "early"] <= times[True, "early"]


def test_an_unknown_operator_is_named() -> None:
    toy, costs = toy_costs({})
    with pytest.raises(ValueError, match=r"operator 'norm' of graph 'toy forward'.*measure"):
        Costs({}, costs.seconds).key(toy.forward, "norm")


def test_a_host_that_waits_issues_nothing_until_it_has_its_value() -> None:
    """Compute 0 of 1 s, communication 1 of 2 s after it, then the host looks (2).

    What was issued before that (3, of 1 s) runs meanwhile; what comes later (4) does not, though
    its lane is free from 2 to 3.
    """
    score = Score(
        [[0, 3, 4], [1], [2]],
        [1, 2, 0, 1, 1],
        [0] * 5,
        [0, 1, 1, 0, 0],
        [[1], [2], [], [], []],
        None,
        FREE,
        FREE,
        looking=[0, 1, 3, 2, 4],
        looked_at=[2],
    )
    starts, ends = play(score)
    assert ends == [1, 3, 3, 2, 4]
    # The wait begins when the host comes there, long before there is something to see.
    assert starts == [0, 1, 0, 1, 3]
    # With nothing behind it the device idles for two seconds.
    score.looking = [0, 1, 2, 3, 4]
    assert play(score)[1] == [1, 3, 3, 4, 5]
    # Each launch takes the host its time, again after the wait.
    score.pace = 0.5
    assert play(score)[1] == [1.5, 3.5, 3.5, 5, 6]


LOOKING = """
count compute: x -> count
gather ep: count -> counts
look host: counts -> sizes
expert compute: sizes x -> y
other compute: x -> z
last compute: y z -> out
"""


def test_a_search_gives_the_device_work_before_the_host_waits() -> None:
    drawn = graph("forward", LOOKING, "x", "out", name="mixture")
    looking = tuple(replace(o, waits=o.name == "look") for o in drawn.operators)
    ahead = replace(drawn, operators=looking)
    behind = graph("backward", "grad compute: dout -> dx", "dout", "dx", name="mixture")
    pair = GraphPair(ahead, behind)
    seconds = {"count": 1.0, "gather": 4.0, "look": 0.0, "expert": 3.0, "other": 2.0, "last": 1.0}
    seconds["grad"] = 4.0
    keys = {g.fingerprint: {o.name: o.name for o in g.operators} for g in (ahead, behind)}
    lone = Costs(keys, seconds, launch=0.01)
    problem = Problem(pair, pair, lone)
    assert not problem.exchangeable and problem.costs.launch == 0.01
    early = Plan(
        "early",
        "mixture",
        "mixture",
        tuple(
            Issue(Strand.BACKWARD if name == "grad" else Strand.FORWARD, lane, name)
            for lane, name in (
                (Lane.COMPUTE, "count"),
                (Lane.EP, "gather"),
                (Lane.HOST, "look"),
                (Lane.COMPUTE, "other"),
                (Lane.COMPUTE, "grad"),
                (Lane.COMPUTE, "expert"),
                (Lane.COMPUTE, "last"),
            )
        ),
    )
    # 11 seconds of compute, and 4 in which nothing but the gather runs.
    assert problem.seconds_of_plan(early) == pytest.approx(15, abs=0.1)
    found = solve_pair(pair, pair, lone)
    assert found.seconds == pytest.approx(11, abs=0.1)
    names = [row.operator for row in found.plan.issues]
    assert names.index("grad") < names.index("look")
