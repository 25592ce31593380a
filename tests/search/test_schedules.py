"""Pipeline schedules: whole lists for small cases, the static check for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lightning_dhellam.search.pipeline.schedules import (
    Schedule,
    ScheduleError,
    Visit,
    Work,
    check,
    dual_pipe_v,
    fold,
    interleaved_1f1b,
    joined,
    one_f_one_b,
    zero_bubble_v,
)

Make = Callable[[int, int], Schedule]
STAGES, MICRO_BATCHES = range(1, 9), range(1, 25)


def table(text: str) -> tuple[tuple[Visit, ...], ...]:
    """Passes from rows like `0F0  0F1+3B0`."""
    rows = [line.split() for line in text.strip().splitlines()]
    return tuple(tuple(tuple(map(Work.parse, p.split("+"))) for p in row) for row in rows)


def test_1f1b_whole() -> None:
    assert one_f_one_b(2, 3).visits == table("""
        0F0 0F1 0B0 0F2 0B1 0B2
        1F0 1B0 1F1 1B1 1F2 1B2
    """)


def test_interleaved_1f1b_whole() -> None:
    """Groups of two micro-batches; stage 0 has two chunks, 0 and 2, and four forwards ahead."""
    assert interleaved_1f1b(2, 4).visits == table("""
        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
        1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """)


def test_zero_bubble_v_whole() -> None:
    assert zero_bubble_v(2, 3).visits == table("""
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
        1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """)


def test_dual_pipe_v_whole() -> None:
    assert dual_pipe_v(2, 4).visits == table("""
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3+3B1 3F2+0B0 3B2 3F3+0B1 3B3 0I2 0W2 0I3 0W3
        1F0 2F0 1F1 2F1 1F2 2B0 2F2+1B0 1F3+2B1 2F3+1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """)


def test_fold_whole() -> None:
    assert fold(2, 4).visits == table("""
        0F0 0F1 3F0 0F2+3B0 3F1 0F3+3B1 3F2+0B0 3B2 3F3+0B1 3B3 0B2 0B3
        1F0 2F0 1F1 2F1 1F2+2B0 2F2+1B0 1F3+2B1 2F3+1B1 2B2 1B2 2B3 1B3
    """)


@pytest.mark.parametrize(
    ("make", "defined"),
    [
        (one_f_one_b, lambda stages, micro_batches: True),
        (interleaved_1f1b, lambda stages, micro_batches: micro_batches % stages == 0),
        (zero_bubble_v, lambda stages, micro_batches: True),
        (dual_pipe_v, lambda stages, micro_batches: micro_batches >= 2 * stages),
        (fold, lambda stages, micro_batches: True),
    ],
)
def test_every_schedule_can_be_carried_out(make: Make, defined: Callable[[int, int], bool]) -> None:
    for stages in STAGES:
        for micro_batches in MICRO_BATCHES:
            if defined(stages, micro_batches):
                schedule = make(stages, micro_batches)
                check(schedule)
                check(joined(schedule))
                assert (schedule.stages, schedule.micro_batches) == (stages, micro_batches)
            else:
                with pytest.raises(ScheduleError, match=rf"not {micro_batches}$"):
                    make(stages, micro_batches)


@pytest.mark.parametrize("rounds", [1, 3])
def test_interleaving_takes_any_number_of_rounds(rounds: int) -> None:
    for stages in STAGES:
        schedule = interleaved_1f1b(stages, 2 * stages, rounds)
        check(schedule)
        assert schedule.chunks == rounds * stages


def test_only_two_strands_share_a_pass() -> None:
    for make in (dual_pipe_v, fold):
        visits = [works for row in make(4, 8).visits for works in row]
        assert {len(works) for works in visits} == {1, 2}
    for make in (one_f_one_b, interleaved_1f1b, zero_bubble_v):
        assert {len(works) for row in make(4, 8).visits for works in row} == {1}


@pytest.mark.parametrize("make", [one_f_one_b, interleaved_1f1b, zero_bubble_v, dual_pipe_v, fold])
def test_numbers_below_one_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="stages=0 must be at least 1"):
        make(0, 4)
    with pytest.raises(ValueError, match="micro_batches=0 must be at least 1"):
        make(2, 0)


def test_halves_that_follow_each_other_are_joined() -> None:
    assert joined(zero_bubble_v(2, 3)).visits == table("""
        0F0 0F1 0F2 3F0 3B0 3F1 3B1 0B0 3F2 3B2 0B1 0B2
        1F0 2F0 1F1 2F1 2B0 1F2 1B0 2F2 2B1 1I1 2I2 1I2 1W1 2W2 1W2
    """)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0F0 0F1 0B0 \n 1F0 1B0 1F1 1B1", r"does F 1 times of chunk 0 for micro-batch 1"),
        ("0F0 0F1 0B0 0B1 0B1\n 1F0 1B0 1F1 1B1", r"does F 1 times, B 2 times of chunk 0"),
        ("0F0 0F1 0B0 0I1\n 1F0 1B0 1F1 1B1", r"does F 1 times, I 1 times of chunk 0"),
        ("0F0 0F1 0B0 0B1 0F2\n 1F0 1B0 1F1 1B1", r"chunk 0 for micro-batch 2, of 2 micro"),
        ("0F0 0F1 0B0 1B1\n 1F0 1B0 1F1 0B1", r"stage 0 .* does 1B1, but stage 1 holds chunk 1"),
        ("0F0+0F1 0B0 0B1\n 1F0 1B0 1F1 1B1", r"a visit is one work, or .* not '0F0\+0F1'"),
        (
            "0F0 0B0 0F1 0B1\n 1F0 1F1 1B0 1B1",
            r"deadlocks: stage 0 waits at visit 1, '0B0', for 1I0",
        ),
        ("0F0 0F1 0B0 0B1\n 1F1 1B1 1F0 1B0", r"forward message 0 from stage 0 to stage 1 is 0F0"),
        ("0F0 0F1 0W0 0I0 0B1\n 1F0 1B0 1F1 1B1", r"'0W0', for 0I0, which nobody"),
    ],
)
def test_a_schedule_that_cannot_be_carried_out_is_refused(rows: str, message: str) -> None:
    schedule = replace(one_f_one_b(2, 2), name="mine", visits=table(rows))
    with pytest.raises(ScheduleError, match=message):
        check(schedule)


def test_work_reads_its_own_print() -> None:
    for row in zero_bubble_v(3, 12).visits:
        for (work,) in row:
            assert Work.parse(str(work)) == work
    with pytest.raises(ScheduleError, match="'0X1' is no work"):
        Work.parse("0X1")


def test_a_schedule_prints_a_row_for_each_stage() -> None:
    assert str(one_f_one_b(2, 1)).splitlines() == [
        "schedule 1F1B",
        "stage 0  0F0 0B0",
        "stage 1  1F0 1B0",
    ]
