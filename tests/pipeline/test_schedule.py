"""The fold as data: what each stage does, that it can run, and what it holds."""

from __future__ import annotations

import pytest

from lightning_dhellam.pipeline import (
    Schedule,
    Visit,
    Way,
    fold,
    live_activations,
    peak_activations,
    verify,
)
from lightning_dhellam.pipeline.verify import ScheduleError

STAGES, MICRO_BATCHES = range(1, 9), range(1, 25)


def _shown(stages: int, micro_batches: int, *, backward: bool = True) -> list[str]:
    schedule = fold(stages, micro_batches, backward=backward)
    return [", ".join(map(str, visits)) for visits in schedule]


def test_two_stages_four_micro_batches() -> None:
    assert _shown(2, 4) == [
        "↓F0, ↓F1, ↑F0, ↓F2 B0, ↑F1, ↓F3 B1, ↑F2 B0, ↓B2, ↑F3 B1, ↓B3, ↑B2, ↑B3",
        "↓F0, ↑F0, ↓F1, ↑F1, ↓F2 B0, ↑F2 B0, ↓F3 B1, ↑F3 B1, ↓B2, ↑B2, ↓B3, ↑B3",
    ]


def test_one_stage_takes_each_micro_batch_backward_beside_the_next_ones_forward() -> None:
    assert _shown(1, 2) == ["↓F0, ↑F0, ↓F1 B0, ↑F1 B0, ↓B1, ↑B1"]


def test_fewer_micro_batches_than_stages() -> None:
    assert _shown(3, 1) == ["↓F0, ↑F0, ↓B0, ↑B0"] * 3


def test_forward_only() -> None:
    first, last = _shown(2, 3, backward=False)
    assert first == "↓F0, ↓F1, ↑F0, ↓F2, ↑F1, ↑F2"
    assert last == "↓F0, ↑F0, ↓F1, ↑F1, ↓F2, ↑F2"


@pytest.mark.parametrize("stages", STAGES)
def test_every_schedule_is_complete_ordered_and_free_of_deadlock(stages: int) -> None:
    for micro_batches in MICRO_BATCHES:
        for backward in (True, False):
            schedule = fold(stages, micro_batches, backward=backward)
            verify(schedule, micro_batches, backward=backward)


@pytest.mark.parametrize("stages", STAGES)
def test_activations_are_bounded_balanced_and_all_freed(stages: int) -> None:
    for micro_batches in MICRO_BATCHES:
        schedule = fold(stages, micro_batches)
        peaks = [peak_activations(visits) for visits in schedule]
        assert max(peaks) <= min(2 * stages + 1, 2 * micro_batches)
        if micro_batches >= 2 * stages:
            assert peaks == [2 * stages + 1] * stages
        assert all(live_activations(visits)[-1] == 0 for visits in schedule)


def _with(schedule: Schedule, stage: int, visits: list[Visit]) -> Schedule:
    return (*schedule[:stage], tuple(visits), *schedule[stage + 1 :])


def _swapped(stage: int, first: int, second: int) -> Schedule:
    schedule = fold(3, 4)
    visits = list(schedule[stage])
    visits[first], visits[second] = visits[second], visits[first]
    return _with(schedule, stage, visits)


def test_a_pass_that_is_missing_is_found() -> None:
    schedule = fold(2, 3)
    with pytest.raises(ScheduleError, match="stage 1 takes micro-batches"):
        verify(_with(schedule, 1, list(schedule[1][:-1])), 3)


def test_micro_batches_out_of_order_are_found() -> None:
    with pytest.raises(ScheduleError, match=r"not 0 to 3 in order"):
        verify(_swapped(0, 0, 1), 4)


def test_backward_before_forward_is_found() -> None:
    alone = [Visit(Way.DESCENDING, None, 0), Visit(Way.ASCENDING, 0, 0)]
    with pytest.raises(ScheduleError, match="comes before forward of micro-batch 0"):
        verify((tuple(alone),), 1)


def test_a_transfer_that_nobody_receives_is_found() -> None:
    first, second = fold(2, 2, backward=False)
    back = tuple(step for step in fold(2, 2)[1] if step.forward is None)
    with pytest.raises(ScheduleError, match=r"edge backward 1→0: sends \[0, 1\], receives \[\]"):
        verify((first, second + back), 2, backward=False)


def test_a_deadlock_is_found() -> None:
    """Stage 0 wants micro-batch 0 back before it sends micro-batch 1, stage 1 wants 1 first."""
    down, up = Way.DESCENDING, Way.ASCENDING
    first = [Visit(down, 0, None), Visit(up, 0, None), Visit(down, 1, None), Visit(up, 1, None)]
    second = [Visit(down, 0, None), Visit(down, 1, None), Visit(up, 0, None), Visit(up, 1, None)]
    with pytest.raises(ScheduleError, match="deadlock: nothing gets past start of visit 1"):
        verify((tuple(first), tuple(second)), 2, backward=False)


@pytest.mark.parametrize(("stages", "micro_batches"), [(0, 1), (1, 0), (2, -1)])
def test_no_stages_or_micro_batches_are_refused(stages: int, micro_batches: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        fold(stages, micro_batches)
