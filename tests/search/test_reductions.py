"""Gradients are reduced beside the last backward of a step: timelines worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_dhellam.plan import BUILDERS, Builder, Graph, GraphPair, Issue, Lane, Plan, Strand
from lightning_dhellam.search.model import Costs, Reductions, Simulation, simulate
from tests.plan.graphs import graph

REDUCE = "gradients/reduce"


def _layer() -> GraphPair:
    """Backward is a gradient of the input, which goes round, and one of weights."""
    forward = graph("forward", "gemm compute: x -> y", "x", "y", "layer")
    backward = graph(
        "backward",
        "dgrad compute: dy x -> d_n\nscatter tp: d_n -> dx\nwgrad compute: dy x ->",
        "dy",
        "dx",
        "layer",
    )
    operators = tuple(
        replace(o, accumulates=("weight",)) if o.name == "wgrad" else o for o in backward.operators
    )
    return GraphPair(forward, replace(backward, operators=operators))


LAYER = _layer()
NAMES = ("gemm", "dgrad", "scatter", "wgrad")


def _costs(disturbed: float = 1.0, scatter: float = 0.5) -> Costs:
    """Every operator takes a second but the scatter, and the reduction of a bucket takes three."""
    keys = {
        item.fingerprint: {o.name: o.name for o in item.operators}
        for item in (LAYER.forward, LAYER.backward)
    }
    slow = {
        ("scatter", REDUCE): (disturbed, disturbed),
        (REDUCE, "scatter"): (disturbed, disturbed),
    }
    seconds = {**dict.fromkeys(NAMES, 1.0), "scatter": scatter, REDUCE: 3.0}
    return Costs(keys, seconds, slow)


def _step(
    costs: Costs,
    reductions: Reductions | None,
    micro_batches: int = 1,
    builder: Builder = BUILDERS["interleaved"],
) -> Simulation:
    return simulate([LAYER] * 3, builder, costs, micro_batches=micro_batches, reductions=reductions)


def _intervals(step: Simulation, lane: Lane) -> list[tuple[float, float]]:
    return [
        (pytest.approx(one.start), pytest.approx(one.end))
        for one in step.intervals
        if one.lane is lane
    ]


def test_buckets_fill_from_the_last_layer_to_the_first() -> None:
    assert Reductions(REDUCE, 2.0, (1.0, 1.0, 1.0)).due() == {1: [1.0], 0: [0.5]}
    assert Reductions(REDUCE, 2.0, (0.0, 5.0, 1.0)).due() == {1: [1.0] * 3}
    assert Reductions(REDUCE, 8.0, (1.0, 0.0, 1.0)).due() == {0: [0.25]}
    assert Reductions(REDUCE, 8.0, (0.0, 0.0)).due() == {}


def test_a_full_bucket_is_reduced_beside_the_layers_before() -> None:
    step = _step(_costs(), Reductions(REDUCE, 2.0, (1.0, 1.0, 1.0)))
    # Forward to 3, backward of layers 2 and 1 to 7, of layer 0 to 9. A bucket is full at 7.
    assert step.seconds == pytest.approx(11.5)
    assert _intervals(step, Lane.DP) == [(7, 10), (10, 11.5)]
    assert step.busy[Lane.DP] == pytest.approx(4.5)
    assert step.exposed[Lane.DP] == pytest.approx(2.5)
    assert _step(_costs(), None).seconds == pytest.approx(9.0)


def test_only_the_last_micro_batch_completes_gradients() -> None:
    alone = _step(_costs(), None, micro_batches=3)
    step = _step(_costs(), Reductions(REDUCE, 2.0, (1.0, 1.0, 1.0)), micro_batches=3)
    assert step.seconds == pytest.approx(alone.seconds + 2.5)
    assert len(_intervals(step, Lane.DP)) == 2


def test_it_disturbs_other_communication() -> None:
    """The scatter of layer 0 runs from 8 to 10, beside the reduction at half its speed."""
    some = Reductions(REDUCE, 2.0, (1.0, 1.0, 1.0))
    undisturbed, step = (_step(_costs(factor, 2.0), some) for factor in (1.0, 2.0))
    (*_, last), (*_, slowed) = (_intervals(one, Lane.TP) for one in (undisturbed, step))
    assert slowed != last
    assert step.seconds > undisturbed.seconds
    assert step.busy[Lane.DP] > undisturbed.busy[Lane.DP]
    # What is left of a bucket disturbs as a whole one does.
    rest = Reductions(REDUCE, 30.0, (1.0, 1.0, 1.0))
    assert _step(_costs(2.0), rest).busy[Lane.DP] == pytest.approx(0.3)


def test_what_is_left_for_the_next_layer_is_waited_for() -> None:
    def late(forward: Graph | None, backward: Graph | None) -> Plan:
        plan = BUILDERS["sequential"](forward, backward)
        if backward is None or forward is not None:
            return plan
        rows = [row for row in plan.issues if row.operator != "wgrad"]
        left = Issue(Strand.BACKWARD, Lane.COMPUTE, "wgrad", lag=1)
        return replace(plan, rows=(left, *rows))

    step = _step(_costs(), Reductions(REDUCE, 2.0, (1.0, 1.0, 1.0)), builder=late)
    ends = {one.layer: one.end for one in step.intervals if one.operator == "wgrad"}
    first, second = (one for one in step.intervals if one.lane is Lane.DP)
    assert first.start >= ends[1] and second.start >= ends[0]


def test_layers_that_are_not_measured_are_named() -> None:
    some = Reductions(REDUCE, 2.0, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="operator 'gemm' of graph 'layer forward'"):
        _step(replace(_costs(), keys={}), some)
