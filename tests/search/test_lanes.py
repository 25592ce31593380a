"""Two communication lanes: how they slow each other down is measured, kept, played and heeded."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.engine import OperatorTimer, Subject, make_lanes
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.plan import BUILDERS, Collective, Graph, Lane, Operator, Strand
from lightning_dhellam.search.measure import (
    Bench,
    Profile,
    Samples,
    Target,
    measure,
    merged,
    spread,
    targets,
)
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.report.pictures import (
    hidden_shares,
    save_exposed,
    save_heat_map,
)
from lightning_dhellam.search.solve import Budget, Problem, bounds, solve, solve_pair
from tests.ranks import run_ranks
from tests.search.brute import every_plan
from tests.search.graphs import FINGERPRINT, FakeBench, graphs_of, two_lanes, two_lanes_costs
from tests.search.score import Score, play

NAMES = [o.name for g in graphs_of([two_lanes()]) for o in g.operators]


def _drawn(seed: int) -> dict[str, float]:
    draw = random.Random(seed)
    return {name: round(draw.uniform(0.3, 3), 1) for name in NAMES}


def _profile(disturbed: float = 3.0) -> tuple[Profile, Costs]:
    pair, given = two_lanes_costs(_drawn(1), disturbed)
    return measure(FakeBench(given, spread=0.02), graphs_of([pair]), FINGERPRINT), given


def _beside(profile: Profile) -> set[tuple[str, str]]:
    """What was measured together, without the name of the layer, of communication alone."""
    return {
        (row.operator.split("/")[1], row.partner.split("/")[1])
        for row in profile.timings
        if row.partner
        and Lane.COMPUTE not in (profile.lanes[row.operator], profile.lanes[row.partner])
    }


def test_communication_is_measured_beside_that_of_other_lanes() -> None:
    profile, _ = _profile()
    tp, cp = ("gather", "grad_scatter"), ("exchange", "grad_exchange")
    couples = {(a, b) for a in tp for b in cp}
    assert _beside(profile) == couples | {(b, a) for a, b in couples}
    # Neither is ahead of the other, also where compute can be ahead of communication.
    pair, given = two_lanes_costs(_drawn(1), 3.0)
    led = replace(given, behind={(a, b): (2.0, 1.0) for a in (*tp, *cp) for b in NAMES})
    ahead = measure(FakeBench(led, lead=0.01), graphs_of([pair]), FINGERPRINT)
    assert _beside(ahead) == _beside(profile)
    rows = [row for row in ahead.timings if row.lead]
    assert rows
    assert all(Lane.COMPUTE in (ahead.lanes[r.operator], ahead.lanes[r.partner]) for r in rows)  # type: ignore[index]


def test_what_the_host_waits_for_disturbs_nobody() -> None:
    pair, given = two_lanes_costs({}, 3.0)
    forward = pair.forward
    waiting = tuple(
        replace(o, lane=Lane.HOST) if o.name == "exchange" else o for o in forward.operators
    )
    graph = replace(forward, operators=waiting)
    given = replace(given, keys={**given.keys, graph.fingerprint: given.keys[forward.fingerprint]})
    profile = measure(FakeBench(given), [graph], FINGERPRINT)
    assert profile.lanes["lanes/exchange"] is Lane.HOST
    together = {row.operator for row in profile.timings if row.partner}
    assert together == {"lanes/norm", "lanes/gather", "lanes/gemm"}


def test_collectives_of_two_kinds_are_never_taken_for_one() -> None:
    """They move as many bytes, and want processors and links of their own."""
    forward = two_lanes().forward

    def found(second: Collective) -> int:
        kinds = {"gather": Collective.ALL_GATHER, "exchange": second}
        operators = tuple(
            replace(o, lane=Lane.CP, cost=1.0, collective=kinds[o.name])
            if o.name in kinds
            else replace(o, cost=1.0)
            for o in forward.operators
        )
        chosen, _ = targets([replace(forward, operators=operators, bytes_per_token={})])
        return sum(target.moves for target in chosen)

    assert found(Collective.ALL_GATHER) == 1
    assert found(Collective.ALL_TO_ALL) == 2


def test_how_lanes_disturb_each_other_comes_back_from_the_profile(tmp_path: Path) -> None:
    profile, given = _profile()
    profile.save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json", FINGERPRINT)
    assert loaded == profile
    for other in (loaded, merged([loaded, profile]), *spread(profile, 2)):
        found = Costs.of(other)
        for a, b in _beside(profile):
            assert found.slowdowns[f"lanes/{a}", f"lanes/{b}"] == pytest.approx(
                given.slowdowns[a, b], rel=0.1
            )


def test_a_profile_without_such_rows_knows_of_no_disturbance(tmp_path: Path) -> None:
    """As files of format 3 are."""
    profile, _ = _profile()
    profile.save(tmp_path / "profile.json")
    fields = json.loads((tmp_path / "profile.json").read_text())
    assert fields["format"] > 3
    fields["format"] = 3
    fields["timings"] = [
        row
        for row in fields["timings"]
        if row["partner"] is None
        or "compute" in (fields["lanes"][row["operator"]], fields["lanes"][row["partner"]])
    ]
    (tmp_path / "old.json").write_text(json.dumps(fields))
    old = Costs.of(Profile.load(tmp_path / "old.json"))
    new = Costs.of(profile)
    assert old.seconds == new.seconds
    assert {pair for pair in new.slowdowns if pair not in old.slowdowns} == {
        (f"lanes/{a}", f"lanes/{b}") for a, b in _beside(profile)
    }


def test_on_a_host_compute_has_no_say_in_it() -> None:
    profile, given = _profile()
    host = Costs.of(replace(profile, inline=True))
    assert host.slowdowns["lanes/gather", "lanes/exchange"] == pytest.approx(
        given.slowdowns["gather", "exchange"], rel=0.05
    )
    assert host.slowdowns["lanes/gather", "lanes/gemm"] == pytest.approx((1.0, 1.0), rel=0.05)


def _two(seconds: tuple[float, float, float], slow: float, with_compute: float = 1.0) -> Score:
    """Compute, tp and cp, one launch each; tp and cp slow each other down."""
    free = (1.0, 1.0)
    both, compute = (slow, slow), (with_compute, with_compute)
    table = [[free, free, free], [compute, free, both], [compute, both, free]]
    return Score([[0], [1], [2]], seconds, [0, 1, 2], [0] * 3, [[]] * 3, None, table, table)


def test_two_lanes_slow_each_other_down_while_both_work() -> None:
    # To 4 both at half speed: cp has done its 2. tp has 3 left, at full speed.
    assert play(_two((1.0, 5.0, 2.0), 2.0))[1] == pytest.approx([1, 4 + 3, 4])
    assert play(_two((1.0, 5.0, 2.0), 1.0))[1] == pytest.approx([1, 5, 2])


def test_what_several_disturb_is_slowed_by_the_product() -> None:
    # Compute at 1/2.25: 9 seconds. cp at 1/3 to 6, when compute has done 2.67 of its 4; then
    # tp alone beside it at 1/1.5, and compute too: 1.33 more take 2.
    ends = play(_two((4.0, 12.0, 2.0), 2.0, 1.5))[1]
    assert ends[2] == pytest.approx(2.0 * 2.0 * 1.5)
    compute = 6.0 + (4.0 - 6.0 / 2.25) * 1.5
    assert ends[0] == pytest.approx(compute)
    left = 12.0 - 6.0 / 3.0 - (compute - 6.0) / 1.5
    assert ends[1] == pytest.approx(compute + left)


@pytest.mark.parametrize("seed", [1, 3, 8])
def test_the_best_order_heeds_how_lanes_disturb_each_other(seed: int) -> None:
    """It is another one than without, and of all valid orders none is better."""
    pair, given = two_lanes_costs(_drawn(seed), 3.0)
    _, free = two_lanes_costs(_drawn(seed), 1.0)
    problem = Problem(pair, pair, given)
    knowing, blind = solve_pair(pair, pair, given), solve_pair(pair, pair, free)
    assert knowing.seconds < 0.8 * problem.seconds_of_plan(blind.plan)
    assert blind.seconds < knowing.seconds
    assert knowing.proven
    least = min(problem.seconds_of_plan(plan) for plan in every_plan(pair))
    assert knowing.seconds == pytest.approx(least, rel=1e-9)
    assert knowing.bound <= knowing.seconds * (1 + 1e-9)


def test_the_search_alone_finds_it_too() -> None:
    pair, given = two_lanes_costs(_drawn(2), 3.0)
    found = solve_pair(pair, pair, given, budget=Budget(exact_operators=0))
    assert found.seconds == pytest.approx(solve_pair(pair, pair, given).seconds, rel=1e-6)


def test_two_lanes_that_disturb_each_other_have_a_bound_of_their_own() -> None:
    pair, given = two_lanes_costs(_drawn(1), 3.0)
    found = bounds(Problem(pair, pair, given))
    # A second together does two thirds of a second's work: they had better take turns.
    lanes = {lane: found[lane] for lane in ("tp", "cp")}
    assert found["tp beside cp"] == pytest.approx(sum(lanes.values()))
    _, free = two_lanes_costs(_drawn(1), 1.0)
    assert bounds(Problem(pair, pair, free))["tp beside cp"] == pytest.approx(max(lanes.values()))


def test_a_step_is_predicted_with_it() -> None:
    pair, given = two_lanes_costs(_drawn(1), 3.0)
    _, free = two_lanes_costs(_drawn(1), 1.0)
    layers = [pair] * 3
    plans = solve(layers, free).builder()
    slowed, undisturbed = (
        simulate(layers, plans, costs, micro_batches=3) for costs in (given, free)
    )
    assert slowed.seconds > 1.2 * undisturbed.seconds
    assert set(slowed.busy) == {Lane.COMPUTE, Lane.TP, Lane.CP}
    knowing = simulate(layers, solve(layers, given).builder(), given, micro_batches=3)
    assert knowing.seconds < slowed.seconds
    # Barriers keep lanes apart only where an order says so.
    alone = [
        simulate(layers, BUILDERS["sequential"], costs, micro_batches=3).seconds
        for costs in (given, free)
    ]
    assert alone[0] == pytest.approx(alone[1])


def test_pictures_show_every_lane(tmp_path: Path) -> None:
    profile, _ = _profile(1.5)
    rows, columns, shares = hidden_shares(profile)
    assert set(columns) == set(profile.lanes)
    both = shares[rows.index("lanes/gather"), columns.index("lanes/exchange")]
    # Each at two thirds of its speed: a second together does four thirds of a second's work.
    assert both == pytest.approx(1 / 2, abs=0.05)
    same_lane = shares[rows.index("lanes/gather"), columns.index("lanes/grad_scatter")]
    assert np.isnan(same_lane)
    save_heat_map(tmp_path / "overlap.png", profile)
    others = [lane for lane in Lane if lane is not Lane.COMPUTE]
    save_exposed(tmp_path / "exposed.png", {"auto": dict.fromkeys(others, 0.1)}, {"auto": 1.0})
    assert all((tmp_path / name).stat().st_size for name in ("overlap.png", "exposed.png"))


class _TimerBench:
    """Times operators on this rank's processes."""

    lead = 0.0

    def __init__(self, values: list[Tensor]) -> None:
        self._values = values
        lanes = make_lanes(torch.device("cpu"))
        self._timer = OperatorTimer(lanes, dist.group.WORLD, repeats=3, warmup=1)

    def shrinks(self, target: Target) -> bool:
        return False

    def alone(self, target: Target) -> Samples:
        return Samples(tuple(self._timer.alone(Subject(target.operator, self._values))))

    def beside(self, communication: Target, other: Target) -> tuple[Samples, Samples]:
        subjects = (Subject(t.operator, self._values) for t in (communication, other))
        first, second = self._timer.beside(*subjects)
        return Samples(tuple(first)), Samples(tuple(second))

    def behind(
        self, communication: Target, compute: Target, lead: float
    ) -> tuple[Samples, Samples]:
        raise AssertionError("on a host nothing starts behind compute")


def _measured_on_a_rank(rank: int) -> Profile:
    groups = {lane: dist.new_group(list(range(2))) for lane in (Lane.TP, Lane.CP)}

    def communication(lane: Lane) -> Operator:
        def run(x: Tensor) -> Pending:
            y = x.clone()
            return Pending(y, dist.all_reduce(y, group=groups[lane], async_op=True))

        return Operator(
            f"sum.{lane}", lane, ("x",), (str(lane),), run, collective=Collective.ALL_REDUCE
        )

    gemm = Operator("gemm", Lane.COMPUTE, ("x",), ("y",), lambda x: x @ x, cost=1.0)
    operators = (gemm, communication(Lane.TP), communication(Lane.CP))
    graph = Graph("lanes", Strand.FORWARD, operators, ("x",), ("y",))
    bench: Bench = _TimerBench([torch.ones(256, 256)])
    profile = measure(bench, [graph], FINGERPRINT, inline=True, rounds=2)
    return replace(profile, graphs=())


def test_two_lanes_of_processes_are_timed_beside_each_other() -> None:
    one, other = run_ranks(2, _measured_on_a_rank)
    assert _beside(one) == {("sum.tp", "sum.cp"), ("sum.cp", "sum.tp")}
    assert one.timings == other.timings, "ranks agree on the slowest"
    factors = Costs.of(one).slowdowns["lanes/sum.tp", "lanes/sum.cp"]
    assert all(1.0 <= factor <= 20.0 for factor in factors)
