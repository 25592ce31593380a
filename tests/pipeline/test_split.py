"""Layers are shared out by cost, and a split that cannot be is refused in the user's words."""

from __future__ import annotations

import pytest

from lightning_dhellam.models import pipeline_split, preset
from lightning_dhellam.models.counts import costs_in_layers
from lightning_dhellam.pipeline.schedules import Placement
from lightning_dhellam.pipeline.split import balanced, check_split, chunks
from lightning_dhellam.pipeline.stage import Leg, Stage

folded, straight = Placement.folded, Placement.straight


def _stages(split: tuple[int, ...]) -> list[int]:
    """Layers of each stage."""
    return [early + late for early, late in zip(split, reversed(split), strict=True)][
        : len(split) // 2
    ]


def test_equal_layers_are_shared_out_evenly() -> None:
    assert balanced(8, folded(4)) == (1, 1, 1, 1, 1, 1, 1, 1)
    assert balanced(9, folded(2)) == (2, 2, 3, 2)
    assert balanced(4, folded(1)) == (2, 2)
    assert balanced(9, straight(4)) == (2, 2, 2, 3)
    assert balanced(9, straight(2, 2)) == (2, 2, 2, 3)
    assert balanced(3, straight(1)) == (3,)


def test_a_costly_head_leaves_its_stage_fewer_layers() -> None:
    assert _stages(balanced(32, folded(4), head=2.4)) == [6, 8, 9, 9]
    assert balanced(16, folded(4), head=5.0) == (0, 2, 2, 3, 3, 3, 3, 0)
    early, *_, late = balanced(32, folded(4), head=2.4)
    assert early == late + 2
    assert balanced(32, straight(4), head=2.4) == (8, 9, 9, 6)
    assert balanced(6, straight(2, 2), head=5.0) == (2, 1, 3, 0)


def test_presets_count_the_embedding_and_the_head() -> None:
    embedding, head = costs_in_layers(preset("llama-3-8b"))
    assert 0 < embedding < 0.05 and 2 < head < 2.5
    assert _stages(pipeline_split(preset("llama-3-8b"), folded(4))) == [6, 8, 9, 9]
    older, newer = preset("llama-3-70b"), preset("llama-3.1-70b")
    assert pipeline_split(older, folded(2)) == pipeline_split(newer, folded(2))


@pytest.mark.parametrize("stages", range(1, 9))
def test_no_layer_is_lost_or_doubled_and_no_later_chunk_is_empty(stages: int) -> None:
    for layers in range(2 * stages, 40):
        for head in (0.0, 1.3, 6.0):
            split = balanced(layers, folded(stages), embedding=0.1, head=head)
            placed = [layer for chunk in chunks(split) for layer in chunk]
            assert placed == list(range(layers)) and len(split) == 2 * stages
            if stages > 1:
                assert all(split[1:-1])
            times = [count + (0.1 + head) * (s == 0) for s, count in enumerate(_stages(split))]
            # No worse than equal numbers of layers everywhere.
            assert max(times) <= -(-layers // stages) + head + 0.1 + 1e-9


def test_chunks() -> None:
    assert chunks((2, 0, 1)) == (range(2), range(2, 2), range(2, 3))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((1, 1, 2), r"pipeline_split=\[1, 1, 2\] has 3 entries: .*form 4 chunks"),
        ((2, 0, 1, 1), r"pipeline_split=\[2, 0, 1, 1\]: chunk 1, on stage 1, has no layers"),
        ((1, 1, 1, 2), r"places 5 layers, and the model has num_layers=4"),
        ((-1, 2, 2, 1), r"chunk 0, on stage 0, has no layers"),
        ((1, 1.0, 1, 1), r"must be whole numbers of layers"),
        ((1, True, 1, 1), r"must be whole numbers of layers"),
    ],
)
def test_splits_that_cannot_be_are_refused(split: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_split(split, 4, folded(2))


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipeline_parallel_size=4 needs at least 6 layers"):
        balanced(5, folded(4))


def _stage(number: int, stages: int, *counts: int) -> Stage:
    return Stage(number, Placement.folded(stages), counts)


def test_left_over_layers_have_no_partner_and_the_ends_of_the_model_meet() -> None:
    stage = _stage(0, 2, 3, 2)
    down, up = ((0, 4), (1, 3), (2, None)), ((None, 2), (3, 1), (4, 0))
    legs = stage.step(4).legs
    assert [leg.pairs for leg in stage.kinds() if None not in leg[1:3]] == [down, up]
    assert legs[0] == Leg(((0, None), (1, None), (2, None)), 0, None)
    assert [leg for leg in legs if leg.pairs == down] == [Leg(down, 2, 0), Leg(down, 3, 1)]
    assert [leg for leg in legs if leg.pairs == up] == [Leg(up, 2, 0), Leg(up, 3, 1)]


def test_on_the_last_stage_a_visit_goes_on_into_the_next() -> None:
    stage = _stage(1, 2, 1, 2)
    pairs = ((0, 2), (1, 1), (2, 0))
    forward, backward = ((0, None), (1, None), (2, None)), ((None, 2), (None, 1), (None, 0))
    legs = stage.step(3).legs
    assert legs[0] == Leg(forward, 0, None) and legs[2] == Leg(pairs, 2, 0)
    assert legs[2].begins == (("forward", 0), ("backward", 2))
    assert [leg.forward for leg in legs] == [0, 1, 2, None, None]
    assert Stage.alone(3).step(1).legs == (Leg(forward, 0, None), Leg(backward, None, 0))
