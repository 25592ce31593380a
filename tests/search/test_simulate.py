"""The simulator of a step: what holds for every plan, whatever the times are."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lightning_dhellam.plan import BUILDERS, Builder, GraphPair, Lane, Strand
from lightning_dhellam.search.model import Costs, Interval, Simulation, Timeline, simulate
from lightning_dhellam.search.solve import steady_state
from tests.plan.graphs import random_builder
from tests.search.graphs import TOKENS, costs, graphs_of, model, toy_costs, transformer

PLANS: dict[str, Builder] = {
    **BUILDERS,
    **{f"random-{seed}": random_builder(seed) for seed in range(4)},
}
LAYERS = model(3)
MICRO_BATCHES = 3


def given(slowdowns: bool = False) -> Costs:
    return costs(graphs_of(LAYERS), 200e9, slowdowns)


def step_of(name: str, slowdowns: bool = False) -> Simulation:
    return simulate(
        LAYERS, PLANS[name], given(slowdowns), micro_batches=MICRO_BATCHES, tokens=TOKENS
    )


def of_lane(step: Simulation, lane: Lane) -> list[Interval]:
    return sorted((i for i in step.intervals if i.lane is lane), key=lambda i: i.start)


def seconds_on(lane: Lane, layers: list[GraphPair], known: Costs) -> float:
    graphs = [graph for pair in layers for graph in (pair.forward, pair.backward)]
    return sum(known.alone(g, o.name) for g in graphs for o in g.operators if o.lane is lane)


@pytest.mark.parametrize("name", PLANS)
def test_every_operator_runs_once_for_every_micro_batch(name: str) -> None:
    found = {(i.strand, i.layer, i.operator, i.micro_batch) for i in step_of(name).intervals}
    expected = {
        (graph.direction, layer, operator.name, k)
        for layer, pair in enumerate(LAYERS)
        for graph in (pair.forward, pair.backward)
        for operator in graph.operators
        for k in range(MICRO_BATCHES)
    }
    assert found == expected
    assert len(step_of(name).intervals) == len(expected)


@pytest.mark.parametrize("name", PLANS)
def test_a_lane_does_one_thing_at_a_time_and_all_of_it(name: str) -> None:
    step = step_of(name)
    for lane in (Lane.COMPUTE, Lane.TP):
        for one, following in pairwise(of_lane(step, lane)):
            assert following.start >= one.end - 1e-12
        work = MICRO_BATCHES * seconds_on(lane, LAYERS, given())
        assert step.busy[lane] == pytest.approx(work)
        assert step.utilisation[lane] == pytest.approx(work / step.seconds)
    assert step.seconds == max(i.end for i in step.intervals)


@pytest.mark.parametrize("name", PLANS)
def test_nothing_starts_before_what_it_reads_is_there(name: str) -> None:
    ends = {(i.strand, i.layer, i.micro_batch, i.operator): i.end for i in step_of(name).intervals}
    for interval in step_of(name).intervals:
        pair = LAYERS[interval.layer]
        graph = pair.forward if interval.strand is Strand.FORWARD else pair.backward
        at = interval.strand, interval.layer, interval.micro_batch
        for before in graph.predecessors[interval.operator]:
            assert interval.start >= ends[*at, before] - 1e-12
        saved = set(graph.by_name[interval.operator].reads) & set(pair.saved)
        for slot in saved & pair.forward.written if graph is pair.backward else ():
            writer = pair.forward.producers[slot].name
            assert interval.start >= ends[Strand.FORWARD, *at[1:], writer] - 1e-12


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("slowdowns", [False, True])
def test_exposed_communication_is_the_time_that_compute_idles(name: str, slowdowns: bool) -> None:
    """With one communication lane and all work in one step, one of the two always runs."""
    step = step_of(name, slowdowns)
    idle = step.seconds - step.busy[Lane.COMPUTE]
    assert step.exposed[Lane.TP] == pytest.approx(idle)
    assert 0 <= step.waited[Lane.TP] <= step.exposed[Lane.TP] * (1 + 1e-9)
    assert step.exposed[Lane.TP] <= step.busy[Lane.TP] * (1 + 1e-9)


@pytest.mark.parametrize("name", PLANS)
def test_a_step_is_not_shorter_than_its_busiest_lane_nor_longer_than_all_work(name: str) -> None:
    step = step_of(name)
    lanes = [MICRO_BATCHES * seconds_on(lane, LAYERS, given()) for lane in (Lane.COMPUTE, Lane.TP)]
    assert max(lanes) * (1 - 1e-9) <= step.seconds <= sum(lanes) * (1 + 1e-9)


@pytest.mark.parametrize("name", PLANS)
def test_lanes_that_disturb_each_other_take_no_less(name: str) -> None:
    assert step_of(name, True).seconds >= step_of(name).seconds * (1 - 1e-9)


def test_overlap_pays_in_the_order_of_the_plans() -> None:
    """No overlap, overlap inside of one micro-batch, overlap of two strands."""
    steps = [step_of(name).seconds for name in ("sequential", "megatron", "interleaved")]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[1] > steps[2]


def test_more_micro_batches_take_longer_by_one_period() -> None:
    layers = [transformer()] * 6
    known = costs(graphs_of(layers), 200e9)
    times = [
        simulate(layers, BUILDERS["interleaved"], known, micro_batches=k).seconds for k in (3, 4, 5)
    ]
    one, other = (b - a for a, b in pairwise(times))
    assert one == pytest.approx(other)
    plan = BUILDERS["interleaved"](layers[0].forward, layers[0].backward)
    steady = steady_state(layers[0], layers[0], plan, known)
    assert one == pytest.approx(6 * steady.period, rel=0.02)


def test_peak_bytes_of_a_step_by_hand() -> None:
    """One micro-batch of a layer: what each operator writes is freed after its last reader."""
    toy, known = toy_costs({})
    sizes = {"normal": 1.0, "whole": 4.0, "partial": 3.0, "y": 1.0, "d_partial": 3.0}
    for graph in (toy.forward, toy.backward):
        object.__setattr__(graph, "bytes_per_token", sizes)
    step = simulate([toy], BUILDERS["sequential"], known, micro_batches=1, tokens=10)
    # While the GEMM runs: normal, which backward gathers again, whole, and partial.
    assert step.peak_bytes == 10 * (1 + 4 + 3)


def test_a_window_holds_what_overlaps_it() -> None:
    step = step_of("interleaved")
    first, last = 0.3 * step.seconds, 0.4 * step.seconds
    shown = step.window(first, last)
    assert 0 < len(shown) < len(step.intervals)
    for interval in step.intervals:
        assert (interval in shown) == (interval.end > first and interval.start < last)


def test_a_timeline_measures_overlap_of_any_intervals() -> None:
    def on(lane: Lane, start: float, end: float) -> Interval:
        return Interval(lane, Strand.FORWARD, "x", 0, 0, start, end)

    rows = [on(Lane.COMPUTE, 0, 2), on(Lane.COMPUTE, 3, 5), on(Lane.TP, 1, 4), on(Lane.PP, 4, 7)]
    timeline = Timeline(tuple(rows))
    assert timeline.busy() == {Lane.COMPUTE: 4, Lane.TP: 3, Lane.PP: 3}
    assert timeline.exposed() == {Lane.TP: 1, Lane.PP: 2}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_steady_state_repeats_itself(name: str) -> None:
    layer = transformer()
    known = costs(graphs_of([layer]), 200e9)
    plan = BUILDERS[name](layer.forward, layer.backward)
    one, two = (steady_state(layer, layer, plan, known, shown=shown) for shown in (1, 2))
    assert one.period == two.period
    assert one.exposed[Lane.TP] == pytest.approx(two.exposed[Lane.TP])
    assert min(i.start for i in two.intervals) >= 0
    assert max(i.end for i in two.intervals) <= 2 * two.period * (1 + 1e-9)
    compute = sum(i.end - i.start for i in two.intervals if i.lane is Lane.COMPUTE)
    assert compute == pytest.approx(2 * seconds_on(Lane.COMPUTE, [layer], known))
