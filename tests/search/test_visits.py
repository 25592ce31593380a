"""Passes are timed by the machine model of the search, and conserve memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_dhellam.pipeline.schedules import Work, fold, one_f_one_b
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair, Lane, Strand
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.pipeline import LayerCosts, Link, UniformCosts, VisitTable, cut, play
from tests.plan.real_graphs import lowered
from tests.search.graphs import TOKENS, costs, graphs_of, model, toy_costs, transformer

FORWARD, BACKWARD = (Work.parse("0F1"),), (Work.parse("0B0"),)
INPUT, WEIGHT = (Work.parse("0I0"),), (Work.parse("0W0"),)
BOTH = FORWARD + BACKWARD


def only(*names: str) -> dict[str, Builder]:
    return {name: BUILDERS[name] for name in names}


def layer_costs(
    layers: Sequence[GraphPair], given: Costs, builders: dict[str, Builder] | None = None
) -> LayerCosts:
    return LayerCosts([layers], given, tokens=TOKENS, builders=builders or BUILDERS)


def lane_seconds(layers: Sequence[GraphPair], given: Costs, strand: Strand, lane: Lane) -> float:
    graphs = [layer.forward if strand is Strand.FORWARD else layer.backward for layer in layers]
    return sum(given.alone(g, o.name) for g in graphs for o in g.operators if o.lane is lane)


def test_one_strand_forward_hides_no_communication() -> None:
    layers = [transformer()] * 3
    given = costs(graphs_of(layers), 200e9)
    cost = layer_costs(layers, given).of(FORWARD)
    compute = lane_seconds(layers, given, Strand.FORWARD, Lane.COMPUTE)
    communication = lane_seconds(layers, given, Strand.FORWARD, Lane.TP)
    assert cost.compute == pytest.approx(compute)
    assert cost.seconds == pytest.approx(compute + communication)
    assert cost.ready[Strand.FORWARD] == pytest.approx(cost.seconds)


def test_two_strands_hide_what_either_alone_exposes() -> None:
    layers = [transformer()] * 4
    given = costs(graphs_of(layers), 200e9)
    visits = layer_costs(layers, given)
    alone = visits.of(FORWARD).seconds + visits.of(BACKWARD).seconds
    compute = sum(lane_seconds(layers, given, strand, Lane.COMPUTE) for strand in Strand)
    assert compute < visits.of(BOTH).seconds < alone


def test_the_fastest_order_is_taken_for_every_pass() -> None:
    layers = [transformer()] * 4
    given = costs(graphs_of(layers), 110e9, True)
    visits = layer_costs(layers, given)
    for works in (FORWARD, BACKWARD, BOTH, INPUT, WEIGHT):
        each = {name: layer_costs(layers, given, only(name)).of(works).seconds for name in BUILDERS}
        assert visits.of(works).seconds == min(each.values())
        assert each[visits.order_of(works)] == min(each.values())


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("slowdowns", [False, True])
def test_a_step_of_one_stage_takes_what_the_search_predicts(name: str, slowdowns: bool) -> None:
    """Both play the same operators. Passes do not run into each other, so they lose a little."""
    layers = [transformer()] * 8
    given = costs(graphs_of(layers), 200e9, slowdowns)
    step = simulate(layers, BUILDERS[name], given, micro_batches=5).seconds
    chunks = cut(layers, given, 2)
    folded = LayerCosts(chunks, given, tokens=TOKENS, builders=only(name))
    found = play(fold(1, 5), folded).seconds
    assert step * (1 - 1e-9) <= found <= step * (1.001 if name == "sequential" else 1.04)


def test_a_step_of_one_stage_without_overlap_takes_exactly_as_long() -> None:
    toy, given = toy_costs({"gather": 2.0, "wgrad": 3.0})
    layers, orders = [toy] * 4, only("sequential")
    step = simulate(layers, BUILDERS["sequential"], given, micro_batches=1)
    visits = LayerCosts([layers[:2], layers[2:]], given, tokens=1, builders=orders)
    folded = play(fold(1, 1), visits)
    assert folded.seconds == pytest.approx(step.seconds, rel=1e-12)
    (stage,) = folded.stages
    assert stage.compute == pytest.approx(step.busy[Lane.COMPUTE])
    assert stage.exposed == pytest.approx(step.exposed[Lane.TP])


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_that_know_their_own_layers_know_together_what_a_step_takes(stages: int) -> None:
    layers = model(9)
    given = costs(graphs_of(layers), 200e9)
    schedule = fold(stages, 4)
    chunks = cut(layers, given, 2 * stages)
    whole = LayerCosts(chunks, given, tokens=TOKENS)

    def of_stage(stage: int) -> VisitTable:
        own = [c if schedule.placement.stage_of[i] == stage else () for i, c in enumerate(chunks)]
        return VisitTable.of_stage(LayerCosts(own, given, tokens=TOKENS), schedule, stage)

    table = VisitTable.joined(of_stage(stage) for stage in range(stages))
    link = Link(bandwidth=1e9)
    assert play(schedule, table, link) == play(schedule, whole, link)


def test_1f1b_on_one_stage_is_one_strand_after_the_other() -> None:
    layers = model(6)
    given = costs(graphs_of(layers), 200e9)
    visits = LayerCosts(cut(layers, given, 1), given, tokens=TOKENS)
    step = play(one_f_one_b(1, 3), visits)
    assert step.seconds == pytest.approx(
        3 * (visits.of(FORWARD).seconds + visits.of(BACKWARD).seconds)
    )
    assert step.stages[0].bubble == pytest.approx(0.0, abs=1e-12)


def test_halves_together_do_the_work_of_the_whole() -> None:
    layers = model(2)
    given = costs(graphs_of(layers), 200e9)
    visits = layer_costs(layers, given)
    parts = visits.of(INPUT), visits.of(WEIGHT)
    assert sum(part.compute for part in parts) == pytest.approx(visits.of(BACKWARD).compute)
    # The second half hides nothing under itself that the whole could not hide as well.
    assert sum(part.seconds for part in parts) >= visits.of(BACKWARD).seconds * (1 - 1e-9)
    assert parts[0].ready[Strand.BACKWARD] <= parts[0].seconds


def test_memory_is_what_lowering_says_is_saved() -> None:
    layers = list(lowered(2).layers)
    given = Costs.nominal(graphs_of(layers), TOKENS)
    visits = layer_costs(layers, given)
    saved = sum(layer.saved_bytes(TOKENS) for layer in layers)
    assert visits.sized
    assert visits.of(FORWARD).change == visits.of(FORWARD).rise == pytest.approx(saved)
    assert visits.of(BACKWARD).change == pytest.approx(-saved)
    assert visits.of(BOTH).change == pytest.approx(0.0, abs=1.0)
    halves = visits.of(INPUT).change + visits.of(WEIGHT).change
    assert halves == pytest.approx(-saved)
    assert visits.of(WEIGHT).change < 0


def test_two_strands_share_one_activation_budget() -> None:
    """One frees a layer when the other fills one: at most one layer more than before."""
    layers = [list(lowered(2).layers)[1]] * 4
    visits = layer_costs(layers, Costs.nominal(graphs_of(layers), TOKENS))
    assert visits.of(BOTH).rise == pytest.approx(layers[0].saved_bytes(TOKENS))


def test_a_message_is_a_hidden_state() -> None:
    layer = list(lowered(2).layers)[1]
    visits = layer_costs([layer], Costs.nominal(graphs_of([layer]), TOKENS))
    size = layer.forward.bytes_per_token["y"] * TOKENS
    assert visits.bytes_sent(FORWARD[0]) == visits.bytes_sent(BACKWARD[0]) == size > 0


def test_layers_of_unknown_size_are_counted() -> None:
    toy, given = toy_costs({})
    visits = layer_costs([toy] * 3, given)
    assert not visits.sized
    assert (visits.of(FORWARD).change, visits.of(BACKWARD).change) == (3, -3)
    assert (visits.of(INPUT).change, visits.of(WEIGHT).change) == (0, -3)
    assert visits.of(BOTH).rise == 1
    assert visits.bytes_sent(FORWARD[0]) == 0


def test_strands_of_unequal_length_meet_where_the_ends_of_the_model_are() -> None:
    """Going down they begin together, and going up they end together."""
    toy, given = toy_costs({})
    visits = LayerCosts([[toy] * 3, [toy]], given, tokens=1)
    down, up = ((Work.parse(f"{c}F1"), Work.parse(f"{1 - c}B0")) for c in (0, 1))
    # Forward fills three layers, and backward frees one with the first of them.
    assert (visits.of(down).rise, visits.of(down).change) == (2, 2)
    # Backward frees two layers before forward fills its only one.
    assert (visits.of(up).rise, visits.of(up).change) == (0, -2)
    longer = LayerCosts([[toy], [toy] * 3], given, tokens=1)
    # Backward frees its only layer with the last that forward fills.
    assert (longer.of(up).rise, longer.of(up).change) == (3, 2)


def test_uniform_costs() -> None:
    given = UniformCosts(1.0, 2.0, 4.0, both=6.5)
    assert [given.of(w).seconds for w in (FORWARD, INPUT, WEIGHT, BACKWARD, BOTH)] == [
        1,
        2,
        4,
        6,
        6.5,
    ]
    assert UniformCosts(1.0, 2.0, 4.0).of(BOTH).seconds == 7
