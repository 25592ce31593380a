"""From a profile's graphs to chunks of layers, and the halves of a backward."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dhellam.plan import GraphPair
from lightning_dhellam.search.measure import Profile, measure
from lightning_dhellam.search.model.halves import halves, with_halves
from lightning_dhellam.search.pipeline import cut, cut_folded, layers_of
from lightning_dhellam.search.pipeline.layers import balanced, seconds_of
from tests.plan.graphs import graph
from tests.plan.real_graphs import lowered
from tests.search.graphs import (
    FINGERPRINT,
    FakeBench,
    costs,
    graphs_of,
    model,
    pair,
    toy_costs,
    transformer,
)


def profile_of(layers: list[GraphPair]) -> Profile:
    graphs = graphs_of(layers)
    return measure(FakeBench(costs(graphs, 370e9)), graphs, FINGERPRINT)


def test_a_profile_describes_a_model_of_any_depth() -> None:
    found = layers_of(profile_of(model(1)), 5)
    assert found == model(5)
    names = ["embedding", *["transformer"] * 5, "head"]
    assert [layer.name for layer in found] == names
    # The order in which graphs were profiled does not matter.
    assert layers_of(profile_of([*model(1)[1:], model(1)[0]]), 5) == found
    assert layers_of(profile_of([transformer()]), 3) == [transformer()] * 3
    # A reduction of gradients, which is in no layer, may be in a profile too.
    reduction = graph("backward", "reduce dp: gradients ->", "gradients", "", "gradients")
    profile = profile_of(model(1))
    assert layers_of(replace(profile, graphs=(*profile.graphs, reduction)), 5) == found


def test_a_model_that_a_profile_does_not_determine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one kind of repeated layer.*holds none"):
        layers_of(profile_of([model(1)[0], model(1)[2]]), 4)
    other = pair(
        "other", ("norm compute: x -> y", "norm.grad compute: dy -> dx"), ("x", "y", "dy", "dx")
    )
    with pytest.raises(ValueError, match="holds 'transformer', 'other'"):
        layers_of(profile_of([transformer(), other]), 4)
    with pytest.raises(ValueError, match="--layers 0"):
        layers_of(profile_of(model(1)), 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_the_heaviest_part_is_as_light_as_it_can_be(
    weights: list[int], data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(weights)))
    counts = balanced(weights, parts)
    assert len(counts) == parts and sum(counts) == len(weights) and min(counts) > 0

    def sums(ends: tuple[int, ...]) -> list[int]:
        return [sum(weights[a:b]) for a, b in pairwise((0, *ends, len(weights)))]

    every = [sums(ends) for ends in combinations(range(1, len(weights)), parts - 1)]
    best = min((max(row), sum(x * x for x in row)) for row in every)
    found = sums(tuple(sum(counts[: i + 1]) for i in range(parts - 1)))
    assert (max(found), sum(x * x for x in found)) == best


def test_chunks_hold_every_layer_once_and_in_order() -> None:
    layers = model(13)
    given_costs = costs(graphs_of(layers), 200e9)
    for chunks in (1, 2, 6, 15):
        found = cut(layers, given_costs, chunks)
        assert len(found) == chunks
        assert [layer for chunk in found for layer in chunk] == layers
    with pytest.raises(ValueError, match="16 chunks need as many layers, and there are 15"):
        cut(layers, given_costs, 16)


def test_a_heavy_head_leaves_room_for_itself() -> None:
    layers = model(16)
    given_costs = costs(graphs_of(layers), 200e9)
    head, layer = seconds_of(layers[-1], given_costs), seconds_of(layers[1], given_costs)
    counts = balanced([*[layer] * 16, 3 * layer + head], 4)
    assert counts[-1] < counts[0] and sum(counts) == 17


def test_a_fold_is_cut_by_the_time_of_its_stages() -> None:
    """As the trainer does: stage 0 has fewer layers, as it has both ends of the model."""
    layers = model(31)
    known = costs(graphs_of(layers), 200e9)
    for stages in (1, 2, 4):
        found = cut_folded(layers, known, stages)
        assert len(found) == 2 * stages
        assert [layer for chunk in found for layer in chunk] == layers
        seconds = [sum(seconds_of(layer, known) for layer in chunk) for chunk in found]
        of_stages = [seconds[s] + seconds[-1 - s] for s in range(stages)]
        assert max(of_stages) - min(of_stages) <= 1.5 * seconds_of(layers[1], known)
    counts = [len(chunk) for chunk in cut_folded(layers, known, 4)]
    assert counts[0] + counts[-1] - 2 < counts[1] + counts[-2]
    bare = [transformer()] * 8
    assert [len(c) for c in cut_folded(bare, costs(graphs_of(bare), 200e9), 2)] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="16 chunks need as many layers, and there are 15"):
        cut_folded([transformer()] * 15, known, 8)


@pytest.mark.parametrize("which", ["toy", "70b", "real"])
def test_the_halves_of_a_backward_are_all_of_it(which: str) -> None:
    layers = {
        "toy": [toy_costs({})[0]],
        "70b": model(1),
        "real": list(lowered(2).layers),
    }[which]
    for layer in layers:
        early, late = (half.backward for half in halves(layer))
        names = [operator.name for operator in layer.backward.operators]
        assert sorted([o.name for o in early.operators + late.operators]) == sorted(names)
        assert all(o.writes for o in early.operators)
        assert early.outputs == layer.backward.outputs and late.outputs == ()
        # What the second half reads of backward's slots, the first has left for it.
        assert set(late.inputs) <= early.written | set(layer.backward.inputs)
        assert set(early.foreign) | set(late.foreign) == set(layer.saved)


def test_the_halves_of_the_toy_layer() -> None:
    early, late = halves(toy_costs({})[0])
    assert [o.name for o in early.backward.operators] == [
        "grad_gather",
        "dgrad",
        "grad_scatter",
        "norm.grad",
    ]
    assert [o.name for o in late.backward.operators] == ["regather", "wgrad"]
    assert late.backward.inputs == ("d_partial",)


def test_halves_cost_what_their_operators_cost() -> None:
    toy, given_costs = toy_costs({"wgrad": 3.0, "dgrad": 2.0})
    known = with_halves(given_costs, [toy])
    for half in halves(toy):
        for operator in half.backward.operators:
            expected = given_costs.alone(toy.backward, operator.name)
            assert known.alone(half.backward, operator.name) == expected
